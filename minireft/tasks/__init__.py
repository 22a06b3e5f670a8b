"""Downstream tasks, written by a program about the tiny world that the base knows, in wordings that it never read.
    python -c "from minireft import tasks; print(tasks.load('facts', 'test', 3))"
You should see three examples, the same on every machine.

Splits are disjoint by content: every item has a content key (the person or thing asked about, the numbers of a story,
the words to reverse ...), and the hash of that key says which split it belongs to. A key never stands in two splits.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from random import Random

from ..data import Example
from . import arithmetic, entailment, facts, instructions, mood
from .world import World

# Each family's module has draw(random, world) → (content key, Example).
FAMILIES = {"facts": facts, "arithmetic": arithmetic, "mood": mood, "entailment": entailment,
            "instructions": instructions}
SPLITS = {"train": 2000, "validation": 500, "test": 600}    # items in each


def names() -> list[str]:
    """The families, in the order of the papers: commonsense, arithmetic, classification, instructions."""
    return list(FAMILIES)


def split_of(name: str, content: str) -> str:
    """The split that a content key belongs to: 70 % train, 10 % validation, 20 % test, by hash."""
    place = int.from_bytes(hashlib.sha256(f"{name}: {content}".encode()).digest()[:4], "big") / 2**32
    return "train" if place < 0.7 else "validation" if place < 0.8 else "test"


def load(name: str, split: str, limit: int | None = None) -> list[Example]:
    """The first `limit` examples of a family's split (all of them when None), always the same, no prompt twice.

    Raises ValueError for a family or a split that is not there, or a limit that it does not have.
    """
    if name not in FAMILIES:
        raise ValueError(f"there is no task {name!r}: choose from {', '.join(FAMILIES)}")
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}: choose from {', '.join(SPLITS)}")
    count = SPLITS[split] if limit is None else limit
    if not 0 < count <= SPLITS[split]:
        raise ValueError(f"{limit} examples of {name}/{split} were asked for: it has 1 to {SPLITS[split]}")
    random, world, seen, examples = Random(f"{name} {split}"), World(), set(), []
    while len(examples) < count:
        content, example = FAMILIES[name].draw(random, world)
        if split_of(name, content) == split and example.prompt not in seen:
            seen.add(example.prompt)
            examples.append(replace(example, id=len(examples)))
    return examples


def check(name: str, example: Example, answer: str) -> bool:
    """Whether the answer is right: obedience for instructions, which have many right answers; equality for the rest."""
    if name == "instructions":
        return instructions.obeys(example.prompt, answer)
    return answer.split() == example.completion.split()
