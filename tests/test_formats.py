"""Other programs' files: bases of Hugging Face and llama2.c, adapters of pyreft and PEFT, there and back, and what is refused.

Use:  pytest tests/test_formats.py;   make peers-pyreft holds the same files against the programs that they come from
See:  files are written here tensor by tensor, by the formats' own rules, and the logits are those of tests/plain.py.
"""

import json
import re
import shutil
import struct
import sys
import types

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import models

import minireft
import plain
import small
from minireft.cli import main
from minireft.formats import huggingface, llama2c, peft, pyreft
from minireft.formats.convert import convert

LLAMA = {"model_type": "llama", "vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 20, "max_position_embeddings": 24, "rms_norm_eps": 1e-5, "rope_theta": 500.0,
         "tie_word_embeddings": False, "hidden_act": "silu"}
IDS = (3, 17, 5, 28, 9, 9, 4)
GPT2 = {"model_type": "gpt2", "vocab_size": 29, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 24}


def draw(*shape, seed=[0]):
    seed[0] += 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed[0])) * 0.3


def llama_tensors(c: dict, bias: bool = False) -> dict:
    """What a Llama folder of this configuration holds, written out by hand."""
    C, F, D = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // c["num_attention_heads"]
    G = c["num_key_value_heads"] * D
    tensors = {"model.embed_tokens.weight": draw(c["vocab_size"], C), "model.norm.weight": 1 + draw(C)}
    if not c["tie_word_embeddings"]:
        tensors["lm_head.weight"] = draw(c["vocab_size"], C)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        tensors |= {at + "input_layernorm.weight": 1 + draw(C), at + "post_attention_layernorm.weight": 1 + draw(C),
                    at + "self_attn.q_proj.weight": draw(C, C), at + "self_attn.k_proj.weight": draw(G, C),
                    at + "self_attn.v_proj.weight": draw(G, C), at + "self_attn.o_proj.weight": draw(C, C),
                    at + "mlp.gate_proj.weight": draw(F, C), at + "mlp.up_proj.weight": draw(F, C), at + "mlp.down_proj.weight": draw(C, F)}
        if bias:
            tensors |= {at + "self_attn.q_proj.bias": draw(C), at + "self_attn.k_proj.bias": draw(G), at + "self_attn.v_proj.bias": draw(G)}
    return tensors


def gpt2_tensors(c: dict, prefix: str = "transformer.") -> dict:
    C = c["n_embd"]
    tensors = {"wte.weight": draw(c["vocab_size"], C), "wpe.weight": draw(c["n_positions"], C), "ln_f.weight": 1 + draw(C), "ln_f.bias": draw(C)}
    for i in range(c["n_layer"]):
        for name, shape in (("attn.c_attn", (C, 3 * C)), ("attn.c_proj", (C, C)), ("mlp.c_fc", (C, 4 * C)), ("mlp.c_proj", (4 * C, C))):
            tensors |= {f"h.{i}.{name}.weight": draw(*shape), f"h.{i}.{name}.bias": draw(shape[1])}
        for name in ("ln_1", "ln_2"):
            tensors |= {f"h.{i}.{name}.weight": 1 + draw(C), f"h.{i}.{name}.bias": draw(C)}
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24)            # the causal mask, which old files carry
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write(folder, config: dict, tensors: dict, shards: int = 1):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, index = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        index |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def agree(model):
    """The model's logits, held against the plain transformer's on the same weights."""
    logits = model(torch.tensor([IDS]))[0].double().numpy()
    assert np.abs(logits - plain.logits(model, list(IDS))).max() < 1e-4
    return logits


# ------------------------------------------------------------------------------------------------- Hugging Face, reading

def hand_written_llama(c: dict, w: dict, ids) -> np.ndarray:
    """Llama from its own tensors, in float64 and with its own rotate_half: shares nothing with what is tested."""
    w = {name: t.double().numpy() for name, t in w.items()}
    H, G, C = c["num_attention_heads"], c["num_key_value_heads"], c["hidden_size"]
    D, T = C // H, len(ids)
    h = w["model.embed_tokens.weight"][list(ids)]
    angle = np.outer(np.arange(T), c["rope_theta"] ** (-np.arange(0, D, 2) / D))
    cos, sin = np.cos(np.hstack([angle, angle])), np.sin(np.hstack([angle, angle]))          # (T, D)

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c["rms_norm_eps"]) * weight

    def turned(x):
        return x * cos + np.hstack([-x[:, D // 2:], x[:, : D // 2]]) * sin
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        x = norm(h, w[at + "input_layernorm.weight"])
        q, k, v = (x @ w[f"{at}self_attn.{name}_proj.weight"].T + w.get(f"{at}self_attn.{name}_proj.bias", 0) for name in "qkv")
        heads = []
        for j in range(H):
            g = j // (H // G)
            scores = turned(q[:, j * D:(j + 1) * D]) @ turned(k[:, g * D:(g + 1) * D]).T / D**0.5
            scores = np.exp(np.where(np.tri(T, dtype=bool), scores, -np.inf))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, g * D:(g + 1) * D])
        h = h + np.hstack(heads) @ w[at + "self_attn.o_proj.weight"].T
        x = norm(h, w[at + "post_attention_layernorm.weight"])
        gate = x @ w[at + "mlp.gate_proj.weight"].T
        h = h + (gate / (1 + np.exp(-gate)) * (x @ w[at + "mlp.up_proj.weight"].T)) @ w[at + "mlp.down_proj.weight"].T
    return norm(h, w["model.norm.weight"]) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def hand_written_gpt2(c: dict, w: dict, ids) -> np.ndarray:
    w = {name: t.double().numpy() for name, t in w.items()}
    C, H, T = c["n_embd"], c["n_head"], len(ids)
    h = w["wte.weight"][list(ids)] + w["wpe.weight"][:T]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[name + ".weight"] + w[name + ".bias"]
    for i in range(c["n_layer"]):
        qkv = norm(h, f"h.{i}.ln_1") @ w[f"h.{i}.attn.c_attn.weight"] + w[f"h.{i}.attn.c_attn.bias"]
        q, k, v = (part.reshape(T, H, -1).transpose(1, 0, 2) for part in np.split(qkv, 3, axis=1))
        scores = np.exp(np.where(np.tri(T, dtype=bool), q @ k.transpose(0, 2, 1) / (C // H) ** 0.5, -np.inf))
        mixed = (scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(T, C)
        h = h + mixed @ w[f"h.{i}.attn.c_proj.weight"] + w[f"h.{i}.attn.c_proj.bias"]
        u = norm(h, f"h.{i}.ln_2") @ w[f"h.{i}.mlp.c_fc.weight"] + w[f"h.{i}.mlp.c_fc.bias"]
        u = 0.5 * u * (1 + np.tanh((2 / np.pi) ** 0.5 * (u + 0.044715 * u**3)))
        h = h + u @ w[f"h.{i}.mlp.c_proj.weight"] + w[f"h.{i}.mlp.c_proj.bias"]
    return norm(h, "ln_f") @ w["wte.weight"].T


@pytest.mark.parametrize("shards", (1, 3))
@pytest.mark.parametrize("changes", ({}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4, "rope_theta": 1e4},
                                     {"model_type": "mistral", "sliding_window": None}, {"model_type": "qwen2"}), ids=str)
def test_the_llama_family(tmp_path, changes, shards):
    config = {**LLAMA, **changes}
    tensors = llama_tensors(config, bias=config["model_type"] == "qwen2")
    model, tokenizer = minireft.load(write(tmp_path, config, tensors, shards))
    logits = model(torch.tensor([IDS]))[0].double().numpy()
    assert np.abs(logits - hand_written_llama(config, tensors, IDS)).max() < 1e-5 and tokenizer is None
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("prefix", ("transformer.", ""))
def test_gpt2_with_and_without_the_prefix(tmp_path, prefix):
    tensors = gpt2_tensors(GPT2, "")
    model, _ = minireft.load(write(tmp_path, GPT2, {prefix + name: t for name, t in tensors.items()}, shards=2))
    logits = agree(model)
    assert np.abs(logits - hand_written_gpt2(GPT2, tensors, IDS)).max() < 1e-5


def test_the_other_spelling_of_rope(tmp_path):
    config = {name: value for name, value in LLAMA.items() if name != "rope_theta"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}              # as transformers 5 writes it
    assert huggingface.read_config(config)[1] == huggingface.read_config(LLAMA)[1]
    assert huggingface.read_config(LLAMA)[1].rotary_base == 500.0


def test_a_sliding_window_ends_the_context():
    _, config = huggingface.read_config({**LLAMA, "model_type": "mistral", "sliding_window": 16})
    assert config.context == 16
    assert huggingface.read_config({**LLAMA, "model_type": "qwen2", "sliding_window": 16})[1].context == 24    # not in use there


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_weights_arrive_in_the_dtype_asked_for_in_memory_of_their_own(tmp_path, dtype):
    tensors = gpt2_tensors(GPT2, "")
    model, _ = minireft.load(write(tmp_path, GPT2, tensors), dtype=dtype)
    key = model.blocks[1].attention.key
    assert key.weight.dtype == dtype and key.weight.is_contiguous() and key.weight.untyped_storage().nbytes() == key.weight.nbytes
    assert torch.equal(key.weight, tensors["h.1.attn.c_attn.weight"][:, 16:32].T.to(dtype))
    assert model.head.weight is model.embed.weight


# ------------------------------------------------------------------------------------------------- Hugging Face, writing

@pytest.mark.parametrize("name, changes", (("llama", {}), ("llama", {"tied": False, "bias": True}), ("llama", {"head_dim": 6}),
                                           ("qwen", {"head_dim": 4}), ("gpt2", {}), ("gpt2", {"tied": False, "activation": "gelu"})), ids=str)
def test_there_and_back(tmp_path, name, changes):
    model = small.model(name, **changes)
    huggingface.save(model, model.tokenizer, tmp_path)
    again, tokenizer = minireft.load(tmp_path)
    assert again.config == model.config and small.same_bits(small.bits(again), small.bits(model))
    assert tokenizer.encode("w3 w20") == model.tokenizer.encode("w3 w20") and tokenizer.eos_id == model.tokenizer.eos_id
    agree(again)


def test_what_is_written_has_their_names_and_shapes(tmp_path):
    huggingface.save(small.model("gpt2"), None, tmp_path / "gpt2", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "gpt2/model.safetensors")
    assert {n: tuple(t.shape) for n, t in stored.items() if n.startswith("transformer.h.2.")} == {
        f"transformer.h.2.{name}": shape for name, shape in (
            ("ln_1.weight", (16,)), ("ln_1.bias", (16,)), ("ln_2.weight", (16,)), ("ln_2.bias", (16,)), ("attn.c_attn.weight", (16, 48)),
            ("attn.c_attn.bias", (48,)), ("attn.c_proj.weight", (16, 16)), ("attn.c_proj.bias", (16,)), ("mlp.c_fc.weight", (16, 20)),
            ("mlp.c_fc.bias", (20,)), ("mlp.c_proj.weight", (20, 16)), ("mlp.c_proj.bias", (16,)))}
    assert {t.dtype for t in stored.values()} == {torch.bfloat16} and "lm_head.weight" not in stored
    config = json.loads((tmp_path / "gpt2/config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["activation_function"] == "gelu_new" and config["torch_dtype"] == "bfloat16"


def test_what_no_architecture_of_theirs_computes_is_not_written(tmp_path):
    for name in ("neox", "gemma", "qwen"):                                # the last one with heads wider than its width
        with pytest.raises(ValueError, match="no architecture of Hugging Face"):
            huggingface.save(small.model(name), None, tmp_path)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- Hugging Face, refusals

@pytest.mark.parametrize("changes, words", (
    ({"model_type": "mamba"}, "model_type 'mamba': expected one of llama, mistral, qwen2, qwen3, gpt2, opt, bert, roberta, t5"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_scaling"),
    *(({"rope_scaling": {"type": kind, "factor": 2.0}}, f"'type': '{kind}'") for kind in ("dynamic", "longrope", "su")),
    ({"hidden_act": "relu"}, "hidden_act 'relu': minireft computes 'silu' only"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"attention_bias": True}, "attention_bias True but mlp_bias False"),
    ({"quantization_config": {"bits": 4}}, "quantised"),
    ({"hidden_size": None}, "no hidden_size"),
    ({"num_attention_heads": 5}, "describes no model that can be built"),
    ({"hidden_size": "16"}, "describes no model that can be built"),
), ids=lambda x: x if isinstance(x, str) else next(iter(x)))
def test_settings_that_are_not_supported_are_named_before_any_weight_is_looked_for(tmp_path, changes, words):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    with pytest.raises(ValueError, match=re.escape(words)):
        minireft.load(tmp_path)


@pytest.mark.parametrize("setting, value", (("scale_attn_by_inverse_layer_idx", True), ("activation_function", "silu"), ("scale_attn_weights", False)))
def test_settings_of_gpt2_that_are_not_supported(setting, value):
    with pytest.raises(ValueError, match=setting):
        huggingface.read_config({**GPT2, setting: value})


def test_folders_that_are_not_whole(tmp_path):
    tensors = llama_tensors(LLAMA)

    def refused(words, kind=ValueError, change=lambda tensors: None, after=lambda folder: None, shards=1):
        shutil.rmtree(tmp_path / "folder", ignore_errors=True)
        mine = dict(tensors)
        change(mine)
        after(write(tmp_path / "folder", LLAMA, mine, shards))
        with pytest.raises(kind, match=words):
            minireft.load(tmp_path / "folder")

    q = "model.layers.1.self_attn.q_proj.weight"
    refused("lacks model-00002-of-00003.safetensors", FileNotFoundError, shards=3, after=lambda f: (f / "model-00002-of-00003.safetensors").unlink())
    refused("holds no weights", FileNotFoundError, after=lambda f: (f / "model.safetensors").unlink())
    refused("pickled weights only", after=lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"))
    refused("no whole safetensors file", after=lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]))
    refused("lists no weight_map", after=lambda f: (f / "model.safetensors.index.json").write_text("{}"))
    refused(rf"lacks {q} \(1 in all\)", change=lambda t: t.pop(q))
    refused("would not use, model.layers.0.self_attn.q_norm.weight", change=lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": draw(4)}))
    refused(r"model.norm.weight .* has shape \(15,\): config.json wants \(16,\)", change=lambda t: t.update({"model.norm.weight": draw(15)}))
    refused("is stored as I8: quantised", change=lambda t: t.update({q: torch.zeros(16, 16, dtype=torch.int8)}))

    def swap(folder):                                                     # an index that speaks of other shards
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"][q] = next(file for file in index["weight_map"].values() if file != index["weight_map"][q])
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("though the index says so", shards=3, after=swap)


def test_a_folder_s_tokenizer_fits_its_model_and_ends_its_texts(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(29)}, unk_token="w0"))
    write(tmp_path, LLAMA, tensors := llama_tensors(LLAMA))
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="names no token that ends a text"):
        minireft.load(tmp_path)
    for end in (7, [7, 8]):                                               # config.json says it, too
        write(tmp_path, {**LLAMA, "eos_token_id": end, "bos_token_id": 3}, tensors)
        _, tokenizer = minireft.load(tmp_path)
        assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (7, 3, None)
    inner.add_tokens(["one more"])
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="has 30 tokens, and config.json a vocabulary of 29"):
        minireft.load(tmp_path)


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    write(tmp_path / "snapshot", LLAMA, llama_tensors(LLAMA))
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name != "some-org/Tiny-1.0":
            raise OSError("404: no such\nrepository")
        return str(tmp_path / "snapshot")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert minireft.load("some-org/Tiny-1.0")[0].config.width == 16
    assert not any(name.endswith((".bin", ".pt", "*")) for name in asked[0][1])            # nothing pickled is fetched
    with pytest.raises(FileNotFoundError, match="no base at some-org/other, and the hub gave .*OSError: 404: no such repository"):
        minireft.load("some-org/other")
    with pytest.raises(FileNotFoundError, match="no base at snapshot/typo: expected 'base' or a folder"):
        minireft.load("snapshot/typo")                                    # a mistyped path: nobody is asked
    assert [name for name, _ in asked] == ["some-org/Tiny-1.0", "some-org/other"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        minireft.load("some-org/Tiny-1.0")


def test_weights_of_another_size_are_found_before_any_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "fill", lambda *_: pytest.fail("a weight was read"))
    tensors = llama_tensors(LLAMA)
    tensors["model.layers.1.mlp.up_proj.weight"] = draw(20, 15)
    with pytest.raises(ValueError, match="up_proj"):
        minireft.load(write(tmp_path, LLAMA, tensors))


# -------------------------------------------------------------------------------------------------------------- llama2.c

SIZES = dict(dim=16, hidden=20, layers=2, heads=4, kv_heads=2, vocab=29, context=24)
LAYERED = ("att_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")


def llama2c_tensors(tied: bool) -> dict:
    C, F, G, L, V = 16, 20, 8, 2, 29
    tensors = {"embed": draw(V, C), "norm": 1 + draw(C), "att_norm": 1 + draw(L, C), "ffn_norm": 1 + draw(L, C), "wq": draw(L, C, C),
               "wk": draw(L, G, C), "wv": draw(L, G, C), "wo": draw(L, C, C), "w1": draw(L, F, C), "w2": draw(L, C, F), "w3": draw(L, F, C)}
    return tensors if tied else {**tensors, "head": draw(V, C)}


GROUP = 4                               # weights that share a scale, in version 2


def quantised(w: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """export.py's Q8_0: int8 in groups, and each group's scale, its largest magnitude / 127."""
    groups = w.numpy().reshape(-1, GROUP)
    scale = np.abs(groups).max(1) / np.float32(127)
    return np.round(groups / scale[:, None]).astype("<i1"), scale.astype("<f4")


def dequantised(w: torch.Tensor) -> torch.Tensor:
    q, scale = quantised(w)
    return torch.from_numpy(q * scale[:, None]).view(w.shape)


def quantised_bytes(w: torch.Tensor) -> bytes:
    """A tensor of version 2, layer after layer: the weights, then their scales."""
    return b"".join(array.tobytes() for layer in (w if w.dim() == 3 else [w]) for array in quantised(layer))


def write_llama2c(path, w: dict, version: int = 0):
    sizes = list(SIZES.values())
    if version == 0:
        sizes[5] = sizes[5] if "head" not in w else -sizes[5]
        names = ("embed", "att_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "norm", "rotary", "head")
        data = struct.pack("<7i", *sizes)
    else:
        names = ("att_norm", "ffn_norm", "norm", "embed", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "head")
        data = b"24ka" + struct.pack("<8i", version, *sizes) + bytes(["head" not in w])
        data = (data + struct.pack("<i", GROUP) * (version == 2)).ljust(256, b"\0")
    w = {**w, "rotary": torch.full((24, 4), torch.nan)}                   # to be skipped, whatever is in it
    small_file = {name: quantised_bytes(w[name]) for name in names if name in w and "norm" not in name} if version == 2 else {}
    path.write_bytes(data + b"".join(small_file.get(name, w[name].numpy().tobytes()) for name in names if name in w))
    return path


def hand_written_llama2c(w: dict, ids) -> np.ndarray:
    """run.c in numpy: the rotary pairs are neighbours, (x[2i], x[2i + 1]) = one complex number."""
    w, T, D = {name: t.double().numpy() for name, t in w.items()}, len(ids), 4
    h = w["embed"][list(ids)]

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight

    def turned(x):                                                        # (T, D)
        z = (x[:, ::2] + 1j * x[:, 1::2]) * np.exp(1j * np.outer(np.arange(T), 10000.0 ** (-np.arange(0, D, 2) / D)))
        return np.stack([z.real, z.imag], axis=-1).reshape(T, D)
    for i in range(2):
        x = norm(h, w["att_norm"][i])
        q, k, v = (x @ w[name][i].T for name in ("wq", "wk", "wv"))
        heads = []
        for j in range(4):
            mine, its = slice(j * D, (j + 1) * D), slice(j // 2 * D, (j // 2 + 1) * D)
            scores = np.exp(np.where(np.tri(T, dtype=bool), turned(q[:, mine]) @ turned(k[:, its]).T / D**0.5, -np.inf))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, its])
        h = h + np.hstack(heads) @ w["wo"][i].T
        x = norm(h, w["ffn_norm"][i])
        gate = x @ w["w1"][i].T
        h = h + (gate / (1 + np.exp(-gate)) * (x @ w["w3"][i].T)) @ w["w2"][i].T
    return norm(h, w["norm"]) @ w.get("head", w["embed"]).T


@pytest.mark.parametrize("version", (0, 1, 2))
@pytest.mark.parametrize("tied", (True, False))
def test_llama2c_models(tmp_path, tied, version):
    w = llama2c_tensors(tied)
    model, tokenizer = minireft.load(write_llama2c(tmp_path / "model.bin", w, version))
    if version == 2:
        w = {name: t if "norm" in name else dequantised(t) for name, t in w.items()}
    assert np.abs(agree(model) - hand_written_llama2c(w, IDS)).max() < 1e-5
    assert tokenizer is None and model.config.tied == tied and model.config.context == 24
    assert model.state_dict().keys() == minireft.Model(model.config).state_dict().keys()           # and no table of cosines


def test_llama2c_files_that_are_not_whole_or_none(tmp_path):
    path = write_llama2c(tmp_path / "model.bin", llama2c_tensors(True))
    whole = path.read_bytes()
    for data, words in ((whole[:-4], "bytes where its header promises"), (whole + b"\0\0\0\0", "bytes where its header promises"),
                        (whole[:9], "no llama2.c model"), (b"", "no llama2.c model"), (b"PK\3\4" + whole, "no llama2.c model"),
                        (b"24ka" + struct.pack("<i", 3) + whole, "version 3")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=words):
            minireft.load(path)
    whole, scales = write_llama2c(path, llama2c_tensors(True), 2).read_bytes(), 256 + 4 * 5 * 16 + 29 * 16
    for data, words in ((whole[:-1], "bytes where its header promises"), (whole[:37] + struct.pack("<i", 5) + whole[41:], "groups of 5"),
                        (whole[:scales] + struct.pack("<f", -1) + whole[scales + 4 :], "scales of embed.weight that are none")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=words):
            minireft.load(path)
    with pytest.raises(FileNotFoundError, match="there is no base at"):
        minireft.load(tmp_path / "other.bin")


PIECES = [" ", "a", "b", "c", "é", "ab", "bc", "abc", " a", "aa", " ab", "aaa", "ca", " abc", "é "]
SCORES = {piece: -float(rank) for rank, piece in enumerate(["ab", "aa", "bc", " a", "abc", "aaa", " ab", "ca", " abc", "é "])}


def write_tokenizer(path, pieces=PIECES):
    """tokenizer.py's export: the special pieces, every byte, then the pieces with their scores."""
    rows = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0), *((f"<0x{i:02X}>", 0.0) for i in range(256))]
    rows += [(piece, SCORES.get(piece, -1e3)) for piece in pieces]
    path.write_bytes(struct.pack("<i", 7) + b"".join(struct.pack("<fi", score, len(piece.encode())) + piece.encode() for piece, score in rows))
    return [piece for piece, _ in rows], dict(rows)


def merged_one_by_one(text: str, pieces: list[str], scores: dict) -> list[int]:
    """run.c's encode, without its BOS: of all neighbours whose union is a piece, the best is merged, again and again."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokens = []
    for character in " " + text if text else "":
        tokens += [ids[character]] if character in ids else [byte + 3 for byte in character.encode()]
    while True:
        unions = [(scores[pieces[a] + pieces[b]], -i) for i, (a, b) in enumerate(zip(tokens, tokens[1:])) if pieces[a] + pieces[b] in ids]
        if not unions:
            return tokens
        i = -max(unions)[1]
        tokens[i : i + 2] = [ids[pieces[tokens[i]] + pieces[tokens[i + 1]]]]


@given(text=st.text("abcé \nZ🙂", max_size=24))
def test_llama2c_tokenizer(tokenizer_file, text):
    tokenizer, pieces, scores = tokenizer_file
    ids = tokenizer.encode(text)
    assert ids == merged_one_by_one(text, pieces, scores)
    assert tokenizer.decode([1, *ids]) == text


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama2c") / "tokenizer.bin"
    pieces, scores = write_tokenizer(path)
    return llama2c.read_tokenizer(path, len(pieces)), pieces, scores


def test_llama2c_tokenizer_beside_its_model(tmp_path):
    sizes = {**SIZES, "vocab": 259 + len(PIECES)}
    w = {**llama2c_tensors(True), "embed": draw(sizes["vocab"], 16)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "vocab", sizes["vocab"])
        path = write_llama2c(tmp_path / "model.bin", w)
    for name in ("tokenizer.bin", f"tok{sizes['vocab']}.bin"):
        write_tokenizer(tmp_path / name)
        model, tokenizer = minireft.load(path)
        assert model.tokenizer is tokenizer and tokenizer.vocab_size == sizes["vocab"]
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 1, None)
    for pieces, words in ((PIECES[1:], "holds 273 pieces"), ([*PIECES[:-1], "a"], "names a piece twice")):
        write_tokenizer(tmp_path / name, pieces)
        with pytest.raises(ValueError, match=words):
            minireft.load(path)
    (tmp_path / name).write_bytes((tmp_path / "tokenizer.bin").read_bytes()[:-1])
    with pytest.raises(ValueError, match="no llama2.c tokenizer"):
        minireft.load(path)


# ---------------------------------------------------------------------------------------------------------------- pyreft

def write_pyreft(folder, kind: str, layers, tied: bool, rank: int = 3, C: int = 16, turn=lambda state: state) -> dict:
    """A folder as pyreft 0.1.0 saves it; returns {(layer, part): its tensors}."""
    folder.mkdir(exist_ok=True)
    keys, states = [], {}
    for part in range(1 if tied else 2):
        for layer in layers:
            R = torch.linalg.qr(draw(C, rank))[0]                         # orthonormal columns
            W, b = draw(rank, C), draw(rank)
            state = {"weight": W, "bias": b, "rotate_layer": R} if kind == "LoreftIntervention" else {
                "embed_dim": torch.tensor(C), "interchange_dim": torch.tensor(C), "proj_layer.weight": draw(rank, C),
                "learned_source.weight": W, "learned_source.bias": b}
            keys.append(f"layer_{layer}_comp_block_output_unit_pos_nunit_1#{part}")
            states[layer, part] = turn(state)
            torch.save(states[layer, part], folder / f"intkey_{keys[-1]}.bin")
    (folder / "config.json").write_text(json.dumps({
        "intervention_constant_sources": [True] * len(keys), "intervention_dimensions": [C] * len(keys),
        "intervention_types": [f"<class 'pyreft.interventions.{kind}'>"] * len(keys), "mode": "parallel", "sorted_keys": keys,
        "representations": [[int(key[6]), "block_output", "pos", 1, rank, *[None] * 9] for key in keys], "transformers_version": "4.45.1"}))
    return states


def by_hand(kind: str, state: dict, h):
    """An intervention's formula on one state h (C,), from the tensors as pyreft names them."""
    s = {name: t.double().numpy() for name, t in state.items()}
    if kind == "LoreftIntervention":                                      # h + Rᵀ(W h + b − R h); rotate_layer is Rᵀ
        return h + s["rotate_layer"] @ (s["weight"] @ h + s["bias"] - s["rotate_layer"].T @ h)
    W2, source = s["proj_layer.weight"], s["learned_source.weight"] @ h + s["learned_source.bias"]
    return h + W2.T @ (source - W2 @ h if kind == "NoreftIntervention" else source)


KINDS = {"LoreftIntervention": minireft.LoReFT, "NodireftIntervention": minireft.DiReFT, "NoreftIntervention": minireft.NoReFT}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", (True, False))
def test_pyreft_folders(tmp_path, kind, tied):
    states, model = write_pyreft(tmp_path / "reft", kind, (2, 0), tied), small.model("llama")
    reft = minireft.load_adapter(model, tmp_path / "reft", positions="f2+l1")
    assert type(reft) is KINDS[kind] and not reft.attached and reft.base is None and reft.layers == [0, 2] and reft.tied == tied

    def edit(layer, h):                                                   # f2+l1 of seven tokens
        for position in (0, 1, 6) if layer in (0, 2) else ():
            h[position] = by_hand(kind, states[layer, 0 if tied or position < 2 else 1], h[position])
        return h
    with reft, torch.no_grad():
        logits = model(torch.tensor([IDS]))[0].double().numpy()
    assert np.abs(logits - plain.logits(model, list(IDS), edit=edit)).max() < 1e-4
    assert np.abs(logits - plain.logits(model, list(IDS))).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", (True, False))
def test_pyreft_there_and_back(tmp_path, kind, tied):
    model = small.model("gpt2")
    reft = small.randomise(KINDS[kind](model, rank=2, layers="0,1", positions="f3+l2", tied=tied))
    pyreft.write(reft, tmp_path)
    again = minireft.load_adapter(model, tmp_path, positions="f3+l2")
    tokens, mask = small.pad(small.rows([9, 4]), "left")
    with reft:
        expected = model(tokens, mask)
    with again:
        assert type(again) is KINDS[kind] and (model(tokens, mask) - expected)[mask].abs().max() < 1e-5
    assert minireft.load_adapter(model, tmp_path).options["positions"] == "f7+l7"          # what a folder does not say


def test_a_bent_rotation_is_imported_as_what_it_computes(tmp_path):
    model, bend = small.model("llama"), torch.tensor([1.0, 1.2, 0.9])
    states = write_pyreft(tmp_path, "LoreftIntervention", (0,), True, turn=lambda s: {**s, "rotate_layer": s["rotate_layer"] * bend})
    reft = minireft.load_adapter(model, tmp_path, positions="all")
    edit = lambda layer, h: np.stack([by_hand("LoreftIntervention", states[0, 0], row) for row in h]) if layer == 0 else h
    with reft, torch.no_grad():
        assert np.abs(model(torch.tensor([IDS]))[0].numpy() - plain.logits(model, list(IDS), edit=edit)).max() < 1e-4
    assert type(reft) is minireft.NoReFT


def test_pyreft_blocks_by_their_module_names_and_activations_by_hand(tmp_path):
    model = small.model("llama")
    write_pyreft(tmp_path, "LoreftIntervention", (1,), True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["representations"][0][:2] = [0, "model.layers[1].output"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    reft = minireft.load_adapter(model, tmp_path, activation="gelu")
    assert reft.layers == [1] and reft.options["activation"] == "gelu"


class Trap:
    """Unpickling it calls its own code, here open(path, "w")."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_of_a_foreign_folder_runs(tmp_path):
    model, proof = small.model("llama"), tmp_path / "ran"
    write_pyreft(tmp_path / "reft", "LoreftIntervention", (0,), True)
    torch.save({"weight": Trap(proof)}, tmp_path / "reft/intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin")
    write_peft(tmp_path / "peft", {"x": draw(1)}, peft_type="LORA", r=2, lora_alpha=4)
    (tmp_path / "peft/adapter_model.safetensors").unlink()
    torch.save({"weight": Trap(proof)}, tmp_path / "peft/adapter_model.bin")
    for folder in ("reft", "peft"):
        with pytest.raises(ValueError, match="no saved intervention|holds more than tensors"):
            minireft.load_adapter(model, tmp_path / folder)
        assert not proof.exists()


def test_foreign_adapters_that_are_refused(tmp_path):
    model, folder = small.model("llama"), tmp_path / "reft"

    def refused(words, error=ValueError, after=lambda: None, **how):
        shutil.rmtree(folder, ignore_errors=True)
        write_pyreft(folder, **{"kind": "LoreftIntervention", "layers": (0, 1), "tied": True, **how})
        after()
        with pytest.raises(error, match=words):
            minireft.load_adapter(model, folder)
        assert not model.adapters

    def set_in_config(change):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    first = "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin"
    refused("holds DireftIntervention: expected one of Loreft", kind="DireftIntervention")
    refused("does not fit this model: expected tensors", C=12)
    refused("expected distinct numbers from 0 to 2", layers=(0, 7))
    refused("no file .*#0.bin", FileNotFoundError, after=lambda: (folder / first).unlink())
    refused("no saved intervention of that kind", after=lambda: (folder / first).write_bytes(b"junk"))
    refused("no saved intervention of that kind", after=lambda: torch.save({"weight": draw(3, 16)}, folder / first))
    refused("no saved intervention of that kind", after=lambda: torch.save(torch.nn.Linear(2, 2), folder / first))     # a pickled object
    refused("mixes shapes", after=lambda: torch.save({"weight": draw(2, 16), "bias": draw(2), "rotate_layer": draw(16, 2)}, folder / first))
    refused("edits 'mlp_output'", after=lambda: set_in_config(lambda c: c["representations"][0].__setitem__(1, "mlp_output")))
    refused("has intervention_link_key 3", after=lambda: set_in_config(lambda c: c["representations"][0].__setitem__(9, 3)))
    refused(r"\[1, 2\] interventions a layer", tied=False, after=lambda: set_in_config(
        lambda c: [c[name].pop() for name in ("sorted_keys", "representations", "intervention_types")]))
    refused("does not list its interventions", after=lambda: set_in_config(lambda c: c.pop("sorted_keys")))
    refused("does not list its interventions", after=lambda: set_in_config(lambda c: c["representations"].pop()))
    refused("holds no adapter that is known", after=lambda: (folder / "config.json").unlink())
    refused("holds no adapter that is known", after=lambda: (folder / "config.json").write_text("{"))

    reft = minireft.LoReFT(model, rank=2)
    reft.save(tmp_path / "own")
    with pytest.raises(ValueError, match="says positions itself"):
        minireft.load_adapter(model, tmp_path / "own", positions="l1")
    for adapter, words in ((minireft.LobiReFT(model), "pyreft has no LobiReFT"), (minireft.LoRA(model), "pyreft has no LoRA"),
                           (minireft.LoReFT(model, site="attention_output"), "edits attention_output"),
                           (minireft.DiReFT(model, activation="relu"), "activation relu")):
        with pytest.raises(ValueError, match=words):
            pyreft.write(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------------ PEFT

def write_peft(folder, tensors: dict, **config):
    folder.mkdir(exist_ok=True)
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"bias": "none", "target_modules": [], **config}))


def logits_with(adapter, model):
    with adapter, torch.no_grad():
        return model(torch.tensor([IDS]))[0].double().numpy()


@pytest.mark.parametrize("rslora", (False, True))
def test_peft_lora_on_llama(tmp_path, rslora):
    model = small.model("llama")                                          # three layers; the folder adapts two of them
    tensors, delta = {}, {"query": np.zeros((3, 16, 16)), "ffn_output": np.zeros((3, 16, 20))}
    for layer in (0, 2):
        for theirs, ours in (("self_attn.q_proj", "query"), ("mlp.down_proj", "ffn_output")):
            out, inputs = delta[ours].shape[1:]
            a, b = draw(2, inputs), draw(out, 2)
            tensors |= {f"model.layers.{layer}.{theirs}.lora_A.weight": a, f"model.layers.{layer}.{theirs}.lora_B.weight": b}
            delta[ours][layer] = (3 / (2**0.5 if rslora else 2) * b.double() @ a.double()).numpy()
    write_peft(tmp_path, tensors, peft_type="LORA", r=2, lora_alpha=3, use_rslora=rslora)
    lora = minireft.load_adapter(model, tmp_path)
    assert type(lora) is minireft.LoRA and lora.base is None
    assert np.abs(logits_with(lora, model) - plain.logits(model, list(IDS), delta=delta)).max() < 1e-4


def test_peft_on_the_packed_projection_of_gpt2(tmp_path):
    model, tensors = small.model("gpt2"), {}
    delta, scale = {name: np.zeros((3, 16, 16)) for name in ("query", "key", "value")}, {name: np.ones((3, 16)) for name in ("query", "key", "value")}
    vectors = {}
    for layer in range(3):
        a, b, l = draw(2, 16), draw(48, 2), 1 + draw(48, 1)
        tensors |= {f"transformer.h.{layer}.attn.c_attn.lora_A.weight": a, f"transformer.h.{layer}.attn.c_attn.lora_B.weight": b}
        vectors[f"transformer.h.{layer}.attn.c_attn.ia3_l"] = l
        for i, name in enumerate(delta):
            delta[name][layer] = (4 * b[16 * i : 16 * i + 16].double() @ a.double()).numpy()
            scale[name][layer] = l[16 * i : 16 * i + 16, 0].double().numpy()
    write_peft(tmp_path / "lora", tensors, peft_type="LORA", r=2, lora_alpha=8)
    write_peft(tmp_path / "ia3", vectors, peft_type="IA3")
    lora, ia3 = minireft.load_adapter(model, tmp_path / "lora"), minireft.load_adapter(model, tmp_path / "ia3")
    assert np.abs(logits_with(lora, model) - plain.logits(model, list(IDS), delta=delta)).max() < 1e-4
    assert np.abs(logits_with(ia3, model) - plain.logits(model, list(IDS), scale=scale)).max() < 1e-4


@pytest.mark.parametrize("where", ("up", "down"))
def test_peft_ia3_on_llama(tmp_path, where):
    """On the gated feed-forward's up-projection, or on what its down-projection reads, the vector is the same one."""
    model, vectors = small.model("llama"), {}
    scale = {"key": np.ones((3, 8)), "ffn": np.ones((3, 20))}
    for layer in range(3):
        k, ffn = 1 + draw(8, 1), 1 + draw(20)
        vectors |= {f"model.layers.{layer}.self_attn.k_proj.ia3_l": k,
                    f"model.layers.{layer}.mlp.{where}_proj.ia3_l": ffn[:, None] if where == "up" else ffn[None]}
        scale["key"][layer], scale["ffn"][layer] = k[:, 0].double().numpy(), ffn.double().numpy()
    write_peft(tmp_path, vectors, peft_type="IA3")
    ia3 = minireft.load_adapter(model, tmp_path)
    assert ia3.options["sites"] == ["key", "ffn"]
    assert np.abs(logits_with(ia3, model) - plain.logits(model, list(IDS), scale=scale)).max() < 1e-4


@pytest.mark.parametrize("name, make", (("llama", lambda m: minireft.LoRA(m, rank=3, alpha=5, sites="all")), ("llama", minireft.IA3),
                                        ("gpt2", lambda m: minireft.LoRA(m, rank=1, sites=("attention_output", "up"))),
                                        ("gpt2", lambda m: minireft.IA3(m, sites=("query", "key", "value", "ffn_output")))))
def test_peft_there_and_back(tmp_path, name, make):
    model = small.model(name)
    adapter = small.randomise(make(model))
    peft.write(adapter, tmp_path)
    again = minireft.load_adapter(model, tmp_path)
    assert sorted(again.options["sites"]) == sorted(adapter.options["sites"])
    assert np.abs(logits_with(again, model) - logits_with(adapter, model)).max() < 1e-5


def test_peft_folders_that_are_refused(tmp_path):
    model, q = small.model("llama"), "model.layers.0.self_attn.q_proj"
    good = {f"{q}.lora_A.weight": draw(2, 16), f"{q}.lora_B.weight": draw(16, 2)}
    lora = dict(peft_type="LORA", r=2, lora_alpha=4)
    for tensors, config, words in (
            (good, {**lora, "peft_type": "LOHA"}, "holds a LOHA of PEFT's"), (good, {**lora, "use_dora": True}, "use_dora True"),
            (good, {**lora, "bias": "all"}, "bias 'all'"), (good, {**lora, "rank_pattern": {"q_proj": 4}}, "rank_pattern"),
            (good, {**lora, "modules_to_save": ["lm_head"]}, "modules_to_save"), ({}, lora, "holds no weights"),
            ({"model.layers.3.self_attn.q_proj.lora_A.weight": draw(2, 16)}, lora, "which this model has not"),
            ({"model.embed_tokens.lora_embedding_A": draw(2, 16)}, lora, "which this model has not"),
            ({f"{q}.lora_A.weight": draw(2, 16)}, lora, "expected lora_A and lora_B"),
            ({**good, f"{q}.lora_B.weight": draw(12, 2)}, lora, "expected 16 rows"),
            ({**good, f"{q}.lora_A.weight": draw(2, 15)}, lora, "does not fit this model"),
            ({f"{q}.ia3_l": draw(1, 16)}, {"peft_type": "IA3"}, "scales the input of query"),
            ({f"{q}.ia3_l": draw(9, 1)}, {"peft_type": "IA3"}, "9 factors for query: expected 16"),
            ({"model.layers.0.mlp.gate_proj.ia3_l": draw(20, 1)}, {"peft_type": "IA3"}, "before the non-linearity")):
        write_peft(tmp_path / "peft", tensors, **config)
        with pytest.raises(ValueError, match=re.escape(words)):
            minireft.load_adapter(model, tmp_path / "peft")
    (tmp_path / "peft/adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="describes no adapter of PEFT's"):
        minireft.load_adapter(model, tmp_path / "peft")
    for adapter, words in ((minireft.LoReFT(model), "PEFT has no LoReFT"), (minireft.IA3(model, layer_norm=True), "with layer norms"),
                           (minireft.LoRA(small.model("gpt2")), "no place for this LoRA at query, value"),
                           (minireft.LoRA(small.model("gpt2"), sites=("query", "key", "value")), "LoRA at key, query, value"),
                           (minireft.IA3(small.model("gpt2")), "no place for this IA3 at key, value")):
        with pytest.raises(ValueError, match=words):
            peft.write(adapter, tmp_path / "out")


# --------------------------------------------------------------------------------------------------------------- convert

def test_bases_from_form_to_form(tmp_path):
    tensors = llama_tensors(LLAMA)
    write(tmp_path / "theirs", LLAMA, tensors)
    assert convert(tmp_path / "theirs", tmp_path / "ours") == "4,464 parameters, no tokenizer"
    convert(tmp_path / "ours", tmp_path / "back", to="huggingface", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "back/model.safetensors")
    assert stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name].bfloat16()) for name in tensors)
    w = llama2c_tensors(False)
    convert(write_llama2c(tmp_path / "model.bin", w), tmp_path / "from-llama2c", to="huggingface")
    assert np.abs(agree(minireft.load(tmp_path / "from-llama2c")[0]) - hand_written_llama2c(w, IDS)).max() < 1e-5


def test_adapters_from_form_to_form(tmp_path):
    model = small.model("llama")
    minireft.save(model, None, tmp_path / "base")
    states = write_pyreft(tmp_path / "theirs", "NodireftIntervention", (0, 1), False)
    convert(tmp_path / "theirs", tmp_path / "ours", base=tmp_path / "base", positions="f2+l3")
    reft = minireft.load_adapter(model, tmp_path / "ours")
    assert reft.options["positions"] == "f2+l3"
    convert(tmp_path / "ours", tmp_path / "back", base=tmp_path / "base", to="pyreft")
    for (layer, part), state in states.items():
        again = torch.load(tmp_path / f"back/intkey_layer_{layer}_comp_block_output_unit_pos_nunit_1#{part}.bin", weights_only=True)
        assert small.same_bits(again, state)


def test_conversions_that_are_refused(tmp_path):
    minireft.save(small.model("llama"), None, tmp_path / "base")
    for arguments, words in ((dict(to="pyreft"), "a base can be written as minireft, huggingface"), (dict(positions="l1"), "name its base"),
                             (dict(base=tmp_path / "base", to="huggingface"), "an adapter can be written as minireft, pyreft, peft")):
        with pytest.raises(ValueError, match=words):
            convert(tmp_path / "base", tmp_path / "new", **arguments)
    with pytest.raises(ValueError, match="is there already"):
        convert(tmp_path / "base", tmp_path / "base")
    assert not (tmp_path / "new").exists()


def test_convert_from_the_command_line(tmp_path, capsys):
    minireft.save(small.model("llama"), None, tmp_path / "base")
    write_pyreft(tmp_path / "theirs", "LoreftIntervention", (1,), True)
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--base", str(tmp_path / "base"), "--positions", "l1"]) == 0
    assert "positions='l1'" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "base"), str(tmp_path / "new"), "--to", "huggingface", "--dtype", "bfloat16"]) == 0
    assert minireft.load(tmp_path / "new")[0].config == small.model("llama").config
    assert main(["convert", str(tmp_path / "base"), str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
