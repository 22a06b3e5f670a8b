# %% [markdown]
# # Exercises to 14 · Bring your own model and data
#
# Written by tutorials/make.py from 14_bring_your_own_model_and_data.py. Copy this file, replace each line
# `raise NotImplementedError("your turn")`
# and run the copy: no error means that every check has passed.

# %%
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import minireft
from minireft import tasks
from minireft.formats import convert, huggingface, peft, pyreft

work = Path(tempfile.mkdtemp())
folder = work / "stranger"
convert.convert("base", folder, to="huggingface")
print({path.name: path.stat().st_size for path in sorted(folder.iterdir())}, "bytes")

# %% [markdown]
# ### 1 · Another order of rows (12 minutes)
#
# llama2.c turns neighbours: numbers (0, 1), (2, 3), ... of a head are the pairs that rotary positions rotate. Hugging
# Face, and we, turn halves: number i with number i + D/2. Write `to_halves`: the rows of a query's or key's weight in
# our order, so that every score between two tokens stays what it was.
#
# *Hint:* each head by itself. Number 2i goes to place i, number 2i + 1 to place i + D/2.

# %%
def to_halves(weight, heads):
    """weight (heads·D, C), rows in neighbouring pairs in each head → the same rows, pairs at i and i + D/2."""
    raise NotImplementedError("your turn")

# %%
torch.manual_seed(0)
heads, D, width = 2, 6, 8
wq, wk, x = torch.randn(heads * D, width), torch.randn(heads * D, width), torch.randn(5, width)
angles = torch.arange(5.0)[:, None] * 0.3 ** torch.arange(D // 2)         # (T, D/2) one for each pair
turn = torch.polar(torch.ones(5, D // 2), angles)[:, None]                # (T, 1, D/2)
def scores(q, k, pair):
    q, k = (torch.view_as_complex(pair((x @ w.T).view(5, heads, D)).contiguous()) * turn for w in (q, k))
    return torch.einsum("qhd,khd->hqk", q, k.conj()).real                 # (H, T, T)
neighbours = scores(wq, wk, lambda y: y.unflatten(2, (-1, 2)))
halves = scores(to_halves(wq, heads), to_halves(wk, heads), lambda y: y.unflatten(2, (2, -1)).transpose(2, 3))
assert torch.allclose(neighbours, halves, atol=1e-4), "the scores have changed"

# %% [markdown]
# ### 2 · The answer in a text (8 minutes)
#
# A model asked for a sum writes a reasoning, and its last number is the answer: `"5 boxes of 200 make 1,000."` means
# 1000. Write `last_number`; it is what `minireft.formats.datasets` does for GSM8K.
#
# *Hint:* commas between digits first; then a regular expression that allows a sign and a point followed by digits.

# %%
def last_number(text):
    """The last number in a text as a float, thousands' commas ignored; None where there is none."""
    raise NotImplementedError("your turn")

# %%
for text, number in (("5 boxes of 200 make 1,000.", 1000), ("so -3.5 it is", -3.5), ("3 + 4 = 7, I think", 7),
                     ("no idea", None), ("$12.50", 12.5), ("", None)):
    found = last_number(text)
    assert found == number, f"in {text!r} it finds {found}"
