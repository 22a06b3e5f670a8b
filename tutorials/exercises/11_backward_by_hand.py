# %% [markdown]
# # Exercises to 11 · Backward by hand
#
# Written by tutorials/make.py from 11_backward_by_hand.py. Copy this file, replace each line
# `raise NotImplementedError("your turn")`
# and run the copy: no error means that every check has passed.

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
# ### 1 · Backward of a scale (10 minutes)
#
# (IA)³ multiplies: `out = l ⊙ x`, one number of l for each channel, for all rows. Write its backward.
#
# *Hint:* what does each number of l stand beside, and in how many rows?

# %%
def scale_backward(g, x, l):
    """g and x (N, C), l (C,) → dx (N, C), dl (C,)."""
    raise NotImplementedError("your turn")

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
    raise NotImplementedError("your turn")

# %%
swiglu = [(0, 1, 1), (1, 1, 1), (1, 0, 1)]                                # silu(gate); · up; · l, a vector
assert units(swiglu) == (7, 3), "silu(gate) · up · l: 7 U apart, 3 fused"
assert units([(0, 1, 1)]) == (2, 2), "a single operation cannot be fused with anything"
assert units([(0, 1, 1), (1, 0, 1), (1, 0, 1)]) == (6, 2), "three in a row on one input"
