"""Skill gates: what a base must do before it counts as one. Gates, not loss, say that it is ready.
    python -c "import minireft; from minireft.tasks import gates; print(gates.score(*minireft.load('base')))"
You should see a dictionary of scores near 1; a model with random weights scores near chance (see `CHANCE`).

Every gate but copying is scored by rank classification, copying by exact greedy match. In-context mapping uses label
words that no document of the corpus uses as labels.
"""

import torch

from ..data import Example
from ..evaluation import evaluate
from .corpus import MAPPED, Corpus
from .world import ATTRIBUTES, HELD_OUT_LABELS, KINDS, NUMBERS

SHOTS = (2, 4, 6, 8)
PASS = {"facts": .95, "choosing": .95, "claims": .95, "copying": .95, "sums": .95, "stories": .95, "moods": .95,
        "in-context, 6 shots": .90}
CHANCE = {"facts": .1, "choosing": .4, "claims": .5, "copying": 0.0, "sums": .05, "stories": .05, "moods": .5,
          **{f"in-context, {n} shots": .5 for n in SHOTS}}


class Gates(Corpus):
    """Draws gate items by the corpus' own writers, from a seed that pre-training never uses."""

    def __init__(self, seed: int = 0):
        super().__init__(seed=f"gates {seed}")

    def item(self, document: str, mark: str, choices) -> Example:
        """A document cut behind its last `mark`: what follows is the answer, and closes as the choices do."""
        prompt, _, answer = document.rpartition(f" {mark} ")
        close = answer.partition(" ")[2]
        return Example(f"{prompt} {mark}", answer, tuple(f"{choice} {close}" for choice in choices))

    def facts_gate(self) -> Example:
        subject, name, value = self.fact()
        return self.item(f"question : {self.asked(subject, name)} ? answer : {value} .", ":", ATTRIBUTES[name].values)

    def choosing_gate(self) -> Example:
        choice = self.choice()
        options = choice.partition("? ")[2].partition(" ->")[0].replace(" or ", " , ").split(" , ")
        return self.item(choice, "->", options)

    def claims_gate(self) -> Example:
        said, _, verdict = self.claim().removesuffix(" .").rpartition(" . ")
        return Example(f"{said} .", f"{verdict} .", ("right .", "wrong ."))

    def copying_gate(self) -> Example:
        prompt, _, words = self.skill("copy").partition(" -> ")
        return Example(f"{prompt} ->", words)

    def sums_gate(self) -> Example:
        while "=" not in (equation := self.equation()):
            pass
        return self.item(f"{equation} .", "=", NUMBERS)

    def stories_gate(self) -> Example:
        return self.item(self.stories(), "?", NUMBERS)

    def moods_gate(self) -> Example:
        mood = self.pick(("happy", "sad"))
        return self.item(f"review : {self.review(mood == 'happy')} . mood : {mood} .", ":", ("happy", "sad"))

    def in_context_gate(self, shots: int) -> Example:
        """Things of two kinds by turns, in random order within each turn, then one more that has not been seen."""
        labels, groups = self.random.sample(HELD_OUT_LABELS, 2), self.random.sample(MAPPED[:len(KINDS)], 2)
        things = [self.random.sample(group, shots // 2 + 1) for group in groups]
        shown = []
        for turn in range(shots // 2):
            shown += self.random.sample([f"{things[i][turn]} -> {labels[i]} ;" for i in (0, 1)], 2)
        asked = self.random.randrange(2)
        return self.item(" ".join([*shown, f"{things[asked][-1]} -> {labels[asked]} ;"]), "->", labels)


def examples(count: int = 200, seed: int = 0) -> dict[str, list[Example]]:
    """The items of every gate, the same for the same seed."""
    gates = Gates(seed)
    items = {name: [getattr(gates, f"{name}_gate")() for _ in range(count)] for name in PASS if "shots" not in name}
    for shots in SHOTS:
        items[f"in-context, {shots} shots"] = [gates.in_context_gate(shots) for _ in range(count)]
    return items


def score(model, tokenizer, count: int = 200, seed: int = 0) -> dict[str, float]:
    """Every gate's share of right answers; an encoder's, of those with choices, is to fill in the first word of the answer."""
    if model.config.architecture == "encoder":
        return {name: filled(model, tokenizer, items) for name, items in examples(count, seed).items() if items[0].choices}
    scores = {}
    for name, items in examples(count, seed).items():
        metric = "rank" if items[0].choices else "exact"
        scores[name] = getattr(evaluate(model, tokenizer, items, metrics=(metric,)), metric)
    return scores


def filled(model, tokenizer, items: list[Example]) -> float:
    """The share of items where, of the choices' first words, the likeliest in the answer's place is the right one."""
    right = 0
    for item in items:
        prompt, (_, *close) = tokenizer.encode(item.prompt), tokenizer.encode(item.completion)
        with torch.no_grad():
            p = model(torch.tensor([prompt + [tokenizer.mask_id] + close]))[0, len(prompt)]             # (V,)
        words = {choice.split()[0]: float(p[tokenizer.encode(choice)[0]]) for choice in item.choices}
        right += max(words, key=words.get) == item.completion.split()[0]
    return right / len(items)
