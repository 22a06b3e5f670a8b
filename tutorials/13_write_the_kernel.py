# %% [markdown]
# # 13 · Write the kernel
#
# **How does one get from a formula to a kernel that moves hardly a byte too many, and how does one know, without a
# GPU?**
#
# *Before:* tutorial 3 (the edit's equation), some C. *Time:* 45 minutes.
#
# Run it with `python tutorials/13_write_the_kernel.py`, step through it in a debugger, or open it as a notebook. It
# needs a C++ compiler, g++.
#
# A GPU runs *threads* in groups: 32 of them are a *warp*, which does one instruction at a time for all; some warps
# are a *block*, which may wait for one another at a *barrier* and share a little fast memory. Device memory is moved
# in *sectors* of 32 bytes: touch one byte of a sector and all 32 travel. So what a kernel costs is, before anything
# else, the number of sectors that its warps touch.
#
# The *emulator* of this repository runs CUDA sources thread by thread on a CPU and counts sectors. It times nothing;
# it counts the same on every machine.

# %%
import sys

import torch

import minireft

sys.path.append(minireft.__path__[0] + "/..")                             # the repository, for its kernels
from tutorials.kernels.ladder import VERSIONS, Rung, least_sectors

N, C, r = 64, 256, 8
torch.manual_seed(0)
h, down, up, bias = torch.randn(N, C), torch.randn(r, C) / C**0.5, torch.randn(r, C), torch.randn(r)
exact = minireft.reference.low_rank_edit(h, down, up, bias)               # (N, C)
print(f"{len(VERSIONS)} versions, from {list(VERSIONS)[0]} to {list(VERSIONS)[-1]}")
print(f"h + upᵀ (down h + bias), N {N}, C {C}, r {r}: at least {least_sectors(N, C, r):,} sectors")
assert least_sectors(N, C, r) == (2 * N * C + 2 * r * C + r) // 8

# %% [markdown]
# That least is every row read once, the result written once, and the weights read once: eight floats a sector. The
# formula is `minireft.reference.low_rank_edit`, and every version must give its numbers.
#
# ## v1: a thread a row
#
# The first idea: rows are independent, so give each a thread. It computes δ = down h + bias, one rank after another,
# and then walks over the columns once more. The source is
# [v1_a_thread_a_row.cu](../kernels/v1_a_thread_a_row.cu), twenty lines.
#
# **Predict:** a warp's 32 threads stand on 32 rows. When each reads column 0 of its own row, how many sectors travel,
# and how many of their bytes are used?

# %%
def climb(version):
    rung = Rung(version)
    out = rung(h, down, up, bias)                                         # (N, C)
    assert torch.allclose(out, exact, atol=1e-4)
    return rung.count(h, down, up, bias)

v1 = climb("v1")
print(f"v1: {v1['sectors']:,} sectors, {v1['sectors'] / least_sectors(N, C, r):.0f} times the least; "
      f"{v1['used'] / (32 * v1['sectors']):.0%} of their bytes are used")
assert v1["sectors"] > 30 * least_sectors(N, C, r) and v1["used"] < 0.15 * 32 * v1["sectors"]

# %% [markdown]
# 32 sectors for 32 floats: one float of the eight in each. This is what people mean by *uncoalesced*. (A GPU's
# cache may save some of it, if the sector is still there when the row's next column comes by; with thousands of rows
# at once it is not.) Rows are read r + 1 times, and written once, a sector an element.
#
# ## v2: a warp a row
#
# Turn it round: let the 32 threads of a warp stand side by side on *one* row, on columns 0 … 31, then 32 … 63. Each
# has a share of the dot product; the shares are summed by *shuffles*, in which a thread reads another's register.
#
# **Predict:** h and out need an eighth of the sectors, that is clear. What about down and up?

# %%
v2 = climb("v2")
row, weights = N * C // 8, 2 * r * C // 8                                 # sectors of all rows, of down and up
print(f"v2: {v2['sectors']:,} sectors: {(r + 2) * row:,} for h and out, {weights * N:,} for the weights")
print(f"{v2['used'] / (32 * v2['sectors']):.0%} of the bytes used; {v1['sectors'] / v2['sectors']:.1f} times fewer")
assert abs(v2["sectors"] / ((r + 2) * row + weights * N) - 1) < 0.02 and v2["used"] > 0.98 * 32 * v2["sectors"]

# %% [markdown]
# Every byte that travels is used now. But the weights are read anew for every row: in v1 a whole warp of rows shared
# one reading. Now they are the larger part.
#
# ## v3: all ranks at once
#
# v2 walks over the row once for each rank. A thread has registers to keep eight sums: so walk once, and let each
# element of h meet all eight rows of `down`. And let a thread take four neighbouring floats in one access.
#
# **Predict:** how many times is h read now? How many memory *instructions* does a warp save?

# %%
v3 = climb("v3")
fewer = v2["instructions"] / v3["instructions"]
print(f"v3: {v3['sectors']:,} sectors: {3 * row:,} for h and out; {fewer:.1f} times fewer instructions")
assert abs(v3["sectors"] / (3 * row + weights * N) - 1) < 0.02
assert fewer > 4

# %% [markdown]
# Twice: once for δ and once for the sum. The instructions fall by more than four, since h itself is read less often.
#
# ## v4: rows share the weights
#
# What is left is mostly weights. Let a block of 256 threads edit four rows: what it reads of `down` and `up` serves
# all four. The price is that a row's dot product is now spread over eight warps, which cannot shuffle with each
# other: they write their shares to shared memory, and wait at a barrier before anybody adds them up.
#
# **Predict:** the sectors of the weights, and then: what happens if the barrier is forgotten?

# %%
v4 = climb("v4")
print(f"v4: {v4['sectors']:,} sectors: weights {weights * N // 4:,}; {v4['barriers'] / (N / 4):.0f} barriers a block")
assert abs(v4["sectors"] / (3 * row + weights * N // 4) - 1) < 0.02

# %% [markdown]
# A forgotten barrier need not show: if the threads happen to run in a lucky order, every share is there in time. That
# is what makes such mistakes expensive on a GPU. The emulator runs the threads forward, in reverse and shuffled.

# %%
source = VERSIONS["v4"].read_text().splitlines(keepends=True)
first = next(i for i, line in enumerate(source) if "__syncthreads" in line)
wrong = Rung("v4", text="".join(source[:first] + source[first + 1 :]))    # without its first barrier
orders = ("forward", "reverse", "random")
right = {order: torch.allclose(wrong(h, down, up, bias, order), exact, atol=1e-4) for order in orders}
print("right without a barrier:", right)
assert not all(right.values())

# %% [markdown]
# Shared memory starts as NaN there, so that what nobody has written cannot pass for a number: here every order tells.
# One order that tells would do.
#
# ## v5: rows in registers
#
# One reading of h is still too many. A block's threads can keep their columns of the four rows in registers from the
# first phase to the second.
#
# **Predict:** how close does this come to the least, and what is the rest?

# %%
v5 = climb("v5")
least = least_sectors(N, C, r)
print(f"v5: {v5['sectors']:,} sectors, {v5['sectors'] / least:.2f} times the least; h and out exactly {2 * row:,}")
reached = {name: count["memory bytes"] / (32 * least) for name, count in (("v5", v5), ("v1", v1))}
print("what reached memory, past a cache of 3 MB, over the least:", {name: round(x, 2) for name, x in reached.items()})
assert abs(v5["sectors"] / (2 * row + weights * N // 4) - 1) < 0.02 and reached["v5"] < 1.05

# %% [markdown]
# The rest is weights, read once a block; they lie in the GPU's second-level cache, L2, so device memory hardly
# notices. Nor does it notice v1 at this size, where all fits into L2: the sectors are what the *warps* ask for, and L2
# too has a bandwidth. Both are counted, by `Rung.count` as "sectors" and "memory bytes".
#
# The registers are the price: four rows of C floats in 256 threads. At C = 8,192 there are not enough.
#
# ## v6: the one that ships
#
# The last version is the library's own kernel, behind `minireft.ops.low_rank_edit`, taken in by `#include`. It is v4
# for every dtype, width, rank, layout and position; it sums by fewer shuffles, and reads h a second time, which on a
# GPU comes from the first-level cache, L1, that the emulator does not model.

# %%
import matplotlib.pyplot as plt

counts = {**dict(zip(("v1", "v2", "v3", "v4", "v5"), (v1, v2, v3, v4, v5))), "v6": climb("v6")}
shares = {"h and out": [8 * (r + 2) * row, (r + 2) * row, 3 * row, 3 * row, 2 * row, 3 * row]}
shares["weights"] = [counts[v]["sectors"] - s for v, s in zip(counts, shares["h and out"])]
# Picture: sectors of each version, what of them is rows and what is weights, and the least as a line
figure, axes = plt.subplots(figsize=(8, 3.6))
axes.plot(list(counts), [count["sectors"] for count in counts.values()], "ko-", label="all")
axes.plot(list(counts), shares["h and out"], "s--", color="C0", label="of them h and out")
axes.plot(list(counts), shares["weights"], "^--", color="C1", label="of them weights")
axes.axhline(least, color="C3", linestyle=":", label="the least for all")
axes.set(yscale="log", ylim=(2e3, 3e5), ylabel="sectors of 32 bytes (log scale)", xlabel="version"), axes.legend()
plt.show()

# %%
print("shuffles:", {version: counts[version]["shuffles"] for version in ("v4", "v6")})
assert counts["v6"]["sectors"] < 1.02 * counts["v4"]["sectors"]
assert counts["v6"]["shuffles"] < counts["v4"]["shuffles"] / 2
ladder = [counts[f"v{i}"]["sectors"] for i in range(1, 6)]
assert ladder == sorted(ladder, reverse=True)

# %% [markdown]
# The picture shows what each version pays for: v2 and v3 save on the rows and pay in weights, which every row's warp
# now reads for itself; v4 takes that back; v5 brings h and out to their least.
#
# Times are missing here, and on purpose: none of these kernels has run on a GPU yet. Where results of one are
# committed, they belong on this page, with the device's name.
#
# ## Two changes to try
#
# - `python tutorials/kernels/ladder.py --r 32`: which version suffers most from more ranks, and why?
# - In v4 let a block edit eight rows: predict the sectors, then change `ROWS` and count.
#
# ## Exercises

# %% [markdown]
# ### 1 · Predict before you count (10 minutes)
#
# Write `predicted`: the sectors of v4 if a block edited R rows (C a multiple of 8, N of R, r at most 8).
#
# *Hint:* rows are read twice and written once; weights are read once a block.

# %%
def predicted(N, C, r, R):
    """Sectors of h, out, down and up, an int."""
    # solution
    return 3 * N * C // 8 + 2 * r * C // 8 * (N // R)
    # end

# %%
for N_, C_, r_ in ((64, 256, 8), (32, 512, 4)):
    inputs = torch.randn(N_, C_), torch.randn(r_, C_), torch.randn(r_, C_), torch.randn(r_)
    counted = Rung("v4").count(*inputs)["sectors"]
    assert abs(predicted(N_, C_, r_, 4) / counted - 1) < 0.03, (predicted(N_, C_, r_, 4), counted)
assert predicted(64, 256, 8, 8) < predicted(64, 256, 8, 4) < predicted(64, 256, 8, 1)

# %% [markdown]
# ### 2 · A kernel of your own (20 minutes)
#
# Write the body of a kernel that only copies h to out, coalesced, for any C. `lane` is the thread's place in its
# warp, `n` its row; `load(p)` and `store(p, value)` touch memory. Every column once, and none past the end.
#
# *Hint:* v2, without the sum.

# %%
def copy_kernel():
    """The C of one warp that copies row n of p.h to p.out: a string."""
    # solution
    return "for (int64_t c = lane; c < p.C; c += 32) store(p.out + n * p.C + c, load(p.h + n * p.C + c));"
    # end

# %%
text = VERSIONS["v2"].read_text()
body = text[text.index("  float delta[MOST];") : text.index("}  // namespace\n")]
copy = Rung("v2", text=text.replace(body, f"  {copy_kernel()}\n}}\n\n"))
for N_, C_ in ((5, 256), (3, 33), (2, 7)):
    rows = torch.randn(N_, C_)
    assert torch.equal(copy(rows, torch.randn(1, C_), torch.randn(1, C_), torch.zeros(1)), rows), "not a copy"
cost = copy.count(h, down, up, bias)
assert cost["sectors"] == 2 * N * C // 8, f"{cost['sectors']} sectors where {2 * N * C // 8} do"

# %% [markdown]
# ## In three lines
#
# 1. A warp's access costs the sectors that it touches: neighbours on neighbouring bytes, or most of what travels is
#    thrown away.
# 2. Then every byte once: all ranks in one pass, rows that share weights, registers that remember.
# 3. Predict, count, and only then believe; a clock comes last, and a lucky order of threads proves nothing.
