# %% [markdown]
# # 5 · Keeping R orthonormal
#
# **The rows of R are to have length 1 and stand at right angles, after every step of training: how does one train such
# a matrix, and what can go wrong?**
#
# *Before:* tutorial 3 (R, W, b), the gradient step, matrix products. *Time:* 35 minutes.
#
# Run it with `python tutorials/05_keeping_r_orthonormal.py`, step through it in a debugger, or open it as a notebook.
#
# For this page R gets a task whose answer is known. Take the states of some reviews after block 3, and find the r
# directions that hold as much of them as possible: the share of their squared lengths that is left when only R h is
# kept. (It is called principal component analysis, and linear algebra knows the best share.)

# %%
import torch

import minireft
from minireft.reading import states
from minireft.tasks import few_shot

model, tokenizer = minireft.load("base")
C, r = model.config.width, 4
reviews = [tokenizer.encode(f"{e.prompt} {e.completion}") for e in few_shot.shots("mood", 0)[::3]]
h = torch.cat([states(model, torch.tensor([ids]), 3)[0] for ids in reviews])                     # (N, C)
h = h - h.mean(0)                                                         # (N, C)
squares = torch.linalg.svdvals(h).square()                                # (C,)
best = (squares[:r].sum() / squares.sum()).item()
print(f"{len(h)} states of {C} numbers; {r} directions hold {best:.1%} of them at best")

# %% [markdown]
# ## One step breaks it
#
# Start from random orthonormal rows, and let Adam climb: 60 steps.
#
# **Predict:** R is a plain parameter, and nobody looks after its rows. What share will it report?

# %%
def held(R):                                                              # (r, C) → the share of h along R's rows
    return (h @ R.T).square().sum() / h.square().sum()

def off(R):                                                               # how far from orthonormal the rows are
    return (R @ R.T - torch.eye(r)).abs().max().item()

torch.manual_seed(0)
start = torch.linalg.qr(torch.randn(C, r)).Q.T.contiguous()               # (r, C)
print(f"start: held {held(start):.1%}, off by {off(start):.1e}")
assert off(start) < 1e-6 and held(start) < 0.3

# %%
def climb(parameters, R_of, steps=60):                                    # → off after each step
    optimizer, way = torch.optim.Adam(parameters, lr=0.01), [off(R_of())]
    for _ in range(steps):
        optimizer.zero_grad()
        (-held(R_of())).backward()
        optimizer.step()
        way.append(off(R_of()))
    return way

plain = torch.nn.Parameter(start.clone())                                 # (r, C)
ways = {"plain R": climb([plain], lambda: plain)}
print(f"plain: held {held(plain):.0%} (!), off by {ways['plain R'][1]:.2f} after one step, {off(plain):.0f} after 60")
assert held(plain) > 5 and ways["plain R"][1] > 1e-3

# %% [markdown]
# Many times what there is: it has found no directions, it has made its rows long. With such an R the equation of
# tutorial 3 is not true any more: what is written along one row leaks into the others, and W h + b is not what stands
# there afterwards.
#
# The way out: train another matrix M, with nothing to keep, and *make* R from it in every step. The gradient goes
# through the making. Two recipes for it are on this page.
#
# ## Recipe 1: straighten the rows
#
# Everybody's first recipe is Gram and Schmidt's: take the rows of M one after the other; subtract from each what it has
# along those before; divide by its length.
#
# **Predict:** multiply M by 1000. What happens to R?

# %%
def gram_schmidt(M):                                                      # (r, C) → orthonormal rows (r, C)
    rows = []
    for row in M:                                                         # (C,)
        for before in rows:
            row = row - (row @ before) * before
        rows.append(row / row.norm())
    return torch.stack(rows)

M = torch.randn(r, C)
R = gram_schmidt(M)
print(f"off by {off(R):.1e}; 1000 M gives the same R: {torch.allclose(gram_schmidt(1000 * M), R, atol=1e-5)}")
assert off(R) < 1e-5 and torch.allclose(gram_schmidt(1000 * M), R, atol=1e-5)

# %% [markdown]
# The same R, since lengths are divided away. Look at what was done: row i of R is made of rows 0 … i of M. So M = L R,
# with a matrix L (r, r) that has zeros above its diagonal. Then M Mᵀ = L R Rᵀ Lᵀ = L Lᵀ, and R is gone from it. To
# split a matrix into such an L Lᵀ is the *Cholesky* factorisation, which every library has. So: the r × r matrix
# M Mᵀ, its L, and R = L⁻¹ M. No loop over rows, and all layers of a model in one call.
#
# **Predict:** is it the same R as Gram and Schmidt's, or another one with the same span?

# %%
from minireft.adapters.orthonormal import orthonormalise
L = torch.linalg.cholesky(M @ M.T)                                        # (r, r)
by_cholesky = torch.linalg.solve_triangular(L, M, upper=False)            # (r, C) is L⁻¹ M
same = [torch.allclose(by_cholesky, R, atol=1e-5), torch.allclose(orthonormalise(M), R, atol=1e-5)]
print("Gram and Schmidt's R by hand:", same[0], "  by the library:", same[1])
assert all(same)

# %% [markdown]
# The very same. `minireft.adapters.orthonormal.orthonormalise` is these two lines; only that it computes in float64
# inside, since M Mᵀ squares whatever is badly proportioned in M.
#
# ## Recipe 2: turn all of space
#
# The usual recipe, in PyTorch `torch.nn.utils.parametrizations.orthogonal`, is another. A *mirror* in C dimensions
# (Householder's) turns one direction v around and leaves all at right angles to it: H = I − 2 v vᵀ / ‖v‖². Products of
# mirrors keep every length and every angle. So start from a C × C matrix with orthonormal columns, `base`, multiply it
# by r mirrors, and take r columns: they *must* be orthonormal. What is trained is the r vectors v.
#
# PyTorch stores them below the diagonal of one matrix X (C, r), the diagonal itself being used for signs, ±1.
#
# **Predict:** for C = 128 and r = 4, R has 512 numbers. How many numbers does this recipe keep for it?

# %%
from torch.nn.utils.parametrizations import orthogonal
usual = orthogonal(torch.nn.Linear(C, r, bias=False))                     # usual.weight is R (r, C), made when read
X, base = usual.parametrizations.weight.original, usual.parametrizations.weight[0].base      # (r, C), (C, C)
print(f"X holds {X.numel()} numbers, base {base.numel():,}, for an R of {usual.weight.numel()}")
assert base.numel() == C * C and off(usual.weight) < 1e-5

# %% [markdown]
# The numbers of `base` are not trained, but they are there, and each R must go through them. Now the mirrors by hand,
# with some vectors in X.
#
# **Predict:** whatever the vectors are, is R orthonormal?

# %%
torch.nn.init.normal_(X.data, std=0.1).fill_diagonal_(-1)                 # the signs stay as they were
Q = base                                                                  # (C, C)
for i in range(r):
    v = X.detach()[i].clone()                                             # (C,)
    v[:i], v[i] = 0, 1                                                    # only what is below the diagonal is stored
    Q = Q @ (torch.eye(C) - 2 * torch.outer(v, v) / (v @ v))
by_mirrors = (Q[:, :r] * X.detach().diagonal()).T                         # (r, C)
same = torch.allclose(by_mirrors, usual.weight, atol=1e-5)
print(f"the same as PyTorch's: {same}; off by {off(by_mirrors):.0e}")
assert same and off(by_mirrors) < 1e-5

# %% [markdown]
# Let both climb.
#
# **Predict:** how close do they come to the best share, and are they still orthonormal after 60 steps?

# %%
def usual_from(R):                                                        # PyTorch's recipe, starting at R
    linear = torch.nn.Linear(C, r, bias=False)
    linear.weight.data.copy_(R)
    return orthogonal(linear)

usual, M = usual_from(start), torch.nn.Parameter(start.clone())
ways["mirrors"] = climb(usual.parameters(), lambda: usual.weight)
ways["Cholesky"] = climb([M], lambda: orthonormalise(M))
for name, R in (("mirrors", usual.weight), ("Cholesky", orthonormalise(M))):
    print(f"{name:9} held {held(R):.1%} of {best:.1%}, off by at most {max(ways[name]):.1e}")
    assert best - 0.05 < held(R) < best + 1e-3 and max(ways[name]) < 1e-5

# %% [markdown]
# Both work. So what is there to choose?
#
# ## What it costs
#
# **Predict:** time for R and its gradient, r = 4, as C doubles and doubles again: what does each recipe's time do?

# %%
import time
def seconds(R_of, repeat=5):                                              # the quickest of some: forward and backward
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        R_of().sum().backward()
        times.append(time.perf_counter() - began)
    return min(times)

print(f"Cholesky at C = {C}: {1000 * seconds(lambda: orthonormalise(M)):.2f} ms")

# %%
widths, took = (64, 128, 256, 512, 1024), {"mirrors": [], "Cholesky": []}
for width in widths:
    wide, m = orthogonal(torch.nn.Linear(width, r, bias=False)), torch.randn(r, width, requires_grad=True)
    took["mirrors"].append(seconds(lambda: wide.weight))
    took["Cholesky"].append(seconds(lambda: orthonormalise(m)))
for name, times in took.items():
    print(f"{name:9}", "   ".join(f"C = {width}: {1000 * t:.2f} ms" for width, t in zip(widths, times)))
print(f"at C = 1024, {took['mirrors'][-1] / took['Cholesky'][-1]:.0f} times as long, on this machine and one thread")
assert took["mirrors"][-1] > 8 * took["Cholesky"][-1] and took["Cholesky"][-1] < 20 * took["Cholesky"][0]

# %% [markdown]
# Times are this machine's; what will be the same on yours is that the recipe which turns all of space has C × C numbers
# to go through (4 MiB at C = 1024, for an R of 16 KiB), and the other r × C. In a large model C is 4096, with an R in
# each of 32 layers.
#
# ## What weight decay does
#
# AdamW with *weight decay* does one thing more in each step: it multiplies every parameter by a number a little below
# 1. That is meant to keep weights small.
#
# **Predict:** one step of AdamW with weight decay, for the matrices that we have just trained. How far does R move,
# in either recipe?

# %%
def decayed(parameters, R_of, steps, decay):
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=decay)
    for _ in range(steps):
        optimizer.zero_grad()
        (-held(R_of())).backward()
        optimizer.step()
    return held(R_of()).item(), R_of().norm(dim=1).tolist()               # and the lengths of the rows

after = {"mirrors": decayed(usual.parameters(), lambda: usual.weight, 1, 0.1),
         "Cholesky": decayed([M], lambda: orthonormalise(M), 1, 0.1)}
for name, (share, lengths) in after.items():
    print(f"{name:9} held {share:.1%}, rows of length", " ".join(f"{x:.2f}" for x in lengths))
assert after["mirrors"][0] == 0 == max(after["mirrors"][1]) and after["Cholesky"][0] > best - 0.05

# %% [markdown]
# **R is zero.** Not small: zero. The signs on the diagonal are read with `.int()`, and −0.999 without its decimals is
# 0. Nothing warns; a LoReFT with R = 0 changes nothing, its loss is the base's, and no gradient reaches R any more.
#
# **Predict:** 60 further steps without weight decay. Does it recover? And what does decay do to Cholesky's M, if M is
# made a thousand times smaller?

# %%
share, lengths = decayed([*usual.parameters()], lambda: usual.weight, 60, 0.0)
gradient = torch.autograd.grad(held(orthonormalise(M)), M)[0]             # (r, C)
along = ((gradient * M).sum() / (gradient.norm() * M.norm())).item()
same = torch.allclose(orthonormalise(0.001 * M), orthonormalise(M), atol=1e-5)
print(f"mirrors after 60 steps more: held {share:.1%}; Cholesky of M / 1000 is the same R: {same}")
print(f"cosine of M and its gradient: {along:.6f}")
assert share == 0 and same and abs(along) < 1e-3

# %% [markdown]
# It is gone for good. M cannot be hurt in this way: R depends on the directions in M and not on their size, so the
# gradient stands at right angles to M, and decay, which moves M towards 0, moves it where R does not change.
#
# ## What a checkpoint must hold
#
# R is what the edit needs, so why not save R and forget how it was made? A widely used library does so with the usual
# recipe: to load, it makes a new parametrization and writes R over the first r columns of its `base`. To the last bit
# the same R.
#
# **Predict:** and when training goes on from there?

# %%
usual = usual_from(start)
climb(usual.parameters(), lambda: usual.weight)
saved = usual.weight.detach().clone()                                     # (r, C) all that is kept
again = orthogonal(torch.nn.Linear(C, r, bias=False))
with torch.no_grad():
    again.parametrizations.weight[0].base[:, :r] = saved.T
print("loaded, the same R:", torch.equal(again.weight, saved), f"  off by {off(saved):.0e}, held {held(saved):.1%}")
assert torch.equal(again.weight, saved) and off(saved) < 1e-5

# %%
ways["mirrors, from R alone"] = climb(again.parameters(), lambda: again.weight)
print(f"60 steps on: off by {off(again.weight):.2f}, held {held(again.weight):.0%} (!)")
assert off(again.weight) > 0.02 and held(again.weight) > best + 0.1

# %% [markdown]
# More than there is to be had: the rows lie over each other and count the same thing twice. The other C − r columns of
# `base` are random, and no longer at right angles to R. As long as nothing is trained they play no part; the first
# mirror mixes them in. Half of a parametrization is none.
#
# The library saves what is trained: M, W and b.
#
# **Predict:** save a LoReFT in the middle of training and load it again. Is M the same to the bit? And is M
# orthonormal, or only R?

# %%
import tempfile
reft = minireft.LoReFT(model, rank=r, layers=[2], positions="l1")
config = minireft.TrainConfig(steps=30, lr=0.02, weight_decay=0.1)
minireft.train(model, [reft], few_shot.shots("labels", 0), config, progress=False)
with tempfile.TemporaryDirectory() as folder:
    reft.save(f"{folder}/adapter.safetensors")
    loaded = minireft.load_adapter(model, f"{folder}/adapter.safetensors")
print({name: tuple(p.shape) for name, p in loaded.named_parameters()}, "equal:", torch.equal(loaded.m, reft.m))
print(f"R is off by {off(loaded.rotations()[2]):.0e}, M by {off(loaded.m[0, 0].detach()):.2f}")
assert torch.equal(loaded.m, reft.m) and off(loaded.rotations()[2]) < 1e-5 < 1e-2 < off(loaded.m[0, 0].detach())

# %% [markdown]
# M is crooked and may be; what is made of it is straight, also in every step after loading. All in one picture:

# %%
# Picture: left, time for R and its gradient by width; right, how far from orthonormal R is, over 60 steps of training
import matplotlib.pyplot as plt
figure, (left, middle) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1, 1.3))
for (name, times), marker in zip(took.items(), "os"):
    left.loglog(widths, [1000 * t for t in times], f"{marker}-", label=name)
left.set(xlabel="C", ylabel="milliseconds, forward and backward", title="What R costs (this machine)")
left.set_xticks(widths, labels=widths)
left.legend()
for name, colour in (("mirrors", "C0"), ("Cholesky", "C1"), ("mirrors, from R alone", "C2"), ("plain R", "C3")):
    middle.semilogy(ways[name], color=colour, label=name)
middle.set(xlabel="step", ylabel="largest entry of R Rᵀ − I", title="What becomes of its rows")
middle.legend()
plt.show()

# %% [markdown]
# ## What can still go wrong
#
# Rows of M that depend on each other have no L. And decay does reach W: it pulls W to 0, and what does an edit with
# W = 0 and b = 0 do? (Tutorial 3: it erases.) Decay on LoReFT is no pull towards the model as it was.
#
# ## Two changes to try
#
# - Make M badly proportioned: `M[1] = M[0] + 1e-4 * M[1]`. How far off is `by_cholesky`, in float32, and how far the
#   library's R?
# - Start Cholesky again from `M = saved`, R itself, in place of the M that was trained. It stays orthonormal. Does it
#   go on as it would have with M?
#
# ## Exercises

# %% [markdown]
# ### 1 · Straighten from below (10 minutes)
#
# Gram and Schmidt begin with the first row and leave its direction alone. Write `from_below`, which begins with the
# *last* row: it keeps its direction, and each row above loses what it has along those below.
#
# *Hint:* L comes from the order of the rows. Turn the order around, before and after.

# %%
def from_below(M):
    """M (r, C): orthonormal rows (r, C) with the same span; row i is made of rows i … r − 1 of M."""
    # solution
    M = M.flip(0)
    L = torch.linalg.cholesky(M @ M.T)                                    # (r, r)
    return torch.linalg.solve_triangular(L, M, upper=False).flip(0)
    # end

# %%
torch.manual_seed(0)
M5 = torch.randn(5, C)
R5 = from_below(M5)                                                       # (5, C)
assert torch.allclose(R5 @ R5.T, torch.eye(5), atol=1e-5), "the rows are not orthonormal"
assert torch.allclose(M5 @ R5.T @ R5, M5, atol=1e-4), "another span"
assert torch.allclose(R5[-1], M5[-1] / M5[-1].norm(), atol=1e-5), "the last row must keep its direction"
assert (R5[1:] @ M5[-1])[:-1].abs().max() < 1e-3 and (R5 @ M5[3])[:3].abs().max() < 1e-3, "it is made of other rows"

# %% [markdown]
# ### 2 · The mirror that you need (10 minutes)
#
# x and y have the same length. Write `mirror`: the symmetric C × C matrix I − 2 v vᵀ / ‖v‖² that sends x to y, and y to
# x.
#
# *Hint:* draw x and y in the plane. The mirror stands half-way between their tips, and v at right angles to it.

# %%
def mirror(x, y):
    """x, y (C,) of one length: the matrix (C, C) of the mirror that exchanges them."""
    # solution
    v = x - y                                                             # (C,)
    return torch.eye(len(x)) - 2 * torch.outer(v, v) / (v @ v)
    # end

# %%
torch.manual_seed(0)
x, y, z = torch.nn.functional.normalize(torch.randn(3, C), dim=1) * 3     # (C,) each
H = mirror(x, y)                                                          # (C, C)
assert torch.allclose(H @ x, y, atol=1e-4) and torch.allclose(H @ y, x, atol=1e-4), "it does not exchange them"
assert torch.allclose(H @ H.T, torch.eye(C), atol=1e-4), "it does not keep lengths"
z = z - (z @ (x - y)) * (x - y) / (x - y).square().sum()                  # (C,) in the mirror's own plane
assert torch.allclose(H @ z, z, atol=1e-4), "what lies in the mirror must stay"

# %% [markdown]
# ## In three lines
#
# 1. Train M, not R: R = L⁻¹ M with M Mᵀ = L Lᵀ has orthonormal rows whatever the optimiser does to M.
# 2. The usual recipe, mirrors in all of space, costs C² where r · C would do, and weight decay sets its R to zero in a
#    step, for good.
# 3. A checkpoint must hold what is trained: from R alone the usual recipe goes on as something else.
