# %% [markdown]
# # Exercises to 5 · Keeping R orthonormal
#
# Written by tutorials/make.py from 05_keeping_r_orthonormal.py. Copy this file, replace each line
# `raise NotImplementedError("your turn")`
# and run the copy: no error means that every check has passed.

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
# ### 1 · Straighten from below (10 minutes)
#
# Gram and Schmidt begin with the first row and leave its direction alone. Write `from_below`, which begins with the
# *last* row: it keeps its direction, and each row above loses what it has along those below.
#
# *Hint:* L comes from the order of the rows. Turn the order around, before and after.

# %%
def from_below(M):
    """M (r, C): orthonormal rows (r, C) with the same span; row i is made of rows i … r − 1 of M."""
    raise NotImplementedError("your turn")

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
    raise NotImplementedError("your turn")

# %%
torch.manual_seed(0)
x, y, z = torch.nn.functional.normalize(torch.randn(3, C), dim=1) * 3     # (C,) each
H = mirror(x, y)                                                          # (C, C)
assert torch.allclose(H @ x, y, atol=1e-4) and torch.allclose(H @ y, x, atol=1e-4), "it does not exchange them"
assert torch.allclose(H @ H.T, torch.eye(C), atol=1e-4), "it does not keep lengths"
z = z - (z @ (x - y)) * (x - y) / (x - y).square().sum()                  # (C,) in the mirror's own plane
assert torch.allclose(H @ z, z, atol=1e-4), "what lies in the mirror must stay"
