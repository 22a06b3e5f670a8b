"""Times the kernels on this machine's CPU, one thread, beside the plain PyTorch they replace, in one interleaved run.
Run: python benchmarks/kernels.py [--op low_rank_edit] [--dtype float32] [--write]     (--write appends to results/kernels.jsonl)
You should see one line a shape: milliseconds of each provider and how many times faster ours is than well-written eager.

Every result is compared with the eager one before it is timed, and must be finite. Inputs are never zeros. Times are medians
of processor time over rounds in which the providers take turns, so that a busy machine slows them alike; and percentiles.
"""

import argparse
import datetime
import json
import platform
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from minireft import ops

RESULTS = Path(__file__).parent / "results"


# ---- what is timed: op -> (make inputs, {provider: function of the inputs}) ----------------------------------------


def low_rank_edit(N, C, r, dtype):
    h = torch.randn(N, C, dtype=dtype)
    weights = [(torch.randn(r, C) / C ** 0.5).to(dtype), (torch.randn(r, C) / C ** 0.5).to(dtype), torch.randn(r).to(dtype)]
    return [h, *weights], {
        "common": lambda h, D, A, b: h + (F.linear(h, D, b) - F.linear(h, A)) @ A,     # LoReFT as it is usually written
        "eager": lambda h, D, A, b: torch.addmm(h, torch.addmm(b, h, D.T), A),
        "ours": ops.low_rank_edit}


def scale(N, C, r, dtype):
    return [torch.randn(N, C, dtype=dtype), torch.randn(C).to(dtype)], {
        "eager": lambda x, l: x * l, "ours": ops.scale}


def gelu_scale(N, C, r, dtype):
    return [torch.randn(N, C, dtype=dtype), torch.randn(C).to(dtype)], {
        "eager": lambda u, l: F.gelu(u) * l, "ours": ops.gelu_scale}


def swiglu_scale(N, C, r, dtype):
    return [torch.randn(N, C, dtype=dtype), torch.randn(N, C, dtype=dtype), torch.randn(C).to(dtype)], {
        "eager": lambda gate, up, l: F.silu(gate) * up * l, "ours": ops.swiglu_scale}


def noisy_embedding(N, C, r, dtype):
    ids, weight, seed = torch.randint(0, 4096, (N // 64, 64)), torch.randn(4096, C, dtype=dtype), torch.tensor([1, 2])

    def eager(weight):
        x = F.embedding(ids, weight)                                                          # (B, T, C)
        return x + torch.empty_like(x).uniform_(-1, 1) * (5 / (64 * C) ** 0.5)

    return [weight], {"eager": eager, "ours": lambda weight: ops.noisy_embedding(ids, weight, 5.0, seed)}


OPERATIONS = {f.__name__: f for f in (low_rank_edit, scale, gelu_scale, swiglu_scale, noisy_embedding)}
SHAPES = {"low_rank_edit": [(1, 256, 1)] + [(N, C, r) for C in (768, 1024, 2048, 4096) for r in (1, 4, 8, 32) for N in (512, 4096)],
          "scale": [(4096, 1024, 0), (4096, 4096, 0)], "gelu_scale": [(4096, 1024, 0), (2048, 4096, 0)],
          "swiglu_scale": [(4096, 1024, 0), (2048, 4096, 0)], "noisy_embedding": [(2048, 1024, 0), (1024, 4096, 0)]}
GRID = [(N, C, r) for C in (256, 512, 1024, 4096, 8192) for r in (1, 8, 16, 32, 64) for N in (64, 512, 2048, 16384, 65536)
        if 2 ** 18 <= N * C <= 2 ** 25]                                     # beyond that, time grows with N·C and nothing else


# ---- how it is timed -------------------------------------------------------------------------------------------------


def run(function, inputs, backward: bool, g=None):
    out = function(*inputs)
    return torch.autograd.grad(out, inputs, g) if backward else out


def measure(op: str, N: int, C: int, r: int, dtype: torch.dtype, backward: bool, seconds: float) -> dict:
    """{provider: (20th, 50th, 80th percentile in milliseconds)} for one shape, all providers side by side."""
    torch.manual_seed(0)
    inputs, providers = OPERATIONS[op](N, C, r, dtype)
    inputs = [t.requires_grad_(backward) for t in inputs]
    with torch.set_grad_enabled(backward):
        g = torch.randn_like(providers["ours"](*inputs))
        check(op, providers, inputs, backward, g)
        times = {name: [] for name in providers}
        start = time.perf_counter()
        repeats = max(1, int(1e-3 / max(once(providers["ours"], inputs, backward, g, 1), 1e-6)))
        while time.perf_counter() - start < seconds or len(times["ours"]) < 7:
            for name, function in providers.items():
                times[name].append(once(function, inputs, backward, g, repeats))
    return {name: [round(1e3 * q, 4) for q in torch.tensor(t).quantile(torch.tensor([.2, .5, .8])).tolist()]
            for name, t in times.items()}


def once(function, inputs, backward, g, repeats) -> float:
    """Seconds of processor time a call: what others do on the machine meanwhile does not count."""
    start = time.process_time()
    for _ in range(repeats):
        run(function, inputs, backward, g)
    return (time.process_time() - start) / repeats


def check(op, providers, inputs, backward, g) -> None:
    """Ours in its dtype against eager in float32: finite, and within two roundings of a bfloat16."""
    if op == "noisy_embedding" and not backward:
        return                                                              # other noise on purpose; the tests compare bits
    exact = [t.detach().float().requires_grad_(backward) for t in inputs]
    expected, got = run(providers["eager"], exact, backward, g.float()), run(providers["ours"], inputs, backward, g)
    for a, b in zip(expected if backward else [expected], got if backward else [got]):
        if not b.isfinite().all() or not (a - b.float()).norm() <= 2 ** -7 * a.norm():
            raise SystemExit(f"{op} at {tuple(inputs[0].shape)}: ours differs from eager, not timed")


def machine() -> dict:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] \
        if platform.system() == "Linux" else [platform.processor()]
    return {"device": f"{names[0]}, 1 thread", "torch": torch.__version__, "date": datetime.date.today().isoformat(),
            "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPERATIONS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), action="append", help="default: float32 and bfloat16")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "C", "R"), help="instead of the usual ones")
    parser.add_argument("--grid", action="store_true", help="the low-rank edit from C 256 to 8192, r 1 to 64, N 64 to 65,536: some minutes")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row")
    parser.add_argument("--write", action="store_true", help="append the rows to results/kernels.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    slower = []
    for op in ["low_rank_edit"] if options.grid else options.op or OPERATIONS:
        for dtype in options.dtype or ("float32", "bfloat16"):
            for N, C, r in [options.shape] if options.shape else GRID if options.grid else SHAPES[op]:
                for backward in (False, True):
                    times = measure(op, N, C, r, getattr(torch, dtype), backward, options.seconds)
                    ratio = times["eager"][1] / times["ours"][1]
                    row = {**machine(), "op": op, "dtype": dtype, "N": N, "C": C, "r": r, "backward": backward,
                           "milliseconds": times, "ratio": round(ratio, 3)}
                    slower += [(dtype, N, C, r, backward, row["ratio"])] if ratio < 1 else []
                    if options.write:
                        RESULTS.mkdir(exist_ok=True)
                        with open(RESULTS / "kernels.jsonl", "a") as file:
                            file.write(json.dumps(row) + "\n")
                    print(f"{op:16} {dtype:8} N {N:5} C {C:4} r {r:2} {'fwd+bwd' if backward else 'fwd    '}  "
                          + "  ".join(f"{name} {t[1]:8.3f}" for name, t in times.items()) + f"   ×{ratio:.2f}", flush=True)
    if options.grid:
        print(f"slower than eager: {len(slower)} rows", *sorted(slower, key=lambda row: row[-1]), sep="\n")


if __name__ == "__main__":
    main()
