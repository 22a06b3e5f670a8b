"""Putting adapters together: slices of one R that are trained apart, sums of edits, (IA)³ vectors averaged.

Use:  mood = Subspace(reft, [0, 1]); train(model, [mood], ...); mood.write_back()      # the other directions are untouched
      both = weighted_sum([reft_a, reft_b], [0.5, 0.5])                # the average of two edits, itself a DiReFT
See:  slices trained apart do not touch each other's directions, because the rows of one R are orthogonal.
"""

from __future__ import annotations

import math

import torch

from .ia3 import IA3
from .more.vectors import mixed_vectors
from .orthonormal import orthonormalise
from .reft import DiReFT, LoReFT, ReFT


class Subspace(ReFT):
    """Some of a LoReFT's r directions as an adapter of its own: it trains their rows of W and b, with R fixed.

    directions: numbers from 0 to r − 1. Slices trained apart are used together through the parent, after `write_back()`
    (one after the other they would not be: W reads what the slice before it wrote). In a `Bank`, slices of one parent, and
    the parent for all of them at once, let every example choose. Raises ValueError for a slice outside r.
    """

    def __init__(self, parent: LoReFT, directions):
        if not isinstance(parent, LoReFT):
            raise ValueError(f"a {type(parent).__name__} has no orthonormal R to slice: expected a LoReFT")
        rank = parent.options["rank"]
        picked = list(directions) if hasattr(directions, "__iter__") else [directions]
        if not picked or len(set(picked)) < len(picked) or not all(type(d) is int and 0 <= d < rank for d in picked):
            raise ValueError(f"directions are {directions!r}: expected distinct numbers from 0 to {rank - 1}, "
                             f"the parent's rank being {rank}")
        super().__init__(parent.model, **{**parent.options, "rank": len(picked)})
        self.slice, self.of = picked, (parent,)                     # a tuple hides the parent from our own parameters
        with torch.no_grad():
            self.register_buffer("R", orthonormalise(parent.m)[:, :, picked].clone())        # (S, K, |slice|, C)
            self.w.copy_(parent.w[:, :, picked])
            self.b.copy_(parent.b[:, :, picked])

    def start(self, S, K, r, C, paper):
        self.w, self.b = self.parameter(S, K, r, C), self.parameter(S, K, r)

    def parts(self):
        return self.w, self.R, self.R, self.b

    def write_back(self) -> None:
        """Puts the trained rows into the parent."""
        parent, = self.of
        with torch.no_grad():
            parent.w[:, :, self.slice] = self.w
            parent.b[:, :, self.slice] = self.b

    def save(self, path):
        raise ValueError("a slice is saved with its parent: call write_back(), then save the parent")


def weighted_sum(adapters: list, weights: list[float], space: str = "linear"):
    """One adapter made of several of a kind, for the same model; it is not attached.

    ReFTs: the edit Σ w_i · (edit of adapter i), exactly: a DiReFT of rank Σ r_i. Only edits of the same layers, site and
    positions add up. Averaging the parameters instead would be meaningless: a mean of two orthonormal R is neither
    orthonormal nor between their edits.
    (IA)³: the vectors l = 1 + Σ w_i (l_i − 1), or with space="log" l = Π l_i^{w_i}, for vectors above 0 alone: with weights
    of 1 that is what they do when all are attached. A vector that one of them has not is 1 there.
    Raises ValueError for what cannot be added.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: expected as many of the one as of the other")
    if not all(isinstance(weight, (int, float)) and math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights are {weights!r}: expected finite numbers")
    known = ("linear", "log") if isinstance(adapters[0], IA3) else ("linear",)
    if space not in known:
        raise ValueError(f"space is {space!r}: expected {' or '.join(map(repr, known))} for a {type(adapters[0]).__name__}")
    return mixed_vectors(adapters, weights, space) if isinstance(adapters[0], IA3) else sum_of_edits(adapters, weights)


def sum_of_edits(adapters: list[ReFT], weights: list[float]) -> DiReFT:
    first = adapters[0]
    for adapter in adapters:
        if not isinstance(adapter, ReFT) or adapter.options.get("activation"):
            raise ValueError(f"{type(adapter).__name__} has no linear low-rank edit to add: expected plain ReFTs")
        for name in ("layers", "site", "tied", "where", "model"):
            mine, theirs = getattr(adapter, name), getattr(first, name)
            if mine is not theirs and mine != theirs:
                raise ValueError(f"the adapters differ in their {name.replace('where', 'positions')}: edits of different places do not add up")
    together = DiReFT(first.model, rank=sum(a.parts()[0].shape[2] for a in adapters), positions=str(first.where),
                      layers=first.layers if first.site != "embed" else "all", tied=first.tied, site=first.site,
                      strict=first.where.strict)
    with torch.no_grad():
        each = [a.parts() for a in adapters]                              # W, V, U (S, K, r_i, C), b (S, K, r_i)
        together.w1.copy_(torch.cat([w * (W - V) for w, (W, V, _, _) in zip(weights, each)], 2))
        together.w2.copy_(torch.cat([U * a.strength for a, (_, _, U, _) in zip(adapters, each)], 2))
        together.b.copy_(torch.cat([w * b for w, (_, _, _, b) in zip(weights, each)], 2))
    return together
