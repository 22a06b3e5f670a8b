"""Runs the tutorials and writes their pages, their exercises and the index.

Use:  python tutorials/make.py [01 ...]        run and render all, or those whose names begin so; all take some minutes
      python tutorials/make.py --exercises     write only the exercise files and the index: nothing runs
      python tutorials/make.py --check         change nothing; say what is not in step with its source; exit status 1 then
See:  rendered/NN_title.md with its picture, exercises/NN_title.py, and README.md's table.

A source NN_title.py is in jupytext's percent format. Its first cell holds title, question, *Before:* and *Time:*; its
first code cell is the only one that exercises may build on. In an exercise's cell the lines between `# solution` and
`# end` are what a learner is to write; the code cell after it is the check. A line `# Picture: ...` describes the figure
that a cell shows.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib
import inspect
import os
import re
import sys
import tempfile
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RENDERED, EXERCISES, INDEX = HERE / "rendered", HERE / "exercises", HERE / "README.md"
BLANK = 'raise NotImplementedError("your turn")'
SOLUTION = re.compile(r"^( *)# solution\n(.*?)^ *# end\n?", re.M | re.S)
NAME = re.compile(r"(?<!\[)`(minireft(?:\.\w+)+)`")                       # a name of the library, in prose
sys.path.insert(0, str(ROOT))


def sources(beginnings=("",)) -> list[Path]:
    return sorted(path for path in HERE.glob("[0-9][0-9]_*.py") if path.name.startswith(tuple(beginnings)))


# -------------------------------------------------------------------------------------------------------------- sources

def cells(source: Path) -> list[tuple[str, str]]:
    """The cells of a source: ("markdown" or "code", text)."""
    import jupytext
    return [(cell.cell_type, cell.source) for cell in jupytext.reads(source.read_text(), fmt="py:percent").cells]


def head(source: Path) -> dict[str, str]:
    """What the first cell says of the tutorial. ValueError where something is missing."""
    text, found = cells(source)[0][1], {}
    for name, pattern in (("title", r"^# (.+)$"), ("question", r"^\*\*([^*]+)\*\*$"), ("before", r"\*Before:\* ([^.]+)\."),
                          ("time", r"\*Time:\* ([^.]+)\.")):
        match = re.search(pattern, text, re.M)
        if not match:
            raise ValueError(f"{source.name} does not say its {name}: its first cell must match {pattern}")
        found[name] = " ".join(match[1].split())
    return found


def exercises(source: Path) -> list[dict[str, str]]:
    """Each exercise's text, its cell with the solution, and its check, with the setup they all stand on."""
    all_cells = cells(source)
    setup = next(text for kind, text in all_cells if kind == "code")
    return [{"setup": setup, "text": all_cells[i - 1][1], "cell": text, "check": all_cells[i + 1][1]}
            for i, (kind, text) in enumerate(all_cells) if kind == "code" and SOLUTION.search(text + "\n")]


def blank(cell: str) -> str:
    """The cell without its solution."""
    return SOLUTION.sub(lambda match: f"{match[1]}{BLANK}\n", cell + "\n").rstrip("\n")


def answered(cell: str, answer: str) -> str:
    """The cell with another answer in the solution's place."""
    answer = textwrap.dedent(answer).strip("\n")
    return SOLUTION.sub(lambda match: textwrap.indent(answer, match[1]) + "\n", cell + "\n").rstrip("\n")


# --------------------------------------------------------------------------------------------------- the names in prose

def resolve(name: str):
    """The object that a dotted name stands for, by import. AttributeError or ImportError if there is none."""
    parts, found = name.split("."), None
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
            break
        except ModuleNotFoundError:
            continue
    for part in parts[n:]:
        found = getattr(found, part)
    return found


def linked(markdown: str) -> str:
    """Prose whose names of the library lead to the files that they stand in."""
    def link(match):
        found = resolve(match[1])
        if not inspect.ismodule(found):
            found = sys.modules[found.__module__]
        return f"[`{match[1]}`]({os.path.relpath(found.__file__, RENDERED)})"
    return NAME.sub(link, markdown)


# ---------------------------------------------------------------------------------------------------------------- pages

def stamp(source: Path) -> str:
    """The first line of a page: which source and which base it was made from."""
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else "none"
    weights = ROOT / "minireft" / "assets" / "model.safetensors"
    return (f"<!-- Made by tutorials/make.py from {source.name} {digest(source)} on the base {digest(weights)}: "
            "change the source instead. -->")


def run(source: Path):
    """The source as a notebook, executed on one thread."""
    import jupytext
    from nbconvert.preprocessors import ExecutePreprocessor
    from traitlets.config import Config
    notebook = jupytext.reads(source.read_text(), fmt="py:percent")
    with tempfile.TemporaryDirectory() as home:
        # MPLBACKEND is the kernel's to choose, matplotlibrc is found in this folder, and nobody's own settings enter.
        os.environ |= {"OMP_NUM_THREADS": "1", "IPYTHONDIR": home, "JUPYTER_RUNTIME_DIR": home,
                       "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
        os.environ.pop("MPLBACKEND", None)
        files = Config({"KernelManager": {"transport": "ipc", "connection_file": f"{home}/kernel.json"}})   # no network ports
        worker = ExecutePreprocessor(config=files, timeout=900, kernel_name="python3")
        worker.preprocess(notebook, {"metadata": {"path": str(HERE)}})
    return notebook


def fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.strip(chr(10))}\n```"


def page(source: Path, notebook) -> tuple[str, dict[str, bytes]]:
    """The page in Markdown, and its pictures by file name."""
    parts, pictures = [stamp(source)], {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(linked(cell.source))
            continue
        parts.append(fenced(blank(cell.source), "python"))
        if solution := SOLUTION.search(cell.source + "\n"):
            code = fenced(textwrap.dedent(solution[2]), "python")
            parts.append(f"<details><summary>Solution</summary>\n\n{code}\n\n</details>")
        if said := "".join(output.text for output in cell.outputs if output.get("name") == "stdout"):
            parts.append(fenced("\n".join(line.rstrip() for line in said.splitlines()), "text"))
        for output in cell.outputs:
            if output.get("name") == "stdout":
                continue
            if "image/png" in output.get("data", {}):
                name = f"{source.stem}{len(pictures) + 1 if pictures else ''}.png"
                pictures[name] = base64.b64decode(output.data["image/png"])
                described = re.search(r"^# Picture: (.+)$", cell.source, re.M)
                parts.append(f"![{described[1] if described else source.stem}]({name})")
            else:
                raise ValueError(f"{source.name} shows what no page should; print it, or give it a name: {output}")
    parts.append(f"---\n[All tutorials](../README.md) · [source](../{source.name}) · [exercises](../exercises/{source.name})")
    text = "\n\n".join(parts) + "\n"
    for place in (str(ROOT), str(Path.home()), tempfile.gettempdir() + "/"):
        if place in text:
            raise ValueError(f"the page of {source.name} would show {place}, a path of this machine: print something else")
    return text, pictures


def exercise_file(source: Path) -> str:
    """The exercises of a source without their solutions, as a source of their own."""
    def prose(text):
        return "# %% [markdown]\n" + textwrap.indent(text, "# ", lambda line: True).replace("# \n", "#\n")
    found = exercises(source)
    title = head(source)["title"]
    parts = [prose(f"# Exercises to {title}\n\nWritten by tutorials/make.py from {source.name}. Copy this file, replace each "
                   f"line\n`{BLANK}`\nand run the copy: no error means that every check has passed."),
             "# %%\n" + found[0]["setup"]]
    for exercise in found:
        parts += [prose(exercise["text"]), "# %%\n" + blank(exercise["cell"]), "# %%\n" + exercise["check"]]
    return "\n\n".join(parts) + "\n"


def index() -> str:
    """README.md with its table written anew between the markers."""
    rows = ["| | you need | time | picture |", "|---|---|---|---|"]
    for source in sources():
        says = head(source)
        rows.append(f"| **[{says['title']}](rendered/{source.stem}.md)**<br>{says['question']}<br>[source]({source.name}) · "
                    f"[exercises](exercises/{source.name}) | {says['before']} | {says['time']} | "
                    f"<img src=\"rendered/{source.stem}.png\" width=\"280\" alt=\"{says['title']}\"> |")
    table = "\n".join(rows)
    return re.sub(r"(<!-- index -->\n).*(<!-- end of index -->)", lambda m: f"{m[1]}{table}\n{m[2]}", INDEX.read_text(), flags=re.S)


# ------------------------------------------------------------------------------------------------------------- commands

def stale() -> list[str]:
    """One line for each thing that is not what its source would make now."""
    found = []
    for source in sources():
        rendered, exercise = RENDERED / f"{source.stem}.md", EXERCISES / source.name
        text = rendered.read_text() if rendered.exists() else ""
        if not text.startswith(stamp(source)):
            found.append(f"rendered/{rendered.name} was not made from this {source.name} and this base")
        pictures = re.findall(r"!\[.*?\]\((\S+?)\)", text)
        found += [f"rendered/{name} is missing" for name in pictures if not (RENDERED / name).exists()]
        if not exercise.exists() or exercise.read_text() != exercise_file(source):
            found.append(f"exercises/{exercise.name} is not what {source.name} makes")
    known = {source.stem for source in sources()}
    found += [f"{path.relative_to(HERE)} belongs to no source" for folder in (RENDERED, EXERCISES) if folder.exists()
              for path in sorted(folder.glob("*.*")) if re.sub(r"\d$", "", path.stem) not in known]
    return found + ([] if INDEX.read_text() == index() else ["README.md's table is not what the sources say"])


def write_exercises() -> None:
    EXERCISES.mkdir(exist_ok=True)
    for source in sources():
        (EXERCISES / source.name).write_text(exercise_file(source))
    INDEX.write_text(index())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tutorials", nargs="*", default=[""], help="beginnings of names, such as 01; all without")
    parser.add_argument("--check", action="store_true", help="only say what is not in step with its source")
    parser.add_argument("--exercises", action="store_true", help="only write the exercise files and the index")
    args = parser.parse_args()
    if args.check:
        found = stale()
        print("\n".join(found) + "\nrun: make tutorials" if found else "every page is in step with its source")
        return bool(found)
    if not args.exercises:
        RENDERED.mkdir(exist_ok=True)
        for source in sources(args.tutorials):
            print(source.name, flush=True)
            text, pictures = page(source, run(source))
            for name, data in pictures.items():
                (RENDERED / name).write_bytes(data)
            (RENDERED / f"{source.stem}.md").write_text(text)
    write_exercises()
    return 0


if __name__ == "__main__":
    sys.exit(main())
