"""(IA)³: every vector where the paper puts it, merged and unmerged without a trace.

Run:  pytest tests/test_ia3.py
See:  the scaled model against the plain one of plain.py, on every configuration and every site.
"""

import numpy as np
import plain
import pytest
import small
import torch

from minireft import IA3, Model, ModelConfig
from minireft.adapters import ia3

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

@pytest.mark.parametrize("name", [*small.CONFIGS, "biased"])
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
