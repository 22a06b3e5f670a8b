"""What noise on the embeddings does to a fine-tuned model: the analyses of NEFTune's paper in miniature (Jain et al. 2023).
Run: minireft analyse neftune [--seeds 4] [--quick] [--out FOLDER]          (or python benchmarks/neftune.py; about 6 minutes)
You should see, for each kind of noise, means over seeds with 95 % intervals, and neftune.json and neftune.png in FOLDER.

The shipped base is fine-tuned in full on 256 instructions, the demo's recipe; a seed is another set of examples, order and
noise. All that is reported is measured without noise, on greedy answers. A difference is to the run without noise of the
same seed. "forced longer" is that run with the end of text forbidden until an answer has 4 more tokens than it gave itself.
Answers in this family have a prescribed form: they can only get longer by getting wrong, unlike an assistant's.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

import minireft
from minireft import NEFTune, TrainConfig, files, tasks
from minireft.cli import reader_may_leave
from minireft.data import collate, encode, encode_prompt
from minireft.demo import FULL, processor
from minireft.evaluation import evaluating
from minireft.generation import generate_ids
from minireft.losses import likelihood
from minireft.tasks import texts

NOISES = {"no noise": None, "uniform, α = 5": dict(alpha=5.0), "uniform, α = 15": dict(alpha=15.0),
          "Gaussian, α = 5": dict(alpha=5.0, distribution="gaussian")}
CONTROL, LONGER = "forced longer", 4
MEASURES = {  # name → what it is, for the table and the picture
    "train loss": "nats a token, training items", "test loss": "nats a token, test items",
    "ROUGE-L": "answers to training items with theirs", "BLEU": "answers to training items with theirs",
    "obeyed": "share of test items, by a program", "length": "tokens of an answer to a test item",
    "repetition": "share of 2-grams, test items", "log-diversity": "2- to 4-grams, test items"}
ALPHAS = (5.0, 15.0, 50.0, 150.0)       # for the nearest token
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447}            # Student's t for n seeds


# ---- one model

@torch.no_grad()
def loss(model, examples) -> float:
    """Mean −log p of the completions' tokens, nats, without noise."""
    rows = [encode(model.tokenizer, example, model.config.context) for example in examples]
    with evaluating(model):
        total = sum(likelihood(model(batch.tokens, batch.mask, batch.prompt_lengths), batch).item()
                    for batch in (collate(rows[i : i + 64]) for i in range(0, len(rows), 64)))
    return total / sum(row.predicted(row.ids) for row in rows)


def answers(model, examples, longer: int = 0) -> list[str]:
    """Greedy answers; with `longer`, the end of text is forbidden until each has so many tokens more than by itself."""
    tokenizer, context = model.tokenizer, model.config.context
    prompts = [encode_prompt(tokenizer, example.prompt, context) for example in examples]
    written = generate_ids(model, prompts, 40, tokenizer.eos_id)
    if longer:
        def forbid(operation, edits_context):
            return lambda h: operation(h).index_fill(-1, torch.tensor([tokenizer.eos_id]), -torch.inf)
        begun = [prompt + ids for prompt, ids in zip(prompts, written)]
        model.head.edits.append(forbid)
        try:
            forced = generate_ids(model, begun, longer, None)
        finally:
            model.head.edits.remove(forbid)
        rest = generate_ids(model, [a + b for a, b in zip(begun, forced)], 40, tokenizer.eos_id)
        written = [a + b + c for a, b, c in zip(written, forced, rest)]
    return [tokenizer.decode(ids) for ids in written]


def of_answers(train, test, to_train, to_test) -> dict[str, float]:
    words, wanted = [text.split() for text in to_train], [example.completion.split() for example in train]
    free = [text.split() for text in to_test]
    return {"ROUGE-L": statistics.mean(map(texts.rouge_l, words, wanted)), "BLEU": texts.bleu(words, wanted),
            "obeyed": statistics.mean(tasks.check("instructions", e, text) for e, text in zip(test, to_test)),
            "length": statistics.mean(map(len, free)), "repetition": texts.repetition(free), "log-diversity": texts.log_diversity(free)}


def run(noise: dict | None, seed: int, train, test, config) -> dict[str, dict[str, float]]:
    """Fine-tunes on `train`; {row of the table: measures}, the control with the run without noise."""
    model, _ = minireft.load("base")
    adapters = [NEFTune(model, seed=seed, **noise)] if noise else []
    minireft.train(model, adapters, train, replace(config, seed=seed), progress=False)
    losses, some = {"train loss": loss(model, train), "test loss": loss(model, test)}, train[: len(test)]
    found = {"": losses | of_answers(some, test, answers(model, some), answers(model, test))}
    if noise is None:
        found[CONTROL] = of_answers(some, test, answers(model, some, LONGER), answers(model, test, LONGER))
    return found


@torch.no_grad()
def nearest(model, examples, alpha: float) -> float:
    """The share of training tokens whose noised embedding is still nearest (Euclid) to their own."""
    weight, same, total = model.embed.weight, 0, 0
    noise = NEFTune(model, alpha=alpha)
    for example in examples:
        tokens = torch.tensor([encode(model.tokenizer, example, model.config.context).ids])      # (1, T)
        x = minireft.ops.noisy_embedding(tokens, weight, alpha, noise.seed, rows=torch.tensor([example.id]))[0]      # (T, C)
        same += (torch.cdist(x, weight).argmin(-1) == tokens[0]).sum().item()
        total += tokens.shape[1]
    return same / total


# ---- all of them

def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t; the width is nan for a single value."""
    n = len(values)
    return statistics.mean(values), T95[n] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan


def having(found: dict[str, list[dict]], measure: str) -> dict[str, list[dict]]:
    """The rows that have this measure: the control shares its losses with the run without noise."""
    return {name: runs for name, runs in found.items() if measure in runs[0]}


def table(found: dict[str, list[dict]]) -> list[str]:
    """A line for each row and measure: mean ± interval, and the paired difference to the run without noise."""
    lines = []
    for measure, what in MEASURES.items():
        lines.append(f"{measure}: {what}")
        for name, runs in having(found, measure).items():
            mean, half = interval([run[measure] for run in runs])
            difference, width = interval([run[measure] - quiet[measure] for run, quiet in zip(runs, found["no noise"])])
            beside = "" if name == "no noise" else f"   difference {difference:+.4f} ± {width:.4f}"
            lines.append(f"  {name:18}{mean:9.4f} ± {half:.4f}{beside}")
    return lines


def picture(found: dict[str, list[dict]], path: Path) -> bool:
    """A panel for each measure: dots are seeds, a bar is the mean. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(13, 6), layout="constrained")
    for axes, (measure, what) in zip(figure.subplots(2, 4, sharey=True).flat, MEASURES.items()):
        for y, runs in enumerate(having(found, measure).values()):
            values = [run[measure] for run in runs]
            mean, half = interval(values)
            axes.errorbar(mean, y, xerr=half if half == half else None, fmt="|", ms=14, capsize=3, color=f"C{y}")
            axes.plot(values, [y + 0.2] * len(values), "o", ms=4, color=f"C{y}", alpha=0.6)
        axes.set(yticks=range(len(found)), yticklabels=found, title=measure)
        axes.set_xlabel(what, fontsize=8)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    return True


@reader_may_leave()
def main() -> None:
    parser = argparse.ArgumentParser(prog="minireft analyse neftune", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="2 to 7 (default: 4)")
    parser.add_argument("--out", type=Path, default=Path("runs/neftune"), metavar="FOLDER", help="default: runs/neftune")
    parser.add_argument("--quick", action="store_true", help="few steps and items, 2 seeds: whether it runs, not what it shows")
    args = parser.parse_args()
    seeds, size, items, config = (2, 32, 16, TrainConfig(**{**FULL, "steps": 20})) if args.quick else (args.seeds, 256, 200, TrainConfig(**FULL))
    if seeds not in T95:
        parser.error(f"--seeds {seeds}: expected 2 to 7")
    torch.set_num_threads(1)
    every, test = tasks.load("instructions", "train", size * seeds), tasks.load("instructions", "test", items)
    found, started = {name: [] for name in (*NOISES, CONTROL)}, time.process_time()
    for seed in range(seeds):
        for name, noise in NOISES.items():
            for row, measures in run(noise, seed, every[size * seed : size * (seed + 1)], test, config).items():
                found[row or name].append(measures)
            print(f"seed {seed}, {name}: {time.process_time() - started:.0f} CPU seconds so far", flush=True)
    model, _ = minireft.load("base")
    own = {alpha: nearest(model, every[:items], alpha) for alpha in ALPHAS}
    lines = table(found) + ["nearest token is a noised embedding's own, share of training tokens:",
                            "  " + "   ".join(f"α = {alpha:g}: {share:.3f}" for alpha, share in own.items())]
    print("\n".join(lines))
    files.write_text(args.out / "neftune.json", json.dumps({
        "date": time.strftime("%Y-%m-%d"), "machine": f"{processor()}, one thread", "torch": torch.__version__, "quick": args.quick,
        "cpu_seconds": round(time.process_time() - started), "seeds": seeds, "training_items": size, "test_items": items,
        "config": {"steps": config.steps, "lr": config.lr, "batch_size": config.batch_size}, "runs": found, "nearest": own,
        "summary": {name: {measure: interval([run[measure] for run in runs]) for measure in runs[0]} for name, runs in found.items()}},
        indent=1, ensure_ascii=False) + "\n")
    drawn = picture(found, args.out / "neftune.png")
    print(f"in {args.out}: neftune.json", "and neftune.png" if drawn else "(no picture: matplotlib is missing)")


if __name__ == "__main__":
    main()
