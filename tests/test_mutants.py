"""The checks are worth something: each of these wrong kernels, one change to a copy of the sources, must fail them.
Run: pytest tests/test_mutants.py     (-m slow for the long half of the list)
You should see every mutant fail emulator_suite.py; one that passes names a mistake that nobody would notice.
"""

import faulthandler
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import emulator_suite
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.emulator import Emulator, build  # noqa: E402

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler here"),
]

EDIT, ROWS, PRODUCTS, TENSOR, SCALE, NOISE = (
    "low_rank_edit.cu",
    "low_rank_edit.cuh",
    "sum_products.cuh",
    "tensor_cores.cuh",
    "scale.cu",
    "noisy_embedding.cu",
)

# What is wrong, file, what stands there (once), what to write instead, and the checks that look at it.
QUICK = [
    (
        "δ is used before it is there",
        ROWS,
        "if (lane % (32 / N) == 0) store(partial + warp * N + lane / (32 / N), sum[0]);\n    __syncthreads();",
        "if (lane % (32 / N) == 0) store(partial + warp * N + lane / (32 / N), sum[0]);",
        "edit_all",
    ),
    (
        "a bias is forgotten",
        ROWS,
        "factor += wide(load(static_cast<const W*>(a.bias) + bank * r + j))",
        "factor += 0",
        "edit_all",
    ),
    (
        "a sum in half precision",
        ROWS,
        "s = multiply_add(row[i].at[v], p.at[v], s);",
        "s = wide(narrow<T>(multiply_add(row[i].at[v], p.at[v], s)));",
        "edit_all",
    ),
    (
        "later chunks forget the earlier ones",
        EDIT,
        "products.before[i] = n > 0 ? partial[i] : nullptr",
        "products.before[i] = nullptr",
        "edit_chunked",
    ),
    (
        "rows are found by 32 bits",
        ROWS,
        "b * s.batch_stride + token * s.token_stride : nullptr",
        "int(b * s.batch_stride + token * s.token_stride) : nullptr",
        "edit_far",
    ),
    (
        "what halves leave over is dropped",
        TENSOR,
        "{pair(a, b), pair(narrow<T>(x - wide(a)), narrow<T>(y - wide(b)))}",
        "{pair(a, b), 0}",
        "edit_all",
    ),
    (
        "only a tile's first bank is served",
        ROWS,
        "mixed ? smaller(a.e.K + 1, R) : 1",
        "1",
        "edit_banks",
    ),
    (
        "the scale is forgotten",
        SCALE,
        "y.at[i] = activate<A>(y.at[i]).y * l.at[i];",
        "y.at[i] = activate<A>(y.at[i]).y;",
        "scale",
    ),
    (
        "dl is read before all warps have written",
        SCALE,
        "  __syncthreads();\n  // A thread adds",
        "  // A thread adds",
        "scale",
    ),
    ("noise on padding too", NOISE, "(index < 0 || index >= length)) length = 0;", "false) length = 0;", "noise"),
    ("one round of Philox less", NOISE, "round < 10", "round < 9", "noise"),
]
SLOW = [
    (
        "the last ranks are skipped",
        ROWS,
        "for (int j0 = 0; j0 < r; j0 += RANKS) {",
        "for (int j0 = 0; j0 + RANKS <= r || j0 == 0; j0 += RANKS) {",
        "edit_all",
    ),
    (
        "the last columns are skipped",
        ROWS,
        "for (int64_t c0 = 0; c0 < C; c0 += stride) {\n    const int64_t c = c0 + threadIdx.x * V;\n"
        "    Floats<V> row[R];\n    UNROLL for (int i = 0; i < R; i++) row[i]",
        "for (int64_t c0 = 0; c0 < C - stride; c0 += stride) {\n    const int64_t c = c0 + threadIdx.x * V;\n"
        "    Floats<V> row[R];\n    UNROLL for (int i = 0; i < R; i++) row[i]",
        "edit",
    ),
    ("a repeated position counts twice", ROWS, "(again || token < 0", "(token < 0", "edit_positions_rule"),
    (
        "a position beyond the row is edited",
        ROWS,
        "|| token >= a.e.T)) token = LEFT_ALONE",
        "|| false)) token = 0",
        "edit_positions_rule",
    ),
    (
        "rows of a sum are found by 32 bits",
        PRODUCTS,
        "mine ? b * x.batch_stride + t * x.token_stride : int64_t(-1)",
        "mine ? int(b * x.batch_stride + t * x.token_stride) : int64_t(-1)",
        "edit_far",
    ),
    (
        "scaled rows are found by 32 bits",
        SCALE,
        "b * s.batch_stride + token * s.token_stride + c;",
        "int(b * s.batch_stride + token * s.token_stride) + c;",
        "scale_far",
    ),
    ("words are found by 32 bits", NOISE, "(exists ? id : 0) * a.C;", "int((exists ? id : 0) * a.C);", "noise_far"),
    ("row and bank are mixed up", PRODUCTS, "place >> 32 == bank", "place >> 32 >= bank", "edit_banks"),
    ("each bank edits the whole tile", ROWS, ": load(banks + threadIdx.x) != bank)", ": false)", "edit_banks"),
    (
        "rows are put aside while others look for their bank",
        ROWS,
        "    __syncthreads();\n    if (threadIdx.x < R &&",
        "    if (threadIdx.x < R &&",
        "edit_banks",
    ),
    (
        "all banks end in the first one's matrix",
        TENSOR,
        "static_cast<const W*>(a.second) + bank * r * C",
        "static_cast<const W*>(a.second)",
        "edit_banks",
    ),
    ("all banks' sums are the first one's", TENSOR, "bank = blockIdx.z / 3", "bank = 0", "edit_banks"),
    ("a task that names no bank takes the first", TENSOR, "here.bank < 0 ? NAN : ", "", "edit_banks"),
    ("the seventeenth row is left out", TENSOR, "here.rows > 16 ?", "here.rows > 17 ?", "edit_all"),
    ("some lanes leave rows out that others take", TENSOR, "bit = 1; bit < 4;", "bit = 1; bit < 2;", "edit"),
    ("an index off by one", PRODUCTS, "first = (n0 + row) * r + j0;", "first = (n0 + row) * r + j0 + 1;", "edit_all"),
    (
        "a share of the rows begins at an odd one",
        PRODUCTS,
        "(a.end - a.begin + 2 * gridDim.y - 1) / (2 * gridDim.y) * 2)",
        "(a.end - a.begin + gridDim.y - 1) / gridDim.y)",
        "edit_chunked",
    ),
    ("the ranks in a row's last sector are not read", PRODUCTS, "p >= L + 2", "p >= L", "edit_all"),
    ("ranks come from the wrong neighbour", PRODUCTS, "(l + 2) % L", "(l + 1) % L", "edit_all"),
    ("ranks that begin within a sector are not shifted", PRODUCTS, "int bit = 2; bit >= 0", "int bit = 2; bit > 0", "edit_all"),
    ("δ ends before its last four floats", PRODUCTS, "from + e < floats ? load(s + from + e) : 0", "0", "edit_all"),
    (
        "u and δ change places",
        PRODUCTS,
        "const float* s = job == 1 ? a.delta : a.u;",
        "const float* s = job == 1 ? a.u : a.delta;",
        "edit_all",
    ),
    (
        "factors are replaced while others read them",
        PRODUCTS,
        "n0 < end; n0 += CHUNK) {\n    __syncthreads();",
        "n0 < end; n0 += CHUNK) {",
        "edit_chunked",
    ),
    (
        "factors are read before they are staged",
        PRODUCTS,
        "offsets);\n    __syncthreads();\n    UNROLL_BY(4)",
        "offsets);\n    UNROLL_BY(4)",
        "edit",
    ),
    (
        "one split's sums are lost",
        EDIT,
        "partial[i], p.splits, products.split_stride",
        "partial[i], p.splits - 1, products.split_stride",
        "edit_chunked",
    ),
    (
        "high and low columns swapped",
        TENSOR,
        "const int64_t c = c0 + 32 * k + 8 * t;\n        Floats<8> eight;",
        "const int64_t c = c0 + 32 * (1 - k) + 8 * t;\n        Floats<8> eight;",
        "edit_all",
    ),
    (
        "a fragment's rows swapped",
        TENSOR,
        "high[m][2 * i] = upper.high, high[m][2 * i + 1] = lower.high;",
        "high[m][2 * i] = lower.high, high[m][2 * i + 1] = upper.high;",
        "edit_all",
    ),
    (
        "warps add at once",
        TENSOR,
        "        store(place(u, e), sum);\n      }\n    __syncthreads();",
        "        store(place(u, e), sum);\n      }",
        "edit",
    ),
    ("l of the wrong bank", SCALE, "t.bank = task < 0 || task >= a.s.K ? 0 : task;", "t.bank = 0;", "scale"),
    (
        "a tile's last row is skipped",
        SCALE,
        "t.last = smaller(row + ROWS, (group + 1) * a.group);",
        "t.last = smaller(row + ROWS - 1, (group + 1) * a.group);",
        "scale",
    ),
    ("the slope without its second term", SCALE, "sigmoid * (1 + x * (1 - sigmoid))", "sigmoid", "scale"),
    ("a run of equal ids is cut short", NOISE, "id_of(n) == id;", "false;", "noise"),
    (
        "noise contracted, not rounded twice",
        NOISE,
        "__fadd_rn(x.at[i + k], __fmul_rn(amount, eps.at[k]))",
        "fmaf(amount, eps.at[k], x.at[i + k])",
        "noise",
    ),
    ("the padded length sets the noise", NOISE, "float(larger(length, 1) * a.C)", "float(a.T * a.C)", "noise"),
]


def survives(library: Path, prefix: str) -> None:
    """In a process of its own, which a mutant may crash: exits with 0 if all checks pass in every order of threads."""
    faulthandler.disable()                                                # what crashes here is a mutant: no news
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        for order in ("forward", "reverse", "random"):
            emulator_suite.run(Emulator(library), prefix, order)
    except (AssertionError, RuntimeError):
        os._exit(1)
    os._exit(0)


def outcome(library: Path, prefix: str) -> str:
    process = multiprocessing.get_context("fork").Process(target=survives, args=(library, prefix))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        return "failed: it does not end"
    return "survived" if process.exitcode == 0 else "failed"


def mutate(folder: Path, file: str, old: str, new: str) -> Path:
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    path = folder / "csrc/cuda" / file
    text = path.read_text()
    assert text.count(old) == 1, (
        f"{file} has {text.count(old)} of {old!r}, not one: bring the list of mutants up to date"
    )
    path.write_text(text.replace(old, new))
    return folder / "csrc"


@pytest.mark.parametrize(
    "what, file, old, new, checks",
    QUICK + [pytest.param(*m, marks=pytest.mark.slow) for m in SLOW],
    ids=[m[0] for m in QUICK + SLOW],
)
def test_a_wrong_kernel_fails_the_suite(tmp_path, what, file, old, new, checks):
    library = build(mutate(tmp_path, file, old, new), ROOT / "build/mutants", "-O1")
    assert outcome(library, checks) != "survived", f"no check notices it: {what}"


def test_every_mutant_changes_one_place():
    for _, file, old, new, checks in QUICK + SLOW:
        assert (ROOT / "csrc/cuda" / file).read_text().count(old) == 1, (file, old)
        assert old != new and any(name.startswith(checks) for name in emulator_suite.CHECKS)


def test_the_right_kernels_pass():
    assert outcome(build(ROOT / "csrc", ROOT / "build/mutants", "-O1"), "noise") == "survived"
