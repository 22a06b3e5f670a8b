"""How everything in benchmarks/ is timed, checked, written down and compared: kernels, training steps, generation, CPU and GPU.
Use: clock = Clock("cpu"); times = clock.interleaved({"eager": f, "ours": g}, seconds=1); write(rows, RESULTS / "kernels.jsonl")
You should see medians with 20th and 80th percentiles, and an error, not a table, where a result is wrong or too good to be true.

CPU     one thread: processor time, so that what others do on the machine does not count; all threads: time on the wall.
        Providers take turns, in a new order each round, so that a machine that slows down slows them alike. Cold: other memory
        was written in between; hot: the same was called just before, as often and at least eight times: a last-level cache
        keeps nothing new at once (at 16 MB the first call after others took twice as long as the sixth).
CUDA    events; cold with other memory written in between, hot without; `graph` replays a captured graph, without launch gaps.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import mmap
import os
import platform
import random
import subprocess
import tempfile
import time
import weakref
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minireft import files, ops
from minireft.demo import processor

RESULTS = Path(__file__).parent / "results"
QUANTILES = (0.2, 0.5, 0.8)
GRAPH_CALLS = 10                        # in one captured graph
WARM = 8                                # calls before a hot one on a CPU, at least
FEW = 64                                # numbers of a gradient, such as a bias's: among more, luck evens out
MEASURED = {"device", "torch", "compiler", "commit", "date", "backend", "rounds", "providers", "ceilings", "bytes", "operations", "share", "versions",
            "predicted_us"}             # of a row: what was found; all else says what was asked


class Wrong(SystemExit):
    """A result that is not what it should be: nothing is reported."""


# ---- time ------------------------------------------------------------------------------------------------------------


class Clock:
    """Times calls on one device, with a number of CPU threads."""

    def __init__(self, device: str = "cpu", threads: int = 1):
        self.device, self.cuda = torch.device(device), device.startswith("cuda")
        torch.set_num_threads(threads)
        self.now = time.process_time if threads == 1 else time.perf_counter

    def seconds(self, run, repeats: int = 1) -> float:
        """Of one call, over `repeats` of them."""
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / repeats
        began = self.now()
        for _ in range(repeats):
            run()
        return (self.now() - began) / repeats

    def flush(self) -> None:
        """Writes memory of several times the last cache, so that nothing else is left in it."""
        other_memory(str(self.device)).add_(1.0)

    def interleaved(self, providers: dict, seconds: float, cold: bool | None = None, rounds: int = 7) -> dict:
        """{name: seconds of one call in every round}; a provider is a function, or a tuple of them, the phases of one call,
        whose times stand side by side: (rounds, phases). cold: what a call meets in the caches is other memory; False, hot:
        its own, as far as it fits, by calls that are not timed; None: whatever the others left."""
        phases = {name: run if isinstance(run, tuple) else (run,) for name, run in providers.items()}
        repeats = {}
        for name, runs in phases.items():                                 # warm-up: compilation, first allocations, page faults
            for _ in range(2):
                once = [self.seconds(run) for run in runs]
            repeats[name] = 1 if cold or len(runs) > 1 else max(1, min(1000, int(1e-3 / max(sum(once), 1e-6))))
        times, began, order = {name: [] for name in providers}, time.perf_counter(), random.Random(0)
        while len(next(iter(times.values()))) < rounds or time.perf_counter() - began < seconds:
            for name in order.sample([*phases], len(phases)):             # nobody always follows the same other
                if cold:
                    self.flush()
                elif cold is not None:
                    for _ in range(1 if self.cuda else -(-WARM // repeats[name])):
                        for run in phases[name]:
                            self.seconds(run, repeats[name])
                times[name].append([self.seconds(run, repeats[name]) for run in phases[name]])
        return {name: taken if isinstance(providers[name], tuple) else [t for t, in taken] for name, taken in times.items()}

    def graph(self, run):
        """A function that replays `run` GRAPH_CALLS times from a captured graph; None where it cannot be captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):                               # what a first call sets up must not be captured
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(GRAPH_CALLS):
                    run()
        except RuntimeError as error:
            print(f"not captured in a graph: {str(error).splitlines()[0]}")
            return None
        return graph.replay


@lru_cache(maxsize=1)
def other_memory(device: str) -> torch.Tensor:
    """Three times an L3 of 32 MB on a CPU, at least four times the L2 on a GPU."""
    size = 24 << 20 if device == "cpu" else max(64 << 20, torch.cuda.get_device_properties(device).L2_cache_size)
    return torch.ones(size, device=device)                                # float32


def percentiles(times, digits: int = 3, unit: float = 1e6) -> list[float]:
    """20th, 50th and 80th, in microseconds unless `unit` says otherwise."""
    found = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64))
    return [round(unit * x, digits) for x in found.tolist()]


def ratios(times, floor) -> list[float]:
    """Percentiles of a provider's times over the floor's, round by round."""
    return percentiles([a / b for a, b in zip(times, floor)], unit=1)


# ---- ceilings --------------------------------------------------------------------------------------------------------


NATIVE = """
#if defined(__AVX__)
#include <immintrin.h>
#endif
#include <algorithm>
#include <omp.h>

template <class Piece> void share(long n, int threads, Piece piece) {          // piece(first, last), each at a cache line, by so many threads
  const long step = (n / threads + 15) / 16 * 16;
#pragma omp parallel num_threads(threads)      // which stay awake between calls, as torch's own do: to start one takes longer than many a row
  {
    const long t = omp_get_thread_num();
    piece(std::min(n, t * step), t + 1 < threads ? std::min(n, (t + 1) * step) : n);
  }
}

extern "C" float multiply_adds(long n) {          // n × 16 independent chains × 16 lanes, in registers
  typedef float lanes __attribute__((vector_size(64)));
  lanes a[16] = {}, b = {}, c = {};
  b += 0.5f, c += 1.0f;
  for (int j = 0; j < 16; j++) a[j] += float(j);
  for (long i = 0; i < n; i++)
    for (int j = 0; j < 16; j++) a[j] = a[j] * b + c;
  for (int j = 1; j < 16; j++) a[0] += a[j];
  return a[0][0];
}

extern "C" void clear(float* p, long n, int threads) {      // past the caches, where the processor can; p at a cache line
  share(n, threads, [=](long i, long end) {
#if defined(__AVX512F__)
    for (; i + 16 <= end; i += 16) _mm512_stream_ps(p + i, _mm512_setzero_ps());
    _mm_sfence();
#elif defined(__AVX__)
    for (; i + 8 <= end; i += 8) _mm256_stream_ps(p + i, _mm256_setzero_ps());
    _mm_sfence();
#endif
    for (; i < end; i++) p[i] = 0;
  });
}

extern "C" void copy(const int* c, int* p, long n, int threads) {
  share(n, threads, [=](long i, long end) {
#if defined(__AVX512F__)
    for (; i + 16 <= end; i += 16) _mm512_stream_si512((__m512i*)(p + i), _mm512_loadu_si512(c + i));
    _mm_sfence();
#endif
    for (; i < end; i++) p[i] = c[i];
  });
}

extern "C" void sum(const int* a, const int* b, int* p, long n, int threads) {      // the same way; bits are bits
  share(n, threads, [=](long i, long end) {
#if defined(__AVX512F__)
    for (; i + 16 <= end; i += 16) _mm512_stream_si512((__m512i*)(p + i), _mm512_add_epi32(_mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i)));
    _mm_sfence();
#endif
    for (; i < end; i++) p[i] = a[i] + b[i];
  });
}
"""


@lru_cache
def native() -> ctypes.CDLL | None:
    """The functions above; None without a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder, "native.cpp"), Path(folder, "native.so")
        source.write_text(NATIVE)
        try:
            subprocess.run([os.environ.get("CXX", "g++"), "-O3", "-march=native", "-shared", "-fPIC", "-fopenmp", str(source), "-o", str(path)], check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        library = ctypes.CDLL(str(path))
    library.multiply_adds.argtypes, library.multiply_adds.restype = [ctypes.c_long], ctypes.c_float
    library.clear.argtypes, library.clear.restype = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int], None
    library.copy.argtypes, library.copy.restype = [ctypes.c_void_p] * 2 + [ctypes.c_long, ctypes.c_int], None
    library.sum.argtypes, library.sum.restype = [ctypes.c_void_p] * 3 + [ctypes.c_long, ctypes.c_int], None
    return library


def ceilings(clock: Clock, dtypes) -> dict:
    """What this machine can do, measured: {"copy": GB/s of a large copy, read and written, "matmul": {dtype: GFLOP/s of a large
    matrix product}, "operations": {dtype: GFLOP/s}}, the last no less than float32 multiply-adds in a CPU's registers: BLAS
    does not reach them on every processor."""
    x = torch.randn(32 << 20 if not clock.cuda else 256 << 20, device=clock.device)
    y = torch.empty_like(x)
    copy = clock.interleaved({"copy": lambda: y.copy_(x)}, seconds=0.3)["copy"]
    rates, n = {}, 8192 if clock.cuda else 1024
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
        product = clock.interleaved({"matmul": lambda: a @ b}, seconds=0.3)["matmul"]
        rates[str(dtype).removeprefix("torch.")] = round(2 * n ** 3 / min(product) / 1e9, 1)
    registers = 0.0 if clock.cuda else multiply_adds(clock) * torch.get_num_threads()
    return {"copy": round(2 * x.nbytes / min(copy) / 1e9, 2), "matmul": rates,
            "operations": {dtype: round(max(rate, registers), 1) for dtype, rate in rates.items()}}


def multiply_adds(clock: Clock, n: int = 100_000) -> float:
    """GFLOP/s of one thread in registers; 0 without a compiler."""
    if not native():
        return 0.0
    return 2 * 256 * n / min(clock.interleaved({"run": lambda: native().multiply_adds(n)}, seconds=0.1)["run"]) / 1e9


def large_pages(n: int, dtype: torch.dtype) -> torch.Tensor:
    """n elements in pages of 2 MiB, where the system has them, as the kernels' own results are."""
    size, page = n * dtype.itemsize, 2 << 20
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(n, dtype=dtype)
    memory = mmap.mmap(-1, size + 2 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)      # shared memory gets no large pages
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % page                                      # where a large page begins
    return whole[begin:begin + size].view(dtype)


def clear(x: torch.Tensor, around_cache: bool) -> None:
    """Writes zeros, which an embedding's gradient mostly is (a Zen 5 writes them to memory twice as fast as other numbers), and no
    more; torch's own zero_ goes through the cache, which reads memory before it is written."""
    if around_cache and x.device.type == "cpu" and native():
        native().clear(x.data_ptr(), x.nbytes // 4, torch.get_num_threads())
    else:
        x.zero_()


def stream(reads: int, writes: int, source: torch.Tensor, around_cache: bool):
    """A function that reads the first of a flat source's elements, writes so many, and does no more: the ceiling of whatever must
    move as many.

    Sums of two where more is read than written, copies, and zeros where more is written than read; into memory that is there.
    All go around the cache (as memcpy does with large ones) or through it: which is faster depends on the size.
    """
    sums = min(max(0, reads - writes), writes)
    copies = min(writes - sums, reads - 2 * sums)
    zeros, rest = writes - sums - copies, max(0, reads - 2 * sums - copies)
    a, b, c, d = source[:reads].split([sums, sums, copies, rest])
    empty = large_pages if source.device.type == "cpu" else partial(torch.empty, device=source.device)
    x, y, z = (empty(max(n, 1), dtype=source.dtype)[:n] for n in (sums, copies, zeros))

    past = native() if around_cache and x.device.type == "cpu" else None

    def run():
        if sums and past:
            past.sum(a.data_ptr(), b.data_ptr(), x.data_ptr(), x.nbytes // 4, torch.get_num_threads())
        elif sums:
            torch.add(a, b, out=x)
        if copies and past:
            past.copy(c.data_ptr(), y.data_ptr(), y.nbytes // 4, torch.get_num_threads())
        elif copies and around_cache:
            y.copy_(c)
        elif copies:
            torch.neg(c, out=y)
        if zeros:
            clear(z, around_cache)
        if rest:
            d.sum()
    return run


def below_the_ceilings(what: str, found: dict, operations: int, rate: float, single: bool = True) -> float:
    """The share of the streaming ceiling that ours reached. More than all of it by any provider, or than the rate of arithmetic
    (GFLOP/s), is an error of the benchmark: the median is beyond it, and the noise (20th to 80th percentile) does not reach it. Of
    two passes, not a single one, memory sets no bound: what the first leaves in the caches the second need not read."""
    ceiling = found["ceiling"]["us"]
    for name, times in ((name, cell["us"]) for name, cell in found.items() if name != "ceiling"):
        if single and times[2] < ceiling[0]:
            raise Wrong(f"{what} by {name}: {ceiling[1] / times[1]:.0%} of what memory can do is impossible ({times} µs against {ceiling}): not reported")
        if operations / times[1] / 1e3 > rate:
            raise Wrong(f"{what} by {name}: {operations / times[1] / 1e3:.0f} GFLOP/s, where this machine reaches {rate:.0f}: not reported")
    return round(ceiling[1] / found["ours"]["us"][1], 3)


# ---- right results ---------------------------------------------------------------------------------------------------


def rerun_on_poison(run) -> tuple[torch.Tensor, ...]:
    """The results of a second run in poisoned memory, so that what is not written shows. `run` draws or copies its own inputs.

    Pools (a GPU's allocator, the kernels' own on the CPU) hand out again what the first run's results held: that is NaN by
    then. What glibc's malloc hands out is −1.7e38 meanwhile (M_PERTURB).
    """
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    results = run()
    for i in range(len(results)):
        results[i].detach().fill_(float("nan"))
    del results
    if libc:
        libc.mallopt(-6, 1)
    try:
        return run()
    finally:
        if libc:
            libc.mallopt(-6, 0)


def check(what: str, got, exact, plain, terms) -> None:
    """Finite, and at most twice the error of plain PyTorch in that dtype against float64, or one rounding: of the result to its
    dtype, and of float32 at the size of the terms summed (the formula on absolute values). Of a float32 gradient of few numbers,
    which plain PyTorch sums in the activations' dtype and may have exact by luck, one rounding to that. Tuples of tensors."""
    coarsest = max(torch.finfo(mine.dtype).eps for mine in got)
    for mine, right, theirs, term in zip(got, exact, plain, terms):
        if not mine.isfinite().all():
            raise Wrong(f"{what}: a result is not finite, or was not written: not timed")
        eps = coarsest if mine.numel() <= FEW else torch.finfo(mine.dtype).eps
        rounding = eps * right.norm() + torch.finfo(torch.float32).eps * term.norm()
        error, budget = (mine.double() - right).norm(), 2 * (theirs.double() - right).norm() + rounding
        if not error <= budget:
            raise Wrong(f"{what}: error {error:.3g}, allowed {budget:.3g}: not timed")


# ---- launches and memory -----------------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Counts on the CPU what a GPU would launch: operations that PyTorch dispatches, but for views and bare allocations; and
    the most bytes of results alive at a time."""

    def __init__(self):
        super().__init__()
        self.launches = self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen |= {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        self.launches += not (func.is_view or "empty" in func.__name__ or func.__name__.startswith(("detach", "_unsafe_view")))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in self.seen:
                self.seen.add(key)
                self.now += t.untyped_storage().nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(t.untyped_storage(), self.freed, key, t.untyped_storage().nbytes())
        return out

    def freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def footprint(clock: Clock, run) -> dict:
    """{"launches": of one call, "peak_bytes": above what was there before}: kernels and the allocator's count on CUDA; on the CPU
    dispatched operations and their results (see Counter). launches is None where the profiler sees nothing."""
    if not clock.cuda:
        with Counter() as count:
            kept = run()
        del kept
        return {"launches": count.launches, "peak_bytes": count.peak}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return {"launches": sum(event.device_type == device for event in seen.events()) or None, "peak_bytes": peak}


# ---- rows --------------------------------------------------------------------------------------------------------------


@lru_cache
def machine(device: str = "cpu") -> dict:
    """Which machine, PyTorch, compiler, commit, day."""
    if device.startswith("cuda"):
        name, compiler = torch.cuda.get_device_properties(0).name, said(os.environ.get("CUDACXX", "nvcc"), "--version", line=-2)
    else:
        name, compiler = processor(), said(os.environ.get("CXX", "g++"), "--version")
    backend = device.split(":")[0]
    return {"device": name, "torch": torch.__version__, "compiler": compiler, "date": datetime.date.today().isoformat(),
            "commit": said("git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"),
            "backend": backend if ops.backends()[backend] else "reference"}


def said(*command: str, line: int = 0) -> str:
    """A line of what a command prints, or nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()[line]
    except (OSError, IndexError):
        return ""


def key(row: dict) -> str:
    """What a row is about: two rows of one key measured the same, at two times."""
    return json.dumps([row["device"], *sorted((name, value) for name, value in row.items() if name not in MEASURED)])


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(rows: list[dict], path) -> None:
    """Adds rows to a file of JSON lines; one that measured the same on the same device before goes."""
    path = Path(path)
    kept = {key(row): row for row in [*(read(path) if path.exists() else []), *rows]}
    path.parent.mkdir(exist_ok=True)
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept.values()))


def slower(before: list[dict], after: list[dict], least: float = 0.05) -> list[tuple[float, str, str]]:
    """[(times slower, provider, what)] of ours that got slower beyond noise, worst first: the median by more than `least`, and
    by more than the two spreads (20th to 80th percentile) reach. ValueError where nothing was measured in both."""
    was, found, common = {key(row): row for row in before}, [], 0
    for row in after:
        for name, now in row["providers"].items() if (old := was.get(key(row))) else ():
            if name in old["providers"] and not name.startswith(("ceiling", "eager", "common", "compile", "floor")):
                common += 1
                (_, a, a_high), (b_low, b, _) = old["providers"][name]["us"], now["us"]
                if b > (1 + least) * a and b_low > a_high:
                    about = " ".join(f"{k} {v}" for k, v in row.items() if k not in MEASURED)
                    found.append((b / a, name, about))
    if not common:
        raise ValueError("the two files have no row in common: same device, same shapes?")
    return sorted(found, reverse=True)
