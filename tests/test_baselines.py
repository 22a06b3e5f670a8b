"""The baselines in adapters/more: DoRA, bottleneck adapters, RED, prompt and prefix tuning, each against its formula.

Run:  pytest tests/test_baselines.py              # what every adapter promises is in test_adapters.py
See:  DoRA as weights written by hand, a prefix as an initial cache, a prompt as new words; counts from the papers' formulas.
"""

from types import SimpleNamespace

import numpy as np
import plain
import pytest
import small
import torch
import torch.nn.functional as F

import minireft
from minireft import RED, Bank, Bottleneck, Cache, DoRA, LoRA, LoReFT, Model, ModelConfig, PrefixTuning, PromptTuning, load_adapter
from minireft.geometry import rotary_angles, turn

VIRTUAL = {"prompt": lambda m: PromptTuning(m, tokens=3), "prompt, encoder": lambda m: PromptTuning(m, tokens=3, encoder=5),
           "prefix": lambda m: PrefixTuning(m, tokens=3)}


# ------------------------------------------------------------------------------------------------------------------ DoRA

@pytest.mark.parametrize("name", small.CONFIGS)
def test_dora_agrees_with_its_weights_written_by_hand(name):
    (ids,), model = small.rows([6]), small.model(name, dtype=torch.float64, layers=2)
    dora = small.randomise(DoRA(model, rank=3, alpha=6, sites="all")).double()
    W, own = ({key: p.detach().numpy() for key, p in module.named_parameters()} for module in (model, dora))
    delta = {}
    for site, path in minireft.adapters.base.LINEARS.items():
        delta[site] = []
        for layer in range(2) if site in dora.sites else ():
            weight = W[f"blocks.{layer}.{path}.weight"]
            direction = weight + 2 * own[f"{site}_b"][layer] @ own[f"{site}_a"][layer]
            new = own[f"{site}_m"][layer][:, None] * direction / np.sqrt((direction**2).sum(1, keepdims=True))
            delta[site].append(new - weight)
    with dora, torch.no_grad():
        logits = model(ids[None])[0].numpy()
    assert np.abs(logits - plain.logits(model, ids.tolist(), delta={site: d for site, d in delta.items() if d})).max() < 1e-4


def test_dora_s_gradient_takes_the_norm_for_a_constant_unless_asked():
    model, (tokens, mask), gradients = small.model(dtype=torch.float64), small.pad(small.rows([3, 5])), {}
    for asked in (True, False):
        dora = small.randomise(DoRA(model, rank=2, norm_gradient=asked)).double()
        with dora:
            model(tokens, mask)[mask].sin().sum().backward()
        gradients[asked] = {name: p.grad for name, p in dora.named_parameters()}
    for name, g in gradients[True].items():
        assert torch.allclose(g, gradients[False][name]) == name.endswith("_m")


def test_dora_beside_other_adapters():
    model = small.model()
    with LoRA(model, sites="query"), pytest.raises(ValueError, match="LoRA stands on query already"):
        DoRA(model).attach()
    assert model.adapters == []
    with DoRA(model), LoRA(model, sites="query"):
        pass
    with pytest.raises(ValueError, match="got DoRA"):
        Bank({"a": DoRA(model)})


# --------------------------------------------------------------------------------------------- bottleneck adapters and RED

def test_a_serial_adapter_stands_behind_and_a_parallel_one_beside():
    model, x = small.model("gpt2"), torch.randn(2, 3, 16)
    for form, scale in (("serial", 1.0), ("parallel", 4.0)):
        adapter = small.randomise(Bottleneck(model, width=3, form=form, activation="tanh"))
        ffn, quiet, slot = model.blocks[1].ffn, SimpleNamespace(context={}), 1
        D, d, U, u = (adapter.get_parameter(f"ffn_output_{part}")[slot] for part in ("down", "down_bias", "up", "up_bias"))
        y = ffn(x, quiet)
        before = y if form == "serial" else x
        expected = y + scale * (torch.tanh(before @ D.T + d) @ U.T + u)
        with adapter:
            context = {adapter: adapter.prepare(None, None, None, None, 0)}
            torch.testing.assert_close(ffn(x, SimpleNamespace(context=context)), expected)
        assert context[adapter] == {}                                     # nothing is kept for the backward pass to find twice


def test_red_scales_and_shifts():
    model, x = small.model("gpt2"), torch.randn(2, 3, 16)
    red = small.randomise(RED(model))
    down = model.blocks[2].ffn.down
    expected = (1 + red.scale[2]) * down(torch.ones(2, 3, 20), context={}) + red.shift[2]
    with red:
        torch.testing.assert_close(down(torch.ones(2, 3, 20), context={red: red.prepare(None, None, None, None, 0)}), expected)


@pytest.mark.parametrize("make, words", [
    (lambda m: Bottleneck(m, width=0), "width is 0"), (lambda m: Bottleneck(m, form="beside"), "form is 'beside'"),
    (lambda m: Bottleneck(m, form="parallel", sites="attention_output"), "site 'attention_output'"), (lambda m: Bottleneck(m, activation="exp"), "activation is 'exp'"),
    (lambda m: Bottleneck(m, scale=float("inf")), "scale is inf"), (lambda m: RED(m, site="gate"), "site 'gate'"), (lambda m: DoRA(m, rank=0), "rank is 0"),
    (lambda m: PromptTuning(m, tokens=0), "tokens are 0"), (lambda m: PromptTuning(m, tokens=24), "below the model's context, 24"),
    (lambda m: PromptTuning(m, encoder=-1), "encoder is -1"), (lambda m: PrefixTuning(m, tokens=3, words=[4]), "expected 3 token ids")])
def test_options_out_of_range_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make(small.model())


def test_parameter_counts():
    with torch.device("meta"):
        model = Model(ModelConfig(vocab_size=32000, width=4096, layers=32, heads=32, hidden=11008, context=2048))   # Llama-2 7B
    assert RED(model).num_parameters() == 262_144                         # the paper's 0.0039 %
    linears = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    assert DoRA(model, rank=2, sites="all").num_parameters() == 32 * (2 * linears + 5 * 4096 + 2 * 11008)
    assert Bottleneck(model, width=64).num_parameters() == 32 * 2 * (2 * 64 * 4096 + 64 + 4096)       # Houlsby: 2md + d + m
    assert Bottleneck(model, width=64, form="parallel").num_parameters() == 32 * (2 * 64 * 4096 + 64 + 4096)
    assert PromptTuning(model, tokens=20).num_parameters() == 20 * 4096
    assert PromptTuning(model, tokens=20, encoder=10).num_parameters() == 20 * 4096 + 10 * (2 * 4096 + 1)
    assert PrefixTuning(model, tokens=20).num_parameters() == 32 * 2 * 20 * 4096


# -------------------------------------------------------------------------------------------------------- virtual tokens

def behind(adapter, rows):
    """Rows of ids behind the placeholders, or behind other ids."""
    front = adapter.placeholders if hasattr(adapter, "placeholders") else adapter
    return [torch.cat((torch.tensor(front), row)) for row in rows]


@pytest.mark.parametrize("name", small.CONFIGS)
@pytest.mark.parametrize("kind", (PromptTuning, PrefixTuning))
def test_the_start_is_the_base_behind_words(kind, name):
    model, rows, words = small.model(name), small.rows([4, 7]), [5, 9, 5]
    made = kind(model, tokens=3, words=words)
    with torch.no_grad():
        expected = [model(row[None])[:, 3:] for row in behind(words, rows)]
        with made:
            for row, there in zip(behind(made, rows), expected):
                torch.testing.assert_close(model(row[None])[:, 3:], there, atol=1e-5, rtol=1e-5)
    torch.manual_seed(1)
    drawn = kind(model, tokens=3)
    assert all(p.abs().sum() > 0 for p in drawn.parameters())


def test_a_prompt_is_read_like_new_words():
    model, (row,) = small.model("qwen"), small.rows([5])                  # its head is not tied to the embedding
    prompt = small.randomise(PromptTuning(model, tokens=3, encoder=4))
    with torch.no_grad():
        E = prompt.embeddings
        learned = E + torch.tanh(E @ prompt.w1.T + prompt.b1) @ prompt.w2.T
        with prompt:
            logits = model(behind(prompt, [row])[0][None])
        model.embed.weight = torch.nn.Parameter(torch.cat((model.embed.weight, learned)))
        object.__setattr__(model.config, "vocab_size", small.V + 3)
        torch.testing.assert_close(logits, model(behind(list(range(small.V, small.V + 3)), [row])[0][None]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ("llama", "neox", "qwen"))
def test_a_prefix_is_an_initial_cache(name):
    model, (row,) = small.model(name), small.rows([5])
    prefix, c = small.randomise(PrefixTuning(model, tokens=3)), small.model(name).config
    cache, angles = Cache(model, 1, 8), rotary_angles(torch.arange(3)[None], c.head_dim, c.rotary_base)
    with torch.no_grad():
        for layer in range(c.layers):
            k, v = (p[layer].view(1, 3, c.kv_heads, c.head_dim).transpose(1, 2) for p in (prefix.key, prefix.value))
            cache.write(layer, 0, turn(k, *angles), v)
        cache.length = cache.longest = 3
        with prefix:
            logits = model(behind(prefix, [row])[0][None])[:, 3:]
        torch.testing.assert_close(logits, model(row[None], cache=cache), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_padding_on_either_side_and_a_cache_change_nothing(kind):
    model = small.model()
    adapter = small.randomise(VIRTUAL[kind](model))
    rows = behind(adapter, small.rows([2, 6]))
    with adapter, torch.no_grad():
        alone = [model(row[None])[0] for row in rows]
        for side in ("left", "right"):
            tokens, mask = small.pad(rows, side, more=2)
            logits = model(tokens, mask, prompt_lengths=torch.tensor([4, 7]))
            for i in range(2):
                torch.testing.assert_close(logits[i][mask[i]], alone[i], atol=1e-5, rtol=1e-5)
        prompts = [row.tolist() for row in rows]
        written, by_hand = minireft.generation.generate_ids(model, prompts, 5, None), []
        for ids in prompts:
            for _ in range(5):
                ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
            by_hand.append(ids[-5:])
        assert written == by_hand


@pytest.mark.parametrize("name", ("gemma", "roberta"))
@pytest.mark.parametrize("kind", VIRTUAL)
def test_gradients_against_finite_differences(kind, name):
    model, step = small.model(name, dtype=torch.float64), 1e-6
    adapter = small.randomise(VIRTUAL[kind](model)).double()
    tokens, mask = small.pad(behind(adapter, small.rows([2, 6])), "left")
    with adapter:
        def loss():
            return model(tokens, mask)[mask].sin().sum()
        for p, g in zip(adapter.parameters(), torch.autograd.grad(loss(), list(adapter.parameters()))):
            direction = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                above = (p.add_(step * direction), loss())[1]
                below = (p.sub_(2 * step * direction), loss())[1]
                p.add_(step * direction)
            assert (g * direction).sum().item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_detached_nothing_is_left_and_a_file_gives_it_back(kind, tmp_path):
    model, (row,) = small.model(), small.rows([4])
    before = model(row[None])
    adapter = small.randomise(VIRTUAL[kind](model))
    tokens = behind(adapter, [row])[0][None]
    with adapter, torch.no_grad():
        logits = model(tokens)
    assert torch.equal(model(row[None]), before) and all(site.edits == [] for site in model.sites().values())
    adapter.save(tmp_path / "a")
    loaded = load_adapter(model, tmp_path / "a")
    assert loaded.options == adapter.options and small.same_bits(small.bits(loaded), small.bits(adapter))
    with loaded, torch.no_grad():
        assert torch.equal(model(tokens), logits)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_it_is_trained_and_spoken_to_through_text(kind):
    torch.manual_seed(0)
    model = small.model()
    adapter = VIRTUAL[kind](model)
    examples = [minireft.Example(f"w{i} w{i + 1}", "w5 w7") for i in range(4)]
    run = minireft.train(model, [adapter], adapter.examples(examples), minireft.TrainConfig(steps=60, batch_size=4, lr=0.3), progress=False)
    assert run.losses[-1] < 0.6 * run.losses[0]                           # of a random base: only a prefix gets all the way
    with adapter:
        if kind == "prefix":
            assert minireft.evaluate(model, model.tokenizer, adapter.examples(examples)).exact == 1
            assert minireft.generate(model, model.tokenizer, adapter.prompts(["w1 w2"]), 2) == ["w5 w7"]
        with pytest.raises(ValueError, match="row 0 does not begin with 3 placeholders: pass prompts through"):
            minireft.generate(model, model.tokenizer, ["w1 w2 w3 w4"], 2)
        with pytest.raises(ValueError, match="does not begin"):
            model(torch.tensor([[adapter.placeholders[0]]]))


def test_a_prefix_starts_from_the_bare_base():
    model = small.model()
    with LoReFT(model), pytest.raises(ValueError, match="LoReFT is attached"):
        PrefixTuning(model)
    assert all(site.edits == [] for site in model.sites().values())


@pytest.mark.parametrize("name", ("roberta", "modern", "t5", "bart"))
@pytest.mark.parametrize("kind", (PromptTuning, PrefixTuning))
def test_encoders_read_virtual_tokens_too(kind, name):
    model, (row,) = small.model(name), small.rows([4])
    adapter = kind(model, tokens=3)
    given = {"decoder_tokens": torch.tensor([[model.config.start, 4]])} if model.two else {}
    tokens = behind(adapter, [row])[0][None]
    with torch.no_grad():
        bare = model(tokens, **given)
        with adapter:
            changed = model(tokens, **given)
    assert changed.shape == bare.shape and not torch.allclose(changed, bare, atol=1e-3)
