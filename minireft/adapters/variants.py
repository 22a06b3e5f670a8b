"""LoReFT's kin: what is left when a part of its formula is taken away (Wu et al. 2024, appendix on ablations).

Use:  as LoReFT and DiReFT; SteeringVector takes vectors that somebody found otherwise, and trains nothing
See:  every one is a line of W, V, U, b in   h ← h + Uᵀ (W h + b − V h).
"""

from __future__ import annotations

import torch

from .orthonormal import orthonormalise
from .reft import DiReFT, ReFT


class NoReFT(DiReFT):
    """h + W₂ᵀ(W₁ h + b − W₂ h): LoReFT without the orthogonality. Starts as the identity with W₁ = W₂."""

    def start(self, S, K, r, C, paper):
        super().start(S, K, r, C, paper)
        if not paper:
            with torch.no_grad():
                self.w1.copy_(self.w2)

    def parts(self):
        return self.w1, self.w2, self.w2, self.b


class ConsReFT(ReFT):
    """h + Rᵀ(b − R h): writes a constant into the subspace. No identity start exists; b = 0 begins by erasing it."""

    def start(self, S, K, r, C, paper):
        self.m = self.directions(S, K, r, C)
        self.b = self.drawn(S, K, r, width=C, paper=paper)

    def parts(self):
        R = orthonormalise(self.m)
        return torch.zeros_like(R), R, R, self.b


class LobiReFT(ConsReFT):
    """h + Rᵀ b: adds a constant, whatever h is. Starts as the identity."""

    def parts(self):
        R = orthonormalise(self.m)
        return torch.zeros_like(R), torch.zeros_like(R), R, self.b


class SteeringVector(ReFT):
    """h + s v: a fixed vector for each layer, such as a difference of means; `strength` is s. Nothing is trained.

    vectors (S, C), one for each of `layers`; None leaves zeros to be loaded.
    """

    def __init__(self, model, vectors=None, layers="all", positions="all", site: str = "output"):
        super().__init__(model, rank=1, layers=layers, positions=positions, site=site)
        self.options = {"layers": self.layers, "positions": str(self.where), "site": site}
        if vectors is not None:
            if vectors.shape != self.vectors.shape:
                raise ValueError(f"vectors have shape {tuple(vectors.shape)}: expected {tuple(self.vectors.shape)}, one row a layer")
            self.vectors.copy_(vectors)

    def start(self, S, K, r, C, paper):
        self.register_buffer("vectors", self.parameter(S, C).detach())

    def parts(self):
        U = self.vectors[:, None, None]                                   # (S, 1, 1, C)
        return torch.zeros_like(U), torch.zeros_like(U), U, U.new_ones(len(U), 1, 1)
