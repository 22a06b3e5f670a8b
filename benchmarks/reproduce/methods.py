"""What is compared: every method on every base and task, trained the same way and scored by what it writes.

Use:  score("base", "facts", "LoReFT", lr=1.5e-2, seed=1, items=..., scale=FULL)["accuracy"]
See:  one grid of learning rates for all; whatever cannot be right with the first word is written out greedily.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from pathlib import Path

import torch

import minireft
from benchmarks import stories
from minireft import IA3, RED, Bottleneck, DiReFT, DoRA, LoRA, LoReFT, PrefixTuning, PromptTuning, TrainConfig, tasks
from minireft.data import Example, encode_prompt, order
from minireft.generation import generate_ids
from minireft.pretraining import QUICK, pretrain
from minireft.tasks import few_shot
from minireft.tasks.corpus import SKILLS
from minireft.tasks.world import CONTENT

ROOT = Path(__file__).resolve().parent.parent.parent
SISTER = ROOT / "runs" / "sister"       # pre-trained with another seed, and smaller: `minireft pretrain --quick --seed 1`
STORIES = stories.DATA / "stories260K" / "stories260K.bin"                # a real one, where the public data is
RATES = (5e-4, 3e-3, 1.5e-2, 7e-2)
METHODS = {                             # method → what stands on the model
    "frozen": lambda m: [],
    "in context": lambda m: [],
    "LoReFT": lambda m: [LoReFT(m, rank=4, positions="f7+l7")],
    "DiReFT": lambda m: [DiReFT(m, rank=4, positions="f7+l7")],
    "(IA)³": lambda m: [IA3(m)],
    "RED": lambda m: [RED(m)],
    "LoRA, q and v": lambda m: [LoRA(m, rank=4, alpha=8)],
    "LoRA, matched": lambda m: [LoRA(m, rank=2, alpha=4)],                # on q and v, with LoReFT's number of parameters
    "LoRA, all": lambda m: [LoRA(m, rank=4, alpha=8, sites="all")],
    "DoRA, all": lambda m: [DoRA(m, rank=4, alpha=8, sites="all")],
    "prompt tuning": lambda m: [PromptTuning(m, tokens=8)],
    "prefix tuning": lambda m: [PrefixTuning(m, tokens=4)],
    "adapter, serial": lambda m: [Bottleneck(m, width=2)],
    "adapter, parallel": lambda m: [Bottleneck(m, width=4, form="parallel")],
    "full": lambda m: []}
UNTRAINED = ("frozen", "in context")
TRAINED = {"steering": (32, 100), "speech": (256, 60)}                   # task → (training examples, steps); others (600, 150)
MORE = {"speech": 40}                   # task → tokens that may be written beyond the right answer, which a story has none of; others 6


# ---- bases and tasks

def folder(base: str, scale):
    """Where it lies; the sister of a quick run, which knows nothing, apart from the real one."""
    if base == "sister":
        return SISTER if scale.share == 1 else SISTER.with_name(f"sister-{scale.name}")
    return {"shipped": "base", "stories260K": STORIES}[base]


@functools.lru_cache(maxsize=1)
def weights(path):
    """A base in memory."""
    model, tokenizer = minireft.load(path)
    return model, tokenizer, {name: p.clone() for name, p in model.state_dict().items()}


def fresh(base: str, scale):
    """(model, tokenizer), as loaded."""
    model, tokenizer, state = weights(folder(base, scale))
    model.load_state_dict(state)
    return model, tokenizer


def absent(base: str) -> bool:
    """Whether it needs the public data and that is not here."""
    return base == "stories260K" and not STORIES.is_file()


def ensure(base: str, scale) -> None:
    """Pre-trains the sister where it is not there yet: some minutes."""
    if base == "sister" and not folder(base, scale).exists():
        pretrain(folder(base, scale), seed=1, recipe=replace(QUICK, steps=scale.steps(QUICK.steps)))


def steering(split: str, count: int) -> list[Example]:
    """A separator that meant nothing in particular now means one of the skills that the base has: `a b c =` asks for c b a."""
    draw, found = random.Random(f"steering {split}"), []
    while len(found) < count:
        words = draw.sample(CONTENT, draw.randint(3, 5))
        if tasks.split_of("steering", " ".join(sorted(words))) == split:
            found.append(Example(" ".join(words) + " =", " ".join(SKILLS["reverse"][0](words)) + " .", id=len(found)))
    return found


@functools.lru_cache
def speech() -> dict[str, list[Example]]:
    """Let somebody speak: to train, beginnings of stories and the next sentence, in which somebody does; to score, beginnings."""
    found = stories.speech()
    test = {e.prompt for e in found["test"]}                              # some stories begin alike
    train, validation = ([e for e in part if e.prompt not in test] for part in (found["train"] + found["validation"], found["more"]))
    return {"train": train, "validation": validation, "test": found["test"]}


def examples(task: str, split: str, count: int | None = None) -> list[Example]:
    """The first `count` of a split."""
    if task == "steering":
        return steering(split, count or 2000)
    return speech()[split][:count] if task == "speech" else tasks.load(task, split, count)


def training_set(task: str, seed: int, count: int) -> list[Example]:
    """`count` training examples, another draw for another seed."""
    every = examples(task, "train")
    return [every[i] for i in order(len(every), seed, 0, count)]


# ---- one cell

def accuracy(model, tokenizer, task: str, asked: list[Example], originals: list[Example]) -> float:
    """The share of right answers, written greedily: exactly the completion, or an instruction obeyed, or somebody speaks."""
    longest = max(len(tokenizer.encode(e.completion)) for e in originals) + MORE.get(task, 6)
    prompts, written = [encode_prompt(tokenizer, e.prompt, model.config.context - 1) for e in asked], []
    for first in range(0, len(prompts), 64):
        written += generate_ids(model, prompts[first : first + 64], longest, tokenizer.eos_id)
    texts = [tokenizer.decode(ids) for ids in written]
    right = ['"' in text if task == "speech" else tasks.check(task, e, text) for e, text in zip(originals, texts)]
    return sum(right) / len(right)


def score(base: str, task: str, method: str, lr: float, seed: int, items: list, scale, make=None) -> dict:
    """Trains `method` (or what `make` puts on the model) at this rate and seed, and scores it: {"accuracy": ..., "parameters": ...}."""
    model, tokenizer = fresh(base, scale)
    count, steps = TRAINED.get(task, (600, 150))
    train = training_set(task, seed, count)
    torch.manual_seed(seed)
    adapters = (make or METHODS[method])(model)
    virtual = next((a for a in adapters if hasattr(a, "examples")), None)
    prepared = virtual.examples if virtual else list
    asked = items
    if method == "in context":                                            # as many as fit, with room for an answer that is too long
        room = model.config.context - MORE.get(task, 6)
        asked = [few_shot.in_context(replace(e, choices=(e.completion,)), train, tokenizer, room) for e in items]
    diverged = False
    if method not in UNTRAINED:
        config = TrainConfig(steps=scale.steps(steps), lr=lr, seed=seed, full=method == "full")
        try:
            minireft.train(model, adapters, prepared(train), config, tokenizer, progress=False)
        except FloatingPointError:
            diverged = True
    parameters = sum(p.numel() for p in model.parameters()) if method == "full" else sum(a.num_parameters() for a in adapters)
    for adapter in adapters:
        adapter.attach()
    try:
        right = 0.0 if diverged else accuracy(model, tokenizer, task, prepared(asked), items)
    finally:
        for adapter in adapters:
            adapter.detach()
    return {"accuracy": right, "parameters": parameters, **({"diverged": True} if diverged else {})}
