"""ReFT: learned low-rank edits of the residual stream at chosen prompt positions and layers (Wu et al. 2024, section 3).

Use:  reft = LoReFT(model, rank=4, layers="all", positions="f7+l7"); reft.attach()
See:  every variant is one line, the (down, up, bias) that it gives to   h ← h + upᵀ (down h + bias).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..positions import Positions, prompt_span
from .base import Adapter, pick_layers


def orthonormalise(m: Tensor) -> Tensor:
    """Rows of m (..., r, C) → orthonormal rows that span the same space: R = L⁻¹ M where M Mᵀ = L Lᵀ. O(C r²).

    A Cholesky factor of r × r numbers replaces the usual Householder map of C × C. Scaling M leaves R as it is, so weight
    decay cannot destroy it. The Gram matrix squares M's condition number, hence float64 inside.
    """
    wide = m.double()
    L, _ = torch.linalg.cholesky_ex(wide @ wide.mT)                       # (..., r, r); no host sync on a GPU
    return torch.linalg.solve_triangular(L, wide, upper=False).to(m.dtype)


class Edit:
    """One layer's share of a ReFT: picks its weights out of what was prepared for all layers."""

    def __init__(self, adapter: ReFT, slot: int):
        self.adapter, self.slot = adapter, slot

    def __call__(self, operation, context):
        if context[self.adapter] is None:                                 # a decoding step: the prompt was edited in the prefill
            return operation
        positions, groups, *weights = context[self.adapter]
        down, up, bias = (w[self.slot] if groups is not None else w[self.slot, 0] for w in weights)     # (K, r, C) or (r, C)
        # In place: the block's output is a fresh sum that nothing else needs.
        return lambda h: ops.low_rank_edit_at_(operation(h), positions, down, up, bias, groups)         # (B, T, C)


class ReFT(Adapter):
    """Φ(h) = h + upᵀ (down h + bias) at `positions` of the prompt, after each of `layers`; elsewhere h is untouched.

    rank r, 1 to C; layers "all" or numbers from 0; positions 'fN', 'lN', 'fN+lM', 'all' or 'all+generated' (see
    positions.py); tied: one Φ for prefix and suffix, or one each; init "identity" (the model is unchanged at the start
    where the variant allows it) or "paper" (as the authors' code draws it). Parameters are fp32 and stacked: (L, K, r, C)
    with K = 1 tied, 2 untied. `strength` scales the edit at inference. Raises ValueError for values out of range.
    """

    def __init__(self, model, rank: int = 4, layers="all", positions: str = "f7+l7", tied: bool = True, init: str = "identity"):
        layers, where = pick_layers(model, layers), Positions.parse(positions)
        C = model.config.width
        if not isinstance(rank, int) or not 1 <= rank <= C:
            raise ValueError(f"rank is {rank!r}: expected a whole number from 1 to the model's width, {C}")
        if init not in ("identity", "paper"):
            raise ValueError(f"init is {init!r}: expected 'identity' or 'paper'")
        if not tied and not (where.first and where.last):
            raise ValueError(f"positions {positions!r} have no prefix and suffix to untie: use 'fN+lM', or tied=True")
        super().__init__(model, rank=rank, layers=layers, positions=str(where), tied=tied, init=init)
        self.layers, self.where, self.strength = layers, where, 1.0
        self._ready = (None, None)                                        # (what it was computed from, the weights)
        self.start(len(layers), 1 if tied else 2, rank, C, paper=init == "paper")

    def start(self, L: int, K: int, r: int, C: int, paper: bool) -> None:
        """Creates and draws the parameters."""
        raise TypeError("ReFT is the family: take LoReFT, DiReFT, NoReFT, ConsReFT or LobiReFT")

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """down, up (L, K, r, C) and bias (L, K, r)."""
        raise TypeError("ReFT is the family: take LoReFT, DiReFT, NoReFT, ConsReFT or LobiReFT")

    def edits(self):
        return [(self.model.blocks[layer].output, Edit(self, slot)) for slot, layer in enumerate(self.layers)]

    def refuse(self, other):
        shared = sorted(set(self.layers) & set(other.layers)) if isinstance(other, ReFT) else []
        if shared:
            raise ValueError(f"another ReFT edits layer {shared[0]} already, and positions of one layer must not overlap: choose "
                             "other layers, detach it, or make one adapter with positions 'fN+lM' and tied=False")

    def prepare(self, tokens, mask, prompt_lengths, tasks, past):
        if past and not self.where.generated:
            return None
        start, lengths = prompt_span(tokens, mask, None if past or self.where.generated else prompt_lengths)   # two of (B,)
        positions = self.where.indices(start, lengths, tokens.shape[1])   # (B, P)
        groups = None if self.options["tied"] else self.where.groups(tokens.device).expand_as(positions)       # (B, P)
        return positions, groups, *self.ready()

    def ready(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weights in use: computed once a pass while gradients are wanted, otherwise once until a parameter changes."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.scaled()
        source = (self.strength, *((p.data_ptr(), p._version) for p in self.parameters()))
        if self._ready[0] != source:
            self._ready = (source, self.scaled())
        return self._ready[1]

    def scaled(self) -> tuple[Tensor, Tensor, Tensor]:
        down, up, bias = self.weights()
        return (down, up, bias) if self.strength == 1.0 else (down * self.strength, up, bias * self.strength)

    def rotations(self) -> dict:
        """{layer: R (r, C)}, the up-projection in use: orthonormal rows in LoReFT. Untied: {"3 prefix": R, "3 suffix": R}."""
        with torch.no_grad():
            _, up, _ = self.weights()
        if self.options["tied"]:
            return {layer: up[slot, 0] for slot, layer in enumerate(self.layers)}
        return {f"{layer} {part}": up[slot, k] for slot, layer in enumerate(self.layers) for k, part in enumerate(("prefix", "suffix"))}

    # -- what the variants draw their parameters from

    def directions(self, *shape: int):
        """Random orthonormal rows, (L, K, r, C)."""
        m = self.parameter(*shape)
        with torch.no_grad():
            if not m.is_meta:
                m.copy_(orthonormalise(torch.randn_like(m)))
        return m

    def uniform(self, *shape: int, bound: float):
        m = self.parameter(*shape)
        torch.nn.init.uniform_(m, -bound, bound)
        return m


class LoReFT(ReFT):
    """h + Rᵀ(W h + b − R h), the rows of R orthonormal (equation 2). 2rC + r parameters a layer, twice that untied.

    Starts as the identity (W = R, b = 0), a departure from the paper; init="paper" draws W and b as its code does. M, of
    which R is made, is what is trained and saved, so R is orthonormal after any optimiser and any load.
    """

    def start(self, L, K, r, C, paper):
        self.m = self.directions(L, K, r, C)
        self.w = self.uniform(L, K, r, C, bound=C**-0.5) if paper else self.parameter(L, K, r, C)
        self.b = self.uniform(L, K, r, bound=C**-0.5) if paper else self.parameter(L, K, r)
        if not paper and not self.m.is_meta:
            with torch.no_grad():
                self.w.copy_(orthonormalise(self.m))

    def weights(self):
        R = orthonormalise(self.m)                                        # (L, K, r, C), all layers in one call
        return self.w - R, R, self.b


class DiReFT(ReFT):
    """h + W₂ᵀ(W₁ h + b): no orthogonality, no subtraction (the paper's equation 3; pyreft's `NodireftIntervention`)."""

    def start(self, L, K, r, C, paper):
        bound = C**-0.5
        self.w1 = self.uniform(L, K, r, C, bound=bound) if paper else self.parameter(L, K, r, C)
        self.w2 = self.uniform(L, K, r, C, bound=bound) if paper else self.directions(L, K, r, C)
        self.b = self.uniform(L, K, r, bound=bound) if paper else self.parameter(L, K, r)

    def weights(self):
        return self.w1, self.w2, self.b


class NoReFT(DiReFT):
    """h + W₂ᵀ(W₁ h + b − W₂ h): LoReFT without the orthogonality. Starts as the identity with W₁ = W₂."""

    def start(self, L, K, r, C, paper):
        super().start(L, K, r, C, paper)
        if not paper:
            with torch.no_grad():
                self.w1.copy_(self.w2)

    def weights(self):
        return self.w1 - self.w2, self.w2, self.b


class ConsReFT(ReFT):
    """h + Rᵀ(b − R h): writes a constant into the subspace. No identity start exists; b = 0 begins by erasing it."""

    def start(self, L, K, r, C, paper):
        self.m = self.directions(L, K, r, C)
        self.b = self.uniform(L, K, r, bound=C**-0.5) if paper else self.parameter(L, K, r)

    def weights(self):
        R = orthonormalise(self.m)
        return -R, R, self.b


class LobiReFT(ConsReFT):
    """h + Rᵀ b: adds a constant, whatever h is. Starts as the identity."""

    def weights(self):
        R = orthonormalise(self.m)
        return torch.zeros_like(R), R, self.b
