"""(IA)³: every vector where the paper puts it, merged and unmerged without a trace.

Run:  pytest tests/test_ia3.py
See:  the scaled model against the plain one of plain.py, on every configuration and every site.
"""

import contextlib

import numpy as np
import plain
import pytest
import small
import torch

import minireft
from minireft import IA3, Bank, LoRA, Model, ModelConfig, load_adapter, reading
from minireft.adapters import ia3
from minireft.adapters.compose import weighted_sum

ALL = ("key", "value", "ffn", "query", "attention_output", "ffn_output")


def factors(adapter):
    return {name: 1 + l.detach().double().numpy() for name, l in adapter.named_parameters()}


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", small.CONFIGS)
def test_scaled_sites_agree_with_the_plain_model(name, training):
    (ids,) = small.rows([6])
    for sites, layer_norm in [((site,), False) for site in ALL] + [(ALL, True), (("key", "value", "ffn"), False)]:
        model = small.model(name, dtype=torch.float64, layers=2).train(training)            # fused while training, not otherwise
        adapter = small.randomise(IA3(model, sites=sites, layer_norm=layer_norm)).double()
        with adapter, torch.no_grad():
            error = np.abs(model(ids[None])[0].numpy() - plain.logits(model, ids.tolist(), scale=factors(adapter))).max()
        assert error < 1e-4, (sites, layer_norm)                          # rotary angles are float32; see test_model.py


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", small.CONFIGS)
def test_the_ffn_vector_stands_after_the_non_linearity(name, training):
    """l = −1 tells −gelu(u) from gelu(−u); stored is l − 1 = −2."""
    model, tokens = small.model(name).train(training), torch.stack(small.rows([5]))
    adapter = IA3(model, sites="ffn")
    torch.nn.init.constant_(adapter.ffn, -2.0)
    with torch.no_grad(), small.tapped(model, "blocks.0.ffn.act", "blocks.0.ffn.down") as taps:
        model(tokens)
        with adapter:
            seen = small.Tap()
            model.blocks[0].ffn.act.edits.append(seen)
            model(tokens)
            model.blocks[0].ffn.act.edits.remove(seen)
    torch.testing.assert_close(seen.seen[0], -taps["blocks.0.ffn.act"].seen[0], atol=1e-6, rtol=1e-5)


def test_a_pristine_activation_is_fused_while_training(monkeypatch):
    fused = []
    for name in ("swiglu_scale", "gelu_scale"):
        true = getattr(ia3.ops, name)
        monkeypatch.setattr(ia3.ops, name, lambda *x, name=name, true=true, **more: fused.append((name, more.get("approximate"))) or true(*x, **more))
    for config, expected in (("llama", ("swiglu_scale", None)), ("neox", ("gelu_scale", "none")), ("gpt2", ("gelu_scale", "tanh"))):
        fused.clear()
        model, tokens = small.model(config).train(), torch.stack(small.rows([5]))
        with IA3(model, sites="ffn"):
            model(tokens)
            assert fused == [expected] * 3
            model.eval()(tokens)
            assert len(fused) == 3


@pytest.mark.parametrize("training", (True, False))
def test_two_on_one_site_multiply(training):
    model, tokens = small.model().train(training), torch.stack(small.rows([5]))
    first, second, both = (small.randomise(IA3(model), seed) for seed in (1, 2, 3))
    with torch.no_grad():
        for one, two, product in zip(first.parameters(), second.parameters(), both.parameters()):
            product.copy_((1 + one) * (1 + two) - 1)
    with both:
        expected = model(tokens)
    with first, second:
        torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=1e-4)


def test_what_is_stored_is_l_minus_1():
    adapter = IA3(small.model(), init_scale=0.0)
    assert all(p.eq(0).all() for p in adapter.parameters())               # so weight decay leaves the identity alone
    adapter = IA3(small.model(), init_scale=0.25)
    assert all(p.eq(0.25).all() for p in adapter.parameters())
    assert all(v.eq(1.25).all() for v in adapter.vectors().values())


def test_parameter_counts():
    with torch.device("meta"):
        model = Model(ModelConfig(vocab_size=32000, width=4096, layers=32, heads=32, kv_heads=8, hidden=14336, context=2048))
    d_k = d_v = 8 * 128
    assert IA3(model).num_parameters() == 32 * (d_k + d_v + 14336)
    assert IA3(model, sites=ALL, layer_norm=True).num_parameters() == 32 * (d_k + d_v + 14336 + 4096 + 2 * 4096 + 2 * 4096)
    assert IA3(model, sites="query").num_parameters() == 32 * 4096


# --------------------------------------------------------------------------------------------------------------- merging

@pytest.mark.parametrize("name", [*small.CONFIGS, *small.ENCODERS, "biased"])
def test_merged_equals_attached_and_unmerging_restores_every_bit(name):
    model = small.model("llama", bias=True) if name == "biased" else small.model(name)
    tokens, mask = small.pad(small.rows([3, 7]), "left")
    for sites, layer_norm in [((site,), False) for site in ALL] + [(ALL, True)]:
        base, unscaled = small.bits(model), model(tokens, mask)
        adapter = small.randomise(IA3(model, sites=sites, layer_norm=layer_norm))
        with torch.no_grad():
            for p in adapter.parameters():
                p[:, 1] = -1.0                                            # l = 0: dividing it out again is impossible
            with adapter:
                expected = model(tokens, mask)
            adapter.merge()
            merged = model(tokens, mask)
        torch.testing.assert_close(merged[mask], expected[mask], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(merged, unscaled, atol=1e-3)
        after = small.bits(model)
        adapter.merge()                                                   # again: nothing
        assert small.same_bits(small.bits(model), after)
        adapter.unmerge()
        assert small.same_bits(small.bits(model), base)


def test_merging_steps_aside_and_may_be_repeated():
    model, tokens = small.model(), torch.stack(small.rows([5]))
    adapter = small.randomise(IA3(model)).attach()
    expected = model(tokens)
    adapter.merge()
    assert not adapter.attached and model.adapters == []
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="merged into the base already: unmerge"):
        adapter.attach()
    adapter.unmerge()
    with pytest.raises(ValueError, match="nothing to undo"):
        adapter.unmerge()
    with adapter:
        assert torch.equal(model(tokens), expected)


def test_vectors_that_are_not_finite_are_refused_and_the_base_is_untouched():
    model = small.model()
    base = small.bits(model)
    for bad in (float("nan"), float("inf")):
        adapter = small.randomise(IA3(model)).attach()
        with torch.no_grad():
            adapter.ffn[2, 3] = bad                                       # the last layer of the last vector
        with pytest.raises(ValueError, match="'ffn' are not all finite"):
            adapter.merge()
        assert small.same_bits(small.bits(model), base) and adapter.attached
        adapter.detach()


def test_merges_are_undone_in_order_or_not_at_all():
    model = small.model()
    base = small.bits(model)
    first, second = small.randomise(IA3(model), 1), small.randomise(IA3(model), 2)
    first.merge()
    second.merge()
    with pytest.raises(ValueError, match="changed since"):
        first.unmerge()
    second.unmerge()
    first.unmerge()
    assert small.same_bits(small.bits(model), base)
    first.merge()
    with torch.no_grad():
        model.blocks[1].ffn.down.weight[0, 0] += 0.01                     # as training the merged base would
    with pytest.raises(ValueError, match="changed since"):
        first.unmerge()


def test_two_that_are_merged_multiply_in_any_order():
    model, tokens = small.model("neox"), torch.stack(small.rows([5]))
    first, second = small.randomise(IA3(model), 1), small.randomise(IA3(model, sites=("value", "ffn", "ffn_output")), 2)
    with first, second:
        expected = model(tokens)
    for one, other in ((first, second), (second, first)):
        one.merge()
        with other:                                                       # one merged, the other attached
            torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
        other.merge()
        torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
        other.unmerge()
        one.unmerge()


def test_a_move_of_the_base_while_merged_is_noticed():
    model = small.model()
    adapter = small.randomise(IA3(model))
    adapter.merge()
    model.to(torch.bfloat16)                                              # rounds what is merged
    with pytest.raises(ValueError, match="changed since"):
        adapter.unmerge()


def test_nothing_is_merged_while_a_bank_is_attached():
    model = small.model()
    base, single = small.bits(model), small.randomise(IA3(model))
    for kind in (IA3, LoRA):
        with Bank({"a": kind(model)}):
            with pytest.raises(ValueError, match="a bank is attached"):
                single.merge()
        assert small.same_bits(small.bits(model), base)
    single.merge()                                                        # afterwards it may
    single.unmerge()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_merging_in_another_dtype_rounds_once(dtype):
    model = small.model("neox", dtype=dtype)
    weight, bias = model.blocks[1].attention.key.weight.clone(), model.blocks[1].attention.key.bias.clone()
    adapter = small.randomise(IA3(model, sites="key"))
    l = 1 + adapter.key[1].detach()
    adapter.merge()
    wide = weight.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(model.blocks[1].attention.key.weight, (wide * l[:, None]).to(dtype))
    assert torch.equal(model.blocks[1].attention.key.bias, (bias.to(wide.dtype) * l).to(dtype))


@pytest.mark.parametrize("options, words", [
    ({"sites": "keys"}, "site 'keys' is unknown here: expected some of key, value, ffn"), ({"sites": ()}, "at least one"),
    ({"sites": ("key", "key")}, "each named once"), ({"sites": ("key", "head")}, "site 'head'"), ({"sites": "embed"}, "site 'embed'"),
    ({"init_scale": float("nan")}, "init_scale is nan"), ({"init_scale": "0"}, "init_scale is '0'")])
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        IA3(small.model(), **options)


# ----------------------------------------------------------------------------------------------------- an encoder–decoder

def two(name, **changes):
    """A model that reads and writes, and its arguments: tokens, mask, decoder_tokens."""
    model, (tokens, mask) = small.model(name, **changes), small.pad(small.rows([3, 7]), "right")
    return model, dict(tokens=tokens, mask=mask, decoder_tokens=torch.stack(small.rows([4, 4], seed=1)))


@pytest.mark.parametrize("name", small.BOTH)
def test_parameters_of_encoder_and_decoder_layers(name):
    """The paper, section 3.3: d_k + d_v + d_ff an encoder layer, 2 d_k + 2 d_v + d_ff a decoder layer."""
    model, _ = two(name)
    c = model.config
    d_k = d_v = c.kv_heads * c.head_dim
    encoder, decoder = c.encoder_layers, c.layers - c.encoder_layers
    assert IA3(model).num_parameters() == encoder * (d_k + d_v + c.hidden) + decoder * (2 * d_k + 2 * d_v + c.hidden)
    assert IA3(model, sites="cross_key,cross_value").num_parameters() == decoder * (d_k + d_v)
    assert IA3(model, sites="self_key").num_parameters() == c.layers * d_k
    assert IA3(model, sites="query").num_parameters() == (c.layers + decoder) * c.heads * c.head_dim
    assert IA3(model, sites="ffn", layer_norm=True).num_parameters() == c.layers * (c.hidden + 2 * c.width) + decoder * c.width


@pytest.mark.parametrize("name", small.BOTH)
def test_key_is_every_attention_s_and_can_be_chosen_apart(name):
    model, inputs = two(name)
    for site in ia3.ATTENTION:
        both = small.randomise(IA3(model, sites=site))
        apart = [IA3(model, sites=f"{kind}_{site}") for kind in ("self", "cross")]
        with torch.no_grad():
            for adapter in apart:
                for vector, l in adapter.named_parameters():
                    l.copy_(both.get_parameter(vector))
        with both:
            expected = model(**inputs)
        with apart[0]:
            alone = model(**inputs)
            with apart[1]:
                torch.testing.assert_close(model(**inputs), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(alone, expected, atol=1e-3) and not torch.allclose(alone, model(**inputs), atol=1e-3)


@pytest.mark.parametrize("site", [*ia3.SITES, *(f"{kind}_{name}" for kind in ("self", "cross") for name in ia3.ATTENTION), "all"])
@pytest.mark.parametrize("name", small.BOTH)
def test_an_encoder_decoder_merged_equals_attached_and_gets_its_bits_back(name, site):
    model, inputs = two(name)
    base, unscaled = small.bits(model), model(**inputs)
    adapter = small.randomise(IA3(model, sites=ia3.SITES if site == "all" else site, layer_norm=site == "all"))
    with torch.no_grad():
        for l in adapter.parameters():
            l[0, 1] = -1.0                                                # a vector with a zero in it
    with adapter:
        expected = model(**inputs)
    assert not torch.allclose(expected, unscaled, atol=1e-3)
    adapter.merge()
    torch.testing.assert_close(model(**inputs), expected, rtol=1e-5, atol=1e-5)
    adapter.unmerge()
    assert small.same_bits(small.bits(model), base)


def test_cross_attention_scales_what_the_decoder_takes_from_the_encoder():
    """l_k and l_v at 0 in the cross-attention: every key and value is its bias, so the decoder no longer sees the tokens."""
    model, inputs = two("two")
    adapter, others = IA3(model, sites=("cross_key", "cross_value")), {**inputs, "tokens": inputs["tokens"].flip(1), "mask": None}
    for l in adapter.parameters():
        torch.nn.init.constant_(l, -1.0)
    with adapter:
        assert torch.equal(model(**inputs), model(**others))
    assert not torch.equal(model(**inputs), model(**others))


@pytest.mark.parametrize("name", small.BOTH)
def test_a_bank_on_an_encoder_decoder(name):
    model, inputs = two(name)
    members = {"a": small.randomise(IA3(model), 1), "b": small.randomise(IA3(model, sites=("cross_value", "self_query")), 2)}
    alone = []
    for row, member in enumerate(members.values()):
        with member:
            alone.append(model(**inputs)[row])
    bank = Bank(members)
    with bank:
        torch.testing.assert_close(model(**inputs, tasks=bank.ids(["a", "b"])), torch.stack(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", small.BOTH)
def test_a_mixed_batch_writes_what_each_writes_alone(name):
    """The cross-attention's keys and values are computed once a sequence, each row's by its own vectors."""
    model, _ = two(name)
    members = {"a": small.randomise(IA3(model), 1), "b": small.randomise(IA3(model, sites=("cross_key", "cross_value", "ffn")), 2)}
    prompts, tasks, wanted = ["w1 w5 w2", "w7", "w3 w9 w4 w8 w2", "w11 w12"], ["a", None, "b", "a"], []
    for prompt, task in zip(prompts, tasks):
        with members.get(task, contextlib.nullcontext()):
            wanted += minireft.generate(model, model.tokenizer, [prompt], max_new_tokens=6)
    bank = Bank(members)
    with bank:
        assert minireft.generate(model, model.tokenizer, prompts, max_new_tokens=6, tasks=bank.ids(tasks)) == wanted
    assert wanted != minireft.generate(model, model.tokenizer, prompts, max_new_tokens=6)


def test_cross_attention_needs_one():
    for model in (small.model(), small.model("roberta")):
        with pytest.raises(ValueError, match="site 'cross_key' is unknown here"):
            IA3(model, sites="cross_key")
        assert [name for name, _ in IA3(model, sites="self_key").named_parameters()] == ["key"]
    for sites in ("key,self_key", "cross_value,value"):
        with pytest.raises(ValueError, match="one is in another"):
            IA3(small.model("t5"), sites=sites)
    with pytest.raises(ValueError, match="one is in another"):
        IA3(small.model(), sites="key,self_key")


# ----------------------------------------------------------------------------------------------------------- combinations

def vectors(adapter):
    return {name: l.detach() for name, l in adapter.vectors().items()}


def test_a_combination_in_linear_and_in_log_space():
    model = small.model()
    a, b = (small.randomise(IA3(model), seed, std=0.2) for seed in (1, 2))
    x, y = vectors(a), vectors(b)
    mean, root = weighted_sum([a, b], [0.5, 0.5]), weighted_sum([a, b], [0.5, 0.5], space="log")
    for name in x:
        torch.testing.assert_close(vectors(mean)[name], (x[name] + y[name]) / 2)
        torch.testing.assert_close(vectors(root)[name], (x[name] * y[name]).sqrt())
        torch.testing.assert_close(vectors(weighted_sum([a, b], [2, -1]))[name], 2 * x[name] - y[name])
        torch.testing.assert_close(vectors(weighted_sum([a, b], [2, -1], space="log"))[name], x[name] ** 2 / y[name])
    assert not mean.attached and small.same_bits(small.bits(weighted_sum([a], [1])), small.bits(a))


def test_log_space_with_weights_of_1_is_both_attached():
    model, tokens = small.model(), torch.stack(small.rows([5]))
    a, b = small.randomise(IA3(model), 1, std=0.2), small.randomise(IA3(model, sites=("value", "query"), layer_norm=True), 2, std=0.2)
    together = weighted_sum([a, b], [1, 1], space="log")                  # a vector that one has not is 1 there
    with a, b:
        expected = model(tokens)
    with together:
        torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["two", "t5"])
def test_combinations_on_an_encoder_decoder_travel(name, tmp_path):
    model, inputs = two(name)
    together = weighted_sum([small.randomise(IA3(model), 1), small.randomise(IA3(model, sites="cross_key"), 2)], [0.7, 0.3])
    together.save(tmp_path / "sum")
    loaded = load_adapter(model, tmp_path / "sum")
    with together:
        expected = model(**inputs)
    with loaded:
        assert torch.equal(model(**inputs), expected)


def test_what_cannot_be_combined_is_refused():
    model = small.model()
    one, wrong = IA3(model), IA3(model)
    with torch.no_grad():
        wrong.ffn[1, 3] = -1.5                                            # l = −0.5
    with pytest.raises(ValueError, match="adapter 1 has -0.5 among its vectors of 'ffn': logarithms"):
        weighted_sum([one, wrong], [0.5, 0.5], space="log")
    weighted_sum([one, wrong], [0.5, 0.5])
    for others, weights, space, words in [
            ([one], [1], "logs", "space is 'logs': expected 'linear' or 'log'"), ([one, one], [1], "log", "2 adapters and 1 weights"),
            ([one, LoRA(model)], [1, 1], "linear", "adapter 1 is a LoRA"), ([one, IA3(small.model())], [1, 1], "log", "one model object"),
            ([one], [float("nan")], "linear", "weights are"), ([one], ["1"], "linear", "weights are")]:
        with pytest.raises(ValueError, match=words):
            weighted_sum(others, weights, space=space)


# ---------------------------------------------------------------------------------------------------------------- reading

def test_the_report_finds_what_was_planted(tmp_path):
    model = small.model()
    adapter = IA3(model)
    with torch.no_grad():
        adapter.value[1, 5], adapter.value[1, 2], adapter.value[1, 0], adapter.ffn[2, 7] = 0.5, 0.25, -1.75, -0.125
    report = reading.vectors(adapter, count=2)
    rows = {(row.name, row.layer): row for row in report.rows}
    assert len(rows) == 3 * 3
    planted, width = rows["value", 1], 8
    assert planted.amplified == [(5, 1.5), (2, 1.25)] and planted.inhibited == [(0, -0.75)]
    assert (planted.least, planted.most) == (-0.75, 1.5) and planted.mean == pytest.approx(1 + (0.5 + 0.25 - 1.75) / width)
    assert planted.std == pytest.approx(np.std([1.5, 1.25, -0.75] + [1] * (width - 3)))
    assert rows["ffn", 2].inhibited == [(7, 0.875)] and rows["ffn", 2].amplified == []
    untouched = rows["key", 0]
    assert (untouched.mean, untouched.std, untouched.inhibited, untouched.amplified) == (1, 0, [], [])
    lines = str(report).splitlines()
    assert len(lines) == 1 + 9 and "0 -0.750" in lines[5] and "5  1.500" in lines[5]
    report.picture(tmp_path / "vectors.png")
    assert (tmp_path / "vectors.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="a LoRA has no vectors"):
        reading.vectors(LoRA(model))


def test_the_report_tells_self_from_cross_attention():
    report = reading.vectors(small.randomise(IA3(small.model("two"))))
    assert [(row.name, row.layer) for row in report.rows if "key" in row.name] == [("key", 0), ("key", 1), ("key", 2), ("cross_key", 0)]
