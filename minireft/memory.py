"""How much memory a training step takes, found without the memory: the step runs on the meta device and is watched.

Use:  memory = estimate(model, [reft], TrainConfig(batch_size=8), length=512); memory.peak        # bytes; model may be on meta
See:  weights, adapter, optimiser and activations, which come within 15 % of what a process is seen to take.

    peak = weights + trained · (4 + 4 moments) + max over time of (what is kept for the backward pass + what is at work)

The first terms are sums over shapes. The last, which in training is most of it, has a term for every operation of the model:
instead of a formula for each, the very forward and backward pass run on tensors that have shapes and no memory, and the bytes
that live at once are counted.
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .adapters import labels_of
from .data import Batch
from .losses import OBJECTIVES
from .model import Model

GB = 1e9
CONTEXT = 0.6e9                                     # what a CUDA driver and its libraries take of a card, about


class Living(TorchDispatchMode):
    """Counts the bytes of the memory that operations make and that is still held, and the most there were at once."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}                                   # id of a storage → its bytes
        for tensor in known:                                              # was there before: not counted again
            self.sizes.setdefault(id(tensor.untyped_storage()), 0)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[id(storage)] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, id(storage))
        self.peak = max(self.peak, self.now)
        return out

    def gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class AsElsewhere(TorchFunctionMode):
    """Makes the meta device do what others do: attention by a fused kernel, not spelled out with its (B, H, T, S) scores; and,
    with `autocast`, matrix products in bfloat16."""

    PRODUCTS = {F.linear, F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__}

    def __init__(self, autocast: bool):
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.autocast and function in self.PRODUCTS:
            args = [x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        mask = kwargs["attn_mask"]
        if mask is not None:                                              # what a kernel adds to the scores
            mask = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
            mask = mask.to(args[0].dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, 0.0, kwargs["is_causal"], attn_mask=mask)[0]


class Memory(NamedTuple):
    """Bytes of a training step; `peak` is their sum."""

    weights: int
    adapter: int                        # its parameters, and the gradients of all that is trained
    optimizer: int                      # the moments
    activations: int                    # what the passes hold at once: kept for the backward pass, logits, and at work

    @property
    def peak(self) -> int:
        return sum(self)


def twin(model: Model, adapters) -> tuple[Model, list]:
    """The model and adapters again, on the meta device, the base's gradients off."""
    if not model.embed.weight.is_meta:
        dtype = model.embed.weight.dtype
        with torch.device("meta"):
            model = Model(model.config).to(dtype)
    return model.requires_grad_(False), [type(adapter).rebuild(model, adapter.options) for adapter in adapters]


def blank(model: Model, rows: int, length: int) -> Batch:
    """A batch of full rows without values."""
    tokens = torch.zeros(rows, length, dtype=torch.long, device="meta")   # (B, T)
    mask, each = tokens > 0, tokens[:, 0].clone()                         # (B, T), (B,)
    return Batch(tokens, mask, each, mask, each, each, each, *((tokens, mask) if model.two else ()))


def size(tensors) -> int:
    """Bytes of tensors, those that share memory once."""
    return sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())


def moments(parameters, optimizer: str) -> int:
    """Bytes of an optimiser's state: Adam's two moments, or Adafactor's rows and columns."""
    if optimizer == "adamw":
        return 2 * size(parameters)
    return sum(4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() > 1 else p.numel()) for p in parameters)


def estimate(model: Model, adapters, config, rows: int, length: int) -> Memory:
    """What a step of `train` takes with these adapters and settings, a piece of a batch being `rows` rows of `length` tokens.

    Nothing of the model's size is allocated, and the model may be on the meta device itself. A choice is a row. Taken as the
    plain loss of full rows: wrong choices' losses, and packing. Not in it: the process itself, a GPU's context (`CONTEXT`),
    and what an allocator cannot use of what it holds.
    """
    alone = model.embed.weight.device.type == "cpu"                       # there the optimiser takes one tensor after the other
    model, adapters = twin(model, adapters)
    own = [p for adapter in adapters for p in adapter.parameters()]
    trained = own + (list(model.parameters()) if config.full else [])
    batch, loss = blank(model, rows, length), OBJECTIVES["class" if labels_of(adapters) else "lm"].total
    model.requires_grad_(config.full).train()
    model.recompute = config.recompute
    with contextlib.ExitStack() as stack:
        for adapter in adapters:
            stack.enter_context(adapter)
        stack.enter_context(AsElsewhere(config.bf16))
        living = stack.enter_context(Living(*model.parameters(), *own))
        for _ in range(1 if config.accumulate == 1 else 2):               # the second piece begins with the first's gradients
            total = loss(batch.through(model), batch)
            # What loss.backward() does, which would put the modes aside: the blocks that run again need them.
            torch.autograd.Variable._execution_engine.run_backward((total,), (torch.ones_like(total),), False, False, (),
                                                                   allow_unreachable=True, accumulate_grad=True)
            del total
    update = max(size([p]) for p in trained) if alone else size(trained)  # a step's own temporaries
    return Memory(size(model.parameters()), size(own) + size(trained), moments(trained, config.optimizer),
                  max(living.peak - size(trained), update))


def line(model: Model, adapters, config, length: int) -> tuple[float, float]:
    """Bytes of the peak as a + b · rows: all that depends on the rows grows with their number."""
    one, two = (estimate(model, adapters, config, rows, length).peak for rows in (8, 16))
    return 2 * one - two, (two - one) / 8


def peak_bytes(device: torch.device) -> int:
    """The most this process has held: of the GPU, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    told = Path("/proc/self/status")                                      # getrusage begins with what the parent process held
    for line in told.read_text().splitlines() if told.exists() else ():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_bytes(device: torch.device) -> float:
    """What can still be allocated; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    told = Path("/proc/meminfo")
    lines = dict(line.split(":") for line in told.read_text().splitlines()) if told.exists() else {}
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else math.inf


def fewest_pieces(model: Model, adapters, config, length: int, examples: int, choices: int = 1) -> int:
    """Into how many pieces `examples` of `length` tokens must be cut for 0.9 of the free memory, by the estimate."""
    a, b = line(model, adapters, replace(config, accumulate=2), length)
    most = 0.9 * free_bytes(model.embed.weight.device) + size(model.parameters())           # the weights are there already
    return next((n for n in range(1, examples + 1) if examples % n == 0 and a + b * choices * examples / n <= most), examples)


def more_pieces(pieces: int, examples: int) -> int:
    """The next number that cuts `examples` evenly, at least twice as many; the same where each is alone already."""
    return next((n for n in range(2 * pieces, examples + 1) if examples % n == 0), examples)


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "not enough memory"))


def words(count: float) -> str:
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / 1e6:.2g} MB" if count < 1e7 else f"{count / 1e6:.0f} MB"


def advice(model: Model, adapters, config, length: int, examples: int, choices: int = 1) -> str:
    """What to lower after a piece of so many examples did not fit, with the estimate for each."""
    def peak(rows, **changes):
        return words(estimate(model, adapters, replace(config, **changes), rows, length).peak)
    options, half = [], examples // 2
    if half:
        options.append(f"half the micro-batch, {half} ({peak(half * choices)})")
    if not config.recompute:
        options.append(f"recompute=True ({peak(examples * choices, recompute=True)})")
    options.append("weights in bfloat16" if model.embed.weight.dtype == torch.float32 else "a smaller base")
    options.append(f"examples shorter than {length} tokens")
    return (f"examples of up to {length} tokens, {examples} at a time, take about {peak(examples * choices)}, weights included: try "
            + ", ".join(options[:-1]) + f", or {options[-1]}")
