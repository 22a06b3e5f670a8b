"""Claim 4, NEFTune: what noise does on an open-ended task, beside controls that tell it from generic regularisation.

The task asks for something about one to three subjects, or for lines about one to three things; any number of true statements, in
any order, is right. All weights are trained; of every kind of regularisation validation loss chooses one of three strengths.
"""

import random
import statistics
from dataclasses import replace

import torch
import torch.nn.functional as F

import minireft
from benchmarks import neftune
from minireft import Example, NEFTune, TrainConfig, tasks
from minireft.adapters.base import Adapter
from minireft.data import order
from minireft.demo import FULL
from minireft.tasks import texts
from minireft.tasks.instructions import WORLD, true_statements
from minireft.tasks.world import PEOPLE

from .engine import Claim
from .methods import fresh
from .report import differences

REQUESTS = ("please tell me something about {} . ->", "what do people say about {} ? ->", "please write about {} . ->")
COUNT, STEPS = 192, 150


def open_ended(split: str, count: int) -> list[Example]:
    """Requests about one or two subjects; an answer is one to four of the true statements, each ended by a full stop."""
    draw, found, seen = random.Random(f"open-ended {split}"), [], set()
    while len(found) < count:
        subjects = draw.sample(list(WORLD.known), draw.choice((1, 1, 2)))
        prompt = draw.choice(REQUESTS).format(" and ".join(s if s in PEOPLE else f"the {s}" for s in subjects))
        if all(tasks.split_of("open-ended", s) == split for s in subjects) and (split == "train" or prompt not in seen):
            seen.add(prompt)
            said = [draw.choice(sorted(true_statements(s))) for s in subjects for _ in range(draw.choice((1, 1, 2, 2)))]
            found.append(Example(prompt, " . ".join(dict.fromkeys(said)) + " .", id=len(found)))
    return found


def truth(prompt: str, answer: str) -> float:
    """The share of an answer's statements that are true of a subject that was asked about, and said once; 0 for an empty answer."""
    words, said = set(prompt.split()), [s.strip() for s in answer.split(" .") if s.strip()]
    true = set().union(*(true_statements(s) for s in WORLD.known if s in words))
    return len({s for s in said if s in true}) / len(said) if said else 0.0


class Dropout(Adapter):
    """Dropout of embedding channels while training: noise's place, and nothing special about it."""

    def __init__(self, model, p: float):
        super().__init__(model, p=p)
        self.adapter = self                                               # it is its own edit

    def edits(self):
        return [(self.model.embed, self)]

    def forward(self, operation, context):
        return lambda ids: F.dropout(operation(ids), self.options["p"], self.model.training)


ARMS = {  # kind → (its strengths, (adapters, changes of the recipe) from a strength)
    "nothing": ((0.0,), lambda m, x, seed: ([], {})),
    "uniform noise": ((1.0, 5.0, 15.0), lambda m, x, seed: ([NEFTune(m, alpha=x, seed=seed)], {})),
    "Gaussian noise": ((1.0, 5.0, 15.0), lambda m, x, seed: ([NEFTune(m, alpha=x, distribution="gaussian", seed=seed)], {})),
    "dropout": ((0.05, 0.1, 0.3), lambda m, x, seed: ([Dropout(m, x)], {})),
    "weight decay": ((0.1, 1.0, 5.0), lambda m, x, seed: ([], {"weight_decay": x})),
    "early stopping": ((0.25, 0.5, 0.75), lambda m, x, seed: ([], {"share": x}))}


def measure(base, task, method, value, seed, items, scale):
    model, tokenizer = fresh(base, scale)
    every = open_ended("train", 1000)
    train = [replace(every[i], id=n) for n, i in enumerate(order(len(every), seed, 0, COUNT))]
    adapters, changes = ARMS[method][1](model, value, seed)
    steps = scale.steps(STEPS * changes.pop("share", 1))                  # the rate still falls to zero, over fewer steps
    torch.manual_seed(seed)
    minireft.train(model, adapters, train, TrainConfig(**{**FULL, "steps": steps, "seed": seed, **changes}), tokenizer, progress=False)
    some = train[: len(items)]
    to_train, to_items = neftune.answers(model, some), neftune.answers(model, items)
    wanted, words, free = [e.completion.split() for e in some], [a.split() for a in to_train], [a.split() for a in to_items]
    return {"train loss": neftune.loss(model, train), "loss": neftune.loss(model, items), "truth": statistics.mean(map(truth, [e.prompt for e in items], to_items)),
            "ROUGE-L": statistics.mean(map(texts.rouge_l, words, wanted)), "BLEU": texts.bleu(words, wanted),
            "length": statistics.mean(map(len, free)), "repetition": texts.repetition(free), "log-diversity": texts.log_diversity(free)}


def verdict(found):
    """What the papers say of uniform noise, and what tells it from the other kinds of noise and of regularisation."""
    lines = []
    for what, name, expected in (("training loss", "train loss", "more"), ("loss on the test items", "loss", "less"), ("overlap with training answers", "ROUGE-L", "less"),
                                 ("length of answers, in words,", "length", "more"), ("repetition of 2-grams", "repetition", "same"), ("share of true statements", "truth", "more")):
        lines += differences(found, f"{what} with uniform noise", ("uniform noise", "nothing"), expected, name)
    for other in list(ARMS)[2:]:
        lines += differences(found, f"loss on the test items with uniform noise less that with {other}", ("uniform noise", other),
                             "less" if other == "Gaussian noise" else "", "loss")
        lines += differences(found, f"length of answers with uniform noise less that with {other}", ("uniform noise", other), "", "length")
    return lines


CLAIM = Claim(
    "noise", "Noise on the embeddings: training loss up, test loss down, less overlap with training answers, longer answers, no more repetition",
    "LLaMA-2 7B on Alpaca, judged by GPT-4: 29.79 → 64.69 with α = 5; overlap with training answers (ROUGE-L, BLEU) down; 375 → 1062 characters with "
    "2-gram repetition 1.49 → 1.72 %; forced length alone 38.58 where NEFTune gets 61.99; uniform noise beats Gaussian.",
    "No judge prefers one true answer to another here; what is measured is truth, length and overlap. Answers are sets of statements of a closed world, "
    "so it is 192 examples that all the weights overfit to, and hardly their style; against that, dropout or stopping early help the test loss as much. Only noise "
    "makes answers longer, with more repetition. The experiment that would tell: human or judged preferences at a scale where both are fluent.",
    (("shipped", "open-ended"), ("sister", "open-ended")), {name: grid for name, (grid, _) in ARMS.items()}, measure,
    lambda task, split, count: open_ended(split, count), verdict, best="loss", lower=True, reference="nothing")
