# %% [markdown]
# # Exercises to 8 · NEFTune: noise that keeps its size
#
# Written by tutorials/make.py from 08_neftune_noise_that_keeps_its_size.py. Copy this file, replace each line
# `raise NotImplementedError("your turn")`
# and run the copy: no error means that every check has passed.

# %%
import torch

import minireft
from minireft import tasks
from minireft.data import collate, encode, pack
from minireft.tasks.world import PEOPLE, World

model, tokenizer = minireft.load("base")
weight, C = model.embed.weight, model.config.width                        # (V, C)
people = torch.tensor([tokenizer.encode(f"question : where does {name} live ? answer :") for name in PEOPLE])   # (B, T)
homes = torch.tensor([tokenizer.encode(World().value[name, "home"])[0] for name in PEOPLE])                     # (B,)
T = people.shape[1]
print(f"{len(people)} questions of {T} tokens; right: {(model(people)[:, -1].argmax(-1) == homes).float().mean():.2f}")
assert (model(people)[:, -1].argmax(-1) == homes).float().mean() > 0.95

# %% [markdown]
# ### 1 · NEFTune in three lines (8 minutes)
#
# Write `neftune`: the noise that is to be added, by real lengths and with none on padding.
#
# *Hint:* a row's real length is the sum of its mask. Watch the shapes: (B,), (B, T), (B, T, C).

# %%
def neftune(eps, mask, alpha):
    """eps (B, T, C) evenly from −1 to 1, mask (B, T) True = real token: α / √(T_b C) · ε, 0 on padding. (B, T, C)"""
    raise NotImplementedError("your turn")

# %%
torch.manual_seed(0)
mask = torch.tensor([[True] * 16, [False] * 12 + [True] * 4, [True] * 9 + [False] * 7])          # (3, 16)
eps = 2 * torch.rand(3, 16, C) - 1
result = neftune(eps, mask, 6.0)
assert result[~mask].abs().max() == 0, "there is noise on padding"
for b, n in enumerate((16, 4, 9)):
    assert abs(result[b].norm() - 6 / 3**0.5) < 0.2, f"the noise of a row of {n} tokens has another size"
    assert torch.allclose(result[b][mask[b]], 6 / (n * C) ** 0.5 * eps[b][mask[b]]), "it is not ε, scaled"

# %% [markdown]
# ### 2 · Lengths in packed rows (12 minutes)
#
# For packed rows every token needs the length of its *own* document. Write `own_lengths`.
#
# *Hint:* compare every token's number with every other's in its row: (B, T, T). Numbers of other rows mean other
# documents, and padding has length 0.

# %%
def own_lengths(documents):
    """documents (B, T): each token's document, 1, 2, ..., 0 = padding: the number of tokens of its document. (B, T)"""
    raise NotImplementedError("your turn")

# %%
documents = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 0]])                   # (2, 8)
expected = torch.tensor([[3, 3, 3, 2, 2, 1, 0, 0], [1, 6, 6, 6, 6, 6, 6, 0]])
result = own_lengths(documents)
assert torch.equal(result[documents == 0], expected[documents == 0]), "padding has a length"
assert torch.equal(result, expected), f"got {result.tolist()}"
