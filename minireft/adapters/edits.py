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
    """A ReFT's state for one forward pass. K counts the sets of weights that rows choose from."""

    positions: Tensor                   # (B, P), −1 = none
    sets: Tensor | None                 # (B, P) which set each position uses, −1 = none; None: there is one
    weights: list[tuple[Tensor, ...]]   # for every site down, up ([K,] r, C), bias ([K,] r); or W, V, U, b of `ReFT.parts`


def by_site(weights: tuple[Tensor, ...], one_set: bool) -> list[tuple[Tensor, ...]]:
    """Weights (S, K, r[, C]) as S tuples of ([K,] r[, C]): views, whose gradients are put together at once and not site by site."""
    return list(zip(*((w.squeeze(1) if one_set else w).unbind(0) for w in weights)))


class Edit:
    """h ← h + upᵀ (down h + bias) at the positions."""

    def __init__(self, adapter, slot: int):
        self.adapter, self.slot = adapter, slot

    def __call__(self, operation, context):
        prepared = context[self.adapter]
        if prepared is None:                                              # a decoding step: the prompt was edited in the prefill
            return operation
        positions, sets, weights = prepared
        down, up, bias = weights[self.slot]                               # ([K,] r, C) twice, ([K,] r)
        # In place: what stands at the site so far is a fresh tensor that nothing else needs.
        return lambda x: ops.low_rank_edit_at_(operation(x), positions, down, up, bias, sets)           # (B, T, C)


class PlainEdit(Edit):
    """h ← h + dropout(upᵀ (activation(W h + b) − V h)): on the edit alone, never on the stream that passes by."""

    def __call__(self, operation, context):
        prepared = context[self.adapter]
        return operation if prepared is None else lambda x: self.edit(operation(x), *prepared)

    def edit(self, h: Tensor, positions: Tensor, sets: Tensor | None, weights) -> Tensor:
        parts = weights[self.slot]                                        # (K, r, C) three times, (K, r)
        options, at = self.adapter.options, positions.clamp(min=0)[:, :, None].expand(-1, -1, h.shape[-1])     # (B, P, C)
        rows = h.gather(1, at).to(parts[0].dtype)                         # (B, P, C)
        for k in range(len(parts[0])):                                    # one set, or prefix and suffix
            W, V, up, b = (part[k] for part in parts)                     # (r, C) three times, (r,)
            if options["activation"]:
                difference = ACTIVATIONS[options["activation"]](F.linear(rows, W, b)) - F.linear(rows, V)               # (B, P, r)
            else:
                difference = F.linear(rows, W - V, b)                     # exactly 0 where W = V and b = 0
            change = F.dropout(difference @ up, options["dropout"], self.adapter.model.training)        # (B, P, C)
            mine = positions >= 0 if sets is None else (positions >= 0) & (sets == k)      # (B, P)
            h = h.scatter_add(1, at, (change * mine[:, :, None]).to(h.dtype))
        return h
