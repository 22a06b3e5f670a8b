"""The estimate of a training step's memory, against what a process is seen to take and against every byte that is kept.

Run:  pytest tests/test_memory.py                 # -m slow measures two more shapes
See:  within 15 % of a process's peak, and to the byte of what autograd keeps for the backward pass.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch

import minireft
from minireft import IA3, LoRA, LoReFT, Model, ModelConfig, TrainConfig
from minireft.cli import main
from minireft.data import Encoded, collate
from minireft.losses import OBJECTIVES
from minireft.memory import Living, estimate, line, moments, size
from minireft.training import make_optimizer

ROOT = Path(__file__).parent.parent
SHAPES = {                              # model, adapter, rows, tokens, settings: activations, logits, or weights and moments lead
    "activations": (dict(vocab_size=2000, width=256, layers=8, heads=4, hidden=1024, context=256), "LoReFT", 8, 192, {}),
    "logits": (dict(vocab_size=30000, width=128, layers=2, heads=2, hidden=256, context=256), "IA3", 4, 128, {"recompute": True}),
    "weights": (dict(vocab_size=8000, width=512, layers=6, heads=8, hidden=2048, context=256), "", 2, 64, {"full": True, "lr": 1e-4}),
}
PROGRAM = """
import sys
import torch
sys.path.insert(0, {root!r})
import minireft
from minireft.data import Encoded
torch.set_num_threads(1)
def run(shape, adapter, rows, tokens, settings):
    torch.manual_seed(0)
    model = minireft.Model(minireft.ModelConfig(**shape))
    adapters = [getattr(minireft, adapter)(model)] if adapter else []
    examples = [Encoded([5 + (7 * i + j) % 50 for j in range(tokens)], tokens // 2) for i in range(rows)]
    minireft.train(model, adapters, examples, minireft.TrainConfig(steps=2, batch_size=rows, **settings), progress=False)
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
run(dict(vocab_size=64, width=16, layers=1, heads=1, hidden=16, context=16), {adapter!r}, 1, 8, {settings!r})       # what is imported late
before = peak()
run({shape!r}, {adapter!r}, {rows}, {tokens}, {settings!r})
print(peak() - before)
"""


@pytest.mark.parametrize("name", ["activations", *(pytest.param(name, marks=pytest.mark.slow) for name in ("logits", "weights"))])
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured as Linux counts it")
def test_the_estimate_is_within_15_percent_of_a_process(name):
    shape, adapter, rows, tokens, settings = SHAPES[name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}     # freed is free
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(root=str(ROOT), shape=shape, adapter=adapter, rows=rows, tokens=tokens, settings=settings)],
                          capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    model = Model(ModelConfig(**shape))
    adapters = {"LoReFT": LoReFT, "IA3": IA3}[adapter](model) if adapter else None
    found = estimate(model, [adapters] if adapters else [], TrainConfig(**settings), rows, tokens)
    print(f"{name}: measured {int(done.stdout) / 1e6:.0f} MB, estimated {found.peak / 1e6:.0f} MB, {found}")
    assert found.peak == pytest.approx(int(done.stdout), rel=0.15)


@pytest.mark.parametrize("kind", ("llama", "gpt2", "qwen"))
@pytest.mark.parametrize("recompute", (False, True))
def test_the_meta_device_keeps_what_the_cpu_keeps(kind, recompute):
    """The same count, on tensors with values; and what autograd saves, counted by another hand."""
    for make in (lambda m: LoReFT(m, rank=2), IA3, LoRA):
        model = small.model(kind)
        adapter = make(model)
        found = estimate(model, [adapter], TrainConfig(recompute=recompute), 3, 9)
        rows = [Encoded(list(range(3, 12)), 4)] * 3
        batch, saved = collate(rows), {}
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *adapter.parameters())}
        model.train().recompute = recompute

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor
        with adapter, Living(*model.parameters(), *adapter.parameters()) as living:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = OBJECTIVES["lm"].total(batch.through(model), batch)
            kept = living.now
            torch.autograd.backward(loss)
        assert living.peak == found.activations + size(adapter.parameters())
        assert recompute or sum(saved.values()) <= kept <= 1.3 * sum(saved.values())


def test_parts_of_the_estimate():
    model = small.model()
    adapter = LoReFT(model, rank=2)
    found = estimate(model, [adapter], TrainConfig(), 4, 8)
    assert found.weights == 4 * sum(p.numel() for p in model.parameters()) and found.adapter == 2 * 4 * adapter.num_parameters()
    assert found.optimizer == 2 * 4 * adapter.num_parameters() and found.peak == sum(found)
    assert estimate(small.model(dtype=torch.bfloat16), [adapter], TrainConfig(), 4, 8).weights == found.weights // 2
    for optimizer in ("adamw", "adafactor"):                              # against the state that is there after a step
        made = make_optimizer(TrainConfig(optimizer=optimizer), list(adapter.parameters()))
        for p in adapter.parameters():
            p.grad = torch.ones_like(p)
        made.step()
        state = sum(t.numel() * 4 for s in made.state.values() for name, t in s.items() if isinstance(t, torch.Tensor) and name != "step")
        assert moments(list(adapter.parameters()), optimizer) == state
    a, b = line(model, [adapter], TrainConfig(), 8)
    assert a + 20 * b == pytest.approx(estimate(model, [adapter], TrainConfig(), 20, 8).peak, rel=0.02)


def test_a_dry_run_says_what_fits_and_loads_no_weights(tiny_base, tmp_path, capsys, monkeypatch):
    true, loaded = minireft.load, []
    monkeypatch.setattr(minireft, "load", lambda *more: loaded.append(true(*more)) or loaded[0])
    assert main(["tune", "--task", "facts", "--limit", "8", "--base", str(tiny_base), "--out", str(tmp_path / "out"), "--dry-run",
                 "--micro-batch", "4", "--bf16"]) == 0
    assert all(p.is_meta for p in loaded[0][0].parameters())
    monkeypatch.undo()
    said = capsys.readouterr().out
    assert "4 examples at a time" in said and "bfloat16 weights" in said and not (tmp_path / "out").exists()
    rows = [[int(n.replace(",", "")) for n in re.findall(r"[\d,]+", line)[-4:]] for line in said.splitlines() if re.search(r"tokens, (fp32|bf16)", line)]
    assert len(rows) >= 8 and all(a < b < c < d for a, b, c, d in rows)
    assert main(["tune", "--task", "facts", "--base", str(tiny_base), "--out", str(tmp_path / "out"), "--micro-batch", "5"]) == 1
    assert "--micro-batch 5: expected auto, or a number that divides the batch of 16" in capsys.readouterr().err
