"""Folding (IA)³'s vectors into the base's weights, and taking them out again.

Use:  ia3.merge(); ia3.unmerge()
See:  after unmerge every weight has its own bits again, zeros in a vector or not.
"""

from __future__ import annotations

import torch


def total(weight) -> float:
    """Tells a tensor that somebody changed from one that nobody did."""
    return weight.detach().sum(dtype=torch.float64).item()


class Merged:
    """The base's own tensors, kept while scaled ones stand in their place. Dividing could not bring them back: 0 · w / 0."""

    def __init__(self, places):
        """places: ((site, weight, bias or None, dim), l), where l (width,) scales that dimension of the weight, and the bias."""
        self.kept: dict = {}                                              # weight → [its own bits, its sum once scaled]
        for (_, weight, bias, dim), l in places:
            self.scale(weight, l if weight.dim() == 1 or dim == 1 else l[:, None])
            if bias is not None:
                self.scale(bias, l)

    @torch.no_grad()
    def scale(self, weight, l) -> None:
        kept = self.kept.setdefault(weight, [weight.detach().clone(), 0])
        weight.copy_(weight * l)                                          # the product is formed in fp32 and rounded once
        kept[1] = total(weight)

    @torch.no_grad()
    def undo(self) -> None:
        """ValueError, with nothing undone, when a tensor has changed since."""
        if any(total(weight) != then for weight, (_, then) in self.kept.items()):
            raise ValueError("the base's weights changed since these (IA)³ vectors were merged, and would be lost: undo that first")
        for weight, (original, _) in self.kept.items():
            weight.copy_(original)
