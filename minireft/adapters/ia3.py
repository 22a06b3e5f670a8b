"""(IA)³: learned vectors that rescale keys, values and feed-forward activations (Liu et al. 2022, section 3.3).

Use:  ia3 = IA3(model); ia3.attach()          # later: ia3.merge() folds the vectors into the base's weights
See:  softmax(Q (l_k ⊙ K)ᵀ / √d) (l_v ⊙ V)   and   (l_ff ⊙ γ(W x)) W₂, all vectors 1 at the start.
"""

from __future__ import annotations

import math

import torch

from .. import ops
from .base import LINEARS, Adapter, pick_sites

SITES = ("key", "value", "ffn", "query", "attention_output", "ffn_output")


class Scale:
    """l ⊙ (what stands at the site so far); while training, on a pristine activation, one fused pass instead of two.

    Evaluation takes the activation's own operation: there vectors of ones change no bit, which the fused one promises
    within rounding only. For fast inference, merge.
    """

    def __init__(self, adapter: IA3, site, layer: int, names: tuple[str, ...]):
        self.adapter, self.site, self.layer, self.names = adapter, site, layer, names

    def __call__(self, operation, context):
        vectors, tasks = context[self.adapter]
        ls = {name: vectors[name][self.layer] for name in self.names}     # each (channels,), or (K, channels) with tasks
        if "key" in ls or "value" in ls:
            return lambda k, v: keys_values(*operation(k, v), ls.get("key"), ls.get("value"), tasks)
        (l,) = ls.values()
        if "ffn" in ls and self.site.training and self.site.edits[0] is self and self.site.kind in ("swiglu", "gelu", "gelu_tanh"):
            if self.site.kind == "swiglu":
                return lambda gate, up: ops.swiglu_scale(gate, up, l, tasks)
            approximate = "tanh" if self.site.kind == "gelu_tanh" else "none"
            return lambda u: ops.gelu_scale(u, l, tasks, approximate=approximate)
        return lambda *x: ops.scale(operation(*x), l, tasks)


def keys_values(k, v, l_k, l_v, tasks):
    if l_k is not None and l_v is not None:
        return ops.scale_pair(k, v, l_k, l_v, tasks)                      # one launch
    return (k, ops.scale(v, l_v, tasks)) if l_k is None else (ops.scale(k, l_k, tasks), v)


def place(model, name: str, layer: int):
    """The site where the vector `name` stands, and the base's tensor whose first dimension it scales."""
    block = model.blocks[layer]
    if name in ("key", "value"):
        return block.attention.kv, block.get_submodule(LINEARS[name]).weight
    if name == "ffn":
        return block.ffn.act, block.ffn.down.weight.T
    site = block.get_submodule(LINEARS.get(name, name))                   # a Linear, or a norm by its own name
    return site, site.weight


def scales(adapter, names) -> list[tuple]:
    """The edits of the vectors `names` on every layer; keys and values share one."""
    together = tuple(name for name in names if name in ("key", "value"))
    groups = [(name,) for name in names if name not in together] + ([together] if together else [])
    sites = [(place(adapter.model, group[0], layer)[0], layer, group)
             for layer in range(adapter.model.config.layers) for group in groups]
    return [(site, Scale(adapter, site, layer, group)) for site, layer, group in sites]


def total(weight) -> float:
    """Tells a tensor that somebody changed from one that nobody did."""
    return weight.detach().sum(dtype=torch.float64).item()


class IA3(Adapter):
    """One vector per layer and site: key and value (G·D), ffn (F), and if asked query (H·D), attention_output, ffn_output (C).

    Vectors start at 1 + init_scale; layer_norm adds one (C) for each norm of a block. What is stored is l − 1, so that
    weight decay pulls towards the identity. d_k + d_v + d_ff parameters a layer with the default sites.
    """

    def __init__(self, model, sites=("key", "value", "ffn"), init_scale: float = 0.0, layer_norm: bool = False):
        sites = pick_sites(model, sites, SITES)
        if not isinstance(init_scale, (int, float)) or not math.isfinite(init_scale):
            raise ValueError(f"init_scale is {init_scale!r}: expected a finite number, 0 for a start at the identity")
        super().__init__(model, sites=list(sites), init_scale=init_scale, layer_norm=layer_norm)
        self._kept: dict | None = None                                    # while merged: weight → [its own bits, its sum then]
        for name in (*sites, *(("attention_norm", "ffn_norm") if layer_norm else ())):
            width = place(model, name, 0)[1].shape[0]
            self.register_parameter(name, self.parameter(model.config.layers, width))      # (L, width)
            torch.nn.init.constant_(self.get_parameter(name), init_scale)

    def edits(self):
        return scales(self, [name for name, _ in self.named_parameters()])

    def prepare(self, tokens, mask, prompt_lengths, tasks, past):
        return self.ready(self.vectors), None

    def vectors(self) -> dict:
        return {name: 1 + l for name, l in self.named_parameters()}       # each (L, width)

    def merge(self) -> None:
        """Folds the vectors into the base's weights and biases and steps aside. Merging again changes nothing.

        Raises ValueError, with the base untouched, when a vector is not finite.
        """
        if self._kept is not None:
            return
        for name, l in self.named_parameters():
            if not l.isfinite().all():
                raise ValueError(f"the vectors of {name!r} are not all finite: they would destroy the base's weights")
        if self.attached:
            self.detach()
        self._kept = {}
        for name, l in self.named_parameters():
            for layer in range(self.model.config.layers):
                block, factor = self.model.blocks[layer], 1 + l[layer].detach()             # (width,)
                if name == "ffn":                                         # scales what W₂ reads: its columns
                    self._multiply(block.ffn.down.weight, factor)
                    continue
                source = block.get_submodule(LINEARS.get(name, name))
                self._multiply(source.weight, factor if source.weight.dim() == 1 else factor[:, None])
                if source.bias is not None:
                    self._multiply(source.bias, factor)

    def _multiply(self, weight, factor) -> None:
        kept = self._kept.setdefault(weight, [weight.detach().clone(), 0])
        with torch.no_grad():
            weight.copy_(weight * factor)                                 # the product is formed in fp32 and rounded once
        kept[1] = total(weight)

    def unmerge(self) -> None:
        """Puts the base's own tensors back: the original bits, zeros in a vector or not.

        Raises ValueError when the base changed since the merge, by training or by another merge: undo that first.
        """
        if self._kept is None:
            raise ValueError("these (IA)³ vectors are not merged: there is nothing to undo")
        if any(total(weight) != then for weight, (_, then) in self._kept.items()):
            raise ValueError("the base's weights changed since these (IA)³ vectors were merged, and would be lost: undo that first")
        with torch.no_grad():
            for weight, (original, _) in self._kept.items():
                weight.copy_(original)
        self._kept = None

    def attach(self):
        if self._kept is not None:
            raise ValueError("these (IA)³ vectors are merged into the base already: unmerge them first")
        return super().attach()
