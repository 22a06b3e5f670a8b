"""The few-shot tasks and the benchmark that stands on them: right answers, disjoint parts, a bill that adds up.

Run:  pytest tests/test_few_shot.py
See:  every text in the base's words, every answer the world's, and FLOPs counted as they are calculated by hand.
"""

import pytest
import torch

import minireft
from benchmarks import tfew
from minireft.data import encode
from minireft.tasks import few_shot
from minireft.tasks.facts import WORDINGS
from minireft.tasks.world import BAD, GOOD, VOCABULARY, World

TOKENIZER = minireft.Tokenizer.from_words(VOCABULARY)
NAMES = few_shot.names()


def good(clause: str) -> bool:
    """"the soup was not bad": the mood of a clause."""
    word = clause.split()[-1]
    assert word in GOOD or word in BAD
    return (word in GOOD) != (" not " in clause)


def truth(name: str, example: minireft.Example, world=World()) -> str:
    """How the right choice begins, worked out from the text alone."""
    text = example.prompt
    if name in ("mood", "labels"):
        clauses = [part[part.index("the ") :] for part in text.split(" , ")]
        moods = {good(" ".join(clause.split()[: 5 if "not" in clause.split()[:4] else 4])) for clause in clauses}
        (mood,) = moods
        return {("mood", True): "up ,", ("mood", False): "down ,", ("labels", True): "amber", ("labels", False): "frost"}[name, mood]
    if name == "sums":
        a, b, c = (int(word) for word in text.split() if word.isdigit())
        return f"{a + b - c} "
    (value,) = {value for (s, attribute), value in world.value.items() for line in WORDINGS[attribute] if f" {line.format(s=s)} " in f" {text} "}
    return f"{value} "


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ("train", "test"))
def test_every_item_is_right_in_every_template(name, split):
    for item in few_shot.items(name, split, 60):
        for template in range(3):
            example = few_shot.example(name, item, template)
            assert len(encode(TOKENIZER, example, 60, choices=True).wrong) in (1, 3)
            assert [c for c in example.choices if c.startswith(truth(name, example))] == [example.completion]


@pytest.mark.parametrize("name", NAMES)
def test_subsets_are_draws_of_their_own_and_tests_ask_for_something_else(name):
    subsets = [few_shot.shots(name, subset) for subset in range(3)]
    assert subsets[0] == few_shot.shots(name, 0) and all(len(shots) == 48 for shots in subsets)
    prompts = [{shot.prompt for shot in shots} for shots in subsets]
    assert len(prompts[0] & prompts[1]) < 12 and min(map(len, prompts)) > 40               # a line may come with other wrong choices
    asked = {example.prompt for template in range(3) for example in few_shot.test(name, template)}
    assert len(asked) > 200 and not asked & set.union(*prompts)
    answers = [example.completion.split()[0] for example in few_shot.test(name, 0)]
    assert max(map(answers.count, answers)) < 62                         # no answer is right most of the time


def test_tasks_that_share_lines_share_no_items_between_train_and_test():
    keys = {(name, split): {few_shot.example(name, item, 0).prompt for item in few_shot.items(name, split, 150)}
            for name in ("told", "facts") for split in ("train", "test")}
    assert not keys["told", "train"] & keys["facts", "test"] and not keys["facts", "train"] & keys["told", "test"]
    assert tfew.RELATED == {"told": "facts", "facts": "told"}
    for name in NAMES:                                                    # vectors that start on the others' items have seen none of its own
        own = {few_shot.example(same, item, t).prompt for same in (name, tfew.RELATED.get(name, name)) for t in range(3)
               for split in ("train", "test") for item in few_shot.items(same, split, 60)}
        mixed = {e.prompt for e in tfew.mixture(name, 60)}
        assert len(mixed) > 150 and not mixed & own


def test_examples_in_front_fit_and_keep_their_answers():
    for name in NAMES:
        shots = few_shot.shots(name, 0)[1::3]
        for asked in few_shot.test(name, 1, 10):
            full = few_shot.in_context(asked, shots, TOKENIZER, 128)
            assert full.choices == asked.choices and full.prompt.endswith(asked.prompt)
            assert all(len(ids) <= 128 for row in [encode(TOKENIZER, full, 128, choices=True)] for ids in (row.ids, *row.wrong))
            front = full.prompt.removesuffix(asked.prompt)
            count = sum(f"{shot.prompt} {shot.completion}" in front for shot in shots)
            assert count >= 4 and front.startswith(f"{shots[0].prompt} {shots[0].completion}")
            if count < len(shots):                                        # the next one would not have fitted
                longest = max(len(TOKENIZER.encode(choice)) for choice in asked.choices)
                more = len(TOKENIZER.encode(f"{front} {shots[count].prompt} {shots[count].completion} {asked.prompt}"))
                assert more + longest + 1 > 128


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="no few-shot task 'moods': choose from mood, told"):
        few_shot.shots("moods", 0)
    with pytest.raises(ValueError, match="2000 items of labels/test were asked for: it has about 1"):
        few_shot.test("labels", 0, 2000)


# ---- the benchmark

def base():
    torch.manual_seed(0)
    model = minireft.Model(minireft.ModelConfig(TOKENIZER.vocab_size, width=32, layers=2, heads=2, hidden=48, context=128))
    model.tokenizer = TOKENIZER
    return model.requires_grad_(False).eval()


def test_the_bill_by_hand_is_the_bill_that_is_counted():
    model = base()
    bill = tfew.bill(model, "labels", tfew.replace(tfew.CONFIG, steps=20))
    for way in ("T-Few", "in the prompt"):
        assert bill[f"by hand, {way}"] == bill[f"flops, {way}"] > 0
    assert bill["flops, T-Few"] < bill["flops, in the prompt, cached"] < bill["flops, in the prompt"]
    assert bill["disk bytes, in the prompt"] < 2000 and bill["disk bytes, T-Few"] > minireft.IA3(model).num_parameters() * 4
    whole = tfew.flops(lambda: minireft.train(model, [minireft.IA3(model)], few_shot.shots("labels", 0),
                                              tfew.replace(tfew.CONFIG, steps=20), progress=False))
    assert bill["flops, training"] == pytest.approx(whole, rel=0.1)


def test_with_a_cache_only_the_question_is_computed():
    """The hand-made figure against a count of the model's passes behind a cache of what stands in front."""
    model = base()
    asked, shots = few_shot.test("facts", 0, 1)[0], few_shot.shots("facts", 0)[::3]
    full = few_shot.in_context(asked, shots, TOKENIZER, 128)
    front = TOKENIZER.encode(full.prompt.removesuffix(asked.prompt))
    counted = 0
    for choice in asked.choices:
        cache = minireft.Cache(model, 1, 128)
        with torch.no_grad():
            model(torch.tensor([front]), cache=cache)
            ids = encode(TOKENIZER, tfew.replace(full, completion=choice), 128).ids[len(front) :]
            counted += tfew.flops(lambda: model(torch.tensor([ids]), cache=cache))
    assert tfew.answering_cached(model, [full], [len(front)]) == counted


def test_medians_and_verdicts():
    assert tfew.median([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]) == pytest.approx((0.35, 0.225, 0.475))
    medians = {"zero-shot": 0.1, "in the prompt": 0.5, **dict.fromkeys(tfew.METHODS, 0.4), "all three, pre-trained": 0.7}
    rows = {method: [[value] * 3] for method, value in medians.items()}
    results = {"accuracy": {"mood": rows}, "bill": {"mood": {"flops, T-Few": 1.0, "flops, in the prompt": 4.0}}}
    assert tfew.verdicts(results)[0].startswith("mood: T-Few loses to the prompt, 0.40 to 0.50, at 25% of its FLOPs")
    assert tfew.accuracy_table(results).splitlines()[-1] == "| all three, pre-trained | 0.70 (0.70–0.70) |"


@pytest.mark.slow
def test_the_whole_comparison_runs(shipped_base):
    rows = tfew.compare(shipped_base[0], "labels", 1, 20, tfew.replace(tfew.CONFIG, steps=30))
    assert set(rows) == {"zero-shot", "in the prompt", *tfew.METHODS, "all three, pre-trained"}
    assert tfew.median(rows["all three"])[0] > 0.9 and tfew.median(rows["in the prompt"])[0] > 0.9
