"""The CUDA kernels in the emulator, called on CPU tensors without a build of the package: g++ and ctypes.
Use `Emulator()`, then `.low_rank_edit(h, down, up, bias)`, …; `.order("random", 3)`; `with .counting() as counts`.
You should see minireft.reference's numbers; the first call compiles csrc/cuda for some seconds, into build/.
"""

import ctypes
import hashlib
import json
import os
import re
import subprocess
from contextlib import contextmanager
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("cuda/low_rank_edit.cu", "cuda/scale.cu", "cuda/noisy_embedding.cu", "emulator/driver.cpp")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "swiglu": 3}


def build(csrc: Path = ROOT / "csrc", folder: Path = ROOT / "build" / "emulator", flags: str = "-O2") -> Path:
    """Compile the kernels of `csrc` for the emulator into one shared object; what has not changed is reused."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in SOURCES:
        name = hashlib.sha256(_with_headers(csrc / source) + flags.encode()).hexdigest()[:16]
        objects.append(folder / f"{Path(source).stem}-{name}.o")
        if not objects[-1].exists():
            partial = objects[-1].with_suffix(f".{os.getpid()}")
            command = f"{os.environ.get('CXX', 'g++')} -x c++ -std=c++17 -g1 {flags} -fPIC -Wall -DMINIREFT_EMULATOR"
            done = subprocess.run(
                [*command.split(), "-ffp-contract=off", "-c", str(csrc / source), "-o", str(partial)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"{source} does not compile for the emulator:\n{done.stderr[:4000]}")
            partial.rename(objects[-1])
    name = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    library = folder / f"kernels-{name}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [os.environ.get("CXX", "g++"), "-shared", *flags.split(), *map(str, objects), "-o", str(partial)],
            check=True,
        )
        partial.rename(library)
    return library


def _with_headers(path: Path) -> bytes:
    """What a source says, and what the headers say that it includes, and so on."""
    code = path.read_bytes()
    return code + b"".join(
        _with_headers(path.parent / name.decode()) for name in re.findall(rb'#include "(.+?)"', code)
    )


# ---- the structs of csrc/launchers.h -------------------------------------------------------------------------------


def _struct(name: str, **fields):
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


Stream = _struct("Stream", data=c_void_p, batch_stride=c_int64, token_stride=c_int64)
Index = _struct("Index", data=c_void_p, stride_b=c_int64, stride_p=c_int64)
Edit = _struct(
    "Edit",
    B=c_int64,
    T=c_int64,
    C=c_int64,
    P=c_int64,
    r=c_int64,
    K=c_int64,
    positions=Index,
    tasks=Index,
    dtype=c_int,
    weight_dtype=c_int,
)
EditForward = _struct(
    "EditForward", h=Stream, out=Stream, down=c_void_p, up=c_void_p, bias=c_void_p, rows=c_void_p, delta=c_void_p
)
EditBackward = _struct(
    "EditBackward",
    g=Stream,
    h=Stream,
    rows=c_void_p,
    delta=c_void_p,
    down=c_void_p,
    up=c_void_p,
    dh=Stream,
    ddown=c_void_p,
    dup=c_void_p,
    dbias=c_void_p,
    workspace=c_void_p,
)
Scale = _struct(
    "Scale", B=c_int64, T=c_int64, K=c_int64, tasks=Index, activation=c_int, dtype=c_int, weight_dtype=c_int
)
ScaleForward = _struct("ScaleForward", C=c_int64, x=Stream, up=Stream, out=Stream, l=c_void_p)
ScaleBackward = _struct(
    "ScaleBackward",
    C=c_int64,
    g=Stream,
    x=Stream,
    up=Stream,
    dx=Stream,
    dup=Stream,
    l=c_void_p,
    dl=c_void_p,
    workspace=c_void_p,
)
Noise = _struct(
    "Noise",
    B=c_int64,
    T=c_int64,
    C=c_int64,
    V=c_int64,
    ids=Index,
    lengths=Index,
    rows=Index,
    index=Index,
    seed=c_void_p,
    alpha=c_float,
    normal=c_bool,
    dtype=c_int,
)
NoiseForward = _struct("NoiseForward", weight=c_void_p, out=c_void_p)
NoiseBackward = _struct("NoiseBackward", g=Stream, order=c_void_p, dweight=c_void_p, workspace=c_void_p)


def _stream(x: Tensor | None) -> Stream:
    return Stream() if x is None else Stream(x.data_ptr(), x.stride(0), x.stride(1))


def _index(x: Tensor | None) -> Index:
    return Index() if x is None else Index(x.data_ptr(), x.stride(0), x.stride(1) if x.dim() == 2 else 0)


def _data(x: Tensor | None):
    return None if x is None else x.data_ptr()


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory that a kernel is to write, full of NaN."""
    return torch.full(shape, float("nan"), dtype=dtype)


class Emulator:
    """The emulated launchers on CPU tensors: (B, T, C) streams, outputs poisoned first, complaints as RuntimeError."""

    def __init__(self, library: Path | None = None):
        self.library = ctypes.CDLL(str(library or build()))
        for name in ("low_rank_edit", "scale", "noisy_embedding"):
            for suffix in ("", "_backward"):
                getattr(self.library, f"emulated_{name}{suffix}").restype = c_char_p
            getattr(self.library, f"emulated_{name}_workspace").restype = c_int64
        self.library.emulator_stop_counting.restype = c_char_p

    def order(self, name: str, seed: int = 1) -> None:
        """The order in which a block's threads run: "forward", "reverse" or "random"."""
        self.library.emulator_set_order(["forward", "reverse", "random"].index(name), ctypes.c_uint64(seed))

    @contextmanager
    def counting(self, l2_bytes: int = 3 << 20):
        """Count what the kernels called inside do; the dict that `with … as counts` gives is filled at the end."""
        counts: dict = {}
        self.library.emulator_start_counting(c_int64(l2_bytes))
        try:
            yield counts
        finally:
            counts.update(json.loads(self.library.emulator_stop_counting()))

    def _call(self, name: str, *arguments) -> None:
        wrong = getattr(self.library, f"emulated_{name}")(
            *[ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
        )
        if wrong:
            raise RuntimeError(wrong.decode())

    def _workspace(self, name: str, *arguments) -> Tensor:
        arguments = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else c_int64(a) for a in arguments]
        size = getattr(self.library, f"emulated_{name}_workspace")(*arguments)
        return torch.full((max(size // 4, 4),), float("nan"))

    # ---- low-rank edit ----

    def edit(self, h: Tensor, down: Tensor, positions: Tensor | None, tasks: Tensor | None) -> Edit:
        B, T, C = h.shape
        r, K = down.shape[-2], down.shape[0] if tasks is not None else 1
        return Edit(
            B,
            T,
            C,
            T if positions is None else positions.shape[1],
            r,
            K,
            _index(positions),
            _index(tasks),
            DTYPES[h.dtype],
            DTYPES[down.dtype],
        )

    def low_rank_edit(
        self,
        h: Tensor,
        down: Tensor,
        up: Tensor,
        bias: Tensor,
        positions: Tensor | None = None,
        tasks: Tensor | None = None,
        out: Tensor | None = None,
        save: bool = True,
    ):
        """→ out (B, T, C), δ (B·P, r), rows (B·P, C) or None.  With positions, out starts as h, or is h itself."""
        e = self.edit(h, down, positions, tasks)
        if out is None:
            out = poisoned(*h.shape, dtype=h.dtype) if positions is None and tasks is None else h.clone()
        delta = poisoned(e.B * e.P, e.r, dtype=torch.float32) if save else None
        rows = poisoned(e.B * e.P, e.C, dtype=h.dtype) if save and positions is not None else None
        self._call(
            "low_rank_edit",
            e,
            EditForward(_stream(h), _stream(out), _data(down), _data(up), _data(bias), _data(rows), _data(delta)),
        )
        return out, delta, rows

    def low_rank_edit_backward(
        self,
        g: Tensor,
        h: Tensor | None,
        rows: Tensor | None,
        delta: Tensor,
        down: Tensor,
        up: Tensor,
        positions: Tensor | None = None,
        tasks: Tensor | None = None,
        dh: Tensor | None = None,
        weights: bool = True,
    ):
        """→ dh, ddown, dup, dbias.  With positions, dh starts as g."""
        e = self.edit(g, down, positions, tasks)
        if dh is None:
            dh = poisoned(*g.shape, dtype=g.dtype) if positions is None and tasks is None else g.clone()
        shape = down.shape if tasks is not None else (1, *down.shape)
        gradients = [
            poisoned(*shape, dtype=down.dtype),
            poisoned(*shape, dtype=down.dtype),
            poisoned(*shape[:2], dtype=down.dtype),
        ]
        workspace = self._workspace("low_rank_edit", e)
        self._call(
            "low_rank_edit_backward",
            e,
            EditBackward(
                _stream(g),
                _stream(h),
                _data(rows),
                _data(delta),
                _data(down),
                _data(up),
                _stream(dh),
                *([_data(x) for x in gradients] if weights else [None] * 3),
                _data(workspace),
            ),
        )
        return dh, *(x.view(*down.shape[: x.dim() - 3 + down.dim()]) if tasks is None else x for x in gradients)

    # ---- scales ----

    def scale(
        self, streams: list, l: list, tasks: Tensor | None = None, activation: str = "none", ups: list | None = None
    ) -> list:
        """Each of `streams` (B, T, C) scaled by its l, in one launch."""
        ups = ups or [None] * len(streams)
        s = self._scale(streams[0], l[0], tasks, activation)
        outs = [poisoned(*x.shape, dtype=x.dtype) for x in streams]
        jobs = [
            ScaleForward(x.shape[2], _stream(x), _stream(up), _stream(out), _data(v))
            for x, up, out, v in zip(streams, ups, outs, l)
        ]
        self._call("scale", s, (ScaleForward * len(jobs))(*jobs), len(jobs))
        return outs

    def scale_backward(
        self,
        gs: list,
        streams: list,
        l: list,
        tasks: Tensor | None = None,
        activation: str = "none",
        ups: list | None = None,
    ) -> list:
        """→ (dx, dup or None, dl) for each stream."""
        ups = ups or [None] * len(streams)
        s = self._scale(streams[0], l[0], tasks, activation)
        keep, jobs = [], []
        for g, x, up, v in zip(gs, streams, ups, l):
            dx, dup = poisoned(*x.shape, dtype=x.dtype), None if up is None else poisoned(*x.shape, dtype=x.dtype)
            dl, workspace = poisoned(*v.shape, dtype=v.dtype), self._workspace("scale", s, x.shape[2])
            keep.append((dx, dup, dl, workspace))
            jobs.append(
                ScaleBackward(
                    x.shape[2],
                    _stream(g),
                    _stream(x),
                    _stream(up),
                    _stream(dx),
                    _stream(dup),
                    _data(v),
                    _data(dl),
                    _data(workspace),
                )
            )
        self._call("scale_backward", s, (ScaleBackward * len(jobs))(*jobs), len(jobs))
        return [k[:3] for k in keep]

    def _scale(self, x: Tensor, l: Tensor, tasks: Tensor | None, activation: str) -> Scale:
        return Scale(
            x.shape[0],
            x.shape[1],
            len(l) if tasks is not None else 1,
            _index(tasks),
            ACTIVATIONS[activation],
            DTYPES[x.dtype],
            DTYPES[l.dtype],
        )

    # ---- noisy embedding ----

    def noisy_embedding(
        self,
        ids: Tensor,
        weight: Tensor,
        alpha: float,
        seed: Tensor,
        lengths: Tensor | None = None,
        rows: Tensor | None = None,
        index: Tensor | None = None,
        distribution: str = "uniform",
    ) -> Tensor:
        (B, T), (V, C) = ids.shape, weight.shape
        out = poisoned(B, T, C, dtype=weight.dtype)
        n = Noise(
            B,
            T,
            C,
            V,
            _index(ids),
            _index(lengths),
            _index(rows),
            _index(index),
            _data(seed),
            alpha,
            distribution == "gaussian",
            DTYPES[weight.dtype],
        )
        self._call("noisy_embedding", n, NoiseForward(_data(weight), _data(out)))
        return out

    def noisy_embedding_backward(self, g: Tensor, ids: Tensor, vocab: int) -> Tensor:
        order = ids.reshape(-1).argsort(stable=True)
        dweight = torch.zeros(vocab, g.shape[2], dtype=g.dtype)
        n = Noise(*g.shape, vocab, _index(ids), dtype=DTYPES[g.dtype])
        self._call("noisy_embedding_backward", n, NoiseBackward(_stream(g), _data(order), _data(dweight), None))
        return dweight
