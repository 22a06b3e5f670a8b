"""Training: the adapters' parameters, or the whole base, on examples; runs that can be stopped and resumed to the bit.

Use:  train(model, adapters=[reft], examples=examples, config=TrainConfig(steps=200, lr=1e-2))
See:  a progress bar with loss, speed and memory; out/log.jsonl, a line a step; out/checkpoint.pt, from which resume=True goes
      on (runs.py).
"""

from __future__ import annotations

import atexit
import contextlib
import math
import time
from dataclasses import dataclass, replace
from functools import partial

import torch

from .adapters import Adapter, Bank, labels_of, task_ids
from .data import Encoded, Example, batch_at, collate, encode, encode_label, pack
from .losses import OBJECTIVES
from .memory import GB, advice, fewest_pieces, more_pieces, out_of_memory, peak_bytes
from .model import Model
from .runs import Folder, board, generators, restore_generators


@dataclass(frozen=True)
class TrainConfig:
    """How to train. `batch_size` examples make one step, in `accumulate` pieces if memory is short; "auto" begins with as
    many as `memory.estimate` asks for and takes more where that was too few. See also `T_FEW`."""

    steps: int = 200
    batch_size: int = 16
    accumulate: int | str = 1
    losses: tuple[str, ...] = ("lm",)   # added up: "lm", and where examples bring choices "unlikelihood", "length"
    lr: float = 1e-2                    # the peak, after the warm-up
    optimizer: str = "adamw"            # "adamw" | "adafactor"
    weight_decay: float = 0.0
    schedule: str = "linear"            # to zero: "linear" | "cosine"; or "constant"
    warmup: float = 0.1                 # share of the steps over which the rate rises
    clip: float = 1.0                   # the gradient's largest norm; 0 = no clipping
    bf16: bool = False                  # autocast the forward pass
    recompute: bool = False             # gradient checkpointing: blocks run again in the backward pass; less memory
    bucket: int = 1                     # examples of so many steps are sorted by length, for less padding: see `data.batch_at`
    pack: bool = False                  # several examples to a row, up to the context: fewer rows, the same gradients
    full: bool = False                  # train the base itself as well
    seed: int = 0                       # of the examples' order
    save_every: int = 50                # steps between checkpoints, when there is an output folder

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "bucket", "save_every"):
            value = getattr(self, name)
            if not (name == "accumulate" and value == "auto" or isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} is {value!r}: expected at least 1" + ', or "auto"' * (name == "accumulate"))
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
        if self.accumulate != "auto" and self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} cannot be cut into {self.accumulate} equal pieces")
        if self.pack and self.bucket > 1:
            raise ValueError(f"pack=True fills the rows, so bucket={self.bucket} would have no padding to save: leave one of them out")

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
          tokenizer=None, out=None, resume: bool = False, progress: bool = True, tensorboard: bool = False) -> Run:
    """Minimises the sum of `config.losses` over the parameters of `adapters` (and the base if config.full): by default the
    mean −log p of the completions' tokens.

    Attaches what is not attached and detaches it again, also after an error or Ctrl-C. `tokenizer`: None takes the one that
    `load` gave the model; examples that are `Encoded` already need none. `out`: a folder for log.jsonl and checkpoint.pt;
    resume=True goes on from the checkpoint there, to the same bits as an uninterrupted run on the same machine, thread
    count and backend. tensorboard: the log as events in out/tensorboard too, where that package is installed. Only what is
    trained has gradients; none flow below the lowest site in use.
    Under `torchrun` every process takes its share of each batch, and only the gradients of what is trained are exchanged.
    Raises ValueError for bad examples, nothing to train, a checkpoint of another run; OSError for a folder in use or full;
    FloatingPointError for a loss that is not finite (the batch is saved) and MemoryError, which says what to lower: the last
    checkpoint stays.
    """
    if not examples:
        raise ValueError("there are no examples to train on")
    if tensorboard and not out:
        raise ValueError("tensorboard=True needs a folder to write to: give out=...")
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

    team, B = Team(trained[0].device), config.batch_size
    if B % (team.size * (1 if config.accumulate == "auto" else config.accumulate)):
        raise ValueError(f"batch_size {B} cannot be shared by {team.size} processes in {config.accumulate} pieces each")
    with contextlib.ExitStack() as stack:
        stack.enter_context(prepared(model, adapters, config))
        task_ids(model, [row.task for row in rows])                       # an unknown task is an error before the first step
        if any(isinstance(adapter, Bank) for adapter in adapters) and not all(row.task for row in rows):
            raise ValueError("a bank is to be trained, and some examples name no task: give each Example its task=...")
        if config.pack and (choices or labels or model.two or any(isinstance(adapter, Bank) for adapter in model.adapters)):
            raise ValueError("pack=True puts several examples in a row: choices, a classifier, a bank's tasks and an "
                             "encoder–decoder need a row for each; leave it out")
        folder = stack.enter_context(Folder(out, model, adapters, config, rows, team.rank == 0)) if out else None
        optimizer = make_optimizer(config, trained)
        optimizer.zero_grad()                                             # an interrupted step may have left gradients
        return steps(model, adapters, examples, rows, config, optimizer, trained, team, folder, resume, progress, tensorboard)


def steps(model, adapters, examples, rows, config, optimizer, trained, team, folder, resume, progress, tensorboard) -> Run:
    """All the steps of a run that was checked and set up, with what is written beside them."""
    device, share = trained[0].device, config.batch_size // team.size
    widths = [max(map(len, (row.ids, *row.wrong))) for row in rows]       # tokens of an example's longest row
    tokens = [sum(map(len, (row.ids, *row.wrong))) for row in rows]
    largest = max(widths), max(1 + len(row.wrong) for row in rows)        # tokens, choices
    first, pieces = folder.begin(optimizer, resume) if folder else (0, None)
    team.start_equal(trained)
    writer = board(folder.out, first) if tensorboard and folder and folder.writes else None
    if config.accumulate != "auto":
        pieces = config.accumulate
    elif pieces is None:
        pieces = team.most(fewest_pieces(model, adapters, config, largest[0], share, largest[1]))
        if folder:                                                        # what was found is the run's from here on
            folder.save(first, optimizer, pieces)
    losses, started = [], time.perf_counter()
    from tqdm import tqdm                                                 # a GPU machine that only runs kernels may lack it
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, disable=not progress or team.rank > 0, leave=False, unit="step")
    for step in bar:
        begun, rate, random = time.perf_counter(), config.rate(step), generators(device)
        chosen, loss = batch_at(step, widths, config.seed, config.batch_size, config.bucket), None      # the same on every process
        while loss is None:
            try:
                loss = one_step(model, adapters, [rows[i] for i in chosen], step, config, optimizer, trained, rate, team, pieces)
            except FloatingPointError as error:
                batch = [{"example": i, **vars(examples[i]), **vars(rows[i])} for i in chosen]
                saved = folder.failed(step, optimizer, pieces, random, batch, str(error)) if folder else ""
                raise FloatingPointError(f"{error}{saved}") from None
            except MemoryError:
                if config.accumulate != "auto" or pieces == share:
                    told = advice(model, adapters, config, largest[0], share // pieces, largest[1])
                    raise MemoryError(f"out of memory at step {step}: {told}; the last checkpoint is kept, and goes on with "
                                      "another micro-batch or recompute") from None
                pieces = more_pieces(pieces, share)
            if loss is None:                                              # begin the step again, in more pieces
                restore_generators(random, device)
                if folder:
                    folder.save(step, optimizer, pieces)
        losses.append(loss)
        speed, peak = sum(tokens[i] for i in chosen) / (time.perf_counter() - begun), peak_bytes(device) / GB
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s, {peak:.2f} GB")
        if folder:
            numbers = dict(loss=loss, lr=rate, seconds=round(time.perf_counter() - started, 3), tokens_per_second=round(speed, 1), peak_gb=round(peak, 3))
            folder.log(step=step, **numbers)
            for name, number in numbers.items() if writer else ():
                writer.add_scalar(name, number, step)
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                folder.save(step + 1, optimizer, pieces)
    if writer:
        writer.close()
    return Run(losses, time.perf_counter() - started, first)


class Team:
    """The processes that train together: one, or as many as `torchrun` started."""

    def __init__(self, device: torch.device):
        self.device, group = device, torch.distributed
        if group.is_available() and group.is_torchelastic_launched() and not group.is_initialized():
            group.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(group.destroy_process_group)                  # its threads must be gone before the interpreter is
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

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return number
        number = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return number.item()


def backward(model, adapters, rows, step, config, device, team, pieces) -> torch.Tensor:
    """Forward and backward over this process's share of one batch, piece by piece: its part of the batch's loss."""
    objectives, B = [OBJECTIVES[name] for name in config.losses], config.batch_size
    counts = [sum(map(objective.count, rows)) for objective in objectives]                  # over the whole batch
    share, total = B // team.size, torch.zeros((), device=device)
    piece = share // pieces
    for first in range(team.rank * share, (team.rank + 1) * share, piece):
        some = rows[first : first + piece]
        batch = (pack(some, model.config.context) if config.pack else collate(some, start=model.config.start)).to(device)
        tasks = None if config.pack else task_ids(model, [some[i].task for i in batch.example.tolist()])     # (B,) or None
        for adapter in adapters:                                          # numbers that never repeat, whatever the shares
            adapter.begin(step, step * B + first + batch.example)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            out = batch.through(model, tasks)                             # (B, T, V), or a classifier's (B, classes)
        loss = sum(objective.total(out, batch) / count for objective, count in zip(objectives, counts))
        del out                                                           # logits are large, and the backward pass needs none
        loss.backward()
        total += loss.detach()
    return total


def one_step(model, adapters, rows, step, config, optimizer, trained, rate, team, pieces) -> float:
    """One batch's gradients, then one update. Returns the batch's loss. MemoryError, on every process, when a piece does not
    fit; FloatingPointError for what is not finite: either way nothing was changed."""
    total, device = None, trained[0].device
    try:
        total = backward(model, adapters, rows, step, config, device, team, pieces)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    short = total is None                                                 # looked at here: `except` holds on to the tensors
    if team.most(short) if config.accumulate == "auto" else short:
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        raise MemoryError
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
