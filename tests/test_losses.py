"""T-Few's losses against a slow version: one example, one choice and one token at a time, in float64.

Run:  pytest tests/test_losses.py
See:  nothing changes with padding, the order of choices or the pieces of a batch, and L_UL does not see the right choice.
"""

import math
from dataclasses import replace

import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minireft.data import Encoded, collate
from minireft.losses import OBJECTIVES, cross_entropy, mean_log_p

V = 13
ALL = ("lm", "unlikelihood", "unlikelihood_smoothed", "length")


@st.composite
def examples(draw, least=1):
    """Examples with prompts, right answers and two to four choices of unequal lengths; some prompts are empty."""
    def ids(low, high):
        return draw(st.lists(st.integers(0, V - 1), min_size=low, max_size=high))
    found = []
    for _ in range(draw(st.integers(least, 4))):
        prompt = ids(0, 4)
        answers = [ids(1 if prompt else 2, 4) for _ in range(draw(st.integers(2, 4)))]
        found.append(Encoded(prompt + answers[0], len(prompt), wrong=tuple(prompt + answer for answer in answers[1:])))
    return found


def model(tokens, sharp=1.0, seed=0):
    """Logits that depend on a row's tokens so far and on nothing else, as a decoder's: (B, T) → (B, T, V)."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(V, V, generator=generator, dtype=torch.float64)
    return sharp * table[tokens].cumsum(1)


def log_p(ids, start, **options):
    """[(log p of the token, that of every token)] of ids[start:], from logits of one row alone."""
    p = model(torch.tensor([ids]), **options)[0].log_softmax(-1)
    return [(p[t - 1, ids[t]].item(), p[t - 1].tolist()) for t in range(max(1, start), len(ids))]


def slow(name, rows, **options):
    """A loss of a batch as the paper writes it."""
    def rest(every, own):                                                 # 1 − p without a difference of near numbers
        left = list(every)
        left.remove(own)
        return math.fsum(map(math.exp, left))
    if name == "lm":
        terms = [p for row in rows for p, _ in log_p(row.ids, row.prompt_length, **options)]
        return -sum(terms) / len(terms)
    if name.startswith("unlikelihood"):
        constant = 0.01 if name.endswith("smoothed") else 0.0
        terms = [math.log(rest(every, p) + constant) for row in rows for ids in row.wrong
                 for p, every in log_p(ids, row.prompt_length, **options)]
        return -sum(terms) / len(terms)
    total = 0.0
    for row in rows:
        betas = []
        for ids in (row.ids, *row.wrong):
            terms = [p for p, _ in log_p(ids, row.prompt_length, **options)]
            betas.append(sum(terms) / len(terms))
        total -= betas[0] - math.log(sum(map(math.exp, betas)))
    return total / len(rows)


def fast(name, rows, pad=0, pieces=1, **options):
    """The same as the trainer forms it."""
    objective, total = OBJECTIVES[name], 0.0
    for first in range(0, len(rows), -(-len(rows) // pieces)):
        batch = collate(rows[first : first + -(-len(rows) // pieces)], pad)
        total += objective.total(model(batch.tokens, **options), batch).item()
    return total / sum(map(objective.count, rows))


@pytest.mark.parametrize("name", ALL)
@given(rows=examples(), sharp=st.sampled_from((0.1, 1.0, 3.0)), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_losses_are_those_of_the_paper(name, rows, sharp, seed):
    assert fast(name, rows, sharp=sharp, seed=seed) == pytest.approx(slow(name, rows, sharp=sharp, seed=seed), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ALL)
@given(rows=examples(least=2), data=st.data())
@settings(max_examples=25, deadline=None)
def test_neither_padding_nor_order_nor_pieces_matter(name, rows, data):
    expected = fast(name, rows)
    longer = [*rows, Encoded([1] * 30, 29, wrong=([1] * 29 + [2],))]      # its rows only pad those of the others
    batch = collate(longer, pad=data.draw(st.integers(0, V - 1)))
    keep = batch.example < len(rows)
    logits = torch.where(batch.mask[..., None], model(batch.tokens), torch.randn(*batch.tokens.shape, V) * 50)
    without = replace(batch, **{name: getattr(batch, name)[keep] for name in ("tokens", "mask", "answer", "example", "choice")})
    padded = OBJECTIVES[name].total(logits[keep], without).item() / sum(map(OBJECTIVES[name].count, rows))
    mixed = [replace(row, wrong=tuple(data.draw(st.permutations(row.wrong)))) for row in data.draw(st.permutations(rows))]
    for other in (padded, fast(name, mixed), fast(name, rows, pieces=2), fast(name, rows, pad=3)):
        assert other == pytest.approx(expected, rel=1e-4, abs=1e-6)


@given(rows=examples(), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_each_loss_sees_its_own_choices(rows, seed):
    """L_UL is blind to the right choice, L_LM to the wrong ones; L_LN pulls the right one up and every wrong one down."""
    batch = collate(rows)
    for name in ALL:
        logits = model(batch.tokens, seed=seed).requires_grad_()
        OBJECTIVES[name].total(logits, batch).backward()
        seen = (logits.grad != 0).flatten(1).any(1)                       # (B,)
        assert seen.equal({"lm": batch.choice == 0, "length": torch.ones_like(seen)}.get(name, batch.choice > 0))
    at = batch.answer.nonzero()
    own = logits.grad[at[:, 0], at[:, 1] - 1, batch.tokens[at[:, 0], at[:, 1]]][at[:, 1] > 0]           # by "length", the last
    right = (batch.choice == 0)[at[:, 0]][at[:, 1] > 0]
    assert (own[right] < 0).all() and (own[~right] > 0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_certainty_is_no_trap(dtype):
    """Where p rounds to 1, log(1 − p) must stay finite, and its gradient is p; where p is tiny it must not vanish."""
    batch = collate([Encoded([1, 2], 1, wrong=([1, 3],))])
    for logit in (-60.0, -20.0, 0.0, 20.0, 60.0, 500.0):
        z = torch.zeros(2, 2, V, dtype=dtype)
        z[1, 0, 3] = logit
        z.requires_grad_()
        loss = OBJECTIVES["unlikelihood"].total(z, batch)
        loss.backward()
        odds = logit - math.log(V - 1)
        exact = math.log1p(math.exp(odds)) if odds < 30 else odds
        assert loss.item() == pytest.approx(exact, rel=1e-5)
        assert z.grad[1, 0, 3].item() == pytest.approx(1 / (1 + math.exp(-odds)), rel=1e-2) and z.grad.isfinite().all()
    smoothed = OBJECTIVES["unlikelihood_smoothed"].total(z.detach(), batch).item()
    assert smoothed == pytest.approx(-math.log(0.01), rel=1e-5)           # where the authors' loss ends


def test_the_authors_smoothing_by_their_formula():
    """−log(1 − exp(log p) + 1e-2) over the wrong choices' tokens: the value without what padding adds there, the same gradient."""
    rows = [Encoded([1, 2, 3, 4], 1, wrong=([1, 5], [1, 6, 7])), Encoded([2, 2, 9], 2, wrong=([2, 2, 1, 1, 1, 8],))]
    batch = collate(rows)
    z = model(batch.tokens).float().requires_grad_()
    ours = OBJECTIVES["unlikelihood_smoothed"].total(z, batch) / sum(map(OBJECTIVES["unlikelihood_smoothed"].count, rows))
    ours.backward()
    gradient, z.grad = z.grad, None
    likely = z[:, :-1].log_softmax(-1).gather(2, batch.tokens[:, 1:, None])[..., 0]       # (B, T − 1)
    counted = batch.answer[:, 1:] & (batch.choice > 0)[:, None]
    theirs = -torch.log(1 - likely.masked_fill(~counted, -100).exp() + 1e-2).sum() / counted.sum()
    theirs.backward()
    torch.testing.assert_close(gradient, z.grad, rtol=1e-3, atol=1e-6)
    added = (~counted).sum() / counted.sum() * math.log(1.01)
    assert ours.item() == pytest.approx((theirs + added).item(), rel=1e-4) and added > 0.005


def test_beta_is_what_ranks():
    batch = collate([Encoded([1, 2, 3], 1, wrong=([1, 4],)), Encoded([5, 6, 7, 8], 2, wrong=([5, 6, 9], [5, 6, 1, 2, 3]))])
    betas = mean_log_p(model(batch.tokens), batch)
    rows = ([1, 2, 3], 1), ([1, 4], 1), ([5, 6, 7, 8], 2), ([5, 6, 9], 2), ([5, 6, 1, 2, 3], 2)
    for beta, (ids, n) in zip(betas.tolist(), rows, strict=True):
        terms = [p for p, _ in log_p(ids, n)]
        assert beta == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert batch.example.tolist() == [0, 0, 1, 1, 1] and batch.choice.tolist() == [0, 1, 0, 1, 2]


def test_without_choices_the_first_loss_is_the_plain_one():
    rows = [Encoded(row.tolist(), 2) for row in small.rows([4, 7, 3])]
    batch = collate(rows)
    logits = torch.randn(3, 7, small.V)
    total = OBJECTIVES["lm"].total(logits, batch) / sum(map(OBJECTIVES["lm"].count, rows))
    assert torch.equal(total, cross_entropy(logits, batch.tokens, batch.answer))


@pytest.mark.parametrize("kind", small.BOTH)
def test_an_encoder_decoder_scores_the_same_choices(kind):
    """The paper's setting: the prompt is the encoder's, each choice the decoder's, one by one and without padding here."""
    base = small.model(kind, dtype=torch.float64)
    rows = [Encoded([5, 6, 7, 8, 2], 2, wrong=([5, 6, 9, 2], [5, 6, 10, 11, 12, 2])), Encoded([4, 3, 2], 1, wrong=([4, 9, 8, 2],))]
    batch = collate(rows, start=base.config.start)
    logits, choices = batch.through(base), []
    for row in rows:
        choices.append([])
        for ids in (row.ids, *row.wrong):
            prompt, answer = ids[: row.prompt_length], ids[row.prompt_length :]
            p = base(torch.tensor([prompt]), decoder_tokens=torch.tensor([[base.config.start, *answer]]))[0].log_softmax(-1)
            choices[-1].append([p[t, token].item() for t, token in enumerate(answer)])
    right, wrong = ([p for example in choices for one in example[part] for p in one] for part in (slice(1), slice(1, None)))
    betas = [[sum(one) / len(one) for one in example] for example in choices]
    expected = {"lm": -sum(right) / len(right), "unlikelihood": -sum(math.log1p(-math.exp(p)) for p in wrong) / len(wrong),
                "length": sum(math.log(sum(map(math.exp, b))) - b[0] for b in betas) / 2}
    for name, value in expected.items():
        ours = OBJECTIVES[name].total(logits, batch) / sum(map(OBJECTIVES[name].count, rows))
        assert ours.item() == pytest.approx(value, rel=1e-5)
