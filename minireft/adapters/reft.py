"""ReFT: learned low-rank edits of hidden states at chosen prompt positions and layers (Wu et al. 2024, section 3).

Use:  reft = LoReFT(model, rank=4, layers="all", positions="f7+l7"); reft.attach()
See:  LoReFT and DiReFT are one line each, the parts W, V, U, b of   h ← h + Uᵀ (W h + b − V h); their kin in variants.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..positions import Positions, demand
from .base import LINEARS, Adapter, pick_layers
from .edits import ACTIVATIONS, Edit, PlainEdit, Prepared, by_site
from .orthonormal import orthonormalise

SITES = ("output", "attention_output", "ffn_output", "query", "key", "value", "embed")


class ReFT(Adapter):
    """The family. Edits `site` (a block's output) of `layers` at `positions` of the prompt; elsewhere h is untouched.

    rank r, 1 to C; layers "all" or numbers from 0; positions 'fN', 'lN', 'fN+lM', 'all', 'all+generated' or indices (see
    positions.py); tied: one Φ for prefix and suffix, or one each; init "identity" (the model is unchanged at the start
    where the variant allows it) or "paper" (as the authors' code draws it); dropout on the edit while training;
    activation on W h + b, a name in edits.py; strict: a prompt too short for its positions is a ValueError and not
    shared out between them. Parameters are fp32 and stacked: (S, K, r, C) for S sites, K = 1 tied, 2 untied. `strength`
    scales the edit at inference. Raises ValueError for values out of range.
    """

    def __init__(self, model, rank: int = 4, layers="all", positions="f7+l7", tied: bool = True, init: str = "identity",
                 site: str = "output", dropout: float = 0.0, activation: str | None = None, strict: bool = False):
        if site not in SITES:
            raise ValueError(f"site is {site!r}: expected one of {', '.join(SITES)}")
        if site == "embed" and layers != "all" and layers != [0]:
            raise ValueError(f"layers are {layers!r}: the embedding has none; leave them at 'all'")
        layers, where = [0] if site == "embed" else pick_layers(model, layers), replace(Positions.parse(positions), strict=strict)
        attention = model.blocks[0].attention
        C = getattr(attention, site).weight.shape[0] if site in ("query", "key", "value") else model.config.width
        if not isinstance(rank, int) or not 1 <= rank <= C:
            raise ValueError(f"rank is {rank!r}: expected a whole number from 1 to the width, {C}")
        if init not in ("identity", "paper"):
            raise ValueError(f"init is {init!r}: expected 'identity' or 'paper'")
        if where.generated and model.config.encoder_layers:
            raise ValueError(f"positions are {str(where)!r}: what an encoder reads is the prompt, nothing generated passes there; use 'all'")
        if not tied and not (where.first and where.last):
            raise ValueError(f"positions {positions!r} have no prefix and suffix to untie: use 'fN+lM', or tied=True")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}: expected a share from 0 to below 1")
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}: expected None or one of {', '.join(ACTIVATIONS)}")
        super().__init__(model, rank=rank, layers=layers, positions=str(where), tied=tied, init=init, site=site,
                         dropout=dropout, activation=activation, strict=strict)
        self.layers, self.where, self.tied, self.site = layers, where, tied, site
        self.edit = PlainEdit if dropout or activation else Edit
        self.start(len(layers), 1 if tied else 2, rank, C, paper=init == "paper")

    # -- what a variant defines

    def start(self, S: int, K: int, r: int, C: int, paper: bool) -> None:
        """Creates and draws the parameters."""
        raise TypeError("ReFT is the family: take LoReFT, DiReFT, NoReFT, ConsReFT or LobiReFT")

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W, V, U (S, K, r, C) and b (S, K, r) of Φ(h) = h + Uᵀ (W h + b − V h)."""
        raise TypeError("ReFT is the family: take LoReFT, DiReFT, NoReFT, ConsReFT or LobiReFT")

    # -- what they share

    def edits(self):
        return [(place, self.edit(self, slot)) for slot, place in enumerate(self.places(self.layers))]

    def places(self, layers: list[int]) -> list:
        if self.site == "embed":
            return [self.model.embed]
        return [self.model.blocks[layer].get_submodule(LINEARS.get(self.site, self.site)) for layer in layers]

    def refuse(self, other):
        if isinstance(other, ReFT) and other.site == self.site and self.where.may_meet(other.where):
            for layer in sorted(set(self.layers) & set(other.layers)):
                raise ValueError(f"another ReFT edits {self.site} of layer {layer} at {other.where}, which can meet {self.where}: choose "
                                 "other layers or positions, detach it, or make one adapter with positions 'fN+lM' and tied=False")

    def prepare(self, tokens, mask, prompt_lengths, tasks, past):
        if past and not self.where.generated:
            return None
        positions = self.where.find(tokens, mask, prompt_lengths)         # (B, P)
        demand(positions, self.where.least)
        sets = None if self.tied else self.where.groups(tokens.device).expand_as(positions)  # (B, P)
        return Prepared(positions, sets, self.ready(lambda: by_site(self.weights(), self.tied and self.edit is Edit)))

    def weights(self) -> tuple[Tensor, ...]:
        W, V, U, b = self.parts()
        U = U if self.strength == 1.0 else U * self.strength
        return (W, V, U, b) if self.edit is PlainEdit else (W - V, U, b)

    def rotations(self) -> dict:
        """{layer: U (r, C)}, orthonormal R in LoReFT. Untied: {"3 prefix": R, "3 suffix": R}."""
        with torch.no_grad():
            U = self.parts()[2].detach()                                  # (S, K, r, C)
        if self.tied:
            return {layer: U[slot, 0] for slot, layer in enumerate(self.layers)}
        return {f"{layer} {part}": U[slot, k] for slot, layer in enumerate(self.layers) for k, part in enumerate(("prefix", "suffix"))}

    def directions(self, *shape: int):
        """A parameter of random orthonormal rows, (S, K, r, C)."""
        m = self.parameter(*shape)
        with torch.no_grad():
            return m if m.is_meta else m.copy_(orthonormalise(torch.randn_like(m)))

    def drawn(self, *shape: int, width: int, paper: bool):
        """A parameter of zeros, or as torch draws a Linear of `width` inputs."""
        p = self.parameter(*shape)
        return torch.nn.init.uniform_(p, -(width**-0.5), width**-0.5) if paper else p


class LoReFT(ReFT):
    """h + Rᵀ(W h + b − R h), the rows of R orthonormal (equation 2). 2rC + r parameters a layer, twice that untied.

    Starts as the identity (W = R, b = 0), a departure from the paper; init="paper" draws W and b as its code does. M, of
    which R is made, is what is trained and saved, so R is orthonormal after any optimiser and any load.
    """

    def start(self, S, K, r, C, paper):
        self.m = self.directions(S, K, r, C)
        self.w = self.drawn(S, K, r, C, width=C, paper=paper)
        self.b = self.drawn(S, K, r, width=C, paper=paper)
        if not paper and not self.m.is_meta:
            with torch.no_grad():
                self.w.copy_(orthonormalise(self.m))

    def parts(self):
        R = orthonormalise(self.m)                                        # (S, K, r, C), all layers in one call
        return self.w, R, R, self.b


class DiReFT(ReFT):
    """h + W₂ᵀ(W₁ h + b): no orthogonality, no subtraction (the paper's equation 3; pyreft's `NodireftIntervention`)."""

    def start(self, S, K, r, C, paper):
        self.w1 = self.drawn(S, K, r, C, width=C, paper=paper)
        self.w2 = self.drawn(S, K, r, C, width=C, paper=True) if paper else self.directions(S, K, r, C)
        self.b = self.drawn(S, K, r, width=C, paper=paper)

    def parts(self):
        return self.w1, torch.zeros_like(self.w1), self.w2, self.b
