"""What a run says: sentences, tables, pictures and RESULTS.md, all from the stored cells and from nothing else.

Use:  write(claims, store, scale)
See:  folder/CLAIM.json, folder/CLAIM.png and folder/RESULTS.md; written again from the same cells they are the same.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from typing import NamedTuple

from benchmarks.neftune import interval
from minireft import files

from .engine import KEY, cells_of

ASIDE = (*KEY, "cpu_seconds", "date", "torch", "diverged")               # of a cell, what is no measure
Found = dict[tuple[str, str], dict[str, list[dict]]]                      # (base, task) → method → test cells by seed
JUDGEMENTS, MARGIN = ("as published", "against it", "not shown"), 0.05


class Finding(NamedTuple):
    """A sentence from the numbers, and one of JUDGEMENTS where the papers say how it should be."""

    text: str
    judgement: str = ""

    def __str__(self):
        return self.text + (f", {self.judgement}" if self.judgement in JUDGEMENTS[:2] else "")        # the text says what is not shown


def collect(claim, store, scale) -> Found:
    """The test cells so far, in the claim's order."""
    cells = store.found(claim, scale, "test")
    found = {unit: {m: sorted((c for c in cells if (c["base"], c["task"], c["method"]) == (*unit, m)), key=lambda c: c["seed"]) for m in claim.methods}
             for unit in claim.units}
    return {unit: {m: runs for m, runs in rows.items() if runs} for unit, rows in found.items() if any(rows.values())}


# ---- sentences

def paired(rows: dict, pair: tuple[str, str], measure: str) -> tuple[float, float, int] | None:
    """Mean difference of the two methods over the seeds that both have, half its 95 % interval, and how many seeds."""
    a, b = ({c["seed"]: c[measure] for c in rows.get(method, ())} for method in pair)
    both = sorted(a.keys() & b.keys())
    return (*interval([a[seed] - b[seed] for seed in both]), len(both)) if len(both) > 1 else None


def said(mean: float, half: float, n: int) -> str:
    word = "no difference shown" if abs(mean) <= half else "more" if mean > 0 else "less"
    return f"{mean:+.3f} ± {half:.3f} ({n} seeds): {word}"


def judged(mean: float, half: float, expected: str) -> str:
    """Where the 95 % interval lies, against what the papers found: "more", "less", "not less" or "same"; the last two within MARGIN."""
    low, high = mean - half, mean + half
    holds = {"more": low > 0, "less": high < 0, "not less": low > -MARGIN, "same": -MARGIN < low and high < MARGIN}[expected]
    broken = {"more": high < 0, "less": low > 0, "not less": high < 0, "same": low > 0 or high < 0}[expected]
    return JUDGEMENTS[0 if holds else 1 if broken else 2]


def differences(found: Found, what: str, pair: tuple[str, str], expected: str = "", measure: str = "accuracy", task: str = "") -> list[Finding]:
    """A finding for each unit, or each of the task's, on which both methods ran; `expected`: what the papers found, if they say."""
    return [Finding(f"{what} ({base}, {of}): {said(*difference)}", judged(*difference[:2], expected) if expected else "")
            for (base, of), rows in found.items() if task in ("", of) and (difference := paired(rows, pair, measure))]


# ---- pictures

def against_parameters(figure, claim, found: Found) -> None:
    """Accuracy against trainable parameters, a panel for each unit; what trains nothing is a dashed line."""
    for axes, ((base, task), rows) in zip(panels(figure, len(found)), found.items()):
        for i, (method, runs) in enumerate(rows.items()):
            mean, half = interval([c["accuracy"] for c in runs])
            if runs[0]["parameters"] == 0:
                axes.axhline(mean, ls="--", lw=1, color="0.6")
                axes.annotate(method, (0.01 + 0.2 * i, mean), xycoords=("axes fraction", "data"), fontsize=7, color="0.4", va="bottom")      # side by side
                continue
            axes.errorbar(runs[0]["parameters"], mean, yerr=half if half == half else None, fmt="os^D"[i // 10], ms=5, capsize=2, color=f"C{i % 10}", label=method)
        axes.set(xscale="log", title=f"{task}, {base} base", xlabel="trainable parameters", ylabel="share right", ylim=(-0.03, 1.06))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def heat_map(figure, found: Found, rows_of, columns, place) -> None:
    """Mean accuracy by (row, column) of a method; what has not run is left white."""
    for axes, ((base, task), rows) in zip(panels(figure, len(found)), found.items()):
        grid = [[float("nan")] * len(columns) for _ in rows_of]
        for method, runs in rows.items():
            row, column = place(method)
            grid[rows_of.index(row)][columns.index(column)] = mean = statistics.mean(c["accuracy"] for c in runs)
            axes.annotate(f"{mean:.2f}", (columns.index(column), rows_of.index(row)), ha="center", va="center", fontsize=8)
        axes.imshow(grid, cmap="YlGn", vmin=0, vmax=1, aspect="auto")
        axes.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows_of)), yticklabels=rows_of, title=f"{task}, {base} base: share right")


def dots(figure, claim, found: Found) -> None:
    """A dot for each seed, a bar for the mean and its 95 % interval; a panel for each unit."""
    for axes, ((base, task), rows) in zip(panels(figure, len(found)), found.items()):
        for y, (method, runs) in enumerate(rows.items()):
            values = [c[claim.best] for c in runs]
            mean, half = interval(values)
            axes.errorbar(mean, y, xerr=half if half == half else None, fmt="|", ms=12, capsize=3, color=f"C{y % 10}")
            axes.plot(values, [y + 0.2] * len(values), "o", ms=3, color=f"C{y % 10}", alpha=0.6)
        axes.set(yticks=range(len(rows)), yticklabels=rows, title=f"{task}, {base}", xlabel=claim.best)
        axes.invert_yaxis()


def panels(figure, count: int) -> list:
    columns = min(3, count)
    figure.set_size_inches(5.2 * columns, 4.2 * -(-count // columns))
    every = list(figure.subplots(-(-count // columns), columns, squeeze=False).flat)
    for spare in every[count:]:
        spare.remove()
    return every[:count]


# ---- the page

def table(claim, found: Found) -> list[str]:
    """Markdown: for every unit and method the chosen value and each measure, mean ± 95 % interval, and the difference to the reference."""
    measures = [name for name in next(iter(next(iter(found.values())).values()))[0] if name not in ASIDE]
    against = claim.reference and claim.best in measures
    lines = [["base", "task", "method", "value", "seeds", *measures, *([f"{claim.best} less {claim.reference}'s"] if against else [])]]
    lines.append(["---"] * len(lines[0]))
    for (base, task), rows in found.items():
        for method, runs in rows.items():
            grid, value = claim.methods[method], runs[0]["value"]
            edge = " (edge)" if len(grid) > 2 and value in (grid[0], grid[-1]) else ""
            cells = [f"{runs[0][name]:,}" if name == "parameters" else "{:.3f} ± {:.3f}".format(*interval([c[name] for c in runs])) for name in measures]
            difference = paired(rows, (method, claim.reference), claim.best) if against and method != claim.reference else None
            lines.append([base, task, method, f"{value:g}{edge}" if len(grid) > 1 else "", str(len(runs)), *cells,
                          *(["{:+.3f} ± {:.3f}".format(*difference) if difference else ""] if against else [])])
    return [f"| {' | '.join(line)} |".replace("± nan", "") for line in lines]


def progress(claim, store, scale) -> tuple[int, int]:
    """Cells that have run, and all there will be."""
    selecting = [cell for unit in claim.units for cell in cells_of(claim, *unit, scale, "select")]
    return (len(selecting) - len(store.missing(selecting)) + len(store.found(claim, scale, "test")),
            len(selecting) + len(claim.units) * len(claim.methods) * scale.seeds)


def summary(findings: list[Finding]) -> str:
    """How often it was as the papers found, of the comparisons that they speak of."""
    count = Counter(finding.judgement for finding in findings if finding.judgement)
    return ", ".join(f"{count[judgement]} {judgement}" for judgement in JUDGEMENTS if count[judgement]) or "–"


def state(done: int, of: int) -> str:
    return "complete" if done == of else "not run" if done == 0 else f"partly: {done} of {of} cells"


def section(claim, store, scale, drawn: bool) -> list[str]:
    found, (done, of), selected = collect(claim, store, scale), progress(claim, store, scale), validation(claim, store, scale)
    lines = [f"## {claim.name}: {claim.title}", "", f"**State:** {state(done, of)}.", "", f"> **Published, not ours.** {claim.published}", ""]
    if found:
        units = ", ".join(f"{task} ({base}, {sum(len(runs) == scale.seeds for runs in rows.values())} of {len(claim.methods)} methods)"
                          for (base, task), rows in found.items())
        over = "on test items, over up to {} seeds that selection never saw" if selected else "over up to {} seeds, with nothing to select"
        lines += [f"**Found here** {over.format(scale.seeds)}: {units}.", "",
                  *(f"- {finding}" for finding in claim.verdict(found)), "", *table(claim, found), "",
                  "± is half a 95 % interval over seeds, by Student's t; differences pair the seeds."
                  + (" The value was chosen on validation items; “(edge)”: it is the grid's first or last." if selected else ""), ""]
        lines += [f"![{claim.title}]({claim.name}.png)", ""] if drawn else []
    else:
        lines += ["**Found here:** nothing yet" + (": selection has begun, no test split was opened." if done else "."), ""]
    lines += [f"{claim.best[0].upper()}{claim.best[1:]} on validation items at each value of the grid, one seed, from which the value was chosen:", "", *selected, ""] if selected else []
    return [*lines, f"**Why it may differ:** {claim.why}", ""]


def validation(claim, store, scale) -> list[str]:
    """Markdown: what selection saw, a row for each unit and method, in the order of the grid."""
    cells = {(c["base"], c["task"], c["method"], c["value"]): c[claim.best] for c in store.found(claim, scale, "select")}
    lines = [f"| {base} | {task} | {method} | " + ", ".join(f"{value:g}: {cells[base, task, method, value]:.3f}" for value in grid
                                                            if (base, task, method, value) in cells) + " |"
             for base, task in claim.units for method, grid in claim.methods.items() if any((base, task, method, value) in cells for value in grid)]
    return ["| base | task | method | value: " + claim.best + " |", "| --- | --- | --- | --- |", *lines] if lines else []


def write(claims, store, scale) -> None:
    """All of it, into the store's folder."""
    page = ["# The papers' claims in miniature", "",
            "Written by `minireft reproduce` from the cells beside this page; nothing here comes from a keyboard but the published figures and what may "
            "explain a difference. A claim that does not hold at this scale stands here as such.", "",
            f"Scale: {scale.name}; {scale.seeds} seeds, {scale.items} test items, {scale.validation} validation items. A sentence says “no difference shown” where the "
            "paired 95 % interval holds 0; with this many comparisons some of those that do not will be chance. Where the papers say which way a comparison "
            f"should go, it is “as published” or “against it” if the interval decides, and “not shown” if not; that two are alike is decided within {MARGIN:g}.", "",
            "| claim | here | state | CPU minutes |", "| --- | --- | --- | --- |"]
    sections = []
    for claim in claims:
        cells = store.found(claim, scale, "test") + store.found(claim, scale, "select")
        found = collect(claim, store, scale)
        findings = claim.verdict(found)
        page.append(f"| [{claim.title}](#{claim.name}) | {summary(findings)} | {state(*progress(claim, store, scale))} | {sum(c['cpu_seconds'] for c in cells) / 60:.0f} |")
        sections += [f'<a id="{claim.name}"></a>', "", *section(claim, store, scale, picture(claim, found, store.folder / f"{claim.name}.png"))]
        files.write_text(store.folder / f"{claim.name}.json", json.dumps({
            "claim": claim.name, "title": claim.title, "scale": vars(scale), "state": state(*progress(claim, store, scale)), "findings": [finding._asdict() for finding in findings],
            "found": [{"base": base, "task": task, "method": method, "value": runs[0]["value"], "seeds": [c["seed"] for c in runs],
                       **{name: [c[name] for c in runs] for name in runs[0] if name not in ASIDE}}
                      for (base, task), rows in found.items() for method, runs in rows.items()]}, indent=1, ensure_ascii=False) + "\n")
    files.write_text(store.folder / "RESULTS.md", "\n".join([*page, "", *sections]))


def picture(claim, found: Found, path) -> bool:
    """False without matplotlib, or with nothing to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not found:
        return False
    figure = Figure(layout="constrained")
    (claim.draw or dots)(figure, claim, found)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    return True
