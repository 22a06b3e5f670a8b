"""What a ReFT puts at a site: one layer's share of a low-rank edit of the stream at prompt positions.

Use:  Edit and PlainEdit are made by adapters/reft.py; both read what the adapter prepared for this forward pass.
See:  Edit is one fused operation in place; PlainEdit is the same formula spelled out, with dropout and an activation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


class Prepared(NamedTuple):
    """A ReFT's state for one forward pass. S counts the edited sites, K the sets of weights that rows choose from."""

    positions: Tensor                   # (B, P), −1 = none
    sets: Tensor | None                 # (B, P) which set each position uses, −1 = none; None: there is one
    weights: tuple[Tensor, ...]         # down, up (S, K, r, C), bias (S, K, r); or the parts of `ReFT.parts`


class Edit:
    """h ← h + upᵀ (down h + bias) at the positions."""

    def __init__(self, adapter, slot: int):
        self.adapter, self.slot = adapter, slot

    def __call__(self, operation, context):
        prepared = context[self.adapter]
        if prepared is None:                                              # a decoding step: the prompt was edited in the prefill
            return operation
        positions, sets, weights = prepared
        down, up, bias = (w[self.slot] if sets is not None else w[self.slot, 0] for w in weights)       # ([K,] r, C)
        # In place: what stands at the site so far is a fresh tensor that nothing else needs.
        return lambda x: ops.low_rank_edit_at_(operation(x), positions, down, up, bias, sets)           # (B, T, C)


class PlainEdit(Edit):
    """h ← h + dropout(upᵀ (activation(W h + b) − V h)): on the edit alone, never on the stream that passes by."""

    def __call__(self, operation, context):
        prepared = context[self.adapter]
        return operation if prepared is None else lambda x: self.edit(operation(x), *prepared)

    def edit(self, h: Tensor, positions: Tensor, sets: Tensor | None, parts) -> Tensor:
        options, at = self.adapter.options, positions.clamp(min=0)[:, :, None].expand(-1, -1, h.shape[-1])     # (B, P, C)
        rows = h.gather(1, at).to(parts[0].dtype)                         # (B, P, C)
        for k in range(parts[0].shape[1]):                                # one set, or prefix and suffix
            W, V, up, b = (part[self.slot, k] for part in parts)          # (r, C) three times, (r,)
            if options["activation"]:
                difference = ACTIVATIONS[options["activation"]](F.linear(rows, W, b)) - F.linear(rows, V)               # (B, P, r)
            else:
                difference = F.linear(rows, W - V, b)                     # exactly 0 where W = V and b = 0
            change = F.dropout(difference @ up, options["dropout"], self.adapter.model.training)        # (B, P, C)
            mine = positions >= 0 if sets is None else (positions >= 0) & (sets == k)      # (B, P)
            h = h.scatter_add(1, at, (change * mine[:, :, None]).to(h.dtype))
        return h
