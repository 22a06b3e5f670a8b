"""pyreft's saved interventions: config.json and one small torch file for each layer (and part, when untied).

Use:  reft = minireft.load_adapter(model, folder, positions="f7+l7"); pyreft.write(reft, folder)
See:  pyreft's logits. A folder does not say which positions were edited, nor an activation: say so, if they were not
      'f7+l7' (the papers' choice and minireft's default) and none.

Names: pyreft's `NodireftIntervention` is the paper's DiReFT; its `DireftIntervention`, with an orthonormal R, has no twin here.
Read from a folder: pyreft 0.1.0 with pyvene 0.1.8. Its own load gives W and b in bf16, and cannot load NodireftIntervention
at all: make the interventions anew with dtype=torch.float32 and call load_state_dict on each.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from .. import files

# Their class → our kind, and our parameter → (their tensor, whether it is stored as (C, r)).
LOREFT = {"m": ("rotate_layer", True), "w": ("weight", False), "b": ("bias", False)}
PLAIN = {"w1": ("learned_source.weight", False), "w2": ("proj_layer.weight", False), "b": ("learned_source.bias", False)}
KINDS = {"LoreftIntervention": ("LoReFT", LOREFT), "NodireftIntervention": ("DiReFT", PLAIN),
         "NoreftIntervention": ("NoReFT", PLAIN)}
FIELDS = ("layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type", "intervention",
          "subspace_partition", "group_key", "intervention_link_key", "moe_key", "source_representation",
          "hidden_source_representation", "latent_dim")                   # a representation is saved as a list of these
BLOCK = re.compile(r"(?:model\.layers|transformer\.h)\[(\d+)\]\.output")  # the other way to name a block's output


def is_folder(folder) -> bool:
    try:
        return "intervention_types" in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def read(folder) -> tuple[str, dict, dict[str, Tensor]]:
    """(kind, options, tensors) of the adapter in a folder: what adapter.save() would have stored.

    tensors are fp32 and stacked, (S, K, r, C); K = 2 where a layer has two interventions, prefix first. An R that has lost
    its orthonormality, as pyreft's does when it is loaded and trained on, comes as NoReFT: h + Rᵀ(W h + b − R h) as it is.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    types, keys, representations = (config.get(name) for name in ("intervention_types", "sorted_keys", "representations"))
    if not all(isinstance(found, list) and len(found) == len(types) for found in (types, keys, representations)):
        raise ValueError(f"{folder / 'config.json'} does not list its interventions: expected as many "
                         "intervention_types as sorted_keys and representations")
    names = {re.sub(r"\W", "", str(name).rpartition(".")[2]) for name in types}
    if len(names) != 1 or not names <= KINDS.keys():
        raise ValueError(f"{folder} holds {', '.join(sorted(names)) or 'nothing'}: expected one of {', '.join(KINDS)}")
    kind, table = KINDS[names.pop()]
    layers: dict[int, list] = {}                                          # layer → its interventions, in pyreft's order
    for key, saved in zip(keys, representations):
        layers.setdefault(layer_of(saved, folder), []).append(read_one(folder / f"intkey_{key}.bin", table))
    counts = {len(parts) for parts in layers.values()}
    if len(counts) != 1 or not counts <= {1, 2}:
        raise ValueError(f"{folder} has {sorted(counts)} interventions a layer: expected one on each, or a prefix and a "
                         "suffix on each")
    shapes = {tuple(part[name].shape for name in table) for parts in layers.values() for part in parts}
    if len(shapes) != 1:
        raise ValueError(f"{folder} mixes shapes {sorted(shapes)}: expected one rank and one width throughout")
    tensors = {name: torch.stack([torch.stack([part[name] for part in layers[layer]]) for layer in sorted(layers)])
               for name in table}                                         # (S, K, r, C), (S, K, r)
    if kind == "LoReFT" and not orthonormal(tensors["m"]):
        kind, tensors = "NoReFT", {"w1": tensors["w"], "w2": tensors["m"], "b": tensors["b"]}
    options = {"rank": tensors["b"].shape[-1], "layers": sorted(layers), "positions": "f7+l7", "tied": counts == {1}}
    return kind, options, tensors


def layer_of(saved, folder: Path) -> int:
    fields = dict(zip(FIELDS, saved)) if isinstance(saved, list) else saved
    component, layer = str(fields.get("component")), fields.get("layer")
    named = BLOCK.fullmatch(component)
    if (component != "block_output" or not isinstance(layer, int)) and not named:
        raise ValueError(f"{folder} edits {component!r} of layer {layer!r}: expected 'block_output' of a number")
    for name, expected in (("unit", "pos"), ("intervention_link_key", None), ("subspace_partition", None)):
        if fields.get(name, expected) != expected:
            raise ValueError(f"{folder} has {name} {fields[name]!r}: expected {expected!r}")
    return int(named[1]) if named else layer


def read_one(path: Path, table: dict) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}, though config.json names it: the folder was not copied whole")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        return {ours: (state[theirs].T if turned else state[theirs]).float() for ours, (theirs, turned) in table.items()}
    except Exception as error:                                            # torch.load raises whatever it stumbles over
        raise ValueError(f"{path} is no saved intervention of that kind ({type(error).__name__}: {str(error)[:80]}): "
                         f"expected tensors {', '.join(theirs for theirs, _ in table.values())} and nothing else") from error


def orthonormal(R: Tensor) -> bool:
    return bool((R @ R.mT - torch.eye(R.shape[-2])).abs().max() < 1e-5)


def write(adapter, folder) -> None:
    """Writes a LoReFT, DiReFT or NoReFT as pyreft saves it. What has no place there is an error: other sites, an activation."""
    kind, options = type(adapter).__name__, adapter.options
    found = [(theirs, table) for theirs, (ours, table) in KINDS.items() if ours == kind]
    if not found:
        raise ValueError(f"pyreft has no {kind}: expected one of {', '.join(ours for ours, _ in KINDS.values())}")
    if options["site"] != "output" or options["activation"]:
        raise ValueError(f"this {kind} edits {options['site']} with activation {options['activation']}: a pyreft folder "
                         "records edits of a block's output only, and no activation")
    (theirs, table), folder, tensors = found[0], Path(folder), dict(adapter.named_parameters())
    if kind == "LoReFT":
        tensors["m"] = adapter.parts()[2]                                 # R, not the matrix that it is made of
    keys, saved, parts, width = [], [], 1 if options["tied"] else 2, adapter.model.config.width
    for k in range(parts):                                                # pyreft's first half of the list is the prefix's
        for slot, layer in enumerate(options["layers"]):
            keys.append(f"layer_{layer}_comp_block_output_unit_pos_nunit_1#{k}")
            saved.append([layer, "block_output", "pos", 1, options["rank"]] + [None] * (len(FIELDS) - 5))
            state = {name: (tensors[ours][slot, k].T if turned else tensors[ours][slot, k]).detach().cpu().contiguous().clone()
                     for ours, (name, turned) in table.items()}
            if table is PLAIN:
                state = {"embed_dim": torch.tensor(width), "interchange_dim": torch.tensor(width), **state}
            buffer = io.BytesIO()
            torch.save(state, buffer)
            files.write_bytes(folder / f"intkey_{keys[-1]}.bin", buffer.getvalue())
    files.write_text(folder / "config.json", json.dumps({
        "intervention_constant_sources": [True] * len(keys), "intervention_dimensions": [width] * len(keys),
        "intervention_types": [f"<class 'pyreft.interventions.{theirs}'>"] * len(keys), "mode": "parallel",
        "representations": saved, "sorted_keys": keys}, indent=2) + "\n")
