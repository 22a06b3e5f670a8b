"""PEFT's folders: adapter_config.json and adapter_model.safetensors, LoRA and (IA)³ on the Llama family and GPT-2.

Use:  lora = minireft.load_adapter(model, folder); peft.write(lora, folder)
See:  PEFT's logits. A layer that the folder leaves out is left as it is.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from .. import files
from . import huggingface

# Our Linear in a block → what our adapters call it.
SITES = {"attention.query": "query", "attention.key": "key", "attention.value": "value", "attention.output": "attention_output",
         "ffn.gate": "gate", "ffn.up": "up", "ffn.down": "ffn_output"}
# Settings that would change what is computed, with the values that do not.
PLAIN = {"bias": ("none", None), "use_dora": (False, None), "lora_bias": (False, None), "use_qalora": (False, None),
         "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "modules_to_save": (None, []),
         "trainable_token_indices": (None, [])}


def is_folder(folder) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def modules(config) -> dict[str, tuple[str, ...]]:
    """Their Linear, {} being the layer → our sites that it holds, by the family that computes this configuration."""
    found = {}
    for theirs, row in huggingface.FAMILIES[huggingface.family_of(config)].weights.items():
        sites = tuple(SITES.get(ours.removeprefix("blocks.{}.").removesuffix(".weight")) for ours in row.ours)
        if None not in sites:
            found[theirs.removesuffix(".weight")] = sites
    return found


def linear(model, site: str):
    return model.blocks[0].get_submodule({ours: path for path, ours in SITES.items()}[site])


def read(folder, model) -> tuple[str, dict, dict[str, Tensor]]:
    """(kind, options, tensors) of the adapter in a folder, for this model: what adapter.save() would have stored."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'adapter_config.json'} describes no adapter of PEFT's ({error}): "
                         "fetch it again") from error
    if kind not in ("LORA", "IA3"):
        raise ValueError(f"{folder} holds a {kind} of PEFT's: expected LORA or IA3")
    for name, values in PLAIN.items():
        if config.get(name, values[0]) not in values:
            raise ValueError(f"{folder} has {name} {config[name]!r}: minireft computes {values[0]!r} only")
    parts = sort_out(stored(folder), model, folder)
    return read_lora(config, parts, model, folder) if kind == "LORA" else read_ia3(parts, model, folder)


def stored(folder: Path) -> dict[str, Tensor]:
    if (folder / "adapter_model.safetensors").is_file() or not (folder / "adapter_model.bin").is_file():
        return files.read_tensors(folder / "adapter_model.safetensors")[0]
    return files.read_torch(folder / "adapter_model.bin")


def sort_out(tensors: dict[str, Tensor], model, folder) -> dict[tuple[str, ...], dict[str, dict[int, Tensor]]]:
    """{our sites: {"lora_A", "lora_B" or "ia3_l": {layer: tensor}}}"""
    patterns = {re.compile(re.escape(name).replace(r"\{\}", r"(\d+)")): sites for name, sites in modules(model.config).items()}
    found: dict = {}
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        match = next(((m, sites) for pattern, sites in patterns.items() if (m := pattern.fullmatch(module))), None)
        if match is None or part not in ("lora_A", "lora_B", "ia3_l") or int(match[0][1]) >= model.config.layers:
            raise ValueError(f"{folder} adapts {name}, which this model has not: load it onto the base that it was made for")
        found.setdefault(match[1], {}).setdefault(part, {})[int(match[0][1])] = tensor.float()
    if not found:
        raise ValueError(f"{folder} holds no weights")
    return found


def stack(tensors: dict[int, Tensor], layers: int, folder) -> Tensor:
    """One row a layer, zeros where there is none: (L, ...)."""
    first = next(iter(tensors.values()))
    if any(tensor.shape != first.shape for tensor in tensors.values()):
        raise ValueError(f"{folder} has tensors of different shapes for one module: expected one rank on all layers")
    return torch.stack([tensors.get(layer, torch.zeros_like(first)) for layer in range(layers)])


def read_lora(config: dict, parts: dict, model, folder):
    rank, alpha = config["r"], config["lora_alpha"]
    tensors: dict[str, Tensor] = {}
    for sites, named in parts.items():
        if named.keys() != {"lora_A", "lora_B"}:
            raise ValueError(f"{folder} has {', '.join(sorted(named))} for {' and '.join(sites)}: expected lora_A and lora_B")
        a, b = (stack(named[part], model.config.layers, folder) for part in ("lora_A", "lora_B"))      # (L, r, in), (L, out, r)
        sizes = [linear(model, site).weight.shape[0] for site in sites]
        if b.shape[1] != sum(sizes):
            raise ValueError(f"{folder} has lora_B of shape {tuple(b.shape[1:])} for {' and '.join(sites)}: "
                             f"expected {sum(sizes)} rows")
        for site, mine in zip(sites, b.split(sizes, 1)):                  # one A for query, key and value where they are packed
            tensors |= {f"{site}_a": a, f"{site}_b": mine.contiguous()}
    # α / r is the scale there and here; rsLoRA's is α / √r
    options = {"rank": rank, "alpha": alpha * math.sqrt(rank) if config.get("use_rslora") else alpha,
               "sites": [site for site in SITES.values() if f"{site}_a" in tensors]}
    return "LoRA", options, tensors


def read_ia3(parts: dict, model, folder):
    vectors: dict[str, Tensor] = {}
    for sites, named in parts.items():
        if named.keys() != {"ia3_l"}:
            raise ValueError(f"{folder} has {', '.join(sorted(named))} for {' and '.join(sites)}: expected ia3_l")
        one = {layer: l - 1 for layer, l in named["ia3_l"].items()}       # l − 1, as it is stored here: 0 is none
        l = stack(one, model.config.layers, folder)                       # (L, out, 1), or (L, 1, in) on the input
        if l.shape[1] == 1 and l.shape[2] > 1:
            if sites != ("ffn_output",):
                raise ValueError(f"{folder} scales the input of {' and '.join(sites)}: "
                                 "minireft scales that of the feed-forward's last layer")
            sites = ("ffn",)                                              # what that layer reads
        elif sites == ("up",) and model.config.activation == "swiglu":
            sites = ("ffn",)                                              # silu(gate) ⊙ (l ⊙ up) = l ⊙ (silu(gate) ⊙ up)
        elif set(sites) & {"up", "gate"}:
            raise ValueError(f"{folder} scales {sites[0]} before the non-linearity: (IA)³ stands after it")
        flat = l.flatten(1)
        sizes = [linear(model, site).weight.shape[0] if site != "ffn" else flat.shape[1] for site in sites]
        if flat.shape[1] != sum(sizes):
            raise ValueError(f"{folder} has {flat.shape[1]} factors for {' and '.join(sites)}: expected {sum(sizes)}")
        if vectors.keys() & set(sites):
            raise ValueError(f"{folder} scales the feed-forward twice, at up and at down: fold one into the other")
        vectors |= {site: part.contiguous() for site, part in zip(sites, flat.split(sizes, 1))}
    order = ("key", "value", "ffn", "query", "attention_output", "ffn_output")
    return "IA3", {"sites": [site for site in order if site in vectors], "init_scale": 0.0, "layer_norm": False}, vectors


def write(adapter, folder) -> None:
    """Writes a LoRA or an (IA)³ as PEFT saves it. ValueError where its modules have no place for a site."""
    kind, model, folder = type(adapter).__name__, adapter.model, Path(folder)
    if kind not in ("LoRA", "IA3") or adapter.options.get("layer_norm"):
        raise ValueError(f"PEFT has no {kind}{' with layer norms' if kind == 'IA3' else ''}: expected LoRA, or IA3 without")
    mine = {name: parameter.detach() for name, parameter in adapter.named_parameters()}
    family = huggingface.family_of(model.config)
    left, targets, feedforward, tensors = set(adapter.options["sites"]), [], [], {}
    for theirs, sites in modules(model.config).items():
        used = ("ffn",) if kind == "IA3" and sites == ("ffn_output",) and "ffn" in left else sites
        if not set(used) <= left or kind == "LoRA" and len(used) > 1:
            continue
        left -= set(used)
        targets.append(theirs.partition("{}.")[2])
        feedforward += targets[-1:] if used == ("ffn",) else []
        for layer in range(model.config.layers):
            at = f"base_model.model.{theirs.format(layer)}"
            if kind == "LoRA":
                tensors |= {f"{at}.lora_{part.upper()}.weight": mine[f"{used[0]}_{part}"][layer] for part in "ab"}
            else:
                l = 1 + torch.cat([mine[site][layer] for site in used])
                tensors[f"{at}.ia3_l"] = l[None] if used == ("ffn",) else l[:, None]
    if left:
        raise ValueError(f"PEFT has no place for this {kind} at {', '.join(sorted(left))}: a {family} model has no module "
                         "of its own for it")
    settings = {"r": adapter.options["rank"], "lora_alpha": adapter.options["alpha"], "lora_dropout": 0.0, "bias": "none"} \
        if kind == "LoRA" else {"feedforward_modules": feedforward}
    files.write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    files.write_text(folder / "adapter_config.json", json.dumps({
        "peft_type": kind.upper(), "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "target_modules": targets, "fan_in_fan_out": family == "gpt2", **settings}, indent=2) + "\n")
