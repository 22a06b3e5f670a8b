"""The methods, one file each: reft.py (kin in variants.py), ia3.py, neftune.py, lora.py; base.py holds what they share.

Use:  adapter = load_adapter(model, path)         # any of them, from the file that adapter.save(path) wrote
See:  the loaded adapter gives the logits of the saved one, to the bit; it is not attached.
"""

from __future__ import annotations

import json
from .. import files, formats
from .bank import Bank
from .base import Adapter, fingerprint, same_base
from .ia3 import IA3
from .lora import LoRA
from .more.bottleneck import Bottleneck
from .more.classifier import Classifier, labels_of
from .more.dora import DoRA
from .more.interchange import Interchange
from .more.prefix_tuning import PrefixTuning
from .more.prompt_tuning import PromptTuning
from .more.red import RED
from .neftune import NEFTune
from .reft import DiReFT, LoReFT
from .variants import ConsReFT, LobiReFT, NoReFT, SteeringVector

KINDS = {kind.__name__: kind for kind in (LoReFT, DiReFT, NoReFT, ConsReFT, LobiReFT, SteeringVector, IA3, LoRA, NEFTune,
                                          Bank, Interchange, Classifier, DoRA, PrefixTuning, PromptTuning, Bottleneck, RED)}


def load_adapter(model, path, force: bool = False, **foreign) -> Adapter:
    """The adapter saved at `path`, made for `model`, not attached; a file of ours, or the folder of another library.

    foreign: options that such a folder does not record, for instance positions="f7+l7" (formats/pyreft.py).
    Raises FileNotFoundError; ValueError for a file that is no adapter, is damaged, or was made for another base (the
    configuration and weights are compared, whatever the dtype; force=True loads it all the same if the shapes fit).
    """
    if formats.is_foreign(path):
        kind, options, tensors = formats.read_adapter(path, model)
        return fill(model, path, kind, {**options, **foreign}, tensors, base=None)
    if foreign:
        raise ValueError(f"{path} is a file of minireft's, which says {', '.join(foreign)} itself: leave them out")
    tensors, metadata = files.read_tensors(path)
    if metadata.get("format") != "minireft adapter" or metadata.get("kind") not in KINDS:
        raise ValueError(f"{path} holds no minireft adapter (its kind is {metadata.get('kind')!r}): expected a file that adapter.save() wrote")
    try:
        base, options = json.loads(metadata["base"]), json.loads(metadata["options"])
        difference = same_base(base, fingerprint(model))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} says nothing readable of its base or options ({error!r}): fetch or write it again") from error
    if difference and not force:
        raise ValueError(f"{path} was made for another base: {difference}. Load that base, or pass force=True to try it here")
    return fill(model, path, metadata["kind"], options, tensors, base)


def fill(model, path, kind: str, options: dict, tensors: dict, base: dict | None) -> Adapter:
    """A new adapter of that kind with these options and tensors, if they fit the model."""
    try:
        adapter = KINDS[kind].rebuild(model, options)
    except TypeError as error:
        raise ValueError(f"{path} has options that no {kind} of this version knows ({error}): {options}") from error
    adapter.base = base
    expected = {name: tuple(p.shape) for name, p in adapter.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != found:
        raise ValueError(f"{path} does not fit this model: expected tensors {expected}, found {found}")
    if model.embed.weight.is_meta:                                        # the adapter's numbers are here, if not its base's
        adapter.to_empty(device="cpu")
    adapter.load_state_dict(tensors)
    return adapter


def task_ids(model, names: list[str | None]):
    """The ids (B,) of the tasks named, in the bank that stands on the model; None where none stands."""
    bank = next((adapter for adapter in model.adapters if isinstance(adapter, Bank)), None)
    return bank and bank.ids(names)
