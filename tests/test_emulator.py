"""The CUDA kernels in the emulator: right in every order of threads, cheap by count; and what the emulator finds.
Run: pytest -m emulator
You should see each kernel agree with minireft.reference and move close to the least possible bytes, without a GPU.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulator_suite
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.emulator import Emulator, build  # noqa: E402
from benchmarks.profile_kernel import KERNELS, main, profile  # noqa: E402

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler here"),
]


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    return Emulator()


@pytest.mark.parametrize("name", emulator_suite.CHECKS)
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_kernels_are_right_in_every_order_of_threads(emulator, name, order):
    emulator_suite.run(emulator, name, order, seed=7)


# ---- what the kernels cost -----------------------------------------------------------------------------------------

# At least a million elements, with an L2 of 3 MB; what D, A and the sums take of it, test_what_fills_l2 looks at.
SHAPES = [
    dict(N=256, C=4096, r=4, dtype="bf16"),
    dict(N=448, C=4096, r=8, dtype="bf16"),
    dict(N=448, C=4096, r=8, dtype="bf16", weights="bf16"),
    dict(N=1366, C=768, r=8, dtype="fp32"),
    dict(N=1024, C=1024, r=16, dtype="fp16"),
    dict(N=1024, C=1024, r=32, dtype="bf16", weights="bf16"),
]
EDITS = [
    (kernel, shape, backward)
    for kernel, shape, backward in itertools.product(["low_rank_edit", "low_rank_edit_at"], SHAPES, [False, True])
    if kernel == "low_rank_edit" or shape["r"] == 8
]
MORE = [
    ("low_rank_edit_at", dict(N=1022, C=1024, r=16, dtype="bf16", tasks=4), False),
    ("low_rank_edit_at", dict(N=1022, C=1024, r=16, dtype="bf16", tasks=4), True),
    ("low_rank_edit_at", dict(N=1022, C=1024, r=17, dtype="fp32", tasks=4), True),
    ("low_rank_edit", dict(N=1366, C=768, r=5, dtype="fp32"), True),
    ("low_rank_edit", dict(N=4096, C=256, r=64, dtype="bf16"), True),
    # Rows of u and δ that begin anywhere in a sector, long beside the rows of x
    ("low_rank_edit", dict(N=4096, C=256, r=33, dtype="bf16"), False),
    ("low_rank_edit", dict(N=4096, C=256, r=33, dtype="bf16"), True),
    ("low_rank_edit", dict(N=1024, C=1024, r=12, dtype="fp32"), True),
    ("low_rank_edit", dict(N=1024, C=1024, r=17, dtype="fp32"), True),
    # Where D, A and the sums take much of L2
    ("low_rank_edit", dict(N=1024, C=1024, r=64, weights="bf16"), True),
    ("low_rank_edit", dict(N=128, C=8192, r=8), True),
    ("low_rank_edit", dict(N=128, C=8192, r=32), False),
    ("low_rank_edit", dict(N=256, C=4096, r=32), True),
    ("low_rank_edit", dict(N=256, C=4096, r=17, dtype="fp32"), True),
]
OTHERS = [
    (kernel, shape, backward)
    for kernel, shape, backward in itertools.product(KERNELS, SHAPES[::3], [False, True])
    if "edit" not in kernel
]


@pytest.mark.parametrize("kernel, shape, backward", EDITS + MORE + OTHERS, ids=str)
def test_kernels_move_close_to_the_least_bytes_in_full_sectors_without_conflicts(emulator, kernel, shape, backward):
    found = profile(kernel, **shape, backward=backward, emulator=emulator, gpus={}, V=2000)
    assert found["bytes"] <= (1.10 if backward else 1.05) * found["least_bytes"]
    assert found["bytes"] >= 0.99 * found["least_bytes"], "fewer bytes than possible: the count is wrong"
    assert found["coalescing"] >= 0.99
    assert found["bank_conflicts"] == 0


@pytest.mark.parametrize("N, C, r, dtype", [(256, 4096, 64, "bf16"), (512, 4096, 32, "bf16"), (128, 8192, 17, "fp32")])
def test_what_fills_l2_leaves_the_rest_of_g_to_be_read_twice(emulator, N, C, r, dtype):
    """From one chunk of rows to the next D, A and both sums stay in L2: here this leaves less than half of it to g. Then
    edit_rows and sum_products take all rows in one launch each, and what D, A and g need beyond 3 MB is moved twice; the
    alternative, chunks of 0.5 MB or none that fit at all, would cost two launches each, as much time as reading 2 MB."""
    found = profile("low_rank_edit", N, C, r, dtype, backward=True, emulator=emulator, gpus={})
    g, weights, l2 = N * C * (4 if dtype == "fp32" else 2), 2 * r * C * 4, 3 << 20
    assert 2 * weights > l2 * 3 / 8
    assert found["bytes"] <= 1.03 * (found["least_bytes"] + g + weights - l2)
    assert found["launches"] == 2


@pytest.mark.parametrize("r, reads, mma", [(8, 4, False), (16, 1, True)])
def test_a_sequence_reads_its_bank_once_for_a_tile_of_rows(emulator, r, reads, mma):
    """Four sequences of 14 positions, each with its own bank: tiles of 4 rows, or one of 16 on the tensor cores."""
    found = profile("low_rank_edit_at", N=56, C=512, r=r, tasks=4, emulator=emulator, gpus={})
    rows, banks = 56 * 512 * 2, 4 * 2 * r * 512 * 4
    assert reads * banks + 4 * rows <= found["l2_bytes"] <= 1.1 * (reads * banks + 4 * rows)  # x twice, its copy, out
    assert (found["mma"] > 0) == mma and (found["fma"] > 0) != mma


def test_counts_are_the_same_on_every_run(emulator):
    first, second = (profile("low_rank_edit_at", N=56, C=512, r=16, backward=True, emulator=emulator) for _ in range(2))
    assert {k: v for k, v in first.items() if k != "kernels"} == {k: v for k, v in second.items() if k != "kernels"}
    assert first["mma"] > 0 and first["shuffles"] > 0 and first["barriers_per_block"] > 0


def test_a_byte_is_counted_for_each_byte_of_a_simple_kernel(emulator):
    """l ⊙ x on 64 rows of 256 bf16: known by hand.  8 warps read l (256 floats); x is read, out written."""
    found = profile("scale", N=64, C=256, dtype="bf16", emulator=emulator)
    assert found["bytes"] == found["least_bytes"] == 2 * 64 * 256 * 2 + 256 * 4
    assert found["l2_bytes"] == 2 * 64 * 256 * 2 + 8 * 256 * 4
    assert found["launches"] == 1 and found["blocks"] == 1 and found["barriers"] == 0


def test_profile_prints_a_table_json_and_the_source(capsys):
    main(["scale", "--N", "64", "--C", "256", "--backward"])
    assert "predicted, not measured" in capsys.readouterr().out
    main(["scale", "--N", "64", "--C", "256", "--json"])
    assert {"bytes", "l2_bytes", "least_bytes", "coalescing", "bank_conflicts", "predicted_us"} <= json.loads(
        capsys.readouterr().out
    ).keys()
    main(["scale", "--N", "64", "--C", "256", "--source"])
    assert "store(pointer<V, T>(a, job.out, n, t.c), narrow<T>(y));" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["scale", "--tasks", "2"])
    assert "for low_rank_edit_at; got 2 for scale" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["scale", "--dtype", "bf16", "--weights", "fp16"])
    assert "must be fp32 or bf16" in capsys.readouterr().err


# ---- what the emulator finds, in kernels written wrong on purpose ---------------------------------------------------

WRONG = r"""
#include <cstdio>
#include <cstdlib>
#include "../csrc/cuda/common.cuh"
using namespace minireft::emulated;

__global__ void half_of_the_block(float* out) { if (threadIdx.x < 32) __syncthreads(); store(out + threadIdx.x, 1.0f); }
__global__ void two_places(float* out) {
  if (threadIdx.x < 32) { __syncthreads(); } else {
    __syncthreads(); }
  store(out + threadIdx.x, 1.0f);
}
__global__ void half_of_the_warp(float* out) {
  float x = 1;
  if (threadIdx.x % 32 < 16) x = __shfl_xor_sync(ALL, x, 1);
  store(out + threadIdx.x, x);
}
__global__ void misaligned(float* out) { store(out + 1, Pack<4, float>{}); }
__global__ void never_written(float* out) { SHARED(float, s, 64); store(out + threadIdx.x, load(s + threadIdx.x)); }
__global__ void no_barrier(float* out) {
  SHARED(float, s, 64);
  store(s + threadIdx.x, float(threadIdx.x));
  store(out + threadIdx.x, load(s + (threadIdx.x + 1) % 64));
}
__global__ void two_way_conflict(float* out) {
  SHARED(float, s, 128);
  store(s + threadIdx.x * 2, 1.0f);
  store(out + threadIdx.x, 1.0f);
}
__global__ void sums(float* out) {
  float v[4];
  for (int i = 0; i < 4; i++) v[i] = i + 4.0f * (threadIdx.x % 32);
  scatter_sum<4, 16, 1>(v);
  store(out + threadIdx.x, v[0]);
}
__global__ void stores_leave_first(float* out) {  // a sector is 8 floats
  if (blockIdx.x > 0 || threadIdx.x > 0) return;
  load(out), load(out + 8);
  for (int i = 2; i < 8; i++) store_last<1, float>(out + 8 * i, {{1.0f}});
  load(out), load(out + 8);
}
__global__ void loads_leave_first(float* out) {
  if (blockIdx.x > 0 || threadIdx.x > 0) return;
  for (int i = 0; i < 4; i++) load(out + 8 * i);
  load_last<1>(out + 24);
  load(out + 32), load(out);
}
__global__ void past_the_end(float* out) { store(out + threadIdx.x + 1, 1.0f); }

int main(int count, char** name) {
  float* out = (float*)aligned_alloc(64, 256);
  const char* wrong = nullptr;
  if (count != 2) return 2;
#define RUN(kernel) if (!strcmp(name[1], #kernel)) wrong = LAUNCH(kernel, dim3(2), 64, 0, nullptr, out)
  minireft::emulator::counting = true;
  RUN(half_of_the_block); RUN(two_places); RUN(half_of_the_warp); RUN(misaligned); RUN(never_written); RUN(no_barrier);
  RUN(two_way_conflict); RUN(sums); RUN(past_the_end);
  minireft::emulator::l2.capacity = 4 * minireft::emulator::SECTOR;
  RUN(stores_leave_first); RUN(loads_leave_first);
  printf("%s\n%s\n", wrong ? wrong : "fine", minireft::emulator::report().c_str());
  for (int i = 0; i < 64 && !wrong; i++) printf("%g ", out[i]);
}
"""


@pytest.fixture(scope="session")
def wrong_kernels(tmp_path_factory):
    """A function that runs one of the kernels above in an order of threads: what it prints, and its return code."""
    folder = tmp_path_factory.mktemp("wrong")
    source = folder / "wrong.cpp"
    source.write_text(WRONG.replace("../csrc", str(ROOT / "csrc")))
    compiler = os.environ.get("CXX", "g++")
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O1",
            "-g",
            "-DMINIREFT_EMULATOR",
            "-fsanitize=address",
            str(source),
            "-o",
            str(folder / "wrong"),
        ],
        check=True,
    )

    def run(kernel: str, order: str = "forward"):
        environment = {
            **os.environ,
            "MINIREFT_EMULATOR_ORDER": order,
            "ASAN_OPTIONS": "detect_leaks=0",
        }  # stopped fibers leave strings
        return subprocess.run([folder / "wrong", kernel], env=environment, capture_output=True, text=True)

    return run


def test_divergent_barriers_are_reported_with_block_thread_and_line(wrong_kernels):
    for kernel in ("half_of_the_block", "two_places"):
        said = wrong_kernels(kernel).stdout
        assert (
            "divergent barrier" in said and "of block (0, 0, 0)" in said and "thread " in said and "wrong.cpp:" in said
        ), said
    said = wrong_kernels("half_of_the_warp").stdout
    assert "waits at a shuffle" in said and "never reaches" in said, said


def test_a_misaligned_access_is_reported(wrong_kernels):
    said = wrong_kernels("misaligned").stdout
    assert "misaligned access of 16 bytes" in said and "thread 0 of block (0, 0, 0)" in said, said


def test_shared_memory_starts_as_nan(wrong_kernels):
    assert wrong_kernels("never_written").stdout.splitlines()[-1].replace("-", "").split() == ["nan"] * 64


def test_a_missing_barrier_shows_in_some_order_of_threads(wrong_kernels):
    right = " ".join(str((i + 1) % 64) for i in range(64))
    found = {
        order: wrong_kernels("no_barrier", order).stdout.splitlines()[-1].strip()
        for order in ("forward", "reverse", "random")
    }
    assert any(line != right for line in found.values()), found


def test_bank_conflicts_are_counted(wrong_kernels):
    counts = json.loads(wrong_kernels("two_way_conflict").stdout.splitlines()[1])["kernels"][0]
    assert sum(s["conflicts"] for s in counts["sites"]) == 2 * 2  # one a warp, two warps, two blocks


@pytest.mark.parametrize("kernel, sectors", [("stores_leave_first", 2 + 6), ("loads_leave_first", 5)])
def test_what_is_touched_for_the_last_time_leaves_l2_first(wrong_kernels, kernel, sectors):
    """An L2 of four sectors: what is read again is still there, so nothing is moved twice."""
    assert json.loads(wrong_kernels(kernel).stdout.splitlines()[1])["bytes"] == 32 * sectors


def test_scatter_sum_leaves_each_lane_the_sum_at_its_place(wrong_kernels):
    values = [float(x) for x in wrong_kernels("sums", "random").stdout.splitlines()[-1].split()]
    assert values[:32] == [sum(i + 4.0 * lane for lane in range(32)) for i in (0, 1, 2, 3) for _ in range(8)]


def test_an_access_past_the_end_is_found_with_its_line_block_and_thread(wrong_kernels):
    done = wrong_kernels("past_the_end")
    line = next(n for n, text in enumerate(WRONG.splitlines(), 1) if "void past_the_end" in text)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and f"wrong.cpp:{line}" in done.stderr, done.stderr
    assert "thread 63 of block (0, 0, 0)" in done.stderr, done.stderr


@pytest.mark.slow
def test_no_kernel_leaves_its_memory(tmp_path):
    """The whole suite with AddressSanitizer watching every access."""
    library = build(flags="-O1 -fsanitize=address")
    runtime = subprocess.run(
        [os.environ.get("CXX", "g++"), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nimport emulator_suite\n"
        f"from benchmarks.emulator import Emulator\n"
        f"emulator = Emulator({str(library)!r})\nfor order in ('forward', 'random'): "
        f"emulator_suite.run(emulator, '', order)\nprint('fine')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0"},
    )
    assert done.returncode == 0 and "fine" in done.stdout, done.stderr[-4000:]


def test_the_package_has_the_same_kernels_as_a_backend():
    from minireft import ops

    if not ops.backends()["emulator"]:
        pytest.skip("the package is not built with the emulator: python setup.py build_ext --inplace")
    h, D, A, b = torch.randn(2, 3, 64), torch.randn(4, 64), torch.randn(4, 64), torch.randn(4)
    with ops.use("emulator"):
        got = ops.low_rank_edit(h, D, A, b)
    emulator_suite.same(got, emulator_suite.edit, torch.float32, h, D, A, b)
