"""The low-rank edit and the scale in Triton: the same idea as csrc/cuda, in the other language, to compare line by line.
Called by benchmarks/kernels.py on a GPU where triton is installed. Without one: TRITON_INTERPRET=1 runs it on CPU tensors.

A program takes some rows, walks over the columns twice (δ = D h + b, then h + Aᵀ δ), and hopes that the second read of h comes
from L2; the CUDA kernel keeps h in registers between the two. What Triton decides by itself: who holds which element, when
to wait, and tensor cores for every tl.dot, so that ranks below 16 are padded to 16. float32 is multiplied as float32.
Run so far: in Triton 3.9's interpreter, float32 and float16, against minireft.reference; compiled for sm_80 and sm_90; never yet
on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, SPLITS = 32, 64, 32      # of a program's tile; parts that the weights' gradients are summed in


@triton.jit
def tile(pointer, row, column, inside, C):
    """A tile of a matrix of C columns, zeros outside."""
    return tl.load(pointer + row.to(tl.int64)[:, None] * C + column[None, :], mask=inside, other=0.0)


@triton.jit
def edit_kernel(h, out, down, up, bias, rows, delta, N, C, r, R: tl.constexpr, INDEXED: tl.constexpr,
                ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = h + (h downᵀ + bias) up at `rows` (all, unless INDEXED); delta (N, r) float32 is kept for backward."""
    n, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, R)
    at = tl.load(rows + n, mask=n < N, other=0) if INDEXED else n
    d = tl.zeros((ROWS, R), tl.float32) + tl.load(bias + k, mask=k < r, other=0.0).to(tl.float32)[None, :]
    for first in range(0, C, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        x = tile(h, at, c, (n < N)[:, None] & (c < C)[None, :], C)                            # (ROWS, COLUMNS)
        w = tile(down, k, c, (k < r)[:, None] & (c < C)[None, :], C)                          # (R, COLUMNS)
        d = tl.dot(x, tl.trans(w.to(x.dtype)), d, input_precision="ieee")
    tl.store(delta + n[:, None] * r + k[None, :], d, mask=(n < N)[:, None] & (k < r)[None, :])
    for first in range(0, C, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        inside = (n < N)[:, None] & (c < C)[None, :]
        x = tile(h, at, c, inside, C)
        w = tile(up, k, c, (k < r)[:, None] & (c < C)[None, :], C)
        y = tl.dot(d.to(x.dtype), w.to(x.dtype), x.to(tl.float32), input_precision="ieee")
        tl.store(out + at.to(tl.int64)[:, None] * C + c[None, :], y.to(x.dtype), mask=inside)


@triton.jit
def edit_weights_kernel(g, x, u, delta, rows, ddown, dup, N, C, r, R: tl.constexpr, INDEXED: tl.constexpr,
                        ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One part of ddown = uᵀ x and dup = δᵀ g: a program owns some columns and every so many tiles of rows, in their order."""
    c, k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, R)
    a, b = tl.zeros((R, COLUMNS), tl.float32), tl.zeros((R, COLUMNS), tl.float32)
    for first in range(tl.program_id(1) * ROWS, N, tl.num_programs(1) * ROWS):
        n = first + tl.arange(0, ROWS)
        at = tl.load(rows + n, mask=n < N, other=0) if INDEXED else n
        inside, small = (n < N)[:, None] & (c < C)[None, :], (n < N)[:, None] & (k < r)[None, :]
        xs, gs = tile(x, n, c, inside, C), tile(g, at, c, inside, C)
        us, ds = tile(u, n, k, small, r), tile(delta, n, k, small, r)
        a = tl.dot(tl.trans(us.to(xs.dtype)), xs, a, input_precision="ieee")
        b = tl.dot(tl.trans(ds.to(xs.dtype)), gs, b, input_precision="ieee")
    place = (tl.program_id(1) * r + k)[:, None] * C + c[None, :]
    tl.store(ddown + place, a, mask=(k < r)[:, None] & (c < C)[None, :])
    tl.store(dup + place, b, mask=(k < r)[:, None] & (c < C)[None, :])


class _Edit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, down, up, bias, rows):
        out, N, C = (torch.empty_like(h) if rows is None else h), (h.numel() // h.shape[-1] if rows is None else len(rows)), h.shape[-1]
        x = h if rows is None else h.view(-1, C)[rows]                    # before it is written over
        delta = launch(h, out, down, up, bias, rows, N)
        if rows is not None:
            ctx.mark_dirty(h)
        ctx.save_for_backward(x, delta, down, up, rows)
        return out

    @staticmethod
    def backward(ctx, g):
        x, delta, down, up, rows = ctx.saved_tensors
        (N, r), C = delta.shape, x.shape[-1]
        g, dh = g.contiguous(), torch.empty_like(g) if rows is None else g.clone()
        u = launch(g, dh, up, down, torch.zeros_like(delta[0]), rows, N)  # u = g Aᵀ, dh = g + u D: the same kernel
        parts = torch.empty(2, SPLITS, r, C, device=g.device)
        edit_weights_kernel[(triton.cdiv(C, COLUMNS), SPLITS)](g, x, u, delta, rows, *parts, N, C, r, padded(r), rows is not None, ROWS, COLUMNS)
        ddown, dup = parts.sum(1)
        return dh, ddown.to(down.dtype), dup.to(up.dtype), u.sum(0).to(down.dtype), None


def launch(h, out, down, up, bias, rows, N: int) -> Tensor:
    delta = torch.empty(N, len(bias), device=h.device)
    edit_kernel[(triton.cdiv(N, ROWS),)](h, out, down, up, bias, rows, delta, N, h.shape[-1], len(bias), padded(len(bias)), rows is not None,
                                         ROWS, COLUMNS)
    return delta


def padded(r: int) -> int:
    return max(16, triton.next_power_of_2(r))


def low_rank_edit(h: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """h + (h downᵀ + bias) up.  h (N, C), down and up (r, C), bias (r,)."""
    return _Edit.apply(h, down, up, bias, None)


def low_rank_edit_at_(h: Tensor, down: Tensor, up: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
    """The same over h (B, T, C) itself, at rows (N,) of its B·T."""
    return _Edit.apply(h, down, up, bias, rows)


@triton.jit
def scale_kernel(x, l, out, size, C, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    v = tl.load(x + i, mask=i < size, other=0.0)
    tl.store(out + i, (v.to(tl.float32) * tl.load(l + i % C, mask=i < size, other=0.0)).to(v.dtype), mask=i < size)


@triton.jit
def scale_backward_kernel(g, x, l, dx, dl, N, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """dx = l ⊙ g, and one part of dl = Σ g ⊙ x: a program owns some columns, so that l stays in registers."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    scale, total = tl.load(l + c, mask=c < C, other=0.0), tl.zeros((COLUMNS,), tl.float32)
    for first in range(tl.program_id(1) * ROWS, N, tl.num_programs(1) * ROWS):
        n = first + tl.arange(0, ROWS)
        inside = (n < N)[:, None] & (c < C)[None, :]
        gs, xs = tile(g, n, c, inside, C), tile(x, n, c, inside, C)
        total += tl.sum(gs.to(tl.float32) * xs.to(tl.float32), 0)
        tl.store(dx + n.to(tl.int64)[:, None] * C + c[None, :], (gs.to(tl.float32) * scale[None, :]).to(gs.dtype), mask=inside)
    tl.store(dl + tl.program_id(1) * C + c, total, mask=c < C)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, l):
        out = torch.empty_like(x)
        scale_kernel[(triton.cdiv(x.numel(), 1024),)](x, l, out, x.numel(), x.shape[-1], 1024)
        ctx.save_for_backward(x, l)
        return out

    @staticmethod
    def backward(ctx, g):
        x, l = ctx.saved_tensors
        g, dx, C = g.contiguous(), torch.empty_like(x), x.shape[-1]
        parts = torch.empty(SPLITS, C, device=x.device)
        scale_backward_kernel[(triton.cdiv(C, COLUMNS), SPLITS)](g, x, l, dx, parts, x.numel() // C, C, ROWS, COLUMNS)
        return dx, parts.sum(0).to(l.dtype)


def scale(x: Tensor, l: Tensor) -> Tensor:
    """l ⊙ x.  x (N, C), l (C,)."""
    return _Scale.apply(x, l)
