"""What `minireft tune --dry-run` says: the memory of a step by parts, and what fits on which card, before a weight is read.

Use:  show(model, adapters, config, lengths)      # the model on the meta device, lengths of the examples in tokens
See:  how many examples fit at once into 8, 12, 16 and 24 GB, by length, precision, and with or without recomputing.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .memory import CONTEXT, GB, estimate, line, words
from .model import Model

CARDS = (8, 12, 16, 24)                             # GB


def fitting(model, adapters, config, length: int, card: float) -> list[int]:
    """How many rows of `length` tokens fit each card: 95 % of it, after the driver's share."""
    a, b = line(model, adapters, config, length)
    return [max(0, int((0.95 * size * GB - CONTEXT - a) // b)) for size in card]


def show(model: Model, adapters, config, lengths: list[int]) -> None:
    longest, pieces = max(lengths), 1 if config.accumulate == "auto" else config.accumulate
    rows = config.batch_size // pieces
    memory = estimate(model, adapters, config, rows, longest)
    c, each = model.config, model.embed.weight.element_size()
    cache = 2 * (c.layers - c.encoder_layers) * rows * longest * c.kv_heads * c.head_dim * each
    print(f"estimate for {rows} examples at a time of up to {longest} tokens, {str(model.embed.weight.dtype)[6:]} weights; nothing was loaded")
    for name, value in (("weights", memory.weights), ("adapter, gradients", memory.adapter), ("optimiser", memory.optimizer),
                        ("activations", memory.activations), ("together", memory.peak)):
        print(f"  {name:20} {words(value):>9}")
    print(f"  generating: {words(memory.weights)} and a cache of {words(cache)} for as many rows of as many tokens")
    print("examples at a time that fit a card of     " + "".join(f"{size:>7} GB" for size in CARDS))
    for length in sorted({longest, sorted(lengths)[len(lengths) // 2], c.context}):
        for half in (False, True):
            with torch.device("meta"):
                like = Model(c).to(torch.bfloat16 if half and not config.full else torch.float32)
            for recompute in (False, True):
                settings = replace(config, accumulate=2, recompute=recompute, bf16=half and config.full)
                name = f"{length} tokens, {'bf16' if half else 'fp32'}" + ", recompute" * recompute
                print(f"  {name:40}" + "".join(f"{rows:>10,}" for rows in fitting(like, adapters, settings, length, CARDS)))
