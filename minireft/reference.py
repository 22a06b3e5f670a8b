"""Every kernel's formula in plain PyTorch, forward and backward: the oracle the compiled kernels are proved against.
Call them like minireft.ops (one signature each), or force them with `minireft.ops.use("reference")`.
Each computes in float32 (float64 for float64 input) and rounds once, to the dtype of the activations.

Shapes: B batch, T tokens, C width, r rank, P positions, K banks (one per task), V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- the low-rank edit h + Aᵀ(D h + b): LoReFT (D = W − R, A = R), DiReFT (D = W₁, A = W₂) -------------------------


def low_rank_edit(h: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """h + (h downᵀ + bias) up, on every row.  h (..., C), down and up (r, C), bias (r,) → (..., C).

    ReFT, Wu et al. 2024, equation 2 with down = W − R and up = R.
    """
    x, down, up, bias = _wide(h, down, up, bias)
    return (x + (x @ down.T + bias) @ up).to(h.dtype)                                          # (..., C)


def low_rank_edit_backward(g: Tensor, h: Tensor, down: Tensor, up: Tensor, bias: Tensor):
    """Gradients of `low_rank_edit` for g = ∂L/∂out, by hand: returns dh, ddown, dup, dbias."""
    g_wide, x, D, A, b = _wide(g, h, down, up, bias)
    g_wide, x = g_wide.reshape(-1, g.shape[-1]), x.reshape(-1, g.shape[-1])                    # (N, C) each
    delta = x @ D.T + b                                                                        # (N, r)
    u = g_wide @ A.T                                                                           # (N, r)
    dh = g_wide + u @ D                                                                        # (N, C)
    return (dh.view(h.shape).to(h.dtype), (u.T @ x).to(down.dtype), (delta.T @ g_wide).to(up.dtype),
            u.sum(0).to(bias.dtype))


def low_rank_edit_at(h: Tensor, positions: Tensor, down: Tensor, up: Tensor, bias: Tensor, tasks: Tensor | None = None):
    """The same edit at selected positions only; every other row of the result is h, to the bit.

    h (B, T, C); positions (B, P) int64, −1 = none, otherwise distinct within a row.  Without tasks the weights are
    (r, C), (r, C), (r,); with tasks (B,) or (B, P) int64, −1 = none, they are banks (K, r, C), (K, r, C), (K, r).
    """
    check_positions(positions, h.shape[1])
    rows, active = _rows(h, positions, tasks)                                                  # (B, P) each
    B, T, C = h.shape
    flat = torch.cat([h.reshape(B * T, C), h.new_zeros(1, C)])                # the last row takes what is edited nowhere
    x, down, up, bias = _wide(flat[rows], *_banks(positions, tasks, down, up, bias))
    delta = torch.einsum("bpc,bprc->bpr", x, down) + bias                                      # (B, P, r)
    edited = (x + torch.einsum("bpr,bprc->bpc", delta, up)).to(h.dtype)                        # (B, P, C)
    index = rows.reshape(-1, 1).expand(-1, C)                                                  # (BP, C)
    return flat.scatter(0, index, edited.reshape(-1, C))[:-1].view(B, T, C)


def low_rank_edit_at_backward(g: Tensor, h: Tensor, positions: Tensor, down: Tensor, up: Tensor, bias: Tensor,
                              tasks: Tensor | None = None):
    """Gradients of `low_rank_edit_at` by hand: returns dh, ddown, dup, dbias.  Only the edited rows of h are read."""
    rows, active = _rows(h, positions, tasks)                                                  # (B, P) each
    B, T, C = h.shape
    keep = active.reshape(-1)                                                                  # (BP,)
    rows = rows.reshape(-1)[keep]                                                              # (N,)
    dh, ddown, dup, dbias = g.reshape(B * T, C).clone(), *map(torch.zeros_like, (down, up, bias))
    x, g = h.reshape(B * T, C)[rows], dh[rows]                                                 # (N, C) each
    if tasks is None:
        dh[rows], ddown, dup, dbias = low_rank_edit_backward(g, x, down, up, bias)
    else:
        task = _per_position(positions, tasks).reshape(-1)[keep]                               # (N,)
        for k in task.unique().tolist():
            mine = task == k
            dh[rows[mine]], ddown[k], dup[k], dbias[k] = low_rank_edit_backward(g[mine], x[mine], down[k], up[k], bias[k])
    return dh.view(h.shape), ddown, dup, dbias


def low_rank_edit_at_(h: Tensor, positions: Tensor, down: Tensor, up: Tensor, bias: Tensor,
                      tasks: Tensor | None = None) -> Tensor:
    """`low_rank_edit_at`, written over h; returns h."""
    return h.copy_(low_rank_edit_at(h, positions, down, up, bias, tasks))


# ---- (IA)³: element-wise scales, alone and behind an activation ----------------------------------------------------


def scale(x: Tensor, l: Tensor, tasks: Tensor | None = None) -> Tensor:
    """l ⊙ x.  x (..., C), l (C,); with tasks (B,), −1 = untouched, x is (B, ..., C) and l a bank (K, C).

    (IA)³, Liu et al. 2022, section 3.3: l_k ⊙ K and l_v ⊙ V.
    """
    return (_wide(x) * _vector(x, l, tasks)).to(x.dtype)


def scale_pair(x: Tensor, y: Tensor, l_x: Tensor, l_y: Tensor, tasks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(l_x ⊙ x, l_y ⊙ y): keys and values, two views of one packed projection or not.  Shapes as in `scale`."""
    return scale(x, l_x, tasks), scale(y, l_y, tasks)


def gelu_scale(u: Tensor, l: Tensor, tasks: Tensor | None = None, approximate: str = "none") -> Tensor:
    """l ⊙ gelu(u), the scale after the non-linearity.  Shapes as in `scale`; approximate "none" (erf) or "tanh"."""
    return (F.gelu(_wide(u), approximate=approximate) * _vector(u, l, tasks)).to(u.dtype)


def swiglu_scale(gate: Tensor, up: Tensor, l: Tensor, tasks: Tensor | None = None) -> Tensor:
    """l ⊙ silu(gate) ⊙ up, the scale in a gated feed-forward.  gate and up (..., C); the rest as in `scale`."""
    return (F.silu(_wide(gate)) * _wide(up) * _vector(gate, l, tasks)).to(gate.dtype)


def scale_backward(g: Tensor, x: Tensor, l: Tensor, tasks: Tensor | None = None):
    """Gradients of `scale` by hand: returns dx, dl."""
    g_wide, x_wide = _wide(g, x)
    return (g_wide * _vector(x, l, tasks)).to(x.dtype), _sum_to(g_wide * x_wide, l, tasks)


def gelu_scale_backward(g: Tensor, u: Tensor, l: Tensor, tasks: Tensor | None = None, approximate: str = "none"):
    """Gradients of `gelu_scale` by hand, the activation recomputed: returns du, dl."""
    g_wide, x = _wide(g, u)
    if approximate == "none":
        cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        slope = cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    else:
        a, b = math.sqrt(2 / math.pi), 0.044715
        tanh = torch.tanh(a * (x + b * x ** 3))
        cdf = 0.5 * (1 + tanh)
        slope = cdf + 0.5 * x * (1 - tanh * tanh) * a * (1 + 3 * b * x * x)
    return (g_wide * _vector(u, l, tasks) * slope).to(u.dtype), _sum_to(g_wide * x * cdf, l, tasks)


def swiglu_scale_backward(g: Tensor, gate: Tensor, up: Tensor, l: Tensor, tasks: Tensor | None = None):
    """Gradients of `swiglu_scale` by hand, the activation recomputed: returns dgate, dup, dl."""
    g_wide, a, b = _wide(g, gate, up)
    sigmoid = torch.sigmoid(a)
    silu, slope = a * sigmoid, sigmoid * (1 + a * (1 - sigmoid))
    gl = g_wide * _vector(gate, l, tasks)
    return (gl * b * slope).to(gate.dtype), (gl * silu).to(up.dtype), _sum_to(g_wide * silu * b, l, tasks)


# ---- NEFTune: the embedding with noise from a counter, not from a state --------------------------------------------


def noisy_embedding(ids: Tensor, weight: Tensor, alpha: float, seed: Tensor | int, lengths: Tensor | None = None,
                    rows: Tensor | None = None, index: Tensor | None = None, distribution: str = "uniform") -> Tensor:
    """weight[ids] + α/√(length·C) ε.  ids (B, T) int64, weight (V, C) → (B, T, C) in weight's dtype.

    ε ~ U[−1, 1] or N(0, 1) is a function of (seed, step, row id, token index, channel) alone, so that padding, packing,
    micro-batches and ranks do not change it.  seed: int64 (2,) = (seed, step), or an int (step 0).
    lengths: None = T; (B,) = the row's real length, noise only where 0 ≤ index < length; (B, T) = the length of each
    token's own document, 0 = no noise.  rows (B,) or (B, T): the id of the example or document, default 0 … B−1.
    index (B, T): the token's index within its document, default 0 … T−1.
    NEFTune, Jain et al. 2023, algorithm 1.
    """
    B, T = ids.shape
    C, device, wide = weight.shape[1], ids.device, torch.promote_types(weight.dtype, torch.float32)
    index = torch.arange(T, device=device).expand(B, T) if index is None else index            # (B, T)
    rows = torch.arange(B, device=device) if rows is None else rows
    rows = (rows[:, None] if rows.dim() == 1 else rows).expand(B, T)                           # (B, T)
    if lengths is None:
        lengths = torch.full((B, T), T, device=device)
    elif lengths.dim() == 1:                                       # outside 0 … length − 1 there is only padding
        lengths = torch.where((index >= 0) & (index < lengths[:, None]), lengths[:, None], 0)
    eps = philox_noise(seed, rows, index, C, distribution)                                     # (B, T, C) float32
    # Each operation rounds to float32 by itself, in this order: every backend agrees to the bit (uniform).
    root = (lengths.clamp(min=1) * C).float().double().sqrt().float()   # torch's float32 sqrt is not correctly rounded on CPU
    scale = torch.full((), alpha, dtype=torch.float32, device=device) / root                   # (B, T)
    x = F.embedding(ids, weight).to(wide)                                                      # (B, T, C)
    noisy = x + scale[..., None] * eps
    return torch.where(lengths[..., None] > 0, noisy, x).to(weight.dtype)


def noisy_embedding_backward(g: Tensor, ids: Tensor, vocab: int) -> Tensor:
    """The gradient of the embedding's weight; the noise has none.  g (B, T, C), ids (B, T) → (V, C)."""
    flat = _wide(g).reshape(-1, g.shape[-1])                                                   # (BT, C)
    return flat.new_zeros(vocab, g.shape[-1]).index_add(0, ids.reshape(-1), flat).to(g.dtype)


def philox_noise(seed: Tensor | int, rows: Tensor, index: Tensor, C: int, distribution: str = "uniform") -> Tensor:
    """ε for every token and channel.  rows and index (B, T) → (B, T, C) float32.

    Philox4x32-10 (Salmon et al. 2011): key = (seed, step), counter = (row low, row high, index, channel // 4), each the
    low 32 bits; word channel % 4 becomes the channel's number.  Uniform: (k + ½)·2⁻²³ with k the word's top 24 bits,
    signed, so that ε is symmetric, inside (−1, 1) and exact in float32.  Normal: Box–Muller on the words' two pairs.
    """
    seed = torch.tensor([seed, 0]) if isinstance(seed, int) else seed
    blocks = torch.arange((C + 3) // 4, device=rows.device)                                    # (C/4,)
    shape = (*rows.shape, len(blocks))
    counter = [c.expand(shape) for c in (rows[..., None], rows[..., None] >> 32, index[..., None], blocks)]
    words = torch.stack(philox(counter, list(seed.to(rows.device))), -1)                       # (B, T, C/4, 4) in 0 … 2³²−1
    if distribution == "uniform":
        top = ((words + 2 ** 31) % 2 ** 32 - 2 ** 31) >> 8                                     # signed 24 bits
        eps = (top.float() + 0.5) * 2.0 ** -23
    else:
        top = (words >> 8).float()
        radius = (-2 * ((top[..., 0::2] + 1) * 2.0 ** -24).log()).sqrt()                       # (B, T, C/4, 2)
        angle = top[..., 1::2] * (2 * math.pi * 2.0 ** -24)
        eps = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)                    # (B, T, C/4, 2, 2)
    return eps.reshape(*rows.shape, 4 * len(blocks))[..., :C]


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words: four counters and two keys to four random words."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = (c & mask for c in counter)
    k0, k1 = (k & mask for k in key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2             # 64-bit products, wrapping; the shift below is then masked
        c0, c1, c2, c3 = (p1 >> 32 & mask) ^ c1 ^ k0, p1 & mask, (p0 >> 32 & mask) ^ c3 ^ k1, p0 & mask
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return [c0, c1, c2, c3]


# ---- helpers ------------------------------------------------------------------------------------------------------


def check_positions(positions: Tensor, T: int) -> None:
    """Raise ValueError on a position outside −1 … T−1 or named twice in a row.  CPU only: elsewhere it would wait."""
    if positions.numel() == 0 or positions.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = positions.min().item(), positions.max().item()
    if low < -1 or high >= T:
        raise ValueError(f"positions must lie in −1 … {T - 1}, got {low if low < -1 else high}")
    ordered = positions.sort(dim=1).values                                                     # (B, P)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        b, p = twice.nonzero()[0].tolist()
        raise ValueError(f"positions must be distinct within a row, got {ordered[b, p + 1].item()} twice in row {b}")


def _wide(*tensors: Tensor):
    """The tensors in the dtype of the arithmetic: float32, or float64 where the first of them is."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    wide = [t.to(dtype) for t in tensors]
    return wide if len(wide) > 1 else wide[0]


def _per_position(positions: Tensor, tasks: Tensor) -> Tensor:
    return (tasks[:, None] if tasks.dim() == 1 else tasks).expand_as(positions)                # (B, P)


def _rows(h: Tensor, positions: Tensor, tasks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions as rows of h.view(B·T, C), B·T where nothing is edited; and where something is.  (B, P) each."""
    B, T, _ = h.shape
    active = positions >= 0
    if tasks is not None:
        active = active & (_per_position(positions, tasks) >= 0)
    return torch.where(active, positions + T * torch.arange(B, device=h.device)[:, None], B * T), active


def _banks(positions: Tensor, tasks: Tensor | None, *weights: Tensor):
    """Each weight for each position, (B, P, r, C) or (B, P, r): copies, since an oracle may be wasteful."""
    if tasks is None:
        return [w.expand(*positions.shape, *w.shape) for w in weights]
    return [w[_per_position(positions, tasks).clamp(min=0)] for w in weights]


def _vector(x: Tensor, l: Tensor, tasks: Tensor | None) -> Tensor:
    """l in the dtype of the arithmetic, chosen per batch row where there are tasks: broadcasts against x."""
    l = l.to(torch.promote_types(x.dtype, torch.float32))
    if tasks is None:
        return l                                                                               # (C,)
    chosen = torch.where((tasks >= 0)[:, None], l[tasks.clamp(min=0)], 1)                      # (B, C)
    return chosen.view(len(tasks), *[1] * (x.dim() - 2), l.shape[1])


def _sum_to(products: Tensor, l: Tensor, tasks: Tensor | None) -> Tensor:
    """The gradient of l from g ⊙ ∂out/∂l: summed over all rows, or over the rows of each task."""
    if tasks is None:
        return products.flatten(0, -2).sum(0).to(l.dtype)                                      # (C,)
    per_row = products.reshape(len(tasks), math.prod(products.shape[1:-1]), l.shape[1]).sum(1)    # (B, C)
    onto = torch.where(tasks >= 0, tasks, len(l))                                              # (B,)
    return per_row.new_zeros(len(l) + 1, l.shape[1]).index_add(0, onto, per_row)[:-1].to(l.dtype)
