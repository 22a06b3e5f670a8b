"""The demo: what the shipped base cannot do, what each method teaches it in seconds, and what that costs in parameters.

Use:  minireft demo                     # or `make demo`, which installs what is needed first
See:  a table of accuracies before and after on held-out items, a few answers, adapters and a picture in runs/demo.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from . import IA3, LoRA, LoReFT, NEFTune, TrainConfig, evaluate, files, load, ops, tasks, train
from .data import encode
from .evaluation import mean_log_likelihoods


@dataclass(frozen=True)
class Entry:
    """One row of the table. `make` gives the adapters; settings were chosen on validation items, never on test ones."""

    name: str
    task: str
    make: object                        # model → adapters
    config: TrainConfig
    examples: int                       # how many to train on


SHORT, FULL = dict(steps=200), dict(steps=150, lr=5e-4, full=True)
ENTRIES = [
    Entry("LoReFT", "facts", lambda m: [LoReFT(m, rank=4, positions="f7+l7")], TrainConfig(lr=1.5e-2, **SHORT), 600),
    Entry("(IA)³", "facts", lambda m: [IA3(m)], TrainConfig(lr=5e-2, **SHORT), 600),
    Entry("LoRA", "facts", lambda m: [LoRA(m, rank=2, alpha=4)], TrainConfig(lr=1.2e-2, **SHORT), 600),
    Entry("full", "instructions", lambda m: [], TrainConfig(**FULL), 256),
    Entry("full + NEFTune", "instructions", lambda m: [NEFTune(m, alpha=5.0)], TrainConfig(**FULL), 256),
]
ITEMS = 300                             # test items of each task


@dataclass(frozen=True)
class Row:
    """What one entry came to. Losses in nats a token, accuracies as shares."""

    name: str
    task: str
    parameters: int
    base_parameters: int
    before: float
    after: float
    items: int
    seconds: float
    losses: list[float]                 # of every step
    test_loss: float

    def error(self, p: float) -> float:
        """The standard error of an accuracy p."""
        return (p * (1 - p) / self.items) ** 0.5

    def cells(self) -> list[str]:
        before, after = (f"{p:.3f} ± {self.error(p):.3f}" for p in (self.before, self.after))
        share = f"{self.parameters / self.base_parameters:.2%}"
        return [self.name, f"{self.parameters:,}", share, before, after, f"{self.seconds:.0f}"]


HEADER = ["method", "trainable", "of base", "before", "after", "seconds"]
WHAT = {"facts": "finish a line about what it has read, in a wording it has not; right = the choice it finds likeliest",
        "instructions": "do what is asked, in words new to it; right = a program finds the request obeyed"}


def line(cells: list[str]) -> str:
    return f"  {cells[0]:15}{cells[1]:>11}{cells[2]:>10}{cells[3]:>16}{cells[4]:>16}{cells[5]:>9}"


def run(base="base", out="runs/demo", quick: bool = False) -> None:
    """Runs every entry, prints the table as it grows, writes adapters, results.json and demo.png to `out`."""
    torch.set_num_threads(1)            # the base is small: a second thread costs more than it brings
    out, items, rows = Path(out), 40 if quick else ITEMS, []
    model, tokenizer = load(base)
    size = sum(p.numel() for p in model.parameters())
    print(f"a base of {size:,} parameters, {model.config.layers} layers of {model.config.width}, on {backend()}")
    for task in dict.fromkeys(entry.task for entry in ENTRIES):
        test = tasks.load(task, "test", items)
        before, written = answer(model, tokenizer, task, test)
        answers = {"base": written}
        print(f"\n{task}: {WHAT[task]}\n{line(HEADER)}", flush=True)
        for entry in (entry for entry in ENTRIES if entry.task == task):
            row, answers[entry.name] = compete(entry, base, test, before, out, quick)
            rows.append(row)
            print(line(row.cells()), flush=True)
        for i in range(2):
            print(f"\n  {test[i].prompt}\n    {'right, e.g.':16} {test[i].completion}")
            print("\n".join(f"    {name:16} {texts[i]}" for name, texts in answers.items()))
    files.write_text(out / "results.json", json.dumps({
        "date": time.strftime("%Y-%m-%d"), "machine": f"{processor()}, one thread", "torch": torch.__version__,
        "backend": backend(), "quick": quick, "header": HEADER,
        "rows": [{**asdict(row), "cells": row.cells()} for row in rows]}) + "\n")
    drawn = picture(rows, out / "demo.png")
    print(f"\nin {out}: the adapters, results.json", "and demo.png" if drawn else "(no picture: matplotlib is missing)")


def compete(entry: Entry, base, test, before: float, out: Path, quick: bool) -> tuple[Row, tuple[str, ...]]:
    """Trains one entry on a fresh base and scores it: its row, and the answers that were written."""
    model, tokenizer = load(base)
    torch.manual_seed(0)
    adapters = entry.make(model)
    config = replace(entry.config, steps=4) if quick else entry.config
    examples = tasks.load(entry.task, "train", entry.examples)
    outcome = train(model, adapters, examples, config, tokenizer, progress=sys.stderr.isatty())
    learned = [adapter for adapter in adapters if adapter.num_parameters()]
    for adapter in learned:
        adapter.save(out / f"{type(adapter).__name__.lower()}.safetensors")
        adapter.attach()
    after, written = answer(model, tokenizer, entry.task, test)
    size = sum(p.numel() for p in model.parameters())
    trained = sum(adapter.num_parameters() for adapter in learned) or size
    return Row(entry.name, entry.task, trained, size, before, after, len(test), outcome.seconds, outcome.losses,
               loss(model, tokenizer, test)), written


def answer(model, tokenizer, task: str, examples) -> tuple[float, tuple[str, ...]]:
    """The share of right answers, and what is written greedily."""
    scores = evaluate(model, tokenizer, examples)
    if scores.rank is not None:
        return scores.rank, scores.answers
    return sum(tasks.check(task, e, a) for e, a in zip(examples, scores.answers)) / len(examples), scores.answers


def loss(model, tokenizer, examples) -> float:
    """Mean −log p of the completions' tokens."""
    rows = [encode(tokenizer, example, model.config.context) for example in examples]
    tokens = [len(row.ids) - row.prompt_length for row in rows]
    return -sum(mean * n for mean, n in zip(mean_log_likelihoods(model, rows), tokens)) / sum(tokens)


def backend() -> str:
    return "CPU kernels" if ops.backends()["cpu"] else "plain PyTorch"


def processor() -> str:
    """The name of the CPU, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(entry.split(":")[1].strip() for entry in lines if entry.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------------------- picture

INK, FAINT = "#22303c", "#8a97a3"
COLOURS = {"LoReFT": "#c8452f", "(IA)³": "#2f7f6f", "LoRA": "#4a67b0", "full": "#6d5296", "full + NEFTune": "#b8791b"}


def picture(rows: list[Row], path: Path) -> bool:
    """Left: accuracy before and after. Right: what noise does to the losses. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    import io
    matplotlib.use("agg")
    from matplotlib import pyplot
    style = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
             "axes.edgecolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT, "axes.spines.top": False,
             "axes.spines.right": False, "axes.titlelocation": "left", "axes.titleweight": "bold",
             "axes.titlesize": 11, "axes.titlepad": 14}
    with pyplot.rc_context(style):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), width_ratios=(1, 1), layout="constrained")
        draw_accuracy(left, rows)
        draw_losses(right, [row for row in rows if row.task == "instructions"])
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=160, facecolor="white")
        pyplot.close(figure)
    files.write_bytes(path, buffer.getvalue())
    return True


def draw_accuracy(axes, rows: list[Row]) -> None:
    """A line a method, from the frozen base's accuracy to its own."""
    margin = dict(xycoords=("axes fraction", "data"), textcoords="offset points")
    for y, row in enumerate(rows):
        colour = COLOURS[row.name]
        axes.plot([row.before, row.after], [y, y], color=colour, lw=2, alpha=0.35, zorder=1)
        for x, paint in ((row.before, FAINT), (row.after, colour)):
            axes.errorbar(x, y, xerr=row.error(x), fmt="o", ms=8, lw=2, color=paint)
        axes.annotate(f"{row.after:.2f}", (row.after, y), (0, 9), textcoords="offset points", ha="center", color=colour,
                      fontsize=9)
        axes.annotate(row.name, (0, y), (-8, 1), **margin, ha="right", va="bottom", color=colour, weight="bold")
        axes.annotate(f"{row.parameters:,} trained", (0, y), (-8, -2), **margin, ha="right", va="top", color=FAINT,
                      fontsize=8.5)
        if y == 0 or row.task != rows[y - 1].task:
            title = f"{row.task}, {row.items} test items; grey: the frozen base, {row.before:.2f}"
            axes.annotate(title, (0, y), (6, 24), **margin, color=INK, fontsize=9)
    axes.set(xlim=(-0.03, 1.03), ylim=(len(rows) - 0.5, -0.75), yticks=[], xlabel="share right",
             title="Before and after tuning")
    axes.grid(axis="x", color=FAINT, alpha=0.2)


def draw_losses(axes, rows: list[Row]) -> None:
    """Training as a line, the test items' loss at its end as dashes."""
    window, steps = max(1, len(rows[0].losses) // 15), len(rows[0].losses)
    for row, side in zip(sorted(rows, key=lambda row: row.test_loss), ("top", "bottom")):
        smooth = [sum(row.losses[i - window + 1 : i + 1]) / window for i in range(window - 1, steps)]
        axes.plot(range(window, steps + 1), smooth, color=COLOURS[row.name], lw=2)
        axes.axhline(row.test_loss, color=COLOURS[row.name], lw=1.5, ls=(0, (4, 3)))
        axes.annotate(f"{row.name}\n{row.test_loss:.2f} on test items", (steps, row.test_loss), (5, 0), va=side,
                      textcoords="offset points", color=COLOURS[row.name], fontsize=9, linespacing=1.3,
                      annotation_clip=False)
    axes.set(xlim=(0, steps), ylim=(0, None), xlabel="step", ylabel="loss, nats a token",
             title=f"{rows[0].task.capitalize()}: loss in training, and on test items (dashes)")
