"""Writes measured results into README.md, between its markers; numbers there come from files, never from a keyboard.
Run: python benchmarks/readme.py [runs/demo]     (with a folder: first takes the results and the picture of that demo)
You should see README.md's tables change where the results have; `python benchmarks/readme.py` again changes nothing.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.tfew import accuracy_table  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def demo_table(results: dict) -> str:
    """The demo's table in Markdown, and where it was measured."""
    rows = [["task", *results["header"]], *([row["task"], *row["cells"]] for row in results["rows"])]
    text = "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))
    losses = [f"{row['name']} {row['test_loss']:.2f}" for row in results["rows"] if row["task"] == "instructions"]
    return (f"{text}\n\nAccuracies on {results['rows'][0]['items']} held-out items, ± their standard error. Loss on the "
            f"instructions' test items, in nats a token: {', '.join(losses)}.\n"
            f"Measured {results['date']} on {results['machine']}, torch {results['torch']}, {results['backend']}.")


def tfew_table(results: dict) -> str:
    """Accuracies by rank classification, and what an answer costs."""
    bills = results["bill"].values()
    share = [b["flops, T-Few"] / b["flops, in the prompt"] for b in bills]
    kept = [b["flops, T-Few"] / b["flops, in the prompt, cached"] for b in bills]
    return (f"{accuracy_table(results)}\n\nMedians (and quartiles) over {results['subsets']} subsets of {results['shots']} examples and "
            f"{results['templates']} templates, {results['items']} questions each; an answer costs {min(share):.0%} to {max(share):.0%} of the FLOPs of one "
            f"with the examples in the prompt, and {min(kept):.0%} to {max(kept):.0%} where the prompt's cache is kept.\n"
            f"Measured {results['date']} on {results['machine']}, one thread, torch {results['torch']}.")


def neftune_table(results: dict) -> str:
    """Each measure's mean and 95 % interval over seeds, one row a way of training."""
    names = list(next(iter(results["summary"].values())))
    lines = [["trained with", *names], ["---"] * (1 + len(names))]
    for way, found in results["summary"].items():
        lines.append([way, *(f"{found[name][0]:.2f} ± {found[name][1]:.2f}" if name in found else "" for name in names)])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (f"{text}\n\nMeans and 95 % intervals over {results['seeds']} seeds; all weights tuned on {results['training_items']} instructions, "
            f"{results['test_items']} test items. Measured {results['date']} on {results['machine']}, torch {results['torch']}.")


def classification_table(results: dict) -> str:
    """Test accuracy of a head beside each method, a column for each data set."""
    lines = [["beside the head", "numbers", *(f"{name} ({found['items']['test']} items)" for name, found in results.items())]]
    lines.append(["---"] * len(lines[0]))
    for method in next(iter(results.values()))["methods"]:
        each = [found["methods"][method] for found in results.values()]
        cells = [f"{mean(m['test']):.3f} ± {stdev(m['test']) / len(m['test']) ** 0.5:.3f}" for m in each]
        lines.append([method, " / ".join(f"{m['parameters']:,}" for m in each), *cells])
    always = ", ".join(f"{name} {found['majority']:.3f}" for name, found in results.items())
    dates = " and ".join(dict.fromkeys(found["date"] for found in results.values()))
    return ("\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\nMeans over {next(iter(results.values()))['seeds']} seeds ± standard error; the head "
            f"and the learning rate are each method's own, chosen on validation items. Always the commonest label: {always}. Measured {dates}.")


def filled(readme: str) -> str:
    """README.md's text with every table between markers written anew."""
    makers = {"demo": demo_table, "tfew": tfew_table, "neftune": neftune_table, "classification": classification_table}
    for name, maker in makers.items():
        table = maker(json.loads((RESULTS / f"{name}.json").read_text()))
        place = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)"
        readme, found = re.subn(place, lambda m: f"{m[1]}{table}\n{m[2]}", readme, flags=re.S)
        assert found == 1, f"README.md has {found} places for the table {name!r}, expected one"
    return readme


if __name__ == "__main__":
    if len(sys.argv) > 1:
        shutil.copy(Path(sys.argv[1]) / "results.json", RESULTS / "demo.json")
        shutil.copy(Path(sys.argv[1]) / "demo.png", RESULTS / "demo.png")
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))
