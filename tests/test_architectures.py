"""Encoders, encoder–decoders, post-norm, relative positions and packed documents: against plain.py, and against each other.

Run:  pytest tests/test_architectures.py
See:  the same blocks, other ways to look: both ways, at what was encoded, or at one's own document only.
"""

import itertools

import numpy as np
import plain
import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minireft
from minireft import Cache, Example, LoRA, LoReFT, ModelConfig, TrainConfig
from minireft.data import collate, encode
from minireft.generation import generate_ids, search_ids
from minireft.losses import OBJECTIVES

ROTARY, EXACT = 1e-4, 1e-11            # as in test_model.py


def start(model, rows: torch.Tensor) -> torch.Tensor:
    """(B, U) → (B, 1 + U): the start token before them."""
    return torch.cat([torch.full((len(rows), 1), model.config.start), rows], 1)


@pytest.mark.parametrize("positions", ("rotary", "learned", "relative"))
@pytest.mark.parametrize("norm_first", (True, False))
def test_every_architecture_agrees_with_a_plain_implementation(positions, norm_first):
    for encoder_layers, norm, activation in itertools.product((0, 1, 2, 3), ("rms", "layer"), ("swiglu", "gelu")):
        model = small.model("llama", dtype=torch.float64, layers=3, encoder_layers=encoder_layers, norm=norm, positions=positions,
                            norm_first=norm_first, activation=activation, relative_buckets=6, relative_furthest=8, bias=True, norm_eps=0.01)
        ids, other = small.rows([11, 9])
        other = start(model, other[None]) if model.two else None
        expected = plain.logits(model, ids.tolist(), decoder_ids=None if other is None else other[0].tolist())
        error = np.abs(model(ids[None], decoder_tokens=other)[0].numpy() - expected).max()
        assert error <= (ROTARY if positions == "rotary" else EXACT), model.config


@pytest.mark.parametrize("change", [
    {"activation": "relu"}, {"activation": "geglu_tanh"}, {"qk_norm": True, "kv_heads": 2}, {"rotary_scaling": (4.0, 1.0, 4.0, 16.0), "rotary_base": 20.0},
    {"rotary_scaling": (3.0, 1.0, 4.0, 0)}, {"masked_head": True, "activation": "gelu", "norm": "layer"},
    {"masked_head": True, "activation": "gelu", "norm": "layer", "tied": False, "encoder_layers": 3}], ids=lambda change: "+".join(change))
def test_every_further_choice_agrees_with_a_plain_implementation(change):
    model, (ids,) = small.model("llama", dtype=torch.float64, norm_eps=0.01, **{"kv_heads": 4, **change}), small.rows([12])
    error = np.abs(model(ids[None])[0].numpy() - plain.logits(model, ids.tolist())).max()
    assert error <= ROTARY
    usual = small.model("llama", dtype=torch.float64, norm_eps=0.01, **{"kv_heads": 4, **change, "rotary_scaling": None, "qk_norm": False})
    if {"rotary_scaling", "qk_norm"} & set(change):                       # and the choice makes a difference
        usual.load_state_dict(model.state_dict(), strict=False)
        assert (usual(ids[None]) - model(ids[None])).abs().max() > 0.01


def test_relative_buckets_are_those_of_the_paper():
    """T5's own: 32 buckets, the last from 128 on; both ways half of them for later keys. Bounds worked out by hand."""
    for causal, expected in ((True, {0: 0, -1: 1, -15: 15, -16: 16, -18: 16, -19: 17, -112: 30, -113: 31, -127: 31, -5000: 31, 3: 0}),
                             (False, {0: 0, -7: 7, -8: 8, -11: 8, -12: 9, -127: 15, -4000: 15, 1: 17, 7: 23, 8: 24, 4000: 31})):
        relative = small.model("t5", relative_buckets=32, relative_furthest=128).relative
        assert relative.bucket(torch.tensor(list(expected)), causal).tolist() == list(expected.values())


@pytest.mark.parametrize("name", [*small.ENCODERS, *small.BOTH])
def test_padding_on_either_side_changes_no_real_token(name):
    model, rows, more = small.model(name, dtype=torch.float64), small.rows([1, 7, 4]), torch.stack(small.rows([5] * 3, seed=3))
    given = start(model, more) if model.two else None
    alone = [model(row[None], decoder_tokens=None if given is None else given[i : i + 1])[0] for i, row in enumerate(rows)]
    for side, extra in itertools.product(("left", "right"), (0, 3)):
        tokens, mask = small.pad(rows, side, extra, filler=11)
        out = model(tokens, mask, decoder_tokens=given)
        assert out.isfinite().all()
        for i in range(3):
            torch.testing.assert_close(out[i] if model.two else out[i][mask[i]], alone[i], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", small.ENCODERS)
def test_an_encoder_sees_both_ways(name):
    model, (row,) = small.model(name), small.rows([6])
    before = model(row[None])
    for t in range(6):
        changed = row.clone()
        changed[t] = (row[t] + 1) % small.V
        assert (model(changed[None]) - before).abs().amax(-1).gt(1e-4).all()


@pytest.mark.parametrize("name", small.BOTH)
def test_a_decoder_sees_all_that_was_encoded_and_none_of_its_future(name):
    model, (row, more) = small.model(name), small.rows([6, 5])
    given = start(model, more[None])
    before = model(row[None], decoder_tokens=given)
    for t in range(6):
        changed = row.clone()
        changed[t] = (row[t] + 1) % small.V
        assert (model(changed[None], decoder_tokens=given) - before).abs().amax(-1).gt(1e-4).all()
    for t in range(1, 6):
        changed = given.clone()
        changed[0, t] = (given[0, t] + 1) % small.V
        after = model(row[None], decoder_tokens=changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).gt(1e-4).all()


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(list(small.BOTH)), side=st.sampled_from(["left", "right", None]), cuts=st.sets(st.integers(1, 6)))
def test_a_decoders_cache_in_any_pieces_equals_no_cache(name, side, cuts):
    model, more = small.model(name, dtype=torch.float64), torch.stack(small.rows([6] * 3, seed=3))
    tokens, mask = small.pad(small.rows([2, 7, 4] if side else [5] * 3), side or "left")
    mask, given = mask if side else None, start(model, more)              # (B, 7)
    whole, cache, parts = model(tokens, mask, decoder_tokens=given), Cache(model, 3, 7), []
    order = torch.tensor([2, 0, 1])
    for a, b in itertools.pairwise((0, *sorted(cuts), 7)):
        first = dict(tokens=tokens, mask=mask, decoder_tokens=given[:, :b]) if a == 0 else dict(tokens=given[:, a:b])
        parts.append(model(**first, cache=cache))
        cache.select(order)                                               # rows change places after every piece
        given, whole = given[order], whole[order]
        parts = [part[order] for part in parts]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from([*small.CONFIGS, *small.ENCODERS]), lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3),
       left=st.integers(0, 2), right=st.integers(0, 2))
def test_packed_documents_equal_each_alone(name, lengths, left, right):
    model, rows = small.model(name, dtype=torch.float64), small.rows(lengths)
    numbers = [torch.full((len(row),), 5 - i) for i, row in enumerate(rows)]                # any numbers but 0
    tokens = torch.cat([torch.zeros(left, dtype=torch.long), *rows, torch.zeros(right, dtype=torch.long)])[None]
    documents = torch.cat([torch.zeros(left, dtype=torch.long), *numbers, torch.zeros(right, dtype=torch.long)])[None]
    out = model(tokens, documents)
    assert out.isfinite().all()
    for row, number in zip(rows, numbers):
        torch.testing.assert_close(out[0][documents[0] == number[0]], model(row[None])[0], rtol=0, atol=1e-9)


def test_sites_of_the_other_two():
    model = small.model("two", layers=2, encoder_layers=1)
    cross = {"blocks.1.cross_norm", *("blocks.1.cross." + name for name in ("query", "key", "value", "kv", "output"))}
    assert {name for name in model.sites() if "cross" in name} == cross
    assert {"embed", "decoder_embed", "encoder_norm", "norm", "head"} <= set(model.sites())
    assert model.decoder_embed.weight is model.embed.weight and small.model("roberta").blocks[0].cross is None


def test_gradient_checkpointing_changes_nothing():
    for name in ("roberta", "t5", "bart"):
        model, tokens = small.model(name), torch.stack(small.rows([5, 5]))
        model.requires_grad_(True)
        gradients = []
        for model.recompute in (False, True):
            model.zero_grad()
            model(tokens, decoder_tokens=start(model, tokens) if model.two else None).square().mean().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("change, words", [
    ({"encoder_layers": 4}, "encoder_layers is 4: expected 0 .* to layers 3"), ({"encoder_layers": -1}, "encoder_layers is -1"),
    ({"rotary_scaling": (0.5, 1, 4, 16)}, "rotary_scaling is .*factor from 1"), ({"rotary_scaling": (2, 4, 4, 16)}, "high above it"),
    ({"masked_head": True}, "masked_head has a plain activation"), ({"relative_buckets": 3}, "relative_buckets is 3"), ({"relative_furthest": 16}, "relative_buckets is 32: .*relative_furthest 16")])
def test_bad_configurations_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**{**small.SHAPE, **change})


def test_bad_inputs_are_named():
    tokens = torch.stack(small.rows([4, 4]))
    both, encoder, decoder = small.model("two"), small.model("modern"), small.model("llama")
    for model, arguments, words in [
            (both, {}, "needed there: give the start token"), (decoder, {"decoder_tokens": tokens}, "leave them out here"),
            (encoder, {"decoder_tokens": tokens}, "leave them out here"), (both, {"decoder_tokens": tokens[0]}, r"decoder_tokens are torch.int64 of shape \(4,\)"),
            (both, {"decoder_tokens": tokens + 29}, "decoder_tokens are .* vocabulary of 29"),
            (both, {"decoder_tokens": tokens.repeat(1, 7)}, "28 tokens do not fit"),
            (decoder, {"mask": torch.ones_like(tokens), "cache": Cache(decoder, 2, 8)}, "mask is torch.int64"),
            (encoder, {"cache": Cache(encoder, 2, 8)}, "an encoder sees both ways")]:
        with pytest.raises(ValueError, match=words):
            model(tokens, **arguments)
    cache = Cache(both, 2, 8)
    both(tokens, decoder_tokens=tokens, cache=cache)
    with pytest.raises(ValueError, match="leave them out here"):
        both(tokens, decoder_tokens=tokens, cache=cache)
    with pytest.raises(ValueError, match=r"\(2, 9\) do not fit"):
        both(torch.cat([tokens, tokens[:, :1]], 1), cache=cache)


# ------------------------------------------------------------------------------------------------- adapters on the other two

def test_lora_reaches_the_look_at_the_encoder():
    model, (ids, more) = small.model("two", dtype=torch.float64), small.rows([5, 4])
    lora = small.randomise(LoRA(model, rank=2, alpha=3, sites="all")).double()
    assert lora.get_parameter("query_a").shape[0] == 3 and lora.get_parameter("cross_value_a").shape[0] == 1
    delta = {name: (b @ a).detach().numpy() for name, (a, b) in lora.factors().items()}
    delta = {name: np.concatenate([np.zeros((3 - len(d), *d.shape[1:])), d]) for name, d in delta.items()}
    given = start(model, more[None])
    with lora:
        got = model(ids[None], decoder_tokens=given)[0].detach().numpy()
    expected = plain.logits(model, ids.tolist(), delta=delta, decoder_ids=given[0].tolist())
    assert np.abs(got - expected).max() <= ROTARY and np.abs(got - model(ids[None], decoder_tokens=given)[0].numpy()).max() > 0.01


@pytest.mark.parametrize("name", [*small.ENCODERS, *small.BOTH])
def test_reft_edits_the_prompt_where_it_is_read(name):
    model, rows = small.model(name, dtype=torch.float64), small.rows([5, 3])
    tokens, mask = small.pad(rows, "left", more=1)
    reft = small.randomise(LoReFT(model, rank=2, positions="f1+l1")).double()
    assert reft.layers == list(range(model.config.encoder_layers))
    given = start(model, torch.stack(small.rows([4, 4], seed=2))) if model.two else None
    down, up, bias = (w.detach().numpy()[:, 0] for w in reft.weights())
    def edit(layer, h):
        if layer >= model.config.encoder_layers:
            return h
        h = h.copy()
        for t in {0, len(h) - 1}:
            h[t] = h[t] + up[layer].T @ (down[layer] @ h[t] + bias[layer])
        return h
    with reft:
        got = model(tokens, mask, decoder_tokens=given)
    for i, row in enumerate(rows):
        expected = plain.logits(model, row.tolist(), edit=edit, decoder_ids=None if given is None else given[i].tolist())
        mine = got[i] if model.two else got[i][mask[i]]
        assert np.abs(mine.detach().numpy() - expected).max() <= (ROTARY if model.config.positions == "rotary" else EXACT)


def test_what_an_adapter_cannot_do_there_is_an_error():
    both, decoder = small.model("two"), small.model("llama")
    with pytest.raises(ValueError, match="distinct numbers from 0 to 1"):
        LoReFT(both, layers=[2])
    with pytest.raises(ValueError, match="nothing generated passes there"):
        LoReFT(both, positions="all+generated")
    with LoReFT(decoder), pytest.raises(ValueError, match="a row that packs several has no one prompt"):
        decoder(torch.stack(small.rows([4])), torch.tensor([[1, 1, 2, 2]]))


# ------------------------------------------------------------------------------------- training and generation of the other two

def test_an_encoder_decoder_learns_ranks_and_writes():
    """From the first word of the prompt, the word two further on; rows of unequal length, trained and generated in batches."""
    examples = [Example(" ".join([f"w{i}"] + ["w20"] * (i % 3)), f"w{i + 2} w9", (f"w{i + 2} w9", f"w{i + 3} w9", "w0")) for i in range(8)]
    model = small.model("two")
    run = minireft.train(model, [], examples, TrainConfig(steps=150, lr=1e-2, batch_size=8, full=True), progress=False)
    scores = minireft.evaluate(model, model.tokenizer, examples, batch_size=3)
    greedy = minireft.generate(model, model.tokenizer, [e.prompt for e in examples], max_new_tokens=4)
    beams = minireft.generate(model, model.tokenizer, [e.prompt for e in examples], max_new_tokens=4, beams=3)
    assert run.losses[-1] < 0.1 * run.losses[0] and scores.rank == scores.exact == 1.0
    assert greedy == beams == [e.completion for e in examples]


@pytest.mark.parametrize("name", small.BOTH)
def test_what_an_encoder_decoder_writes_is_what_it_scores_highest(name):
    """Greedy generation with a cache against an argmax over the whole, token by token and row by row."""
    model, rows = small.model(name), small.rows([2, 6, 4])
    new = generate_ids(model, [row.tolist() for row in rows], 5, eos=None)
    for row, ids in zip(rows, new):
        given = torch.tensor([[model.config.start]])
        for token in ids:
            assert model(row[None], decoder_tokens=given)[0, -1].argmax() == token
            given = torch.cat([given, torch.tensor([[token]])], 1)
        assert len(ids) == 5
    most = model.config.context - 1                                       # its own context, whatever the prompt took of the encoder's
    assert [len(ids) for ids in generate_ids(model, [row.tolist() for row in rows], 99, eos=None)] == [most] * 3
    assert [len(ids) for ids in search_ids(model, [row.tolist() for row in rows], 99, None, 2)] == [most] * 3


def test_the_loss_of_an_encoder_decoder_is_that_of_each_answer_alone():
    model, tokenizer = small.model("t5"), small.model().tokenizer
    examples = [Example("w1 w2 w3", "w4 w5"), Example("w6", "w7 w8 w9"), Example("w3 w3", "w1")]
    rows = [encode(tokenizer, e, model.config.context) for e in examples]
    batch = collate(rows, pad=7, start=model.config.start)
    total = OBJECTIVES["lm"].total(batch.through(model), batch)
    alone = 0.0
    for row in rows:
        prompt, answer = torch.tensor([row.ids[: row.prompt_length]]), row.ids[row.prompt_length :]
        p = model(prompt, decoder_tokens=torch.tensor([[model.config.start, *answer[:-1]]]))[0].log_softmax(-1)
        alone -= sum(p[t, token] for t, token in enumerate(answer))
    torch.testing.assert_close(total, alone, rtol=1e-5, atol=1e-5)


def test_an_encoder_generates_nothing_and_predicts_no_next_token():
    model, examples = small.model("modern"), [Example("w1", "w2", ("w2", "w3"))]
    assert [small.model(name).config.architecture for name in ("llama", "modern", "two")] == ["decoder", "encoder", "encoder-decoder"]
    with pytest.raises(ValueError, match="an encoder generates nothing"):
        minireft.generate(model, model.tokenizer, ["w1"])
    with pytest.raises(ValueError, match="train it with a Classifier"):
        minireft.train(model, [LoRA(model)], examples, progress=False)
    with pytest.raises(ValueError, match="attach a Classifier"):
        minireft.evaluate(model, model.tokenizer, examples, metrics=("rank",))


@pytest.mark.parametrize("name", ("roberta", "t5", "bart"))
def test_the_other_two_are_saved_and_loaded(name, tmp_path):
    model = small.model(name)
    minireft.save(model, model.tokenizer, tmp_path / "base")
    loaded, _ = minireft.load(tmp_path / "base")
    assert loaded.config == model.config and small.same_bits(small.bits(loaded), small.bits(model))
    assert not model.two or loaded.decoder_embed.weight is loaded.embed.weight
