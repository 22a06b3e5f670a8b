"""What a decoder remembers of the tokens so far, so that a new token costs one token's work.

Use:  cache = Cache(model, batch=2, capacity=64); model(prompt, cache=cache); model(next_token, cache=cache)
See:  the same logits as without it, for a fraction of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Cache:
    """Keys and values of the tokens so far.

    capacity: the most tokens (prompt and new ones, padding included) that will be written; of an encoder–decoder's decoder.
    """

    def __init__(self, model, batch: int, capacity: int):
        c, like = model.config, model.embed.weight
        shape = (c.layers - c.encoder_layers, batch, c.kv_heads, capacity, c.head_dim)     # (L, B, G, S, D)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.mask = torch.ones(batch, capacity, dtype=torch.bool, device=like.device)      # (B, S), True = real token
        self.padded = False                                               # whether any token so far is padding
        self.length = 0                                                   # tokens written, padding included
        self.longest = 0                                                  # real tokens of the row that has most
        self.memory: dict = {}                                            # decoder layer → keys and values of what was encoded
        self.memory_visible = None                                        # (B, 1, 1, S) True = a real token there

    def see(self, mask: Tensor | None, T: int) -> Tensor | None:
        """Takes in the mask (B, T) of the tokens about to be written; returns that of all (B, S), None if none is padding."""
        if mask is not None:
            self.padded = True
            self.mask[:, self.length : self.length + T] = mask
        self.longest = self.longest + T if mask is None else int(self.mask[:, : self.length + T].sum(1).max())
        return self.mask[:, : self.length + T] if self.padded else None

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Puts k, v (B, G, T, D) at `start` and returns all so far: two of (B, G, S, D)."""
        end = start + k.shape[2]
        self.keys[layer, :, :, start:end] = k
        self.values[layer, :, :, start:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keeps the batch rows `rows` (B',), in that order: beam search and finished sequences."""
        self.keys, self.values, self.mask = self.keys[:, rows], self.values[:, rows], self.mask[rows]
        self.longest = int(self.mask[:, : self.length].sum(1).max())
        self.memory = {layer: (k[rows], v[rows]) for layer, (k, v) in self.memory.items()}
        self.memory_visible = None if self.memory_visible is None else self.memory_visible[rows]
