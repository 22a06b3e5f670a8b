"""From one form on disk to another: bases to ours or Hugging Face's, adapters to ours, pyreft's or PEFT's.

Use:  convert("hf-folder", "my-base"); convert("reft-folder", "reft.safetensors", base="my-base", positions="f7+l7")
See:  a file or folder that the other program loads, with equal logits; one error where the other has no place for something.
"""

from __future__ import annotations

from pathlib import Path

from .. import checkpoint
from ..adapters import load_adapter
from . import huggingface, peft, pyreft

BASES = {"minireft": checkpoint.save, "huggingface": huggingface.save}                     # (model, tokenizer, path, dtype)
ADAPTERS = {"minireft": lambda adapter, path: adapter.save(path), "pyreft": pyreft.write, "peft": peft.write}


def convert(src, dst, base=None, to: str = "minireft", dtype=None, **foreign) -> str:
    """Writes `src` to `dst` in the form `to`, and says in a line what it was.

    Without `base`, src is a base (to "minireft" or "huggingface"; dtype of the stored weights, None: float32). With it,
    src is an adapter for that base (to "minireft", "pyreft" or "peft"); foreign: as in `load_adapter`, for instance
    positions. Raises ValueError where dst is there already, or the form has no place for what src holds.
    """
    forms = BASES if base is None else ADAPTERS
    if to not in forms:
        raise ValueError(f"to is {to!r}: {'a base' if base is None else 'an adapter'} can be written as {', '.join(forms)}")
    if Path(dst).exists():
        raise ValueError(f"{dst} is there already: choose another place, or remove it")
    if base is None:
        if foreign:
            raise ValueError(f"{', '.join(foreign)} belongs to an adapter: name its base, too")
        model, tokenizer = checkpoint.load(src, dtype=dtype)
        forms[to](model, tokenizer, dst, dtype)
        return f"{sum(p.numel() for p in model.parameters()):,} parameters, {'with' if tokenizer else 'no'} tokenizer"
    adapter = load_adapter(checkpoint.load(base)[0], src, **foreign)
    forms[to](adapter, dst)
    return repr(adapter)
