"""Draws the results of `minireft bench` as pictures beside them: roofline, speed-up, where a training step's time goes, tokens a second.
Run: python benchmarks/plot.py          (after minireft bench ... --write; needs matplotlib)
You should see results/roofline.png, speedup.png, step.png and tokens.png written anew; a picture without its results is left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))           # so that it also runs as a file
from benchmarks import harness  # noqa: E402

COLORS = {"common": "#9a9a9a", "eager": "#4477aa", "compiled": "#ccbb44", "reference": "#aa3377", "ours": "#ee6677", "triton": "#228833",
          "low_rank_edit": "#ee6677", "low_rank_edit_at_": "#aa3377", "scale": "#4477aa", "gelu_scale": "#66ccee", "swiglu_scale": "#228833",
          "noisy_embedding": "#ccbb44", "forward": "#4477aa", "backward": "#66ccee", "update": "#ccbb44",
          "floor": "#555555", "LoReFT": "#ee6677", "(IA)³": "#4477aa", "(IA)³ merged": "#66ccee", "LoRA": "#228833"}


def figure(columns: int = 1, width: float = 7.0, height: float = 4.4):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left"})
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)


def of_one_thread(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if row["threads"] == 1 and all(row[name] == value for name, value in wanted.items())]


def caption(rows: list[dict]) -> str:
    newest = max(rows, key=lambda row: row["date"])
    return f"{newest['device']}, one thread, torch {newest['torch']}, {newest['date']}"


def roofline(rows: list[dict]):
    """Every kernel at N 4096, C 1024 (positions: 448 rows), inputs not in cache: arithmetic reached, over the arithmetic a byte must carry."""
    rows = [row for row in of_one_thread(rows, cache="cold", C=1024, tasks=0) if row["pass"] != "both"]
    fig, axes = figure()
    axis, limits = axes[0][0], rows[0]["ceilings"]
    x = [0.03, 60]
    axis.plot(x, [limits["copy"] * i for i in x], color="black", lw=1)
    axis.annotate(f"copy, {limits['copy']:.0f} GB/s", (0.035, limits["copy"] * 0.045), rotation=38, fontsize=8)
    for dtype, style in (("float32", "-"), ("bfloat16", "--")):
        rate = limits["operations"].get(dtype) or next(r["ceilings"]["operations"][dtype] for r in rows if dtype in r["ceilings"]["operations"])
        axis.axhline(rate, color="black", lw=1, ls=style)
        axis.annotate(f"{dtype}, {rate:.0f} GFLOP/s", (0.035, rate * 1.08), fontsize=8)
    for row in rows:
        i, us = row["operations"] / row["bytes"], row["providers"]["ours"]["us"][1]
        axis.plot(i, row["operations"] / us / 1e3, {"float32": "o", "bfloat16": "s"}[row["dtype"]], color=COLORS[row["op"]], ms=7,
                  mfc=COLORS[row["op"]] if row["pass"] == "forward" else "white")
    for op in dict.fromkeys(row["op"] for row in rows):
        axis.plot([], [], "o", color=COLORS[op], label=op)
    for marker, face, label in (("o", "black", "float32"), ("s", "black", "bfloat16"), ("o", "white", "backward: hollow")):
        axis.plot([], [], marker, color="black", mfc=face, label=label)
    axis.set(xscale="log", yscale="log", xlabel="operations a byte of least traffic", ylabel="GFLOP/s", xlim=x,
             title=f"What the kernels reach of this machine\n{caption(rows)}")
    axis.legend(fontsize=8, ncols=2, loc="lower right", frameon=False)
    return fig


def speedup(rows: list[dict]):
    """The low-rank edit, forward and backward, over well-written eager: against rank, and against rows."""
    rows = of_one_thread(rows, op="low_rank_edit", C=1024, cache="hot", tasks=0, **{"pass": "both"})
    fig, axes = figure(2, 9.5, 3.8)
    for axis, name, fixed, label in ((axes[0][0], "r", ("N", 4096), "rank r, at N 4096, C 1024"), (axes[0][1], "N", ("r", 8), "rows N, at C 1024, r 8")):
        for dtype, style in (("float32", "-"), ("bfloat16", "--")):
            line = sorted((row for row in rows if row["dtype"] == dtype and row[fixed[0]] == fixed[1]), key=lambda row: row[name])
            for provider in ("compiled", "ours"):
                ys = [[row["providers"]["eager"]["us"][1] / us for us in row["providers"][provider]["us"]] for row in line]
                axis.plot([row[name] for row in line], [y[1] for y in ys], style, marker="o", ms=4, color=COLORS[provider], label=f"{provider}, {dtype}")
                axis.fill_between([row[name] for row in line], [y[2] for y in ys], [y[0] for y in ys], color=COLORS[provider], alpha=0.15, lw=0)
        ticks = sorted({row[name] for row in rows if row[fixed[0]] == fixed[1]})
        axis.axhline(1, color=COLORS["eager"], lw=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{t:,}" for t in ticks])
        axis.minorticks_off()
        axis.set(xlabel=label, ylabel="times faster than eager" * (name == "r"), ylim=(0, None))
    axes[0][0].set_title(f"Low-rank edit, forward and backward ({caption(rows)})")
    axes[0][1].legend(fontsize=8, frameon=False, handlelength=4)
    return fig


def step(rows: list[dict]):
    """Where a training step's time goes, by method, as shares of the floor's whole step."""
    rows = [row for row in of_one_thread(rows, part="step", C=256, beside="") if (row["batch"], row["tokens"]) in ((8, 128), (1, 16))]
    rows.sort(key=lambda row: -row["batch"])
    fig, axes = figure(len(rows), 9.5, 3.8)
    for axis, row in zip(axes[0], rows):
        found = row["providers"]
        names, floor = [*found][::-1], sum(found["floor"]["phases_us"].values())
        left = [0.0] * len(names)
        for phase in found["floor"]["phases_us"]:
            width = [found[name]["phases_us"][phase] / floor for name in names]
            axis.barh(names, width, left=left, color=COLORS[phase], label=phase)
            left = [a + b for a, b in zip(left, width)]
        for y, end in enumerate(left):
            axis.annotate(f"{end:.2f}", (end, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
        axis.axvline(1, color="black", lw=0.8)
        axis.set(title=f"batch {row['batch']} × {row['tokens']}, floor {floor / 1e3:.0f} ms", xlabel="time over the floor's", xlim=(0, 1.15 * max(left)))
    for axis in axes[0][1:]:
        axis.set_yticklabels([])
    axes[0][-1].legend(fontsize=8, frameon=False, loc="upper right")
    fig.suptitle(f"A training step by method, C 256, 4 layers ({caption(rows)})", x=0.01, ha="left", fontsize=10)
    return fig


def tokens(training: list[dict], generation: list[dict]):
    """Tokens a second by method and batch, in training and in generation of 16 new tokens."""
    steps = of_one_thread(training, part="step", C=256, beside="")
    generated = of_one_thread(generation, part="generate", C=256, beside="")
    fig, axes = figure(2, 9.5, 3.8)
    for axis, rows, count, title in ((axes[0][0], steps, lambda row: row["batch"] * row["tokens"], "training"),
                                     (axes[0][1], generated, lambda row: 16 * row["batch"], "generation, 16 new tokens")):
        rows = sorted(rows, key=lambda row: (row["batch"], row["tokens"]))
        names = [name for name in COLORS if all(name in row["providers"] for row in rows)]
        for i, name in enumerate(names):
            x = [j + 0.8 * (i - (len(names) - 1) / 2) / len(names) for j in range(len(rows))]
            rates = [[count(row) / us * 1e6 for us in row["providers"][name]["us"]] for row in rows]
            axis.bar(x, [r[1] for r in rates], 0.75 / len(names), color=COLORS[name], label=name,
                     yerr=[[r[1] - r[2] for r in rates], [r[0] - r[1] for r in rates]], error_kw={"lw": 0.8})
        axis.set_xticks(range(len(rows)), [f"{row['batch']} × {row['tokens']}" for row in rows])
        axis.set(title=title, xlabel="batch × tokens" if axis is axes[0][0] else "batch × tokens of the prompt")
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.legend(fontsize=8, frameon=False)
    axes[0][0].set_ylabel("tokens a second")
    fig.suptitle(f"C 256, 4 layers ({caption(steps)})", x=0.01, ha="left", fontsize=10)
    return fig


def main() -> None:
    have = {name: harness.read(path) for name in ("kernels", "training", "generation") if (path := harness.RESULTS / f"{name}.jsonl").exists()}
    pictures = {"roofline": (roofline, "kernels"), "speedup": (speedup, "kernels"), "step": (step, "training"),
                "tokens": (tokens, "training", "generation")}
    for name, (draw, *needs) in pictures.items():
        if all(need in have for need in needs):
            draw(*(have[need] for need in needs)).savefig(harness.RESULTS / f"{name}.png", dpi=130)
            print(f"wrote results/{name}.png")


if __name__ == "__main__":
    main()
