"""What a base or an adapter is, told from its shapes: no weights are read.

Use:  print(overview("base")); print(overview("runs/facts/adapter.safetensors"))
See:  the architecture, every site with its shape, sizes, the tokenizer, and what each method would train.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from .. import adapters, checkpoint, files
from ..model import Activation, Embedding, KeysValues, Linear, Model, ModelConfig, Norm
from . import hub, is_foreign, pyreft

# What each method trains with its usual settings.
METHODS = {"LoReFT, rank 4, f7+l7, all layers": lambda model: adapters.LoReFT(model, rank=4),
           "the same, untied": lambda model: adapters.LoReFT(model, rank=4, tied=False),
           "DiReFT, rank 4, f7+l7, all layers": lambda model: adapters.DiReFT(model, rank=4),
           "(IA)³, key, value, ffn": adapters.IA3,
           "LoRA, rank 8, query, value": adapters.LoRA,
           "LoRA, rank 8, every Linear of a block": lambda model: adapters.LoRA(model, sites="all")}


def overview(path, base=None) -> str:
    """A page of text about what lies at `path`: "base" and its sisters, or any form that load and load_adapter read.

    base: of an adapter that does not describe its own. Raises as load and load_adapter do.
    """
    where = Path(path)
    if str(path) not in checkpoint.SHIPPED and not where.exists() and not hub.is_name(path):
        raise FileNotFoundError(f"there is nothing at {path}: expected a base or an adapter")
    own = hub.is_name(path) or str(path) in checkpoint.SHIPPED or where.suffix == ".bin" or (where / "config.json").is_file() and not pyreft.is_folder(where)
    return base_page(path) if own else adapter_page(path, base)


# ----------------------------------------------------------------------------------------------------------------- a base

def base_page(path) -> str:
    model, tokenizer = checkpoint.load(path, device="meta")
    total = count(model)
    methods = [(name, make(model).num_parameters()) for name, make in METHODS.items()]
    rows = [(name, f"{n:,}", f"{n / total:.4%}") for name, n in [*methods, ("NEFTune, noise on the embedding", 0), ("full", total)]]
    return "\n".join([
        describe(model), f"parameters  {total:,}: {megabytes(4 * total)} in float32, {megabytes(2 * total)} in bfloat16",
        f"tokenizer   {tokens(tokenizer)}", "", *table(("site", "layers", "shape", "parameters"), sites(model)),
        "", *table(("method", "would train", "of the base"), rows)])


def describe(model: Model) -> str:
    c = model.config
    layers = f"{c.encoder_layers} + {c.layers - c.encoder_layers}" if model.two else c.layers
    keys = f", {c.kv_heads} for keys and values" if c.kv_heads < c.heads else ""
    scaled = f", slowed {c.rotary_scaling[0]:g} times" if c.rotary_scaling else ""
    traits = [f"{c.norm} norm {'before' if c.norm_first else 'after'} each part", f"{c.positions} positions{scaled}", f"{c.activation} feed-forward of {c.hidden}",
              *["queries and keys normed"] * c.qk_norm, "biases" if c.bias else "biases on query, key, value" if c.qkv_bias else "no biases",
              "head tied to the embedding" if c.tied else "head of its own"]
    return (f"model       {c.architecture}: {layers} layers of width {c.width}, {c.heads} heads of {c.head_dim}{keys}\n            {', '.join(traits[:3])}\n"
            f"            {', '.join(traits[3:])}\ncontext     {c.context:,} tokens, from a vocabulary of {c.vocab_size:,}")


def tokens(tokenizer) -> str:
    if tokenizer is None:
        return "none"
    names = {i: token for token, i in tokenizer.vocabulary.items()}
    roles = {"begins with": tokenizer.bos_id, "ends with": tokenizer.eos_id, "pads with": tokenizer.pad_id}
    return ", ".join([f"{tokenizer.vocab_size:,} tokens", *(f"{role} {names.get(i, i)}" for role, i in roles.items() if i is not None)])


def sites(model: Model) -> list[tuple]:
    """(name, layers, shape, parameters) of every site, those of the same name in one row; a shared weight counts once."""
    rows, seen = {}, set()
    for path, site in model.sites().items():
        name, layer = re.sub(r"^blocks\.\d+", "block", path), re.match(r"blocks\.(\d+)", path)
        first, layers, numbers = rows.get(name, (site, [], 0))
        rows[name] = first, [*layers, *([int(layer[1])] if layer else [])], numbers + sum(p.numel() for p in site.parameters() if p not in seen)
        seen.update(site.parameters())
    return [(name, span(layers), shape(site, model.config), f"{numbers:,}" if numbers else "shared" if [*site.parameters()] else "")
            for name, (site, layers, numbers) in rows.items()]


def shape(site, c: ModelConfig) -> str:
    match site:
        case Embedding():
            return f"(B, T) → (B, T, {site.weight.shape[1]})"
        case Linear():
            return f"{site.weight.shape[1]} → {site.weight.shape[0]}{' + bias' if site.bias is not None else ''}"
        case Norm():
            return f"(..., {site.weight.shape[0]})"
        case KeysValues():
            return f"k, v (B, T, {c.kv_heads * c.head_dim})"
        case Activation():
            return f"(B, T, {c.hidden})"
    return f"(B, T, {c.width})"


# -------------------------------------------------------------------------------------------------------------- an adapter

def adapter_page(path, base) -> str:
    if is_foreign(path) and base is None:
        raise ValueError(f"{path} does not describe its base: name it with --base")
    model = checkpoint.load(base, device="meta")[0] if base is not None else its_base(path)
    adapter = adapters.load_adapter(model, path)
    names = {site: re.sub(r"^blocks\.\d+", "block", name) for name, site in model.sites().items()}
    stands = dict.fromkeys(names[site] for site, _ in adapter.edits())
    rows = [(name, " × ".join(map(str, p.shape)), f"{p.numel():,}") for name, p in adapter.named_parameters()]
    total, n = count(model), adapter.num_parameters()
    return "\n".join([f"adapter     {adapter!r}", f"stands on   {', '.join(stands)}", f"trained     {n:,} parameters, {n / total:.4%} of the base; "
                      f"{megabytes(4 * n)}", *table(("tensor", "shape", "parameters"), rows), "", "its base:", describe(model)])


def its_base(path) -> Model:
    """The base's shape, which an adapter of ours remembers."""
    with files.opened(path) as file:
        metadata = file.metadata() or {}
    try:
        config = ModelConfig(**json.loads(metadata["base"])["config"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not describe its base ({error!r}): name it with --base") from error
    with torch.device("meta"):
        return Model(config)


# ------------------------------------------------------------------------------------------------------------------ shared

def count(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def megabytes(n: float) -> str:
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB" if n >= 1e5 else f"{n / 1e3:,.1f} kB"


def span(layers: list[int]) -> str:
    return f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else "".join(map(str, layers))


def table(head: tuple, rows: list[tuple]) -> list[str]:
    """Columns as wide as they need; the numbers, in the last ones, end together."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    right = [all(re.fullmatch(r"[\d,.%]*|shared", row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join(f"{cell:>{w}}" if r else f"{cell:{w}}" for cell, w, r in zip(row, widths, right)).rstrip() for row in [head, *rows]]
