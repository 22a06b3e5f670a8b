# %% [markdown]
# # Exercises to 12 · A GPU on your laptop
#
# Written by tutorials/make.py from 12_a_gpu_on_your_laptop.py. Copy this file, replace each line
# `raise NotImplementedError("your turn")`
# and run the copy: no error means that every check has passed.

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
# ### 1 · Sectors of a warp (8 minutes)
#
# Write `sectors`: how many an access costs in which each thread touches `size` bytes at its own address.
#
# *Hint:* an access may lie across the end of a sector.

# %%
def sectors(addresses, size):
    """addresses: bytes, a list of ints; size: bytes a thread touches → how many sectors of 32 bytes."""
    raise NotImplementedError("your turn")

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
    raise NotImplementedError("your turn")

# %%
kernel, numbers = Rung.small(sum_kernel(), threads=64), torch.arange(64.0)[None]
for order in ("forward", "reverse", "random"):
    assert torch.equal(kernel(numbers, order=order), torch.full((1, 64), 2016.0)), f"not the sum in {order} order"
loads = [e for e in kernel.trace(numbers) if not e.shared and not e.store and e.bytes]
assert len(loads) == 64, "each number once from memory, then from shared memory"
