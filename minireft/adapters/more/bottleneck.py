"""Bottleneck adapters: a small network behind a sublayer, or beside it (Houlsby et al. 2019; He et al. 2022).

Use:  adapter = Bottleneck(model, width=8); adapter.attach()            # form="parallel": beside the feed-forward
See:  serial y + U σ(D y + d) + u of a sublayer's output y; parallel y + s (U σ(D x + d) + u) of its input x; U = 0 at the start.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..base import LINEARS, Adapter, layers_with, pick_sites
from ..edits import ACTIVATIONS

SERIAL = ("attention_output", "ffn_output")


class Change:
    """What one site's network makes of x: (..., C) → (..., C)."""

    def __init__(self, adapter: Bottleneck, name: str, slot: int):
        self.adapter, self.name, self.slot = adapter, name, slot

    def change(self, x):
        D, d, U, u = (self.adapter.get_parameter(f"{self.name}_{part}")[self.slot] for part in ("down", "down_bias", "up", "up_bias"))
        z = ACTIVATIONS[self.adapter.options["activation"]](F.linear(x.to(D.dtype), D, d))               # (..., m)
        return (self.adapter.options["scale"] * F.linear(z, U, u)).to(x.dtype)


class Behind(Change):
    """On the sublayer's last Linear."""

    def __call__(self, operation, context):
        def run(x):
            y = operation(x)
            return y + self.change(y)
        return run


class ReadsInput(Change):
    """On the feed-forward's first Linear, which x goes into: leaves for `AddsBeside` what is to be added."""

    def __call__(self, operation, context):
        def run(x):
            context[self.adapter][self.slot] = self.change(x)
            return operation(x)
        return run


class AddsBeside(Change):
    """On its last Linear."""

    def __call__(self, operation, context):
        return lambda x: operation(x) + context[self.adapter].pop(self.slot)


class Bottleneck(Adapter):
    """width m units; form "serial" behind attention and feed-forward (sites: either or both), or "parallel" beside the
    feed-forward, for which He et al. set scale 4 and ReLU, and Houlsby et al. scale 1 and another non-linearity; activation a
    name in edits.py. 2·m·C + m + C parameters a site. Starts as the identity (Houlsby: nearly). Raises ValueError for values out of range.
    """

    def __init__(self, model, width: int = 8, form: str = "serial", sites=None, activation: str | None = None, scale: float | None = None):
        if form not in ("serial", "parallel"):
            raise ValueError(f"form is {form!r}: expected 'serial' or 'parallel'")
        known = SERIAL if form == "serial" else ("ffn_output",)
        sites = pick_sites(model, known if sites is None else sites, known)
        activation = activation or ("gelu" if form == "serial" else "relu")
        scale = scale if scale is not None else 1.0 if form == "serial" else 4.0
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"width is {width!r}: expected a whole number from 1")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"scale is {scale!r}: expected a finite number")
        super().__init__(model, width=width, form=form, sites=list(sites), activation=activation, scale=scale)
        self.sites, C = sites, model.config.width
        for name in sites:
            L = len(layers_with(model, LINEARS[name]))
            down = self.parameter(L, width, C)                            # (L, m, C)
            torch.nn.init.uniform_(down, -(C**-0.5), C**-0.5)
            for part, p in (("down", down), ("down_bias", self.parameter(L, width)), ("up", self.parameter(L, C, width)), ("up_bias", self.parameter(L, C))):
                self.register_parameter(f"{name}_{part}", p)

    def prepare(self, tokens, mask, prompt_lengths, tasks, past):
        return {}                                                         # slot → what goes from a feed-forward's input to its output

    def edits(self):
        found = []
        for name in self.sites:
            for slot, layer in enumerate(layers_with(self.model, LINEARS[name])):
                block = self.model.blocks[layer]
                if self.options["form"] == "serial":
                    found.append((block.get_submodule(LINEARS[name]), Behind(self, name, slot)))
                else:
                    found += [(block.ffn.up, ReadsInput(self, name, slot)), (block.ffn.down, AddsBeside(self, name, slot))]
        return found
