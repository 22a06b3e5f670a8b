"""Times every operation beside the same formula in plain PyTorch, as it is usually written and written well, and compiled.
Run: minireft bench kernels [--op low_rank_edit] [--dtype float32] [--write]        (--full: hours; --write: results/kernels.jsonl)
You should see one line a row: microseconds of each provider, the share of what this machine's memory can do, and the gain.

ceiling    memory that is read and written as much as the formula must, and nothing computed
common     as it is usually written: LoReFT with R from an orthogonal parametrization, read three times (up to 1,024 rows: what
           costs is the parametrization); and one task after another
eager      the fewest operations that plain PyTorch needs         compiled   the same, by torch.compile
reference  minireft.reference          ours   minireft.ops         triton   benchmarks/peers/triton_kernels.py (GPU)
Shapes     one axis at a time through N 4096, C 1024, r 8; the real ReFT shape is low_rank_edit_at_ with N 448: 14 positions each of 32
           sequences. Launches and memory: see harness.footprint, on a CPU they are counts of what PyTorch dispatches.

Nothing is timed that was not first compared with float64, on fresh inputs, and is not again afterwards.
"""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))           # so that it also runs as a file
from benchmarks import harness  # noqa: E402
from benchmarks.harness import Clock  # noqa: E402
from minireft import ops, reference  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("forward", "backward", "both")
SEQUENCES, POSITIONS, TOKENS, VOCABULARY = 32, 14, 128, 4096              # real ReFT: f7+l7 of 32 sequences, 448 rows
PARAMETRIZED = {"cpu": 1024, "cuda": 4096}                                # the widest C whose parametrization is timed


@dataclass(frozen=True)
class Shape:
    """N rows of C elements, rank r; tasks = 0: no banks, otherwise so many tasks in a batch of N / 14 sequences."""

    N: int
    C: int
    r: int = 0
    tasks: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def sequences(self) -> int:
        return max(1, self.N // POSITIONS)


class Call(NamedTuple):
    """A provider: function(*leaves, *rest); gradients are taken for the leaves. In place: the first leaf is written over."""

    function: Callable[..., Tensor]
    leaves: list[Tensor]
    rest: tuple = ()
    in_place: bool = False

    def __call__(self, first: Tensor, *leaves: Tensor) -> Tensor:
        return self.function(as_activation(first) if self.in_place else first, *leaves, *self.rest)


# ---- what is timed: (shape, device, generator) -> {provider: Call} ---------------------------------------------------------


@lru_cache(maxsize=1)
def rotation(C: int, r: int, device: str):
    """torch's own orthogonal parametrization, and its R (r, C); no parametrization where its C × C matrix is too much."""
    if C > PARAMETRIZED[device.split(":")[0]]:
        return None, torch.linalg.qr(torch.randn(C, r))[0].T.contiguous().to(device)
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(r, C, bias=False)).to(device)
    return layer, layer.weight.detach().T.contiguous()                    # weight (C, r)


def edit_weights(s: Shape, device: str, draw):
    """LoReFT's W, and D = W − R, A = R, b; all float32, as they are trained: (r, C), or banks (K, r, C) of them."""
    layer, R = rotation(s.C, s.r, device)
    K = (s.tasks,) if s.tasks else ()
    W = 0.5 * R + draw(*K, s.r, s.C) / s.C ** 0.5 / 8                      # a contraction: edited again and again, h stays finite
    return layer, W, [W - R, R.expand_as(W).contiguous(), draw(*K, s.r)]


def low_rank_edit(s: Shape, device: str, draw) -> dict[str, Call]:
    layer, W, weights = edit_weights(s, device, draw)
    leaves = [draw(s.N, s.C).to(s.dtype), *weights]
    calls = {"eager": Call(edit, leaves), "ours": Call(ops.low_rank_edit, leaves), "reference": Call(reference.low_rank_edit, leaves)}
    if layer is not None and s.N <= 1024:
        calls["common"] = Call(parametrized, [leaves[0], W, leaves[3], only_parameter(layer)], (layer,))
    return calls | triton("low_rank_edit", leaves)


def low_rank_edit_at_(s: Shape, device: str, draw) -> dict[str, Call]:
    """At the first seven and last seven tokens of 128-token sequences, over h itself."""
    layer, W, weights = edit_weights(s, device, draw)
    B, P, T = s.sequences, POSITIONS, TOKENS
    leaves = [draw(B, T, s.C).to(s.dtype), *weights]
    at = torch.cat([torch.arange(P // 2), torch.arange(T - P // 2, T)]).expand(B, P).contiguous().to(device)          # (B, P)
    rows = (at + T * torch.arange(B, device=device)[:, None]).reshape(-1)                                            # (B·P,)
    tasks = torch.arange(B, device=device) % s.tasks if s.tasks else None                                            # (B,)
    calls = {"eager": (edit_rows, leaves, (rows,)) if tasks is None else (edit_rows_each, leaves, (rows, tasks))}
    for provider, module in (("ours", ops), ("reference", reference)):
        calls[provider] = lambda h, *weights, f=module.low_rank_edit_at_: f(h, at, *weights, tasks), leaves
    if s.tasks:
        calls["common"] = one_task_after_another, leaves, (at, tasks)
    elif layer is not None:
        calls["common"] = parametrized_at, [leaves[0], W, leaves[3], only_parameter(layer)], (layer, at)
    calls = {name: Call(*call, in_place=True) for name, call in calls.items()}
    return calls | ({} if s.tasks else triton("low_rank_edit_at_", leaves, rows))


class _AsActivation(torch.autograd.Function):
    """h as what an earlier operation computed, so that it may be written over with gradients on; costs nothing."""

    @staticmethod
    def forward(ctx, h):
        return h.detach()

    @staticmethod
    def backward(ctx, g):
        return g


def as_activation(h: Tensor) -> Tensor:
    return _AsActivation.apply(h) if h.requires_grad and torch.is_grad_enabled() else h


def only_parameter(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight.original.detach()


def parametrized(h, W, b, M, layer):
    """pyreft's order of operations; a parametrized weight is computed anew from its parameter M whenever it is read."""
    weight = layer.parametrizations.weight[0]                             # M → Rᵀ (C, r), by Householder reflections
    x = h.to(weight(M).dtype)                                             # read once for its dtype,
    rotated = x @ weight(M)                                               # once for R h,
    return (x + (F.linear(x, W, b) - rotated) @ weight(M).T).to(h.dtype)  # once for Rᵀ


def parametrized_at(h, W, b, M, layer, at):
    sequence = torch.arange(len(h), device=h.device)[:, None]                                                        # (B, 1)
    h[sequence, at] = parametrized(h[sequence, at], W, b, M, layer)                                                  # (B, P, C)
    return h


def one_task_after_another(h, D, A, b, at, tasks):
    for k in range(len(D)):
        mine = (tasks == k).nonzero()                                                                                # (n, 1)
        h[mine, at[mine[:, 0]]] = edit(h[mine, at[mine[:, 0]]].flatten(0, 1), D[k], A[k], b[k]).view(len(mine), -1, h.shape[2])
    return h


def edit(h, D, A, b):
    D, A, b = D.to(h.dtype), A.to(h.dtype), b.to(h.dtype)
    return torch.addmm(h, torch.addmm(b, h, D.T), A)


def edit_rows(h, D, A, b, rows):
    flat = h.view(-1, h.shape[2])                                                                                    # (B·T, C)
    flat.index_copy_(0, rows, edit(flat.index_select(0, rows), D, A, b))
    return h


def edit_rows_each(h, D, A, b, rows, tasks):
    flat, D, A, b = h.view(-1, h.shape[2]), D[tasks].to(h.dtype), A[tasks].to(h.dtype), b[tasks, None].to(h.dtype)     # (B, r, C)
    x = flat.index_select(0, rows).view(len(tasks), -1, h.shape[2])                                                  # (B, P, C)
    x = torch.baddbmm(x, torch.baddbmm(b, x, D.mT), A)
    flat.index_copy_(0, rows, x.view(-1, h.shape[2]))
    return h


def scales(name: str, eager: Callable, streams: int = 1):
    """One of the three scales: x (N, C) and l (C,); with tasks x (B, P, C), l (K, C)."""
    def operation(s: Shape, device: str, draw) -> dict[str, Call]:
        shape, K = ((s.sequences, POSITIONS, s.C), (s.tasks,)) if s.tasks else ((s.N, s.C), ())
        leaves = [*(draw(*shape).to(s.dtype) for _ in range(streams)), draw(*K, s.C)]
        tasks = (torch.arange(s.sequences, device=device) % s.tasks,) if s.tasks else ()
        calls = {"eager": Call(eager, leaves, tasks)}
        for provider, module in (("ours", ops), ("reference", reference)):
            calls[provider] = Call(getattr(module, name), leaves, tasks)
        return calls | (triton(name, leaves) if name == "scale" and not s.tasks else {})
    operation.__name__ = name
    return operation


def vector(x, l, tasks):
    """l in x's dtype; of each row's task where there are tasks."""
    return (l if tasks is None else l[tasks][:, None]).to(x.dtype)


def scale(x, l, tasks=None):
    return x * vector(x, l, tasks)


def gelu_scale(u, l, tasks=None):
    return F.gelu(u) * vector(u, l, tasks)


def swiglu_scale(gate, up, l, tasks=None):
    return F.silu(gate) * up * vector(gate, l, tasks)


def noisy_embedding(s: Shape, device: str, draw) -> dict[str, Call]:
    """N tokens in rows of 64, and 4,096 words."""
    weight, seed = draw(VOCABULARY, s.C).to(s.dtype), torch.tensor([1, 2], device=device)
    ids = (draw(s.N // 64, 64).abs() * 1000).long() % VOCABULARY
    calls = {"eager": Call(embedding_and_noise, [weight], (ids,))}
    for provider, module in (("ours", ops), ("reference", reference)):
        calls[provider] = Call(lambda weight, f=module.noisy_embedding: f(ids, weight, 5.0, seed), [weight])
    return calls


def embedding_and_noise(weight, ids):
    x = F.embedding(ids, weight)                                          # (B, T, C)
    return x + torch.empty_like(x).uniform_(-1, 1) * (5 / (x.shape[1] * x.shape[2]) ** 0.5)


OPERATIONS = {f.__name__: f for f in (
    low_rank_edit, low_rank_edit_at_, scales("scale", scale), scales("gelu_scale", gelu_scale),
    scales("swiglu_scale", swiglu_scale, streams=2), noisy_embedding)}


def triton(name: str, leaves: list[Tensor], *rest) -> dict[str, Call]:
    """The same in Triton, where that is installed and the tensors are on a GPU (or it interprets)."""
    if leaves[0].device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        return {}
    try:
        from benchmarks.peers import triton_kernels
    except ImportError:
        return {}
    return {"triton": Call(getattr(triton_kernels, name), leaves, rest, in_place=name.endswith("_"))}


# ---- bytes and operations, from the formulas --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bill:
    """Elements of N × C that are read and written at least, other bytes (weights), and operations (a special function is one)."""

    reads: int
    writes: int
    weights: int
    operations: int

    def bytes(self, s: Shape) -> int:
        return (self.reads + self.writes) * s.dtype.itemsize + self.weights


def bills(op: str, s: Shape) -> dict[str, Bill]:
    """What forward and backward cost at least. Weights are float32; backward reads them and writes their gradients."""
    K, N = max(1, s.tasks), s.sequences * POSITIONS if s.tasks or op == "low_rank_edit_at_" else s.N
    n, vector, low_rank = N * s.C, 4 * K * s.C, 4 * K * (2 * s.r * s.C + s.r)
    rows, stream = min(VOCABULARY, N) * s.C, s.sequences * TOKENS * s.C   # of an embedding; of h, whose gradient autograd wants anew
    forward, backward = {
        "low_rank_edit": ((n, n, low_rank, 4 * n * s.r), (2 * n, n, 2 * low_rank, 8 * n * s.r)),
        "low_rank_edit_at_": ((n, n, low_rank, 4 * n * s.r), (stream + n, stream, 2 * low_rank, 8 * n * s.r)),
        "scale": ((n, n, vector, n), (2 * n, n, 2 * vector, 3 * n)),
        "gelu_scale": ((n, n, vector, 5 * n), (2 * n, n, 2 * vector, 12 * n)),
        "swiglu_scale": ((2 * n, n, vector, 5 * n), (3 * n, 2 * n, 2 * vector, 14 * n)),
        "noisy_embedding": ((rows, n, 8 * N, 2 * n), (n, VOCABULARY * s.C, 8 * N, n))}[op]
    return {"forward": Bill(*forward), "backward": Bill(*backward), "both": Bill(*map(sum, zip(forward, backward)))}


def streams(op: str, s: Shape, which: str, device) -> dict:
    """{name: a function}: memory moved as the formula must, by forward, backward, or one after the other, which reads again what
    the first read and caches may still hold; in two ways."""
    bill = bills(op, s)
    passes = [bill[name] for name in (("forward", "backward") if which == "both" else (which,))]
    source = torch.randn(max(b.reads for b in passes), device=device).to(s.dtype)

    def one_way(around_cache: bool):
        parts = [harness.stream(b.reads, b.writes, source, around_cache) for b in passes]
        return lambda: [part() for part in parts]
    return {"ceiling": one_way(True), "ceiling, cached": one_way(False)}


# ---- one row ------------------------------------------------------------------------------------------------------------------


def calls(op: str, s: Shape, device: str, seed: int, compile: bool) -> dict[str, Call]:
    """Every provider on the same fresh inputs."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(repr((op, s, seed)).encode()))
    made = OPERATIONS[op](s, device, lambda *shape: torch.randn(shape, generator=generator, device=device))
    if compile:
        eager = made["eager"]
        made["compiled"] = eager._replace(function=compiled(eager.function, s.dtype))
    return {name: made[name] for name in ("common", "eager", "compiled", "reference", "triton", "ours") if name in made}


@cache
def compiled(function, dtype: torch.dtype):
    """torch.compile of an eager provider, for all shapes of one dtype."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False                        # so that backward can be timed again and again
    return torch.compile(function, dynamic=True)


def results(call: Call, which: str, g: Tensor | None, change=torch.clone) -> tuple[Tensor, ...]:
    """The output, or with backward the gradients of the leaves, on copies of them (or what `change` makes of them)."""
    leaves = [change(x.detach()).requires_grad_(which != "forward") for x in call.leaves]
    with torch.set_grad_enabled(which != "forward"):
        out = call(*leaves)
        return (out,) if which == "forward" else torch.autograd.grad(out, leaves, change(g), materialize_grads=True)


def validate(op: str, s: Shape, made: dict[str, Call], which: str) -> Tensor | None:
    """Every provider: ours by the error budget, the others that they compute the same function. → g"""
    with torch.no_grad():
        g = torch.randn_like(results(made["eager"], "forward", None)[0]) if which != "forward" else None
    exact, terms = (results(made["reference"], which, g, change) for change in (Tensor.double, lambda x: x.double().abs()))
    noise = op == "noisy_embedding" and which == "forward"                # eager's is another one
    plain = exact if noise else results(made["eager"], which, g)
    for name, call in made.items():
        what = f"{op} {which} by {name} at {s}"
        got = harness.rerun_on_poison(lambda: results(call, which, g))
        if name == "ours":
            harness.check(what, got, exact, plain, terms)
        elif not noise or name == "reference":
            loose = torch.finfo(s.dtype).eps ** 0.5 * exact[0].norm()
            if not (got[0].double() - exact[0]).norm() <= loose:          # NaN is an error
                raise harness.Wrong(f"{what}: not the formula that the others compute: not timed")
    return g


def timed(call: Call, which: str, g: Tensor | None):
    """A function that makes one pass again and again, on the same leaves."""
    leaves = [x.detach().clone().requires_grad_(which != "forward") for x in call.leaves]
    if which == "forward":
        return torch.no_grad()(lambda: call(*leaves))
    if which == "both":
        return lambda: torch.autograd.grad(call(*leaves), leaves, g)
    out = call(*leaves)
    return lambda: torch.autograd.grad(out, leaves, g, retain_graph=True)


def measure(op: str, s: Shape, which: str, clock: Clock, ceilings: dict, seconds: float, cold: bool = False, compile: bool = True,
            without: tuple = ()) -> dict:
    """One row of results: all providers side by side but those in `without`, checked before and after."""
    device = str(clock.device)

    def fresh(seed: int) -> dict[str, Call]:
        return {name: call for name, call in calls(op, s, device, seed, compile).items() if name not in without}
    g = validate(op, s, fresh(1), which)
    runs = {**streams(op, s, which, device), **{name: timed(call, which, g) for name, call in fresh(0).items()}}
    found = {name: {"us": harness.percentiles(times)} for name, times in clock.interleaved(runs, seconds, cold).items()}
    found["ceiling"] = min(found["ceiling"], found.pop("ceiling, cached"), key=lambda cell: cell["us"][1])
    for name in found.keys() - {"ceiling"}:                               # on a CPU what is compiled dispatches nothing; a GPU's profiler
        if not cold or compile if clock.cuda else name != "compiled":     # is slow, and counts the same at every size
            found[name] |= harness.footprint(clock, runs[name])
    if clock.cuda and not cold and which != "backward":                   # whose forward pass was on another stream than a capture
        for name in found.keys() & {"eager", "triton", "ours"}:
            if replay := clock.graph(runs[name]):
                times = clock.interleaved({name: replay}, seconds / 4)[name]
                found[name]["graph_us"] = harness.percentiles([t / harness.GRAPH_CALLS for t in times])
    validate(op, s, fresh(2), which)
    bill, dtype = bills(op, s)[which], str(s.dtype).removeprefix("torch.")
    what = f"{op} {which} {dtype} N {s.N} C {s.C} r {s.r}"
    share = harness.below_the_ceilings(what, found, bill.operations, ceilings["operations"][dtype], which != "both")
    return {**harness.machine(device), "threads": torch.get_num_threads(), "part": "kernels", "op": op, "pass": which, "dtype": dtype,
            "N": s.N, "C": s.C, "r": s.r, "tasks": s.tasks, "cache": "cold" if cold else "hot", "bytes": bill.bytes(s),
            "operations": bill.operations, "ceilings": ceilings, "share": share, "providers": found}


# ---- the grid -------------------------------------------------------------------------------------------------------------------


def star(dtypes) -> list[tuple]:
    """(op, shape, threads are all, cold): one axis at a time through one centre, and the real ReFT shape."""
    real, rows = SEQUENCES * POSITIONS, []
    for dtype in dtypes:
        centre = Shape(4096, 1024, 8, dtype=dtype)
        rows += [("low_rank_edit", replace(centre, r=r), False, False) for r in (1, 2, 4, 8, 16, 32, 64)]
        rows += [("low_rank_edit", replace(centre, N=N), False, False) for N in (64, real, 16384)]
        rows += [("low_rank_edit", replace(centre, N=N, C=C), False, False) for N, C in ((4096, 256), (4096, 768), (2048, 4096))]
        rows += [("low_rank_edit_at_", replace(centre, N=real, C=C), False, cold) for C in (256, 1024, 4096) for cold in (False, True)]
        rows += [("low_rank_edit_at_", replace(centre, N=64 * POSITIONS, C=256, r=4, tasks=K), False, False) for K in (1, 4, 16, 64)]
        rows += [(op, replace(centre, r=0, N=N, C=C), False, False) for op in ("scale", "gelu_scale", "swiglu_scale")
                 for N, C in ((real, 1024), (4096, 1024), (2048, 4096))]
        rows += [("scale", replace(centre, N=64 * POSITIONS, r=0, tasks=K), False, False) for K in (1, 64)]
        rows += [("noisy_embedding", replace(centre, r=0, N=N), False, False) for N in (512, 4096)]
        each = [(op, replace(centre, r=8 * (op == "low_rank_edit"))) for op in OPERATIONS if op != "low_rank_edit_at_"]
        rows += [(*row, False, True) for row in each] + [(*row, True, False) for row in each]
    return list(dict.fromkeys(rows))


def whole(dtypes, most: int) -> list[tuple]:
    """Every combination: C 256 to 8192, r 1 to 64, N 64 to 65,536, tasks 1 to 64, hot and cold, one thread and all."""
    rows = []
    for dtype in dtypes:
        for C in (256, 512, 1024, 2048, 4096, 8192):
            for N in (64, SEQUENCES * POSITIONS, 2048, 16384, 65536):
                if N * C <= most:
                    rows += [("low_rank_edit", Shape(N, C, r, 0, dtype)) for r in (1, 2, 4, 8, 16, 32, 64)]
                    rows += [(op, Shape(N, C, 0, 0, dtype)) for op in ("scale", "gelu_scale", "swiglu_scale", "noisy_embedding")]
            rows += [("low_rank_edit_at_", Shape(SEQUENCES * POSITIONS, C, r, 0, dtype)) for r in (1, 4, 8, 16, 64)]
            rows += [(op, Shape(64 * POSITIONS, C, 8 * (op[0] == "l"), K, dtype)) for K in (1, 2, 4, 8, 16, 32, 64)
                     for op in ("low_rank_edit_at_", "scale", "swiglu_scale")]
    return [(*row, threads, cold) for row in rows for threads in (False, True) for cold in (False, True)]


def line(row: dict) -> str:
    found = row["providers"]
    best = min((found[name]["us"][1], name) for name in found.keys() & {"eager", "compiled"})
    what = f"{row['op']:18}{row['pass']:9}{row['dtype']:9}N {row['N']:<6}C {row['C']:<5}r {row['r']:<3}" + f"{row['tasks'] or '':3}"
    return (f"{what}{row['cache']:5}{row['threads']:2} thr  " + "  ".join(f"{name} {f['us'][1]:.1f}" for name, f in found.items())
            + f" µs   {row['share']:.0%} of the ceiling, ×{best[0] / found['ours']['us'][1]:.2f} against {best[1]}")


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(prog="minireft bench kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPERATIONS, action="append", help="only this operation (may be given again)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: float32 and bfloat16; all with --full")
    parser.add_argument("--pass", choices=PASSES, action="append", dest="passes", help="default: all three")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "C", "R"), help="instead of the usual ones")
    parser.add_argument("--full", action="store_true", help="the whole grid, up to 16 M elements: hours")
    parser.add_argument("--seconds", type=float, default=0.25, help="for each row (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time on a first run")
    parser.add_argument("--write", action="store_true", help="keep the rows in results/kernels.jsonl")
    options = parser.parse_args(argv)
    names = options.dtype or (list(DTYPES) if options.full else ["float32", "bfloat16"])
    dtypes = [DTYPES[name] for name in names]
    if options.shape:
        grid = [(op, Shape(*options.shape, 0, dtype), False, False) for op in options.op or OPERATIONS for dtype in dtypes]
    else:
        grid = whole(dtypes, 1 << 24) if options.full else star(dtypes)
    grid = [row for row in grid if not options.op or row[0] in options.op]
    return run(grid, options.passes or PASSES, options.device, options.seconds, not options.no_compile,
               harness.RESULTS / "kernels.jsonl" if options.write else None)


def run(grid, passes, device: str, seconds: float, compile: bool, path: Path | None) -> list[dict]:
    """Measures and prints every row, and keeps them at `path` as it goes. One that cannot be true is said and left out; it takes
    no others with it, but the run fails."""
    rows, wrong, clocks = [], [], {}
    for op, shape, many, cold in grid:
        threads = (os.cpu_count() or 1) if many else 1
        if threads not in clocks:
            clock = Clock(device, threads)
            clocks[threads] = clock, harness.ceilings(clock, sorted({s.dtype for _, s, *_ in grid}, key=str))
        clock, limits = clocks[threads]
        torch.set_num_threads(threads)
        for which in passes:
            try:
                rows.append(measure(op, shape, which, clock, limits, seconds, cold, compile))
            except harness.Wrong as error:
                wrong.append(error)
                print(error, flush=True)
                continue
            print(line(rows[-1]), flush=True)
            if path:
                harness.write(rows[-1:], path)
    if wrong:
        raise harness.Wrong(f"{len(wrong)} of {len(rows) + len(wrong)} rows are not reported, for the reasons above")
    return rows


if __name__ == "__main__":
    main()
