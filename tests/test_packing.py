"""Packing: several examples in a row give the loss, the noise and the gradients of a row for each.

Run:  pytest tests/test_packing.py
See:  noise equal to the bit, training equal within rounding; what needs a row of its own is refused.
"""

import pytest
import small
import torch
from hypothesis import given
from hypothesis import strategies as st

import minireft
from minireft import IA3, Bank, Example, LoRA, LoReFT, NEFTune, TrainConfig
from minireft.data import Encoded, collate, pack
from minireft.losses import OBJECTIVES


def examples(lengths, seed=0):
    """One for each length; prompts of 0 tokens (the first is not predicted then) to all but one."""
    return [Encoded(row.tolist(), i % len(row)) for i, row in enumerate(small.rows(lengths, seed))]


def embedded(model, adapter, batch, rows=None, step=3):
    """What comes out of the embedding: (B, T, C)."""
    model.train()
    with adapter:
        adapter.begin(step, rows)
        with small.tapped(model, "embed") as taps:                        # behind the noise
            with torch.no_grad():
                model.stream(batch.tokens, batch.mask)
    return taps["embed"].seen[0]


# ---- the rows

@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(9, 20))
def test_every_example_lies_in_one_piece_in_the_first_row_with_room(lengths, most):
    rows = examples(lengths)
    batch, room = pack(rows, most), []
    assert batch.mask.dtype == torch.int64 and batch.tokens.shape[1] <= most and batch.prompt_lengths is None
    for i, row in enumerate(rows):                                        # first fit, over again
        n = len(row.ids)
        at = next((k for k, left in enumerate(room) if left >= n), len(room))
        room += [most] * (at == len(room))
        begin, room[at] = most - room[at], room[at] - n
        mine = slice(begin, begin + n)
        assert batch.tokens[at, mine].tolist() == row.ids and batch.example[at, mine].eq(i).all()
        assert batch.mask[at, mine].eq(batch.mask[at, begin]).all() and batch.mask[at].eq(batch.mask[at, begin]).sum() == n
        assert batch.answer[at, mine].tolist() == [k >= max(1, row.prompt_length) for k in range(n)]
    assert len(batch.tokens) == len(room) and (batch.mask > 0).sum() == sum(lengths)
    assert not batch.answer[batch.mask == 0].any()


@given(st.lists(st.integers(2, 8), min_size=1, max_size=6))
def test_the_loss_is_that_of_a_row_for_each(lengths):
    model, rows = small.model(dtype=torch.float64), examples(lengths)
    together, apart = pack(rows, small.CONTEXT), collate(rows)
    total = [OBJECTIVES["lm"].total(batch.through(model), batch) for batch in (together, apart)]
    torch.testing.assert_close(*total, rtol=1e-6, atol=1e-6)                 # the loss is summed in float32


# ---- the noise

@pytest.mark.parametrize("distribution", ("uniform", "gaussian"))
@pytest.mark.parametrize("word", (True, False))
def test_packed_noise_is_that_of_a_row_for_each_to_the_bit(distribution, word):
    model, rows = small.model(), examples([7, 3, 9, 1, 5, 8])
    adapter, ids = NEFTune(model, alpha=5.0, distribution=distribution), torch.tensor([4, 9, 2**33, 0, 7, 5])
    together, apart = pack(rows, small.CONTEXT), collate(rows)
    if not word:                                                          # nobody says whose: rows and documents are numbered through
        order = [i for line in together.example for i in dict.fromkeys(line.tolist())]
        assert order != list(range(6)) or len(together.tokens) > 1
        apart = collate([rows[i] for i in order])
    x = embedded(model, adapter, together, ids[together.example] if word else None)
    y = embedded(model, adapter, apart, ids if word else None)
    for i in range(6):
        mine = together.example.eq(i) & (together.mask > 0)
        at = i if word else order.index(i)
        assert torch.equal(x[mine], y[at][apart.mask[at]])
        assert not torch.equal(x[mine], model.embed.weight[together.tokens[mine]])
    assert torch.equal(x[together.mask == 0], model.embed.weight[together.tokens[together.mask == 0]])         # none on padding


def test_each_document_scales_by_its_own_length_and_padded_by_the_row():
    model = small.model(width=512, head_dim=4, layers=1)
    batch = pack(examples([12, 6, 3]), small.CONTEXT)                     # one row of 21 tokens
    for length, wanted in (("real", [12, 6, 3]), ("padded", [21, 21, 21])):
        noise = (embedded(model, NEFTune(model, alpha=5.0, length=length), batch) - model.embed.weight[batch.tokens])[0]
        for i, T in enumerate(wanted):
            top = noise[batch.example[0] == i].abs().max()
            bound = 5.0 / (T * 512) ** 0.5
            assert 0.99 * bound < top <= bound * (1 + 1e-4)


# ---- training

@pytest.mark.parametrize("accumulate", (1, 2))
@pytest.mark.parametrize("method", ("full", "IA3", "LoRA"))
def test_training_on_packed_rows_is_training_on_a_row_for_each(method, accumulate):
    found = []
    for packed in (False, True):
        model = small.model(dtype=torch.float64)
        torch.manual_seed(0)
        adapter = {"full": lambda: [], "IA3": lambda: [IA3(model).double()], "LoRA": lambda: [LoRA(model, rank=2).double()]}[method]()
        config = TrainConfig(steps=6, batch_size=8, accumulate=accumulate, lr=1e-2, pack=packed, full=method == "full")
        widths = []
        watch = lambda operation, context: lambda ids: widths.append(tuple(ids.shape)) or operation(ids)
        watch.adapter = None
        noise = NEFTune(model, alpha=20.0)
        noise.attach()
        model.embed.edits.append(watch)
        run = minireft.train(model, [*adapter, noise], examples([7, 3, 9, 2, 5, 8, 4, 6, 3, 10]), config, progress=False)
        found.append((run.losses, [p.detach() for p in (adapter or [model])[0].parameters()], widths))
    (losses, parameters, widths), (packed_losses, packed_parameters, packed_widths) = found
    assert sum(B for B, _ in packed_widths) < sum(B for B, _ in widths) / 2                # there are fewer rows
    torch.testing.assert_close(torch.tensor(packed_losses), torch.tensor(losses), rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(packed_parameters, parameters):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


# ---- what needs a row of its own

def test_what_cannot_share_a_row_is_refused_before_the_first_step(tmp_path):
    config, words = TrainConfig(steps=1, batch_size=2, pack=True), [Example("w1", "w2", ("w2", "w3"))]
    model = small.model()
    head = minireft.Classifier(model, ("w2", "w3"))
    for model, adapters, changes, message in [
            (model, [head], {}, "a classifier"), (model, [LoRA(model)], {"losses": ("lm", "length")}, "choices"),
            (model, [Bank({"a": IA3(model)})], {}, "a bank's tasks"), (small.model("two"), [], {"full": True}, "an encoder–decoder"),
            (model, [LoReFT(model, rank=1)], {}, "train ReFT and its kin on rows that are not packed")]:
        before = small.bits(model)
        task = [Example("w1", "w2", ("w2", "w3"), task="a")] if isinstance((adapters or [0])[0], Bank) else words
        with pytest.raises(ValueError, match=message):
            minireft.train(model, adapters, task, minireft.training.replace(config, **changes), progress=False)
        assert small.same_bits(small.bits(model), before) and model.adapters == [] and not model.training
    with pytest.raises(ValueError, match="example 1 of 9 tokens cannot be packed: .* of 8 tokens at most"):
        pack(examples([8, 9]), 8)
    with pytest.raises(ValueError, match="example 0 .* without choices or classes"):
        pack([Encoded([3, 4, 5], 1, wrong=([3, 6],))], 8)


@pytest.mark.parametrize("documents", ([1, 1, 2, 1], [1, 0, 1, 2], [2, 2, 3, 2], [1, -1, 2, 2]))
def test_boundaries_that_do_not_add_up_are_an_error(documents):
    tokens = torch.stack(small.rows([4]))
    with pytest.raises(ValueError, match="one unbroken piece of its row, and 0 for padding"):
        small.model()(tokens, torch.tensor([documents]))


@pytest.mark.parametrize("documents", ([1, 1, 2, 2], [0, 1, 2, 0], [7, 3, 0, 5], [0, 0, 0, 0]))
def test_boundaries_that_add_up_are_none(documents):
    assert small.model()(torch.stack(small.rows([4])), torch.tensor([documents])).isfinite().all()
