"""(IA)³: learned vectors that rescale keys, values and feed-forward activations (Liu et al. 2022, section 3.3).

Use:  ia3 = IA3(model); ia3.attach()          # later: ia3.merge() folds the vectors into the base's weights
See:  softmax(Q (l_k ⊙ K)ᵀ / √d) (l_v ⊙ V)   and   (l_ff ⊙ γ(W x)) W₂, all vectors 1 at the start.
"""

from __future__ import annotations

import math

import torch

from .. import ops
from .base import LINEARS, Adapter, layers_with, pick_sites
from .merging import Merged

ATTENTION = ("key", "value", "query", "attention_output")
SITES = ("key", "value", "ffn", "query", "attention_output", "ffn_output")
FUSED = ("swiglu", "gelu", "gelu_tanh")


class Scale:
    """l ⊙ (what stands at the site so far); while training, on a pristine activation, one fused pass instead of two.

    Evaluation takes the activation's own operation: there vectors of ones change no bit, which the fused one promises
    within rounding only. For fast inference, merge.
    """

    def __init__(self, adapter, site, at: dict[str, int]):
        self.adapter, self.site, self.at = adapter, site, at              # {vector's name: its row in the stack}

    def __call__(self, operation, context):
        vectors, tasks = context[self.adapter]
        ls = {name.removeprefix("cross_"): vectors[name][row] for name, row in self.at.items()}   # each (channels,), a bank's (K, channels)
        if "key" in ls or "value" in ls:
            return lambda k, v: keys_values(*operation(k, v), ls.get("key"), ls.get("value"), tasks)
        (l,) = ls.values()
        if "ffn" in ls and self.site.training and self.site.edits[0] is self and self.site.kind in FUSED:
            if self.site.kind == "swiglu":
                return lambda gate, up: ops.swiglu_scale(gate, up, l, tasks)
            approximate = "tanh" if self.site.kind == "gelu_tanh" else "none"
            return lambda u: ops.gelu_scale(u, l, tasks, approximate=approximate)
        return lambda *x: ops.scale(operation(*x), l, tasks)


def keys_values(k, v, l_k, l_v, tasks):
    if l_k is not None and l_v is not None:
        return ops.scale_pair(k, v, l_k, l_v, tasks)                      # one launch
    return (k, ops.scale(v, l_v, tasks)) if l_k is None else (ops.scale(k, l_k, tasks), v)


def names_at(model, sites, layer_norm: bool = False) -> list[str]:
    """The vectors at these sites. Where a decoder looks at an encoder, "key" is self_key and cross_key; their vectors are called
    "key" and "cross_key". ValueError names a wrong site."""
    both = bool(layers_with(model, "cross"))
    known = (*SITES, *(f"{kind}_{name}" for kind in ("self", "cross") if both or kind == "self" for name in ATTENTION))
    picked = pick_sites(model, sites, known)
    names = [name for site in picked for name in (site.removeprefix("self_"), *([f"cross_{site}"] if both and site in ATTENTION else ()))]
    if len(set(names)) < len(names):
        raise ValueError(f"sites are {sites!r}: one is in another; name it once")
    return names + [norm for norm in ("attention_norm", "cross_norm", "ffn_norm") if layer_norm and layers_with(model, norm)]


def sites_of(model, names) -> list[str]:
    """The sites that have these vectors, norms aside."""
    own = "self_" if layers_with(model, "cross") else ""
    return [own + name if name in ATTENTION else name for name in names if not name.endswith("norm")]


def places(model, name: str) -> list[tuple]:
    """Of the vector `name`, layer after layer: the site where it stands, the weight and bias (or None) that it scales once
    merged, and the dimension of the weight: W₂ reads what l_ff has scaled, the others write it."""
    path, found = LINEARS.get(name, name), []
    for layer in layers_with(model, "ffn" if name == "ffn" else path):
        block = model.blocks[layer]
        if name == "ffn":
            found.append((block.ffn.act, block.ffn.down.weight, None, 1))
            continue
        holder = block.get_submodule(path)                                # a Linear, or a norm by its own name
        site = block.get_submodule(path.split(".")[0]).kv if name.endswith(("key", "value")) else holder
        found.append((site, holder.weight, holder.bias, 0))
    return found


def scales(adapter, names) -> list[tuple]:
    """The edits of the vectors `names`, one for each site: keys and values share theirs."""
    at: dict = {}
    for name in names:
        for row, (site, *_) in enumerate(places(adapter.model, name)):
            at.setdefault(site, {})[name] = row
    return [(site, Scale(adapter, site, rows)) for site, rows in at.items()]


class IA3(Adapter):
    """One vector per layer and site: key and value (G·D), ffn (F), and if asked query (H·D), attention_output, ffn_output (C).

    Vectors start at 1 + init_scale; layer_norm adds one (C) for each norm of a block. What is stored is l − 1, so that
    weight decay pulls towards the identity. d_k + d_v + d_ff parameters a layer with the default sites, and in a decoder
    that looks at an encoder 2 d_k + 2 d_v + d_ff; "self_key", "cross_key" ... are the sites of one attention alone.
    """

    def __init__(self, model, sites=("key", "value", "ffn"), init_scale: float = 0.0, layer_norm: bool = False):
        names = names_at(model, sites, layer_norm)
        if not isinstance(init_scale, (int, float)) or not math.isfinite(init_scale):
            raise ValueError(f"init_scale is {init_scale!r}: expected a finite number, 0 for a start at the identity")
        super().__init__(model, sites=sites_of(model, names), init_scale=init_scale, layer_norm=layer_norm)
        self._kept: Merged | None = None
        for name in names:
            (_, weight, _, dim), *more = places(model, name)
            self.register_parameter(name, self.parameter(1 + len(more), weight.shape[dim]))              # (L, width)
            torch.nn.init.constant_(self.get_parameter(name), init_scale)

    def edits(self):
        return scales(self, [name for name, _ in self.named_parameters()])

    def prepare(self, tokens, mask, prompt_lengths, tasks, past):
        return self.ready(self.vectors), None

    def vectors(self) -> dict:
        return {name: 1 + l for name, l in self.named_parameters()}       # each (L, width)

    def merge(self) -> None:
        """Folds the vectors into the base's weights and biases and steps aside. Merging again changes nothing.

        Raises ValueError, with the base untouched, when a vector is not finite, or a bank is attached.
        """
        if self._kept is not None:
            return
        if any(other.standing() != [other] for other in self.model.adapters):
            raise ValueError("a bank is attached, and what is merged would scale every one of its tasks: detach it first")
        for name, l in self.named_parameters():
            if not l.isfinite().all():
                raise ValueError(f"the vectors of {name!r} are not all finite: they would destroy the base's weights")
        if self.attached:
            self.detach()
        self._kept = Merged((row, l.detach()) for name, ls in self.vectors().items() for row, l in zip(places(self.model, name), ls))

    def unmerge(self) -> None:
        """Puts the base's own tensors back: the original bits, zeros in a vector or not.

        Raises ValueError when the base changed since the merge, by training or by another merge: undo that first.
        """
        if self._kept is None:
            raise ValueError("these (IA)³ vectors are not merged: there is nothing to undo")
        self._kept = self._kept.undo()

    def attach(self):
        if self._kept is not None:
            raise ValueError("these (IA)³ vectors are merged into the base already: unmerge them first")
        return super().attach()
