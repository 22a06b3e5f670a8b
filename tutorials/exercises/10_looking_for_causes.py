# %% [markdown]
# # Exercises to 10 · Looking for causes
#
# Written by tutorials/make.py from 10_looking_for_causes.py. Copy this file, replace each line
# `raise NotImplementedError("your turn")`
# and run the copy: no error means that every check has passed.

# %%
import sys

import torch

import minireft
from minireft.reading import similarity, states
from minireft.tasks.world import ATTRIBUTES

sys.path.append(minireft.__path__[0] + "/..")                             # the repository, for its benchmarks
from benchmarks.das import KNOWN, RESULTS, pairs, people, values

model, tokenizer = minireft.load("base")
L, C, split = model.config.layers, model.config.width, people()
print({part: len(names) for part, names in split.items()}, "people;", len(KNOWN), "attributes:", ", ".join(KNOWN))
assert not set(split["train"]) & set(split["test"]) and len(KNOWN) == 6

# %% [markdown]
# ### 1 · Directions between means (10 minutes)
#
# Write `span`: orthonormal rows for all differences between k means, and for nothing else.
#
# *Hint:* differences to the first mean will do; `torch.linalg.qr` makes *columns* orthonormal.

# %%
def span(means):
    """means (k, C), k ≤ C → R (k − 1, C): R Rᵀ = I, and every difference of two means lies in the span of its rows."""
    raise NotImplementedError("your turn")

# %%
torch.manual_seed(0)
common = 5 * torch.randn(C)                                               # what all means share, and nobody should swap
means = common + torch.randn(4, C)
rows = span(means)
assert rows.shape == (3, C), f"{tuple(rows.shape)} where (3, {C}) do"
assert torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-4), "not orthonormal"
between = (means[:, None] - means).flatten(0, 1)                          # (16, C) each less each
assert torch.allclose(between @ rows.T @ rows, between, atol=1e-3), "a difference of two means is not in it"

# %% [markdown]
# ### 2 · Pairs that tell nothing (10 minutes)
#
# When the third answer is also the base's or the source's own, seeing it tells nothing: the 0.08 above. Write
# `clear_share`: the share of third answers among the pairs where it differs from both.
#
# *Hint:* first a mask of the pairs that count.

# %%
def clear_share(said, third, base, source):
    """All (N,) token ids: what was said, and the three candidates. → a number from 0 to 1."""
    raise NotImplementedError("your turn")

# %%
third, base = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([9, 9, 3, 9, 9, 9])
source = torch.tensor([8, 2, 8, 8, 8, 8])                                 # the second pair and the third do not count
assert clear_share(third, third, base, source) == 1, "where it is always said, the share is 1"
assert clear_share(base, third, base, source) == 0, "the base's own answer is none"
assert clear_share(source, third, base, source) == 0, "the source's own answer is none"
half = torch.tensor([1, 2, 3, 4, 9, 9])
assert clear_share(half, third, base, source) == 0.5, "two of the four that count"
