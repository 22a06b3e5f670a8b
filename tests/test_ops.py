"""Every operation on every backend against the reference: values, gradients, layouts, modes of PyTorch, and bad input.
Run: pytest tests/test_ops.py -m "not emulator" (the CPU kernels), -m emulator (the CUDA sources on the CPU), -m gpu
You should see every operation pass on each backend that is built; a machine without a GPU skips those tests.
"""

import ctypes
import inspect
import mmap
import platform
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operations import OPERATIONS, Case

from minireft import ops, reference

BACKENDS = [pytest.param("cpu", marks=pytest.mark.skipif(not ops.backends()["cpu"], reason="the kernels are not built")),
            pytest.param("emulator", marks=[pytest.mark.emulator, pytest.mark.skipif(
                not ops.backends()["emulator"], reason="the emulator is not built")]),
            pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
                not ops.backends()["cuda"], reason="no CUDA kernels or no GPU")])]
DOUBLE = (torch.float64, torch.float64)
backends = pytest.mark.parametrize("backend", BACKENDS)
operations = pytest.mark.parametrize("name", OPERATIONS)
some = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
few = settings(some, max_examples=6)


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory():
    """What malloc hands out is filled with −1.7e38, so that a result nobody wrote cannot look right."""
    if platform.libc_ver()[0] == "glibc":
        mallopt, M_PERTURB = ctypes.CDLL(None).mallopt, -6
        mallopt(M_PERTURB, 0x01)
        yield
        mallopt(M_PERTURB, 0)
    else:
        yield


def on(backend: str, case: Case) -> Case:
    return case.to(device="cuda") if backend == "cuda" else case


def assert_close(got, plain, truth, magnitude, computed=None):
    """Our error against float64 is at most twice plain PyTorch's own in that dtype.

    Plain PyTorch may be exact by luck, so one rounding is granted as well: of the result to its dtype, and of the arithmetic
    (float32) at the size of the terms that are summed, which is the same formula on absolute values.  Few numbers (a bias of
    rank 1 is one) are often exact by luck: of them, one rounding to the dtype that plain PyTorch computed them in.  NaN fails.
    """
    if not got.numel():
        return
    error, theirs = ((x.cpu().double() - truth).abs().max().item() for x in (got, plain))
    wide = torch.promote_types(got.dtype, torch.float32)
    floor = torch.finfo(computed if computed and got.numel() <= 64 else got.dtype).eps * truth.abs().max().item() + torch.finfo(wide).eps * magnitude.abs().max().item()
    assert error <= 2 * theirs + floor, f"error {error:.3g}, plain PyTorch's {theirs:.3g}, one rounding {floor:.3g}"


# ---- values and gradients ---------------------------------------------------------------------------------------------


def check_values(backend, name, data):
    case = OPERATIONS[name].draw(data, dtypes=DOUBLE if backend == "cpu" and data.draw(st.booleans(), "double") else None)
    with ops.use(backend):
        got, arguments = on(backend, case).run(ops)
        tracked, _ = on(backend, case).run(ops, grad=True)
    plain, truth, magnitude = (c.run(m)[0] for c, m in (
        (case, "plain"), (case.to(dtype=torch.float64), reference), (case.absolute(), reference)))
    for results in zip(got, plain, truth, magnitude):
        assert results[0].dtype == results[1].dtype and results[0].shape == results[1].shape
        assert_close(*results)
    assert all(torch.equal(a, b) for a, b in zip(got, tracked)), "with gradients on, the values differ"
    if case.operation.in_place:
        assert got[0].data_ptr() == arguments["h"].data_ptr()


def check_gradients(backend, name, data):
    case = OPERATIONS[name].draw(data)
    with ops.use(backend):
        got = on(backend, case).gradients(ops)
    plain, truth, magnitude = (c.gradients(m) for c, m in (
        (case, "plain"), (case.to(dtype=torch.float64), reference), (case.absolute(), reference)))
    coarsest = max((x.dtype for x in got.values()), key=lambda dtype: torch.finfo(dtype).eps)
    for argument in got:
        assert got[argument].dtype == case.arguments[argument].dtype
        assert_close(got[argument], plain[argument], truth[argument], magnitude[argument], coarsest)


@pytest.mark.parametrize("backend", [BACKENDS[0], BACKENDS[2]])
@pytest.mark.parametrize("check", [check_values, check_gradients])
@operations
@some
@given(data=st.data())
def test_as_exact_as_plain_pytorch(backend, check, name, data):
    check(backend, name, data)


@pytest.mark.parametrize("backend", BACKENDS[1:2])
@pytest.mark.parametrize("check", [check_values, check_gradients])
@operations
@few
@given(data=st.data())
def test_cuda_sources_as_exact_as_plain_pytorch(backend, check, name, data):
    """Fewer examples: thread by thread is slow, and tests/test_emulator.py goes through the kernels' paths on purpose."""
    check(backend, name, data)


@pytest.mark.skipif(not ops.backends()["cpu"], reason="the kernels are not built")
@operations
@few
@given(data=st.data())
def test_gradients_agree_with_differences(name, data):
    case = OPERATIONS[name].draw(data, dtypes=DOUBLE)
    names = [n for n in case.operation.differentiable if case.arguments[n].numel() <= 64]

    def function(*leaves):
        moved = {**case.arguments, **dict(zip(names, leaves))}
        if case.operation.in_place:
            moved["h"] = moved["h"] * 1
        return getattr(ops, name)(**moved)

    leaves = [case.arguments[n].detach().clone().requires_grad_() for n in names]
    if not leaves or not all(leaf.numel() for leaf in leaves) or function(*leaves) is None:
        return
    if name == "noisy_embedding":
        case.arguments["alpha"] = 0.0                       # the noise is rounded to float32, which differences would see
    assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0)


@pytest.mark.parametrize("backend", [BACKENDS[0], BACKENDS[2]])
@operations
@few
@given(data=st.data())
def test_same_input_same_bits_on_any_number_of_threads(backend, name, data):
    case, threads = on(backend, OPERATIONS[name].draw(data)), torch.get_num_threads()
    try:
        with ops.use(backend):
            runs = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                runs.append([*case.run(ops)[0], *case.gradients(ops).values()])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run))


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_many_rows_same_bits_on_any_number_of_threads(backend):
    torch.manual_seed(0)
    edit = Case(OPERATIONS["low_rank_edit"], {"h": torch.randn(2, 1000, 96), "down": torch.randn(5, 96) / 10,
                                              "up": torch.randn(5, 96), "bias": torch.randn(5)})
    scaled = Case(OPERATIONS["gelu_scale"], {"u": torch.randn(2, 1000, 96), "l": torch.randn(96)})
    threads = torch.get_num_threads()
    for case in (edit, scaled):
        runs = []
        try:
            for n in (1, 2):
                torch.set_num_threads(n)
                runs.append(dict(zip(["out"], case.run(ops)[0])) | case.gradients(ops))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])
        plain, truth, magnitude = (dict(zip(["out"], c.run(m)[0])) | c.gradients(m) for c, m in (
            (case, "plain"), (case.to(dtype=torch.float64), reference), (case.absolute(), reference)))
        for n in runs[0]:
            assert_close(runs[0][n], plain[n], truth[n], magnitude[n])


@pytest.mark.parametrize("backend", BACKENDS[:1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_written_past_the_caches_have_the_bits_of_small_ones(backend, dtype):
    """Twelve MiB and more at once, and the same rows in two halves."""
    torch.manual_seed(0)
    N, C = (12 << 20) // (512 * dtype.itemsize), 512
    h, g, up = (torch.randn(N, C).to(dtype) for _ in range(3))
    down, l = (torch.randn(2, C).to(dtype) for _ in range(2))

    def all_of(h, g, up):
        h, up = h.clone().requires_grad_(), up.clone().requires_grad_()
        outs = (ops.low_rank_edit(h, down / 23, down, l[0, :2]), ops.gelu_scale(h, l[0]), ops.swiglu_scale(h, up, l[1]))
        return [*outs, *torch.autograd.grad(outs, [h, up], [g, g, g])]

    with ops.use(backend):
        halves = [all_of(*(x[rows] for x in (h, g, up))) for rows in (slice(0, N // 2), slice(N // 2, N))]
        assert all(torch.equal(whole, torch.cat(parts)) for whole, *parts in zip(all_of(h, g, up), *halves))


@pytest.mark.parametrize("backend", BACKENDS[:1])
@pytest.mark.parametrize("N, C, r", [(260, 1031, 33), (300, 4096, 64), (257, 130, 48), (300, 258, 17), (300, 258, 15)])
@pytest.mark.parametrize("dtype, weights", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")])
def test_many_ranks_are_as_exact_as_few(backend, N, C, r, dtype, weights):
    """Ranks in lanes, in sums of sums: the CPU's own way from twice a vector's ranks on, for 256 rows and more; and the pairs."""
    torch.manual_seed(0)
    case = Case(OPERATIONS["low_rank_edit"], {"h": torch.randn(1, N, C).to(getattr(torch, dtype)), **{
        name: w.to(getattr(torch, weights)) for name, w in (
            ("down", torch.randn(r, C) / C ** 0.5), ("up", torch.randn(r, C) / C ** 0.5), ("bias", torch.randn(r)))}})
    with ops.use(backend):
        got = case.gradients(ops)
        got |= dict(zip(("out", "delta"), ops._libraries["minireft"]["low_rank_edit"](*case.arguments.values())))
    plain, truth, magnitude = (dict(zip(["out"], c.run(m)[0])) | c.gradients(m) for c, m in (
        (case, "plain"), (case.to(dtype=torch.float64), reference), (case.absolute(), reference)))
    h, down, _, bias = (a.float() for a in case.arguments.values())
    plain["delta"], truth["delta"] = torch.addmm(bias, h[0], down.T), torch.addmm(bias.double(), h[0].double(), down.double().T)
    if dtype == "bfloat16":                                                # such weights may have been rounded
        plain["delta"] = torch.addmm(bias, h[0], down.bfloat16().float().T)
    for n in got:                                                          # of values plain PyTorch's are not exact by luck
        assert_close(got[n], plain[n], truth[n], magnitude[n] if n in case.arguments else torch.zeros(()))
    doubled = case.to(dtype=torch.float64)                                 # as exact itself: the same ways, other vectors
    with ops.use(backend):
        for n, gradient in doubled.gradients(ops).items():
            torch.testing.assert_close(gradient, truth[n], rtol=1e-12, atol=1e-11)


@backends
@few
@given(data=st.data())
def test_uniform_noise_has_the_bits_of_the_reference(backend, data):
    case = OPERATIONS["noisy_embedding"].draw(data)
    with ops.use(backend):
        (got,), _ = on(backend, case).run(ops)
    (expected,), _ = case.run(reference)
    assert torch.equal(got.cpu(), expected)


@backends
def test_every_word_s_gradient_is_written(backend):
    """In a vocabulary with more words than pieces, past the caches: zeros for most words, the others' tokens in order."""
    V, C = 3300, 1008
    device = "cuda" if backend == "cuda" else "cpu"
    ids = torch.tensor([[3, 1, 3, 3, 0, V - 1, 1500, 3], [1500, 17, 16, 3, 15, V - 1, 3, 2]], device=device)
    weight, g = torch.zeros(V, C, device=device, requires_grad=True), torch.randn(2, 8, C, device=device)
    expected = torch.zeros(V, C, device=device)
    for word, gradient in zip(ids.view(-1), g.view(-1, C)):
        expected[word] += gradient
    with ops.use(backend):
        for _ in range(2):                                                # the second time in the memory of the first
            (got,) = torch.autograd.grad(ops.noisy_embedding(ids, weight, 5.0, 0), weight, g)
            assert torch.equal(got, expected)
            got.fill_(float("nan"))
            del got


@backends
def test_gaussian_noise_agrees_with_the_reference(backend):
    arguments = {"ids": torch.arange(60).view(4, 15), "weight": torch.randn(60, 37), "alpha": 5.0, "seed": torch.tensor([3, 9])}
    case = Case(OPERATIONS["noisy_embedding"], {**arguments, "distribution": "gaussian"})
    with ops.use(backend):
        (got,), _ = on(backend, case).run(ops)
    # A few units in the last place of log, sine and cosine of numbers up to 6, times α/√(TC) = 0.21
    torch.testing.assert_close(got.cpu(), case.run(reference)[0][0], rtol=1e-6, atol=2e-6)


@backends
def test_elements_beyond_two_to_the_31(backend):
    """The last rows of 4 GiB, of which only these rows are ever touched."""
    if backend == "cuda":
        pytest.skip("needs no GPU")
    h = torch.frombuffer(mmap.mmap(-1, 2 * 2 * (2 ** 20 + 3) * 1024), dtype=torch.bfloat16).view(2, 2 ** 20 + 3, 1024)
    positions = torch.tensor([[-1, 0], [2 ** 20 + 2, -1]])
    rows = [(0, 0), (1, 2 ** 20 + 2)]
    down, up, bias = torch.randn(3, 1024) / 32, torch.randn(3, 1024), torch.randn(3)
    before = {row: torch.randn(1024).bfloat16() for row in rows}
    for (b, t), values in before.items():
        h[b, t] = values
    with ops.use(backend):
        ops.low_rank_edit_at_(h, positions, down, up, bias)
    for (b, t), values in before.items():
        plain = torch.addmm(values[None], torch.addmm(bias.bfloat16(), values[None], down.bfloat16().T), up.bfloat16())[0]
        truth = reference.low_rank_edit(*(x.double() for x in (values, down, up, bias)))
        assert_close(h[b, t], plain, truth, torch.zeros(()))


# ---- the modes of PyTorch -----------------------------------------------------------------------------------------------


def inputs():
    torch.manual_seed(0)
    return {"h": torch.randn(2, 6, 40), "positions": torch.tensor([[0, 5], [3, -1]]), "down": torch.randn(3, 40),
            "up": torch.randn(3, 40), "bias": torch.randn(3), "l": torch.randn(40), "l2": torch.randn(40),
            "ids": torch.randint(0, 11, (2, 6)), "weight": torch.randn(11, 40), "seed": torch.tensor([1, 2])}


def everything(h, positions, down, up, bias, l, l2, ids, weight, seed):
    """One graph with every operation in it."""
    x = h + ops.noisy_embedding(ids, weight, 5.0, seed)
    x = ops.low_rank_edit_at_(x, positions, down, up, bias)
    x = ops.low_rank_edit_at(ops.low_rank_edit(x, down, up, bias), positions, up, down, bias)
    k, v = ops.scale_pair(x, h, l, l2)
    return ops.swiglu_scale(ops.gelu_scale(k, l), ops.scale(v, l2), l)


def run_everything(function, arguments):
    leaves = {n: t.clone().requires_grad_() for n, t in arguments.items() if t.is_floating_point()}
    out = function(**{**arguments, **leaves})
    return [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_compiles_into_one_graph_that_calls_the_kernels(backend):
    called = []

    def look(graph, example):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with ops.use(backend):
        expected = run_everything(everything, inputs())
        torch._dynamo.reset()
        from torch._dynamo.backends.common import aot_autograd
        compiled = torch.compile(everything, fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
        got = run_everything(compiled, inputs())
    for a, b in zip(expected, got):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    library = "minireft" if backend == "cpu" else "minireft_emulator"
    missing = [o for o in ops._OPERATIONS if not any(f"{library}.{o}" in c or f"{library}::{o}" in c for c in called)]
    assert set(missing) <= {"low_rank_edit_at_"}, f"not called from the compiled graph: {missing}"


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_with_inductor(backend):
    torch._dynamo.reset()
    for a, b in zip(run_everything(everything, inputs()), run_everything(torch.compile(everything, fullgraph=True), inputs())):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@backends
def test_autocast_leaves_dtypes_alone(backend):
    device = "cuda" if backend == "cuda" else "cpu"
    arguments = {n: t.to(device) for n, t in inputs().items()}
    for force in (backend, "reference"):
        with ops.use(force):
            expected = run_everything(everything, arguments)
            with torch.autocast(device, torch.bfloat16):
                got = everything(**arguments)
            assert got.dtype == torch.float32 and torch.equal(got, expected[0])


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_vmap_and_func_grad(backend):
    h, l = torch.randn(3, 4, 10), torch.randn(3, 10)
    down, up, bias = torch.randn(2, 10), torch.randn(2, 10), torch.randn(2)
    torch.testing.assert_close(torch.vmap(ops.scale)(h, l), h * l[:, None])
    torch.testing.assert_close(torch.vmap(ops.low_rank_edit, (0, None, None, None))(h, down, up, bias),
                               ops.low_rank_edit(h, down, up, bias))
    per_example = torch.vmap(torch.func.grad(lambda l, x: ops.gelu_scale(x, l).sum()))(l, h)
    torch.testing.assert_close(per_example, torch.nn.functional.gelu(h).sum(1))
    raw = torch.vmap(torch.ops.minireft.scale, (0, None, 0, None, None))(h, None, l, None, 0)
    torch.testing.assert_close(raw, h * l[:, None])


def raw_calls():
    i = inputs()
    h, g, w = i["h"], torch.randn(2, 6, 40), (i["down"], i["up"], i["bias"])
    rows, delta, ids = torch.randn(4, 40), torch.randn(4, 3), i["ids"]
    return {
        "low_rank_edit": (h, *w), "low_rank_edit_backward": (g, h, torch.randn(12, 3), *w[:2], True, True),
        "low_rank_edit_at": (h, i["positions"], *w, None, True), "low_rank_edit_at_": (h, i["positions"], *w, None, True),
        "low_rank_edit_at_backward": (g, rows, delta, i["positions"], *w[:2], None, True, True),
        "scale": (h, g, i["l"], None, 3), "scale_backward": (g, h, None, i["l"], None, 1, True),
        "scale_pair": (h, g, i["l"], i["l2"], None), "scale_pair_backward": (g, g, h, g, i["l"], i["l2"], None),
        "noisy_embedding": (ids, i["weight"], 5.0, i["seed"], None, None, None, False),
        "noisy_embedding_backward": (g, ids, ids.flatten().argsort(stable=True), 11)}


@pytest.mark.parametrize("operation", ops._OPERATIONS)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_opcheck(backend, operation):
    library = torch.ops.minireft if backend == "cpu" else torch.ops.minireft_emulator
    torch.library.opcheck(getattr(library, operation).default, raw_calls()[operation])


@backends
def test_second_derivatives_are_refused(backend):
    if backend == "cuda":
        pytest.skip("needs no GPU")
    with ops.use(backend):
        x = torch.randn(3, 4, requires_grad=True)
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(ops.gelu_scale(x, torch.ones(4)).sum(), x, create_graph=True)


# ---- in place ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*BACKENDS[:2], "reference"])
def test_in_place_on_what_autograd_keeps_or_tracks(backend):
    i = inputs()
    w = (i["positions"], i["down"], i["up"], i["bias"])
    with ops.use(backend):
        leaf = i["h"].clone().requires_grad_()
        with pytest.raises(ValueError, match="h must not be a leaf"):
            ops.low_rank_edit_at_(leaf, *w)
        with pytest.raises(ValueError, match="h must not be a leaf that requires grad, or a view of one"):
            ops.low_rank_edit_at_(leaf[:], *w)
        assert torch.equal(leaf, i["h"])
        for rows in (torch.zeros(4, 6, 40), leaf.repeat(2, 1, 1)):             # one of several views, tracked by its weights or itself
            part = rows.chunk(2)[0]
            with pytest.raises(RuntimeError, match="multiple views"):
                ops.low_rank_edit_at_(part, w[0], w[1].clone().requires_grad_(), *w[2:])
            assert torch.equal(part, rows[:2]) and torch.equal(rows[:2], rows[2:])
        base = leaf * 2
        view = base[:, :, :]
        out = ops.low_rank_edit_at_(view, *w)                  # a view: its base must learn of it
        expected = reference.low_rank_edit_at(leaf * 2, *w)
        torch.testing.assert_close(base, expected)
        (a,), (b,) = torch.autograd.grad(base.square().sum(), leaf), torch.autograd.grad(expected.square().sum(), leaf)
        assert (a - b).norm() <= 1e-5 * b.norm()
        assert out.data_ptr() == base.data_ptr()
        kept = leaf.exp()                                      # exp keeps its result for backward
        ops.low_rank_edit_at_(kept, *w)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.sum().backward()


@backends
def test_positions_are_edited_once_and_nothing_else_is_touched(backend):
    if backend == "cuda":
        pytest.skip("covered by the properties")
    i = inputs()
    with ops.use(backend):
        out = ops.low_rank_edit_at(i["h"], i["positions"], i["down"], i["up"], i["bias"])
    edited = (out != i["h"]).any(-1)
    assert edited.tolist() == [[True] + [False] * 4 + [True], [False] * 3 + [True] + [False] * 2]
    assert torch.equal(out[~edited], i["h"][~edited])


# ---- bad input -----------------------------------------------------------------------------------------------------------

BANKS = {"down": torch.randn(3, 2, 40), "up": torch.randn(3, 2, 40), "bias": torch.randn(3, 2)}
INT = torch.zeros(3, 40, dtype=torch.int64)
BAD = [  # operation, what is wrong, and what the message must say; "..." stands for anything
    # rank
    ("low_rank_edit", {"h": torch.tensor(1.0)}, "h must have shape (..., C)...got ()"),
    ("low_rank_edit", {"down": torch.randn(40)}, "down...(r, C), got...(40,)"),
    ("low_rank_edit_at_", {"h": torch.randn(6, 40)}, "h must have shape (B, T, C)...got (6, 40)"),
    ("low_rank_edit_at", {"positions": INT[0, :2]}, "positions...(B, P), got...(2,)"),
    ("low_rank_edit_at_", BANKS, "down...(r, C), got...(3, 2, 40)"),
    ("low_rank_edit_at_", {"tasks": INT[0, :2]}, "down...(K, r, C), got...(3, 40)"),
    ("scale", {"x": torch.tensor(1.0)}, "x must have shape (..., C)...got ()"),
    ("gelu_scale", {"l": torch.randn(1, 40)}, "l...(C,), got...(1, 40)"),
    ("noisy_embedding", {"ids": INT[0, :6]}, "ids must have shape (B, T)...got (6,)"),
    ("noisy_embedding", {"weight": torch.randn(40)}, "weight...(V, C), got...(40,)"),
    # shape
    ("low_rank_edit", {"down": torch.randn(3, 39)}, "down must have shape (3, 40), got (3, 39)"),
    ("low_rank_edit", {"up": torch.randn(4, 40)}, "up must have shape (3, 40), got (4, 40)"),
    ("low_rank_edit", {"bias": torch.randn(4)}, "bias must have shape (3,), got (4,)"),
    ("low_rank_edit_at_", {"positions": INT[:, :1]}, "positions must have shape (2, 1), got (3, 1)"),
    ("low_rank_edit_at_", {**BANKS, "tasks": torch.tensor([0, 3, 1])}, "tasks must have shape (2,), got (3,)"),
    ("low_rank_edit_at_", {**BANKS, "tasks": INT[:2, :1]}, "tasks must have shape (2, 2), got (2, 1)"),
    ("scale", {"l": torch.randn(41)}, "l must have shape (40,), got (41,)"),
    ("swiglu_scale", {"up": torch.randn(2, 6, 41)}, "up must have shape (2, 6, 40), got (2, 6, 41)"),
    ("scale_pair", {"y": torch.randn(2, 5, 40)}, "y must have...shape...(2, 6, 40)...got (2, 5, 40)"),
    ("scale_pair", {"l_x": torch.randn(3, 40), "l_y": torch.randn(2, 40), "tasks": INT[0, :2]},
     "l_y must have shape (3, 40), got (2, 40)"),
    ("noisy_embedding", {"seed": torch.tensor([1, 2, 3])}, "seed must have shape (2,), got (3,)"),
    ("noisy_embedding", {"lengths": INT[:2, :5]}, "lengths must have shape (2, 6), got (2, 5)"),
    ("noisy_embedding", {"index": INT[0, :2]}, "index must have shape (2, 6), got (2,)"),
    # dtype
    ("low_rank_edit", {"h": torch.ones(2, 40, dtype=torch.int64)}, "h must be float32...got...int64"),
    ("low_rank_edit_at", {"h": torch.ones(2, 8192, 40, dtype=torch.int64)}, "h must be float32...got...int64"),
    *[(name, {weight: INT[0, :3] if weight == "bias" else INT}, f"{weight} must...got...int64")
      for name in ("low_rank_edit", "low_rank_edit_at_") for weight in ("down", "up", "bias")],
    ("gelu_scale", {"u": INT}, "u must be float32...got...int64"),
    ("swiglu_scale", {"l": INT[0]}, "l must be float32...got...int64"),
    ("swiglu_scale", {"up": torch.randn(2, 6, 40).half()}, "up must have the dtype of gate...float32, got...float16"),
    ("scale_pair", {"y": torch.randn(2, 6, 40).bfloat16()}, "y must have the dtype of x...float32, got...bfloat16"),
    ("noisy_embedding", {"weight": INT}, "weight must be float32...got...int64"),
    ("low_rank_edit_at_", {"positions": torch.zeros(2, 1)}, "positions must be int64, got...float32"),
    ("scale", {"l": torch.randn(3, 40), "tasks": torch.zeros(2).int()}, "tasks must be int64, got...int32"),
    ("noisy_embedding", {"lengths": torch.tensor([1.0, 2.0])}, "lengths must be int64, got...float32"),
    # devices mixed
    *[(name, {argument: torch.zeros(shape, device="meta", dtype=dtype)}, f"{argument} must be on...")
      for name, argument, shape, dtype in [
          ("low_rank_edit", "down", (3, 40), None), ("low_rank_edit_at_", "up", (3, 40), None),
          ("low_rank_edit_at_", "positions", (2, 2), torch.int64), ("scale", "l", (40,), None),
          ("swiglu_scale", "up", (2, 6, 40), None), ("scale_pair", "y", (2, 6, 40), None),
          ("noisy_embedding", "ids", (2, 6), torch.int64), ("noisy_embedding", "seed", (2,), torch.int64)]],
    # values out of range
    ("low_rank_edit_at_", {"positions": torch.tensor([[0, 6], [1, 2]])}, "positions must lie in −1 … 5, got 6"),
    ("low_rank_edit_at_", {"positions": torch.tensor([[0, -2], [1, 2]])}, "positions must lie in −1 … 5, got -2"),
    ("low_rank_edit_at_", {"positions": torch.tensor([[0, 1, 2], [4, -1, 4]])},
     "positions must be distinct within a row, got 4 twice in row 1"),
    ("low_rank_edit_at_", {**BANKS, "tasks": torch.tensor([0, 3])}, "tasks must lie in −1 … 2, got 3"),
    ("low_rank_edit_at_", {**BANKS, "tasks": torch.tensor([[0, 1], [2, 3]])}, "tasks must lie in −1 … 2, got 3"),
    ("scale", {"l": torch.randn(2, 40), "tasks": torch.tensor([0, -2])}, "tasks must lie in −1 … 1, got -2"),
    ("scale_pair", {"l_x": BANKS["up"][0], "l_y": BANKS["up"][0], "tasks": torch.tensor([0, 2])},
     "tasks must lie in −1 … 1, got 2"),
    ("noisy_embedding", {"ids": torch.tensor([[0, 11]])}, "ids must lie in 0 … 10, got 11"),
    ("gelu_scale", {"approximate": "erf"}, "approximate must be...got 'erf'"),
    ("noisy_embedding", {"distribution": "cauchy"}, "distribution must be...got 'cauchy'"),
    # memory that cannot be edited in place
    ("low_rank_edit_at_", {"h": torch.randn(2, 6, 80)[..., ::2]}, "h must have last stride 1...got 2"),
    ("low_rank_edit_at_", {"h": torch.randn(1, 6, 40).expand(2, 6, 40)}, "h must...got an expanded tensor"),
]


@pytest.mark.parametrize("name, changes, message", [pytest.param(*bad, id=f"{bad[0]}: {bad[2]}") for bad in BAD])
@pytest.mark.parametrize("backend", [*BACKENDS[:2], "reference"])
def test_bad_input_is_named_before_anything_is_written(backend, name, changes, message):
    layout = "h" in changes and not changes["h"].is_contiguous()
    if backend == "reference" and layout:
        pytest.skip("plain PyTorch takes any stride, and has its own word on expanded tensors")
    rows, vector = torch.randn(2, 6, 40), torch.randn(40)
    good = {**inputs(), "alpha": 5.0, "x": rows, "y": rows, "u": rows, "gate": rows, "l_x": vector, "l_y": vector}
    if name == "swiglu_scale":
        good["up"] = rows
    function = getattr(ops, name)
    arguments = {n: good[n] for n, p in inspect.signature(function).parameters.items() if p.default is p.empty} | changes
    before = {n: t.clone() for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.device.type == "cpu"}
    pattern = ".*".join(map(re.escape, message.split("...")))
    for tracked in (False,) if layout else (False, True):                      # a tracked view goes by way of a copy
        for n in {"down", "up", "l", "l_x", "weight"} & arguments.keys() - changes.keys():
            arguments[n].requires_grad_(tracked)
        with ops.use(backend), pytest.raises(ValueError, match=pattern):
            function(**arguments)
    assert all(torch.equal(arguments[n], t) for n, t in before.items())


@pytest.mark.skipif(not ops.backends()["cpu"], reason="the kernels are not built")
def test_of_kept_memory_the_last_given_back_serves_first():
    """It may still be in cache; taken in turn, results would land in memory that is not."""
    x, l = torch.randn(512, 1024), torch.randn(1024)                       # 2 MiB
    first, last = ops.scale(x, l), ops.scale(x, l)
    place = last.data_ptr()
    del first, last
    for _ in range(3):
        assert ops.scale(x, l).data_ptr() == place


def test_backends_are_forced_by_statement_and_by_context():
    assert set(ops.backends()) == {"cpu", "cuda", "emulator"}
    with ops.use("reference"):
        with ops.use(None):
            pass
        assert ops._forced == "reference"
    assert ops._forced is None
    ops.use("reference")
    assert ops._forced == "reference"
    ops.use(None)
    with pytest.raises(ValueError, match="backend must be one of reference"):
        ops.use("tpu")


def test_weights_of_other_dtypes_are_converted_and_get_gradients_of_their_own():
    down, up, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 8), (2, 8), (2,)))
    h = torch.randn(3, 8)
    out = ops.low_rank_edit(h, down, up, bias)
    assert out.dtype == torch.float32
    for g in torch.autograd.grad(out.sum(), (down, up, bias)):
        assert g.dtype == torch.float64
