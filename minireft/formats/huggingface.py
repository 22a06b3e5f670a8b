"""Hugging Face folders of the families in families.py: config.json, safetensors in one file or in shards, tokenizer.json.

Use:  model, tokenizer = minireft.load(folder, dtype=torch.bfloat16); huggingface.save(model, tokenizer, folder)
See:  the logits that transformers computes; a setting that would change them and is not supported is one error, at once.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import files
from ..model import Model, ModelConfig
from ..tokenizer import Tokenizer
from .families import ACTIVATIONS, BODIES, FAMILIES, GIVEN, HEADS, Family, Row, numbered

# --------------------------------------------------------------------------------------------------------------- settings

def read_config(settings: dict, where="config.json") -> tuple[Family, ModelConfig]:
    """The family and our configuration of their settings. ValueError for what minireft does not compute."""
    kind = settings.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{where} has model_type {kind!r}: expected one of {', '.join(FAMILIES)}")
    family, settings = FAMILIES[kind], {**settings, **rotary(settings, where)}
    if settings.get("quantization_config") is not None:
        raise ValueError(f"{where} describes quantised weights: fetch the model's plain half-precision or float32 weights")
    for name, values in family.allowed.items():
        if settings.get(name, values[0]) not in values:
            raise ValueError(f"{where} has {name} {settings[name]!r}: minireft computes {' or '.join(map(repr, values))} only")
    fields = dict(family.fixed)
    for ours, (theirs, default) in family.settings.items():
        value = settings.get(theirs)
        fields[ours] = default if value is None else value
        if fields[ours] is GIVEN:
            raise ValueError(f"{where} has no {theirs}: it does not describe a {kind} model; fetch it again")
    if "activation" in family.settings:
        fields["activation"] = one_of(ACTIVATIONS, fields["activation"], family.settings["activation"][0], where)
    if fields["hidden"] is None:
        fields["hidden"] = 4 * fields["width"]
    mlp_bias = settings.get("mlp_bias", False)
    if kind == "llama" and fields["bias"] != mlp_bias:
        raise ValueError(f"{where} has attention_bias {fields['bias']} but mlp_bias {mlp_bias}: minireft has both or neither")
    window = sliding_window(kind, settings)
    if window:                                                            # up to there, all of it is seen
        fields["context"] = min(fields["context"], window)
    if fields["positions"] == "rotary":
        fields["rotary_scaling"] = slowing(settings["rope_scaling"], where)
    family.derive(fields, settings)
    try:
        return family, ModelConfig(**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} describes no model that can be built: {error}") from error


def one_of(table: dict, value, name: str, where):
    if value not in table:
        raise ValueError(f"{where} has {name} {value!r}: expected one of {', '.join(table)}")
    return table[value]


def rotary(settings: dict, where) -> dict:
    """rope_theta and rope_scaling, whichever of the two spellings the file has (transformers 5 says rope_parameters)."""
    found = settings.get("rope_parameters") or {}
    scaling = settings.get("rope_scaling") or found
    plain = scaling.get("rope_type", scaling.get("type", "default")) == "default"
    theta = found.get("rope_theta", settings.get("rope_theta"))
    return {"rope_theta": theta, "rope_scaling": None if plain else scaling}


def slowing(scaling: dict | None, where) -> tuple | None:
    """Their rope_scaling as ModelConfig.rotary_scaling."""
    if scaling is None:
        return None
    kind, known = scaling.get("rope_type", scaling.get("type")), {"linear": ("factor",), "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if kind not in known or not all(name in scaling for name in known[kind]):
        raise ValueError(f"{where} has rope_scaling {scaling}: minireft computes the types linear and llama3, with all their numbers")
    values = tuple(scaling[name] for name in known[kind])
    return values if kind == "llama3" else (*values, 1.0, 4.0, 0)         # none is fast enough to be kept


def sliding_window(kind: str, settings: dict) -> int | None:
    """Tokens that attention looks back, or None for all of them."""
    if kind == "mistral":
        return settings.get("sliding_window", 4096)                       # what an absent one means there
    return settings.get("sliding_window") if settings.get("use_sliding_window") else None


# ---------------------------------------------------------------------------------------------------------------- reading

def read_tokenizer(folder: Path, settings: dict, config: ModelConfig) -> Tokenizer | None:
    """The folder's tokenizer, or None; where it names no special tokens, config.json's ids count. ValueError where it does not
    fit the model, or a model that writes text has no token to end it."""
    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = Tokenizer.from_file(folder)
    for role in ("bos", "eos", "pad"):
        ids = settings.get(f"{role}_token_id")
        if getattr(tokenizer, f"{role}_id") is None:                      # Llama 3 has several ends of text: the first is it
            setattr(tokenizer, f"{role}_id", ids[0] if isinstance(ids, list) and ids else ids if isinstance(ids, int) else None)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size} tokens, and config.json a vocabulary of "
                         f"{config.vocab_size}: they are not of one model; fetch both again")
    if tokenizer.eos_id is None and config.architecture != "encoder":
        raise ValueError(f"{folder} names no token that ends a text: write its \"eos_token\" into tokenizer_config.json")
    return tokenizer


def find_tensors(folder: Path) -> dict[str, Path]:
    """Every tensor of the folder and the file that holds it."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            where = {name: folder / file for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} lists no weight_map ({error}): fetch it again") from error
        missing = sorted({path.name for path in where.values() if not path.is_file()})
        if missing:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)} of its shards: fetch them")
        return where
    if single.is_file():
        with files.opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    if any(folder.glob("pytorch_model*.bin")):
        raise ValueError(f"{folder} holds pickled weights only (pytorch_model.bin), and reading those can run code: "
                         "fetch or write safetensors")
    raise FileNotFoundError(f"{folder} holds no weights: expected model.safetensors, or shards and their "
                            "model.safetensors.index.json")


def plan(folder: Path, family: Family, model: Model, where: dict[str, Path]) -> dict[Path, dict[str, Row]]:
    """What to read from which file, {file: {their tensor: ours}}; everything is checked before the first weight is read."""
    expected = {name: p.shape for name, p in model.named_parameters()}
    bare = not any(name.startswith(BODIES) for name in where)             # saved without its head: no prefix on the names
    wanted = {}                                                           # their tensor → ours
    for theirs, row in family.weights.items():
        for their_layer, layer in numbered(theirs, row, model.config):
            here = row._replace(ours=tuple(name.format(layer) for name in row.ours))
            if here.ours[0] in expected:                                  # biases and an untied head: where the model has them
                name = theirs.format(their_layer)
                wanted[name.partition(".")[2] if bare and name.startswith(BODIES) else name] = here
    twice = {name for name, row in family.weights.items() if row.ours == ("head.weight",)} if model.config.tied else ()
    unknown = [name for name in where if name not in wanted and name not in twice and not name.endswith(family.ignored)]
    for problem, names in (("lacks", wanted.keys() - where.keys()), ("has weights that minireft would not use,", unknown)):
        if names:
            some = ", ".join(sorted(names)[:4]) + (" ..." if len(names) > 4 else "")
            raise ValueError(f"{folder} {problem} {some} ({len(names)} in all): the weights do not fit config.json, or the "
                             "architecture is another")
    todo: dict[Path, dict[str, Row]] = {}
    for name, row in wanted.items():
        todo.setdefault(where[name], {})[name] = row
    for path, named in todo.items():
        with files.opened(path) as file:
            for name, row in named.items():
                if name not in file.keys():
                    raise ValueError(f"{path} does not hold {name}, though the index says so: fetch both again")
                stored, shape = file.get_slice(name), shape_of(row, expected)
                if tuple(stored.get_shape())[1 if row.added else 0 :] != shape[1 if row.added else 0 :]:
                    raise ValueError(f"{name} in {path} has shape {tuple(stored.get_shape())}: config.json wants {shape}")
                if stored.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(f"{name} in {path} is stored as {stored.get_dtype()}: quantised weights are not supported")
    return todo


def shape_of(row: Row, expected: dict) -> tuple[int, ...]:
    first, *rest = expected[row.ours[0]]
    first += row.skip
    shape = (sum(expected[name][0] for name in row.ours), *rest) if len(row.ours) > 1 else (first, *rest)
    return shape[::-1] if row.transposed else shape


def fill(model: Model, name: str, tensor: Tensor, device, dtype) -> None:
    """Puts one weight into a model that was made on the meta device, as memory of its own."""
    path, _, leaf = name.rpartition(".")
    weight = torch.empty(tensor.shape, device=device or "cpu", dtype=dtype or torch.float32).copy_(tensor)
    setattr(model.get_submodule(path), leaf, nn.Parameter(weight, requires_grad=False))


def load(folder, settings: dict, device=None, dtype=None):
    """(model, tokenizer) of a folder with these settings; weights go one by one straight to the device and dtype.

    tokenizer is None without a tokenizer.json. The context ends where a sliding window would begin to hide tokens. On the meta
    device nothing is read but shapes, and config.json is enough.
    """
    folder = Path(folder)
    family, config = read_config(settings, folder / "config.json")
    shapes_only = torch.device(device or "cpu").type == "meta"
    where = {} if shapes_only and not any(folder.glob("*.safetensors")) else find_tensors(folder)
    tokenizer = read_tokenizer(folder, settings, config)
    headed = any(name.startswith(HEADS) for name in where)                # the files know best which head there is
    if where and config.masked_head and not headed:                       # an encoder's body alone
        config = replace(config, masked_head=False)
    if config.start is not None and headed:                               # T5 v1.1, whatever its config.json says
        config = replace(config, tied=False)
    with torch.device("meta"):
        model = Model(config)
    todo, added = plan(folder, family, model, where) if where else {}, {}
    for path, named in () if shapes_only else todo.items():
        for name, row in named.items():
            whole = files.read_tensor(path, name)[row.skip :]
            if row.added:                                                 # to what another row fills: when all is there
                added[row.ours[0]] = whole[0]
                continue
            whole = whole.T if row.transposed else whole
            whole = whole * row.scale(config, settings) if row.scale else whole
            sizes = [model.get_parameter(ours).shape[0] for ours in row.ours]
            for ours, part in zip(row.ours, whole.split(sizes)):
                fill(model, ours, part, device, dtype)
    for ours, row in added.items():
        model.get_parameter(ours).add_(row.to(device or "cpu"))
    model.tie()
    model.requires_grad_(False).eval()
    model.tokenizer = tokenizer
    return model, model.tokenizer


# ---------------------------------------------------------------------------------------------------------------- writing

def family_of(config: ModelConfig) -> str:
    """The model_type of theirs whose settings say all of this configuration. ValueError where there is none."""
    usual = {kind: ACTIVATIONS.get(family.settings.get("activation", ("", ""))[1]) for kind, family in FAMILIES.items()}
    for kind, family in sorted(FAMILIES.items(), key=lambda item: usual[item[0]] != config.activation):     # OPT for a relu, not GPT-2
        known = {*family.settings, *family.fixed, *family.derived} | ({"rotary_scaling"} if config.positions == "rotary" else set())
        fields = {**{name: getattr(config, name) for name in known}, **family.fixed}
        narrow = kind == "qwen2" and config.head_dim * config.heads != config.width         # their Qwen2 has no head_dim
        known_activation = "activation" in family.fixed or config.activation in ACTIVATIONS.values()
        try:
            if kind != "mistral" and not narrow and known_activation and ModelConfig(**fields) == config:
                return kind
        except ValueError:                                                # fields that do not go together: another family's
            continue
    raise ValueError(f"no architecture of Hugging Face known here computes {config}: save it as a minireft base")


def write_config(config: ModelConfig, tokenizer=None) -> dict:
    """Their config.json for our configuration."""
    kind = family_of(config)
    family = FAMILIES[kind]
    settings = {theirs: getattr(config, ours) for ours, (theirs, _) in family.settings.items()}
    if "activation" in family.settings:
        settings[family.settings["activation"][0]] = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.activation]
    else:
        settings["hidden_act"] = "silu"
    if kind == "llama":
        settings["mlp_bias"] = config.bias
    if kind == "bert":                                                    # RoBERTa computes the same, and is written as BERT
        settings["type_vocab_size"] = 1
    if kind == "t5":
        settings |= {"num_decoder_layers": config.layers - config.encoder_layers, "decoder_start_token_id": config.start}
    if config.rotary_scaling:
        factor, low, high, original = config.rotary_scaling
        settings["rope_scaling"] = {"rope_type": "linear", "factor": factor} if original == 0 else {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id", None) for role in ("bos", "eos", "pad")}
    return {"architectures": [family.architecture], "model_type": kind, **ids, **settings}


def save(model: Model, tokenizer, path, dtype=None) -> None:
    """Writes a folder that transformers loads, with equal logits; dtype of the stored weights (None: as they are)."""
    folder, settings, config = Path(path), write_config(model.config, tokenizer), model.config
    mine, tensors = dict(model.named_parameters()), {}
    for theirs, row in FAMILIES[settings["model_type"]].weights.items():
        for their_layer, layer in numbered(theirs, row, config):
            parts = [mine[name.format(layer)].detach() for name in row.ours if name.format(layer) in mine]
            if not parts:                                                 # a bias or a head that this model has not
                continue
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            whole = whole / row.scale(config, settings) if row.scale else whole
            whole = torch.zeros_like(whole[:1]) if row.added else F.pad(whole, (0, 0, row.skip, 0)) if row.skip else whole
            tensors[theirs.format(their_layer)] = whole.T if row.transposed else whole
    files.write_tensors(folder / "model.safetensors", tensors, {"format": "pt"}, dtype)
    settings["torch_dtype"] = str(dtype or next(iter(tensors.values())).dtype).removeprefix("torch.")
    files.write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
