"""What only a GPU can say, in one command, offline: build, property tests, checkers, times, and the emulator's predictions held to them.
Run: make gpu   or   python benchmarks/gpu.py [--minutes 8]      (needs torch, numpy, ninja, pytest, hypothesis, tokenizers, safetensors)
You should see each stage end with ok, a line for each shape, and a summary; results/gpu.jsonl and gpu_checks.json are written.

A stage that fails or runs out of its time does not stop the next; the exit status says whether all were well. The times
have 8 minutes on a data-centre GPU; give a consumer one --minutes 20.  --device cpu goes through the same stages and the
same code without a GPU and writes nothing: whether it runs, not how fast.
Written on machines without a GPU: README.md says whether it has run on one yet.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                                             # so that it also runs as a file
NEEDS = ("torch", "numpy", "ninja", "pytest", "hypothesis", "tokenizers", "safetensors")
CHECKERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PREDICTED_ROWS = 256                    # what the emulator counts; bytes and arithmetic beyond grow with the rows


# ---- the stages --------------------------------------------------------------------------------------------------------------


def stages(device: str, minutes: float) -> list[tuple]:
    """(name, seconds it may take, command, more environment); the times take what the others leave."""
    python, me, part = sys.executable, str(Path(__file__)), minutes / 8
    cuda = device.startswith("cuda")
    found = [("build", 150 * part, [python, "setup.py", "-q", "build_ext", "--inplace"], {"MINIREFT_CUDA": "1"} if cuda else {}),
             ("property tests", 150 * part, [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_ops.py"]
              + (["-m", "gpu"] if cuda else ["-m", "not gpu and not emulator", "-k", "exact and scale"]), {})]
    suite = [python, me, "--suite", "--device", device]
    if cuda and shutil.which("compute-sanitizer"):
        for tool in CHECKERS:
            found.append((tool, 35 * part, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *suite], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    else:
        found.append(("every kernel once", 60 * part, suite, {}))         # without a checker; the summary says so
    return found


def stage(name: str, limit: float, command: list[str], environment: dict) -> str:
    """Runs one; what became of it."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    began = time.monotonic()
    running = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True)
    try:
        status = running.wait(limit)
        outcome = "ok" if status == 0 else f"FAILED with status {status}"
    except BaseException as stop:                                         # Ctrl-C too: its children are in a session of their own
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        if not isinstance(stop, subprocess.TimeoutExpired):
            raise
        outcome = f"STOPPED after its {limit:.0f} s"
    outcome += f", {time.monotonic() - began:.0f} s"
    print(f"== {name}: {outcome}", flush=True)
    return outcome


def everything(device: str, minutes: float) -> int:
    """All stages, and a summary; 0 when all were well."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"make gpu: this environment lacks {', '.join(missing)}: {sys.executable} -m pip install {' '.join(missing)}")
    if device.startswith("cuda") and not subprocess_says("import torch; print(torch.cuda.is_available())") == "True":
        raise SystemExit("make gpu: this torch sees no GPU (python -c 'import torch; print(torch.cuda.is_available())' says False); "
                         "python benchmarks/gpu.py --device cpu shows what it would do")
    began, outcomes = time.monotonic(), {}
    for name, *what in stages(device, minutes):
        outcomes[name] = stage(name, *what)
    for name in CHECKERS:
        outcomes.setdefault(name, "NOT RUN: no compute-sanitizer here")
    rest = 60 * minutes - (time.monotonic() - began)
    for name, share in (("times", 0.75), ("predictions", 0.2)):
        outcomes[name] = stage(name, max(60, share * rest) + 30, [
            sys.executable, str(Path(__file__)), f"--{name}", "--device", device, "--budget", f"{max(30, share * rest):.0f}"], {})
    print(f"\n{'':4}{'stage':20}outcome, {(time.monotonic() - began) / 60:.1f} minutes in all")
    for name, outcome in outcomes.items():
        print(f"{'':4}{name:20}{outcome}")
    if device.startswith("cuda"):
        from benchmarks import harness
        (harness.RESULTS / "gpu_checks.json").write_text(json.dumps({**harness.machine(device), "stages": outcomes}, indent=1) + "\n")
    return int(any(not outcome.startswith("ok") for outcome in outcomes.values()))


def subprocess_says(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


# ---- for the checkers to watch --------------------------------------------------------------------------------------------------


def suite(device: str) -> None:
    """Every kernel once: scalar, vectors, tensor cores, positions, banks, activations, noise; forward and backward."""
    import torch

    from minireft import ops
    for dtype in (torch.float32, torch.bfloat16):
        for C, r in ((64, 4), (33, 3), (136, 20)):
            h = torch.randn(3, 7, C, device=device, dtype=dtype, requires_grad=True)
            D, A = (torch.randn(2, r, C, device=device, requires_grad=True) for _ in range(2))
            b, l = (torch.randn(2, n, device=device, requires_grad=True) for n in (r, C))
            positions = torch.tensor([[0, 3, -1], [6, 1, 2], [5, 4, -1]], device=device)
            tasks, ids = torch.tensor([1, -1, 0], device=device), torch.randint(0, 11, (3, 7), device=device)
            weight = torch.randn(11, C, device=device, dtype=dtype, requires_grad=True)
            results = [
                ops.low_rank_edit(h, D[0], A[0], b[0]), ops.low_rank_edit_at(h, positions, D[0], A[0], b[0]),
                ops.low_rank_edit_at(h, positions, D, A, b, tasks), ops.low_rank_edit_at_(h * 1, positions, D, A, b, tasks),
                ops.scale(h, l[0]), ops.scale(h, l, tasks), *ops.scale_pair(h, h, l[0], l[1]), ops.gelu_scale(h, l[0]),
                ops.gelu_scale(h, l[0], approximate="tanh"), ops.swiglu_scale(h, h, l, tasks),
                ops.noisy_embedding(ids, weight, 5.0, torch.tensor([1, 2], device=device))]
            gradients = torch.autograd.grad(sum(x.float().sum() for x in results), [h, D, A, b, l, weight])
            if not all(x.isfinite().all() for x in (*results, *gradients)):
                raise SystemExit(f"a result at C {C}, r {r}, {dtype} is not finite")
    print("every kernel ran")


# ---- times --------------------------------------------------------------------------------------------------------------------------


def grid(small: bool) -> list[tuple]:
    """(op, shape, cold, torch.compile too), what matters most first; small: to go through the code on a CPU."""
    import torch

    from benchmarks.kernels import POSITIONS, SEQUENCES, Shape
    real, rows = SEQUENCES * POSITIONS, []
    if small:
        return [("low_rank_edit_at_", Shape(28, 64, 8), False, False), ("scale", Shape(64, 64), True, False)]
    for dtype in (torch.bfloat16, torch.float32):
        half = dtype is torch.bfloat16
        rows += [("low_rank_edit_at_", Shape(real, C, r, 0, dtype), False, half and r == 8) for C in (4096, 1024, 8192) for r in (8, 1, 32)]
        rows += [("low_rank_edit", Shape(16384, 4096, r, 0, dtype), True, half and r == 8) for r in (8, 1, 2, 4, 16, 32, 64)]
        rows += [(op, Shape(16384, 4096, 0, 0, dtype), True, half) for op in ("scale", "gelu_scale", "swiglu_scale", "noisy_embedding")]
        rows += [("low_rank_edit", Shape(N, 4096, 8, 0, dtype), True, False) for N in (64, real, 2048, 65536)]
        rows += [("low_rank_edit", Shape((1 << 26) // C, C, 8, 0, dtype), True, False) for C in (256, 512, 1024, 2048, 8192)]
        rows += [("low_rank_edit_at_", Shape(64 * POSITIONS, 4096, 8, K, dtype), False, False) for K in (1, 64, 8)]
        rows += [("scale", Shape(64 * POSITIONS, 4096, 0, K, dtype), False, False) for K in (1, 64)]
    rows += [(op, Shape(s.N, s.C, s.r, s.tasks, torch.float16), cold, False) for op, s, cold, compiled in rows if compiled]
    return rows


BYTES_AN_ELEMENT = 120                  # of device memory that a row's checks take at most: float64 copies of everything


def times(device: str, budget: float) -> int:
    """Measures row after row until the budget is spent, and keeps each at once; 1 when a row was wrong or failed."""
    import torch

    from benchmarks import harness, kernels
    began, cuda = time.monotonic(), device.startswith("cuda")
    room = torch.cuda.mem_get_info()[0] if cuda else 1 << 30
    clock, shapes = harness.Clock(device), grid(not cuda)
    limits = harness.ceilings(clock, sorted({s.dtype for _, s, *_ in shapes}, key=str))
    print(f"{harness.machine(device)['device']}: measured {limits}", flush=True)
    compiles = cuda and importlib.util.find_spec("triton") is not None
    late, large, failed = 0, 0, 0
    for op, shape, cold, compile in shapes:
        if shape.N * shape.C * BYTES_AN_ELEMENT > room:
            large += 1
            continue
        for which in kernels.PASSES:
            if time.monotonic() - began > budget:
                late += 1
                continue
            row = attempt(lambda **how: kernels.measure(op, shape, which, clock, limits, 0.1, cold, **how), compile and compiles)
            if row is None:
                failed += 1
                continue
            found = row["providers"]["ours"]
            print(f"{kernels.line(row)}   {row['bytes'] / found['us'][1] / 1e3 / limits['copy']:.0%} of the copy bandwidth, "
                  f"{found.get('launches') or '?'} launches" + (f", {found['graph_us'][1]:.1f} µs in a graph" if "graph_us" in found else ""), flush=True)
            if cuda:
                harness.write([row], harness.RESULTS / "gpu.jsonl")
    print(f"of {3 * len(shapes)} rows: {failed} failed, {late} left out because the time was up, {3 * large} because they do not fit")
    return int(failed > 0)


def attempt(measure, compile: bool) -> dict | None:
    """A row; if it fails, why, and the row without the providers that are not ours; None if that fails too."""
    for how in ({"compile": compile}, {"compile": False, "without": ("common", "triton")}):
        try:
            return measure(**how)
        except (Exception, SystemExit) as error:                          # a wrong result, or whatever a library throws
            print(f"FAILED{' without the others' * ('without' in how)}: {type(error).__name__}: {str(error).strip()[:400]}", flush=True)
    return None


# ---- predictions -----------------------------------------------------------------------------------------------------------------------


def predictions(device: str, budget: float) -> None:
    """What the emulator's counts said beforehand of the rows just measured, with this GPU's own bandwidth and rates."""
    from benchmarks import harness, kernels
    from benchmarks.emulator import Emulator
    began, path = time.monotonic(), harness.RESULTS / "gpu.jsonl"
    if device.startswith("cuda"):
        here, rows = harness.machine(device), harness.read(path) if path.exists() else []
    else:
        here = harness.machine(device)
        clock = harness.Clock(device)
        rows = [kernels.measure(op, shape, "forward", clock, harness.ceilings(clock, [shape.dtype]), 0, cold, False) for op, shape, cold, _ in grid(True)]
    emulator, done = Emulator(), []
    for row in rows:
        if row["device"] == here["device"] and row["commit"] == here["commit"] and not row["tasks"] and row["pass"] != "both" \
                and time.monotonic() - began < budget:
            row["predicted_us"] = round(predicted(row, emulator), 2)
            done.append(row)
            print(f"{row['op']:18}{row['pass']:9}{row['dtype']:9}N {row['N']:<6}C {row['C']:<5}r {row['r']:<3} predicted {row['predicted_us']:8.1f} µs, "
                  f"measured {row['providers']['ours']['us'][1]:8.1f}, {row['predicted_us'] / row['providers']['ours']['us'][1]:.2f}", flush=True)
    if device.startswith("cuda"):
        harness.write(done, path)
    print(f"{len(done)} rows predicted")


def predicted(row: dict, emulator) -> float:
    """Microseconds: the counts of a few rows, carried to all of them; memory by the share of bytes that is more than the least."""
    from benchmarks import profile_kernel
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[row["dtype"]]
    N = min(row["N"], PREDICTED_ROWS)
    limits = row["ceilings"]
    gpu = {"bandwidth": limits["copy"], "l2": profile_kernel.SMALLEST_L2 >> 20, "float32": limits["matmul"].get("float32", 1e9) / 1e3,
           "tensor": limits["matmul"][row["dtype"]] / 1e3}
    counted = profile_kernel.profile(row["op"].removesuffix("_"), N, row["C"], max(row["r"], 1), short, backward=row["pass"] == "backward",
                                     emulator=emulator, gpus={"here": gpu})
    parts, more = counted["predicted_us"]["here"], row["N"] / N
    memory = row["bytes"] * counted["bytes"] / counted["least_bytes"] / limits["copy"] / 1e3
    return max(memory, more * parts["float32"], more * parts["tensor"]) + parts["launch"]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="for everything (default %(default)s); a consumer GPU takes 20")
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu to go through the code")
    parser.add_argument("--suite", action="store_true", help="only run every kernel once, small")
    parser.add_argument("--times", action="store_true", help="only measure")
    parser.add_argument("--predictions", action="store_true", help="only hold the emulator's predictions to what was measured")
    parser.add_argument("--budget", type=float, default=150, help="seconds for --times or --predictions (default %(default)s)")
    options = parser.parse_args(argv)
    if not (options.suite or options.times or options.predictions):
        return everything(options.device, options.minutes)
    from minireft import ops
    if options.device.startswith("cuda") and not ops.backends()["cuda"]:
        raise SystemExit("this needs a GPU and the CUDA kernels: MINIREFT_CUDA=1 python setup.py build_ext --inplace")
    if options.suite:
        suite(options.device)
    if options.times:
        return times(options.device, options.budget)
    if options.predictions:
        predictions(options.device, options.budget)
    return 0


if __name__ == "__main__":
    sys.exit(main())
