# %% [markdown]
# # Exercises to 7 · T-Few: sixteen examples and a list of answers
#
# Written by tutorials/make.py from 07_t_few.py. Copy this file, replace each line
# `raise NotImplementedError("your turn")`
# and run the copy: no error means that every check has passed.

# %%
from dataclasses import replace

import torch

import minireft
from minireft.data import collate, encode
from minireft.losses import OBJECTIVES
from minireft.tasks import few_shot

model, tokenizer = minireft.load("base")
shots, asked = few_shot.shots("mood", subset=0), few_shot.test("mood", template=0)               # 16 × 3, 100
print(asked[0].prompt, *asked[0].choices, sep="\n    ")
assert (len(shots), len(asked)) == (48, 100) and not {e.prompt for e in shots} & {e.prompt for e in asked}

# %% [markdown]
# ### 1 · Certain, and finite (10 minutes)
#
# Write `minus_log_not`: −log(1 − p) of a token, from the logits. Where the model is certain of that token, p rounds
# to 1, and the loss and its gradient must still be numbers.
#
# *Hint:* 1 − p is the share of all the *other* tokens: a difference of two `logsumexp`.

# %%
def minus_log_not(logits, token):
    """−log(1 − p) of token (an int) under the softmax of logits (V,): a number that can be differentiated."""
    raise NotImplementedError("your turn")

# %%
torch.manual_seed(0)
logits = torch.randn(9)                                                   # (V,)
expected = -torch.log(1 - logits.double().softmax(0)[4])
assert torch.allclose(minus_log_not(logits, 4).double(), expected, atol=1e-4), "not −log(1 − p)"
certain = torch.zeros(9).index_fill(0, torch.tensor([4]), 50.0).requires_grad_()                # (V,)
loss = minus_log_not(certain, 4)
loss.backward()
assert abs(loss.item() - (50 - torch.tensor(8.0).log().item())) < 0.01, "wrong where p rounds to 1"
assert certain.grad.isfinite().all() and certain.grad[4] > 0.9, "its gradient is no number, or gone"

# %% [markdown]
# ### 2 · The softmax over choices (10 minutes)
#
# Write `rank_loss`: L_LN of one question from log p of its choices' tokens, which are padded to one length.
#
# *Hint:* padding must count neither in the sum nor in the number of tokens.

# %%
def rank_loss(log_p, mask, right):
    """log_p (K, T) of K choices, mask (K, T) with True = a token of the choice, right: an int. → L_LN."""
    raise NotImplementedError("your turn")

# %%
torch.manual_seed(0)
lengths = torch.tensor([2, 5, 3])
values, mask = -3 * torch.rand(3, 5), torch.arange(5) < lengths[:, None]  # (K, T) both
betas = [values[k, : lengths[k]].mean() for k in range(3)]                # padding never seen
for k in range(3):
    expected = -torch.log(betas[k].exp() / sum(beta.exp() for beta in betas))
    assert torch.allclose(rank_loss(values, mask, k), expected, atol=1e-4), "not −log softmax(β)[right]"
