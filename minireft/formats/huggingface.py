"""Hugging Face folders of the Llama family and GPT-2: config.json, safetensors in one file or in shards, tokenizer.json.

Use:  model, tokenizer = minireft.load(folder, dtype=torch.bfloat16); huggingface.save(model, tokenizer, folder)
See:  the logits that transformers computes; a setting that would change them and is not supported is one error, at once.

A family is a table: which setting of theirs is which of ours, which values may stand in the rest, and where weights go.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import files
from ..model import Model, ModelConfig
from ..tokenizer import Tokenizer

GIVEN = object()                        # a setting that must be there
BODIES = ("model.", "transformer.")     # what their names begin with, but for the head's


class Row(NamedTuple):
    """One tensor of theirs: the parameters of ours that it holds, one above the other; transposed: stored as (in, out)."""

    ours: tuple[str, ...]
    transposed: bool = False


class Family(NamedTuple):
    settings: dict[str, tuple]          # field of ModelConfig → (their name, value where it is absent)
    fixed: dict                         # fields of ModelConfig that every model of the family has
    allowed: dict[str, tuple]           # their name → values that minireft computes; absent is the first one
    weights: dict[str, Row]             # their tensor → ours; {} is the layer
    ignored: tuple[str, ...]            # endings of tensors that hold nothing learned
    architecture: str


def rows(pairs: dict[str, str]) -> dict[str, Row]:
    return {theirs: Row((ours,)) for theirs, ours in pairs.items()}


LLAMA = Family(
    settings={"vocab_size": ("vocab_size", GIVEN), "width": ("hidden_size", GIVEN), "layers": ("num_hidden_layers", GIVEN),
              "heads": ("num_attention_heads", GIVEN), "hidden": ("intermediate_size", GIVEN),
              "context": ("max_position_embeddings", 2048), "kv_heads": ("num_key_value_heads", None), "head_dim": ("head_dim", None),
              "norm_eps": ("rms_norm_eps", 1e-6), "rotary_base": ("rope_theta", 10000.0),
              "tied": ("tie_word_embeddings", False), "bias": ("attention_bias", False)},
    fixed={"norm": "rms", "positions": "rotary", "activation": "swiglu"},
    allowed={"hidden_act": ("silu",), "rope_scaling": (None,), "partial_rotary_factor": (None, 1.0)},
    weights=rows({
        "model.embed_tokens.weight": "embed.weight",
        "model.layers.{}.input_layernorm.weight": "blocks.{}.attention_norm.weight",
        **{f"model.layers.{{}}.self_attn.{theirs}_proj.{part}": f"blocks.{{}}.attention.{ours}.{part}"
           for part in ("weight", "bias") for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output"))},
        "model.layers.{}.post_attention_layernorm.weight": "blocks.{}.ffn_norm.weight",
        **{f"model.layers.{{}}.mlp.{name}_proj.{part}": f"blocks.{{}}.ffn.{name}.{part}" for part in ("weight", "bias")
           for name in ("gate", "up", "down")},
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "head.weight"}),
    ignored=("rotary_emb.inv_freq",),
    architecture="LlamaForCausalLM")

GPT2 = Family(
    settings={"vocab_size": ("vocab_size", GIVEN), "width": ("n_embd", GIVEN), "layers": ("n_layer", GIVEN),
              "heads": ("n_head", GIVEN), "hidden": ("n_inner", None), "context": ("n_positions", GIVEN),
              "norm_eps": ("layer_norm_epsilon", 1e-5),
              "activation": ("activation_function", "gelu_new"), "tied": ("tie_word_embeddings", True)},
    fixed={"norm": "layer", "positions": "learned", "bias": True},
    allowed={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    weights={
        **rows({"transformer.wte.weight": "embed.weight", "transformer.wpe.weight": "position.weight",
                "lm_head.weight": "head.weight"}),
        **rows({f"transformer.{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias") for theirs, ours in (
            ("h.{}.ln_1", "blocks.{}.attention_norm"), ("h.{}.ln_2", "blocks.{}.ffn_norm"), ("ln_f", "norm"))}),
        # Conv1D, a Linear stored as (in, out); c_attn is query, key and value in one
        **{f"transformer.h.{{}}.{theirs}.{part}": Row(tuple(f"blocks.{{}}.{name}.{part}" for name in ours), part == "weight")
           for part in ("weight", "bias") for theirs, ours in (
               ("attn.c_attn", ("attention.query", "attention.key", "attention.value")), ("attn.c_proj", ("attention.output",)),
               ("mlp.c_fc", ("ffn.up",)), ("mlp.c_proj", ("ffn.down",)))}},
    ignored=(".attn.bias", ".attn.masked_bias"),
    architecture="GPT2LMHeadModel")

MISTRAL = LLAMA._replace(settings={**LLAMA.settings, "kv_heads": ("num_key_value_heads", GIVEN)})
QWEN2 = MISTRAL._replace(settings={name: pair for name, pair in MISTRAL.settings.items() if name != "bias"},
                         fixed={**LLAMA.fixed, "qkv_bias": True}, architecture="Qwen2ForCausalLM")

FAMILIES = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "gpt2": GPT2}                # by their model_type
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


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
        fields["activation"] = one_of(ACTIVATIONS, fields["activation"], "activation_function", where)
    if fields["hidden"] is None:
        fields["hidden"] = 4 * fields["width"]
    mlp_bias = settings.get("mlp_bias", False)
    if family is LLAMA and fields["bias"] != mlp_bias:
        raise ValueError(f"{where} has attention_bias {fields['bias']} but mlp_bias {mlp_bias}: minireft has both or neither")
    window = sliding_window(kind, settings)
    if window:                                                            # up to there, all of it is seen
        fields["context"] = min(fields["context"], window)
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


def sliding_window(kind: str, settings: dict) -> int | None:
    """Tokens that attention looks back, or None for all of them."""
    if kind == "mistral":
        return settings.get("sliding_window", 4096)                       # what an absent one means there
    return settings.get("sliding_window") if settings.get("use_sliding_window") else None


# ---------------------------------------------------------------------------------------------------------------- reading

@contextmanager
def opened(path: Path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): it may be cut off; fetch it again") from error


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
        with opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    if any(folder.glob("pytorch_model*.bin")):
        raise ValueError(f"{folder} holds pickled weights only (pytorch_model.bin), and reading those can run code: "
                         "fetch or write safetensors")
    raise FileNotFoundError(f"{folder} holds no weights: expected model.safetensors, or shards and their "
                            "model.safetensors.index.json")


def plan(folder: Path, family: Family, model: Model) -> dict[Path, dict[str, Row]]:
    """What to read from which file, {file: {their tensor: ours}}; everything is checked before the first weight is read."""
    where, expected = find_tensors(folder), {name: p.shape for name, p in model.named_parameters()}
    bare = not any(name.startswith(BODIES) for name in where)             # saved without its head: no prefix on the names
    wanted = {}                                                           # their tensor → ours
    for theirs, row in family.weights.items():
        for layer in range(model.config.layers) if "{}" in theirs else (0,):
            here = Row(tuple(name.format(layer) for name in row.ours), row.transposed)
            if here.ours[0] in expected:                                  # biases and an untied head: where the model has them
                name = theirs.format(layer)
                wanted[name.partition(".")[2] if bare and name.startswith(BODIES) else name] = here
    unknown = [name for name in where if name not in wanted and not name.endswith(family.ignored)
               and not (name == "lm_head.weight" and model.config.tied)]
    for problem, names in (("lacks", wanted.keys() - where.keys()), ("has weights that minireft would not use,", unknown)):
        if names:
            some = ", ".join(sorted(names)[:4]) + (" ..." if len(names) > 4 else "")
            raise ValueError(f"{folder} {problem} {some} ({len(names)} in all): the weights do not fit config.json, or the "
                             "architecture is another")
    todo: dict[Path, dict[str, Row]] = {}
    for name, row in wanted.items():
        todo.setdefault(where[name], {})[name] = row
    for path, named in todo.items():
        with opened(path) as file:
            for name, row in named.items():
                if name not in file.keys():
                    raise ValueError(f"{path} does not hold {name}, though the index says so: fetch both again")
                stored, shape = file.get_slice(name), shape_of(row, expected)
                if tuple(stored.get_shape()) != shape:
                    raise ValueError(f"{name} in {path} has shape {tuple(stored.get_shape())}: config.json wants {shape}")
                if stored.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(f"{name} in {path} is stored as {stored.get_dtype()}: quantised weights are not supported")
    return todo


def shape_of(row: Row, expected: dict) -> tuple[int, ...]:
    first, *rest = expected[row.ours[0]]
    shape = (sum(expected[name][0] for name in row.ours), *rest) if len(row.ours) > 1 else (first, *rest)
    return shape[::-1] if row.transposed else shape


def fill(model: Model, name: str, tensor: Tensor, device, dtype) -> None:
    """Puts one weight into a model that was made on the meta device, as memory of its own."""
    path, _, leaf = name.rpartition(".")
    weight = torch.empty(tensor.shape, device=device or "cpu", dtype=dtype or torch.float32).copy_(tensor)
    setattr(model.get_submodule(path), leaf, nn.Parameter(weight, requires_grad=False))


def load(folder, settings: dict, device=None, dtype=None):
    """(model, tokenizer) of a folder with these settings; weights go one by one straight to the device and dtype.

    tokenizer is None without a tokenizer.json. The context ends where a sliding window would begin to hide tokens.
    """
    folder = Path(folder)
    family, config = read_config(settings, folder / "config.json")
    with torch.device("meta"):
        model = Model(config)
    for path, named in plan(folder, family, model).items():
        with opened(path) as file:
            for name, row in named.items():
                whole = file.get_tensor(name)
                whole = whole.T if row.transposed else whole
                sizes = [model.get_parameter(ours).shape[0] for ours in row.ours]
                for ours, part in zip(row.ours, whole.split(sizes)):
                    fill(model, ours, part, device, dtype)
    model.tie()
    model.requires_grad_(False).eval()
    model.tokenizer = Tokenizer.from_file(folder) if (folder / "tokenizer.json").is_file() else None
    return model, model.tokenizer


# ---------------------------------------------------------------------------------------------------------------- writing

def family_of(config: ModelConfig) -> str:
    """The model_type of theirs that computes this configuration. ValueError where none does."""
    square = config.head_dim * config.heads == config.width
    for kind in ("llama", "qwen2", "gpt2"):
        family = FAMILIES[kind]
        mine = {name: getattr(config, name) for name in family.fixed}
        extra = config.qkv_bias and not config.bias
        if mine == family.fixed and extra == (kind == "qwen2") and (kind == "llama" or square) and (
                kind != "gpt2" or config.kv_heads == config.heads and config.activation != "swiglu"):
            return kind
    raise ValueError(f"no architecture of Hugging Face known here computes {config}: save it as a minireft base")


def write_config(config: ModelConfig, tokenizer=None) -> dict:
    """Their config.json for our configuration."""
    kind = family_of(config)
    family = FAMILIES[kind]
    settings = {theirs: getattr(config, ours) for ours, (theirs, _) in family.settings.items()}
    if kind == "gpt2":
        settings["activation_function"] = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.activation]
    else:
        settings["hidden_act"] = "silu"
    if kind == "llama":
        settings["mlp_bias"] = config.bias
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id", None) for role in ("bos", "eos", "pad")}
    return {"architectures": [family.architecture], "model_type": kind, **settings, **ids}


def save(model: Model, tokenizer, path, dtype=None) -> None:
    """Writes a folder that transformers loads, with equal logits; dtype of the stored weights (None: as they are)."""
    folder, settings = Path(path), write_config(model.config, tokenizer)
    mine, tensors = dict(model.named_parameters()), {}
    for theirs, row in FAMILIES[settings["model_type"]].weights.items():
        for layer in range(model.config.layers) if "{}" in theirs else (0,):
            parts = [mine[name.format(layer)].detach() for name in row.ours if name.format(layer) in mine]
            if parts:
                whole = torch.cat(parts) if len(parts) > 1 else parts[0]
                tensors[theirs.format(layer)] = (whole.T if row.transposed else whole).to(dtype or whole.dtype)
    files.write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    settings["torch_dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    files.write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
        names = {i: token for token, i in tokenizer.vocabulary.items()}
        named = {f"{role}_token": names.get(getattr(tokenizer, f"{role}_id")) for role in ("bos", "eos", "pad")}
        named["tokenizer_class"] = "PreTrainedTokenizerFast"
        files.write_text(folder / "tokenizer_config.json", json.dumps(named, indent=2) + "\n")
