"""T-Few's released (IA)³ vectors for T0: one torch file of tensors, onto a T5 of version 1.1.

Use:  ia3 = minireft.load_adapter(model, "finish.pt")       # or a model on the meta device: its configuration is enough
See:  T0-3B's 192 tensors, 540,672 numbers, as one IA3 with sites key, value and ffn; a base whose layers do not fit is named.

Written by github.com/r-three/t-few, src/models/lora.py: `MODULE.multi_lora_b`, (out, 1), multiplies what the Linear MODULE gives.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .. import files
from .families import T5, numbered

PART = ".multi_lora_b"
# Our Linear in a block → the vector that scales its output. In a gated feed-forward, γ(gate) ⊙ (l ⊙ up) = l ⊙ (γ(gate) ⊙ up).
VECTORS = {"ffn.up": "ffn", "ffn.down": "ffn_output", **{
    f"{stack}.{linear}": prefix + name for stack, prefix in (("attention", ""), ("cross", "cross_")) for linear, name in (
        ("key", "key"), ("value", "value"), ("query", "query"), ("output", "attention_output"))}}


def is_file(path) -> bool:
    return Path(path).suffix in (".pt", ".pth") and Path(path).is_file()


def places(config) -> dict[str, tuple[str, int]]:
    """Their Linear → (our vector, our layer), in the order of our layers."""
    found = []
    for theirs, row in T5.weights.items():
        for their_layer, layer in numbered(theirs, row, config):
            linear = row.ours[0].removeprefix("blocks.{}.").removesuffix(".weight")
            if linear in VECTORS:
                found.append((layer, theirs.format(their_layer).removesuffix(".weight"), VECTORS[linear]))
    return {theirs: (vector, layer) for layer, theirs, vector in sorted(found)}


def read(path, model) -> tuple[str, dict, dict[str, Tensor]]:
    """(kind, options, tensors) of the vectors in a file, for this model: what adapter.save() would have stored, l − 1."""
    config, stored = model.config, files.read_torch(path)
    if config.architecture != "encoder-decoder" or config.activation != "geglu_tanh":
        raise ValueError(f"{path} holds T-Few's vectors, which are for T5 1.1 and T0: this model is a {config.architecture} "
                         f"with activation {config.activation}")
    known, rows = places(config), {}
    for name in stored:
        if not name.endswith(PART) or name.removesuffix(PART) not in known:
            raise ValueError(f"{path} has {name}: expected the {PART[1:]} of a Linear that this model has, as in {next(iter(known))}{PART}")
    wanted = {known[name.removesuffix(PART)][0] for name in stored}       # our vectors; every layer must have them
    missing = [theirs for theirs, (vector, _) in known.items() if vector in wanted and theirs + PART not in stored]
    if missing or not stored:
        raise ValueError(f"{path} lacks {', '.join(missing[:3])}{' ...' * (len(missing) > 3)} ({len(missing)} in all): it holds a "
                         "smaller model's vectors, or was cut off" if missing else f"{path} holds no vectors")
    for theirs, (vector, _) in known.items():
        if vector in wanted:
            rows.setdefault(vector, []).append(stored[theirs + PART].float().flatten() - 1)
    odd = [vector for vector, ls in rows.items() if len({l.shape for l in ls}) > 1]
    if odd:
        raise ValueError(f"{path} has vectors of different lengths for {', '.join(odd)}: expected one length on all layers")
    own = {"key", "value", "query", "attention_output"}
    sites = ["self_" + vector if vector in own else vector for vector in rows]
    return "IA3", {"sites": sites, "init_scale": 0.0, "layer_norm": False}, {vector: torch.stack(ls) for vector, ls in rows.items()}
