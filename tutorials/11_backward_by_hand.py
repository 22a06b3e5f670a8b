# %% [markdown]
# # 11 · Backward by hand
#
# **What has to be computed, and what has to be moved, to train an edit: and which of the two takes the time?**
#
# *Before:* tutorial 3 (the edit's equation and its two matrices, exercise 1), the chain rule. *Time:* 40 minutes.
#
# Run it with `python tutorials/11_backward_by_hand.py`, step through it in a debugger, or open it as a notebook.
#
# LoReFT is computed as `out = h + Aᵀ(D h + b)`, with D = W − R and A = R: so said exercise 1 of tutorial 3. N rows h of
# C numbers each are edited; D and A are (r, C), b is (r,). Training needs the *gradients*: by how much the loss grows
# for each number of h, D, A and b. PyTorch's autograd finds them by itself. We want to know what it does.

# %%
import timeit

import torch

import minireft

torch.manual_seed(0)
torch.set_num_threads(1)
N, C, r = 6, 16, 3
h, D, A, b = (torch.randn(*shape, dtype=torch.double) for shape in ((N, C), (r, C), (r, C), (r,)))
out = h + (h @ D.T + b) @ A                                               # (N, C)
print("as the library computes it:", torch.allclose(out, minireft.reference.low_rank_edit(h, D, A, b)))
assert torch.allclose(out, minireft.reference.low_rank_edit(h, D, A, b))

# %% [markdown]
# ## On paper
#
# For one row, in two steps: `δ = D h + b`, r numbers; `out = h + Aᵀδ`. What reaches us from above is
# `g = ∂L/∂out`, C numbers for each row. Go back through the steps, the last one first:
#
# - out holds h as it is, and δ by way of Aᵀ. A number of δ goes into out with the weights of a row of A, so its
#   gradient collects g with the same weights: `u = A g`, r numbers.
# - δ holds h by way of D, so h's gradient is g, and u back through D: `dh = g + Dᵀu`.
# - b is in δ as it is, in every row: `db = Σ u`.
# - D_jc stands beside h_c in δ_j: `dD = Σ u hᵀ`. A_jc stands beside δ_j in out_c: `dA = Σ δ gᵀ`.
#
# Sums run over the rows, since all of them share D, A and b.
#
# **Predict:** which two of the five need h or δ from the forward pass, so that it has to be kept?

# %%
g = torch.randn(N, C, dtype=torch.double)                                 # (N, C) from above
delta = h @ D.T + b                                                       # (N, r)
u = g @ A.T                                                               # (N, r)
by_hand = {"dh": g + u @ D, "dD": u.T @ h, "dA": delta.T @ g, "db": u.sum(0)}                    # shapes of h, D, A, b
print({name: tuple(x.shape) for name, x in by_hand.items()})
assert [x.shape for x in by_hand.values()] == [x.shape for x in (h, D, A, b)]

# %% [markdown]
# dD and dA. Everything else comes from g and the weights.
#
# ## Three ways to check it
#
# First without any rule: push one number a little up and a little down, and see what the loss does. Take the loss
# L = Σ g · out, whose gradient with respect to out is g.
#
# **Predict:** to how many digits will the difference quotient agree, in double precision, with a push of 1e-6?

# %%
def loss(h, D, A, b):
    return (g * (h + (h @ D.T + b) @ A)).sum()

pushed, worst = torch.zeros_like(D), 0.0                                  # (r, C)
for j in range(r):
    for c in range(C):
        pushed.zero_()[j, c] = 1e-6
        slope = (loss(h, D + pushed, A, b) - loss(h, D - pushed, A, b)) / 2e-6
        worst = max(worst, abs(slope - by_hand["dD"][j, c]).item())
print(f"dD by pushing each of its {r * C} numbers: off by {worst:.0e} at most")
assert worst < 1e-6

# %% [markdown]
# Then against autograd, and against the library's own backward, `minireft.reference.low_rank_edit_backward`, which is
# these formulas and nothing else.
#
# **Predict:** how far apart, in double precision?

# %%
leaves = [x.clone().requires_grad_() for x in (h, D, A, b)]
autograd = torch.autograd.grad(loss(*leaves), leaves)
library = minireft.reference.low_rank_edit_backward(g, h, D, A, b)
for (name, ours), theirs, reference in zip(by_hand.items(), autograd, library):
    apart = (ours - theirs).abs().max(), (ours - reference).abs().max()
    print(f"{name}: from autograd's {apart[0]:.0e}, from the library's {apart[1]:.0e}")
    assert torch.allclose(ours, theirs, atol=1e-11) and torch.allclose(ours, reference, atol=1e-11)

# %% [markdown]
# Equal to rounding. And W and R themselves? D = W − R and A = R, so W reaches the loss by D alone, and R by both.
#
# **Predict:** dW and dR, from dD and dA. Mind the sign.

# %%
W, R = D + A, A                                                           # (r, C) both: D = W − R
leaves = [x.clone().requires_grad_() for x in (W, R)]
dW, dR = torch.autograd.grad((g * (h + (h @ leaves[0].T + b - h @ leaves[1].T) @ leaves[1])).sum(), leaves)
off = (dW - by_hand["dD"]).abs().max(), (dR - (by_hand["dA"] - by_hand["dD"])).abs().max()
print(f"dW is dD to {off[0]:.0e}, dR is dA - dD to {off[1]:.0e}")
assert torch.allclose(dW, by_hand["dD"]) and torch.allclose(dR, by_hand["dA"] - by_hand["dD"])

# %% [markdown]
# ## What is moved
#
# Arithmetic is one half. Every operation also reads its inputs from memory and writes its result. The unit is one
# reading or writing of all rows, N · C numbers: call it U. The weights, r rows, are nothing beside it.
#
# Below a counter looks at every operation that PyTorch runs, and adds up the bytes of its inputs and of its result.
# The equation *as it is written* takes: two products with h, then their combination (small), one product with R (a
# result as large as h), and one sum.
#
# **Predict:** how many U for the forward pass as it is written? What is the least that any program needs?

# %%
N, C, r = 4096, 1024, 4                                                   # U = 16 MiB
h, W, g = torch.randn(N, C), torch.randn(r, C) / C**0.5, torch.randn(N, C)
R, b = torch.linalg.qr(torch.randn(C, r)).Q.T.contiguous(), torch.zeros(r)
def as_written(h, W, R, b):
    return h + (h @ W.T + b - h @ R.T) @ R                                # (N, C)

def well_written(h, W, R, b):                                             # addmm(x, y, z) is x + y z, in one go
    return torch.addmm(h, torch.addmm(b, h, (W - R).T), R)                # (N, C)

print(f"U = {h.nbytes / 2**20:.0f} MiB, the weights {2 * R.nbytes / h.nbytes:.1%} of it")
assert torch.allclose(as_written(h, W, R, b), well_written(h, W, R, b), atol=1e-4)

# %%
from torch.utils._python_dispatch import TorchDispatchMode
class Moved(TorchDispatchMode):
    bytes = 0
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if not op.is_view and "detach" not in str(op):                    # a view moves nothing
            self.bytes += sum(x.nbytes for x in (*args, result) if isinstance(x, torch.Tensor))
        return result

with Moved() as one:
    h + g
print(f"a sum of two: {one.bytes / h.nbytes:.0f} U")
assert one.bytes == 3 * h.nbytes

# %%
moved = {}
for edit in (as_written, well_written):
    leaves = [x.clone().requires_grad_() for x in (h, W, R, b)]
    with Moved() as forward:
        result = edit(*leaves)                                            # (N, C)
    with Moved() as backward:
        torch.autograd.grad(result, leaves, g)
    moved[edit.__name__] = forward.bytes / h.nbytes, backward.bytes / h.nbytes
    print(f"{edit.__name__:13} forward {moved[edit.__name__][0]:.1f} U, backward {moved[edit.__name__][1]:.1f} U")
wanted = {"as_written": (6, 12), "well_written": (3, 7)}
assert all(abs(a - b) < 0.2 for name in moved for a, b in zip(moved[name], wanted[name]))

# %% [markdown]
# The least is two forward, h in and out out; and three backward: g and h in, dh out. Everything above it is the same
# row, carried to and fro. (And the 3 of `addmm` are what its signature says: inside, it first copies h into the
# result, and adds the product to that. That makes 5.)
#
# ## Does it matter? The roofline
#
# A machine has two limits: how many bytes it moves a second, and how many additions and multiplications it does.
# Measure both, on a longer h: turn the sign of all its numbers where they stand, and multiply two small matrices.
#
# **Predict:** how many operations could be done in the time in which *one number* of four bytes is moved?

# %%
def seconds(call, times=12):                                              # the best of some: a busy machine only adds
    return min(timeit.repeat(call, number=1, repeat=times))

h, square = torch.randn(4 * N, C), torch.randn(512, 512)                  # 64 MiB: more than most caches; 1 MiB
bandwidth = 2 * h.nbytes / seconds(lambda: h.neg_(), 20)
rate = 2 * 512**3 / seconds(lambda: square @ square, 100)
print(f"one thread of this machine: {bandwidth / 1e9:.0f} GB/s, {rate / 1e9:.0f} GFLOP/s")
print(f"{4 * rate / bandwidth:.0f} operations in the time of one number; the corner: {rate / bandwidth:.1f} a byte")
assert rate / bandwidth > 0.5

# %% [markdown]
# The edit does 4 r operations for each number of h: r multiplications and additions for δ, as many for Aᵀδ. Least bytes
# are eight, four in and four out. So its *intensity* is at most r / 2 operations a byte. Where intensity times
# bandwidth stays below the rate, memory is the limit, and the arithmetic is free.
#
# **Predict:** at r = 1, left of the corner or right of it? Which of the three below comes nearest to the roof:
# as written, well written, or the library's kernel, which walks over each row once?

# %%
def timed(rank):
    W, R, b = torch.randn(rank, C) / C**0.5, torch.linalg.qr(torch.randn(C, rank)).Q.T.contiguous(), torch.zeros(rank)
    D, rows, where = W - R, h[None], torch.arange(len(h))[None]           # (r, C), (1, N, C), (1, N)
    calls = {"as written": lambda: as_written(h, W, R, b), "well written": lambda: well_written(h, W, R, b),
             "kernel, in place": lambda: minireft.ops.low_rank_edit_at_(rows, where, D, R, b)}
    with torch.no_grad():
        return {name: 4 * rank * h.numel() / seconds(call, 5) for name, call in calls.items()}

speed = {rank: timed(rank) for rank in (1, 4, 16)}                        # rank → way → operations a second
for rank, ways in speed.items():
    print(f"r = {rank:2}: " + "   ".join(f"{name} {x / 1e9:.1f} GFLOP/s" for name, x in ways.items()))
assert not minireft.ops.backends()["cpu"] or all(w["kernel, in place"] > w["as written"] for w in speed.values())

# %%
# Picture: operations a second against operations a byte at least; the roof, and three ways at three ranks under it
import matplotlib.pyplot as plt
figure, axes = plt.subplots(figsize=(8, 4.4))
intensity = torch.logspace(-1, 1.5, 200)                                  # operations a byte
axes.plot(intensity, (intensity * bandwidth).clamp(max=rate) / 1e9, color="black", label="the roof")
for name, mark in (("kernel, in place", "o"), ("well written", "s"), ("as written", "^")):
    axes.plot([rank / 2 for rank in speed], [ways[name] / 1e9 for ways in speed.values()], mark + "-", label=name)
for rank in speed:
    axes.axvline(rank / 2, color="C3", lw=0.7, ls=":")
    axes.text(rank / 2 * 1.04, 0.02, f"r = {rank}", color="C3", transform=axes.get_xaxis_transform())
axes.set(xscale="log", yscale="log", xlabel="operations for each byte that must move", ylabel="GFLOP/s, one thread")
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# Under the sloping part of the roof memory sets the pace, and there what counts is how often a row is carried. The
# vertical distance between two marks is how many times longer one takes. `minireft.ops.low_rank_edit_at_` writes over
# h, so it needs no new memory for the result; the other two ask for 64 MiB at every step, and on a CPU memory that is
# touched for the first time is dearer than the arithmetic. (A mark above the roof means that the machine was busy with
# something else while the roof was measured.)
#
# ## Two changes to try
#
# - Count the bytes of `torch.compile(as_written)`: which U does a compiler save by itself?
# - Put N = 256, so that h fits into a core's cache. Which of the three gains most, and does the roof still hold?
#
# ## Exercises

# %% [markdown]
# ### 1 · Backward of a scale (10 minutes)
#
# (IA)³ multiplies: `out = l ⊙ x`, one number of l for each channel, for all rows. Write its backward.
#
# *Hint:* what does each number of l stand beside, and in how many rows?

# %%
def scale_backward(g, x, l):
    """g and x (N, C), l (C,) → dx (N, C), dl (C,)."""
    # solution
    return g * l, (g * x).sum(0)
    # end

# %%
torch.manual_seed(0)
x, l, g = torch.randn(5, 7).requires_grad_(), torch.randn(7).requires_grad_(), torch.randn(5, 7)
expected = torch.autograd.grad((g * (l * x)).sum(), (x, l))
found = scale_backward(g, x.detach(), l.detach())
assert found[1].shape == l.shape, "dl has one number a channel"
assert torch.allclose(found[0], expected[0], atol=1e-5), "dx is another"
assert torch.allclose(found[1], expected[1], atol=1e-5), "dl is another"

# %% [markdown]
# ### 2 · Count before you measure (8 minutes)
#
# Write `units`: the U that a chain of operations moves, each given as how many arrays of N · C numbers it reads and
# how many it writes; and how many it would move if all of them were one kernel that reads its own inputs once.
#
# *Hint:* fused, nothing between the first input and the last output touches memory, but what comes from outside does.

# %%
def units(chain):
    """chain: [(read from the chain, read from outside, written), ...]; the last one's result stays → (apart, fused)."""
    # solution
    apart = sum(sum(step) for step in chain)
    return apart, sum(outside for _, outside, _ in chain) + chain[-1][2]
    # end

# %%
swiglu = [(0, 1, 1), (1, 1, 1), (1, 0, 1)]                                # silu(gate); · up; · l, a vector
assert units(swiglu) == (7, 3), "silu(gate) · up · l: 7 U apart, 3 fused"
assert units([(0, 1, 1)]) == (2, 2), "a single operation cannot be fused with anything"
assert units([(0, 1, 1), (1, 0, 1), (1, 0, 1)]) == (6, 2), "three in a row on one input"

# %% [markdown]
# ## In three lines
#
# 1. Backward is the forward pass read from behind: `u = A g`, `dh = g + Dᵀu`, `dD = Σ u hᵀ`, `dA = Σ δ gᵀ`, `db = Σ u`.
# 2. Forward, all rows are read or written twice at least, backward three times; as commonly written, 6 and 12 times.
# 3. At small ranks the roof slopes: bytes are the time, and a kernel that carries each row once is all there is to win.
