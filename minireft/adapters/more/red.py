"""RED, representation editing: a learned scale and shift of what each layer adds (Wu et al. 2024, "Advancing Parameter Efficiency").

Use:  red = RED(model); red.attach()
See:  h ← l ⊙ h + b, with l = 1 and b = 0 at the start: 2·C numbers a layer.
"""

from __future__ import annotations

from ..base import LINEARS, Adapter, layers_with, pick_sites


class ScaleAndShift:
    def __init__(self, adapter: RED, slot: int):
        self.adapter, self.slot = adapter, slot

    def __call__(self, operation, context):
        scale, shift = (v[self.slot] for v in context[self.adapter])      # (C,) both, the scale less 1

        def run(x):
            y = operation(x)                                              # (B, T, C)
            return y + scale.to(y.dtype) * y + shift.to(y.dtype)
        return run


class RED(Adapter):
    """At every token of every layer, the answer's too. site: "ffn_output", the feed-forward's output before it joins the stream
    (the authors' choice), "attention_output", or "output", the stream itself. Stores l − 1, so that weight decay pulls towards the identity."""

    def __init__(self, model, site: str = "ffn_output"):
        (site,) = pick_sites(model, site, ("ffn_output", "attention_output", "output"))
        super().__init__(model, site=site)
        self.path = LINEARS.get(site, site)
        self.layers = layers_with(model, self.path)
        self.scale, self.shift = self.parameter(len(self.layers), model.config.width), self.parameter(len(self.layers), model.config.width)

    def prepare(self, tokens, mask, prompt_lengths, tasks, past):
        return self.scale, self.shift

    def edits(self):
        return [(self.model.blocks[layer].get_submodule(self.path), ScaleAndShift(self, slot)) for slot, layer in enumerate(self.layers)]
