"""How a claim is tested: cells that are kept as they finish, selection on validation items, and a test split that opens last.

Use:  store = Store(folder); run_claim(claim, store, scale, workers=2)
See:  folder/cells.jsonl, a line a finished cell; run again, and only what is missing runs.

A unit is one base and one task. Its cells are first "select": seed 0, every value of each method's grid, scored on validation
items. When all of them are there, the best value of each method is written down, and only then `open_test` hands out the test
items, once more than it is asked on record. "test" cells train again with the chosen value and seeds that selection never saw.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from minireft import files

KEY = ("claim", "base", "task", "method", "value", "seed", "phase", "scale")


@dataclass(frozen=True)
class Scale:
    """How much of everything. `share` multiplies training steps."""

    name: str = "full"
    seeds: int = 5
    items: int = 200                    # test items
    validation: int = 100
    share: float = 1.0

    def steps(self, full: int) -> int:
        return max(2, round(self.share * full))


FULL, QUICK = Scale(), Scale("quick", seeds=2, items=16, validation=8, share=0.03)


@dataclass(frozen=True)
class Claim:
    """A claim of the papers, and what it takes to see whether it holds here."""

    name: str
    title: str                          # the claim in one sentence
    published: str                      # the papers' figures
    why: str                            # why ours may differ, and the experiment that would tell
    units: tuple[tuple[str, str], ...]  # (base, task), in the order of running
    methods: dict[str, tuple]           # method → its grid; one value: nothing to select
    measure: Callable                   # (base, task, method, value, seed, items, scale) → {measure: number}
    split: Callable                     # (task, split name, count) → items to score on
    verdict: Callable                   # found → findings: sentences that follow from the numbers, with or against the papers
    best: str = "accuracy"              # what selection looks at
    lower: bool = False                 # whether less of it is better
    reference: str = ""                 # the method that the others are paired with
    draw: Callable | None = None        # (figure, claim, found) → None; otherwise dots and intervals


class Store:
    """Finished cells, chosen values, and every opening of a test split, in one folder."""

    def __init__(self, folder):
        self.folder, self.cells = Path(folder), {}
        self.path, self.openings = self.folder / "cells.jsonl", self.folder / "openings.jsonl"
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            cell = json.loads(line)
            self.cells[self.key(cell)] = cell

    @staticmethod
    def key(cell: dict) -> tuple:
        return tuple(cell[name] for name in KEY)

    def add(self, cell: dict) -> None:
        files.append_line(self.path, json.dumps(cell, ensure_ascii=False))
        self.cells[self.key(cell)] = cell

    def missing(self, cells: list[dict]) -> list[dict]:
        return [cell for cell in cells if self.key(cell) not in self.cells]

    def found(self, claim: Claim, scale: Scale, phase: str) -> list[dict]:
        return [cell for cell in self.cells.values() if (cell["claim"], cell["scale"], cell["phase"]) == (claim.name, scale.name, phase)]


def cells_of(claim: Claim, base: str, task: str, scale: Scale, phase: str, chosen: dict | None = None) -> list[dict]:
    """The cells of one unit: each method's grid at seed 0, or its chosen value at seeds 1 ... n."""
    found = []
    for method, grid in claim.methods.items():
        values, seeds = (grid if len(grid) > 1 else (), [0]) if phase == "select" else ([chosen[method]], range(1, scale.seeds + 1))
        found += [dict(zip(KEY, (claim.name, base, task, method, value, seed, phase, scale.name))) for value in values for seed in seeds]
    return found


def choose(claim: Claim, base: str, task: str, scale: Scale, store: Store) -> dict:
    """{method: the value that is best on validation items}. ValueError while a cell is missing; of equal ones the earlier."""
    if missing := store.missing(cells_of(claim, base, task, scale, "select")):
        raise ValueError(f"{len(missing)} selection cells of {claim.name}, {base}, {task} have not run: the test split stays closed")
    chosen = {}
    for method, grid in claim.methods.items():
        scores = {value: store.cells[(claim.name, base, task, method, value, 0, "select", scale.name)][claim.best]
                  for value in (grid if len(grid) > 1 else ())}
        chosen[method] = (min if claim.lower else max)(scores, key=scores.get) if scores else grid[0]
    return chosen


def open_test(claim: Claim, base: str, task: str, scale: Scale, store: Store) -> tuple[dict, list]:
    """The chosen values, and the test items: the one place that asks for them. Every opening goes on record with the choice that
    stood, and a later choice that differs is refused, so what was seen in the test cannot come back into selection."""
    chosen = choose(claim, base, task, scale, store)
    record = {"claim": claim.name, "base": base, "task": task, "scale": scale.name, "chosen": chosen}
    for line in store.openings.read_text().splitlines() if store.openings.exists() else ():
        before = json.loads(line)
        if all(before[name] == record[name] for name in ("claim", "base", "task", "scale")) and before["chosen"] != json.loads(json.dumps(chosen)):
            raise ValueError(f"the test items of {claim.name}, {base}, {task} were opened on {before['date']} with other choices: "
                             "selection cannot be repeated after the test; use another --out for another experiment")
    files.append_line(store.openings, json.dumps({**record, "date": time.strftime("%Y-%m-%d %H:%M")}, ensure_ascii=False))
    return chosen, claim.split(task, "test", scale.items)


def work(claim: Claim | str, cell: dict, items: list, scale: Scale) -> dict:
    """Runs one cell; in a worker, a claim goes by its name."""
    from .claims import CLAIMS
    claim = CLAIMS[claim] if isinstance(claim, str) else claim
    torch.set_num_threads(1)
    started = time.process_time()
    measures = claim.measure(cell["base"], cell["task"], cell["method"], cell["value"], cell["seed"], items, scale)
    return {**cell, **measures, "cpu_seconds": round(time.process_time() - started, 1), "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__}


def run_cells(claim: Claim, cells: list[dict], items: list, scale: Scale, store: Store, workers: int, until: float, quiet: bool) -> bool:
    """Runs what is missing among the cells; whether all are there now. None begins after the time `until`."""
    todo = store.missing(cells)
    bar = tqdm(total=len(cells), initial=len(cells) - len(todo), disable=quiet, leave=False, unit="cell",
               desc=f"{claim.name} {cells[0]['base']} {cells[0]['task']} {cells[0]['phase']}" if cells else "")
    with bar:
        if workers == 1:
            for cell in todo:
                if time.time() > until:
                    break
                store.add(work(claim, cell, items, scale))
                bar.update()
        elif todo:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                waiting, queue = set(), iter(todo)
                while time.time() <= until and (waiting or todo):
                    while len(waiting) < workers and (cell := next(queue, None)):
                        waiting.add(pool.submit(work, claim.name, cell, items, scale))
                    if not waiting:
                        break
                    done = next(as_completed(waiting))
                    waiting.remove(done)
                    store.add(done.result())
                    bar.update()
                for done in as_completed(waiting):
                    store.add(done.result())
    return not store.missing(cells)


def run_claim(claim: Claim, store: Store, scale: Scale, workers: int = 1, until: float = float("inf"), quiet: bool = True, units=None) -> None:
    """All units, or those given, each from selection to test, as far as the time goes."""
    for base, task in claim.units if units is None else units:
        selecting = cells_of(claim, base, task, scale, "select")
        items = claim.split(task, "validation", scale.validation) if store.missing(selecting) else []
        if not run_cells(claim, selecting, items, scale, store, workers, until, quiet):
            return
        chosen = choose(claim, base, task, scale, store)
        testing = cells_of(claim, base, task, scale, "test", chosen)
        if store.missing(testing) and time.time() <= until:
            chosen, items = open_test(claim, base, task, scale, store)
            if not run_cells(claim, testing, items, scale, store, workers, until, quiet):
                return
