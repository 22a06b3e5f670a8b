"""Training: the adapters' parameters, or the whole base, on examples; runs that can be stopped and resumed to the bit.

Use:  train(model, adapters=[reft], examples=examples, config=TrainConfig(steps=200, lr=1e-2))
See:  a progress bar with the loss; out/log.jsonl, a line a step; out/checkpoint.pt, from which resume=True goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from . import files
from .adapters import Adapter, Bank, fingerprint, labels_of, task_ids
from .data import Encoded, Example, collate, encode, encode_label, order, pack
from .losses import OBJECTIVES
from .model import Model


@dataclass(frozen=True)
class TrainConfig:
    """How to train. `batch_size` examples make one step, in `accumulate` pieces if memory is short. See also `T_FEW`."""

    steps: int = 200
    batch_size: int = 16
    accumulate: int = 1
    losses: tuple[str, ...] = ("lm",)   # added up: "lm", and where examples bring choices "unlikelihood", "length"
    lr: float = 1e-2                    # the peak, after the warm-up
    optimizer: str = "adamw"            # "adamw" | "adafactor"
    weight_decay: float = 0.0
    schedule: str = "linear"            # to zero: "linear" | "cosine"; or "constant"
    warmup: float = 0.1                 # share of the steps over which the rate rises
    clip: float = 1.0                   # the gradient's largest norm; 0 = no clipping
    bf16: bool = False                  # autocast the forward pass
    recompute: bool = False             # gradient checkpointing: blocks run again in the backward pass; less memory
    pack: bool = False                  # several examples to a row, up to the context: fewer rows, the same gradients
    full: bool = False                  # train the base itself as well
    seed: int = 0                       # of the examples' order
    save_every: int = 50                # steps between checkpoints, when there is an output folder

    def __post_init__(self):
        limits = {"steps": 1, "batch_size": 1, "accumulate": 1, "save_every": 1}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least {least}")
        for name, known in (("optimizer", ("adamw", "adafactor")), ("schedule", ("linear", "cosine", "constant"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(known)}")
        if not self.losses or not set(self.losses) <= set(OBJECTIVES):
            raise ValueError(f"losses are {self.losses!r}: expected a tuple of some of {', '.join(OBJECTIVES)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr is {self.lr}: expected a number above 0")
        if not (math.isfinite(self.clip) and self.clip >= 0):
            raise ValueError(f"clip is {self.clip}: expected the gradient's largest norm, or 0 for no clipping")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}: expected a share of the steps, from 0 to below 1")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} cannot be cut into {self.accumulate} equal pieces")

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ...: a linear rise to `lr`, then the schedule's way down."""
        rise = round(self.warmup * self.steps)
        if step < rise:
            return self.lr * (step + 1) / rise
        done = (step - rise) / max(1, self.steps - rise)
        return self.lr * {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[self.schedule]


# T-Few's recipe, the same for every task (Liu et al. 2022, section 3.4); beside it (IA)³, and several prompts for a task.
T_FEW = TrainConfig(steps=1000, batch_size=8, losses=("lm", "unlikelihood", "length"), lr=3e-3, optimizer="adafactor", warmup=0.06)


@dataclass(frozen=True)
class Run:
    """What happened: the loss of every step of this run (nats), its seconds, and the step it began at."""

    losses: list[float]
    seconds: float
    first_step: int


def make_optimizer(config: TrainConfig, parameters: list) -> torch.optim.Optimizer:
    if config.optimizer == "adafactor":
        # Adafactor's steps are relative to a parameter's size, but at least its second eps: 1 makes them absolute, since
        # vectors that are stored as l − 1 start at size 0. (T-Few's code stores l, of size 1: the same steps.) Second moments
        # are factored over (layers, width), where T-Few's vectors, each by itself, have one for every entry.
        return torch.optim.Adafactor(parameters, lr=config.lr, weight_decay=config.weight_decay, eps=(None, 1.0))
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)


@contextlib.contextmanager
def prepared(model: Model, adapters: list[Adapter], config: TrainConfig):
    """Attaches what is not attached, freezes all that is not to be trained, sets training mode; undoes it, come what may."""
    training, recompute, mine = model.training, model.recompute, []
    mine_to_train = {id(p) for adapter in adapters for p in adapter.parameters()}
    others = [p for adapter in model.adapters for p in adapter.parameters() if id(p) not in mine_to_train]
    before = [(p, p.requires_grad) for p in (*model.parameters(), *others)]
    try:
        for adapter in adapters:
            if adapter.model is not model:
                raise ValueError(f"the {type(adapter).__name__} was made for another model object: make or load it for this one")
            if not adapter.attached:
                mine.append(adapter.attach())
        model.requires_grad_(config.full).train()
        for parameter in others:
            parameter.requires_grad_(False)
        model.recompute = config.recompute
        yield
    finally:
        for adapter in reversed(mine):
            adapter.detach()
        model.train(training)
        model.recompute = recompute
        for parameter, was in before:
            parameter.requires_grad_(was)
            if not was:
                parameter.grad = None


def train(model: Model, adapters: list[Adapter] = (), examples: list[Example] = (), config: TrainConfig = TrainConfig(),
          tokenizer=None, out=None, resume: bool = False, progress: bool = True) -> Run:
    """Minimises the sum of `config.losses` over the parameters of `adapters` (and the base if config.full): by default the
    mean −log p of the completions' tokens.

    Attaches what is not attached and detaches it again, also after an error or Ctrl-C. `tokenizer`: None takes the one that
    `load` gave the model; examples that are `Encoded` already need none. `out`: a folder for log.jsonl and checkpoint.pt;
    resume=True goes on from the checkpoint there, to the same bits as an uninterrupted run on the same machine, thread
    count and backend. Only what is trained has gradients; none flow below the lowest site in use.
    Under `torchrun` every process takes its share of each batch, and only the gradients of what is trained are exchanged.
    Raises ValueError for bad examples, nothing to train, a checkpoint of another run, and FloatingPointError for a loss
    that is not finite (the last checkpoint stays).
    """
    if not examples:
        raise ValueError("there are no examples to train on")
    adapters, tokenizer = list(adapters), tokenizer or model.tokenizer
    labels = labels_of([*model.adapters, *adapters])
    if labels and config.losses == ("lm",):
        config = replace(config, losses=("class",))
    if ("class" in config.losses) != bool(labels) or labels and len(config.losses) > 1:
        raise ValueError(f"losses are {config.losses}: a classifier is trained with ('class',), and that with nothing but a classifier")
    if not labels and model.config.architecture == "encoder":
        raise ValueError("an encoder predicts no next token: train it with a Classifier, whose labels the completions are")
    choices = any(OBJECTIVES[name].choices for name in config.losses)
    ready = partial(encode_label, labels=labels) if labels else partial(encode, choices=choices)
    rows = [e if isinstance(e, Encoded) else ready(tokenizer, e, context=model.config.context) for e in examples]
    if choices and not all(row.wrong for row in rows):
        raise ValueError(f"losses {config.losses} compare choices, and some examples were encoded without: encode(..., choices=True)")
    trained = [p for adapter in adapters for p in adapter.parameters()] + (list(model.parameters()) if config.full else [])
    if not trained:
        raise ValueError("there is nothing to train: give an adapter with parameters, or TrainConfig(full=True) for the base itself")

    team = Team(trained[0].device)
    if config.batch_size % (team.size * config.accumulate):
        raise ValueError(f"batch_size {config.batch_size} cannot be shared by {team.size} processes in {config.accumulate} pieces each")
    checkpoint = Checkpoint(out, model, adapters, config, rows) if out else None
    with prepared(model, adapters, config):
        task_ids(model, [row.task for row in rows])                       # an unknown task is an error before the first step
        if any(isinstance(adapter, Bank) for adapter in adapters) and not all(row.task for row in rows):
            raise ValueError("a bank is to be trained, and some examples name no task: give each Example its task=...")
        if config.pack and (choices or labels or model.two or any(isinstance(adapter, Bank) for adapter in model.adapters)):
            raise ValueError("pack=True puts several examples in a row: choices, a classifier, a bank's tasks and an "
                             "encoder–decoder need a row for each; leave it out")
        optimizer = make_optimizer(config, trained)
        optimizer.zero_grad()                                             # an interrupted step may have left gradients
        first = checkpoint.begin(optimizer, resume) if checkpoint else 0
        team.start_equal(trained)
        losses, started = [], time.perf_counter()
        from tqdm import tqdm                                             # a GPU machine that only runs kernels may lack it
        bar = tqdm(range(first, config.steps), initial=first, total=config.steps, disable=not progress or team.rank > 0, leave=False, unit="step")
        for step in bar:
            rate = config.rate(step)
            loss = one_step(model, adapters, rows, step, config, optimizer, trained, rate, team)
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}")
            if checkpoint and team.rank == 0:
                checkpoint.log(step, loss, rate, time.perf_counter() - started)
                if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                    checkpoint.save(step + 1, optimizer)
    return Run(losses, time.perf_counter() - started, first)


class Team:
    """The processes that train together: one, or as many as `torchrun` started."""

    def __init__(self, device: torch.device):
        group = torch.distributed
        if group.is_available() and group.is_torchelastic_launched() and not group.is_initialized():
            group.init_process_group("nccl" if device.type == "cuda" else "gloo")
        together = group.is_available() and group.is_initialized()
        self.rank, self.size = (group.get_rank(), group.get_world_size()) if together else (0, 1)

    def start_equal(self, tensors: list) -> None:
        for tensor in tensors if self.size > 1 else ():
            torch.distributed.broadcast(tensor.data, 0)

    def sum(self, tensors: list) -> None:
        """Adds up each tensor over the processes, all in one message."""
        if self.size > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            torch.distributed.all_reduce(flat)
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
                tensor.copy_(part.view_as(tensor))


def one_step(model, adapters, rows, step, config, optimizer, trained, rate, team) -> float:
    """Forward and backward over this process's share of one batch, piece by piece, then one update. Returns the batch's
    loss."""
    device, B = trained[0].device, config.batch_size
    chosen = [rows[i] for i in order(len(rows), config.seed, step * B, B)]                  # the same on every process
    objectives = [OBJECTIVES[name] for name in config.losses]
    counts = [sum(map(objective.count, chosen)) for objective in objectives]                # over the whole batch
    share = B // team.size
    piece, total = share // config.accumulate, torch.zeros((), device=device)
    for first in range(team.rank * share, (team.rank + 1) * share, piece):
        some = chosen[first : first + piece]
        batch = (pack(some, model.config.context) if config.pack else collate(some, start=model.config.start)).to(device)
        tasks = None if config.pack else task_ids(model, [some[i].task for i in batch.example.tolist()])     # (B,) or None
        for adapter in adapters:                                          # numbers that never repeat, whatever the shares
            adapter.begin(step, step * B + first + batch.example)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            out = batch.through(model, tasks)                             # (B, T, V), or a classifier's (B, classes)
        loss = sum(objective.total(out, batch) / count for objective, count in zip(objectives, counts))
        loss.backward()
        total += loss.detach()
    team.sum([total] + [p.grad for p in trained if p.grad is not None])
    total, norm = total.item(), torch.nn.utils.clip_grad_norm_(trained, config.clip or math.inf).item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        optimizer.zero_grad()
        raise FloatingPointError(f"the loss became {total} and its gradient {norm} at step {step}: lower the learning rate ({config.lr}), "
                                 "raise the warm-up, or clip more; the last checkpoint is untouched")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return total


class Checkpoint:
    """All that a run is, in one file that is whole or not there."""

    def __init__(self, out, model, adapters, config, rows):
        self.out, self.model, self.adapters = Path(out), model, adapters
        data = [vars(row) for row in rows]
        kinds = [[type(adapter).__name__, adapter.options] for adapter in adapters]
        digests = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in
                   (("base", asdict(model.config) if config.full else fingerprint(model)), ("data", data))}
        self.run = json.loads(json.dumps({"config": asdict(config), "adapters": kinds, **digests}))
        self.path = self.out / "checkpoint.pt"

    def modules(self) -> dict:
        base = {"base": self.model} if self.run["config"]["full"] else {}
        return {**base, **{f"adapter {i}": adapter for i, adapter in enumerate(self.adapters)}}

    def log(self, step: int, loss: float, rate: float, seconds: float) -> None:
        line = json.dumps({"step": step, "loss": loss, "lr": rate, "seconds": round(seconds, 3)})
        files.append_line(self.out / "log.jsonl", line)

    def save(self, step: int, optimizer) -> None:
        buffer = io.BytesIO()
        torch.save({"run": self.run, "step": step, "modules": {name: m.state_dict() for name, m in self.modules().items()},
                    "optimizer": optimizer.state_dict(), "generator": torch.get_rng_state()}, buffer)
        files.write_bytes(self.path, buffer.getvalue())

    def begin(self, optimizer, resume: bool) -> int:
        """The step to begin with, and a log of the steps before it."""
        first = self.restore(optimizer) if resume and self.path.exists() else 0
        log = self.out / "log.jsonl"
        if log.exists():                                                  # drop what was logged after the checkpoint
            files.write_text(log, "".join(line + "\n" for line in log.read_text().splitlines()[:first]))
        return first

    def restore(self, optimizer) -> int:
        """Puts everything back and returns the step to go on with."""
        try:
            saved = torch.load(self.path, weights_only=True, map_location=self.model.embed.weight.device)
            run = saved["run"]
        except Exception as error:
            raise ValueError(f"{self.path} is damaged, or no checkpoint of a run ({error}): delete it to start over") from error
        for key, value in self.run.items():
            if run.get(key) != value:
                raise ValueError(f"{self.path} is of another run: its {key} differ. Use its settings and data, or another folder")
        for name, module in self.modules().items():
            module.load_state_dict(saved["modules"][name])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["generator"].cpu())
        return saved["step"]
