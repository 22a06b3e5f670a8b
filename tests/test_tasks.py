"""The tiny world and its tasks: the same everywhere, disjoint by content, in words that the tokenizer has.

Run:  pytest tests/test_tasks.py
See:  splits that share no content (a split by index would), a checker that rejects wrong answers, gates that can fail.
"""

import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minireft import tasks
from minireft.model import Model, ModelConfig
from minireft.tasks import gates, instructions
from minireft.tasks.corpus import SKILLS, Corpus
from minireft.tasks.world import (ATTRIBUTES, CONTENT, COUNTED, HELD_OUT_LABELS, KINDS, LABELS, PEOPLE, THINGS,
                                  VOCABULARY, World)
from minireft.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_words(VOCABULARY)
SUBJECTS = {*PEOPLE, *THINGS, *KINDS["drink"]}


# ---- the world and the corpus

def test_the_world_is_the_same_for_the_same_seed_and_another_for_another():
    assert World(0).facts == World(0).facts
    assert World(0).facts != World(1).facts
    assert len(World().facts) == len(set(World().value)) == 508


def test_the_corpus_is_the_same_for_the_same_seed():
    def text(seed):
        corpus = Corpus(seed)
        return [corpus.document(i / 200) for i in range(200)]
    assert text(0) == text(0)
    assert text(0) != text(1)


def test_rows_of_a_batch_begin_with_a_document_and_hold_only_known_words():
    batch = Corpus(3).batch(TOKENIZER, rows=40, length=100, progress=1.0)
    assert batch.shape == (40, 100) and batch.min() >= 0 and batch.max() < TOKENIZER.vocab_size
    ends = (batch == TOKENIZER.eos_id).sum(1)
    assert (batch[:, 0] != TOKENIZER.eos_id).all() and ends.sum() > 40
    documents = Corpus(3)
    assert TOKENIZER.decode(batch[0]).startswith(documents.document(1.0)[:60])


def test_every_word_of_every_document_is_in_the_vocabulary():
    corpus = Corpus(1)
    for writer in corpus.writers:
        for _ in range(200):
            unknown = set(writer().split()) - TOKENIZER.vocabulary.keys()
            assert not unknown, (writer.__name__, unknown)


def test_every_word_of_the_vocabulary_is_met_in_pretraining():
    """In-context skills fail on template words that pre-training never showed."""
    corpus, seen = Corpus(2), Counter()
    for i in range(12000):
        seen.update(corpus.document(i / 12000).split())
    assert not set(VOCABULARY) - {word for word, count in seen.items() if count >= 5} - {"="}


def test_held_out_labels_never_stand_as_labels():
    assert len(HELD_OUT_LABELS) == 12 and not set(HELD_OUT_LABELS) & set(LABELS) and set(HELD_OUT_LABELS) <= set(CONTENT)
    corpus = Corpus(4)
    corpus.frame = lambda: ("->", ";")
    for writer in (corpus.induction, corpus.mapping, corpus.mapping_moods):
        for _ in range(150):
            labels = re.findall(r"-> (\w+) ;", writer())
            assert len(labels) >= 5 and not set(labels) & set(HELD_OUT_LABELS)


def test_claims_sums_and_skills_of_the_corpus_are_right():
    corpus, world = Corpus(5), World()
    true = {f"{wording.format(s=s, v=v)}" for s, name, v in world.facts for wording in ATTRIBUTES[name].says}
    verdicts = Counter()
    for _ in range(400):
        said, verdict = re.fullmatch(r"claim : (.+) \. (right|wrong) \.", corpus.claim()).groups()
        assert (said in true) == (verdict == "right")
        verdicts[verdict] += 1
    assert min(verdicts.values()) > 150
    for _ in range(400):
        equation = corpus.equation()
        if "=" in equation:
            left, right = equation.split(" = ")
            assert eval(left) == int(right) and 0 <= int(right) <= 20
    assert SKILLS["swap"][0](["a", "b", "c"]) == ["c", "b", "a"] and SKILLS["swap"][0](["a", "b"]) == ["b", "a"]


def test_stories_of_the_corpus_are_counted_right():
    """An independent count: reads the story's words and keeps the books."""
    corpus = Corpus(6)
    for _ in range(400):
        events = corpus.stories().split(" . ")
        item, has, asked = events[0].split()[3], {}, 0
        for event in events:
            words = event.removesuffix(" .").split()
            if event.startswith("how many"):
                who = words[4] if "does" in words else None
                assert int(words[-1]) == (has[who] if who else sum(has.values())), events
                asked += 1
            elif words[0] == "now":
                assert has[words[1]] == int(words[3]), events
            elif words[1] == "has":
                has[words[0]] = int(words[2])
            elif words[-1] in COUNTED:                                        # gets 3 stamps: other things
                assert words[-1] != item
            else:
                n = int(next(word for word in words if word.isdigit()))
                has[words[0]] += n if words[-1] == "more" else -n
                if words[-2] == "to":
                    has[words[-1]] += n
        assert asked and min(has.values()) >= 0


# ---- the families

def content(name: str, example) -> object:
    """What an item is about, read from its words alone and independent of how its split was chosen."""
    words = example.prompt.split()
    if name == "facts":
        return next(word for word in words if word in SUBJECTS)
    if name == "arithmetic":
        return tuple(sorted(int(word) for word in words if word.isdigit()))
    if name == "mood":
        clauses = re.split(r" (?:,|but) ", example.prompt.partition(": ")[2].partition(" . verdict")[0])
        return tuple(sorted(clauses))
    if name == "entailment":                                              # who or what is claimed about, and which attribute
        claim = example.prompt.partition(" claim : ")[2].removesuffix(" .").split()
        value = claim[-1]
        return next(word for word in claim if word in SUBJECTS), [n for n, a in ATTRIBUTES.items() if value in a.values][0]
    request = example.prompt.partition(" .")[0]
    if " say " in request:
        return tuple(sorted(re.sub(r"please say | backwards| two times| in the other language", "", request).split()))
    return next(word for word in words if word in SUBJECTS) if "tell me" in request else tuple(sorted(request.split()))


@pytest.mark.parametrize("name", tasks.names())
def test_splits_share_no_content_and_no_prompt(name):
    contents = {split: {content(name, example) for example in tasks.load(name, split)} for split in tasks.SPLITS}
    prompts = {split: {example.prompt for example in tasks.load(name, split)} for split in tasks.SPLITS}
    for one, two in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not contents[one] & contents[two]
        assert not prompts[one] & prompts[two]


@pytest.mark.parametrize("name", [name for name in tasks.names() if name != "mood"])
def test_a_split_by_index_would_share_content(name, monkeypatch):
    """The mutant that the test above must catch: items dealt out in turn. (Whole reviews hardly ever repeat by chance.)"""
    turn = iter(range(10**9))
    monkeypatch.setattr(tasks, "split_of", lambda name, key: list(tasks.SPLITS)[next(turn) % 3])
    contents = [{content(name, example) for example in tasks.load(name, split)} for split in tasks.SPLITS]
    assert contents[0] & contents[2]


@pytest.mark.parametrize("name", tasks.names())
def test_items_are_enough_the_same_every_time_and_in_known_words(name):
    assert len(tasks.load(name, "test")) >= 500
    for split in tasks.SPLITS:
        examples = tasks.load(name, split)
        assert examples == tasks.load(name, split) and examples[:7] == tasks.load(name, split, 7)
        assert [example.id for example in examples] == list(range(tasks.SPLITS[split]))
        assert len({example.prompt for example in examples}) == len(examples)
        for example in examples:
            ids = TOKENIZER.encode(" ".join((example.prompt, example.completion, *example.choices)))
            assert len(ids) < 128
            assert not example.choices or example.choices.count(example.completion) == 1 == len(
                {choice for choice in example.choices if choice == example.completion})
            assert tasks.check(name, example, example.completion)


@pytest.mark.parametrize("name", ["facts", "mood", "entailment"])
def test_the_place_of_the_answer_says_nothing(name):
    """No choice is right much more often than chance, so that always giving one place or label does not pay."""
    examples = tasks.load(name, "train")
    options = [re.split(r" , | or ", e.prompt.partition(" ? ")[2].removesuffix(" ->")) if name == "facts" else
               [choice.removesuffix(" .") for choice in e.choices] for e in examples]
    places = Counter(o.index(e.completion.removesuffix(" .")) for o, e in zip(options, examples))
    chance = 1 / len(options[0])
    assert all(abs(places[i] / len(examples) - chance) < 0.05 for i in range(len(options[0])))


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'sentiment'.*facts.*arithmetic.*mood.*entailment.*instructions"):
        tasks.load("sentiment", "train")
    with pytest.raises(ValueError, match="'dev'.*train.*validation.*test"):
        tasks.load("facts", "dev")
    for limit in (0, -1, 10**6):
        with pytest.raises(ValueError, match=f"{limit} examples"):
            tasks.load("facts", "test", limit)


# ---- labels, from independent readings

def test_moods_are_weighed_right():
    from minireft.tasks.world import BAD, GOOD
    for example in tasks.load("mood", "train", 500):
        balance = 0
        for clause in content("mood", example):
            word = clause.split()[-1]
            assert word in GOOD or word in BAD
            balance += (1 if word in GOOD else -1) * (-1 if " not " in clause else 1) * (2 if " very " in clause else 1)
        assert example.completion == ("up ." if balance > 0 else "down ." if balance < 0 else "even .")


def test_arithmetic_answers_differ_from_what_one_number_gives():
    """No shortcut through a single number: none of the three equals the answer in more than a third of the stories."""
    examples = tasks.load("arithmetic", "train", 500)
    for place in range(3):
        hits = sum([w for w in e.prompt.split() if w.isdigit()][place] == e.completion.split()[0] for e in examples)
        assert hits < len(examples) / 3


# ---- instructions

@pytest.mark.parametrize("prompt, right, wrong", [
    ("please say river cloud tower backwards . ->", ["tower cloud river .", "tower cloud river"],
     ["river cloud tower .", "tower cloud .", "tower cloud river thanks .", "sure : tower cloud river .", "", "."]),
    ("please say river cloud two times . start with sure . ->", ["sure : river cloud river cloud ."],
     ["river cloud river cloud .", "sure : river river cloud cloud .", "sure river cloud river cloud ."]),
    ("please name 2 animals but not the dog . end with thanks . ->", ["cat , fox thanks .", "fox , cow thanks"],
     ["cat , dog thanks .", "cat , fox .", "cat , cat thanks .", "cat , fox , cow thanks .", "cat , hammer thanks .",
      "cat fox thanks ."]),
    ("please write something nice about the food and the price . ->",
     ["the food was great and the price was fair .", "the food was not bad and the price was very good ."],
     ["the food was great .", "the price was fair and the food was great .", "the food was bad and the price was fair .",
      "the food was not good and the price was fair .", "the soup was great and the price was fair ."]),
])
def test_the_checker_takes_right_answers_and_rejects_wrong_ones(prompt, right, wrong):
    for answer in right:
        assert instructions.obeys(prompt, answer), answer
    for answer in wrong:
        assert not instructions.obeys(prompt, answer), answer


def test_the_checker_knows_what_is_true():
    world = World()
    home = world.value["anna", "home"]
    other = next(town for town in ATTRIBUTES["home"].values if town != home)
    prompt = "please tell me something about anna . ->"
    assert instructions.obeys(prompt, f"anna lives in {home} .") and instructions.obeys(prompt, f"the home of anna is {home} .")
    assert not instructions.obeys(prompt, f"anna lives in {other} .")
    assert not instructions.obeys(prompt, world.say("bella", "home") + " .")


def test_a_foreign_prompt_cannot_be_checked():
    for prompt in ("reverse : a b ->", "please dance . ->", "please say a b sideways . ->"):
        with pytest.raises(ValueError, match="cannot|can be checked"):
            instructions.obeys(prompt, "a b .")


@given(st.integers(0, 1999), st.integers(0, 1999))
def test_an_answer_to_another_request_is_rejected(i, j):
    examples = TRAIN
    one, two = examples[i], examples[j]
    if two.completion != one.completion and " say " in one.prompt:
        assert not tasks.check("instructions", one, two.completion)


TRAIN = tasks.load("instructions", "train")


# ---- gates

def test_gate_items_are_well_formed_and_their_shots_exact():
    items = gates.examples(count=40)
    assert set(gates.PASS) <= set(items) and set(items) == set(gates.CHANCE)
    for name, examples in items.items():
        for example in examples:
            TOKENIZER.encode(example.prompt)
            assert (example.completion in example.choices) if name != "copying" else not example.choices
        if "shots" in name:
            assert all(example.prompt.count("->") == int(name.split()[1]) + 1 for example in examples)
            assert all(set(choice.split()[0] for choice in e.choices) <= set(HELD_OUT_LABELS) for e in examples)
    assert items == gates.examples(count=40) and items != gates.examples(count=40, seed=1)


def test_a_model_with_random_weights_fails_every_gate():
    torch.manual_seed(0)
    model = Model(ModelConfig(TOKENIZER.vocab_size, width=32, layers=1, heads=2, hidden=32, context=128))
    scores = gates.score(model, TOKENIZER, count=100)
    for name, score in scores.items():
        assert score < gates.PASS.get(name, .9) and abs(score - gates.CHANCE[name]) < 0.2, (name, score)
