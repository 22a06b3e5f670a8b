"""Counts what a CUDA kernel does, in the emulator, and predicts its time on three GPUs: a profiler without a GPU.
Run: minireft profile low_rank_edit --N 448 --C 4096 --r 8 --dtype bf16 [--backward] [--json] [--source]
You should see bytes moved beside the least possible, the same on every run; the times are predictions.

bytes       traffic to device memory, by a model: the chip's L2 as one LRU cache of 32-byte sectors, empty at the start,
            blocks one after another, what was written counted when it leaves; no L1.  The smallest L2 of the table.
            What a kernel touches by load_last or store_last (PTX's .cs) leaves first.
l2_bytes    all sectors that warps asked for.          least_bytes  each input read once, each output written once.
coalescing  share of hot accesses (source lines that move at least 5 % of the sectors) that are 16 bytes a lane
            and touch no more sectors than their bytes need.        bank_conflicts  extra passes over shared memory.
shuffles and mma (tensor-core steps) count once a warp, fma (multiply-adds) once a thread, barriers once a block.

In bytes, forward passes move at most 1.05 times the least, backward passes 1.10 times, with two exceptions.  From one
chunk of rows to the next D, A and their sums stay in L2: where they leave less than half of 3 MB to g (in float32 beyond
r · C = 73,700), the part of g that does not fit is read twice: at C 4096 and r 64 1.12 times the least with N 256, 1.29
with N 1024 (float32: 1.20 and 1.31).  And where D and A alone fill it, each tile of rows reads them again, since blocks run
one after another here: at C 8192 and N 128, forward and backward, 1.14 and 1.20 times with r 33, 2.5 and 2.0 with r 64, and in
float32, whose tiles are of 4 rows, 11 and 7.
Banks that do not fit in it together come anew for each sequence: 4 times with --C 4096 --r 64 --tasks 4.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs as a file
from benchmarks.emulator import ROOT, Emulator  # noqa: E402
from minireft.cli import reader_may_leave  # noqa: E402

# Data sheets: memory bandwidth (GB/s), L2 (MB), float32 outside and half precision with float sums inside the tensor
# cores (TFLOP/s, dense).  The cost of a launch is an assumption, the same for all.
GPUS = {
    "RTX 3060": dict(bandwidth=360, l2=3, float32=12.7, tensor=25.5),
    "RTX 4090": dict(bandwidth=1008, l2=72, float32=82.6, tensor=165),
    "H200": dict(bandwidth=4800, l2=50, float32=67, tensor=989),
}
LAUNCH_US = 3.0
SMALLEST_L2 = min(gpu["l2"] for gpu in GPUS.values()) << 20
HOT = 0.05
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# ---- the kernels: shapes -> (a function that runs it, the least bytes) ----------------------------------------------


def low_rank_edit(emulator: Emulator, a, positions: bool = False):
    """All rows of (1, N, C); or at --P positions in each of N / P sequences, saving edited rows as training does, and with
    --tasks K the sequences take K banks of weights in turn."""
    B, P = (math.ceil(a.N / a.P), a.P) if positions else (1, a.N)
    T = 4 * P if positions else P
    N = B * P
    h, g = (torch.randn(B, T, a.C).to(a.dtype) for _ in range(2))  # (B, T, C)
    banks = [a.tasks] if a.tasks else []
    down, up = ((torch.randn(*banks, a.r, a.C) / a.C**0.5).to(a.weight_dtype) for _ in range(2))  # (r, C) or (K, r, C)
    bias = torch.randn(*banks, a.r).to(a.weight_dtype)
    tasks = torch.arange(B) % a.tasks if a.tasks else None  # (B,)
    where = torch.stack([torch.randperm(T)[:P] for _ in range(B)]) if positions else None  # (B, P)
    gradients, K = down.nbytes + up.nbytes + bias.nbytes, max(a.tasks, 1)
    weights = (gradients - a.backward * bias.nbytes) // K * min(K, B)  # of the banks that some sequence takes
    U, extra = N * a.C * h.element_size(), N * a.r * 4 + positions * N * 8 + (a.tasks > 0) * B * 8  # δ, positions, tasks
    if not a.backward:
        out = h.clone()
        return (lambda: emulator.low_rank_edit(h, down, up, bias, where, tasks, out)), (2 + positions) * U + weights + extra
    _, delta, rows = emulator.low_rank_edit(h, down, up, bias, where, tasks)
    return (
        (lambda: emulator.low_rank_edit_backward(g, None if positions else h, rows, delta, down, up, where, tasks)),
        3 * U + gradients + weights + extra,
    )


def scale(emulator: Emulator, a, activation: str = "none", streams: int = 1):
    x, g, up = ([torch.randn(1, a.N, a.C).to(a.dtype) for _ in range(streams)] for _ in range(3))
    l = [torch.randn(a.C).to(a.weight_dtype) for _ in range(streams)]
    gated = activation == "swiglu"
    U, vectors = streams * x[0].nbytes, streams * l[0].nbytes
    if not a.backward:
        return (lambda: emulator.scale(x, l, None, activation, up if gated else None)), (2 + gated) * U + vectors
    return (lambda: emulator.scale_backward(g, x, l, None, activation, up if gated else None)), (
        3 + 2 * gated
    ) * U + 2 * vectors


def noisy_embedding(emulator: Emulator, a):
    ids, weight = torch.randint(0, a.V, (max(1, a.N // 64), min(a.N, 64))), torch.randn(a.V, a.C).to(a.dtype)
    g, seed = torch.randn(*ids.shape, a.C).to(a.dtype), torch.tensor([1, 2])
    least = (len(ids.unique()) + ids.numel()) * a.C * g.element_size() + ids.nbytes * (1 + a.backward)
    if not a.backward:
        return (lambda: emulator.noisy_embedding(ids, weight, 5.0, seed)), least
    return (lambda: emulator.noisy_embedding_backward(g, ids, a.V)), least


KERNELS = {
    "low_rank_edit": low_rank_edit,
    "low_rank_edit_at": lambda e, a: low_rank_edit(e, a, positions=True),
    "scale": scale,
    "scale_pair": lambda e, a: scale(e, a, streams=2),
    "gelu_scale": lambda e, a: scale(e, a, "gelu"),
    "swiglu_scale": lambda e, a: scale(e, a, "swiglu"),
    "noisy_embedding": noisy_embedding,
}


# ---- counting, adding up, predicting --------------------------------------------------------------------------------


def profile(
    kernel: str,
    N: int = 448,
    C: int = 4096,
    r: int = 8,
    dtype: str = "bf16",
    weights: str = "fp32",
    backward: bool = False,
    P: int = 14,
    V: int = 32000,
    tasks: int = 0,
    emulator: Emulator | None = None,
    gpus: dict = GPUS,
) -> dict:
    """Run one kernel in the emulator, once for each size of L2 in `gpus`, and add up what it did."""
    torch.manual_seed(0)
    a = argparse.Namespace(
        N=N, C=C, r=r, P=P, V=V, tasks=tasks, dtype=DTYPES[dtype], weight_dtype=DTYPES[weights], backward=backward
    )
    emulator = emulator or Emulator()
    run, least = KERNELS[kernel](emulator, a)
    by_l2 = {
        l2: _summary(_count(emulator, run, l2), least) for l2 in {SMALLEST_L2, *(g["l2"] << 20 for g in gpus.values())}
    }
    result = dict(kernel=kernel, N=N, C=C, r=r, tasks=tasks, dtype=dtype, weights=weights, backward=backward, **by_l2[SMALLEST_L2])
    result["predicted_us"] = {name: predict(by_l2[gpu["l2"] << 20], gpu) for name, gpu in gpus.items()}
    return result


def _count(emulator: Emulator, run, l2_bytes: int) -> dict:
    with emulator.counting(l2_bytes) as counts:
        run()
    for kernel in counts["kernels"]:
        for site in kernel["sites"]:
            site["file"] = Path(site["file"]).resolve().relative_to(ROOT).as_posix()
    return counts


def _summary(counts: dict, least: int) -> dict:
    sites = [dict(site, kernel=k["name"]) for k in counts["kernels"] for site in k["sites"]]
    sectors = sum(s["sectors"] for s in sites)
    hot = [s for s in sites if not s["shared"] and s["sectors"] >= HOT * sectors]
    total = {
        key: sum(k[key] for k in counts["kernels"])
        for key in ("launches", "blocks", "barriers", "shuffles", "mma", "fma", "special")
    }
    return dict(
        bytes=counts["bytes"],
        l2_bytes=32 * sectors,
        least_bytes=least,
        sectors=sectors,
        coalescing=sum(s["full"] for s in hot) / sum(s["instructions"] for s in hot),
        bank_conflicts=sum(s["conflicts"] for s in sites),
        barriers_per_block=total["barriers"] / total["blocks"],
        **total,
        kernels=counts["kernels"],
    )


def predict(counts: dict, gpu: dict) -> dict:
    """Microseconds: the longest of the three units' times, and the launches, which nothing overlaps."""
    parts = dict(
        memory=counts["bytes"] / gpu["bandwidth"] / 1e3,
        float32=2 * (counts["fma"] + 8 * counts["special"]) / gpu["float32"] / 1e6,  # 8: a special function in fma
        tensor=4096 * counts["mma"] / gpu["tensor"] / 1e6,
        launch=counts["launches"] * LAUNCH_US,
    )
    return dict(parts, total=max(parts["memory"], parts["float32"], parts["tensor"]) + parts["launch"])


# ---- printing -------------------------------------------------------------------------------------------------------


def show(p: dict) -> None:
    print(
        f"{p['kernel']}{' backward' * p['backward']}, N {p['N']}, C {p['C']}, r {p['r']}, {p['dtype']}, "
        f"parameters {p['weights']}{', tasks ' + str(p['tasks']) if p['tasks'] else ''}; "
        f"counted in the emulator, L2 of {SMALLEST_L2 >> 20} MB"
    )
    print(f"  bytes          {p['bytes']:>12,}   {p['bytes'] / p['least_bytes']:.3f} × the least, {p['least_bytes']:,}")
    print(f"  l2_bytes       {p['l2_bytes']:>12,}   {p['l2_bytes'] / p['least_bytes']:.2f} ×, {p['sectors']:,} sectors")
    print(f"  coalescing     {p['coalescing']:>12.2%}   bank_conflicts {p['bank_conflicts']:,}")
    print(
        f"  {'kernel':<22}{'launches':>9}{'blocks':>9}{'threads':>8}{'barriers/block':>15}"
        f"{'shuffles':>11}{'mma':>9}{'fma':>13}"
    )
    for k in p["kernels"]:
        print(
            f"  {k['name']:<22}{k['launches']:>9,}{k['blocks']:>9,}{k['threads']:>8}"
            f"{k['barriers'] / k['blocks']:>15.1f}"
            f"{k['shuffles']:>11,}{k['mma']:>9,}{k['fma']:>13,}"
        )
    print(
        f"  predicted, not measured (data sheet rates, {LAUNCH_US:.0f} µs a launch assumed, L1 and L2 taken as free):"
    )
    for name, t in p["predicted_us"].items():
        print(
            f"    {name:<10}{t['total']:>9.1f} µs   memory {t['memory']:.1f}, float32 {t['float32']:.1f}, tensor cores "
            f"{t['tensor']:.1f}, launches {t['launch']:.1f}"
        )


def show_source(p: dict) -> None:
    """The kernels' lines, and beside those that touch memory what they did."""
    at: dict[str, dict[int, list]] = {}
    for k in p["kernels"]:
        for s in k["sites"]:
            at.setdefault(s["file"], {}).setdefault(s["line"], []).append(s)
    for file, lines in at.items():
        print(
            f"\n{file}\n"
            f"{'instructions':>13}{'sectors':>10}{'full':>6}{'conflicts':>10}"
        )
        for number, text in enumerate((ROOT / file).read_text().splitlines(), 1):
            if not any(abs(number - other) <= 3 for other in lines):
                continue
            sites = lines.get(number, [])
            total = {key: sum(s[key] for s in sites) for key in ("instructions", "sectors", "full", "conflicts")}
            is_global = any(not s["shared"] for s in sites)
            counts = " " * 39
            if sites:
                sectors, full = (
                    (f"{total['sectors']:,}", f"{total['full'] / total['instructions']:.0%}") if is_global else ("", "")
                )
                counts = f"{total['instructions']:>13,}{sectors:>10}{full:>6}{total['conflicts'] or '':>10}"
            print(f"{counts} {number:>4}  {text}")


@reader_may_leave()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="minireft profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--N", type=int, default=448, help="rows (default %(default)s)")
    parser.add_argument("--C", type=int, default=4096, help="width (default %(default)s)")
    parser.add_argument("--r", type=int, default=8, help="rank (default %(default)s)")
    parser.add_argument(
        "--P", type=int, default=14, help="positions in a sequence, for low_rank_edit_at (default %(default)s)"
    )
    parser.add_argument(
        "--tasks", type=int, default=0, help="banks that the sequences take in turn, for low_rank_edit_at (default: no banks)"
    )
    parser.add_argument("--V", type=int, default=32000, help="vocabulary, for noisy_embedding (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the activations (default %(default)s)")
    parser.add_argument("--weights", choices=DTYPES, help="of the parameters: fp32 (default) or the activations'")
    parser.add_argument("--backward", action="store_true", help="the backward pass")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--source", action="store_true", help="print the counts beside the kernels' lines")
    a = parser.parse_args(argv)
    weights = a.weights or "fp32"
    if weights not in ("fp32", a.dtype):
        parser.error(f"--weights must be fp32 or {a.dtype}, the dtype of the activations, got {weights}")
    for name in ("N", "C", "r", "P", "V"):
        if getattr(a, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(a, name)}")
    if a.tasks < 0 or a.tasks and a.kernel != "low_rank_edit_at":
        parser.error(f"--tasks is a number of banks, from 0, for low_rank_edit_at; got {a.tasks} for {a.kernel}")
    result = profile(a.kernel, a.N, a.C, a.r, a.dtype, weights, a.backward, a.P, a.V, a.tasks)
    if a.json:
        print(json.dumps(result, indent=1))
        return
    show(result)
    if a.source:
        show_source(result)


if __name__ == "__main__":
    sys.exit(main())
