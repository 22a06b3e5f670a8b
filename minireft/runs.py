"""A run's folder: checkpoints that survive a kill at any instant, a log, and one process at a time.

Use:  with Folder(out, model, adapters, config, rows) as folder: first, pieces = folder.begin(optimizer, resume=True)
See:  checkpoint.pt and the one before it, each with its checksum; log.jsonl, a line a step; failed.json and failed.pt after a
      loss that is not finite; lock, which two processes cannot hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from . import files
from .adapters import fingerprint

FREE = {"accumulate", "recompute", "save_every"}    # settings that may be others when a run goes on: none changes what is learned
NAMES = ("checkpoint.pt", "checkpoint.before.pt")   # the last checkpoint and the one before


def started(out) -> bool:
    """Whether a run in this folder can be resumed."""
    return any((Path(out) / name).exists() for name in NAMES)


def board(out, first: int):
    """A TensorBoard writer in out/tensorboard that drops what an earlier life wrote from step `first` on. ValueError without
    the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard is not installed: pip install tensorboard, or leave it out; log.jsonl has the same numbers") from None
    return SummaryWriter(str(Path(out) / "tensorboard"), purge_step=first)


def generators(device: torch.device) -> dict:
    """The states of the generators that training draws from (dropout): restored by `restore_generators`."""
    return {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})}


def restore_generators(states: dict, device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


class Folder:
    """All that a run is, in files that are whole or not there.

    A checkpoint holds what is trained, the optimiser's state, the generators, the step, and into how many pieces a batch is
    cut: what goes on from it ends in the same bits. `writes`: False for all but one of several processes.
    """

    def __init__(self, out, model, adapters, config, rows, writes: bool = True):
        self.out, self.model, self.adapters, self.writes = Path(out), model, adapters, writes
        self.device = model.embed.weight.device
        data = [vars(row) for row in rows]
        kinds = [[type(adapter).__name__, adapter.options] for adapter in adapters]
        digests = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in
                   (("base", asdict(model.config) if config.full else fingerprint(model)), ("data", data))}
        settings = {name: value for name, value in asdict(config).items() if name not in FREE}
        self.run = json.loads(json.dumps({"config": settings, "adapters": kinds, **digests}))
        self.path, self.before = (self.out / name for name in NAMES)
        self.keep = False                                                 # is checkpoint.pt this run's, and whole?

    def __enter__(self) -> Folder:
        self.held = contextlib.ExitStack()
        if self.writes:
            self.held.enter_context(files.locked(self.out / "lock"))
        return self

    def __exit__(self, *error) -> None:
        self.held.close()

    def modules(self) -> dict:
        base = {"base": self.model} if self.run["config"]["full"] else {}
        return {**base, **{f"adapter {i}": adapter for i, adapter in enumerate(self.adapters)}}

    def log(self, **numbers) -> None:
        if self.writes:
            files.append_line(self.out / "log.jsonl", json.dumps(numbers))

    def packed(self, step: int, optimizer, pieces: int, random: dict) -> bytes:
        """The whole run before step `step`."""
        buffer = io.BytesIO()
        torch.save({"run": self.run, "step": step, "pieces": pieces, "modules": {name: m.state_dict() for name, m in self.modules().items()},
                    "optimizer": optimizer.state_dict(), "generators": random}, buffer)
        return buffer.getvalue()

    def save(self, step: int, optimizer, pieces: int) -> None:
        """Writes checkpoint.pt; what was there becomes the one before."""
        if self.writes:
            data = self.packed(step, optimizer, pieces, generators(self.device))
            files.write_checked(self.path, data, self.before if self.keep else None)
            self.keep = True

    def failed(self, step: int, optimizer, pieces: int, random: dict, batch: list[dict], why: str) -> str:
        """Saves the batch that made a step fail, and the run as it was before that step; says how to see it again."""
        if not self.writes:
            return ""
        try:
            files.write_text(self.out / "failed.json", json.dumps({"step": step, "error": why, "batch": batch}, indent=1, ensure_ascii=False) + "\n")
            files.write_checked(self.out / "failed.pt", self.packed(step, optimizer, pieces, random))
        except OSError as error:
            return f"; the batch could not be saved: {error}"
        return (f"; its batch is in {self.out / 'failed.json'}, and failed.pt is the run just before it: copied over checkpoint.pt and "
                "resumed, it takes the same step to the same bits")

    def begin(self, optimizer, resume: bool) -> tuple[int, int | None]:
        """The step to begin with, and the pieces of a batch if it is known; a log of the steps before it."""
        first, pieces = self.restore(optimizer) if resume and started(self.out) else (0, None)
        log = self.out / "log.jsonl"
        if self.writes and first == 0:
            self.before.unlink(missing_ok=True)                           # another run's, if anyone's
        if self.writes and log.exists():                                  # drop what was logged after the checkpoint
            files.write_text(log, "".join(line + "\n" for line in log.read_text().splitlines()[:first]))
        return first, pieces

    def read(self, path: Path) -> dict:
        try:
            saved = torch.load(io.BytesIO(files.read_checked(path)), weights_only=True, map_location=self.device)
            saved["run"]["config"], saved["step"]
        except Exception as error:
            raise ValueError(f"{path} is damaged, or no checkpoint of a run ({error}): delete it to start over") from error
        return saved

    def restore(self, optimizer) -> tuple[int, int]:
        """Puts everything back from the last checkpoint that is whole."""
        there = [path for path in (self.path, self.before) if path.exists()]
        try:
            path, saved = there[0], self.read(there[0])
        except ValueError as error:
            if len(there) < 2:
                raise
            path, saved = there[1], self.read(there[1])
            warnings.warn_explicit(f"{error}; going on from the one before it, at step {saved['step']}".replace(": delete it to start over", ""),
                                   RuntimeWarning, "minireft", 0)
        for key, value in self.run.items():
            if saved["run"].get(key) != value:
                raise ValueError(f"{path} is of another run: its {key} differ. Use its settings and data, or another folder")
        for name, module in self.modules().items():
            module.load_state_dict(saved["modules"][name])
        optimizer.load_state_dict(saved["optimizer"])
        restore_generators(saved["generators"], self.device)
        self.keep = path == self.path
        return saved["step"], saved["pieces"]
