# %% [markdown]
# # Exercises to 6 · (IA)³: a few hundred numbers a layer
#
# Written by tutorials/make.py from 06_ia3_a_few_hundred_numbers.py. Copy this file, replace each line
# `raise NotImplementedError("your turn")`
# and run the copy: no error means that every check has passed.

# %%
import torch

import minireft
from minireft import reading, tasks
from minireft.data import collate, encode
from minireft.losses import cross_entropy

model, tokenizer = minireft.load("base")
L, F = model.config.layers, model.config.hidden
training, test = tasks.load("facts", "train", 600), tasks.load("facts", "test", 150)
before = minireft.evaluate(model, tokenizer, test, metrics=("rank",)).rank
print(f"{test[0].prompt} {test[0].completion}\nright before any training: {before:.2f}, by chance 0.25")
assert before < 0.45

# %% [markdown]
# ### 1 · Fold a key's vector into its projection (8 minutes)
#
# The key of a token is W x + b, and l_k stands behind it. Write `folded_key`: the weight and the bias of a projection
# that gives l ⊙ (W x + b) by itself.
#
# *Hint:* a row of W makes one number of the key. And l multiplies the whole sum.

# %%
def folded_key(weight, bias, l):
    """weight (out, in), bias (out,), l (out,): the weight and bias that give l ⊙ (W x + b)."""
    raise NotImplementedError("your turn")

# %%
torch.manual_seed(0)
weight, bias, scale, x = torch.randn(6, 4), torch.randn(6), torch.randn(6), torch.randn(3, 4)
new_weight, new_bias = folded_key(weight, bias, scale)
assert new_weight.shape == weight.shape, "the weight has changed its shape"
assert torch.allclose(torch.nn.functional.linear(x, new_weight, new_bias), scale * (x @ weight.T + bias), atol=1e-5)
square = torch.randn(6, 6)                                                # a square weight hides a wrong dimension
new_weight, new_bias = folded_key(square, bias, scale)
assert torch.allclose(new_weight @ torch.ones(6) + new_bias, scale * (square @ torch.ones(6) + bias), atol=1e-5)

# %% [markdown]
# ### 2 · Half-way between two (10 minutes)
#
# Two tasks have taught two vectors. A unit stands at 4 in the one and at 1 in the other; half-way between a knob that
# quadruples and one that does nothing is a knob that doubles. Write `between`: s of the way from `a` to `b`, such that
# equal steps are equal *factors*.
#
# *Hint:* steps that multiply become steps that add under a logarithm.

# %%
def between(a, b, s):
    """a, b (width,), above 0; s from 0 (a) to 1 (b): the vector s of the way, in log space."""
    raise NotImplementedError("your turn")

# %%
a, b = torch.tensor([4.0, 1.0, 0.25, 9.0]), torch.tensor([1.0, 1.0, 4.0, 1.0])
assert torch.allclose(between(a, b, 0.5), torch.tensor([2.0, 1.0, 1.0, 3.0])), "half-way is another place"
assert torch.allclose(between(a, b, 0.0), a) and torch.allclose(between(a, b, 1.0), b), "it does not go from a to b"
quarter = between(a, b, 0.25)
assert torch.allclose(between(quarter, b, 1 / 3), between(a, b, 0.5)), "equal steps are not equal factors"
