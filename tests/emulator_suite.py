"""The checks that every emulated kernel must pass, and every mutant must fail: small shapes, all paths, in seconds.
Use `for check in CHECKS.values(): check(emulator)`, with an Emulator of benchmarks/emulator.py; test_emulator.py does.
You should see nothing; a wrong kernel raises AssertionError with the operation, the dtypes and the shape.

Shapes: B batch, T tokens, C width, r rank, P positions, K banks.
"""

import mmap
from contextlib import nullcontext

import torch

from minireft import reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
UNIT = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}  # one rounding's relative error
PAIRS = [(F32, F32), (BF16, F32), (F16, F16)]  # activations, parameters
WIDE = [(1, 3, 301, 2), (1, 2, 2056, 2), (1, 3, 584, 16)]  # wider than a block reads at once: B, T, C, r
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def same(got, formula, dtype, *arguments, what=""):
    """got against formula(float64 arguments): at most twice the error of formula in `dtype`, or of two roundings to it.

    `formula` takes tensors first and may take anything after them; it returns a tensor or several.
    """

    def cast(to):
        return [a.to(to) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]

    exact, plain = formula(*cast(torch.float64)), formula(*cast(dtype))
    got, exact, plain = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (got, exact, plain))
    for i, (ours, right, theirs) in enumerate(zip(got, exact, plain, strict=True)):
        right, theirs, ours = right.flatten(), theirs.double().flatten(), ours.double().flatten()
        budget = 2 * max((theirs - right).norm().item(), UNIT[dtype] * right.norm().item())
        error = (ours - right).norm().item()
        assert error <= budget, f"{what} output {i}, {dtype}: error {error:.3g}, allowed {budget:.3g}"  # NaN fails


# The formulas as one writes them in PyTorch, rounding where it rounds: the budget's yardstick.


def edit(h, D, A, b):
    return torch.addmm(h.flatten(0, -2), torch.addmm(b, h.flatten(0, -2), D.T), A).view(h.shape)


def edit_backward(g, h, D, A, b):
    g, h, shape = g.flatten(0, -2), h.flatten(0, -2), h.shape
    u = g @ A.T
    return torch.addmm(g, u, D).view(shape), u.T @ h, torch.addmm(b, h, D.T).T @ g, u.sum(0)


def weights(C, r, dtype, *banks):
    return [
        (torch.randn(*banks, r, C) / C**0.5).to(dtype),
        (torch.randn(*banks, r, C) / r**0.5).to(dtype),
        torch.randn(*banks, r).to(dtype),
    ]


def rows(B, T, C, dtype, pad=0):
    """(B, T, C) with last stride 1; pad > 0 makes rows start at odd addresses."""
    return torch.randn(B, T, C + pad).to(dtype)[..., pad:]


@check
def edit_all(emulator):
    for dtype, w in PAIRS:
        for B, T, C, r in [(2, 5, 64, 4), (1, 7, 33, 3), (2, 9, 520, 9), (1, 49, 72, 16), (2, 35, 136, 70), *WIDE]:
            h, g, (D, A, b) = rows(B, T, C, dtype), rows(B, T, C, dtype), weights(C, r, w)
            out, delta, _ = emulator.low_rank_edit(h, D, A, b)
            same(out, edit, dtype, h, D, A, b, what=f"edit {B, T, C, r}")
            # δ is a sum in float; by the tensor cores, of halves that add up to 16 bits or more
            x, wide_D, wide_b = h.flatten(0, -2).double(), D.double(), b.double()
            terms = (x.abs() @ wide_D.abs().T + wide_b.abs()).norm()
            error = (delta.double() - (x @ wide_D.T + wide_b)).norm()
            assert error <= 2.0 ** (-15 if dtype != F32 and r >= 16 else -22) * terms, (
                f"δ {dtype} {B, T, C, r}: error {error:.3g}"
            )
            gradients = emulator.low_rank_edit_backward(g, h, None, delta, D, A)
            same(gradients, edit_backward, dtype, g, h, D, A, b, what=f"edit backward {B, T, C, r}")


@check
def edit_strided(emulator):
    for dtype, w in PAIRS:
        for pad in (1, 8):
            h, g, (D, A, b) = rows(2, 6, 64, dtype, pad), rows(2, 6, 64, dtype, pad), weights(64, 16, w)
            out, delta, _ = emulator.low_rank_edit(h, D, A, b)
            same(out, edit, dtype, h, D, A, b, what=f"edit, offset {pad}")
            same(
                emulator.low_rank_edit_backward(g, h, None, delta, D, A),
                edit_backward,
                dtype,
                g,
                h,
                D,
                A,
                b,
                what=f"edit backward, offset {pad}",
            )


def far(B, T, C, dtype, streams):
    """That many (B, T, C) tensors whose second row, of the batch or of the tokens, lies 2³¹ elements after the first: in
    memory of which only these rows are ever touched."""
    stride = 2**31 + 8
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = torch.frombuffer(mmap.mmap(-1, (stride + streams * C) * dtype.itemsize, flags), dtype=dtype)
    found = [memory.as_strided((B, T, C), (stride, stride, 1), i * C) for i in range(streams)]
    for x in found:
        x.copy_(torch.randn(B, T, C))
    return found


@check
def edit_far(emulator):
    """Rows more than 2³¹ elements apart: an index of 32 bits leaves the memory."""
    for (B, T), (dtype, r) in zip([(1, 2), (2, 1), (2, 1)], [(F32, 3), (BF16, 3), (BF16, 16)]):
        h, g, out, dh = far(B, T, 64, dtype, 4)
        D, A, b = weights(64, r, F32)
        out, delta, _ = emulator.low_rank_edit(h, D, A, b, out=out)
        same(out, edit, dtype, h, D, A, b, what=f"far edit {B, T, r}")
        found = emulator.low_rank_edit_backward(g, h, None, delta, D, A, dh=dh)
        same(found, edit_backward, dtype, g, h, D, A, b, what=f"far edit backward {B, T, r}")


@check
def edit_overflow(emulator):
    """Where float16 tensor cores are given a δ beyond 65,504: not finite, as in plain PyTorch, in that row alone."""
    h, (D, A, b) = rows(1, 40, 64, F16), weights(64, 16, F16)
    h[0, 7] = D[3] * 6e4                                                    # δ₃ = 60,000 |D₃|² + b₃
    D[3] *= 4
    out, _, _ = emulator.low_rank_edit(h, D, A, b)
    plain = edit(h, D, A, b)
    finite = torch.arange(40) != 7
    assert not plain[0, 7].isfinite().any() and not out[0, 7].isfinite().any(), "δ overflows, and nothing shows it"
    same(out[:, finite], edit, F16, h[:, finite], D, A, b, what="rows beside one that overflows")


@check
def edit_chunked(emulator):
    """Many chunks, splits, rows staged several times, and a ragged end: what a small L2 and many rows lead to."""
    for dtype, w, (N, C, r), l2, chunks in [
        (F32, F32, (333, 64, 3), 48 << 10, 3),
        (BF16, BF16, (333, 64, 16), 48 << 10, 6),
        (BF16, F32, (705, 64, 2), 3 << 20, 1),
        (F32, F32, (300, 128, 16), 3 << 20, 1),
        (BF16, F32, (300, 256, 16), 3 << 20, 1),
        (BF16, F32, (161, 64, 20), 3 << 20, 6),
    ]:
        h, g, (D, A, b) = rows(1, N, C, dtype), rows(1, N, C, dtype), weights(C, r, w)
        _, delta, _ = emulator.low_rank_edit(h, D, A, b)
        with emulator.counting(l2) as counts:
            gradients = emulator.low_rank_edit_backward(g, h, None, delta, D, A)
        assert counts["kernels"][0]["name"].startswith("edit_rows") and counts["kernels"][0]["launches"] == chunks, "chunks"
        same(gradients, edit_backward, dtype, g, h, D, A, b, what=f"edit backward in chunks {N, C, r}")


@check
def edit_repeats(emulator):
    """Same input, same bits, in any order of threads."""
    h, g, (D, A, b) = rows(1, 70, 96, BF16), rows(1, 70, 96, BF16), weights(96, 16, F32)
    found = []
    for seed in (1, 2):
        emulator.order("random", seed)
        out, delta, _ = emulator.low_rank_edit(h, D, A, b)
        found.append([out, delta, *emulator.low_rank_edit_backward(g, h, None, delta, D, A)])
    assert all(torch.equal(a, b) for a, b in zip(*found)), "the order of threads changes the edit's bits"


@check
def edit_at_positions(emulator):
    positions = torch.tensor([[4, 0, -1, 2], [-1, 6, 1, 3], [-1, -1, -1, -1]])  # (B, P)
    for dtype, w in PAIRS:
        for C, r in [(64, 4), (33, 3), (72, 17)]:
            h, g, (D, A, b) = rows(3, 7, C, dtype), rows(3, 7, C, dtype), weights(C, r, w)
            out, delta, saved = emulator.low_rank_edit(h, D, A, b, positions)
            wide = [x.double() for x in (h, D, A, b)]
            right = reference.low_rank_edit_at(wide[0], positions, *wide[1:])
            chosen = torch.zeros(3, 7, dtype=torch.bool).scatter(1, positions.clamp(min=0), positions >= 0)
            chosen[0, 0] = True  # −1 was clamped onto it
            chosen[1:, 0] = False
            assert torch.equal(out[~chosen], h[~chosen]), "a row that no position names was changed"
            same(out[chosen], edit, dtype, h[chosen], D, A, b, what=f"edit at positions {C, r}")
            assert torch.equal(
                saved[positions.flatten() >= 0], h[torch.arange(3)[:, None], positions][positions >= 0]
            ), "saved rows"
            assert (delta[positions.flatten() < 0] == 0).all(), "δ of rows that are not edited must be 0"
            in_place = h.clone()
            emulator.low_rank_edit(in_place, D, A, b, positions, out=in_place)
            assert torch.equal(in_place, out), "in place differs"
            assert (right.double() - out.double()).norm() < 1e-2 * right.norm(), "positions mixed up"
            dh, *gradients = emulator.low_rank_edit_backward(g, None, saved, delta, D, A, positions)
            assert torch.equal(dh[~chosen], g[~chosen]), "the gradient of a row that no position names was changed"
            same(
                [dh[chosen], *gradients],
                edit_backward,
                dtype,
                g[chosen],
                h[chosen],
                D,
                A,
                b,
                what=f"edit backward at positions {C, r}",
            )


@check
def edit_positions_rule(emulator):
    """On CUDA nobody can look first: of equal positions the first counts, and one outside the row counts as −1."""
    for dtype, r in [(F32, 4), (BF16, 16)]:
        h, g, (D, A, b) = rows(2, 5, 64, dtype), rows(2, 5, 64, dtype), weights(64, r, F32)
        given = torch.tensor([[3, 3, 5, 1], [-7, 0, 1 << 40, 0]])
        meant = torch.tensor([[3, -1, -1, 1], [-1, 0, -1, -1]])
        results = []
        for positions in (given, meant):
            out, delta, saved = emulator.low_rank_edit(h, D, A, b, positions)
            results.append([out, delta, *emulator.low_rank_edit_backward(g, None, saved, delta, D, A, positions)])
        assert all(torch.equal(a, b) for a, b in zip(*results)), "repeated or impossible positions are not ignored"


def same_with_banks(emulator, B, T, C, r, dtype, w, K, positions, tasks, l2=None):
    """Forward and backward with K banks against the reference; δ of the rows that nobody edits is 0."""
    h, g, banks = rows(B, T, C, dtype), rows(B, T, C, dtype), weights(C, r, w, K)
    out, delta, saved = emulator.low_rank_edit(h, *banks, positions, tasks)
    what = f"banks {B, T, C, r}"
    same(out, lambda h, *banks: reference.low_rank_edit_at(h, positions, *banks, tasks), dtype, h, *banks, what=what)
    left = (positions < 0) | ((tasks[:, None] if tasks.dim() == 1 else tasks) < 0)
    assert (delta.view(*positions.shape, r)[left] == 0).all(), "δ of rows that are not edited must be 0"
    with emulator.counting(l2) if l2 else nullcontext() as counts:
        gradients = emulator.low_rank_edit_backward(g, None, saved, delta, *banks[:2], positions, tasks)
    assert not l2 or counts["kernels"][0]["launches"] > 1, "not in chunks"
    same(
        gradients,
        lambda g, h, *banks: reference.low_rank_edit_at_backward(g, h, positions, *banks, tasks),
        dtype,
        g,
        h,
        *banks,
        what=f"{what} backward",
    )


@check
def edit_banks(emulator):
    K, positions = 3, torch.tensor([[0, 3, 2], [4, -1, 1], [1, 2, 0]])
    for dtype, w in PAIRS:
        for tasks in (torch.tensor([2, -1, 0]), torch.tensor([[0, 1, 2], [-1, 0, 2], [1, -1, 1]])):
            for C, r in [(64, 4), (33, 17), (72, 17)]:
                same_with_banks(emulator, 3, 5, C, r, dtype, w, K, positions, tasks)
    for dtype, r in [(F32, 4), (BF16, 16)]:
        h, banks = rows(3, 5, 64, dtype), weights(64, r, F32, K)
        for tasks in (torch.tensor([3, 0, 1]), torch.tensor([[2, 3, 1], [0, 0, 1], [2, 1, 2]])):
            out, _, _ = emulator.low_rank_edit(h, *banks, positions, tasks)
            lost = torch.zeros(3, 5, dtype=torch.bool)
            lost[0, positions[0] if tasks.dim() == 1 else 3] = True
            assert torch.equal(out.isnan().any(-1), lost) and out[lost].isnan().all(), (
                "a task that names no bank must make NaN of its rows alone"
            )


@check
def edit_banks_long(emulator):
    """Batch rows that are longer than a tile and end within one, and a chunk that ends within a batch row."""
    B, T, P, K = 3, 40, 37, 3
    positions = torch.stack([torch.randperm(T)[:P] for _ in range(B)])
    positions[1, 5:24] = -1
    for dtype, r, l2 in [(F32, 2, 48 << 10), (BF16, 16, 264 << 10)]:
        for tasks in (torch.tensor([2, 0, -1]), torch.randint(-1, K, (B, P)), torch.arange(P).expand(B, P) // 18):
            same_with_banks(emulator, B, T, 128, r, dtype, F32, K, positions, tasks, l2)


@check
def edit_empty(emulator):
    for B, T, P in [(0, 3, 2), (2, 3, 0)]:
        h, (D, A, b) = rows(B, T, 64, F32), weights(64, 4, F32)
        positions = torch.zeros(B, P, dtype=torch.int64)
        out, delta, saved = emulator.low_rank_edit(h, D, A, b, positions)
        gradients = emulator.low_rank_edit_backward(h.clone(), None, saved, delta, D, A, positions)
        assert torch.equal(out, h) and all((x == 0).all() for x in gradients[1:]), "an empty problem"


ACTIVATIONS = {
    "none": (reference.scale, reference.scale_backward),
    "gelu": (reference.gelu_scale, reference.gelu_scale_backward),
    "gelu_tanh": (
        lambda u, l, tasks: reference.gelu_scale(u, l, tasks, "tanh"),
        lambda g, u, l, tasks: reference.gelu_scale_backward(g, u, l, tasks, "tanh"),
    ),
    "swiglu": (reference.swiglu_scale, reference.swiglu_scale_backward),
}


@check
def scale_all(emulator):
    for dtype, w in PAIRS:
        for name, (forward, backward) in ACTIVATIONS.items():
            for B, T, C, tasks in [
                (2, 75, 64, None),
                (3, 5, 33, None),
                (2, 5, 264, None),
                (3, 70, 72, torch.tensor([1, -1, 0])),
                (3, 2, 33, torch.tensor([1, 1, -1])),
            ]:
                x, up, g = (rows(B, T, C, dtype) for _ in range(3))
                l = torch.randn(*([2] if tasks is not None else []), C).to(w)
                inputs = [x, up] if name == "swiglu" else [x]
                (out,) = emulator.scale([x], [l], tasks, name, [up] if name == "swiglu" else None)
                same(out, forward, dtype, *inputs, l, tasks, what=f"{name} {B, T, C}")
                dx, dup, dl = emulator.scale_backward([g], [x], [l], tasks, name, [up] if name == "swiglu" else None)[0]
                same(
                    [dx, dup, dl] if name == "swiglu" else [dx, dl],
                    backward,
                    dtype,
                    g,
                    *inputs,
                    l,
                    tasks,
                    what=f"{name} backward {B, T, C}",
                )


@check
def scale_rest(emulator):
    """Keys and values of different widths, views of one packed projection; a task that names no bank; nothing."""
    packed, l = rows(2, 9, 96, F32), torch.randn(96)
    key, value = emulator.scale([packed[..., :64], packed[..., 64:]], [l[:64], l[64:]])
    assert torch.equal(torch.cat([key, value], -1), packed * l), "keys and values in one launch"
    dkey, dvalue = emulator.scale_backward([key, value], [packed[..., :64], packed[..., 64:]], [l[:64], l[64:]])
    same([dkey[0], dkey[2]], reference.scale_backward, F32, key, packed[..., :64], l[:64], None, what="keys")
    same([dvalue[0], dvalue[2]], reference.scale_backward, F32, value, packed[..., 64:], l[64:], None, what="values")
    (out,) = emulator.scale([packed], [l[None]], torch.tensor([0, 1]))
    assert torch.equal(out[0], packed[0] * l) and out[1].isnan().all(), (
        "a task that names no vector must make NaN of its rows"
    )
    _, _, dl = emulator.scale_backward([packed[:0]], [packed[:0]], [l])[0]
    assert (dl == 0).all(), "no rows, no gradient"


@check
def scale_far(emulator):
    for B, T in [(1, 2), (2, 1)]:
        x, g = far(B, T, 64, BF16, 2)
        l = torch.randn(64)
        (out,) = emulator.scale([x], [l])
        same(out, reference.scale, BF16, x, l, None, what=f"far scale {B, T}")
        dx, _, dl = emulator.scale_backward([g], [x], [l])[0]
        same([dx, dl], reference.scale_backward, BF16, g, x, l, None, what=f"far scale backward {B, T}")


@check
def noise_far(emulator):
    """A row of the table that begins beyond 2³¹ elements, and its gradient's rows."""
    weight = far(2, 1, 64, BF16, 1)[0].as_strided((2**25 + 1, 64), (64, 1))   # the same memory, seen as a table of words
    ids, seed = torch.tensor([[2**25, 0]]), torch.tensor([5, 7])
    weight[2**25] = torch.randn(64).bfloat16()
    got = emulator.noisy_embedding(ids, weight, 5.0, seed)
    assert torch.equal(got, reference.noisy_embedding(ids, weight, 5.0, seed)), "far noise"
    (g,) = far(1, 2, 64, BF16, 1)
    same(emulator.noisy_embedding_backward(g, torch.tensor([[3, 3]]), 5),
         lambda g: reference.noisy_embedding_backward(g, torch.tensor([[3, 3]]), 5), BF16, g, what="far dweight")


@check
def noise_all(emulator):
    V = 11
    for dtype in (F32, BF16, F16):
        for B, T, C in [(2, 5, 64), (3, 7, 33), (1, 40, 264)]:
            weight, ids, seed = torch.randn(V, C).to(dtype), torch.randint(0, V, (B, T)), torch.tensor([5, 1 << 33 | 7])
            for options in (
                {},
                dict(lengths=torch.randint(1, T + 1, (B,))),
                dict(
                    lengths=torch.randint(0, T + 1, (B, T)),
                    rows=torch.randint(0, 1 << 40, (B, T)),
                    index=torch.randint(0, T, (B, T)),
                ),
            ):
                got = emulator.noisy_embedding(ids, weight, 5.0, seed, **options)
                assert torch.equal(got, reference.noisy_embedding(ids, weight, 5.0, seed, **options)), (
                    f"uniform noise {dtype} {B, T, C}"
                )
                got = emulator.noisy_embedding(ids, weight, 5.0, seed, **options, distribution="gaussian")
                right = reference.noisy_embedding(ids, weight.double(), 5.0, seed, **options, distribution="gaussian")
                assert (got.double() - right).norm() <= 2 * UNIT[dtype] * right.norm() + 1e-6, (
                    f"Gaussian noise {dtype} {B, T, C}"
                )
            g = torch.randn(B, T, C).to(dtype)
            same(
                emulator.noisy_embedding_backward(g, ids, V),
                lambda g: reference.noisy_embedding_backward(g, ids, V),
                dtype,
                g,
                what=f"dweight {B, T, C}",
            )
    ids = torch.tensor([[0, 11, -1, 2]])
    got = emulator.noisy_embedding(ids, weight, 5.0, seed)
    assert got[0, 1:3].isnan().all() and got[0, ::3].isfinite().all(), (
        "ids that name no row must make NaN, and nothing else"
    )
    emulator.noisy_embedding_backward(rows(1, 4, 264, F16).contiguous(), ids, V)


def run(emulator, prefix: str = "", order: str = "forward", seed: int = 1) -> None:
    """Every check whose name starts with `prefix`, from the same random numbers."""
    for name, function in CHECKS.items():
        if name.startswith(prefix):
            torch.manual_seed(0)
            emulator.order(order, seed)
            function(emulator)
