"""Every family of Hugging Face's beside transformers itself: random tiny weights, read and written.

Run:  pytest -m peers tests/test_peers_families.py
See:  logits within 1e-5 in fp32 with padding on both sides; greedy generation token for token; folders that transformers opens,
      those of a base that has taken an adapter in among them.
"""

import pytest
import torch

import minireft
import small
from minireft.formats.convert import merge
from minireft.generation import generate_ids

pytestmark = pytest.mark.peers
transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-5
COMMON = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=40)
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
DECODERS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, num_key_value_heads=2),
    "llama, biases, tied": lambda: transformers.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama, heads of their own width": lambda: transformers.LlamaConfig(**COMMON, num_key_value_heads=2, head_dim=6, tie_word_embeddings=True),
    "llama 3.1": lambda: transformers.LlamaConfig(**COMMON, num_key_value_heads=1, rope_parameters=LLAMA3),
    "llama, linear": lambda: transformers.LlamaConfig(**COMMON, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}),
    "mistral": lambda: transformers.MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=None),
    "mistral, keys for every head, tied": lambda: transformers.MistralConfig(**COMMON, num_key_value_heads=4, sliding_window=48, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2, untied": lambda: transformers.Qwen2Config(**COMMON, num_key_value_heads=1, tie_word_embeddings=False),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=6, tie_word_embeddings=True),
    "qwen3, untied": lambda: transformers.Qwen3Config(**COMMON, num_key_value_heads=4, head_dim=4, tie_word_embeddings=False),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=40),
    "gpt2, untied, relu": lambda: transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=40, n_inner=20, activation_function="relu",
                                                          tie_word_embeddings=False),
    "opt, untied, gelu": lambda: transformers.OPTConfig(vocab_size=61, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2, num_attention_heads=4, ffn_dim=24,
                                                        max_position_embeddings=40, activation_function="gelu", tie_word_embeddings=False),
    "opt": lambda: transformers.OPTConfig(vocab_size=61, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2, num_attention_heads=4, ffn_dim=24,
                                          max_position_embeddings=40)}
ENCODERS = {
    "bert": lambda: transformers.BertConfig(**COMMON),
    "bert, relu": lambda: transformers.BertConfig(**COMMON, hidden_act="relu"),
    "roberta": lambda: transformers.RobertaConfig(**{**COMMON, "max_position_embeddings": 42}, pad_token_id=1, type_vocab_size=1)}
T5 = dict(vocab_size=61, d_model=16, d_kv=6, d_ff=24, num_heads=4, num_layers=2, num_decoder_layers=3, relative_attention_num_buckets=8,
          relative_attention_max_distance=12, decoder_start_token_id=0, pad_token_id=0)
BOTH = {"t5 1.0": lambda: transformers.T5Config(**T5), "t5 1.1": lambda: transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)}
CLASSES = {**dict.fromkeys(DECODERS, "AutoModelForCausalLM"), **dict.fromkeys(ENCODERS, "AutoModelForMaskedLM"), **dict.fromkeys(BOTH, "AutoModelForSeq2SeqLM")}


def theirs(name: str, folder):
    """A model of transformers' with weights large enough to matter, saved in the folder."""
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[name]).from_config({**DECODERS, **ENCODERS, **BOTH}[name]()).eval()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            weight.add_(0.2 * torch.randn_like(weight) if "norm" not in weight_name.lower() else 0.1 * torch.randn_like(weight))
    if name == "t5 1.1":                                                  # as published ones are: with a head of their own
        model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn_like(model.lm_head.weight))
        model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    return model


def prompts(side: str):
    generator = torch.Generator().manual_seed(1)
    return small.pad([torch.randint(3, 61, (n,), generator=generator) for n in (3, 11, 7)], side)


def compare(name, model, mine, side):
    tokens, mask = prompts(side)
    real = mask.long()
    with torch.no_grad():
        if name in BOTH:
            given = torch.tensor([[0, 5, 9, 17, 33, 4, 8, 21, 40, 11]] * 3)
            expected, got, mask = model(tokens, attention_mask=real, decoder_input_ids=given).logits, mine(tokens, mask, decoder_tokens=given), torch.ones_like(given) > 0
        else:
            counts = isinstance(model, (transformers.RobertaForMaskedLM, transformers.OPTForCausalLM))     # its positions, itself
            places = {} if counts else {"position_ids": (real.cumsum(1) - 1).clamp(min=0)}
            tokens = tokens.masked_fill(~mask, 1)                         # RoBERTa counts by its padding token
            expected, got = model(tokens, attention_mask=real, **places).logits, mine(tokens, mask)
    assert expected[mask].std() > 0.1
    return (expected - got)[mask].abs().max().item()


@pytest.mark.parametrize("name", CLASSES)
def test_read_and_written_they_give_the_same_logits(name, tmp_path):
    model = theirs(name, tmp_path / "theirs")
    mine, _ = minireft.load(tmp_path / "theirs")
    for side in ("left", "right"):
        assert compare(name, model, mine, side) <= TOLERANCE, side
    minireft.formats.huggingface.save(mine, None, tmp_path / "written")
    again = getattr(transformers, CLASSES[name]).from_pretrained(tmp_path / "written").eval()
    for side in ("left", "right"):
        assert compare(name, again, mine, side) <= TOLERANCE, ("written", side)


@pytest.mark.parametrize("name", [*DECODERS, *BOTH])
def test_greedy_generation_is_theirs_token_for_token(name, tmp_path):
    model = theirs(name, tmp_path)
    mine, _ = minireft.load(tmp_path)
    tokens, mask = prompts("left")
    new = generate_ids(mine, [row[real].tolist() for row, real in zip(tokens, mask)], 12, eos=None)
    for row, real, ids in zip(tokens, mask, new):                         # one by one: nothing of their padding in it
        out = model.generate(row[real][None], attention_mask=torch.ones(1, int(real.sum()), dtype=torch.long), max_new_tokens=12, min_new_tokens=12,
                             do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=name not in BOTH)[0]
        assert out[-12:].tolist() == ids


@pytest.mark.parametrize("kind", ("LoRA", "IA3"))
@pytest.mark.parametrize("name", CLASSES)
def test_they_open_what_was_merged_with_the_logits_of_the_adapter(name, kind, tmp_path):
    theirs(name, tmp_path / "theirs")
    mine, _ = minireft.load(tmp_path / "theirs")
    adapter = small.randomise(minireft.LoRA(mine, rank=2, alpha=3, sites="all") if kind == "LoRA" else minireft.IA3(
        mine, sites=("key", "value", "ffn", "query", "attention_output", "ffn_output"), layer_norm=True), std=0.1)
    adapter.save(tmp_path / "adapter.safetensors")
    merge(tmp_path / "theirs", tmp_path / "adapter.safetensors", tmp_path / "merged")
    merged = getattr(transformers, CLASSES[name]).from_pretrained(tmp_path / "merged").eval()
    for side in ("left", "right"):
        assert compare(name, merged, mine, side) > 0.1, side              # the base alone
        with adapter:
            assert compare(name, merged, mine, side) <= 3 * TOLERANCE, side                # of logits up to 3; a merge rounds once more


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_saved_without_its_head_is_read_too(name, tmp_path):
    model = theirs(name, tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "body")
    mine, _ = minireft.load(tmp_path / "body")
    tokens, mask = prompts("right")
    tokens = tokens.masked_fill(~mask, 1)
    with torch.no_grad():
        expected, (got, _) = model.base_model(tokens, attention_mask=mask.long()).last_hidden_state, mine.stream(tokens, mask)
    assert not mine.config.masked_head and (expected - got)[mask].abs().max() <= TOLERANCE
