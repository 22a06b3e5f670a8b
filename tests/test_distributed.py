"""Data-parallel training: two processes give what one gives, and exchange nothing but what is trained.

Run:  pytest tests/test_distributed.py            # -m slow adds the same through torchrun, with resuming
See:  the losses and the adapters of one process, within the rounding of sums in another order.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import minireft
from minireft import IA3, Bank, Example, LoReFT, NEFTune, TrainConfig
from minireft.data import Batch

RUNS = {                                # what is trained, and how
    "LoReFT and noise": (lambda m: [LoReFT(m, rank=2, positions="f2+l2", tied=False), NEFTune(m)], {}),
    "a bank in pieces": (lambda m: [Bank({"one": LoReFT(m, rank=2), "two": LoReFT(m, rank=1)})], {"accumulate": 2}),
    "(IA)3, Adafactor": (lambda m: [IA3(m)], {"optimizer": "adafactor", "lr": 3e-3}),
    "T-Few's losses": (lambda m: [IA3(m)], {"optimizer": "adafactor", "accumulate": 2, "losses": ("lm", "unlikelihood", "length")}),
    "pieces found, in buckets": (lambda m: [LoReFT(m, rank=2)], {"accumulate": "auto", "bucket": 2}),
    "T-Few's losses, pieces found": (lambda m: [IA3(m)], {"accumulate": "auto", "bucket": 3, "losses": ("lm", "unlikelihood", "length")}),
    "the base as well": (lambda m: [IA3(m)], {"full": True, "lr": 1e-3, "recompute": True}),
}


def lesson():
    """Prompts, answers and choices of unequal length, so that no two shares of a batch hold the same number of tokens to predict."""
    prompts = [" ".join(f"w{(i * j + 1) % 20}" for j in range(1, 3 + i % 3)) for i in range(12)]
    answers = [tuple(" ".join(f"w{i + j}" for j in range(n)) for n in (1 + i % 4, *range(5, 6 + i % 3))) for i in range(12)]
    return [Example(prompt, choices[0], choices, task=("one", "two")[i % 3 == 0]) for i, (prompt, choices) in enumerate(zip(prompts, answers))]


def trained(name, **more):
    """The losses, and every trained tensor, of a few steps from the same start."""
    model = small.model()
    torch.manual_seed(3)
    adapters = RUNS[name][0](model)
    config = TrainConfig(**{"steps": 4, "batch_size": 8, "lr": 1e-2, **RUNS[name][1]})
    run = minireft.train(model, adapters, lesson(), config, model.tokenizer, progress=False, **more)
    modules = adapters + ([model] if config.full else [])
    return run.losses, [p.detach().clone() for module in modules for p in module.parameters()]


def one_of_two(rank, meeting, name):
    torch.set_num_threads(1)
    if RUNS[name][1].get("accumulate") == "auto":                         # only the second runs short, and both must notice
        through = Batch.through

        def short(batch, model, tasks=None):
            if rank and not batch.tokens.is_meta and batch.example.max() >= 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return through(batch, model, tasks)
        Batch.through = short
    dist.init_process_group("gloo", init_method=f"file://{meeting}/point", rank=rank, world_size=2)
    messages, reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *a, **k: messages.append(tensor.numel()) or reduce(tensor, *a, **k)
    torch.save((*trained(name), messages), f"{meeting}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(name, tmp_path):
    losses, parameters = trained(name)
    mp.start_processes(one_of_two, (str(tmp_path), name), nprocs=2, start_method="fork")      # torch is loaded already
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first[0] == second[0] and all(torch.equal(a, b) for a, b in zip(first[1], second[1]))
    assert first[0] == pytest.approx(losses, rel=1e-5) and losses[-1] != losses[0]
    for together, alone in zip(first[1], parameters):
        torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-3)
    numbers = sum(p.numel() for p in parameters)
    found = [n for n in first[2] if n > 1]
    assert found == [1 + numbers] * 4                                     # a step's one message: the loss and the gradients
    assert len(first[2]) == (10 if RUNS[name][1].get("accumulate") == "auto" else 4)        # or, for pieces, a number before, and one more for each try


def test_shares_must_be_equal(monkeypatch):
    monkeypatch.setattr(minireft.training.Team, "__init__", lambda self, device: vars(self).update(rank=0, size=3))
    with pytest.raises(ValueError, match="batch_size 8 cannot be shared by 3 processes in 1 pieces each"):
        trained("LoReFT and noise")


@pytest.mark.slow
def test_torchrun_starts_stops_and_resumes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys, torch
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parent.parent)!r}]
import test_distributed as t
losses, parameters = t.trained("LoReFT and noise", out=sys.argv[1], resume=len(sys.argv) > 2)
if torch.distributed.get_rank() == 0:
    torch.save((losses, parameters), sys.argv[1] + ".pt")
""")
    losses, parameters = trained("LoReFT and noise", out=tmp_path / "one")

    def torchrun(*arguments):
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path / "two",
                        *arguments], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)
        return torch.load(f"{tmp_path / 'two'}.pt")
    together = torchrun()
    assert together[0] == pytest.approx(losses, rel=1e-5)
    for a, b in zip(together[1], parameters):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    assert len((tmp_path / "two" / "log.jsonl").read_text().splitlines()) == 4            # one process writes
    again, kept = torchrun("resume")
    assert again == [] and all(torch.equal(a, b) for a, b in zip(kept, together[1]))      # it was finished
