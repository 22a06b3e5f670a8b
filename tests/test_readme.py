"""README.md is true: its snippets run as written, its tables are the measured ones, what it names exists.

Use:  pytest tests/test_readme.py
See:  a snippet that fails shows the shell's or Python's own message.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import readme

ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text() for path in readme.PAGES}
TEXT = PAGES[ROOT / "README.md"]
SNIPPETS = re.findall(r"^```(python|sh)\n(.*?)^```$", TEXT, re.M | re.S)


def test_every_snippet_runs_as_written(shipped_base, tmp_path):
    """In the order of the page, in one folder: a later snippet uses the files of an earlier one."""
    assert {kind for kind, _ in SNIPPETS} == {"python", "sh"}
    command = tmp_path / "bin" / "minireft"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m minireft "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for kind, code in SNIPPETS:
        run = [sys.executable, "-c", code] if kind == "python" else ["bash", "-euc", code]
        done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        for claim in re.findall(r"# → (.*)", code):
            assert claim in done.stdout, f"{code}\nsays {claim!r}, printed:\n{done.stdout}"


def test_the_tables_are_the_measured_ones():
    assert readme.filled(PAGES) == PAGES, "run python benchmarks/readme.py"


def test_what_it_names_exists():
    for page, text in PAGES.items():
        for path in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / path).exists(), f"{page}: {path}"
    for path in re.findall(r"`((?:minireft|csrc|tests|tutorials|benchmarks)/[\w./]*)`", "".join(PAGES.values())):
        assert (ROOT / path).exists(), path
    names = re.findall(r"`minireft\.([\w.]+)", TEXT)
    assert len(names) > 10
    for name in names:
        *modules, last = name.split(".")
        found = importlib.import_module("minireft")
        for part in [*modules, last]:
            try:
                found = getattr(found, part)
            except AttributeError:
                found = importlib.import_module(f"{found.__name__}.{part}")


@pytest.mark.parametrize("target", re.findall(r"`make ([\w-]+)`", TEXT))
def test_every_make_goal_that_it_names_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
