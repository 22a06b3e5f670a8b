"""T-Few's released vectors: every number in its place, at the sizes of T0-3B, and their effect at a small one.

Run:  pytest tests/test_formats_tfew.py          # with -m peers also beside transformers' T5
See:  192 tensors, 540,672 numbers on a model that is nothing but a shape; logits as if the base's own rows were scaled.
"""

import re

import pytest
import torch

import minireft
import small
from minireft.formats import huggingface

T0_3B = {"model_type": "t5", "vocab_size": 32128, "d_model": 2048, "d_kv": 64, "num_heads": 32, "d_ff": 5120, "num_layers": 24, "num_decoder_layers": 24,
         "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
TINY = {**T0_3B, "vocab_size": 61, "d_model": 16, "d_kv": 6, "num_heads": 4, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3}


def linears(c: dict) -> list[str]:
    """The Linears of a T5 that T-Few scales, as its own checkpoints name them."""
    names = []
    for stack, layers, parts in (("encoder", c["num_layers"], ("SelfAttention",)), ("decoder", c["num_decoder_layers"], ("SelfAttention", "EncDecAttention"))):
        for i in range(layers):
            names += [f"{stack}.block.{i}.layer.{j}.{part}.{x}" for j, part in enumerate(parts) for x in "kv"]
            names.append(f"{stack}.block.{i}.layer.{len(parts)}.DenseReluDense.wi_1")
    return names


def vectors(c: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a released file holds: around 1, as trained ones are (mean 0.995, std 0.093), here further from it."""
    generator = torch.Generator().manual_seed(seed)
    width = {True: c["d_ff"], False: c["d_kv"] * c["num_heads"]}
    return {f"{name}.multi_lora_b": 1 + 0.5 * torch.randn(width[name.endswith("wi_1")], 1, generator=generator) for name in linears(c)}


def shape_of(c: dict) -> minireft.Model:
    with torch.device("meta"):
        return minireft.Model(huggingface.read_config(c)[1])


def test_t0_3b_in_full_on_a_model_without_weights(tmp_path):
    stored, model = vectors(T0_3B), shape_of(T0_3B)
    torch.save(stored, tmp_path / "finish.pt")
    ia3 = minireft.load_adapter(model, tmp_path / "finish.pt")
    assert len(stored) == 192 and ia3.num_parameters() == 540_672 == sum(t.numel() for t in stored.values())
    assert ia3.options["sites"] == ["self_key", "self_value", "ffn", "cross_key", "cross_value"]
    mine = dict(ia3.named_parameters())
    for name, vector, layer in (("encoder.block.0.layer.0.SelfAttention.k", "key", 0), ("encoder.block.23.layer.0.SelfAttention.v", "value", 23),
                                ("decoder.block.0.layer.0.SelfAttention.k", "key", 24), ("decoder.block.5.layer.1.EncDecAttention.v", "cross_value", 5),
                                ("encoder.block.7.layer.1.DenseReluDense.wi_1", "ffn", 7), ("decoder.block.23.layer.2.DenseReluDense.wi_1", "ffn", 47)):
        assert torch.equal(mine[vector][layer], stored[name + ".multi_lora_b"][:, 0] - 1), name
    ia3.save(tmp_path / "ours.safetensors")
    again = minireft.load_adapter(model, tmp_path / "ours.safetensors")
    assert small.same_bits(small.bits(again), small.bits(ia3)) and again.options == ia3.options


def test_a_base_s_rows_scaled_by_hand_give_the_same_logits(tmp_path):
    def weights(model) -> dict[str, torch.Tensor]:
        huggingface.save(model, None, tmp_path / "base")
        return minireft.files.read_tensors(tmp_path / "base/model.safetensors")[0]
    stored, model = vectors(TINY), small.randomise(minireft.Model(huggingface.read_config(TINY)[1])).eval()
    torch.save(stored, tmp_path / "finish.pt")
    ia3 = minireft.load_adapter(model, tmp_path / "finish.pt")
    scaled = {name: t * stored.get(name.replace(".weight", ".multi_lora_b"), torch.ones(1)) for name, t in weights(model).items()}
    minireft.files.write_tensors(tmp_path / "base/model.safetensors", scaled)
    by_hand, _ = minireft.load(tmp_path / "base")
    tokens, mask = small.pad(small.rows([9, 4]), "left")
    given = torch.tensor([[0, 5, 9], [0, 8, 21]])
    before, expected = model(tokens, mask, decoder_tokens=given), by_hand(tokens, mask, decoder_tokens=given)
    with ia3:
        got = model(tokens, mask, decoder_tokens=given)
    assert (expected - before).abs().max() > 0.1 and (expected - got).abs().max() < 1e-5 * expected.abs().max()


def test_files_that_are_refused(tmp_path):
    model, stored = shape_of(TINY), vectors(TINY)
    first = "encoder.block.0.layer.0.SelfAttention.k.multi_lora_b"

    def refused(words, tensors, model=model):
        torch.save(tensors, tmp_path / "finish.pt")
        with pytest.raises(ValueError, match=words):
            minireft.load_adapter(model, tmp_path / "finish.pt")

    without = {name: t for name, t in stored.items() if name != first}
    refused(re.escape(f"lacks {first.removesuffix('.multi_lora_b')} (1 in all)"), without)
    refused("holds no vectors", {})
    refused("has decoder.block.3.layer.0.SelfAttention.k.multi_lora_b: expected", {**stored, "decoder.block.3.layer.0.SelfAttention.k.multi_lora_b": stored[first]})
    refused("has encoder.block.0.layer.0.SelfAttention.k.lora_a: expected", {**stored, first.replace("multi_lora_b", "lora_a"): stored[first]})
    refused("different lengths for key", {**stored, first: torch.ones(23, 1)})
    refused("does not fit this model: expected tensors", vectors({**TINY, "d_ff": 28}))
    refused("are for T5 1.1 and T0: this model is a decoder", stored, small.model())
    refused("activation relu", stored, shape_of({**TINY, "feed_forward_proj": "relu"}))
    refused("holds a list: expected named tensors", [1])
    refused("holds more than tensors", torch.nn.Linear(2, 2))


@pytest.mark.peers
def test_beside_transformers_with_its_outputs_scaled_by_hand(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = {name: value for name, value in TINY.items() if name != "model_type"}
    theirs = small.randomise(transformers.T5ForConditionalGeneration(transformers.T5Config(**settings, pad_token_id=0)), std=0.2).eval()
    theirs.save_pretrained(tmp_path / "base")
    stored, (model, _) = vectors(TINY), minireft.load(tmp_path / "base")
    torch.save(stored, tmp_path / "finish.pt")
    ia3 = minireft.load_adapter(model, tmp_path / "finish.pt")
    (tokens, mask), given = small.pad(small.rows([9, 4]), "left"), torch.tensor([[0, 5, 9], [0, 8, 21]])
    hooks = [theirs.get_submodule(name).register_forward_hook(lambda module, _, y, l=stored[name + ".multi_lora_b"][:, 0]: y * l) for name in linears(TINY)]
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask.long(), decoder_input_ids=given).logits
        [hook.remove() for hook in hooks]
        assert (expected - theirs(tokens, attention_mask=mask.long(), decoder_input_ids=given).logits).abs().max() > 0.1
        with ia3:
            assert (model(tokens, mask, decoder_tokens=given) - expected).abs().max() < 1e-5
