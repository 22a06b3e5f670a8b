"""Evaluation against slow, plain versions: one choice and one token at a time.

Run:  pytest tests/test_evaluation.py
See:  the likeliest choice by mean log-likelihood a token; the greedy answer, token for token; errors by question.
"""

import random
from dataclasses import replace
from statistics import fmean, pstdev

import pytest
import small
import torch

from minireft import IA3, Example, LoReFT, evaluate
from minireft.data import Encoded, encode
from minireft.evaluation import Scores, clustered_error, mean_log_likelihoods


def draw(count, seed=0):
    """Examples of prompts and choices of unequal length."""
    r = random.Random(seed)
    def words(n):
        return " ".join(r.choice(small.WORDS) for _ in range(n))
    found = []
    for _ in range(count):
        choices = tuple(dict.fromkeys(words(r.randint(1, 4)) for _ in range(r.randint(2, 4))))
        found.append(Example(words(r.randint(1, 8)), r.choice(choices), choices))
    return found


def slow_beta(model, row):
    with torch.no_grad():
        p = model(torch.tensor([row.ids]), prompt_lengths=torch.tensor([row.prompt_length]))[0].double().log_softmax(-1)
    terms = [p[t - 1, row.ids[t]].item() for t in range(row.prompt_length, len(row.ids))]
    return sum(terms) / len(terms)


def slow_answer(model, prompt, count, eos):
    ids = list(prompt)
    while len(ids) < len(prompt) + count and len(ids) < model.config.context:
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]), prompt_lengths=torch.tensor([len(prompt)]))[0, -1].argmax().item())
        if ids[-1] == eos:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def test_scores_are_those_of_the_slow_way():
    model = small.model()
    tokenizer, examples = model.tokenizer, draw(30)
    for seed in range(6, 12):                                             # some answers made right, so that exact has something to count
        prompt = tokenizer.encode(examples[seed].prompt)
        answer = slow_answer(model, prompt, 3, tokenizer.eos_id)
        examples[seed] = Example(examples[seed].prompt, tokenizer.decode(answer) or "w1", (tokenizer.decode(answer) or "w1", "w2 w2"))
    adapters = small.randomise(LoReFT(model, positions="f2+l1", rank=2), std=0.1), small.randomise(IA3(model), std=0.1)
    for attached in (False, True):
        if attached:
            for adapter in adapters:
                adapter.attach()
        right, exact = [], []
        for e in examples:
            betas = {c: slow_beta(model, encode(tokenizer, Example(e.prompt, c), 24)) for c in e.choices}
            right.append(max(betas, key=betas.get) == e.completion)
            wanted = tokenizer.encode(e.completion)
            prompt = tokenizer.encode(e.prompt)
            exact.append(slow_answer(model, prompt, len(wanted) + 1, tokenizer.eos_id) == wanted)
        for batch_size in (64, 7, 1):
            scores = evaluate(model, tokenizer, examples, batch_size=batch_size)
            assert scores.rank == sum(right) / 30 and scores.exact == sum(exact) / 30 and scores.n == 30
        assert 0 < sum(right) < 30


def test_an_answer_counts_as_exact_only_when_it_ends():
    model = small.model()
    prompt = model.tokenizer.encode("w1 w2")
    endless = slow_answer(model, prompt, 6, None)
    if model.tokenizer.eos_id in endless:
        endless = endless[: endless.index(model.tokenizer.eos_id)]
    assert len(endless) >= 2
    prefix = model.tokenizer.decode(endless[:1])
    assert evaluate(model, model.tokenizer, [Example("w1 w2", prefix)], metrics=("exact",)).exact == 0.0      # it goes on after that
    said = evaluate(model, model.tokenizer, [Example("w1 w2", prefix)]).answers
    assert len(said) == 1 and said[0].startswith(prefix)


def test_likelihoods_do_not_depend_on_the_batch():
    model = small.model(dtype=torch.float64)
    rows = [Encoded(row.tolist(), n) for row, n in zip(small.rows([5, 9, 3, 24, 2]), (1, 8, 2, 5, 1))]
    small.randomise(LoReFT(model, positions="l2")).attach()               # edits the prompt's last tokens, never the completion's
    expected = [slow_beta(model, row) for row in rows]
    for batch_size in (1, 2, 64):
        assert mean_log_likelihoods(model, rows, batch_size) == pytest.approx(expected, rel=1e-5)
    assert mean_log_likelihoods(model.train(), rows) == pytest.approx(expected, rel=1e-5) and model.training


def test_a_prompt_near_the_context_does_not_cut_its_neighbours():
    model, tokenizer = small.model(), small.model().tokenizer
    short = tokenizer.decode(slow_answer(model, tokenizer.encode("w3"), 4, tokenizer.eos_id))
    alone = evaluate(model, tokenizer, [Example("w3", short)], metrics=("exact",)).answers[0]
    together = evaluate(model, tokenizer, [Example("w3", short), Example("w1 " * 23, "w2 w3 w4 w5")], metrics=("exact",)).answers[0]
    assert together.split()[: len(alone.split())] == alone.split() and alone


def test_standard_errors_and_the_line_that_is_printed():
    rank = [1.0] * 320 + [0.0] * 80
    assert clustered_error(rank, range(400)) == pytest.approx((0.8 * 0.2 / 400) ** 0.5) == pytest.approx(0.02)
    assert str(Scores(400, 0.8, errors={"rank": 0.02}, questions=400)) == "rank 0.800 ± 0.020 on 400 examples"
    both = Scores(100, 0.5, 1.0, errors={"rank": 0.05, "exact": 0.0}, questions=25)
    assert str(both) == "rank 0.500 ± 0.050, exact 1.000 ± 0.000 on 100 examples of 25 questions"


def test_the_wordings_of_one_question_are_one_draw():
    """Four wordings that are right or wrong together tell as little as one; what differs within a question averages out of it."""
    of_questions = [0.0, 1.0, 1.0, 0.25, 0.5]
    repeated, questions = [x for x in of_questions for _ in range(4)], [q for q in range(5) for _ in range(4)]
    assert clustered_error(repeated, questions) == pytest.approx(pstdev(of_questions) / 5**0.5)
    assert clustered_error(repeated, questions) == pytest.approx(2 * clustered_error(repeated, range(20)))      # √4 times the naive one
    draw = random.Random(0)
    moved = [x + dx for x in of_questions for dx in draw.sample((-0.3, -0.1, 0.1, 0.3), 4)]
    assert clustered_error(moved, questions) == pytest.approx(pstdev(of_questions) / 5**0.5)
    mean = fmean([1, 1, 0, 0, 0])                                         # unequally many: weighed by how often they stand
    assert clustered_error([1, 1, 0, 0, 0], "aabcc") == pytest.approx(((2 * (1 - mean)) ** 2 + mean**2 + (2 * mean) ** 2) ** 0.5 / 5)


def test_evaluation_knows_the_wordings_by_their_id():
    model = small.model()
    drawn = [replace(e, id=i // 3) for i, e in enumerate(e for e in draw(60, seed=3) if len(e.choices) > 1)]
    scores = evaluate(model, model.tokenizer, drawn, ("rank", "exact", "loss"))
    alone = evaluate(model, model.tokenizer, [replace(e, id=None) for e in drawn], ("rank", "loss"))
    each = [evaluate(model, model.tokenizer, [e], ("rank", "loss")) for e in drawn]
    questions = [e.id for e in drawn]
    for name in ("rank", "loss"):
        values = [getattr(one, name) for one in each]
        assert scores.errors[name] == pytest.approx(clustered_error(values, questions)) and getattr(scores, name) == getattr(alone, name)
        assert alone.errors[name] == pytest.approx(pstdev(values) / len(values) ** 0.5) != pytest.approx(scores.errors[name], rel=0.01)
    assert scores.questions == len(set(questions)) < alone.questions == len(drawn)
    apart = [replace(drawn[0], task=task, format=format) for task in (None, "a", "b") for format in ("prompts", "sst2")]
    assert evaluate(model, model.tokenizer, apart, ("rank",)).questions == 6              # other tasks' rows of that number


def test_without_choices_nothing_is_ranked():
    model = small.model()
    scores = evaluate(model, model.tokenizer, [Example("w1", "w2"), Example("w1", "w2", ("w2", "w3"))])
    assert scores.rank is None and scores.exact is not None
    assert evaluate(model, model.tokenizer, [Example("w1", "w2", ("w2", "w3"))], metrics=("rank",)).exact is None


def test_without_length_normalisation_the_sum_ranks():
    """A short unlikely choice against a long one of likelier tokens: the mean prefers one, the sum the other."""
    model, examples = small.model(), [e for e in draw(60, seed=3) if len(e.choices) > 1][:40]
    sums, means = [], []
    for e in examples:
        rows = {c: encode(model.tokenizer, Example(e.prompt, c), 24) for c in e.choices}
        mean = {c: slow_beta(model, row) for c, row in rows.items()}
        total = {c: mean[c] * (len(row.ids) - row.prompt_length) for c, row in rows.items()}
        means.append(max(mean, key=mean.get) == e.completion)
        sums.append(max(total, key=total.get) == e.completion)
    assert sum(means) != sum(sums)
    for normalised, right in ((True, means), (False, sums)):
        assert evaluate(model, model.tokenizer, examples, ("rank",), length_normalised=normalised).rank == sum(right) / 40


def test_the_order_of_choices_and_ties_help_nobody():
    model, examples = small.model(), draw(30, seed=5)
    turned = [Example(e.prompt, e.completion, e.choices[::-1]) for e in examples]
    assert evaluate(model, model.tokenizer, examples, ("rank",)) == evaluate(model, model.tokenizer, turned, ("rank",))
    model.embed.weight.data.zero_()                                       # every token is as likely as every other
    assert evaluate(model, model.tokenizer, [Example("w1", "w2", ("w2", "w3")), Example("w1", "w2", ("w4", "w2"))], ("rank",)).rank == 0.0


def test_the_mode_is_restored_and_errors_are_named():
    model = small.model().train()
    for examples, words in [([], "no examples"), ([Example("w1", "w9", ("w2", "w3"))], "'w9' is not among the choices"),
                            ([Example("w1", "w2", ("w2",))], "nothing to choose from"), ([Example("w1", "w2", ("w2", " "))], "' ' of 'w1' has no tokens"),
                            ([Example("w1 nothing", "w2")], "'nothing' not in the vocabulary"), ([Example(" ", "w2")], "the prompt is ' '")]:
        with pytest.raises(ValueError, match=words):
            evaluate(model, model.tokenizer, examples)
        assert model.training and torch.is_grad_enabled()
    for metrics, words in ((("rank",), r"nothing to choose from: \(\) of 'w1'"), (("bleu",), "metrics are .*: expected some of rank, exact")):
        with pytest.raises(ValueError, match=words):
            evaluate(model, model.tokenizer, [Example("w1", "w2", ("w2", "w3")), Example("w1", "w2")], metrics)
