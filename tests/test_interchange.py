"""Interchange interventions: the swap against the same done by hand, and a planted subspace that DAS must find.

Run:  pytest tests/test_interchange.py
See:  the model left as it was after every call, whatever happened in it.
"""

import pytest
import small
import torch

from minireft import LoReFT, load_adapter
from minireft.adapters.more.interchange import Interchange, Pair


def pairs(count, answer=0, seed=0):
    """Counterfactuals of unequal length; the answers are to be filled in."""
    lengths = [3 + i % 4 for i in range(2 * count)]
    rows = [tuple(row.tolist()) for row in small.rows(lengths, seed)]
    return [Pair(base, source, answer) for base, source in zip(rows[::2], rows[1::2])]


def by_hand(model, pair, layer, R, position=-1):
    """The last token's logits of one base alone, its state replaced by an edit that knows nothing of adapters."""
    site = model.blocks[layer].output
    with torch.no_grad():
        with small.tapped(model, f"blocks.{layer}.output") as taps:
            model(torch.tensor([pair.source]))
        s = taps[f"blocks.{layer}.output"].seen[0][0, position]           # (C,)

        class Replace:
            adapter = None

            def __call__(self, operation, context):
                def run(x):
                    h = operation(x).clone()
                    h[0, position] = h[0, position] - R.T @ (R @ h[0, position]) + R.T @ (R @ s)       # b + Rᵀ(R s − R b)
                    return h
                return run
        site.edits.append(Replace())
        try:
            return model(torch.tensor([pair.base]))[0, -1]
        finally:
            site.edits.pop()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("layer, position", [(0, -1), (1, 2), (0, -3), (2, -1)])
def test_the_swap_is_the_formula(layer, position, name):
    model, some = small.model(name), pairs(6)
    das = Interchange(model, layer=layer, rank=3, position=position)
    with torch.no_grad():
        logits, R = das.logits(some), das.rotation()
        plain = torch.stack([model(torch.tensor([pair.base]))[0, -1] for pair in some])
    torch.testing.assert_close(R @ R.T, torch.eye(3), atol=1e-6, rtol=0)
    assert (logits - plain).abs().max() > 0.05
    torch.testing.assert_close(logits, torch.stack([by_hand(model, pair, layer, R, position) for pair in some]), atol=2e-5, rtol=1e-5)
    assert model.adapters == [] and not any(site.edits for site in model.sites().values())


def test_what_must_be_so():
    model, some = small.model(), pairs(5)
    with torch.no_grad():
        base, source = (torch.stack([model(torch.tensor([row]))[0, -1] for row in rows]) for rows in zip(*((p.base, p.source) for p in some)))
        torch.testing.assert_close(Interchange(model, 1, rank=4).logits([Pair(p.base, p.base, 0) for p in some]), base)    # the same into itself
        torch.testing.assert_close(Interchange(model, 2, rank=16).logits(some), source, atol=2e-5, rtol=1e-5)              # all of the last state
        edited = small.randomise(LoReFT(model, positions="f1"))
        with edited:                                                      # both runs see what else is attached
            torch.testing.assert_close(Interchange(model, 2, rank=16).logits(some),
                                       torch.stack([model(torch.tensor([p.source]))[0, -1] for p in some]), atol=2e-5, rtol=1e-5)


def answered(model, planted, some):
    """The same pairs with the answers that a swap in the planted subspace gives."""
    with torch.no_grad():
        return [Pair(p.base, p.source, int(a)) for p, a in zip(some, planted.logits(some).argmax(-1))]


def test_das_finds_a_planted_subspace_and_nothing_by_chance():
    model = small.model()
    torch.manual_seed(0)
    planted, das = Interchange(model, 1, rank=2), Interchange(model, 1, rank=2)
    with torch.no_grad():                                                 # turned towards what moves the answers
        planted.m.copy_(das.m + 0.7 * torch.randn_like(das.m))
    train, test = (answered(model, planted, pairs(n, seed=seed)) for n, seed in ((192, 1), (96, 2)))
    weights, before = small.bits(model), das.accuracy(test)
    losses = das.fit(train, steps=60, lr=2e-2, batch_size=64)
    assert len(losses) == 60 and losses[-1] < losses[0]
    R = das.rotation()
    torch.testing.assert_close(R @ R.T, torch.eye(2), atol=1e-6, rtol=0)
    found, overlap = das.accuracy(test), (R @ planted.rotation().T).square().sum() / 2
    assert planted.accuracy(test) == 1.0 and found > before + 0.5 * (1 - before) and overlap > 0.6, (before, found, overlap)
    assert small.same_bits(small.bits(model), weights) and not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_accuracy_counts_and_asks_among_some_answers():
    model, some = small.model(), pairs(11)
    das = Interchange(model, 1, rank=2)
    right = answered(model, das, some)
    wrong = [Pair(p.base, p.source, (p.answer + 1) % small.V) for p in right]
    mixed = right[:4] + wrong[4:]
    for batch_size in (1, 4, 128):
        assert das.accuracy(right, batch_size=batch_size) == 1.0 and das.accuracy(wrong) == 0.0
        assert das.accuracy(mixed, batch_size=batch_size) == 4 / 11
    for pair in right[:3]:
        others = [i for i in range(small.V) if i != pair.answer]
        assert das.accuracy([pair], among=others) == 0.0 and das.accuracy([pair], among=[pair.answer]) == 1.0
        second = int(das.logits([pair])[0].topk(2).indices[1])
        assert das.accuracy([Pair(pair.base, pair.source, second)], among=others) == 1.0


def test_gradients_reach_R_alone():
    model, some = small.model().requires_grad_(True), pairs(4)
    das = Interchange(model, 1, rank=2)
    before = small.bits(model)
    das.fit(some, steps=2)
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and small.same_bits(small.bits(model), before)


def test_what_was_found_travels(tmp_path):
    model, some = small.model(), pairs(4)
    das = Interchange(model, 1, rank=3, position=2)
    das.save(tmp_path / "das")
    again = load_adapter(model, tmp_path / "das")
    assert (again.layer, str(again.where)) == (1, "2") and torch.equal(again.logits(some), das.logits(some))


def test_half_precision_bases():
    model, some = small.model(dtype=torch.bfloat16), pairs(4)
    das = Interchange(model, 1, rank=2)
    plain = Interchange(small.model(), 1, rank=2)
    with torch.no_grad():
        plain.m.copy_(das.m)
    logits = das.logits(some)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), plain.logits(some), atol=0.25, rtol=0.1)       # eight bits through three layers
    das.fit(some, steps=1)


def test_bad_input_leaves_nothing_behind():
    model, some = small.model(), pairs(4)
    for options, message in [({"layer": 3}, "layers are 3"), ({"layer": 0, "rank": 17}, "rank is 17.*from 1 to the model's width, 16"),
                             ({"layer": 0, "rank": 0}, "rank is 0"), ({"layer": 0, "position": "x"}, "positions are")]:
        with pytest.raises(ValueError, match=message):
            Interchange(model, **options)
    das = Interchange(model, 1, position=3)                               # some prompts have three tokens
    for call in (das.logits, das.accuracy, das.fit):
        with pytest.raises(ValueError, match="position 3 lies beyond a prompt of this batch"):
            call(some)
        assert model.adapters == [] and das.source is None and das.seen is None
    for call in (das.accuracy, das.fit):
        with pytest.raises(ValueError, match="there are no pairs"):
            call([])
    with pytest.raises(ValueError, match="expected ids of this model's vocabulary"):
        Interchange(model, 1).fit([Pair((1, 2, 99), (1, 2, 3), 0)])
    assert model.adapters == [] and not any(site.edits for site in model.sites().values())
