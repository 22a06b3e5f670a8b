"""Generation: the cache against plain passes over everything, batches against single prompts, draws that repeat.

Run:  pytest tests/test_generation.py
See:  with and without adapters, the tokens that a model without a cache would choose.
"""

import pytest
import small
import torch

import minireft
from minireft import IA3, DiReFT, LoRA, LoReFT, generate
from minireft.adapters import edits
from minireft.generation import generate_ids, pick

PROMPTS = [row.tolist() for row in small.rows([5, 1, 9, 3])]


def without_cache(model, prompt, count, eos=None):
    """Greedy, the whole sequence anew for every token; edits at the prompt's positions."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), prompt_lengths=torch.tensor([len(prompt)]))
        ids.append(logits[0, -1].argmax().item())
        if ids[-1] == eos or len(ids) == model.config.context:
            break
    return ids[len(prompt) :] if ids[-1] != eos else ids[len(prompt) : -1]


ADAPTERS = {
    "none": lambda m: [],
    "LoReFT": lambda m: [LoReFT(m, rank=2, positions="f2+l2", tied=False)],
    "LoReFT on all": lambda m: [LoReFT(m, rank=2, positions="all")],
    "LoReFT on generated": lambda m: [LoReFT(m, rank=2, positions="all+generated")],
    "DiReFT of keys": lambda m: [DiReFT(m, rank=2, positions="l1", site="key")],
    "IA3": lambda m: [IA3(m, sites=("key", "value", "ffn", "query"))],
    "several": lambda m: [LoReFT(m, rank=1, positions="l1", layers=1), LoRA(m, rank=2), IA3(m)],
}


@pytest.mark.parametrize("name", small.CONFIGS)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_greedy_is_what_plain_passes_choose_batched_or_not(kind, name):
    model = small.model(name)
    adapters = [small.randomise(adapter).attach() for adapter in ADAPTERS[kind](model)]
    for eos in (None, 7):
        expected = [without_cache(model, prompt, 8, eos) for prompt in PROMPTS]
        assert [generate_ids(model, [prompt], 8, eos)[0] for prompt in PROMPTS] == expected
        assert generate_ids(model, PROMPTS, 8, eos) == expected
        assert generate_ids(model, PROMPTS[::-1], 8, eos) == expected[::-1]
    assert all(adapter.attached for adapter in adapters)


@pytest.mark.parametrize("name", small.CONFIGS)
def test_rows_end_by_themselves(name):
    """At the end of text, at the count, or where their own context is full: the others in the batch do not matter."""
    model = small.model(name)
    prompts = [*PROMPTS, *(row.tolist() for row in small.rows([23, 20, 14], seed=3))]
    free = [without_cache(model, prompt, 99) for prompt in prompts]
    assert [len(row) for row in free] == [24 - len(prompt) for prompt in prompts]
    assert generate_ids(model, prompts, 99, None) == free
    assert generate_ids(model, prompts, 5, None) == [row[:5] for row in free]
    for eos in sorted({token for row in free for token in row[:6]})[:4]:
        assert generate_ids(model, prompts, 99, eos) == [row[: row.index(eos)] if eos in row else row for row in free]


def test_the_edit_happens_once_in_the_prefill(monkeypatch):
    model, calls = small.model(), []
    true = edits.ops.low_rank_edit_at_
    monkeypatch.setattr(edits.ops, "low_rank_edit_at_", lambda h, *more: calls.append(h.shape) or true(h, *more))
    for positions, expected in (("f2+l2", [(4, 9, 16)] * 3), ("all+generated", [(4, 9, 16)] * 3 + [(4, 1, 16)] * 12)):
        calls.clear()
        with LoReFT(model, positions=positions):
            generate_ids(model, PROMPTS, 5, None)
        assert [tuple(shape) for shape in calls] == expected


def test_text_in_and_text_out():
    model = small.model()
    texts = generate(model, model.tokenizer, ["w1 w2", "w5"], max_new_tokens=6)
    ids = [model.tokenizer.encode(text) for text in ("w1 w2", "w5")]
    assert texts == [model.tokenizer.decode(without_cache(model, row, 6, model.tokenizer.eos_id)) for row in ids]
    assert generate(model, model.tokenizer, []) == []


def test_the_mode_and_gradients_are_as_before():
    model = small.model().train()
    assert torch.is_grad_enabled()
    generate(model, model.tokenizer, ["w1"], max_new_tokens=2)
    assert model.training and model.blocks[0].training and torch.is_grad_enabled()
    adapter = LoReFT(model)
    adapter.prepare = lambda *_: 1 / 0
    with adapter, pytest.raises(ZeroDivisionError):
        generate(model, model.tokenizer, ["w1"], max_new_tokens=2)
    assert model.training and torch.is_grad_enabled()


# ----------------------------------------------------------------------------------------------------------------- drawing

def test_pick_draws_from_the_nucleus_with_the_right_shares():
    p = torch.tensor([0.4, 0.05, 0.3, 0.1, 0.15])
    logits, n = p.log().expand(20000, -1), 20000
    for temperature, top_p, kept in [(1.0, 1.0, [0, 1, 2, 3, 4]), (1.0, 0.5, [0, 2]), (1.0, 0.7, [0, 2]), (1.0, 0.71, [0, 2, 4]), (1.0, 0.01, [0]),
                                     (0.5, 1.0, [0, 1, 2, 3, 4]), (2.0, 0.6, [0, 2, 4])]:
        q = p ** (1 / temperature)
        q = q / q.sum()
        share = torch.zeros(5)
        share[kept] = q[kept] / q[kept].sum()
        drawn = pick(logits, temperature, top_p - 1e-4 if top_p == 0.7 else top_p, torch.Generator().manual_seed(0)).bincount(minlength=5) / n
        assert (drawn[share == 0] == 0).all(), (temperature, top_p)
        assert ((drawn - share).abs() <= 5 * (share * (1 - share) / n).sqrt()).all()        # five standard errors
    assert pick(torch.tensor([[0.1, 2.0, 1.0]]), 0.0, 0.3, None).tolist() == [1]


def test_a_seed_repeats_a_draw():
    model = small.model()

    def draw(**more):
        return generate(model, model.tokenizer, ["w1 w2", "w3", "w4 w5 w6"], max_new_tokens=8, **more)
    torch.manual_seed(1)
    first = draw(temperature=1.5, seed=3)
    torch.manual_seed(2)                                                  # torch's own generator is not asked
    before = torch.get_rng_state()
    assert draw(temperature=1.5, seed=3) == first and torch.equal(torch.get_rng_state(), before)
    assert draw(temperature=1.5, seed=4) != first
    assert draw(temperature=1.5, seed=3, top_p=0.01) == draw() == draw(temperature=1e-3, seed=5)         # the likeliest only


@pytest.mark.parametrize("options, words", [
    ({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"temperature": -1.0}, "temperature is -1.0"), ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_p": 0.0}, "top_p is 0.0"), ({"top_p": 1.1}, "top_p is 1.1"), ({"prompts": "w1"}, "prompts are one string, 'w1'"),
    ({"prompts": ["w1", " "]}, "the prompt is ' '"), ({"prompts": ["w1 " * 24]}, "24 tokens does not fit the context of 23"),
    ({"prompts": ["w1 zebra"]}, "'zebra' not in the vocabulary"), ({"beams": 0}, "beams is 0"), ({"beams": 2, "temperature": 1.0}, "beams is 2")])
def test_bad_requests_are_named(options, words):
    model = small.model()
    with pytest.raises(ValueError, match=words):
        generate(model, model.tokenizer, **{"prompts": ["w1"], **options})


def test_generation_in_half_precision():
    model = small.model(dtype=torch.bfloat16)
    with small.randomise(LoReFT(model, positions="f1+l1")), small.randomise(IA3(model)):
        texts = generate(model, model.tokenizer, ["w1 w2", "w3"], max_new_tokens=4)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
    assert minireft.generate(model, model.tokenizer, ["w1 w2"], max_new_tokens=4, temperature=1.0)
