"""Pre-training for a few steps: a folder that loads, or nothing at all.

Run:  pytest tests/test_pretraining.py
See:  a loss that falls, a model card written by the run, and no rest of a run that failed.
"""

import json
import multiprocessing
import subprocess
import sys

import pytest
import torch

from minireft import checkpoint, pretraining
from minireft.pretraining import Recipe, learning_rate, pretrain
from minireft.tasks import gates
from minireft.tasks.world import VOCABULARY

TINY = Recipe(width=32, layers=1, heads=2, hidden=48, context=32, steps=30, rows=8, warmup=3, compile=False)


@pytest.fixture
def quick_gates(monkeypatch):
    """Scoring 2,200 items would take longer than the training."""
    monkeypatch.setattr(gates, "score", lambda model, tokenizer: dict.fromkeys(gates.CHANCE, 0.5))


def test_a_few_steps_write_a_folder_that_loads(tmp_path, quick_gates):
    report = pretrain(tmp_path / "base", processes=1, progress=False, recipe=TINY)
    files = sorted(path.name for path in (tmp_path / "base").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    model, tokenizer = checkpoint.load(tmp_path / "base")
    assert model.config.width == 32 and tokenizer.vocab_size == len(VOCABULARY) + 3
    assert torch.isfinite(model(torch.tensor([tokenizer.encode("anna lives in oslo .")]))).all()
    assert report["loss"] < 6.3 and report["tokens"] == 30 * 8 * 32 and report["cpu_seconds"] > 0
    card = (tmp_path / "base" / "README.md").read_text()
    assert "| choosing | 0.500 | 0.40 | 0.95 | **fails** |" in card and f"{report['parameters']:,} parameters" in card


def test_the_same_seed_gives_the_same_bits_and_another_gives_others(tmp_path, quick_gates):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain(tmp_path / name, seed=seed, processes=1, progress=False, recipe=TINY)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_two_processes_end_with_one_model(tmp_path):
    """In a subprocess, since `spawn` needs a main module. Before every step the processes compare all their weights."""
    program = f"""
import sys, torch
from minireft import pretraining
from minireft.tasks import gates
def work(rank, *rest):
    gates.score = lambda model, tokenizer: dict.fromkeys(gates.CHANCE, 0.5)
    average, seen = pretraining.average_gradients, []
    def compare(model, processes):
        total = torch.stack([p.detach().double().sum() for p in model.parameters()])
        everyone = [torch.empty_like(total) for _ in range(processes)]
        pretraining.dist.all_gather(everyone, total)
        assert torch.equal(everyone[0], everyone[1])
        seen.append(total)
        average(model, processes)
    pretraining.average_gradients = compare
    ORIGINAL(rank, *rest)
    assert len(seen) == 3 and not torch.equal(seen[0], seen[2])
ORIGINAL = pretraining._work
if __name__ == "__main__":
    pretraining._work = work
    recipe = pretraining.Recipe(width=32, layers=1, heads=2, hidden=48, context=32, steps=3, rows=8, warmup=3, compile=False)
    print(pretraining.pretrain(sys.argv[1] + "/base", processes=2, progress=False, recipe=recipe)["tokens"])
"""
    script = tmp_path / "two.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(3 * 8 * 32)] and (tmp_path / "base" / "README.md").is_file()


def test_a_run_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(pretraining, "learning_rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "base", processes=1, progress=False, recipe=TINY)
    assert list(tmp_path.iterdir()) == [] and not multiprocessing.active_children()


def run_out_of_disk(rank, processes):
    raise OSError("cannot write there: no space left")


def test_a_full_disk_in_a_process_is_one_line():
    with pytest.raises(OSError, match="^cannot write there: no space left$"):
        pretraining._together(run_out_of_disk, 2)
    assert not multiprocessing.active_children()


def test_a_folder_that_exists_is_not_touched(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine").write_text("kept")
    with pytest.raises(ValueError, match="exists already"):
        pretrain(tmp_path / "base", progress=False, recipe=TINY)
    assert (tmp_path / "base" / "mine").read_text() == "kept"


def test_rows_that_cannot_be_shared_are_refused(tmp_path):
    with pytest.raises(ValueError, match="8 rows a step cannot be shared by 3 processes"):
        pretrain(tmp_path / "base", processes=3, progress=False, recipe=TINY)


def test_the_learning_rate_follows_its_recipe():
    recipe = Recipe(steps=1000, warmup=10, peak=2.0, rates=((0, 0.4, 1), (1, 1, 0.1)))
    rates = [learning_rate(step, recipe) for step in range(1000)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[399] == 2.0
    assert rates[700] == pytest.approx(2 * (0.1 + 0.9 * 0.5)) and rates[-1] == pytest.approx(0.2, abs=0.02)


def test_the_shipped_base_passes_its_gates_as_its_card_says(shipped_base):
    card = (checkpoint.ASSETS / "README.md").read_text()
    model, tokenizer = shipped_base
    scores = gates.score(model, tokenizer, count=40, seed=1)
    for name, least in gates.PASS.items():
        assert f"| {name} |" in card
        assert scores[name] >= least - 0.1, (name, scores[name])
    assert json.loads((checkpoint.ASSETS / "config.json").read_text())["vocab_size"] == len(VOCABULARY) + 3
    assert sum(path.stat().st_size for path in checkpoint.ASSETS.iterdir()) < 8_000_000
