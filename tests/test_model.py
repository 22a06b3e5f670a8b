"""The transformer against a plain one, and its promises: cache, padding, causality, sites, dtypes, errors.

Run:  pytest tests/test_model.py
See:  every combination of norm, positions, activation, heads, biases and head agrees with plain.py in float64.
"""

import itertools

import numpy as np
import plain
import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minireft import Cache, Model, ModelConfig

# Rotary angles are rounded to float32 (position < 24, so by at most 24 · 2⁻²⁴), and turn() works in float32; a weight of
# order 1 carries that to the logits. Everything else is float64.
ROTARY, EXACT = 1e-4, 1e-11


@pytest.mark.parametrize("norm", ("rms", "layer"))
@pytest.mark.parametrize("positions", ("rotary", "learned"))
def test_agrees_with_a_plain_implementation(norm, positions):
    for activation, tied, biases, (kv_heads, head_dim) in itertools.product(
            ("swiglu", "gelu", "gelu_tanh"), (True, False), ({}, {"bias": True}, {"qkv_bias": True}), ((4, None), (2, None), (1, 6))):
        model = small.model("llama", dtype=torch.float64, layers=2, norm=norm, positions=positions, activation=activation, tied=tied,
                            kv_heads=kv_heads, head_dim=head_dim, norm_eps=0.01, rotary_base=50.0, **biases)
        (ids,) = small.rows([6])
        expected = plain.logits(model, ids.tolist())
        error = np.abs(model(ids[None])[0].numpy() - expected).max()
        assert error <= (ROTARY if positions == "rotary" else EXACT), model.config


def cache_in_pieces(model, tokens, mask, cuts):
    """Logits with a cache, fed the pieces between `cuts`. The mask is given where a piece has padding."""
    cache, parts = Cache(model, *tokens.shape), []
    for a, b in itertools.pairwise((0, *cuts, tokens.shape[1])):
        piece = None if mask is None or mask[:, a:b].all() else mask[:, a:b]
        parts.append(model(tokens[:, a:b], piece, cache=cache))
    assert cache.length == tokens.shape[1]
    return torch.cat(parts, 1)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(small.CONFIGS)), side=st.sampled_from(["left", "right", None]), cuts=st.sets(st.integers(1, 8)),
       lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_cache_in_any_pieces_equals_no_cache(name, side, cuts, lengths):
    model = small.model(name, dtype=torch.float64)
    if side is None:
        lengths = [9] * len(lengths)
    tokens, mask = small.pad(small.rows(lengths), side or "left")
    mask = mask if side else None
    cuts = sorted(c for c in cuts if c < tokens.shape[1])
    whole, pieces = model(tokens, mask), cache_in_pieces(model, tokens, mask, cuts)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(pieces[real], whole[real], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", small.CONFIGS)
def test_cache_grows_after_a_padded_prefill_on_either_side(name):
    model, prompts, more = small.model(name, dtype=torch.float64), small.rows([2, 5, 4]), torch.stack(small.rows([3] * 3, seed=9))
    for side in ("left", "right"):
        tokens, mask = small.pad(prompts, side, more=1)
        cache = Cache(model, 3, tokens.shape[1] + 3)
        model(tokens, mask, cache=cache)
        grown = torch.cat([model(more[:, :1], cache=cache), model(more[:, 1:], cache=cache)], 1)      # one token, then two
        for row, prompt in enumerate(prompts):
            alone = model(torch.cat([prompt, more[row]])[None])[0, -3:]
            torch.testing.assert_close(grown[row], alone, rtol=0, atol=1e-9)


def test_cache_select_keeps_and_reorders_rows():
    model, prompts, more = small.model(dtype=torch.float64), small.rows([2, 5, 4]), torch.stack(small.rows([1] * 2, seed=9))
    tokens, mask = small.pad(prompts, "left")
    cache = Cache(model, 3, 6)
    model(tokens, mask, cache=cache)
    cache.select(torch.tensor([2, 0]))
    grown = model(more, cache=cache)[:, -1]
    for row, old in enumerate((2, 0)):
        torch.testing.assert_close(grown[row], model(torch.cat([prompts[old], more[row]])[None])[0, -1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", small.CONFIGS)
def test_padding_on_either_side_changes_no_real_token(name):
    model, rows = small.model(name, dtype=torch.float64), small.rows([1, 7, 4])
    alone = [model(row[None])[0] for row in rows]
    for side, more, filler in itertools.product(("left", "right"), (0, 3), (0, 11)):
        tokens, mask = small.pad(rows, side, more, filler)
        out = model(tokens, mask)
        assert out.isfinite().all()                                       # a row of padding attends to itself: no NaN
        for i, row in enumerate(rows):
            torch.testing.assert_close(out[i][mask[i]], alone[i], rtol=0, atol=1e-9)


def test_a_mask_without_padding_changes_nothing():
    model, tokens = small.model(dtype=torch.float64), torch.stack(small.rows([6, 6]))
    torch.testing.assert_close(model(tokens, torch.ones_like(tokens, dtype=torch.bool)), model(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", small.CONFIGS)
def test_no_token_sees_a_later_one(name):
    model, (row,) = small.model(name), small.rows([9])
    before = model(row[None])
    for t in range(1, 9):
        changed = row.clone()
        changed[t] = (row[t] + 1) % small.V
        after = model(changed[None])
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).gt(1e-4).all()


def test_sites_are_named_and_cover_every_place():
    model = small.model("llama", layers=1)
    assert set(model.sites()) == {"embed", "norm", "head", *("blocks.0." + name for name in (
        "attention_norm", "attention.query", "attention.key", "attention.value", "attention.kv", "attention.output", "ffn_norm",
        "ffn.gate", "ffn.up", "ffn.act", "ffn.down", "output"))}
    assert {"position"} <= set(small.model("gpt2").sites()) and "blocks.0.ffn.gate" not in small.model("gpt2").sites()


def test_every_site_runs_once_a_pass_with_its_shape():
    model, tokens = small.model("llama"), torch.stack(small.rows([5, 5]))
    names = list(model.sites())
    plain_logits = model(tokens)
    with small.tapped(model, *names) as taps:
        assert torch.equal(model(tokens), plain_logits)
    width = {"embed": 16, "norm": 16, "head": 29, "attention_norm": 16, "ffn_norm": 16, "output": 16, "query": 16, "key": 8, "value": 8,
             "gate": 20, "up": 20, "act": 20, "down": 16}
    for name in names:
        (out,) = taps[name].seen
        last = name.rsplit(".", 1)[-1]
        if last == "kv":
            assert [x.shape for x in out] == [(2, 5, 8)] * 2
        else:
            assert out.shape == (2, 5, width[last]), name


def test_tied_head_is_one_weight():
    tied, free = small.model("llama"), small.model("llama", tied=False)
    assert tied.head.weight is tied.embed.weight and free.head.weight is not free.embed.weight
    count = [sum(p.numel() for p in m.parameters()) for m in (tied, free)]
    assert count[1] - count[0] == 29 * 16


def test_biases_stand_where_the_configuration_says():
    def biased(**biases):
        return {name for name, p in small.model("llama", layers=1, **biases).named_parameters() if name.endswith("bias")}
    qkv = {f"blocks.0.attention.{name}.bias" for name in ("query", "key", "value")}
    assert biased() == set() and biased(qkv_bias=True) == qkv
    assert biased(bias=True) == qkv | {"blocks.0.attention.output.bias", *(f"blocks.0.ffn.{name}.bias" for name in ("gate", "up", "down"))}


def test_start_of_a_new_model():
    torch.manual_seed(0)
    model = Model(ModelConfig(vocab_size=500, width=128, layers=8, heads=4, hidden=256, context=16, bias=True, norm="layer"))
    block = model.blocks[3]
    assert all(torch.equal(n.weight, torch.ones(128)) and n.bias.eq(0).all() for n in (model.norm, block.attention_norm, block.ffn_norm))
    assert block.attention.query.bias.eq(0).all()
    for site, std in ((model.embed, 0.02), (block.attention.query, 0.02), (block.ffn.up, 0.02), (block.attention.output, 0.02 / 4),
                      (block.ffn.down, 0.02 / 4)):                        # √(2 · 8 layers) = 4
        assert site.weight.std().item() == pytest.approx(std, rel=0.05)   # 16,384 draws: five standard errors are 3 %


@pytest.mark.parametrize("name", small.CONFIGS)
def test_bf16_model_follows_its_fp32_self(name):
    fp32 = small.model(name)
    bf16 = small.model(name, dtype=torch.bfloat16)
    tokens, mask = small.pad(small.rows([3, 6]), "left")
    out = bf16(tokens, mask)
    assert out.dtype == torch.bfloat16
    correct = torch.nn.functional.cosine_similarity(out[mask].float(), fp32(tokens, mask)[mask], dim=-1)
    assert correct.min() > 0.99
    cache = Cache(bf16, 2, 7)
    bf16(tokens, mask, cache=cache)
    assert bf16(tokens[:, :1], cache=cache).isfinite().all()


@pytest.mark.parametrize("change, words", [
    ({"width": 0}, "width is 0"), ({"layers": -1}, "layers is -1"), ({"norm": "batch"}, "norm is 'batch'.*rms, layer"),
    ({"positions": "alibi"}, "positions is 'alibi'"), ({"activation": "tanh"}, "activation is 'tanh'"),
    ({"heads": 3}, "width 16 is no multiple of heads 3"), ({"kv_heads": 3}, "heads 4 is no multiple of kv_heads 3"),
    ({"kv_heads": 0}, "kv_heads is 0"), ({"head_dim": 5}, "head_dim 5 is odd")])
def test_bad_configurations_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**{**small.SHAPE, **change})


def test_bad_inputs_are_named():
    model, tokens = small.model(), torch.stack(small.rows([4, 4]))
    ones = torch.ones(2, 4, dtype=torch.bool)
    for arguments, words in [((tokens[0],), r"int64 of shape \(4,\)"), ((tokens.float(),), "torch.float32"),
                             ((tokens[:, :0],), r"\(2, 0\)"), ((tokens, ones[:, :3]), r"mask has shape \(2, 3\): expected \(2, 4\)"),
                             ((tokens, ones.float()), "mask is torch.float32"), ((tokens, None, ones[:1, 0].long()), "prompt_lengths has shape"),
                             ((tokens, None, None, torch.zeros(3)), "tasks has shape"),
                             ((tokens.repeat(1, 7),), "28 tokens do not fit this model's context of 24"),
                             ((tokens + 29,), "vocabulary of 29")]:
        with pytest.raises(ValueError, match=words):
            model(*arguments)
    cache = Cache(model, 2, 6)
    model(tokens, cache=cache)
    for piece, words in ((tokens[:, :3], r"\(2, 7\) do not fit"), (tokens[:1], r"\(1, 8\) do not fit")):
        with pytest.raises(ValueError, match=words):
            model(piece, cache=cache)
    cache = Cache(model, 2, 30)
    model(tokens.repeat(1, 6), cache=cache)
    with pytest.raises(ValueError, match="25 tokens do not fit this model's context of 24"):
        model(tokens[:, :1], cache=cache)
