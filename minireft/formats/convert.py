"""From one form on disk to another: bases to ours or Hugging Face's, adapters to ours, pyreft's or PEFT's, or into their base.

Use:  convert("hf-folder", "my-base"); convert("reft-folder", "reft.safetensors", base="my-base", positions="f7+l7")
      merge("my-base", "lora.safetensors", "merged")      # a Hugging Face folder that needs no adapter any more
See:  a file or folder that the other program loads, with equal logits; one error where the other has no place for something.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .. import checkpoint
from ..adapters import IA3, LoRA, load_adapter
from ..adapters.lora import linears
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
    check(dst, to, forms, "a base" if base is None else "an adapter")
    if base is None:
        if foreign:
            raise ValueError(f"{', '.join(foreign)} belongs to an adapter: name its base, too")
        model, tokenizer = checkpoint.load(src, dtype=dtype)
        forms[to](model, tokenizer, dst, dtype)
        return f"{sum(p.numel() for p in model.parameters()):,} parameters, {'with' if tokenizer else 'no'} tokenizer"
    adapter = load_adapter(checkpoint.load(base)[0], src, **foreign)
    forms[to](adapter, dst)
    return repr(adapter)


def merge(base, adapter, dst, to: str = "huggingface", dtype=None, force: bool = False) -> str:
    """Writes the base with a LoRA or an (IA)³ folded into its weights and biases, and says in a line what it was.

    to: "huggingface" or "minireft"; dtype of the stored weights (None: float32); force: merge an adapter of another base.
    Raises ValueError where dst is there already, or no weights compute what the adapter does.
    """
    check(dst, to, BASES, "a base")
    model, tokenizer = checkpoint.load(base)
    fold(made := load_adapter(model, adapter, force))
    BASES[to](model, tokenizer, dst, dtype)
    return repr(made)


@torch.no_grad()
def fold(adapter) -> None:
    """Puts an adapter into its base's weights: W + (α/r) B A, or rows and biases times l. ValueError where no weights do what it does."""
    if type(adapter) is IA3:
        adapter.merge()
    elif type(adapter) is LoRA:
        factors = adapter.factors()
        for linear, name, slot in linears(adapter.model, adapter.sites):
            a, b = (w[slot] for w in factors[name])                       # (r, in), (out, r)
            linear.weight.add_(b @ a)
    else:
        raise ValueError(f"a {type(adapter).__name__} cannot be merged: no weights of the base compute what it does at some tokens and not at "
                         "others, or in training only; LoRA and IA3 can be. Keep its file beside the base")


def check(dst, to: str, forms: dict, what: str) -> None:
    if to not in forms:
        raise ValueError(f"to is {to!r}: {what} can be written as {', '.join(forms)}")
    if Path(dst).exists():
        raise ValueError(f"{dst} is there already: choose another place, or remove it")
