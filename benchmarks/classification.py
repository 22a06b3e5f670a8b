"""Classification on an encoder, the GLUE setting of the papers: a head alone, and beside it LoReFT, (IA)³, LoRA, and all weights.
Run: python benchmarks/classification.py [--data mood|sst2] [--pool first|mean] [--quick] [--write]      (--write updates results/classification.json)
You should see, for each method, numbers trained beside the head's, and the test accuracy of every seed.

mood runs on the encoder that is shipped. sst2 takes the public sentences (MINIREFT_DATA, or ../shared/data), for which that
encoder has no words: it first trains one of the same kind on the training sentences, a word hidden here and there, labels unseen.
Every method has the same head, steps and choice of three learning rates; validation items choose, test items are only reported.
The head scores the mean over all tokens, or the first one as the papers' does (--pool first).
"""

import argparse
import datetime
import json
import math
import os
import statistics
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import minireft
from minireft import IA3, Classifier, Example, LoRA, LoReFT, TrainConfig, tasks
from minireft.data import collate, Encoded
from minireft.pretraining import fill_in

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("MINIREFT_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
METHODS = {                             # (what stands beside the head, learning rates)
    "head alone": (lambda m: None, (1e-3, 4e-3, 1.6e-2)),
    "LoReFT r1 f3": (lambda m: LoReFT(m, rank=1, positions="f3"), (1e-3, 4e-3, 1.6e-2)),
    "LoReFT r4 f7+l7": (lambda m: LoReFT(m, rank=4, positions="f7+l7"), (1e-3, 4e-3, 1.6e-2)),
    "(IA)³": (lambda m: IA3(m), (4e-3, 1.6e-2, 6.4e-2)),
    "LoRA q, v r4": (lambda m: LoRA(m, rank=4), (1e-3, 4e-3, 1.6e-2)),
    "all weights": (None, (2e-4, 1e-3, 4e-3))}


def mood():
    """The shipped encoder, and the task's splits."""
    model, tokenizer = minireft.load("encoder")
    return model, tokenizer, {split: tasks.load("mood", split, count) for split, count in (("train", 2000), ("validation", 300), ("test", 600))}


def sst2(steps: int):
    """An encoder of SST-2's own training sentences, and its splits; words outside its vocabulary are all <unk>."""
    folder = DATA / "sst2"
    if not folder.is_dir():
        raise SystemExit(f"there is no {folder}: set MINIREFT_DATA to a folder with sst2/stsa.binary.train, .dev and .test")
    rows = {split: [(line[2:].split(), line[0]) for line in (folder / f"stsa.binary.{name}").read_text(encoding="utf-8").splitlines()]
            for split, name in (("train", "train"), ("validation", "dev"), ("test", "test"))}
    words = [word for word, n in Counter(w for sentence, _ in rows["train"] for w in sentence).most_common(4000) if word.isalpha()]
    tokenizer = minireft.Tokenizer.from_words(words)
    known = set(words)
    splits = {split: [Example(" ".join(w if w in known else "<unk>" for w in s), "good" if label == "1" else "bad") for s, label in part]
              for split, part in rows.items()}
    torch.manual_seed(0)
    model = minireft.Model(minireft.ModelConfig(tokenizer.vocab_size, width=96, layers=4, heads=3, hidden=288, context=64, encoder_layers=4))
    pretrain(model, tokenizer, [ids(tokenizer, e.prompt) for e in splits["train"]], steps)
    return model.requires_grad_(False).eval(), tokenizer, splits


def ids(tokenizer, text: str) -> list[int]:
    """As `Tokenizer.encode`, but <unk> is a word among others, since most sentences have one."""
    return [tokenizer.vocabulary[word] for word in text.split()][:64]


def pretrain(model, tokenizer, sentences: list[list[int]], steps: int) -> None:
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    for _ in tqdm(range(steps), desc="pre-training", leave=False):
        chosen = torch.randint(len(sentences), (64,), generator=generator).tolist()
        rows = sum((sentences[i] for i in chosen), [])                    # laid end to end, as in the shipped encoder's training
        tokens = torch.tensor(rows[: len(rows) // 65 * 65]).view(-1, 65)  # (B, T + 1)
        fill_in(model, tokens, tokenizer, generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()


def run(data, method: str, lr: float, seed: int, steps: int, pool: str) -> tuple[dict[str, float], int]:
    """(accuracy on the validation and on the test items, numbers trained beside the head's) of one training run."""
    model, tokenizer, splits = data
    labels = tuple(dict.fromkeys(e.completion for e in splits["train"]))
    make, _ = METHODS[method]
    torch.manual_seed(seed)
    head = Classifier(model, labels, make and make(model), pool)
    encode = lambda examples: [Encoded(ids(tokenizer, e.prompt), len(ids(tokenizer, e.prompt)), label=labels.index(e.completion)) for e in examples]
    before = {name: p.clone() for name, p in model.state_dict().items()}
    minireft.train(model, [head], encode(splits["train"]), TrainConfig(steps=steps, lr=lr, batch_size=32, seed=seed, full=make is None), progress=False)
    scores = {}
    with head, torch.no_grad():
        for split in ("validation", "test"):
            rows = encode(splits[split])
            batches = [collate(rows[first : first + 100]) for first in range(0, len(rows), 100)]
            scores[split] = sum(int((batch.through(model).argmax(-1) == batch.label).sum()) for batch in batches) / len(rows)
    model.load_state_dict(before)                                         # what was trained in full must not reach the next run
    beside = sum(p.numel() for p in model.parameters()) if make is None else head.method.num_parameters() if head.method else 0
    return scores, beside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("mood", "sst2"), default="mood")
    parser.add_argument("--pool", choices=("first", "mean"), default="mean", help="of a text's tokens, what the head scores")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--quick", action="store_true", help="one seed, one learning rate, few steps: does it run?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="update results/classification.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, seeds = (60, 1) if options.quick else (600, options.seeds)
    data = mood() if options.data == "mood" else sst2(100 if options.quick else 2500)
    model, _, splits = data
    majority = Counter(e.completion for e in splits["test"]).most_common(1)[0][1] / len(splits["test"])
    print(f"{options.data}: {', '.join(f'{len(part)} {name}' for name, part in splits.items())} items; always the commonest label: {majority:.3f}")
    found = {}
    for method in options.methods:
        rates = METHODS[method][1][1:2] if options.quick else METHODS[method][1]
        tried = {lr: run(data, method, lr, 0, steps, options.pool) for lr in rates}
        lr = max(rates, key=lambda lr: tried[lr][0]["validation"])
        first, beside = tried[lr]
        scores = [first["test"], *(run(data, method, lr, seed, steps, options.pool)[0]["test"] for seed in range(1, seeds))]
        error = statistics.stdev(scores) / math.sqrt(seeds) if seeds > 1 else float("nan")
        found[method] = {"parameters": beside, "lr": lr, "test": [round(s, 4) for s in scores]}
        print(f"{method:16} {beside:9,} beside the head, lr {lr:<7}  test {statistics.mean(scores):.3f} ± {error:.3f}   {found[method]['test']}", flush=True)
    if options.write:
        path = RESULTS / "classification.json"
        results = json.loads(path.read_text()) if path.is_file() else {}
        name = options.data if options.pool == "mean" else f"{options.data}, first token"
        results[name] = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "steps": steps, "batch": 32, "seeds": seeds,
                         "items": {split: len(part) for split, part in splits.items()}, "majority": round(majority, 4),
                         "encoder": {"layers": model.config.layers, "width": model.config.width,
                                     "parameters": sum(p.numel() for p in model.parameters())}, "methods": found}
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
