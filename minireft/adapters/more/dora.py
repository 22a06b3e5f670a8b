"""DoRA: LoRA on the direction of a weight's rows, and their lengths learned by themselves (Liu et al. 2024, equation 5).

Use:  dora = DoRA(model, rank=4, alpha=8, sites="all"); dora.attach()
See:  W' = m (W + (α/r) B A) / ‖W + (α/r) B A‖, row by row, with m = ‖W‖ and B = 0 at the start.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import Adapter
from ..lora import LoRA, linears


class Turned:
    """y + (g − 1)(y − bias) + g ⊙ (α/r) B A x for one Linear, where g = m / ‖W + (α/r) B A‖: exactly y while g = 1 and B = 0."""

    def __init__(self, adapter: DoRA, linear, name: str, slot: int):
        self.adapter, self.linear, self.name, self.slot = adapter, linear, name, slot

    def __call__(self, operation, context):
        a, b, g = (w[self.slot] for w in context[self.adapter][self.name])                  # (r, in), (out, r), (out,)
        bias = 0 if self.linear.bias is None else self.linear.bias

        def run(x):
            y = operation(x)                                              # (..., out)
            return y + (g - 1).to(x.dtype) * (y - bias) + F.linear(F.linear(x, a.to(x.dtype)), (g[:, None] * b).to(x.dtype))
        return run


class DoRA(LoRA):
    """LoRA's options, and norm_gradient: whether gradients flow through ‖W + (α/r) B A‖; the paper's section 4.3 and PEFT treat
    it as a constant, which is the default. LoRA's parameters and one length for every output: r·(in + out) + out a Linear."""

    def __init__(self, model, rank: int = 8, alpha: float = 16, sites=("query", "value"), norm_gradient: bool = False):
        super().__init__(model, rank, alpha, sites)
        self.options["norm_gradient"] = norm_gradient
        for name in self.sites:
            weights = [linear.weight for linear, _, _ in linears(model, [name])]
            m = self.parameter(len(weights), weights[0].shape[0])
            self.register_parameter(f"{name}_m", m)                       # (L, out)
            if not m.is_meta:
                with torch.no_grad():
                    m.copy_(self.norms(name, *super().factors()[name]))

    def edits(self):
        return [(linear, Turned(self, linear, name, slot)) for linear, name, slot in linears(self.model, self.sites)]

    def factors(self):
        """{site: ((α/r) A (L, r, in), B (L, out, r), g (L, out))}"""
        found = {}
        for name, (a, b) in super().factors().items():
            norms = self.norms(name, a, b)
            found[name] = a, b, self.get_parameter(f"{name}_m") / (norms if self.options["norm_gradient"] else norms.detach())
        return found

    def norms(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """The length of every row of W + B A, (L, out): a (L, r, in), b (L, out, r)."""
        return torch.stack([(linear.weight.to(a.dtype) + b[slot] @ a[slot]).norm(dim=1) for linear, _, slot in linears(self.model, [name])])

    def refuse(self, other: Adapter):
        if isinstance(other, LoRA) and set(self.sites) & set(other.sites):
            raise ValueError(f"a {type(other).__name__} stands on {', '.join(sorted(set(self.sites) & set(other.sites)))} already, and would be "
                             "rescaled by DoRA's lengths: choose other sites, or attach it after the DoRA")
