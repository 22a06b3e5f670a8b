"""The one table of operations and the one generator of their inputs: every check of every backend draws from here.
Use: @given(data=st.data()) ... case = OPERATIONS["scale"].draw(data); case.run(ops), case.gradients(reference)
You should see odd sizes, strides, offsets, empties, repeated padding, −1 and every dtype come out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from minireft import reference

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16),
          (torch.float16, torch.float32), (torch.float16, torch.float16)]          # activations, weights
WIDTHS = [1, 2, 3, 7, 8, 16, 24, 31, 33, 64, 72, 100, 130, 256]
RANKS = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 32, 33, 64, 67]


@dataclass(frozen=True)
class Case:
    """One call: the operation, its arguments, and which of them gradients are taken for."""
    operation: Operation
    arguments: dict

    def run(self, module, grad: bool = False):
        """The results on `module` (minireft.ops, minireft.reference or this file's plain PyTorch), as a tuple of tensors."""
        arguments = {n: a.detach().requires_grad_() if grad and n in self.operation.differentiable else a
                     for n, a in self.arguments.items()}
        function = self.operation.plain if module == "plain" else getattr(module, self.operation.name)
        if self.operation.in_place:
            arguments["h"] = arguments["h"] * 1 if grad else arguments["h"].clone()        # a leaf may not be written over
        out = function(**arguments)
        return out if isinstance(out, tuple) else (out,), arguments

    def gradients(self, module, seed: int = 1) -> dict:
        """{argument: gradient} for gradients of the results drawn from a seed.  Plain PyTorch may not have used them all."""
        leaves = {n: a.detach().clone(memory_format=torch.preserve_format).requires_grad_() for n, a in self.arguments.items()
                  if n in self.operation.differentiable}
        moved = {**self.arguments, **leaves}
        if self.operation.in_place:
            moved["h"] = moved["h"] * 1
        function = self.operation.plain if module == "plain" else getattr(module, self.operation.name)
        out = function(**moved)
        out = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(seed)
        g = [torch.randn(o.shape, generator=generator).mul(32).round().div(32).to(o) for o in out]     # exact in every dtype
        return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), g, materialize_grads=module == "plain")))

    def to(self, *, dtype=None, device=None) -> Case:
        """The same call with all floating tensors in another dtype, or all tensors on another device."""
        def move(a):
            if not isinstance(a, torch.Tensor):
                return a
            a = a.to(dtype) if dtype and a.is_floating_point() else a
            return a.to(device) if device else a
        return replace(self, arguments={n: move(a) for n, a in self.arguments.items()})

    def absolute(self) -> Case:
        """The same call on absolute values, in float64: how large the terms are that are summed."""
        return replace(self, arguments={n: a.double().abs() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                                        for n, a in self.arguments.items()})


@dataclass(frozen=True)
class Operation:
    name: str
    differentiable: tuple[str, ...]
    make: Callable                       # (Drawer) -> arguments
    plain: Callable                      # what one would write in PyTorch, in the dtype of the activations
    in_place: bool = False

    def draw(self, data, dtypes=None) -> Case:
        """A case from a hypothesis `data` object; dtypes (activations, weights) if not to be drawn."""
        return Case(self, self.make(Drawer(data, *(dtypes or data.draw(st.sampled_from(DTYPES), label="dtypes")))))


class Drawer:
    """Sizes from hypothesis, values from a seeded generator: what shrinks is what matters."""

    def __init__(self, data, dtype, weight_dtype):
        self.data, self.dtype, self.weight_dtype = data, dtype, weight_dtype
        self.generator = torch.Generator().manual_seed(self.choose(list(range(5)), "seed"))

    def choose(self, options, label):
        return self.data.draw(st.sampled_from(options), label=label)

    def values(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def integers(self, low, high, *shape):
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def activations(self, *shape):
        """A tensor of that shape in some layout: packed, rows apart and off alignment, leading axes swapped, columns apart."""
        x = self.values(*shape).to(self.dtype)
        layout = self.choose(["packed", "rows apart", "axes swapped", "columns apart", "expanded"], "layout")
        if layout == "rows apart":
            room = torch.full((*shape[:-1], shape[-1] + 5), float("nan"), dtype=self.dtype)
            room[..., 1:-4] = x
            return room[..., 1:-4]
        if layout == "axes swapped" and len(shape) > 2:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "columns apart":
            return x.repeat_interleave(2, -1)[..., ::2]
        if layout == "expanded" and len(shape) > 1 and shape[0]:
            return x[:1].expand(*shape)
        return x

    def weights(self, *shape, scale=1.0):
        return (scale * self.values(*shape)).to(self.weight_dtype)

    def leading(self):
        return self.choose([(), (1,), (5,), (0,), (2, 3), (1, 9), (3, 0), (2, 2, 3), (40,)], "leading")

    def tasks(self, K, shapes):
        """None, or ids in −1 … K−1."""
        shape = self.choose([None, *shapes], "tasks")
        return None if shape is None else self.integers(-1, K, *shape)

    def positions(self, B, T, P):
        """(B, P): distinct in a row, in any order, padded with as many −1 as it takes and some more."""
        rows = []
        for _ in range(B):
            n = min(P, T, int(self.integers(0, P + 1, 1)))
            row = torch.cat([torch.randperm(T, generator=self.generator)[:n], torch.full((P - n,), -1)])
            rows.append(row[torch.randperm(P, generator=self.generator)])
        return torch.stack(rows) if rows else torch.zeros(0, P, dtype=torch.long)


# ---- inputs ----------------------------------------------------------------------------------------------------------


def edit_weights(d: Drawer, banks: tuple, C: int) -> dict:
    r = d.choose(RANKS, "r")
    return {"down": d.weights(*banks, r, C, scale=C ** -0.5), "up": d.weights(*banks, r, C, scale=r ** -0.5),
            "bias": d.weights(*banks, r)}


def make_edit(d: Drawer) -> dict:
    C = d.choose(WIDTHS, "C")
    return {"h": d.activations(*d.leading(), C), **edit_weights(d, (), C)}


def make_edit_at(d: Drawer) -> dict:
    B, T, C, K, P = (d.choose(options, label) for options, label in (
        ([0, 1, 2, 3], "B"), ([1, 4, 11], "T"), (WIDTHS, "C"), ([1, 3], "K"), ([0, 1, 3, 8], "P")))
    tasks = d.tasks(K, [(B,), (B, P)])
    return {"h": d.activations(B, T, C), "positions": d.positions(B, T, P),
            **edit_weights(d, () if tasks is None else (K,), C), "tasks": tasks}


def make_edit_at_in_place(d: Drawer) -> dict:
    arguments = make_edit_at(d)
    return {**arguments, "h": arguments["h"].contiguous()}


def make_scale(d: Drawer, *names: str, vectors=("l",), extra=lambda d: {}) -> dict:
    C, leading, K = d.choose(WIDTHS, "C"), d.leading(), d.choose([1, 3], "K")
    tasks = d.tasks(K, [(leading[0],)] if leading else [])
    arguments = {name: d.activations(*leading, C) for name in names}
    for name in vectors:
        arguments[name] = d.weights(*(() if tasks is None else (K,)), C)
    return {**arguments, "tasks": tasks, **extra(d)}


def make_pair(d: Drawer) -> dict:
    """Keys and values as views of one packed projection, or apart; of the same width or not."""
    arguments = make_scale(d, "x", "y", vectors=("l_x", "l_y"))
    x, C = arguments["x"], arguments["x"].shape[-1]
    how = d.choose(["apart", "packed", "narrower"], "pair")
    if how == "packed":
        packed = d.values(*x.shape[:-1], 2 * C).to(d.dtype)
        arguments.update(x=packed[..., :C], y=packed[..., C:])
    if how == "narrower":
        arguments.update(y=arguments["y"][..., :(C + 1) // 2], l_y=arguments["l_y"][..., :(C + 1) // 2])
    return arguments


def make_noise(d: Drawer) -> dict:
    B, T, C, V = (d.choose(options, label) for options, label in (
        ([0, 1, 3], "B"), ([1, 2, 9], "T"), (WIDTHS, "C"), ([1, 13], "V")))
    lengths = d.choose([None, "rows", "tokens"], "lengths")
    rows = d.choose([None, "rows", "tokens"], "rows")
    shape = {"rows": (B,), "tokens": (B, T)}
    return {"ids": d.integers(0, V, B, T), "weight": d.values(V, C).to(d.dtype), "alpha": d.choose([0.0, 5.0], "alpha"),
            "seed": d.integers(-2 ** 62, 2 ** 62, 2), "lengths": lengths and d.integers(0, T + 1, *shape[lengths]),
            "rows": rows and d.integers(-2 ** 62, 2 ** 62, *shape[rows]),
            "index": d.choose([None, 1], "index") and d.integers(-1, 2 * T, B, T)}


# ---- plain PyTorch, everything in the dtype of the activations --------------------------------------------------------


def plain_edit(h, down, up, bias):
    down, up, bias = (w.to(h.dtype) for w in (down, up, bias))
    return h + F.linear(h, down, bias) @ up


def plain_edit_at(h, positions, down, up, bias, tasks=None):
    """One row at a time, as one would check it by hand."""
    out = list(h.flatten(0, 1))
    for b, row in enumerate(positions.tolist()):
        for p, t in enumerate(row):
            k = None if tasks is None else int(tasks[b] if tasks.dim() == 1 else tasks[b, p])
            if t >= 0 and (k is None or k >= 0):
                w = (down, up, bias) if k is None else (down[k], up[k], bias[k])
                out[b * h.shape[1] + t] = plain_edit(h[b, t], *w)
    return torch.stack(out).view(h.shape) if out else h * 1


def plain_vector(x, l, tasks):
    l = l.to(x.dtype)
    if tasks is None:
        return l
    rows = [l[k] if k >= 0 else torch.ones_like(l[0]) for k in tasks.tolist()]
    return torch.stack(rows).view(len(rows), *[1] * (x.dim() - 2), -1) if rows else x.new_ones(())


def plain_scale(x, l, tasks=None):
    return x * plain_vector(x, l, tasks)


def plain_pair(x, y, l_x, l_y, tasks=None):
    return plain_scale(x, l_x, tasks), plain_scale(y, l_y, tasks)


def plain_gelu(u, l, tasks=None, approximate="none"):
    return F.gelu(u, approximate=approximate) * plain_vector(u, l, tasks)


def plain_swiglu(gate, up, l, tasks=None):
    return F.silu(gate) * up * plain_vector(gate, l, tasks)


def plain_noise(ids, weight, **how):
    """The reference's noise, which has no error to speak of, added in the weight's dtype."""
    noise = reference.noisy_embedding(ids, torch.zeros_like(weight, dtype=torch.float64), **how)
    return F.embedding(ids, weight) + noise.to(weight.dtype)


WEIGHTS = ("down", "up", "bias")
OPERATIONS = {operation.name: operation for operation in (
    Operation("low_rank_edit", ("h", *WEIGHTS), make_edit, plain_edit),
    Operation("low_rank_edit_at", ("h", *WEIGHTS), make_edit_at, plain_edit_at),
    Operation("low_rank_edit_at_", ("h", *WEIGHTS), make_edit_at_in_place, plain_edit_at, in_place=True),
    Operation("scale", ("x", "l"), lambda d: make_scale(d, "x"), plain_scale),
    Operation("scale_pair", ("x", "y", "l_x", "l_y"), make_pair, plain_pair),
    Operation("gelu_scale", ("u", "l"), lambda d: make_scale(
        d, "u", extra=lambda d: {"approximate": d.choose(["none", "tanh"], "approximate")}), plain_gelu),
    Operation("swiglu_scale", ("gate", "up", "l"), lambda d: make_scale(d, "gate", "up"), plain_swiglu),
    Operation("noisy_embedding", ("weight",), make_noise, plain_noise),
)}
