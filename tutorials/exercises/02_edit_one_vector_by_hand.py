# %% [markdown]
# # Exercises to 2 · Edit one vector by hand
#
# Written by tutorials/make.py from 02_edit_one_vector_by_hand.py. Copy this file, replace each line
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
# ### 1 · Erase instead of add (8 minutes)
#
# Write `erase`: take out of each row of `h` what it has along `v`, and leave the rest alone.
#
# *Hint:* make `v` a unit vector u first. The part of a row along u is the number h · u times u.

# %%
def erase(h, v):
    """h (N, C) without its part along v (C,): (N, C)."""
    raise NotImplementedError("your turn")

# %%
torch.manual_seed(0)
h, direction = torch.randn(6, C), 3 * torch.randn(C)
other = torch.linalg.qr(torch.stack((direction, torch.randn(C)), 1)).Q[:, 1]   # (C,) at right angles to the direction
assert (erase(h, direction) @ direction).abs().max() < 1e-3, "something is left along v"
assert torch.allclose(erase(h, direction) @ other, h @ other, atol=1e-3), "another direction has changed too"
assert torch.allclose(erase(erase(h, direction), direction), erase(h, direction), atol=1e-4), "twice must be as once"

# %% [markdown]
# ### 2 · Aim instead of push (10 minutes)
#
# Write `aim`: whatever a row has along `v`, put it at `target`, measured along the unit vector of `v`. Nothing else
# may change.
#
# *Hint:* what has to be added is the target less what is there already.

# %%
def aim(h, v, target):
    """h (N, C) moved along v (C,) until h · v / ‖v‖ is target: (N, C)."""
    raise NotImplementedError("your turn")

# %%
torch.manual_seed(0)
h, direction = torch.randn(6, C), 3 * torch.randn(C)
moved = aim(h, direction, 2.5) - h                                        # (6, C)
unit = direction / direction.norm()
assert torch.allclose(aim(h, direction, 2.5) @ unit, torch.full((6,), 2.5), atol=1e-4), "a row misses the target"
assert torch.allclose(moved, (moved @ unit)[:, None] * unit, atol=1e-4), "a row moved in another direction too"
