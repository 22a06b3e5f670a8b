"""Beam search against the search that tries everything, and against itself with adapters, padding and tasks.

Run:  pytest tests/test_beam.py
See:  with enough beams the best of all continuations; with one beam the greedy one.
"""

import itertools

import pytest
import small
import torch

import minireft
from minireft import Bank, DiReFT, LoReFT
from minireft.generation import generate_ids, search_ids


def log_likelihoods(model, prompt, continuations, eos):
    """Mean log p a token of each continuation, the end of text counted where it comes: one plain forward pass."""
    rows = torch.tensor([[*prompt, *c] for c in continuations])
    with torch.no_grad():
        p = model(rows, None, torch.full((len(rows),), len(prompt))).double().log_softmax(-1)           # (N, T, V)
    found = []
    for row, tokens in zip(p, continuations):
        scores = [row[len(prompt) - 1 + i, token].item() for i, token in enumerate(tokens)]
        n = tokens.index(eos) + 1 if eos in tokens else len(tokens)
        found.append(sum(scores[:n]) / n)
    return found


@pytest.mark.parametrize("attached", [None, "f1+l1", "all+generated"])
@pytest.mark.parametrize("eos", [None, 1])
def test_with_enough_beams_it_is_the_best_of_all(eos, attached):
    for seed in range(3):
        model = small.model(seed=seed, vocab_size=5)
        adapter = attached and small.randomise(LoReFT(model, positions=attached), seed).attach()
        prompts = [row.tolist() for row in (torch.tensor([3, 4, 2]), torch.tensor([2]), torch.tensor([4, 4]))]
        found = search_ids(model, prompts, 3, eos, beams=125)
        for prompt, answer in zip(prompts, found):
            everything = [list(c) for c in itertools.product(range(5), repeat=3)]
            scores = log_likelihoods(model, prompt, everything, eos)
            best = everything[max(range(len(scores)), key=scores.__getitem__)]
            assert answer == (best[: best.index(eos)] if eos in best else best)
        assert adapter is None or adapter.attached


def slow_search(model, prompt, steps, eos, beams):
    """Beam search with lists, and all tokens anew at every step."""
    kept = [(0.0, [])]
    for _ in range(steps):
        longer = []
        for score, tokens in kept:
            if eos in tokens:
                longer.append((score, tokens))
                continue
            with torch.no_grad():
                p = model(torch.tensor([prompt + tokens]), None, torch.tensor([len(prompt)]))[0, -1].log_softmax(-1).tolist()
            longer += [(score + p[token], tokens + [token]) for token in range(len(p))]
        kept = sorted(longer, key=lambda beam: -beam[0])[:beams]
    best = max(kept, key=lambda beam: beam[0] / len(beam[1]))[1]
    return best[: best.index(eos)] if eos in best else best


@pytest.mark.parametrize("beams", [2, 3])
def test_few_beams_keep_what_they_should(beams):
    ended = 0
    for seed in range(8):
        model, (row,) = small.model(seed=seed), small.rows([4], seed)
        (likely,) = generate_ids(model, [row.tolist()], 3, None)          # an end that comes soon, and frees no place
        with small.randomise(LoReFT(model, positions="l2"), seed, std=0.1):
            (found,) = search_ids(model, [row.tolist()], 6, likely[1], beams)
            assert found == slow_search(model, row.tolist(), 6, likely[1], beams)
        ended += len(found) < 6
    assert 0 < ended < 8


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_beam_is_greedy(name):
    model, prompts = small.model(name), [row.tolist() for row in small.rows([4, 1, 7])]
    for eos in (None, 1):
        assert search_ids(model, prompts, 9, eos, beams=1) == generate_ids(model, prompts, 9, eos)


def test_more_beams_find_what_greedy_misses():
    better = 0
    for seed in range(6):
        model, (row,) = small.model(seed=seed), small.rows([4], seed)
        greedy, searched = (generate_ids(model, [row.tolist()], 5, None)[0], search_ids(model, [row.tolist()], 5, None, beams=6)[0])
        a, b = log_likelihoods(model, row.tolist(), [greedy, searched], None)
        assert b >= a - 1e-5
        better += b > a + 1e-3
    assert better >= 2


@pytest.mark.parametrize("positions", ["f1+l2", "all+generated"])
def test_a_batch_of_unequal_prompts_is_each_prompt_alone(positions):
    model, prompts = small.model(), [row.tolist() for row in small.rows([4, 1, 7, 2])]
    with small.randomise(LoReFT(model, positions=positions)):
        together = search_ids(model, prompts, 6, 1, beams=4)
        assert together == [search_ids(model, [prompt], 6, 1, beams=4)[0] for prompt in prompts]
    assert together != search_ids(model, prompts, 6, 1, beams=4)          # the edits mattered


def test_every_prompt_searches_with_its_own_adapter():
    model, prompts = small.model(), ["w1 w2 w3", "w9", "w5 w5 w1 w2", "w7 w8"]
    members = {"a": small.randomise(LoReFT(model, rank=2, positions="all+generated"), 1), "b": small.randomise(DiReFT(model, positions="l2"), 2)}
    names, wanted = ["b", None, "a", "b"], []
    for prompt, name in zip(prompts, names):
        if name:
            members[name].attach()
        wanted += minireft.generate(model, model.tokenizer, [prompt], max_new_tokens=5, beams=3)
        if name:
            members[name].detach()
    bank = Bank(members)
    with bank:
        assert minireft.generate(model, model.tokenizer, prompts, max_new_tokens=5, beams=3, tasks=bank.ids(names)) == wanted


def test_ends_where_the_context_ends_and_leaves_the_model_as_it_was():
    model = small.model().train()
    (found,) = search_ids(model, [small.rows([small.CONTEXT - 2])[0].tolist()], 9, None, beams=3)
    assert len(found) == 2 and model.training
    for beams, temperature in ((0, 0.0), (-1, 0.0), (2, 0.5)):
        with pytest.raises(ValueError, match=f"beams is {beams}: expected at least 1"):
            minireft.generate(model, model.tokenizer, ["w1"], beams=beams, temperature=temperature)
