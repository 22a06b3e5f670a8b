"""The fused operations of the three methods: the same signatures as minireft.reference, on whichever backend is there.
Call them anywhere; `ops.backends()` says what is compiled in, `ops.use("reference")` forces one, `ops.use(None)` frees it.
You should see the low-rank edit outrun addmm(h, D h + b, A) on many rows; benchmarks/results says where not.

Autocast: results have the dtype of the activations given; float32 parameters stay float32.  torch.compile: no graph break.
vmap and torch.func: the formula in plain PyTorch, which vectorises it.  No second derivatives: asking for one is an error.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

from . import reference

ACTIVATIONS = {"identity": 0, "gelu": 1, "gelu_tanh": 2, "swiglu": 3}      # the order of csrc/launchers.h
_OPERATIONS = ("low_rank_edit", "low_rank_edit_backward", "low_rank_edit_at", "low_rank_edit_at_", "low_rank_edit_at_backward",
               "scale", "scale_backward", "scale_pair", "scale_pair_backward", "noisy_embedding", "noisy_embedding_backward")


def _load() -> dict[str, dict]:
    """The compiled operations by library: "minireft" (CPU and CUDA) and "minireft_emulator"; none without a build."""
    library = Path(__file__).with_name("_kernels.so")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        why = str(error).splitlines()[0] if library.exists() else "they were not built"
        warnings.warn_explicit(f"running on plain PyTorch, without the kernels: {why}; `minireft doctor` says what to do",
                               RuntimeWarning, "minireft", 0)             # no place in the code to show: one line
        return {}
    return {library: {name: getattr(getattr(torch.ops, library), name).default for name in _OPERATIONS}
            for library in ("minireft", "minireft_emulator") if hasattr(getattr(torch.ops, library), "scale")}


_libraries = _load()
_cuda_built = bool(_libraries) and torch._C._dispatch_has_kernel_for_dispatch_key("minireft::scale", "CUDA")
_forced: str | None = None


def backends() -> dict[str, bool]:
    """What can run here: {"cpu": …, "cuda": …, "emulator": …}; "reference" always can."""
    return {"cpu": "minireft" in _libraries, "cuda": _cuda_built and torch.cuda.is_available(),
            "emulator": "minireft_emulator" in _libraries}


class use:
    """Force a backend: "reference", "cpu", "cuda" or "emulator"; None chooses by device again.

    A statement, `ops.use("reference")`, or a context manager, `with ops.use("emulator"): ...`.
    """

    def __init__(self, name: str | None):
        global _forced
        available = ["reference"] + [n for n, there in backends().items() if there]
        if name is not None and name not in available:
            raise ValueError(f"backend must be one of {', '.join(available)} or None, got {name!r}")
        self.previous, _forced = _forced, name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        global _forced
        _forced = self.previous


def _library(x: Tensor) -> str | None:
    """The library that serves x, None for the reference: by device, or as `use` says.  float64 exists on the CPU only."""
    device = x.device.type
    if _forced is None:
        if device in ("cpu", "meta"):                                     # on meta the kernels' shapes, as memory.py wants them
            library = "minireft" if _libraries else None
        else:
            library = "minireft" if device == "cuda" and _cuda_built and x.dtype is not torch.float64 else None
    elif _forced == "reference":
        return None
    elif _forced == "emulator":
        library = "minireft_emulator" if device == "cpu" and x.dtype is not torch.float64 else None
    elif device == _forced:
        library = "minireft" if device == "cpu" or x.dtype is not torch.float64 else None
    else:
        raise ValueError(f"backend {_forced!r} is forced by ops.use, but the tensor is on {device}")
    return None if library and torch._C._are_functorch_transforms_active() else library


def _weights(h: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Weights as the kernels take them: all in h's dtype or all float32 (float64 with float64)."""
    first = weights[0].dtype
    fits = first is h.dtype or first is torch.float32 and h.dtype is not torch.float64
    if fits and all(w.dtype is first for w in weights):
        return weights
    wide = torch.promote_types(h.dtype, torch.float32)
    return tuple(w.to(wide) if w.is_floating_point() else w for w in weights)                # integers: the kernels refuse them


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """b as another tensor than a: torch.compile cannot trace an autograd.Function that is given one tensor twice."""
    return b.view_as(b) if a is b else b


def _tracked(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _first_derivative(backward):
    """backward as it is, but an error where its own gradient is asked for: it would be wrong in silence."""
    @functools.wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError('minireft\'s kernels have no second derivatives: leave create_graph out, or ops.use("reference")')
        return backward(ctx, *gradients)
    return checked


def _plainly(formula, *arguments):
    """The reference, with its arithmetic kept out of autocast's hands."""
    device = arguments[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):         # torch knows no autocast there
        return formula(*arguments)
    with torch.autocast(device, enabled=False):
        return formula(*arguments)


# ---- low-rank edit -------------------------------------------------------------------------------------------------


def low_rank_edit(h: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """h + (h downᵀ + bias) up, on every row.  h (..., C), down and up (r, C), bias (r,) → (..., C), contiguous.

    Equal to `torch.addmm(h, torch.addmm(bias, h, down.T), up)` for h (N, C), in one pass over memory.  On a CPU that
    multiplies pairs of bfloat16, every edit rounds float32 weights of bfloat16 rows, as addmm does.
    Raises ValueError naming the argument when a shape, dtype or device does not fit.
    """
    library = _library(h)
    if library is None:
        _check_edit(h, down, up, bias)
        return _plainly(reference.low_rank_edit, h, down, up, bias)
    down, up, bias = _weights(h, down, up, bias)
    if _tracked(h, down, up, bias):
        return _LowRankEdit.apply(library, h, down, _apart(down, up), bias)
    return _libraries[library]["low_rank_edit"](h, down, up, bias)[0]


class _LowRankEdit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, h, down, up, bias):
        out, delta = _libraries[library]["low_rank_edit"](h, down, up, bias)
        ctx.library = library
        ctx.save_for_backward(h, delta, down, up)
        return out

    @staticmethod
    @_first_derivative
    def backward(ctx, g):
        wanted = ctx.needs_input_grad
        gradients = _libraries[ctx.library]["low_rank_edit_backward"](g, *ctx.saved_tensors, wanted[1], any(wanted[2:]))
        return None, *_where(wanted[1:], gradients)


def low_rank_edit_at(h: Tensor, positions: Tensor, down: Tensor, up: Tensor, bias: Tensor, tasks: Tensor | None = None):
    """The same edit at selected positions; every other row of the result is h, to the bit.

    h (B, T, C); positions (B, P) int64, −1 = none, otherwise distinct within a row.  Without tasks the weights are
    (r, C), (r, C), (r,); with tasks (B,) or (B, P) int64, −1 = none, they are banks (K, r, C), (K, r, C), (K, r).
    Raises ValueError for what does not fit, and on the CPU for positions or tasks out of range or named twice.  On CUDA,
    where looking would mean waiting: a position out of range counts as −1, of equal ones the first counts, and a task out
    of range makes its rows NaN.
    """
    library = _library(h)
    if library is None:
        _check_edit_at(h, positions, down, up, bias, tasks)
        return _plainly(reference.low_rank_edit_at, h, positions, down, up, bias, tasks)
    down, up, bias = _weights(h, down, up, bias)
    if _tracked(h, down, up, bias):
        return _LowRankEditAt.apply(library, False, h, positions, down, _apart(down, up), bias, tasks)
    return _libraries[library]["low_rank_edit_at"](h, positions, down, up, bias, tasks, False)[0]


def low_rank_edit_at_(h: Tensor, positions: Tensor, down: Tensor, up: Tensor, bias: Tensor, tasks: Tensor | None = None):
    """`low_rank_edit_at`, written over h; returns h.  Only the edited rows are read, written and kept for backward.

    Raises ValueError if h is a leaf that requires grad or a view of one, is expanded, or has a last stride other than 1.
    A view is edited by way of a copy while gradients are tracked: any stride then, and PyTorch's own RuntimeError where it
    allows no edit, such as for one of several views from `chunk`.
    """
    tracked = _tracked(h, down, up, bias)
    view = tracked and not torch.compiler.is_compiling() and h._is_view()
    whole = h._base if view else h
    if tracked and whole.requires_grad and whole.is_leaf:
        raise ValueError("h must not be a leaf that requires grad, or a view of one, since it is edited in place: use low_rank_edit_at")
    library = _library(h)
    if library is None:
        _check_edit_at(h, positions, down, up, bias, tasks)
        return _plainly(reference.low_rank_edit_at_, h, positions, down, up, bias, tasks)
    if view:                                  # copy_ knows the rules for views, before it writes; a compiler takes care of them
        return h.copy_(low_rank_edit_at(h, positions, down, up, bias, tasks))
    down, up, bias = _weights(h, down, up, bias)
    if tracked:
        return _LowRankEditAt.apply(library, True, h, positions, down, _apart(down, up), bias, tasks)
    _libraries[library]["low_rank_edit_at_"](h, positions, down, up, bias, tasks, False)
    return h


class _LowRankEditAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, in_place, h, positions, down, up, bias, tasks):
        if in_place:
            rows, delta = _libraries[library]["low_rank_edit_at_"](h, positions, down, up, bias, tasks, True)
            out = h
            ctx.mark_dirty(h)
        else:
            out, rows, delta = _libraries[library]["low_rank_edit_at"](h, positions, down, up, bias, tasks, True)
        ctx.library = library
        ctx.save_for_backward(rows, delta, positions, down, up, tasks)
        return out

    @staticmethod
    @_first_derivative
    def backward(ctx, g):
        h, _, *weights = wanted = ctx.needs_input_grad[2:7]
        dh, *gradients = _where(
            (h, *weights), _libraries[ctx.library]["low_rank_edit_at_backward"](g, *ctx.saved_tensors, h, any(weights)))
        return None, None, dh, None, *gradients, None


def _where(wanted, gradients):
    return [gradient if wants else None for wants, gradient in zip(wanted, gradients)]


# ---- (IA)³ ---------------------------------------------------------------------------------------------------------


def scale(x: Tensor, l: Tensor, tasks: Tensor | None = None) -> Tensor:
    """l ⊙ x.  x (..., C), l (C,); with tasks (B,) int64, −1 = untouched, x is (B, ..., C) and l a bank (K, C)."""
    return _scale("identity", x, None, l, tasks)


def gelu_scale(u: Tensor, l: Tensor, tasks: Tensor | None = None, approximate: str = "none") -> Tensor:
    """l ⊙ gelu(u), equal to `l * torch.nn.functional.gelu(u, approximate=approximate)`.  Shapes as in `scale`."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return _scale("gelu" if approximate == "none" else "gelu_tanh", u, None, l, tasks)


def swiglu_scale(gate: Tensor, up: Tensor, l: Tensor, tasks: Tensor | None = None) -> Tensor:
    """l ⊙ silu(gate) ⊙ up, equal to `l * torch.nn.functional.silu(gate) * up`.  gate and up (..., C); else as in `scale`."""
    return _scale("swiglu", gate, up, l, tasks)


def _scale(activation: str, x: Tensor, up: Tensor | None, l: Tensor, tasks: Tensor | None) -> Tensor:
    library = _library(x)
    if library is None:
        _check_scale(x, up, l, tasks, {"identity": "x", "swiglu": "gate"}.get(activation, "u"))
        return _plainly({"identity": reference.scale, "gelu": reference.gelu_scale, "swiglu": reference.swiglu_scale,
                         "gelu_tanh": lambda *a: reference.gelu_scale(*a, approximate="tanh")}[activation],
                        x, *([] if up is None else [up]), l, tasks)
    (l,) = _weights(x, l)
    if _tracked(x, l) or up is not None and _tracked(up):
        return _Scale.apply(library, ACTIVATIONS[activation], x, up if up is None else _apart(x, up), l, tasks)
    return _libraries[library]["scale"](x, up, l, tasks, ACTIVATIONS[activation])


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, activation, x, up, l, tasks):
        ctx.library, ctx.activation = library, activation
        ctx.save_for_backward(x, up, l, tasks)
        return _libraries[library]["scale"](x, up, l, tasks, activation)

    @staticmethod
    @_first_derivative
    def backward(ctx, g):
        wanted = ctx.needs_input_grad[2:5]
        gradients = _libraries[ctx.library]["scale_backward"](g, *ctx.saved_tensors, ctx.activation, wanted[2])
        return None, None, *_where(wanted, gradients), None


def scale_pair(x: Tensor, y: Tensor, l_x: Tensor, l_y: Tensor, tasks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(l_x ⊙ x, l_y ⊙ y) in one launch: keys and values, views of one packed projection or not.  Shapes as in `scale`."""
    library = _library(x)
    if library is None:
        _check_pair(x, y, l_x, l_y, tasks)
        return _plainly(reference.scale_pair, x, y, l_x, l_y, tasks)
    l_x, l_y = _weights(x, l_x, l_y)
    if _tracked(x, y, l_x, l_y):
        return _ScalePair.apply(library, x, _apart(x, y), l_x, _apart(l_x, l_y), tasks)
    return _libraries[library]["scale_pair"](x, y, l_x, l_y, tasks)


class _ScalePair(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, x, y, l_x, l_y, tasks):
        ctx.library = library
        ctx.save_for_backward(x, y, l_x, l_y, tasks)
        return _libraries[library]["scale_pair"](x, y, l_x, l_y, tasks)

    @staticmethod
    @_first_derivative
    def backward(ctx, g_x, g_y):
        gradients = _libraries[ctx.library]["scale_pair_backward"](g_x, g_y, *ctx.saved_tensors)
        return None, *_where(ctx.needs_input_grad[1:5], gradients), None


# ---- NEFTune -------------------------------------------------------------------------------------------------------


def noisy_embedding(ids: Tensor, weight: Tensor, alpha: float, seed: Tensor | int, lengths: Tensor | None = None,
                    rows: Tensor | None = None, index: Tensor | None = None, distribution: str = "uniform") -> Tensor:
    """weight[ids] + α/√(length·C) ε in one pass.  ids (B, T) int64, weight (V, C) → (B, T, C); see reference for the rest.

    ε is a function of (seed, step, row id, token index, channel): seed is an int64 tensor (2,) = (seed, step), or an int.
    Raises ValueError for what does not fit, and on the CPU for ids out of range; on CUDA such an id makes its row NaN.
    """
    if distribution not in ("uniform", "gaussian"):
        raise ValueError(f"distribution must be 'uniform' or 'gaussian', got {distribution!r}")
    if isinstance(seed, int):
        seed = torch.tensor([seed, 0], device=ids.device)
    library = _library(weight)
    if library is None:
        _check_noise(ids, weight, seed, lengths, rows, index)
        return _plainly(reference.noisy_embedding, ids, weight, alpha, seed, lengths, rows, index, distribution)
    arguments = (ids, weight, float(alpha), seed, lengths, rows, index, distribution == "gaussian")
    return _NoisyEmbedding.apply(library, *arguments) if _tracked(weight) else _libraries[library]["noisy_embedding"](*arguments)


class _NoisyEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, ids, weight, *arguments):
        ctx.library, ctx.vocab = library, weight.shape[0]
        ctx.save_for_backward(ids)
        return _libraries[library]["noisy_embedding"](ids, weight, *arguments)

    @staticmethod
    @_first_derivative
    def backward(ctx, g):
        (ids,) = ctx.saved_tensors
        order = ids.reshape(-1).argsort(stable=True)                       # (BT,): equal ids add up in their own order
        return None, None, _libraries[ctx.library]["noisy_embedding_backward"](g, ids, order, ctx.vocab), *[None] * 6


# ---- what torch.compile and torch.vmap ask of the compiled operations ----------------------------------------------


def _new(like: Tensor, *sizes, wide: bool = False) -> Tensor:
    return like.new_empty(sizes, dtype=torch.promote_types(like.dtype, torch.float32) if wide else like.dtype)


def _register(library: str) -> None:
    """Shapes and dtypes of every result, and a rule for vmap: run the functional ones once per example."""

    def fake(name):
        return torch.library.register_fake(f"{library}::{name}")

    @fake("low_rank_edit")
    def _(h, down, up, bias):
        _check_edit(h, down, up, bias)
        return _new(h, *h.shape), _new(h, h[..., 0].numel(), down.shape[0], wide=True)

    @fake("low_rank_edit_backward")
    def _(g, h, delta, down, up, want_h, want_weights):
        return _gradients(h, down, want_h, want_weights)

    @fake("low_rank_edit_at")
    def _(h, positions, down, up, bias, tasks, save):
        _check_edit_at(h, positions, down, up, bias, tasks)
        return _new(h, *h.shape), *saved(h, positions, down, save)

    @fake("low_rank_edit_at_")
    def _(h, positions, down, up, bias, tasks, save):
        _check_edit_at(h, positions, down, up, bias, tasks)
        return saved(h, positions, down, save)

    @fake("low_rank_edit_at_backward")
    def _(g, rows, delta, positions, down, up, tasks, want_h, want_weights):
        return _gradients(g, down, want_h, want_weights)

    def saved(h, positions, down, save):
        n = positions.shape[0] * positions.shape[1] if save else 0
        return _new(h, n, h.shape[2]), _new(h, n, down.shape[-2], wide=True)

    def _gradients(h, down, want_h, want_weights):
        wide, flat = (down.shape, down.shape[:-1]) if want_weights else ((0,), (0,))
        return _new(h, *(h.shape if want_h else (0,))), _new(down, *wide), _new(down, *wide), _new(down, *flat)

    @fake("scale")
    def _(x, up, l, tasks, activation):
        _check_scale(x, up, l, tasks)
        return _new(x, *x.shape)

    @fake("scale_backward")
    def _(g, x, up, l, tasks, activation, want_l):
        return _new(x, *x.shape), _new(x, *((0,) if up is None else x.shape)), _new(l, *(l.shape if want_l else (0,)))

    @fake("scale_pair")
    def _(x, y, l_x, l_y, tasks):
        _check_pair(x, y, l_x, l_y, tasks)
        return _new(x, *x.shape), _new(y, *y.shape)

    @fake("scale_pair_backward")
    def _(g_x, g_y, x, y, l_x, l_y, tasks):
        return tuple(_new(t, *t.shape) for t in (x, y, l_x, l_y))

    @fake("noisy_embedding")
    def _(ids, weight, alpha, seed, lengths, rows, index, normal):
        _check_noise(ids, weight, seed, lengths, rows, index)
        return _new(weight, *ids.shape, weight.shape[1])

    @fake("noisy_embedding_backward")
    def _(g, ids, order, vocab):
        return _new(g, vocab, g.shape[2])

    def one_by_one(operation):
        def rule(info, in_dims, *arguments):
            results = [operation(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims)))
                       for i in range(info.batch_size)]
            if isinstance(results[0], Tensor):
                return torch.stack(results), 0
            return tuple(map(torch.stack, zip(*results))), (0,) * len(results[0])
        return rule

    for name, operation in _libraries[library].items():
        if name != "low_rank_edit_at_":
            torch.library.register_vmap(f"{library}::{name}", one_by_one(operation))


for _name in _libraries:
    _register(_name)


# ---- checks in Python, for the reference and for compiling: the kernels make the same ones themselves -----------------


def _expect(name: str, tensor: Tensor, shape: tuple, like: Tensor) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")


def _expect_dtype(name: str, tensor: Tensor, of: str, like: Tensor) -> None:
    if tensor.dtype is not like.dtype:
        raise ValueError(f"{name} must have the dtype of {of}, {like.dtype}, got {tensor.dtype}")


def _expect_floats(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def _expect_index(name: str, tensor: Tensor | None, shapes: tuple, like: Tensor) -> None:
    if tensor is None:
        return
    if tensor.dtype is not torch.int64:
        raise ValueError(f"{name} must be int64, got {tensor.dtype}")
    _expect(name, tensor, shapes[tensor.dim() - 1] if 0 < tensor.dim() <= len(shapes) else shapes[0], like)


def _expect_range(name: str, tensor: Tensor | None, low: int, high: int) -> None:
    if tensor is None or tensor.device.type != "cpu" or not tensor.numel() or torch.compiler.is_compiling():
        return
    if not torch._C._are_functorch_transforms_active() and type(tensor) in (Tensor, torch.nn.Parameter):
        least, most = tensor.min().item(), tensor.max().item()
        if least < low or most >= high:
            raise ValueError(f"{name} must lie in {'−1' if low else '0'} … {high - 1}, got {least if least < low else most}")


def _check_edit(h, down, up, bias, banks: tuple = ()) -> None:
    _expect_floats(h=h, down=down, up=up, bias=bias)
    shape = "(K, r, C)" if banks else "(r, C)"
    if h.dim() < 1 or down.dim() != 2 + len(banks):
        raise ValueError(f"h must have shape (..., C) and down {shape}, got {tuple(h.shape)} and {tuple(down.shape)}")
    r, C = down.shape[-2], h.shape[-1]
    _expect("down", down, (*banks, r, C), h), _expect("up", up, (*banks, r, C), h), _expect("bias", bias, (*banks, r), h)


def _check_edit_at(h, positions, down, up, bias, tasks) -> None:
    if h.dim() != 3 or positions.dim() != 2:
        raise ValueError(f"h must have shape (B, T, C) and positions (B, P), got {tuple(h.shape)} and {tuple(positions.shape)}")
    (B, T, _), P = h.shape, positions.shape[1]
    _check_edit(h, down, up, bias, () if tasks is None else tuple(down.shape[:1]))
    _expect_index("positions", positions, ((B, P),), h), _expect_index("tasks", tasks, ((B,), (B, P)), h)
    _expect_range("tasks", tasks, -1, down.shape[0])


def _check_scale(x, up, l, tasks, name="x", name_l="l") -> None:
    _expect_floats(**{name: x, name_l: l})
    if x.dim() < (1 if tasks is None else 2) or l.dim() != (1 if tasks is None else 2):
        wanted = f"(..., C) and {name_l} (C,)" if tasks is None else f"(B, ..., C) and {name_l} (K, C)"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)} and {tuple(l.shape)}")
    _expect(name_l, l, (*l.shape[:-1], x.shape[-1]), x)
    if up is not None:
        _expect("up", up, x.shape, x), _expect_dtype("up", up, "gate", x)
    _expect_index("tasks", tasks, ((x.shape[0],),), x), _expect_range("tasks", tasks, -1, l.shape[0])


def _check_pair(x, y, l_x, l_y, tasks) -> None:
    _check_scale(x, None, l_x, tasks, "x", "l_x"), _check_scale(y, None, l_y, tasks, "y", "l_y")
    _expect("y", y, (*x.shape[:-1], y.shape[-1]), x), _expect("l_y", l_y, (*l_x.shape[:-1], y.shape[-1]), x)
    _expect_dtype("y", y, "x", x)


def _check_noise(ids, weight, seed, lengths, rows, index) -> None:
    _expect_floats(weight=weight)
    if ids.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"ids must have shape (B, T) and weight (V, C), got {tuple(ids.shape)} and {tuple(weight.shape)}")
    B, T = ids.shape
    _expect_index("ids", ids, ((B,), (B, T)), weight), _expect_index("seed", seed, ((2,),), weight)
    _expect_index("lengths", lengths, ((B,), (B, T)), weight), _expect_index("rows", rows, ((B,), (B, T)), weight)
    _expect_index("index", index, ((B, T),), weight), _expect_range("ids", ids, 0, weight.shape[0])
