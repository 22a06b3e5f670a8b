"""Writes measured results into README.md, between its markers; numbers there come from files, never from a keyboard.
Run: python benchmarks/readme.py [runs/demo]     (with a folder: first takes the results and the picture of that demo)
You should see README.md's tables change where the results have; `python benchmarks/readme.py` again changes nothing.
"""

import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def demo_table(results: dict) -> str:
    """The demo's table in Markdown, and where it was measured."""
    rows = [["task", *results["header"]], *([row["task"], *row["cells"]] for row in results["rows"])]
    text = "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))
    losses = [f"{row['name']} {row['test_loss']:.2f}" for row in results["rows"] if row["task"] == "instructions"]
    return (f"{text}\n\nAccuracies on {results['rows'][0]['items']} held-out items, ± their standard error. Loss on the "
            f"instructions' test items, in nats a token: {', '.join(losses)}.\n"
            f"Measured {results['date']} on {results['machine']}, torch {results['torch']}, {results['backend']}.")


def filled(readme: str) -> str:
    """README.md's text with every table between markers written anew."""
    tables = {"demo": demo_table(json.loads((RESULTS / "demo.json").read_text()))}
    for name, table in tables.items():
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
