# %% [markdown]
# # Exercises to 3 · LoReFT from its equation
#
# Written by tutorials/make.py from 03_loreft_from_its_equation.py. Copy this file, replace each line
# `raise NotImplementedError("your turn")`
# and run the copy: no error means that every check has passed.

# %%
import torch

import minireft
from minireft.reading import states
from minireft.tasks.world import ASPECTS, BAD, GOOD

model, tokenizer = minireft.load("base")
L, C = model.config.layers, model.config.width
reviews = ["review : the soup was great . mood :", "review : the soup was awful . mood :"]
print(minireft.generate(model, tokenizer, reviews, max_new_tokens=1))
assert minireft.generate(model, tokenizer, reviews, max_new_tokens=1) == ["happy", "sad"]

# %% [markdown]
# ### 1 · Two matrices in place of three (8 minutes)
#
# The library's kernel computes h + Aᵀ(D h + d), with two matrices and a vector. Write `folded`: the D, A and d that
# make it LoReFT.
#
# *Hint:* the bracket of LoReFT holds h twice. Collect.

# %%
def folded(R, W, b):
    """D (r, C), A (r, C), d (r,) such that h + Aᵀ(D h + d) is h + Rᵀ(W h + b − R h)."""
    raise NotImplementedError("your turn")

# %%
torch.manual_seed(0)
R2, W2, b2 = torch.linalg.qr(torch.randn(C, 4)).Q.T, torch.randn(4, C), torch.randn(4)           # (r, C), (r, C), (r,)
D, A, d = folded(R2, W2, b2)
h = torch.randn(5, C)
expected = h + (h @ W2.T + b2 - h @ R2.T) @ R2                            # (5, C)
assert torch.allclose(minireft.reference.low_rank_edit(h, D, A, d), expected, atol=1e-3), "that is another edit"

# %% [markdown]
# ### 2 · Borrow a coordinate (10 minutes)
#
# LoReFT descends from an experiment: give one sentence's state what *another* sentence's state has along R, and see
# whether the answer follows. Write `interchange`.
#
# *Hint:* as LoReFT, with the other state's R s in place of W h + b.

# %%
def interchange(h, s, R):
    """h (N, C) with what s (N, C) has along the rows of R (r, C), and everything else its own: (N, C)."""
    raise NotImplementedError("your turn")

# %%
torch.manual_seed(0)
Q = torch.linalg.qr(torch.randn(C, C)).Q.T                                # (C, C) rows at right angles
R2, others = Q[:3], Q[3:]                                                 # (3, C), (C - 3, C)
h, s = torch.randn(5, C), torch.randn(5, C)
mixed = interchange(h, s, R2)                                             # (5, C)
assert torch.allclose(mixed @ R2.T, s @ R2.T, atol=1e-3), "along R it must be the other's"
assert torch.allclose(mixed @ others.T, h @ others.T, atol=1e-3), "everything else must stay"
