"""Slices of one R that are trained apart, and sums of edits: what is put together is exactly what its parts do.

Run:  pytest tests/test_compose.py
See:  slices that leave each other's directions alone to the bit, and weighted sums against the sum of the edits.
"""

import itertools

import pytest
import small
import torch

import minireft
from minireft import IA3, ConsReFT, DiReFT, Example, LobiReFT, LoReFT, NoReFT, SteeringVector, TrainConfig, load_adapter
from minireft.adapters.compose import Subspace, weighted_sum


def change(model, adapter, site="blocks.1.output"):
    """What one adapter alone adds to the stream at a site: (B, T, C)."""
    tokens, mask = small.pad(small.rows([6, 3, 2]), "left")
    with torch.no_grad(), small.tapped(model, site) as before, adapter:
        with small.tapped(model, site) as after:
            model(tokens, mask)
    return after[site].seen[0] - before[site].seen[0]


def parent_of(model, **options):
    options = {"rank": 5, "layers": [1], "positions": "f2+l2", "tied": False, **options}
    return small.randomise(LoReFT(model, **options), seed=3, std=0.3)


# ---------------------------------------------------------------------------------------------------------------- slices

@pytest.mark.parametrize("options", [{}, {"tied": True}, {"site": "query"}, {"activation": "tanh"}, {"positions": "0,-1", "tied": True}])
def test_the_slices_of_one_parent_add_up_to_it(options):
    model = small.model()
    parent = parent_of(model, **options)
    site = "blocks.1.attention.query" if options.get("site") else "blocks.1.output"
    whole = change(model, parent, site)
    assert whole.abs().max() > 0.1
    torch.testing.assert_close(change(model, Subspace(parent, range(5)), site), whole)
    for cut in ([[0, 1], [2, 3, 4]], [[4], [0, 2], [3, 1]]):
        parts = [change(model, Subspace(parent, directions), site) for directions in cut]
        torch.testing.assert_close(sum(parts), whole)
        for directions, part in zip(cut, parts):                          # a slice writes inside its own directions only
            R = parent.rotations()[1 if parent.tied else "1 prefix"]      # (r, C), of the first token of a long prompt
            outside = R[[d for d in range(5) if d not in directions]]
            assert part[0, 0].norm() > 0.1 and (part[0, 0] @ outside.T).abs().max() < 1e-5


def lesson(shift):
    return [Example(f"w{i} w{2 * i % 7} w9", f"w{i + shift}") for i in range(1, 9)]


def taught(model, adapter, shift):
    minireft.train(model, [adapter], lesson(shift), TrainConfig(steps=12, batch_size=8, lr=2e-2), model.tokenizer, progress=False)
    return adapter


def test_slices_are_trained_apart_and_used_together():
    found = []
    for turn in ([([0, 1], 2), ([2, 3], 11)], [([2, 3], 11), ([0, 1], 2)]):
        model = small.model()
        torch.manual_seed(0)
        parent = LoReFT(model, rank=4, positions="f2+l2")
        before, slices = small.bits(parent), {}
        for directions, shift in turn:
            slices[tuple(directions)] = one = taught(model, Subspace(parent, directions), shift)
            assert small.same_bits(small.bits(parent), before)            # nothing reaches the parent by itself
        for directions, one in slices.items():
            one.write_back()
            others = [d for d in range(4) if d not in directions and (d,) not in slices]
            assert not torch.equal(parent.w[:, :, directions], before["w"][:, :, directions])
            assert torch.equal(parent.w[:, :, directions], one.w) and torch.equal(parent.b[:, :, directions], one.b)
            if one is list(slices.values())[0]:                           # the rows of the others are untouched
                assert torch.equal(parent.w[:, :, others], before["w"][:, :, others])
                assert torch.equal(parent.b[:, :, others], before["b"][:, :, others])
                tokens = torch.stack(small.rows([4]))
                with torch.no_grad(), one:
                    alone = model(tokens)
                with torch.no_grad(), parent:                             # idle directions (W = R, b = 0) do nothing
                    torch.testing.assert_close(model(tokens), alone)
        assert torch.equal(parent.m, before["m"])                         # R itself was not trained
        found.append(small.bits(parent))
    assert small.same_bits(*found)                                        # in whichever order they were trained


def test_slices_carry_what_the_parent_is_and_train_two_numbers():
    model = small.model()
    parent = parent_of(model)
    one = Subspace(parent, [4, 2])
    assert one.num_parameters() == 2 * (2 * 16 + 2) and {name for name, _ in one.named_parameters()} == {"w", "b"}
    assert (one.layers, str(one.where), one.tied) == ([1], "f2+l2", False)
    R, whole = one.rotations(), parent.rotations()
    assert R.keys() == whole.keys() and all(torch.equal(R[key], whole[key][[4, 2]]) for key in R)
    with one, pytest.raises(ValueError, match="another ReFT edits output of layer 1"):
        Subspace(parent, [0]).attach()                                    # one after the other is not both together


@pytest.mark.parametrize("directions", [[5], [-1], [0, 5], [1, 1], [], 7, [0.5], ["0"], [None], [True]])
def test_a_slice_outside_r_is_named(directions):
    parent = parent_of(small.model())
    with pytest.raises(ValueError, match="directions are .*expected distinct numbers from 0 to 4, the parent's rank being 5") as error:
        Subspace(parent, directions)
    assert repr(directions) in str(error.value)


def test_what_has_no_orthonormal_R_has_no_slices(tmp_path):
    model = small.model()
    for parent in (DiReFT(model), ConsReFT(model), IA3(model), minireft.NEFTune(model), minireft.Bank({"a": LoReFT(model)})):
        with pytest.raises(ValueError, match=f"a {type(parent).__name__} has no orthonormal R to slice"):
            Subspace(parent, [0])
    with pytest.raises(ValueError, match="write_back.., then save the parent"):
        Subspace(LoReFT(model), [0]).save(tmp_path / "slice")
    assert list(tmp_path.iterdir()) == [] and Subspace(LoReFT(model), 2).slice == [2]


# ------------------------------------------------------------------------------------------------------------------ sums

KIN = [LoReFT, DiReFT, NoReFT, ConsReFT, LobiReFT]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kinds", list(itertools.combinations(KIN, 2)))
def test_a_weighted_sum_is_the_sum_of_the_edits(kinds, tied):
    model = small.model()
    adapters = [small.randomise(kind(model, rank=2 + i, layers=[1], positions="f2+l1", tied=tied), seed=i) for i, kind in enumerate(kinds)]
    adapters[1].strength = 0.7
    weights = [0.3, -1.5]
    expected = sum(w * change(model, a) for w, a in zip(weights, adapters))
    together = weighted_sum(adapters, weights)
    assert isinstance(together, DiReFT) and together.options["rank"] == 5 and not together.attached
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(change(model, together), expected, atol=2e-5, rtol=1e-4)


def test_the_average_of_steering_vectors_and_of_embedding_edits():
    model = small.model()
    vectors = torch.randn(2, 2, 16)
    both = weighted_sum([SteeringVector(model, v, layers=[0, 1]) for v in vectors], [0.5, 0.5])
    tokens, mask = small.pad(small.rows([6, 3]), "left")
    with torch.no_grad():
        with both:
            together = model(tokens, mask)
        with SteeringVector(model, vectors.mean(0), layers=[0, 1]):
            torch.testing.assert_close(together, model(tokens, mask))
    adapters = [small.randomise(LoReFT(model, rank=2, site="embed"), seed) for seed in (0, 1)]
    torch.testing.assert_close(change(model, weighted_sum(adapters, [2, 1]), "embed"),
                               2 * change(model, adapters[0], "embed") + change(model, adapters[1], "embed"))


def test_a_sum_is_an_adapter_of_its_own(tmp_path):
    model = small.model()
    adapters = [small.randomise(LoReFT(model, rank=2, positions="1,0", strict=True), seed) for seed in (0, 1)]
    together = weighted_sum(adapters, [1.0, 1.0])
    with pytest.raises(ValueError, match="strict=True"), together:
        model(torch.stack(small.rows([1])))
    together.save(tmp_path / "sum")
    expected = change(model, together, "blocks.2.output")
    with torch.no_grad():
        adapters[0].m.add_(1)                                             # its parts may go their ways
    assert torch.equal(change(model, together, "blocks.2.output"), expected)
    assert torch.equal(change(model, load_adapter(model, tmp_path / "sum"), "blocks.2.output"), expected)


def test_what_does_not_add_up_is_refused():
    model = small.model()
    lo = LoReFT(model, rank=2)
    for others, weights, message in [
            ([LoReFT(model, layers=[0])], [1, 1], "differ in their layers"), ([LoReFT(model, positions="f2")], [1, 1], "differ in their positions"),
            ([LoReFT(model, site="query")], [1, 1], "differ in their site"), ([LoReFT(model, tied=False)], [1, 1], "differ in their tied"),
            ([LoReFT(small.model())], [1, 1], "differ in their model"), ([LoReFT(model, activation="relu")], [1, 1], "no linear low-rank edit"),
            ([IA3(model)], [1, 1], "IA3 has no linear low-rank edit"), ([LoReFT(model)], [1], "2 adapters and 1 weights"),
            ([LoReFT(model, rank=15)], [1, 1], "rank is 17")]:
        with pytest.raises(ValueError, match=message):
            weighted_sum([lo, *others], weights)
    with pytest.raises(ValueError, match="0 adapters and 0 weights"):
        weighted_sum([], [])
    assert model.adapters == []
