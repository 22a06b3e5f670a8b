# %% [markdown]
# # 12 · A GPU on your laptop
#
# **What do the threads of a GPU do at the same time, and how do they get into each other's way?**
#
# *Before:* tutorial 3 (the edit's equation), some C. *Time:* 40 minutes.
#
# Run it with `python tutorials/12_a_gpu_on_your_laptop.py`, step through it in a debugger, or open it as a notebook.
# It needs a C++ compiler, g++.
#
# A GPU runs one small program, a *kernel*, in very many *threads*. Each knows its number, `threadIdx.x`, and works on
# what that number points to. The *emulator* of this repository runs the same source on a CPU, one thread at a time,
# and can write down what each of them did: a *trace*. Here is a kernel that copies. `p.h` is what it reads, `p.out`
# what it writes; `load` and `store` touch memory.

# %%
import sys

import torch

import minireft

sys.path.append(minireft.__path__[0] + "/..")                             # the repository, for its kernels
from tutorials.kernels.ladder import VERSIONS, Rung

copy = Rung.small("const int i = threadIdx.x; store(p.out + i, load(p.h + i));", threads=64)
x = torch.arange(64.0)[None]                                              # (1, 64) a row of numbers
print("copied:", torch.equal(copy(x), x))
assert torch.equal(copy(x), x)

# %% [markdown]
# ## Warps and sectors
#
# 32 threads are a *warp*: they do each instruction together. Memory is moved in *sectors* of 32 bytes, eight floats:
# touch one of them and all eight travel. So an access of a warp costs as many sectors as its threads touch.
#
# **Predict:** 32 threads store 32 neighbouring floats. How many sectors? And if thread i stores float 8 i?

# %%
def stored(stride):                                                       # → each thread's sector, of one warp
    kernel = Rung.small(f"store(p.out + {stride} * threadIdx.x, 1.0f);")
    return [e.address // 32 for e in kernel.trace(torch.zeros(1, 32 * stride))]

near, far = stored(1), stored(8)
print("neighbours: threads 0, 1, ... touch sectors", *near[:12], "...:", len(set(near)), "sectors")
print("eight apart: threads 0, 1, ... touch sectors", *far[:12], "...:", len(set(far)), "sectors")
assert len(set(near)) == 4 and len(set(far)) == 32

# %% [markdown]
# 4 and 32: the same work at eight times the price. The first is called *coalesced*. `Rung.count` adds this up.
#
# **Predict:** what does it count for a stride of 2?

# %%
apart = {s: Rung.small(f"store(p.out + {s} * threadIdx.x, 1.0f);") for s in (1, 2, 8)}
counted = {s: kernel.count(torch.zeros(1, 32 * s))["sectors"] for s, kernel in apart.items()}
print("sectors by stride:", counted)
assert counted == {1: 4, 2: 8, 8: 32}

# %% [markdown]
# ## Blocks and barriers
#
# Some warps make a *block*: they share a little fast memory, and may wait for one another at a *barrier*,
# `__syncthreads()`. Nobody passes until all have come. This kernel turns a row around: thread i puts number i into
# shared memory, and after the barrier fetches the one that thread 63 − i has put there.
#
# **Predict:** in the trace, what stands before the first load of the second half: how many arrivals at the barrier?

# %%
TURN = """  SHARED(float, s, 64);
  const int i = threadIdx.x;
  store(s + i, load(p.h + i));
  __syncthreads();
  store(p.out + i, load(s + 63 - i));"""
turn, wrong = Rung.small(TURN, threads=64), Rung.small(TURN.replace("  __syncthreads();\n", ""), threads=64)
trace = turn.trace(x)
first = next(i for i, e in enumerate(trace) if e.shared and not e.store)
arrived = sum(e.bytes == 0 for e in trace[:first])
print("turned:", torch.equal(turn(x), x.flip(1)), f"  arrivals before the first reads back: {arrived}")
assert torch.equal(turn(x), x.flip(1)) and arrived == 64

# %% [markdown]
# All 64. Now without the barrier. Shared memory starts as NaN in the emulator, so what nobody has written shows.
#
# **Predict:** the threads run one after another, 0 first. Which of the 64 results are wrong? And in reverse order?

# %%
for order in ("forward", "reverse", "random"):
    bad = (wrong(x, order=order, seed=3) != x.flip(1))[0]                 # (64,) NaN differs from all
    print(f"{order:8}", "".join("x" if b else "." for b in bad))
    assert 16 < bad.sum() < 48

# %% [markdown]
# Half are wrong, and another half each time: who comes early reads what is not there yet. On a GPU the order is
# nobody's promise.
#
# ## A race that no order shows
#
# Two threads touch one place, at least one of them writes, and no barrier stands between: that is a *race*, whatever
# the outcome. Every thread here adds 1 to one number. The emulator runs a thread up to a barrier before it takes the
# next, so the sum comes out right in every order; on a GPU all 32 may read 0 first. The trace knows.
#
# **Predict:** over how many places do the threads race: in `turn`, in `turn` without its barrier, in this one?

# %%
def races(trace):                                                         # → the places that are raced for
    users, passed = {}, {}                                                # (block, barriers passed, place) → accesses
    for e in trace:
        if not e.bytes:
            passed[e.block, e.thread] = passed.get((e.block, e.thread), 0) + 1
        else:
            key = e.block, passed.get((e.block, e.thread), 0), e.shared, e.address
            users.setdefault(key, []).append(e)
    return [k for k, es in users.items() if len({e.thread for e in es}) > 1 and any(e.store for e in es)]
print("races in turn:", len(races(turn.trace(x))))
assert not races(turn.trace(x))

# %%
add = Rung.small("store(p.out, load(p.h) + 1.0f); store(p.out, load(p.out) + 1.0f);")
raced = len(races(wrong.trace(x))), len(races(add.trace(x)))
print("without its barrier:", raced[0], "  adding to one number:", raced[1])
assert raced == (64, 1)

# %% [markdown]
# ## Inside a block, with a debugger
#
# The emulated kernel is an ordinary program, so a debugger stops in it. [step.cpp](../kernels/step.cpp) runs one
# version of the kernel ladder of tutorial 13, v4: h + upᵀ (down h + bias), eight warps, each with a share of every sum
# in `partial`. We stop thread 32, the first of warp 1, at the barrier, look at the last share that each warp puts
# there, and go one line on.
#
# **Predict:** this share of warps 0, 1, 2, 3: which are there before the barrier, and which one line later?

# %%
import shutil
import subprocess
source = VERSIONS["v4"].read_text().splitlines()
line = next(i for i, text in enumerate(source, 1) if "__syncthreads" in text)
look = "printf \"thread %d: %g %g %g %g\\n\", threadIdx.x, partial[31], partial[63], partial[95], partial[127]"
session = [f"break {VERSIONS['v4'].name}:{line} if threadIdx.x == 32", "run", look, "next", look]
print("\n".join(session[i] for i in (0, 1, 3)))
assert "all shares are there" in source[line - 1]

# %%
root, program = VERSIONS["v4"].parents[2], VERSIONS["v4"].parents[2] / "build" / "step"
said = ["no gdb here: install it, or use your editor's debugger on kernels/step.cpp"]
if shutil.which("gdb"):
    flags = f'-std=c++17 -g -O0 -DMINIREFT_EMULATOR -DRUNG="{VERSIONS["v4"].name}" -o build/step'.split()
    subprocess.run(["g++", *flags, "tutorials/kernels/step.cpp"], cwd=root, check=True)
    steps = [word for step in session for word in ("-ex", step)]
    done = subprocess.run(["gdb", "-nx", "-batch", *steps, program], capture_output=True, text=True, cwd=root)
    said = [text for text in done.stdout.splitlines() if text.startswith("thread")]
    assert len(said) == 2 and "nan" in said[0] and "nan" not in said[1]
print("\n".join(said))

# %% [markdown]
# Before: the shares of warps that come later are NaN. One `next` over the barrier, and all are there, though we stayed
# with thread 32: the others ran while it waited. Where they waited is the picture.

# %%
# Picture: when each place in shared memory is stored and loaded, and who waits; with the barrier, and without it
import matplotlib.pyplot as plt
figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
for axes, kernel, title in zip(panels, (turn, wrong), ("with the barrier", "without: half is loaded too early")):
    steps = [e for e in kernel.trace(x) if e.shared or not e.bytes]
    for store, name, mark in ((1, "stored", "oC0"), (0, "loaded", "^C1")):
        at = [i for i, e in enumerate(steps) if e.bytes and e.store == store]
        axes.plot(at, [steps[i].address // 4 for i in at], mark, ms=4, label=name)
    waits = [i for i, e in enumerate(steps) if not e.bytes]
    axes.hlines([steps[i].thread for i in waits], waits, max(waits, default=0), "C3", lw=0.6, label="its thread waits")
    axes.set(xlabel="step, in the order of the run", title=title)
panels[0].set_ylabel("place in shared memory"), panels[0].legend(loc="upper left")
plt.show()

# %% [markdown]
# The library's own kernels run so: `minireft.ops.use` with `"emulator"`, on any machine. What an emulator cannot show:
# races between blocks, which run one after another here, and how long anything takes.
#
# ## Two changes to try
#
# - Let thread i store float i + 1 in place of i. How many sectors is a warp's access now?
# - Put the barrier inside `if (i < 32)`. What does the emulator say, and what would a GPU do?
#
# ## Exercises

# %% [markdown]
# ### 1 · Sectors of a warp (8 minutes)
#
# Write `sectors`: how many an access costs in which each thread touches `size` bytes at its own address.
#
# *Hint:* an access may lie across the end of a sector.

# %%
def sectors(addresses, size):
    """addresses: bytes, a list of ints; size: bytes a thread touches → how many sectors of 32 bytes."""
    # solution
    return len({byte // 32 for address in addresses for byte in (address, address + size - 1)})
    # end

# %%
assert sectors(range(0, 128, 4), 4) == 4, "32 neighbouring floats"
assert sectors(range(4, 132, 4), 4) == 5, "the same, one float further on"
assert sectors(range(0, 1024, 32), 4) == 32 and sectors([64] * 32, 4) == 1, "apart, and all on one"
assert sectors([28], 8) == 2, "across the end of a sector"

# %% [markdown]
# ### 2 · A sum in a block (15 minutes)
#
# Write the body of a kernel of 64 threads in which each thread stores the sum of all 64 numbers of its row: through
# shared memory, without a race.
#
# *Hint:* `TURN` has all the words. Everybody may add up for himself.

# %%
def sum_kernel():
    """The C of the body: a string."""
    # solution
    return """SHARED(float, s, 64);
    store(s + threadIdx.x, load(p.h + threadIdx.x));
    __syncthreads();
    float sum = 0;
    for (int j = 0; j < 64; j++) sum += load(s + j);
    store(p.out + threadIdx.x, sum);"""
    # end

# %%
kernel, numbers = Rung.small(sum_kernel(), threads=64), torch.arange(64.0)[None]
for order in ("forward", "reverse", "random"):
    assert torch.equal(kernel(numbers, order=order), torch.full((1, 64), 2016.0)), f"not the sum in {order} order"
loads = [e for e in kernel.trace(numbers) if not e.shared and not e.store and e.bytes]
assert len(loads) == 64, "each number once from memory, then from shared memory"

# %% [markdown]
# ## In three lines
#
# 1. A warp's access costs the sectors that it touches: neighbours on neighbours cost 4, neighbours far apart 32.
# 2. Threads of a block meet at barriers; without one, who is early reads what is not there.
# 3. An order that comes out right proves nothing: shuffle the order, and look in the trace for places that two share.
