"""What every adapter shares: attaching to sites, counting, saving, and the memory of the base it was made for.

Use:  with adapter: logits = model(tokens)        # or adapter.attach() ... adapter.detach()
See:  after detach the model's outputs are bit for bit what they were.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict

import torch
from torch import Tensor, nn

from .. import files

# The field's names for a block's Linears, and where they stand in a block.
LINEARS = {"query": "attention.query", "key": "attention.key", "value": "attention.value", "attention_output": "attention.output",
           "gate": "ffn.gate", "up": "ffn.up", "ffn_output": "ffn.down",
           "cross_query": "cross.query", "cross_key": "cross.key", "cross_value": "cross.value", "cross_attention_output": "cross.output"}


class Adapter(nn.Module):
    """A method that stands on a frozen base. Its parameters live here, stacked over layers; the base never sees them.

    A subclass names itself in files by its class name, keeps its constructor's arguments in `options`, lists what it puts
    where in `edits()`, and computes once a forward pass what its edits need in `prepare()`.
    """

    def __init__(self, model: nn.Module, **options):
        super().__init__()
        object.__setattr__(self, "model", model)      # not a submodule: an adapter does not own its base
        self.options = options
        self.base = fingerprint(model)
        self.attached = False
        self.strength = 1.0                           # scales an edit at inference, where the method has one
        self._ready = (None, None)                    # (what it was computed from, what was computed)

    # -- what a subclass defines

    def edits(self) -> list[tuple]:
        """(site, edit) pairs; an edit is called as edit(operation, context) and returns the operation to run instead."""
        raise TypeError(f"{type(self).__name__} puts no edits anywhere")

    def prepare(self, tokens: Tensor, mask: Tensor | None, prompt_lengths: Tensor | None, tasks: Tensor | None, past: int):
        """Called once at the start of a forward pass; the result reaches the edits as context[adapter]."""

    def begin(self, step: int, rows: Tensor | None = None) -> None:
        """The trainer's word before each pass: which step this is and which examples (B,) are in the batch."""

    def refuse(self, other: Adapter) -> None:
        """Raises ValueError when this adapter must not stand beside `other`, which is attached already."""

    def standing(self) -> list[Adapter]:
        """The adapters that stand on the model when this one does: itself, or a bank's members."""
        return [self]

    @classmethod
    def rebuild(cls, model: nn.Module, options: dict) -> Adapter:
        """A new one with the options that a file holds."""
        return cls(model, **options)

    # -- what every adapter does

    def attach(self) -> Adapter:
        """Puts the adapter on its model, after those already there. Attaching twice is an error."""
        if self.attached:
            raise ValueError(f"this {type(self).__name__} is attached already: detach it first")
        for mine, other in itertools.product(self.standing(), self.model.adapters):
            for theirs in other.standing():
                if mine is theirs:
                    raise ValueError(f"this {type(mine).__name__} stands in a bank that is attached: it would work twice")
                mine.refuse(theirs)
        for site, edit in self.edits():
            site.edits.append(edit)
        self.model.adapters.append(self)
        self.attached = True
        return self

    def detach(self) -> Adapter:
        """Takes the adapter off again, wherever in the line it stands."""
        if not self.attached:
            raise ValueError(f"this {type(self).__name__} is not attached")
        for site in self.model.sites().values():
            site.edits[:] = [edit for edit in site.edits if edit.adapter is not self]
        self.model.adapters[:] = [other for other in self.model.adapters if other is not self]
        self.attached = False
        return self

    def __enter__(self) -> Adapter:
        return self.attach()

    def __exit__(self, *error) -> None:
        if self.attached:
            self.detach()

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def print_trainable_parameters(self) -> None:
        mine, base = self.num_parameters(), sum(parameter.numel() for parameter in self.model.parameters())
        print(f"trainable parameters: {mine:,} of a base of {base:,} ({mine / base:.4%})")

    def save(self, path) -> None:
        """Writes one safetensors file: the parameters, and in its metadata the options and the base's fingerprint."""
        files.write_tensors(path, self.state_dict(), {"format": "minireft adapter", "version": "1", "kind": type(self).__name__,
                                                      "options": json.dumps(self.options), "base": json.dumps(self.base)})

    def ready(self, compute):
        """compute(), once a pass while gradients are wanted, otherwise once until a parameter or a strength changes."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return compute()
        source = [adapter.strength for adapter in (self, *self.standing())]
        source += [(tensor.data_ptr(), tensor._version) for tensor in itertools.chain(self.parameters(), self.buffers())]
        if self._ready[0] != source:
            self._ready = (source, compute())
        return self._ready[1]

    def parameter(self, *shape: int) -> nn.Parameter:
        """A new fp32 parameter of zeros on the base's device: half precision would lose the small edits."""
        return nn.Parameter(torch.zeros(*shape, device=self.model.embed.weight.device))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def layers_with(model: nn.Module, path: str) -> list[int]:
    """The layers whose block has a module `path`: a decoder's look at its encoder is not in every one."""
    return [layer for layer, block in enumerate(model.blocks) if path in dict(block.named_modules())]


def pick_layers(model: nn.Module, layers) -> list[int]:
    """'all', a layer, a list of layers or '3,9,18' → sorted layer numbers, counted from 0, of those that the prompt flows
    through: an encoder–decoder's encoder. ValueError names a wrong one."""
    most = model.config.encoder_layers or model.config.layers
    if layers == "all":
        return list(range(most))
    try:
        picked = [layers] if isinstance(layers, int) else [int(x) for x in layers.split(",")] if isinstance(layers, str) else list(layers)
    except (TypeError, ValueError):
        picked = [None]
    if not all(type(layer) is int for layer in picked):
        raise ValueError(f"layers are {layers!r}: expected 'all', a number, or a list such as '3,9,18'")
    wrong = [layer for layer in picked if not 0 <= layer < most]
    if wrong or not picked or len(set(picked)) < len(picked):
        raise ValueError(f"layers are {layers!r}: expected distinct numbers from 0 to {most - 1}")
    return sorted(picked)


def pick_sites(model: nn.Module, sites, known) -> tuple[str, ...]:
    """A name, a comma list or a sequence of names → names, each of which must be in `known`. ValueError names a wrong one."""
    picked = tuple(sites.split(",")) if isinstance(sites, str) else tuple(sites)
    for name in picked:
        if name not in known:
            raise ValueError(f"site {name!r} is unknown here: expected some of {', '.join(known)}")
    if not picked or len(set(picked)) < len(picked):
        raise ValueError(f"sites are {sites!r}: expected at least one, each named once")
    return picked


def fingerprint(model: nn.Module) -> dict | None:
    """What an adapter remembers of its base: the configuration, and four weights out of every tensor.

    Values, not a hash: they are compared within the rounding of bf16, so the same base in another dtype is the same base.
    None on the meta device, where there are no weights.
    """
    samples = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            return None
        flat = parameter.detach().flatten()
        at = torch.linspace(0, flat.numel() - 1, 4).long().tolist()
        samples[name] = [flat[i].item() for i in at]
    return {"config": json.loads(json.dumps(asdict(model.config))), "weights": samples}      # as a file gives it back: a tuple is a list


def same_base(mine: dict | None, other: dict | None) -> str:
    """'' when two fingerprints are of one base (or one is unknown), otherwise what differs."""
    if mine is None or other is None:
        return ""
    for key, value in mine["config"].items():
        if other["config"].get(key) != value:
            return f"its base has {key} {value!r}, this model has {other['config'].get(key)!r}"
    for name, values in mine["weights"].items():
        if any(abs(a - b) > 2**-7 * abs(a) + 1e-6 for a, b in zip(values, other["weights"].get(name, []))):
            return f"its base has other weights in {name}"
    return ""
