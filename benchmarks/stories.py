"""A real pretrained model, llama2.c's stories260K, tuned for two purposes: to let somebody speak, and to tell good reviews from bad.
Run: python benchmarks/stories.py [--purpose speech|sst2] [--quick] [--write]      (--write updates results/stories.json)
You should see, for each purpose and method, the numbers trained, the score before and after on every seed, and what it writes.

speech: prompts are beginnings of TinyStories without a spoken word, completions the next sentence, in which somebody speaks; the score
is the share of unseen beginnings whose greedy continuation has speech in it. sst2: rank classification of SST-2's reviews with the
prompt of its named format, scored on the first 600 test sentences. The learning rate is each method's own, of three, chosen on
validation items with one seed; test items are only reported. Needs the public data: MINIREFT_DATA, or ../shared/data.
"""

import argparse
import datetime
import json
import os
import re
import statistics
from pathlib import Path

import torch

import minireft
from minireft import IA3, Example, LoRA, LoReFT, TrainConfig

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("MINIREFT_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
METHODS = {                             # (the method, learning rates)
    "LoReFT r4 f7+l7": (lambda m: LoReFT(m, rank=4, positions="f7+l7"), (2e-3, 8e-3, 3e-2)),
    "(IA)³": (lambda m: IA3(m), (8e-3, 3e-2, 1.2e-1)),
    "LoRA q, v r4": (lambda m: LoRA(m, rank=4), (2e-3, 8e-3, 3e-2))}
SAMPLES = ("Once upon a time, there was a little girl named Lily. She had a red ball.",
           "One day, a boy named Tom went to the park with his dog. The dog saw a cat.")


def sentences(story: str) -> list[str]:
    return [s.strip() for s in re.findall(r'[^.!?]+[.!?]+"?', " ".join(story.split()))]


def spoken(story: str) -> Example | None:
    """One to four sentences without speech, and the next one, where somebody speaks; None where a story has no such place."""
    lines = sentences(story)
    first = next((i for i, line in enumerate(lines) if '"' in line), 0)
    if not 1 <= first <= 4 or lines[first].count('"') != 2 or len(lines[first]) > 140:
        return None
    return Example(" ".join(lines[:first]), lines[first])


def speech() -> dict[str, list[Example]]:
    """train and validation from the head of the training stories; test: beginnings from the validation file, the rest of them "more"."""
    stories = (DATA / "tinystories" / "train_head.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    examples = [e for e in map(spoken, stories) if e]
    openings = []
    for paragraph in (DATA / "tinystories" / "valid.txt").read_text(encoding="utf-8").split("\n\n"):
        lines = sentences(paragraph)
        if paragraph.lstrip().startswith(("Once ", "One day")) and len(lines) >= 2 and '"' not in lines[0] + lines[1]:
            openings.append(Example(" ".join(lines[:2])))
    return {"train": examples[:-80], "validation": examples[-80:], "test": openings[:200], "more": openings[200:]}


def sst2() -> dict[str, list[Example]]:
    splits = {"train": ("train", None), "validation": ("dev", 300), "test": ("test", 600)}
    return {split: minireft.read_examples(DATA / "sst2" / f"stsa.binary.{name}", "sst2", template=0)[:count] for split, (name, count) in splits.items()}


def speaks(model, tokenizer, examples) -> list[bool]:
    """Whether the greedy continuation of each beginning has speech in it."""
    return ['"' in text for first in range(0, len(examples), 50)
            for text in minireft.generate(model, tokenizer, [e.prompt for e in examples[first : first + 50]], 40)]


def share(right: list[bool]) -> float:
    return sum(right) / len(right)


def ranked(model, tokenizer, examples) -> float:
    return minireft.evaluate(model, tokenizer, examples).rank


PURPOSES = {                            # purpose → its data, what chooses the rate on validation items, the score on test items, steps
    "speech": (speech, lambda *a: -minireft.evaluate(*a, metrics=("loss",)).loss, lambda *a: share(speaks(*a)), 100),
    "sst2": (sst2, ranked, ranked, 120)}


def tuned(model, make, examples, lr: float, seed: int, steps: int):
    """A fresh adapter, trained."""
    torch.manual_seed(seed)
    adapter = make(model)
    minireft.train(model, [adapter], examples, TrainConfig(steps=steps, lr=lr, batch_size=16, seed=seed), progress=False)
    return adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--purpose", choices=PURPOSES, help="only one of them")
    parser.add_argument("--quick", action="store_true", help="one seed, one learning rate, few steps and items: does it run?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="update results/stories.json")
    options = parser.parse_args()
    path = DATA / "stories260K" / "stories260K.bin"
    if not path.is_file():
        raise SystemExit(f"there is no {path}: set MINIREFT_DATA to the folder of the public data")
    torch.set_num_threads(1)
    model, tokenizer = minireft.load(path)
    seeds = 1 if options.quick else options.seeds
    for purpose in [options.purpose] if options.purpose else PURPOSES:
        read, choose, score, steps = PURPOSES[purpose]
        data, steps = read(), 5 if options.quick else steps
        if options.quick:
            data = {split: part[:20] for split, part in data.items()}
        found = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "seeds": seeds, "steps": steps, "batch": 16,
                 "items": {split: len(data[split]) for split in ("train", "validation", "test")},
                 "before": score(model, tokenizer, data["test"]), "methods": {}}
        if purpose == "speech":
            found["writes"] = {"before": minireft.generate(model, tokenizer, list(SAMPLES), 40)}
        print(f"{purpose}: {found['items']}, before {found['before']:.3f}")
        for name, (make, rates) in METHODS.items():
            tried = {}
            for lr in rates[1:2] if options.quick else rates:
                adapter = tuned(model, make, data["train"], lr, 0, steps)
                with adapter:
                    tried[lr] = choose(model, tokenizer, data["validation"]), adapter
            lr = max(tried, key=lambda lr: tried[lr][0])
            test = []
            for seed in range(seeds):
                adapter = tried[lr][1] if seed == 0 else tuned(model, make, data["train"], lr, seed, steps)
                with adapter:
                    test.append(score(model, tokenizer, data["test"]))
                    if seed == 0 and purpose == "speech":
                        found["writes"][name] = minireft.generate(model, tokenizer, list(SAMPLES), 40)
            found["methods"][name] = {"parameters": adapter.num_parameters(), "lr": lr, "validation": {str(r): round(v, 4) for r, (v, _) in tried.items()},
                                      "test": [round(s, 4) for s in test]}
            print(f"  {name:16} {adapter.num_parameters():6,} numbers, lr {lr:<6} {statistics.mean(test):.3f}  {found['methods'][name]['test']}", flush=True)
        for name, texts in found.get("writes", {}).items():
            for prompt, text in zip(SAMPLES, texts):
                print(f"  {name}: {prompt} → {text.strip()}")
        if options.write:
            path = RESULTS / "stories.json"
            results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            path.write_text(json.dumps(results | {purpose: found}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
