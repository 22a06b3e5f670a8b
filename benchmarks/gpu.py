"""Measures the kernels on this machine's GPU, beside plain PyTorch, and against what the emulator's counts predicted.
Run: python benchmarks/gpu.py [--write]    or --suite: each operation once, small, for compute-sanitizer to watch
You should see one line a shape: median microseconds, the share of this GPU's copy bandwidth, and predicted / measured.

Written on a machine without a GPU; it has never run on one yet.  Nothing is timed that was not first compared with
float64; more than 100 % of the measured copy bandwidth is a failure of the benchmark, not a success of the kernel.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.profile_kernel import profile  # noqa: E402
from minireft import ops, reference  # noqa: E402

NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRID = [
    (kernel, N, C, r, dtype)
    for kernel, shapes in {
        "low_rank_edit": [(448, 4096, 8), (4096, 4096, 8), (16384, 4096, 8), (16384, 1024, 4), (8192, 4096, 32)],
        "scale": [(448, 4096, 0), (16384, 4096, 0)],
        "gelu_scale": [(16384, 4096, 0)],
        "swiglu_scale": [(16384, 4096, 0)],
        "noisy_embedding": [(16384, 4096, 0)],
    }.items()
    for N, C, r in shapes
    for dtype in ("bf16", "fp32")
]
PREDICTED_ROWS = 4096  # the emulator counts at most so many rows; bytes beyond grow with the rows


# ---- operations: (inputs, {provider: function}, the formula in float64) ---------------------------------------------


def inputs_of(kernel: str, N: int, C: int, r: int, dtype: torch.dtype) -> tuple[list, dict]:
    def draw(*shape, scale=1.0, to=dtype):
        return (torch.randn(*shape, device="cuda") * scale).to(to)

    wide = torch.float32
    if kernel == "low_rank_edit":
        return [draw(N, C), draw(r, C, scale=C**-0.5, to=wide), draw(r, C, scale=C**-0.5, to=wide), draw(r, to=wide)], {
            "eager": lambda h, D, A, b: torch.addmm(h, torch.addmm(b.to(h), h, D.to(h).T), A.to(h)),
            "ours": ops.low_rank_edit,
            "exact": reference.low_rank_edit,
        }
    if kernel == "noisy_embedding":
        ids, seed = torch.randint(0, 32000, (N // 64, 64), device="cuda"), torch.tensor([1, 2], device="cuda")
        return [draw(32000, C)], {
            "eager": lambda w: (
                F.embedding(ids, w)
                + torch.empty(*ids.shape, C, device="cuda", dtype=dtype).uniform_(-1, 1) * (5 / (64 * C) ** 0.5)
            ),
            "ours": lambda w: ops.noisy_embedding(ids, w, 5.0, seed),
            "exact": lambda w: reference.noisy_embedding(ids, w, 5.0, seed),
        }
    eager = {
        "scale": lambda x, l: x * l.to(x),
        "gelu_scale": lambda u, l: F.gelu(u) * l.to(u),
        "swiglu_scale": lambda g, u, l: F.silu(g) * u * l.to(g),
    }[kernel]
    return [*(draw(N, C) for _ in range(1 + (kernel == "swiglu_scale"))), draw(C, to=wide)], {
        "eager": eager,
        "ours": getattr(ops, kernel),
        "exact": getattr(reference, kernel),
    }


def run(function, inputs: list, g: torch.Tensor | None):
    """The result, or with g the gradients (forward and backward)."""
    out = function(*inputs)
    return (out,) if g is None else torch.autograd.grad(out, inputs, g)


def check(kernel: str, providers: dict, inputs: list, g: torch.Tensor | None) -> None:
    """Ours against float64: finite, and at most twice eager's error, or one rounding of the result and one of the terms
    summed (the formula on absolute values)."""

    def exactly(change):
        wide = [change(x.detach().double()).requires_grad_(g is not None) for x in inputs]
        return run(providers["exact"], wide, None if g is None else change(g.double()))

    ours, exact, terms = run(providers["ours"], inputs, g), exactly(lambda x: x), exactly(torch.abs)
    eager = exact if kernel == "noisy_embedding" else run(providers["eager"], inputs, g)  # eager's noise is another
    for mine, right, theirs, term in zip(ours, exact, eager, terms):
        rounding = torch.finfo(mine.dtype).eps * right.norm() + torch.finfo(torch.float32).eps * term.norm()
        error, budget = (mine.double() - right).norm(), 2 * (theirs.double() - right).norm() + rounding
        if not error <= budget:
            raise SystemExit(f"{kernel}: error {error:.3g}, allowed {budget:.3g}; not timed")


def microseconds(function, repeats: int = 30) -> list[float]:
    """20th, 50th and 80th percentile of single runs, by device events, after a warm-up; other memory is written between
    them, so that no input is left in L2."""
    flush = torch.empty(64 << 20, device="cuda")
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        flush.normal_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()


def this_gpu() -> dict:
    """What predict() needs of this machine, measured: GB/s of a copy, TFLOP/s of matrix products; the size of L2."""
    x = torch.randn(256 << 20, device="cuda")
    y = torch.empty_like(x)
    bandwidth = 2 * x.nbytes / microseconds(lambda: y.copy_(x))[1] / 1e3
    rates = {}
    for name, dtype, n in (("float32", torch.float32, 4096), ("tensor", torch.bfloat16, 8192)):
        a = torch.randn(n, n, device="cuda", dtype=dtype)
        rates[name] = 2 * n**3 / microseconds(lambda: a @ a, 10)[1] / 1e6
    properties = torch.cuda.get_device_properties(0)
    return dict(name=properties.name, bandwidth=bandwidth, l2=max(1, properties.L2_cache_size >> 20), **rates)


def measure(gpu: dict) -> list[dict]:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    rows = []
    for kernel, N, C, r, dtype in GRID:
        torch.manual_seed(0)
        inputs, providers = inputs_of(kernel, N, C, r, NAMES[dtype])
        predicted, least = 0.0, 0
        for backward in (False, True):
            inputs = [x.detach().requires_grad_(backward) for x in inputs]
            with torch.set_grad_enabled(backward):
                g = torch.randn_like(providers["ours"](*inputs)) if backward else None
                check(kernel, providers, inputs, g)
                times = {
                    name: microseconds(lambda f=f: run(f, inputs, g))
                    for name, f in providers.items()
                    if name != "exact"
                }
            counted = profile(
                kernel, min(N, PREDICTED_ROWS), C, max(r, 1), dtype, backward=backward, gpus={"here": gpu}
            )
            more = max(1.0, N / PREDICTED_ROWS)
            predicted += counted["predicted_us"]["here"]["total"] * more
            least += counted["least_bytes"] * more
            share = least / times["ours"][1] / 1e3 / gpu["bandwidth"]
            if share > 1 and least > 4 * gpu["l2"] << 20:
                raise SystemExit(
                    f"{kernel} {N, C, r}: {share:.0%} of the copy bandwidth is impossible: the benchmark is wrong"
                )
            rows.append(
                dict(
                    device=gpu["name"],
                    torch=torch.__version__,
                    date=datetime.date.today().isoformat(),
                    commit=commit,
                    kernel=kernel,
                    dtype=dtype,
                    N=N,
                    C=C,
                    r=r,
                    backward=backward,
                    microseconds={k: [round(x, 2) for x in t] for k, t in times.items()},
                    bandwidth_share=round(share, 3),
                    predicted_us=round(predicted, 2),
                )
            )
            print(
                f"{kernel:16} {dtype} N {N:6} C {C:5} r {r:3} {'fwd+bwd' if backward else 'fwd    '}  "
                f"ours {times['ours'][1]:9.1f} µs  "
                f"eager {times['eager'][1]:9.1f} µs  {share:6.1%} of copy bandwidth  "
                f"predicted/measured {predicted / times['ours'][1]:.2f}",
                flush=True,
            )
    return rows


def suite() -> None:
    """Every kernel once: scalar, vectors, tensor cores, positions, banks, activations, noise; forward and backward."""
    for dtype in (torch.float32, torch.bfloat16):
        for C, r in ((64, 4), (33, 3), (136, 20)):
            h = torch.randn(3, 7, C, device="cuda", dtype=dtype, requires_grad=True)
            D, A = (torch.randn(2, r, C, device="cuda", requires_grad=True) for _ in range(2))
            b, l = (
                torch.randn(2, r, device="cuda", requires_grad=True),
                torch.randn(2, C, device="cuda", requires_grad=True),
            )
            positions = torch.tensor([[0, 3, -1], [6, 1, 2], [5, 4, -1]], device="cuda")
            tasks = torch.tensor([1, -1, 0], device="cuda")
            ids = torch.randint(0, 11, (3, 7), device="cuda")
            weight = torch.randn(11, C, device="cuda", dtype=dtype, requires_grad=True)
            results = [
                ops.low_rank_edit(h, D[0], A[0], b[0]),
                ops.low_rank_edit_at(h, positions, D[0], A[0], b[0]),
                ops.low_rank_edit_at(h, positions, D, A, b, tasks),
                ops.scale(h, l[0]),
                ops.scale(h, l, tasks),
                *ops.scale_pair(h, h, l[0], l[1]),
                ops.gelu_scale(h, l[0]),
                ops.gelu_scale(h, l[0], approximate="tanh"),
                ops.swiglu_scale(h, h, l, tasks),
                ops.noisy_embedding(ids, weight, 5.0, torch.tensor([1, 2], device="cuda")),
            ]
            torch.autograd.grad(sum(x.float().sum() for x in results), [h, D, A, b, l, weight])
    torch.cuda.synchronize()
    print("every kernel ran")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", action="store_true", help="only run each kernel once, small")
    parser.add_argument("--write", action="store_true", help="append the rows to results/gpu.jsonl")
    options = parser.parse_args()
    if not ops.backends()["cuda"]:
        raise SystemExit(
            "benchmarks/gpu.py needs a GPU and the CUDA kernels: MINIREFT_CUDA=1 python setup.py build_ext --inplace"
        )
    if options.suite:
        return suite()
    gpu = this_gpu()
    print(
        f"{gpu['name']}: copy {gpu['bandwidth']:.0f} GB/s, L2 {gpu['l2']} MB, "
        f"float32 {gpu['float32']:.0f} and bf16 {gpu['tensor']:.0f} TFLOP/s, measured"
    )
    rows = measure(gpu)
    if options.write:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        with open(folder / "gpu.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
