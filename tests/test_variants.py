"""LoReFT's kin, and what may be said about an edit: where it stands, how strong it is, what it drops, what stands beside it.

Run:  pytest tests/test_variants.py
See:  every variant at every place against its formula, row by row in float64, and nothing changed anywhere else.
"""

import pytest
import small
import torch

import minireft
from minireft import IA3, ConsReFT, DiReFT, LobiReFT, LoReFT, NoReFT, SteeringVector, TrainConfig
from minireft.adapters.edits import ACTIVATIONS
from minireft.adapters.reft import SITES

PATHS = {"output": "blocks.1.output", "attention_output": "blocks.1.attention.output", "ffn_output": "blocks.1.ffn.down",
         "query": "blocks.1.attention.query", "key": "blocks.1.attention.key", "value": "blocks.1.attention.value", "embed": "embed"}


def rotation(m):
    """R of the same span and order as Gram and Schmidt would have it, one row after the other, in float64."""
    rows = []
    for row in m.double():
        for done in rows:
            row = row - (row @ done) * done
        rows.append(row / row.norm())
    return torch.stack(rows)                                              # (r, C)


# kind → Φ(h) of one state h (C,), from the parameters of one set, with s(x) the activation
FORMULAS = {
    LoReFT: lambda h, s, m, w, b: h + rotation(m).T @ (s(w @ h + b) - rotation(m) @ h),
    DiReFT: lambda h, s, w1, w2, b: h + w2.T @ s(w1 @ h + b),
    NoReFT: lambda h, s, w1, w2, b: h + w2.T @ (s(w1 @ h + b) - w2 @ h),
    ConsReFT: lambda h, s, m, b: h + rotation(m).T @ (s(b) - rotation(m) @ h),
    LobiReFT: lambda h, s, m, b: h + rotation(m).T @ s(b),
}


def through(model, adapter, site="output", lengths=None, side="left"):
    """The states that come to a site and those that leave it, two of (B, T, C), and the real tokens of each row."""
    tokens, mask = small.pad(small.rows([6, 3, 1, 4]), side)
    with small.tapped(model, PATHS[site]) as before, adapter:
        with small.tapped(model, PATHS[site]) as after:
            model(tokens, mask, lengths)
    return before[PATHS[site]].seen[0], after[PATHS[site]].seen[0], [row.nonzero()[:, 0].tolist() for row in mask]


def follow(adapter, kind, before, named, activation=None):
    """The formula at the tokens `named` for each row, [(token, set), ...]: (B, T, C) in float64, gradients and all."""
    names = {LoReFT: "m w b", DiReFT: "w1 w2 b", NoReFT: "w1 w2 b", ConsReFT: "m b", LobiReFT: "m b"}[kind].split()
    parameters = [getattr(adapter, name).double() for name in names]
    out = [list(row) for row in before.double()]
    for row, tokens in enumerate(named):
        for token, k in tokens:
            out[row][token] = FORMULAS[kind](out[row][token], ACTIVATIONS.get(activation, lambda x: x), *(p[0, k] for p in parameters))
    return torch.stack([torch.stack(row) for row in out])


@pytest.mark.parametrize("activation", [None, "tanh"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", FORMULAS)
def test_the_formula_and_its_gradients(kind, tied, activation):
    model = small.model()
    adapter = small.randomise(kind(model, rank=3, layers=[1], positions="f2+l1", tied=tied, activation=activation, init="paper"), seed=4)
    before, after, real = through(model, adapter)
    named = [[(t, 0) for t in row[:2]] + [(row[-1], 0 if tied else 1)] if len(row) > 2 else [(t, 0 if tied else 1) for t in row] for row in real]
    expected = follow(adapter, kind, before, named, activation)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(after.double(), expected, atol=2e-5, rtol=1e-5)
    push, parameters = torch.randn(after.shape), list(adapter.parameters())
    wanted = torch.autograd.grad((expected * push).sum(), parameters)
    for got, g in zip(torch.autograd.grad((after * push).sum(), parameters), wanted):
        torch.testing.assert_close(got, g, atol=1e-4 * g.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("site", SITES)
def test_at_its_site_and_nowhere_else(site):
    for name in ("llama", "gpt2"):
        model = small.model(name)
        adapter = small.randomise(LoReFT(model, rank=3, layers="all" if site == "embed" else [1], positions="f1+l1", site=site))
        before, after, real = through(model, adapter, site)
        torch.testing.assert_close(after.double(), follow(adapter, LoReFT, before, [[(t, 0) for t in {row[0], row[-1]}] for row in real]),
                                   atol=2e-5, rtol=1e-5)
        plain, _, _ = through(model, LoReFT(model, layers="all" if site == "embed" else [1], rank=1, site=site), site)
        assert torch.equal(before, plain)                                 # what comes to the site is the base's own


def test_a_site_has_a_width_of_its_own():
    model = small.model("qwen")                                           # 4 query heads of 6, one key head
    assert [LoReFT(model, site=site, rank=2).m.shape[-1] for site in ("output", "query", "key", "value")] == [16, 24, 6, 6]
    assert LoReFT(model, site="query", rank=24).options["rank"] == 24
    with pytest.raises(ValueError, match="rank is 7: expected a whole number from 1 to the width, 6"):
        LoReFT(model, site="key", rank=7)
    with pytest.raises(ValueError, match="site is 'gate': expected one of output, attention_output"):
        LoReFT(model, site="gate")
    with pytest.raises(ValueError, match="layers are .1.: the embedding has none"):
        LoReFT(model, site="embed", layers=[1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions, pick", [
    ("all", lambda p, row: p), ("all+generated", lambda p, row: row), ([0, 2, -1], lambda p, row: {*p[:1], *p[2:3], *p[-1:]}),
    ("-3,4", lambda p, row: {*p[-3:-2], *p[4:5]}), ("f2", lambda p, row: p[:2]), ("l3", lambda p, row: p[-3:])])
def test_positions_are_of_the_prompts_real_tokens(positions, pick, side):
    model = small.model()
    adapter = small.randomise(LoReFT(model, rank=2, layers=[1], positions=positions))
    for lengths in (None, torch.tensor([5, 1, 1, 3])):
        before, after, real = through(model, adapter, lengths=lengths, side=side)
        changed = [row.nonzero()[:, 0].tolist() for row in (after != before).any(-1)]
        prompts = [row if lengths is None else row[:n] for row, n in zip(real, (5, 1, 1, 3))]
        assert changed == [sorted(pick(p, row)) for p, row in zip(prompts, real)]


def test_the_strict_rule():
    model, tokens = small.model(), torch.stack(small.rows([5, 5]))
    for positions, need in (("f3+l2", 5), ("f5", 5), ("0,4", 2), ("0,-4,3", 3)):
        adapter = LoReFT(model, positions=positions, strict=True)
        with adapter, pytest.raises(ValueError, match=f"row 1 is too short for its positions: . of {need} can be edited.*short-prompt rule"):
            model(tokens, None, torch.tensor([5, 4]))                     # "0,-4,3" names three tokens of 5, and two of 4
        with LoReFT(model, positions=positions):
            model(tokens, None, torch.tensor([5, 4]))                     # the default shares out what there is
    for positions in ("f3+l1", "l4", "0,1,-1", "all", "all+generated"):
        with LoReFT(model, positions=positions, strict=True):
            model(tokens)
            minireft.generate(model, model.tokenizer, ["w1 w2 w3 w4"], max_new_tokens=3)


# ------------------------------------------------------------------------------------------------------- what it may do

@pytest.mark.parametrize("options", [{}, {"tied": False}, {"activation": "gelu"}])
def test_strength_scales_the_edit(options):
    model = small.model()
    adapter = small.randomise(LoReFT(model, rank=3, layers=[1], positions="f2+l1", **options))
    with torch.no_grad():
        before, after, _ = through(model, adapter)
        for strength in (0.0, 0.5, -1.0, 3.0, 1.0):
            adapter.strength = strength
            torch.testing.assert_close(through(model, adapter)[1] - before, strength * (after - before), atol=2e-5, rtol=1e-5)


def test_a_steering_vector_is_added_and_not_trained():
    model = small.model()
    vectors = torch.randn(2, 16)
    adapter = SteeringVector(model, vectors, layers=[1, 2], positions="all+generated")
    with torch.no_grad():
        adapter.strength = -0.5
        before, after, real = through(model, adapter)
    at = torch.tensor([[t in row for t in range(6)] for row in real])[:, :, None]
    torch.testing.assert_close(after, before - 0.5 * vectors[0] * at)
    assert adapter.num_parameters() == 0
    with pytest.raises(ValueError, match="nothing to train"):
        minireft.train(model, [adapter], [minireft.Example("w1", "w2")], tokenizer=model.tokenizer, progress=False)
    for wrong in (torch.zeros(3, 16), torch.zeros(16, 2), torch.zeros(16)):
        with pytest.raises(ValueError, match="vectors have shape .*expected .2, 16., one row a layer"):
            SteeringVector(model, wrong, layers=[1, 2])


def test_dropout_falls_on_the_edit_and_only_in_training():
    model, share = small.model(), 0.4
    adapter = small.randomise(LoReFT(model, rank=3, layers=[1], positions="f2+l1", dropout=share, activation="relu"))
    with torch.no_grad():
        before, silent, real = through(model, adapter)                    # evaluation: as if there were none
        adapter.options["dropout"] = 0.0
        assert torch.equal(through(model, adapter)[1], silent)
        adapter.options["dropout"] = share
        model.train()
        kept = []
        for seed in range(20):
            torch.manual_seed(seed)
            change, whole = through(model, adapter)[1] - before, silent - before
            there = whole.abs() > 1e-3
            ratio = (change[there] / whole[there]).numpy()                # each entry of the edit: gone, or larger by 1/(1 − p)
            assert all(abs(x) < 1e-2 or abs(x * (1 - share) - 1) < 1e-2 for x in ratio)
            assert not change[~(whole != 0)].any()                        # and the stream that passes by is whole
            kept.append((ratio > 1).mean())
    n = 20 * len(ratio)
    assert len({*kept}) > 5 and abs(sum(kept) / 20 - (1 - share)) < 4 * (share * (1 - share) / n) ** 0.5
    for wrong in (1.0, -0.1, 2):
        with pytest.raises(ValueError, match=f"dropout is {wrong}: expected a share from 0 to below 1"):
            LoReFT(model, dropout=wrong)
    with pytest.raises(ValueError, match="activation is 'swish': expected None or one of relu, gelu"):
        LoReFT(model, activation="swish")


@pytest.mark.parametrize("kind, count", [(LoReFT, 2 * 16 * 3 + 3), (DiReFT, 2 * 16 * 3 + 3), (NoReFT, 2 * 16 * 3 + 3), (ConsReFT, 16 * 3 + 3),
                                         (LobiReFT, 16 * 3 + 3)])
def test_parameters_are_counted(kind, count):
    model = small.model()
    assert kind(model, rank=3).num_parameters() == 3 * count              # three layers
    assert kind(model, rank=3, layers=[1], tied=False).num_parameters() == 2 * count


# -------------------------------------------------------------------------------------------------- several on one layer

def test_disjoint_groups_stand_together_and_add_up():
    model = small.model()
    low, high = small.randomise(LoReFT(model, rank=2, layers=[1], positions="f2"), 1), small.randomise(DiReFT(model, layers=[1], positions="2,3"), 2)
    with torch.no_grad():
        before, a, _ = through(model, low)
        b = through(model, high)[1]
        with low:
            both = through(model, high)[1]
    torch.testing.assert_close(both, before + (a - before) + (b - before))
    # Untied prefix and suffix are two such groups in one launch.
    untied = small.randomise(LoReFT(model, rank=2, layers=[1], positions="f1+l1", tied=False), 3)
    with torch.no_grad():
        before, both, real = through(model, untied)
        apart = []
        for k, positions in enumerate(("f1", "l1")):
            one = LoReFT(model, rank=2, layers=[1], positions=positions)
            for mine, theirs in zip(one.parameters(), untied.parameters()):
                mine.copy_(theirs[:, k : k + 1])
            apart.append(through(model, one)[1] - before)
    long = [len(row) > 1 for row in real]                                 # a prompt of one token has a suffix only
    torch.testing.assert_close(both[long], (before + sum(apart))[long])


def test_groups_that_may_meet_are_refused_and_nothing_is_left():
    model = small.model()
    for first, second in [("f2", "l1"), ("f3", "2"), ("all", "9"), ("0", "-1"), ("f7+l7", "f1")]:
        with LoReFT(model, positions=first), pytest.raises(ValueError, match="another ReFT edits output of layer 0 at .*which can meet"):
            DiReFT(model, positions=second).attach()
        assert model.adapters == [] and not any(site.edits for site in model.sites().values())
    with LoReFT(model, layers=[0]), LoReFT(model, layers=[1]), LoReFT(model, site="query"), LoReFT(model, site="embed"), IA3(model):
        model(torch.stack(small.rows([5])))


# --------------------------------------------------------------------------------------------------------- in generation

@pytest.mark.parametrize("kind", [LoReFT, NoReFT, ConsReFT, SteeringVector])
@pytest.mark.parametrize("positions", ["f1+l2", "all", "all+generated", "0,-1"])
def test_generated_with_a_cache_as_without(kind, positions):
    model = small.model()
    adapter = kind(model, positions=positions, layers=[0, 2])
    small.randomise(adapter) if kind is not SteeringVector else adapter.vectors.normal_()
    row = small.rows([5])[0].tolist()
    with adapter, torch.no_grad():
        (found,) = minireft.generation.generate_ids(model, [row], 8, None)
        again = list(row)
        for _ in range(8):                                                # all tokens anew at every step
            again.append(int(model(torch.tensor([again]), None, torch.tensor([5]))[0, -1].argmax()))
    assert again[5:] == found
