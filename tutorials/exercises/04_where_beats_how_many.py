# %% [markdown]
# # Exercises to 4 · Where beats how many: layers, positions, rank
#
# Written by tutorials/make.py from 04_where_beats_how_many.py. Copy this file, replace each line
# `raise NotImplementedError("your turn")`
# and run the copy: no error means that every check has passed.

# %%
import itertools

import torch

import minireft
from minireft.positions import Positions
from minireft.reading import states
from minireft.tasks import few_shot

model, tokenizer = minireft.load("base")
L, C = model.config.layers, model.config.width
training = [few_shot.example("labels", item, template=0) for item in few_shot.items("labels", "train", 200)]
test = few_shot.test("labels", template=0, count=60)
print(*(f"{e.prompt} {e.completion}" for e in training[:3]), sep="\n")

# %% [markdown]
# ### 1 · Share out a short prompt (12 minutes)
#
# `f7+l7` on 14 tokens and more is plain. On fewer the two parts must share the tokens such that each is edited exactly
# once. The library's rule: the prefix may have half of the tokens, rounded down, or what the suffix leaves over, if
# that is more; the suffix gets what is left. Neither gets more than it asked for. (Who gets what matters when prefix
# and suffix have weights of their own, `tied=False`.) Write `edited`.
#
# *Hint:* decide the length of the prefix first, with a `max` inside a `min`.

# %%
def edited(n, first, last):
    """n prompt tokens, the first `first` and the last `last` asked for: two lists, the prefix and the suffix."""
    raise NotImplementedError("your turn")

# %%
for n, first, last in itertools.product(range(1, 16), range(1, 8), range(1, 8)):
    prefix, suffix = edited(n, first, last)
    both = Positions(first, last).indices(torch.zeros(1).long(), torch.tensor([n]), n)[0]              # (first + last,)
    assert not set(prefix) & set(suffix), f"f{first}+l{last} on {n} tokens: some are edited twice"
    assert len(prefix) + len(suffix) == min(n, first + last), f"f{first}+l{last} on {n} tokens: one is left out"
    parts = [part[part >= 0].tolist() for part in both.split((first, last))]
    assert [prefix, suffix] == parts, f"f{first}+l{last} on {n} tokens: shared out otherwise"

# %% [markdown]
# ### 2 · Whose doing is it? (12 minutes)
#
# Given the right answers of all runs, which share of their variance is due to the place, and which to the rank? Write
# `shares`: the variance of the places' means (over ranks and seeds), and of the ranks' means (over places and seeds),
# each divided by the variance of all runs. (Variances that divide by n, not n − 1: then the shares cannot exceed 1.)
#
# *Hint:* average the *other* two dimensions away first.

# %%
def shares(runs):
    """runs (places, ranks, seeds): the share of the variance due to the place, and that due to the rank."""
    raise NotImplementedError("your turn")

# %%
torch.manual_seed(0)
place, rank, luck = torch.randn(12, 1, 1), torch.randn(1, 3, 1), torch.randn(12, 3, 50)   # (places, ranks, seeds)
where, many = shares(place.expand(12, 3, 5))
assert abs(where - 1) < 1e-4 and abs(many) < 1e-4, "where only the place counts, it must have all"
where, many = shares(rank.expand(12, 3, 5))
assert abs(where) < 1e-4 and abs(many - 1) < 1e-4, "where only the rank counts, it must have all"
where, many = shares(luck)
assert where + many < 0.05, "where only luck counts, neither has much"
