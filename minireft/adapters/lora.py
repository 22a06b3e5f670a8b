"""LoRA: a low-rank update beside a frozen Linear (Hu et al. 2021, equation 3). Here as the baseline to compare with.

Use:  lora = LoRA(model, rank=8, alpha=16, sites=("query", "value")); lora.attach()       # sites="all": every Linear of a block
See:  y = W x + (α / r) B A x, with B = 0 at the start.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .base import LINEARS, Adapter, layers_with, pick_sites


class Beside:
    """y + (α/r) B A x for one Linear, the `slot`-th of its name."""

    def __init__(self, adapter: LoRA, name: str, slot: int):
        self.adapter, self.name, self.slot = adapter, name, slot

    def __call__(self, operation, context):
        a, b = (w[self.slot] for w in context[self.adapter][self.name])  # (r, in), (out, r)
        return lambda x: operation(x) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


class BesideEach:
    """The same in a bank, with each row's own A and B."""

    def __init__(self, adapter, name: str, slot: int):
        self.adapter, self.name, self.slot = adapter, name, slot

    def __call__(self, operation, context):
        factors, tasks = context[self.adapter]
        a, b = (w[self.slot][tasks.clamp(min=0)] * (tasks >= 0)[:, None, None] for w in factors[self.name])   # (B, r, in), (B, out, r)
        return lambda x: operation(x) + (x @ a.to(x.dtype).mT) @ b.to(x.dtype).mT


def linears(model, names) -> list[tuple]:
    """(Linear, name, slot): every Linear of these names, the slot-th of its name."""
    return [(model.blocks[layer].get_submodule(LINEARS[name]), name, slot)
            for name in names for slot, layer in enumerate(layers_with(model, LINEARS[name]))]


class LoRA(Adapter):
    """rank r from 1; alpha α scales the update by α / r; sites: any of a block's Linears, or "all". r·(in + out)
    parameters for each Linear. Raises ValueError for values out of range."""

    def __init__(self, model, rank: int = 8, alpha: float = 16, sites=("query", "value")):
        present = [name for name, path in LINEARS.items() if layers_with(model, path)]      # a plain feed-forward has no gate
        sites = tuple(present) if sites == "all" else pick_sites(model, sites, present)
        if not isinstance(rank, int) or not 1 <= rank <= model.config.width:
            raise ValueError(f"rank is {rank!r}: expected a whole number from 1 to the model's width, {model.config.width}")
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha!r}: expected a finite number; the update is scaled by alpha / rank")
        super().__init__(model, rank=rank, alpha=alpha, sites=list(sites))
        self.sites = sites
        for name in sites:
            out, inputs = model.blocks[-1].get_submodule(LINEARS[name]).weight.shape
            layers = len(layers_with(model, LINEARS[name]))
            a = self.parameter(layers, rank, inputs)
            torch.nn.init.uniform_(a, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
            self.register_parameter(f"{name}_a", a)                       # (L, r, in)
            self.register_parameter(f"{name}_b", self.parameter(layers, out, rank))        # (L, out, r)

    def edits(self):
        return [(linear, Beside(self, name, slot)) for linear, name, slot in linears(self.model, self.sites)]

    def prepare(self, tokens, mask, prompt_lengths, tasks, past):
        return self.ready(self.factors)

    def factors(self) -> dict:
        """{site: ((α/r) A (L, r, in), B (L, out, r))}"""
        scaling = self.options["alpha"] / self.options["rank"]
        return {name: (self.get_parameter(f"{name}_a") * scaling, self.get_parameter(f"{name}_b")) for name in self.sites}
