"""NEFTune: the noise's bound, mean and variance, where it falls, and the silence around it.

Run:  pytest tests/test_neftune.py
See:  one entry of the noise has variance α²/(3TC), T a row's real tokens; evaluation never hears it.
"""

import signal

import pytest
import small
import torch

import minireft
from minireft import IA3, Cache, LoReFT, NEFTune, TrainConfig, ops


def wide(**changes):
    """A training model with an embedding of many channels, so that statistics are sharp."""
    return small.model(width=512, head_dim=4, layers=1, **changes).train()


def noise_of(adapter, tokens, mask=None, step=0, rows=None):
    """What the adapter adds to the embeddings of one pass: (B, T, C)."""
    embed, seen = adapter.model.embed, small.Tap()
    adapter.begin(step, rows)
    with torch.no_grad(), adapter:
        embed.edits.append(seen)
        adapter.model.stream(tokens, mask)
        embed.edits.remove(seen)
    return seen.seen[0] - embed.weight[tokens].detach()


@pytest.mark.parametrize("length", ("real", "padded"))
@pytest.mark.parametrize("distribution", ("uniform", "gaussian"))
def test_bound_mean_and_variance(distribution, length):
    model, alpha, lengths = wide(), 5.0, [20, 7, 1]
    tokens, mask = small.pad(small.rows(lengths), "right", more=3)
    noise = noise_of(NEFTune(model, alpha=alpha, distribution=distribution, length=length), tokens, mask)
    for b, n in enumerate(lengths):
        T, C = (n if length == "real" else 23), 512
        row = noise[b, : n if length == "real" else 23].double()
        bound = alpha / (T * C) ** 0.5
        variance = bound**2 * (1 / 3 if distribution == "uniform" else 1)
        count = row.numel()
        if distribution == "uniform":
            assert row.abs().max() <= bound * (1 + 1e-4) and row.abs().max() > 0.99 * bound          # + what x + ε rounds off
        fourth = 9 / 5 if distribution == "uniform" else 3                # E ε⁴ / variance²
        assert abs(row.mean()) < 5 * (variance / count) ** 0.5            # five standard errors each
        assert abs(row.square().mean() - variance) < 5 * variance * ((fourth - 1) / count) ** 0.5
        if distribution == "uniform" and length == "real":                # DESIGN's reading: a sequence's norm is about α/√3
            assert row.norm().item() == pytest.approx(alpha / 3**0.5, rel=0.15 if n == 1 else 0.05)


def test_entries_are_independent():
    noise = noise_of(NEFTune(wide(), alpha=1.0), torch.stack(small.rows([20] * 4))).flatten().double()
    noise = noise / noise.std()
    for lag in (1, 2, 3, 4, 8, 512, 512 * 20):                            # neighbours in a Philox block, channels, tokens, rows
        product = noise[:-lag] * noise[lag:]
        assert abs(product.mean()) < 5 / len(product) ** 0.5


def test_padding_gets_none_and_changes_none():
    model, rows = wide(), small.rows([6, 3, 1])
    adapter, ids = NEFTune(model, alpha=2.0), torch.tensor([7, 8, 9])
    alone = [noise_of(adapter, row[None], rows=ids[i : i + 1])[0] for i, row in enumerate(rows)]
    for side in ("left", "right"):
        for more in (0, 4):
            tokens, mask = small.pad(rows, side, more)
            noise = noise_of(adapter, tokens, mask, rows=ids)
            assert noise[~mask].eq(0).all()
            for i in range(3):
                assert torch.equal(noise[i][mask[i]], alone[i])


def test_the_same_example_has_the_same_noise_in_any_batch():
    model, rows, ids = wide(), small.rows([4] * 6), torch.tensor([3, 1, 4, 15, 9, 2**40])
    adapter, tokens = NEFTune(model), torch.stack(rows)
    whole = noise_of(adapter, tokens, rows=ids)
    pieces = torch.cat([noise_of(adapter, tokens[a : a + 2], rows=ids[a : a + 2]) for a in (0, 2, 4)])
    order = torch.tensor([5, 3, 0, 1, 4, 2])
    assert torch.equal(pieces, whole) and torch.equal(noise_of(adapter, tokens[order], rows=ids[order]), whole[order])
    alike = noise_of(adapter, tokens[:1].expand(6, -1), rows=ids)
    assert all(not torch.equal(alike[i], alike[j]) for i in range(6) for j in range(i))     # another example, other noise


def test_seed_and_step_choose_the_noise():
    model, tokens = wide(), torch.stack(small.rows([4]))
    a, b, c = NEFTune(model, seed=0), NEFTune(model, seed=0), NEFTune(model, seed=1)
    expected = minireft.reference.noisy_embedding(tokens, model.embed.weight, 5.0, torch.tensor([1, 5]), rows=torch.tensor([8]))
    assert torch.equal(noise_of(c, tokens, step=5, rows=torch.tensor([8])), (expected - model.embed.weight[tokens]).detach())
    assert torch.equal(noise_of(a, tokens, step=5), noise_of(b, tokens, step=5))
    for other in (noise_of(a, tokens, step=6), noise_of(c, tokens, step=5), noise_of(NEFTune(model, seed=2**31), tokens, step=5)):
        assert not torch.isclose(other, noise_of(a, tokens, step=5)).float().mean() > 0.01


def test_every_pass_has_fresh_noise_without_being_told():
    model, tokens = small.model().train(), torch.stack(small.rows([4]))
    with NEFTune(model) as adapter:
        first, second = model(tokens), model(tokens)
        assert not torch.equal(first, second)
        adapter.begin(0)
        assert torch.equal(model(tokens), first) and torch.equal(model(tokens), second)
        adapter.begin(7, torch.tensor([3]))                               # a word that holds for one pass:
        model(tokens)
        model(tokens.expand(5, -1))                                       # the next may have another batch size


def test_silent_in_evaluation_generation_and_decoding():
    model, tokens = small.model(), torch.stack(small.rows([4]))
    quiet, text = model(tokens), minireft.generate(model, model.tokenizer, ["w1 w2"], max_new_tokens=4)
    with NEFTune(model, alpha=100.0):
        assert torch.equal(model(tokens), quiet)
        model.train()
        assert not torch.equal(model(tokens), quiet)
        assert minireft.generate(model, model.tokenizer, ["w1 w2"], max_new_tokens=4) == text and model.training
        examples = [minireft.Example("w1", "w2", ("w2", "w3"))]
        assert minireft.evaluate(model, model.tokenizer, examples) == minireft.evaluate(small.model(), model.tokenizer, examples)
        cache = Cache(model, 1, 5)
        with torch.no_grad():
            model(tokens, cache=cache)
            assert torch.equal(model(tokens[:, :1], cache=cache), model(tokens[:, :1], cache=shorter(cache)))
        model.eval()
        assert torch.equal(model(tokens), quiet)


def shorter(cache):
    cache.length -= 1
    return cache


@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt))
def test_silent_after_training_that_was_interrupted(error, monkeypatch):
    model, tokens = small.model(), torch.stack(small.rows([4]))
    quiet, noise, steps = model(tokens), NEFTune(model, alpha=100.0), []

    def interrupted(*_, **__):
        steps.append(1)
        if len(steps) == 2:
            raise error("now")
        return true_step(*_, **__)
    true_step = minireft.training.one_step
    monkeypatch.setattr(minireft.training, "one_step", interrupted)
    with pytest.raises(error):
        minireft.train(model, [LoReFT(model, rank=1), noise], [minireft.Example("w1", "w2")], TrainConfig(steps=4, batch_size=2), progress=False)
    assert len(steps) == 2 and not noise.attached and not model.training
    assert torch.equal(model(tokens), quiet) and torch.equal(model.train()(tokens), quiet)


@pytest.mark.parametrize("after", (3, 10))
def test_silent_after_ctrl_c_in_the_middle_of_a_step(after):
    """A real signal, while the noise stands on the embedding: in a forward pass of some step."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell that runs tests in the background ignores it
    model, tokens = small.model(), torch.stack(small.rows([4]))
    quiet, noise, passes = model(tokens), NEFTune(model, alpha=100.0), []

    def interrupt(operation, context):
        passes.append(noise.attached and model.training)
        if len(passes) == after:
            signal.raise_signal(signal.SIGINT)
        return operation
    interrupt.adapter = None
    model.blocks[1].output.edits.append(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            minireft.train(model, [IA3(model), noise], [minireft.Example("w1", "w2")], TrainConfig(steps=40, batch_size=2), progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
        model.blocks[1].output.edits.remove(interrupt)
    assert len(passes) == after and all(passes) and not noise.attached and not model.training and model.adapters == []
    assert torch.equal(model(tokens), quiet) and torch.equal(model.train()(tokens), quiet)
    assert not any(site.edits for site in model.sites().values())


@pytest.mark.emulator
@pytest.mark.skipif(not ops.backends()["emulator"], reason="the emulator is not built")
@pytest.mark.parametrize("length", ("real", "padded"))
def test_same_seed_same_noise_on_the_cpu_the_emulator_and_in_plain_pytorch(length):
    """To the bit, through the adapter: rows, padded on either side, and packed."""
    model, rows = small.model().train(), small.rows([5, 2, 7])
    batches = [small.pad(rows, "left"), small.pad(rows, "right", more=3), (torch.cat(rows)[None], torch.tensor([[1] * 5 + [2] * 2 + [3] * 7]))]
    adapter = NEFTune(model, alpha=5.0, length=length, seed=2**31 + 7)
    for tokens, mask in batches:
        whose = torch.arange(len(tokens)) * 2**33
        found = []
        for backend in ("cpu", "emulator", "reference"):
            with ops.use(backend):
                found.append(noise_of(adapter, tokens, mask, step=11, rows=whose))
        assert found[0].abs().max() > 0 and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_one_is_enough():
    model = small.model()
    with NEFTune(model):
        second = NEFTune(model)
        with pytest.raises(ValueError, match="add noise twice"):
            second.attach()
        assert not second.attached


def test_alpha_0_is_the_identity_to_the_bit():
    for dtype in (torch.float32, torch.bfloat16):
        model, (tokens, mask) = small.model(dtype=dtype).train(), small.pad(small.rows([4, 2]))
        quiet = model(tokens, mask)
        for distribution in ("uniform", "gaussian"):
            with NEFTune(model, alpha=0, distribution=distribution):
                assert torch.equal(model(tokens, mask), quiet)


def test_noise_comes_before_other_edits_of_the_embedding():
    model, tokens = small.model().train(), torch.stack(small.rows([4]))
    reft, noise = small.randomise(LoReFT(model, site="embed", positions="all")), NEFTune(model, alpha=50.0)
    with reft, noise:
        noise.begin(0)
        one = model(tokens)
    with noise, reft:
        noise.begin(0)
        assert torch.equal(model(tokens), one)


def test_learned_positions_are_added_after_the_noise_and_get_none():
    model, tokens = small.model("gpt2").train(), torch.stack(small.rows([4]))
    quiet = model.position.weight.clone()
    with NEFTune(model, alpha=50.0), small.tapped(model, "position") as taps:
        model(tokens)
    assert torch.equal(taps["position"].seen[0][0], quiet[:4])


def test_the_embedding_still_learns_through_the_noise():
    model, tokens = small.model(tied=False).train(), torch.stack(small.rows([4]))
    model.requires_grad_(True)
    with NEFTune(model) as noise:
        model(tokens).square().mean().backward()
    assert noise.num_parameters() == 0 and model.embed.weight.grad[tokens.unique()].abs().sum(1).gt(0).all()


@pytest.mark.parametrize("options, words", [
    ({"alpha": -1.0}, "alpha is -1.0"), ({"alpha": float("nan")}, "alpha is nan"), ({"alpha": float("inf")}, "alpha is inf"), ({"alpha": "5"}, "alpha is '5'"),
    ({"alpha": True}, "alpha is True"), ({"alpha": None}, "alpha is None"), ({"length": "max"}, "length is 'max': expected 'real' or 'padded'"),
    ({"distribution": "normal"}, "distribution is 'normal'"), ({"seed": 0.5}, "seed is 0.5"), ({"seed": 2**32}, "seed is 4294967296"), ({"seed": -1}, "seed is -1")])
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        NEFTune(small.model(), **options)
