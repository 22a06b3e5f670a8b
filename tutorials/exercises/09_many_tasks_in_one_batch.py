# %% [markdown]
# # Exercises to 9 · Many tasks in one batch
#
# Written by tutorials/make.py from 09_many_tasks_in_one_batch.py. Copy this file, replace each line
# `raise NotImplementedError("your turn")`
# and run the copy: no error means that every check has passed.

# %%
import random

import torch

import minireft
from minireft.tasks.corpus import SKILLS, TRANSLATABLE

model, tokenizer = minireft.load("base")
L, C = model.config.layers, model.config.width
for skill in SKILLS:
    print(f"{skill:10}", minireft.generate(model, tokenizer, [f"{skill} : dog cat horse ->"], max_new_tokens=8))
assert minireft.generate(model, tokenizer, ["reverse : dog cat horse ->"], max_new_tokens=8) == ["horse cat dog ."]

# %% [markdown]
# ### 1 · Different ranks, one stack (10 minutes)
#
# Write `stacked`: edits of different ranks as one stack, filled up so that each does what it did.
#
# *Hint:* a row of `up` that is zero adds nothing, whatever is read.

# %%
def stacked(edits):
    """edits: K of down (r_k, C), up (r_k, C), bias (r_k,) → down, up (K, r, C) and bias (K, r), r the largest rank."""
    raise NotImplementedError("your turn")

# %%
torch.manual_seed(0)
edits = [(torch.randn(r, C), torch.randn(r, C), torch.randn(r)) for r in (2, 5, 1)]
h = torch.randn(3, C)                                                     # (B, C) a row for each
down, up, bias = stacked(edits)
assert down.shape == up.shape == (3, 5, C) and bias.shape == (3, 5), "not one stack of the largest rank"
for k, (d, u, b) in enumerate(edits):
    own = (h[k] @ down[k].T + bias[k]) @ up[k]                            # (C,)
    assert torch.allclose(own, (h[k] @ d.T + b) @ u, atol=1e-3), f"edit {k} does something else in the stack"

# %% [markdown]
# ### 2 · The same for a scale (8 minutes)
#
# (IA)³ multiplies by a vector. Write `scaled` for a batch of mixed tasks.
#
# *Hint:* in PyTorch `l[-1]` is the last one, and no error.

# %%
def scaled(x, l, tasks):
    """x (B, T, C), l (K, C), tasks (B,) with −1 for none: each row times the vector of its task. (B, T, C)"""
    raise NotImplementedError("your turn")

# %%
torch.manual_seed(0)
x, l, tasks = torch.randn(4, 4, C), torch.randn(3, C), torch.tensor([2, -1, 0, 2])
result = scaled(x, l, tasks)
assert torch.equal(result[1], x[1]), "a row without a task has changed"
for row, task in ((0, 2), (2, 0), (3, 2)):
    assert torch.allclose(result[row], x[row] * l[task]), f"row {row} has another task's vector"
