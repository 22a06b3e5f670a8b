"""The harness of benchmarks/: it refuses wrong results, impossible times and unwritten memory, and finds what got slower.

Run:  pytest tests/test_bench.py
See:  every provider of every operation computes the same function; the GPU's lines run here on stand-ins for torch.cuda's events.
"""

import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench, gpu, harness, kernels, plot, readme
from benchmarks.kernels import Call, Shape
from minireft import ops

SMALL = {"low_rank_edit": Shape(30, 40, 3), "low_rank_edit_at_": Shape(28, 24, 2), "scale": Shape(30, 40), "gelu_scale": Shape(30, 40),
         "swiglu_scale": Shape(30, 40), "noisy_embedding": Shape(128, 16)}
MANY = {"low_rank_edit_at_": Shape(70, 24, 2, 3), "scale": Shape(70, 24, 0, 3), "gelu_scale": Shape(70, 24, 0, 3)}
CEILINGS = {"copy": 10.0, "matmul": {}, "operations": {"float32": 1e9, "bfloat16": 1e9}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op, shape", [*SMALL.items(), *MANY.items()])
def test_every_provider_computes_the_formula(op, shape, dtype):
    shape = Shape(shape.N, shape.C, shape.r, shape.tasks, dtype)
    for which in kernels.PASSES:
        made = kernels.calls(op, shape, "cpu", 1, compile=False)
        assert {"eager", "ours", "reference"} <= set(made) and ("common" in made) == op.startswith("low_rank")
        kernels.validate(op, shape, made, which)


@pytest.mark.parametrize("wrong", [
    lambda h, D, A, b: h - (h @ D.T + b) @ A,                                               # a sign
    lambda h, D, A, b: h + (h @ D.T) @ A,                                                   # the bias
    lambda h, D, A, b: torch.cat([ops.low_rank_edit(h, D, A, b)[:-1], h[-1:]]),             # the last row
    lambda h, D, A, b: h + ((h.half() @ D.T.half()).float() + b) @ A,                       # half precision inside
    lambda h, D, A, b: torch.empty_like(h),                                                 # nothing written
    lambda h, D, A, b: ops.low_rank_edit(h, D, A, b) * torch.tensor([1.0] * 39 + [float("nan")])])
def test_a_wrong_kernel_is_not_timed(wrong):
    made = kernels.calls("low_rank_edit", SMALL["low_rank_edit"], "cpu", 1, compile=False)
    with pytest.raises(harness.Wrong, match="low_rank_edit forward by ours"):
        kernels.validate("low_rank_edit", SMALL["low_rank_edit"], {**made, "ours": Call(wrong, made["ours"].leaves)}, "forward")


def test_memory_that_nobody_wrote_shows():
    kept = torch.full((1 << 12,), 3.0)

    def forgets_the_tail():
        out = torch.empty(1 << 12)
        out[:-8] = kept[:-8]
        return (out,)
    (out,) = harness.rerun_on_poison(forgets_the_tail)
    assert out[:-8].eq(3).all() and not (out[-8:].abs() < 1e30).any()


def test_bytes_and_operations_are_the_formulas():
    N, C, r = 448, 1024, 8
    bill = kernels.bills("low_rank_edit", Shape(N, C, r))
    assert bill["forward"].bytes(Shape(N, C, r)) == 4 * (2 * N * C + 2 * r * C + r) and bill["forward"].operations == 4 * N * C * r
    assert bill["both"].bytes(Shape(N, C, r)) == 4 * (5 * N * C + 3 * (2 * r * C + r)) and bill["both"].operations == 12 * N * C * r
    half = Shape(N, C, dtype=torch.bfloat16)
    assert [kernels.bills(op, half)["forward"].bytes(half) // (2 * N * C) for op in ("scale", "swiglu_scale")] == [2, 3]
    assert kernels.bills("swiglu_scale", half)["backward"].bytes(half) // (2 * N * C) == 5


def test_more_than_a_ceiling_fails_the_run():
    def share(ours, ceiling, operations=1000, **more):
        found = {"ceiling": {"us": ceiling}, "ours": {"us": ours}, "eager": {"us": [90, 91, 92]}}
        return harness.below_the_ceilings("x", found, operations, 1.0, **more)
    assert share([10, 11, 12], [5, 6, 7]) == pytest.approx(6 / 11, abs=1e-3)
    share([10, 11, 12], [11.5, 12, 12.5])                                 # within the noise
    with pytest.raises(harness.Wrong, match="x by ours: .* impossible"):
        share([10, 11, 12], [12.5, 13, 14])
    with pytest.raises(harness.Wrong, match="x by eager: .* impossible"):
        share([100, 110, 120], [95, 96, 97])
    assert share([10, 11, 12], [12.5, 13, 14], single=False) > 1          # two passes, with what lies in the caches between them
    for single in (True, False):
        with pytest.raises(harness.Wrong, match="GFLOP/s"):
            share([10, 11, 12], [5, 6, 7], 100_000, single=single)


def test_a_row_that_cannot_be_true_takes_no_others_with_it(monkeypatch, capsys, tmp_path):
    def measure(op, shape, which, *rest):
        if which == "backward":
            raise harness.Wrong("scale backward by ours: impossible")
        return {"pass": which}
    for name, replacement in (("measure", measure), ("line", lambda row: row["pass"]), ("Clock", lambda *_: None)):
        monkeypatch.setattr(kernels, name, replacement)
    monkeypatch.setattr(harness, "ceilings", lambda *_: {})
    kept = []
    monkeypatch.setattr(harness, "write", lambda rows, path: kept.extend(rows))
    grid = [("scale", SMALL["scale"], False, False)]
    with pytest.raises(harness.Wrong, match="1 of 3 rows are not reported"):
        kernels.run(grid, kernels.PASSES, "cpu", 0.0, False, tmp_path / "x")
    assert kept == [{"pass": "forward"}, {"pass": "both"}] and "impossible" in capsys.readouterr().out
    assert kernels.run(grid, ["both"], "cpu", 0.0, False, None) == [{"pass": "both"}]


def test_luck_is_allowed_to_few_numbers_only():
    """Plain PyTorch exact, ours off by half a bfloat16's rounding: a bias passes beside bfloat16 rows, a matrix does not."""
    rows = torch.ones(2, 2, dtype=torch.bfloat16)
    for shape, wrong in (((64,), False), ((8, 9), True)):
        exact = torch.ones(shape, dtype=torch.float64)
        got, plain = (exact * (1 + 2 ** -9)).float(), exact.float()
        call = lambda first=rows: harness.check("x", (first, got), (first.double(), exact), (first, plain), (first.double(), exact))
        with pytest.raises(harness.Wrong, match="allowed") if wrong else nullcontext():
            call()
        with pytest.raises(harness.Wrong, match="allowed"):                # float32 throughout: nothing was summed more coarsely
            call(rows.float())


def test_the_stream_moves_what_it_says():
    """Its own peak of results is 0: it writes into memory that is there."""
    for reads, writes, around in ((100, 100, True), (100, 100, False), (200, 100, True), (300, 200, True), (100, 400, False), (1000, 100, True)):
        with harness.Counter() as count:
            run = harness.stream(reads, writes, torch.randn(reads), around)
        made = count.launches
        with harness.Counter() as count:
            run()
        assert made and count.launches <= 3 and count.peak <= 4


@pytest.mark.skipif(not harness.native(), reason="no C++ compiler")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 40, 1000])
def test_the_ceilings_loops_do_all_of_their_work_and_no_more(n, threads):
    """A loop that left out its tail, or half of its additions, would be a ceiling that nothing can reach."""
    numbers = torch.Generator().manual_seed(n)
    a, b = (torch.randint(-2 ** 31, 2 ** 31, (n,), dtype=torch.int32, generator=numbers) for _ in range(2))
    for name, sources, expected in (("clear", (), torch.zeros_like(a)), ("copy", (a,), a), ("sum", (a, b), a + b)):
        out = harness.large_pages(n + 16, torch.int32).fill_(7)
        getattr(harness.native(), name)(*(x.data_ptr() for x in sources), out.data_ptr(), n, threads)
        assert torch.equal(out[:n], expected) and out[n:].eq(7).all(), name
    chains = (j * 0.5 ** n + 2 - 2 * 0.5 ** n for j in range(16))         # x → x / 2 + 1, n times from j on
    assert harness.native().multiply_adds(n) == pytest.approx(sum(chains))


def test_memory_for_the_ceiling_is_in_large_pages():
    """Which Linux gives private memory alone ("sh" is shared), here where it was asked for ("hg")."""
    x = harness.large_pages(1000, torch.bfloat16).fill_(1.0)
    assert x.shape == (1000,) and x.data_ptr() % (2 << 20) == 0
    if sys.platform == "linux":
        areas = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: (.*?)$", Path("/proc/self/smaps").read_text(), re.S | re.M)
        (flags,) = (flags.split() for begin, end, flags in areas if int(begin, 16) <= x.data_ptr() < int(end, 16))
        assert "hg" in flags and "sh" not in flags


def test_launches_and_memory_are_counted():
    x = torch.zeros(100)
    with harness.Counter() as count:
        y = (x + 1).view(10, 10)                                          # the view is none
        z = y * 2
        del y
        z = z.exp()
    assert count.launches == 3 and count.peak == 800 and z.shape == (10, 10)


def test_a_row_names_its_machine_and_its_shape():
    clock = harness.Clock()
    row = kernels.measure("low_rank_edit_at_", SMALL["low_rank_edit_at_"], "both", clock, CEILINGS, 0, compile=False)
    assert all(row[name] for name in ("device", "torch", "compiler", "commit", "date", "backend", "dtype", "op", "bytes", "operations"))
    assert {"ceiling", "common", "eager", "reference", "ours"} == set(row["providers"])
    for name, found in row["providers"].items():
        assert found["us"] == sorted(found["us"]) and found["us"][0] > 0
        assert name == "ceiling" or found["launches"] > 0
    assert row["providers"]["ours"]["launches"] * 5 <= row["providers"]["common"]["launches"]
    assert "of the ceiling" in kernels.line(row)
    cold = kernels.measure("scale", SMALL["scale"], "forward", clock, CEILINGS, 0, cold=True, compile=False)
    assert cold["cache"] == "cold" and harness.key(cold) != harness.key({**cold, "cache": "hot"})
    assert harness.key(cold) == harness.key({**cold, "date": "another", "providers": {}})


def test_both_grids_hold_the_real_shape_and_every_axis():
    star, whole = kernels.star([torch.float32]), kernels.whole([torch.float32], 1 << 29)
    for grid in (star, whole):
        assert any(op == "low_rank_edit_at_" and s.N == 32 * 14 and not s.tasks for op, s, *_ in grid)
        assert {s.tasks for _, s, *_ in grid} >= {0, 1, 4, 16, 64} and {s.r for _, s, *_ in grid} >= {1, 2, 4, 8, 16, 32, 64}
    assert {s.C for _, s, *_ in whole} == {256, 512, 1024, 2048, 4096, 8192} and max(s.N for _, s, *_ in whole) == 65536


def row_of(us, N=64, device="a processor"):
    return {"device": device, "part": "kernels", "N": N, "date": str(us), "providers": {"ours": {"us": us}, "eager": {"us": [u * 9 for u in us]}}}


def test_compare_finds_what_got_slower_and_not_noise(tmp_path, capsys):
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    harness.write([row_of([9, 10, 11]), row_of([9, 10, 11], 128), row_of([9, 10, 11], 256), row_of([99, 100, 101], 512)], before)
    harness.write([row_of([11.5, 12, 12.5]), row_of([10.5, 12, 14], 128), row_of([8, 8.4, 8.8], 256), row_of([103, 104, 105], 512)], after)
    assert bench.main(["--compare", str(before), str(after)]) == 1
    out = capsys.readouterr().out
    assert "×1.20 slower  ours  part kernels N 64" in out and "1 rows got slower" in out and "128" not in out and "512" not in out
    assert bench.main(["--compare", str(after), str(before)]) == 1 and "N 256" in capsys.readouterr().out
    assert bench.main(["--compare", str(before), str(before)]) == 0
    harness.write([row_of([9, 10, 11], device="another")], tmp_path / "other.jsonl")
    assert bench.main(["--compare", str(before), str(tmp_path / "other.jsonl")]) == 2 and "no row in common" in capsys.readouterr().err


def test_the_newest_row_of_a_kind_is_kept(tmp_path):
    harness.write([row_of([1, 2, 3]), row_of([4, 5, 6], 128)], tmp_path / "rows.jsonl")
    harness.write([row_of([7, 8, 9])], tmp_path / "rows.jsonl")
    assert [row["providers"]["ours"]["us"] for row in harness.read(tmp_path / "rows.jsonl")] == [[7, 8, 9], [4, 5, 6]]


def test_providers_take_turns():
    seen = []
    times = harness.Clock().interleaved({name: lambda name=name: (seen.append(name), time.sleep(0)) for name in "abc"}, 0, rounds=20)
    calls = "".join(seen)
    assert all(len(taken) == 20 for taken in times.values())
    assert len({calls[i:i + 2] for i in range(len(calls) - 1)}) >= 8      # every one follows every other
    seen.clear()                                                          # hot: after two calls each to warm up, some that are not timed
    times = harness.Clock().interleaved({name: lambda name=name: (seen.append(name), sum(range(300_000))) for name in "ab"}, 0, cold=False)
    turn = harness.WARM + 1
    assert all(seen.count(name) == 2 + turn * len(taken) for name, taken in times.items())
    assert all(len({*seen[i:i + turn]}) == 1 for i in range(4, len(seen), turn))
    phases = harness.Clock().interleaved({"step": (lambda: None, lambda: sum(range(20000)))}, 0)["step"]
    assert len(phases) == 7 and all(second > first for first, second in phases)


def test_pictures_are_drawn_from_the_results(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("kernels", "training", "generation"):
        (tmp_path / f"{name}.jsonl").write_bytes((harness.RESULTS / f"{name}.jsonl").read_bytes())
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    plot.main()
    assert all((tmp_path / f"{name}.png").stat().st_size > 20_000 for name in ("roofline", "speedup", "step", "tokens"))


def test_an_unknown_program_is_one_line(capsys):
    assert bench.main(["trainings"]) == 2 and "expected one of kernels, training, generation, all" in capsys.readouterr().err


# ---- the GPU's half, without one -------------------------------------------------------------------------------------------


class Event:
    """torch.cuda.Event, on the wall."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class Graph:
    """torch.cuda.CUDAGraph: what is captured runs when it is replayed."""

    replays = 0

    def replay(self):
        Graph.replays += 1
        time.sleep(1e-5)


class StandInClock(harness.Clock):
    """A CUDA clock whose device is the CPU."""

    def __init__(self):
        super().__init__("cpu")
        self.cuda = True


@pytest.fixture
def stand_in(monkeypatch):
    """torch.cuda as far as the harness uses it; the tensors stay on the CPU."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(Event=Event, CUDAGraph=Graph, Stream=lambda: stream, current_stream=lambda: stream, stream=lambda s: nullcontext(),
                            graph=lambda g: nullcontext(), synchronize=lambda: None, memory_allocated=lambda: 0,
                            reset_peak_memory_stats=lambda: None, max_memory_allocated=lambda: 77).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return StandInClock()


@pytest.mark.parametrize("cold", [False, True])
def test_the_lines_of_the_gpu_run(stand_in, cold):
    row = kernels.measure("low_rank_edit", SMALL["low_rank_edit"], "both", stand_in, CEILINGS, 0, cold, compile=False)
    ours = row["providers"]["ours"]
    if cold:                                                              # the profiler is slow, and has seen the hot ones
        assert "launches" not in ours and "graph_us" not in ours
    else:
        assert ours["peak_bytes"] == 77 and ours["launches"] is None and ours["graph_us"][1] >= 1     # nothing ran on a GPU: it says so


def test_a_call_that_cannot_be_captured_leaves_its_cell_empty(stand_in, monkeypatch, capsys):
    @contextmanager
    def refuses(graph):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
    monkeypatch.setattr(torch.cuda, "graph", refuses)
    row = kernels.measure("scale", SMALL["scale"], "forward", stand_in, CEILINGS, 0, compile=False)
    assert "graph_us" not in row["providers"]["ours"] and "not captured in a graph: operation not permitted" in capsys.readouterr().out


def test_the_gpu_s_grid_fits_and_holds_what_must_be_shown():
    rows = gpu.grid(small=False)
    assert all(s.N * s.C <= 1 << 28 for _, s, *_ in rows) and {s.dtype for _, s, *_ in rows} == set(kernels.DTYPES.values())
    assert rows[0][:2] == ("low_rank_edit_at_", Shape(448, 4096, 8, 0, torch.bfloat16))
    assert sum(op == "low_rank_edit" and s.N * s.C >= 32e6 and s.r <= 16 for op, s, *_ in rows) >= 10


def test_a_stage_that_fails_or_takes_too_long_does_not_stop_the_next(monkeypatch, capsys):
    python = sys.executable
    monkeypatch.setattr(gpu, "stages", lambda device, minutes: [
        ("good", 20, [python, "-c", ""], {}), ("bad", 20, [python, "-c", "import sys; sys.exit(3)"], {}),
        ("slow", 0.2, [python, "-c", "import time; time.sleep(9)"], {"A": "1"})])
    real = gpu.stage
    monkeypatch.setattr(gpu, "stage", lambda name, *what: real(name, *what) if name in ("good", "bad", "slow") else "ok, 0 s")
    assert gpu.everything("cpu", 1) == 1
    out = capsys.readouterr().out
    assert "FAILED with status 3" in out and "STOPPED after its 0 s" in out and "memcheck            NOT RUN" in out


def test_a_row_that_fails_is_tried_without_the_others_and_stops_nothing(capsys):
    tried = []

    def measure(**how):
        tried.append(how)
        if len(tried) == 1:
            raise harness.Wrong("scale by ours: error 1, allowed 0")
        return {"row": 1}
    assert gpu.attempt(measure, True) == {"row": 1} and [how["compile"] for how in tried] == [True, False]
    assert gpu.attempt(lambda **how: 1 / 0, False) is None
    assert "Wrong: scale by ours" in capsys.readouterr().out


@pytest.mark.slow
def test_make_gpu_goes_through_its_stages_without_a_gpu_and_without_other_libraries(tmp_path):
    """In a Python where only what `make gpu` names can be imported."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('tqdm', 'matplotlib', 'transformers', 'peft', 'jupytext', 'xdist', 'pytest_timeout', 'triton'):\n"
        "    sys.modules[name] = None\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, str(gpu.__file__), "--device", "cpu", "--minutes", "6"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr               # the checkers did not run
    for name in ("build", "property tests", "every kernel once", "times", "predictions"):
        assert f"    {name:20}ok" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("NOT RUN") == 4


def test_triton_is_left_out_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "triton" not in kernels.calls("scale", SMALL["scale"], "cpu", 1, compile=False)


@pytest.mark.peers
def test_triton_s_kernels_in_its_interpreter():
    """Which cannot multiply bfloat16."""
    pytest.importorskip("triton")
    code = """
import torch
from benchmarks import kernels
from benchmarks.kernels import Shape
for dtype in (torch.float32, torch.float16):
    for op, shape in (("low_rank_edit", Shape(37, 100, 3, 0, dtype)), ("low_rank_edit", Shape(33, 136, 20, 0, dtype)),
                      ("low_rank_edit_at_", Shape(42, 72, 8, 0, dtype)), ("scale", Shape(50, 100, 0, 0, dtype))):
        for which in kernels.PASSES:
            made = kernels.calls(op, shape, "cpu", 1, compile=False)
            kernels.validate(op, shape, {name: made[name] for name in ("eager", "reference", "triton")}, which)
print("agreed")
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.stdout.endswith("agreed\n"), done.stderr


def test_the_gpu_s_table_is_made_of_its_rows(stand_in):
    assert "never run" in readme.gpu_table([]) and readme.gpu_table([]).count("|  |  |  |  |  |") == 6
    rows = [kernels.measure("scale", Shape(64, 32, dtype=torch.bfloat16), which, stand_in, {"copy": 10.0, "operations": {"bfloat16": 1e9}}, 0, True, False)
            for which in kernels.PASSES]
    table = readme.gpu_table([{**row, "N": 16384, "C": 4096} for row in rows])
    (line,) = (line for line in table.splitlines() if line.startswith("| `scale`"))
    assert len(re.findall(r"\d+%", line)) == 2 and "never run" not in table and "Measured" in table
