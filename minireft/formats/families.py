"""What each family of Hugging Face's says, and what that is here: a table of settings, and a table of weights.

Use:  FAMILIES["llama"].settings["width"]                 # ("hidden_size", GIVEN)
See:  a model that is not listed is one entry; the model itself knows no family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..config import ModelConfig

GIVEN = object()                        # a setting that must be there
BODIES = ("model.", "transformer.", "bert.", "roberta.")                  # what their names begin with, but for the head's
HEADS = ("cls.predictions", "lm_head.")


class Row(NamedTuple):
    """One tensor of theirs: the parameters of ours that it holds, one above the other."""

    ours: tuple[str, ...]
    transposed: bool = False            # stored as (in, out)
    skip: int = 0                       # rows of theirs before the first of ours
    scale: Callable[[ModelConfig, dict], float] | None = None               # ours is theirs times this
    added: bool = False                 # its first row is added to all rows of ours, which another tensor fills
    when: tuple[str, ...] = ()          # the activations with which it is there; () is all


class Family(NamedTuple):
    settings: dict[str, tuple]          # field of ModelConfig → (their name, value where it is absent)
    fixed: dict                         # fields of ModelConfig that every model of the family has
    allowed: dict[str, tuple]           # their name → values that minireft computes; absent is the first one
    weights: dict[str, Row]             # their tensor → ours; {} is the layer
    ignored: tuple[str, ...]            # endings of tensors that hold nothing learned, or nothing that is used
    architecture: str
    derive: Callable[[dict, dict], None] = lambda fields, settings: None     # fields that take a little arithmetic
    derived: tuple[str, ...] = ()       # their names


def rows(pairs: dict[str, str]) -> dict[str, Row]:
    return {theirs: Row((ours,)) for theirs, ours in pairs.items()}


def numbered(theirs: str, row: Row, config: ModelConfig) -> list[tuple[int, int]]:
    """(their layer, ours) for every layer that has this tensor; one where the name has no {}."""
    n = config.encoder_layers if config.start is not None else 0          # two stacks, which they count apart
    if row.when and config.activation not in row.when:
        return []
    if "{}" not in theirs:
        return [(0, 0)]
    if n and theirs.startswith("encoder."):
        return [(i, i) for i in range(n)]
    return [(i, n + i) for i in range(config.layers - n)]


LLAMA = Family(
    settings={"vocab_size": ("vocab_size", GIVEN), "width": ("hidden_size", GIVEN), "layers": ("num_hidden_layers", GIVEN),
              "heads": ("num_attention_heads", GIVEN), "hidden": ("intermediate_size", GIVEN),
              "context": ("max_position_embeddings", 2048), "kv_heads": ("num_key_value_heads", None), "head_dim": ("head_dim", None),
              "norm_eps": ("rms_norm_eps", 1e-6), "rotary_base": ("rope_theta", 10000.0),
              "tied": ("tie_word_embeddings", False), "bias": ("attention_bias", False)},
    fixed={"norm": "rms", "positions": "rotary", "activation": "swiglu"},
    allowed={"hidden_act": ("silu",), "partial_rotary_factor": (None, 1.0)},
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
# Llama with heads of their own width, and queries and keys normed.
QWEN3 = LLAMA._replace(
    fixed={**LLAMA.fixed, "qk_norm": True, "bias": False}, settings={name: pair for name, pair in MISTRAL.settings.items() if name != "bias"},
    allowed={**LLAMA.allowed, "attention_bias": (False,)}, architecture="Qwen3ForCausalLM",
    weights={**LLAMA.weights, **rows({f"model.layers.{{}}.self_attn.{x}_norm.weight": f"blocks.{{}}.attention.{ours}_norm.weight"
                                      for x, ours in (("q", "query"), ("k", "key"))})})


def linears(theirs: str, ours: str, pairs) -> dict[str, Row]:
    """Weights and biases of modules: (their name, ours) under two prefixes."""
    return rows({f"{theirs}{a}.{part}": f"{ours}{b}.{part}" for part in ("weight", "bias") for a, b in pairs})


OPT = Family(
    settings={"vocab_size": ("vocab_size", GIVEN), "width": ("hidden_size", GIVEN), "layers": ("num_hidden_layers", GIVEN),
              "heads": ("num_attention_heads", GIVEN), "hidden": ("ffn_dim", GIVEN), "context": ("max_position_embeddings", GIVEN),
              "activation": ("activation_function", "relu"), "tied": ("tie_word_embeddings", True)},
    fixed={"norm": "layer", "positions": "learned", "bias": True},
    allowed={"do_layer_norm_before": (True,), "enable_bias": (True,), "layer_norm_elementwise_affine": (True,), "_remove_final_layer_norm": (False,)},
    weights={**rows({"model.decoder.embed_tokens.weight": "embed.weight", "lm_head.weight": "head.weight"}),
             "model.decoder.embed_positions.weight": Row(("position.weight",), skip=2),
             **linears("model.decoder.", "", [("final_layer_norm", "norm")]),
             **linears("model.decoder.layers.{}.", "blocks.{}.", [
                 ("self_attn.q_proj", "attention.query"), ("self_attn.k_proj", "attention.key"), ("self_attn.v_proj", "attention.value"),
                 ("self_attn.out_proj", "attention.output"), ("self_attn_layer_norm", "attention_norm"), ("fc1", "ffn.up"),
                 ("fc2", "ffn.down"), ("final_layer_norm", "ffn_norm")])},
    ignored=(), architecture="OPTForCausalLM")


def bert(body: str, head: dict[str, Row], skip: int) -> dict[str, Row]:
    """The weights of BERT under a name of its own. Token type 0, the only one that is used, goes into the positions."""
    return {
        f"{body}.embeddings.word_embeddings.weight": Row(("embed.weight",)),
        f"{body}.embeddings.position_embeddings.weight": Row(("position.weight",), skip=skip),
        f"{body}.embeddings.token_type_embeddings.weight": Row(("position.weight",), added=True),
        **linears(f"{body}.embeddings.", "", [("LayerNorm", "norm")]),
        **linears(f"{body}.encoder.layer.{{}}.", "blocks.{}.", [
            ("attention.self.query", "attention.query"), ("attention.self.key", "attention.key"), ("attention.self.value", "attention.value"),
            ("attention.output.dense", "attention.output"), ("attention.output.LayerNorm", "attention_norm"),
            ("intermediate.dense", "ffn.up"), ("output.dense", "ffn.down"), ("output.LayerNorm", "ffn_norm")]), **head}


def both_ways(fields: dict, settings: dict) -> None:
    fields["encoder_layers"] = fields["layers"]


def both_ways_from_2(fields: dict, settings: dict) -> None:
    """RoBERTa's first two positions are no tokens'."""
    fields |= {"encoder_layers": fields["layers"], "context": fields["context"] - 2}


BERT = Family(
    settings={"vocab_size": ("vocab_size", GIVEN), "width": ("hidden_size", GIVEN), "layers": ("num_hidden_layers", GIVEN),
              "heads": ("num_attention_heads", GIVEN), "hidden": ("intermediate_size", GIVEN), "context": ("max_position_embeddings", GIVEN),
              "norm_eps": ("layer_norm_eps", 1e-12), "activation": ("hidden_act", "gelu")},
    fixed={"norm": "layer", "positions": "learned", "bias": True, "norm_first": False, "masked_head": True, "tied": True},
    allowed={"tie_word_embeddings": (True,), "position_embedding_type": ("absolute", None), "is_decoder": (False,), "add_cross_attention": (False,)},
    weights=bert("bert", {"cls.predictions.decoder.weight": Row(("head.weight",)), "cls.predictions.bias": Row(("head.bias",)),
                          **linears("cls.predictions.transform.", "head.", [("dense", "dense"), ("LayerNorm", "norm")])}, skip=0),
    ignored=("position_ids", "pooler.dense.weight", "pooler.dense.bias", "seq_relationship.weight", "seq_relationship.bias",
             "predictions.decoder.bias"),
    architecture="BertForMaskedLM", derive=both_ways, derived=("encoder_layers",))

ROBERTA = BERT._replace(
    settings={**BERT.settings, "norm_eps": ("layer_norm_eps", 1e-5)},
    allowed={**BERT.allowed, "hidden_act": ("gelu",)},                    # its head's is always that one
    weights=bert("roberta", {"lm_head.decoder.weight": Row(("head.weight",)), "lm_head.bias": Row(("head.bias",)),
                             **linears("lm_head.", "head.", [("dense", "dense"), ("layer_norm", "norm")])}, skip=2),
    ignored=("position_ids", "pooler.dense.weight", "pooler.dense.bias", "lm_head.decoder.bias"),
    architecture="RobertaForMaskedLM", derive=both_ways_from_2, derived=("encoder_layers",))


def t5(fields: dict, settings: dict) -> None:
    decoder = settings.get("num_decoder_layers") or fields["encoder_layers"]
    fields |= {"layers": fields["encoder_layers"] + decoder, "start": settings.get("decoder_start_token_id") or 0}


def unscaled(config: ModelConfig, settings: dict) -> float:
    """T5 does not divide scores by √D: its queries do it here."""
    return config.head_dim**0.5


def scaled_head(config: ModelConfig, settings: dict) -> float:
    """T5 v1.0 divides the states by √C before the head: its last norm does it here."""
    return config.width**-0.5 if settings.get("scale_decoder_outputs", settings.get("tie_word_embeddings", True)) else 1.0


def t5_stack(stack: str, norm: str, parts: dict[str, str]) -> dict[str, Row]:
    """One stack of T5; parts: {"layer.0.SelfAttention": "attention", ...} with the norms before them."""
    found = {f"{stack}.final_layer_norm.weight": Row((norm,), scale=scaled_head if stack == "decoder" else None)}
    for theirs, ours in parts.items():
        layer = theirs.rpartition(".")[0]
        found |= rows({f"{stack}.block.{{}}.{layer}.layer_norm.weight": f"blocks.{{}}.{ours}_norm.weight"})
        if ours == "ffn":
            found |= {f"{stack}.block.{{}}.{theirs}.{a}.weight": Row((f"blocks.{{}}.ffn.{b}.weight",), when=when) for a, b, when in (
                ("wi", "up", ("relu",)), ("wi_0", "gate", ()), ("wi_1", "up", ("geglu_tanh",)), ("wo", "down", ()))}
            continue
        found |= rows({f"{stack}.block.{{}}.{theirs}.{a}.weight": f"blocks.{{}}.{ours}.{b}.weight"
                       for a, b in (("k", "key"), ("v", "value"), ("o", "output"))})
        found[f"{stack}.block.{{}}.{theirs}.q.weight"] = Row((f"blocks.{{}}.{ours}.query.weight",), scale=unscaled)
    return found


T5 = Family(
    settings={"vocab_size": ("vocab_size", GIVEN), "width": ("d_model", GIVEN), "encoder_layers": ("num_layers", GIVEN),
              "heads": ("num_heads", GIVEN), "hidden": ("d_ff", GIVEN), "head_dim": ("d_kv", GIVEN), "context": ("n_positions", 512),
              "norm_eps": ("layer_norm_epsilon", 1e-6), "activation": ("feed_forward_proj", "relu"), "tied": ("tie_word_embeddings", True),
              "relative_buckets": ("relative_attention_num_buckets", 32), "relative_furthest": ("relative_attention_max_distance", 128)},
    fixed={"norm": "rms", "positions": "relative"},
    allowed={},
    weights={**rows({"shared.weight": "embed.weight", "lm_head.weight": "head.weight",
                     "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "encoder_relative.weight",
                     "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "relative.weight"}),
             **t5_stack("encoder", "encoder_norm.weight", {"layer.0.SelfAttention": "attention", "layer.1.DenseReluDense": "ffn"}),
             **t5_stack("decoder", "norm.weight", {"layer.0.SelfAttention": "attention", "layer.1.EncDecAttention": "cross",
                                                   "layer.2.DenseReluDense": "ffn"})},
    ignored=("coder.embed_tokens.weight", "EncDecAttention.relative_attention_bias.weight"),
    architecture="T5ForConditionalGeneration", derive=t5, derived=("layers", "start"))

FAMILIES = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "gpt2": GPT2, "opt": OPT, "bert": BERT, "roberta": ROBERTA,
            "t5": T5}                   # by their model_type
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "gated-gelu": "geglu_tanh"}
