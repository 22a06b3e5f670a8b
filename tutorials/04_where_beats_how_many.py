# %% [markdown]
# # 4 · Where beats how many: layers, positions, rank
#
# **You may train a few hundred numbers: does it matter more where they stand, or how many they are?**
#
# *Before:* tutorials 2 and 3 (states, R, W, b, rank). *Time:* 30 minutes.
#
# Run it with `python tutorials/04_where_beats_how_many.py`, step through it in a debugger, or open it as a notebook.
#
# In tutorial 3 we stood at the last token after the last block, because a mirror by hand works there. Here we look for
# the place. The task is small enough to be trained many times: a clause is to be called `amber` if it is good and
# `frost` if it is bad. The model knows good from bad; that these two words have to do with it, nobody has told it.

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
# `minireft.evaluate` asks which of the two words the model finds likelier. A guess would be right in half of the
# cases.
#
# **Predict:** how many are right before any training?

# %%
before = minireft.evaluate(model, tokenizer, test, metrics=("rank",)).rank
print(f"right before training: {before:.2f}")
assert before < 0.4

# %% [markdown]
# Worse than a guess: by accident, `frost` sounds a little better to this model than `amber`. Remember the number. Where
# an edit achieves nothing, it will come back.
#
# ## What an edit costs
#
# A LoReFT has three settings of place and size: the *layers* after which it edits, the *positions* of the prompt's
# tokens, and the *rank* r. Each layer has its own R, W and b, which serve all positions there.
#
# **Predict:** which of the three settings change the number of parameters: none, one, two, all?

# %%
def numbers(layers, positions, rank):
    return minireft.LoReFT(model, rank=rank, layers=layers, positions=positions).num_parameters()

for setting in (([2], "l1", 1), ([2], "f7+l7", 1), ([2], "l1", 16), ("all", "l1", 1), ("all", "l1", 16)):
    layers, positions, rank = setting
    print(f"layers {layers!s:4} positions {positions:6} rank {rank:2}: {numbers(*setting):6,}")
assert numbers([2], "l1", 1) == numbers([2], "f7+l7", 1) == 2 * C + 1
assert numbers([2], "l1", 16) == 16 * (2 * C + 1) and numbers("all", "l1", 16) == L * 16 * (2 * C + 1)

# %% [markdown]
# Positions are free: `l1` edits one token and `f7+l7` fourteen, with the same numbers. Which tokens are they? `fN` are
# the first N of the prompt, `lN` the last N, and a list such as `[-2]` counts as in Python
# (`minireft.positions.Positions`).
#
# **Predict:** `f7+l7` on a prompt of five tokens: which are edited, and does any token get edited twice?

# %%
sentence = training[0].prompt.split()
n = torch.tensor([len(sentence)])                                         # (B,) prompt tokens, B = 1
for rule in ("f1", [-2], "l1", "f2+l2", "f7+l7"):
    found = Positions.parse(rule).indices(0 * n, n, len(sentence))[0]     # (P,) with −1 for "no token"
    found = found[found >= 0].tolist()
    print(f"{rule!s:6}", " ".join(f"[{word}]" if i in found else word for i, word in enumerate(sentence)))
assert sorted(found) == list(range(len(sentence)))                        # each token exactly once

# %% [markdown]
# Each exactly once: where the prompt is too short, prefix and suffix share it out (exercise 1).
#
# ## Who listens to which state?
#
# Before we train anything, a map that needs no training. For every state on the way, after block 0, after block 1 and
# so on, take the gradient of the loss with respect to it. Its length times the state's own says how strongly the loss
# would react if that state were changed by as much as itself. (To first order: it says who listens, not what to say.)
#
# **Predict:** for three tokens: the first, `the`; the adjective; and the last, `->`. After which blocks is the loss
# deaf to each of them? For one it can be said exactly.

# %%
from minireft.data import collate, encode
from minireft.losses import cross_entropy
rows = [row for row in (encode(tokenizer, e, model.config.context) for e in training) if row.prompt_length == 5]
batch, kept = collate(rows), []                                           # clauses without "not": all of one length
for block in model.blocks:
    block.output.edits.append(lambda op, context: lambda x: kept.append(op(x).requires_grad_()) or kept[-1])
loss = cross_entropy(model(batch.tokens, batch.mask), batch.tokens, batch.answer)
for block in model.blocks:
    block.output.edits.clear()
slopes = torch.autograd.grad(loss, kept)                                  # L of (B, T, C)
print("slopes after the last block, the prompt's tokens:", [f"{x:.1e}" for x in slopes[-1][:, :5].norm(dim=(0, 2))])
assert slopes[-1][:, :4].abs().max() == 0 < slopes[-1][:, 4].abs().max()

# %%
heard = torch.stack([(g.norm(dim=-1) * h.norm(dim=-1)).sum(0) for g, h in zip(slopes, kept)]).detach()       # (L, T)
for name, token in (("first", 0), ("adjective", 3), ("last", 4)):
    print(f"{name:10}", "  ".join(f"{x:5.2f}" for x in heard[:, token]))
assert heard[6, 3] < 0.4 * heard[0, 3] and heard[:5, 0].min() > 1.5 * heard[:5, 3:5].max() and heard[-1, 4] > 1

# %% [markdown]
# Columns are blocks 0 to 7. Exactly 0 after the last block, for every token but the last: nobody reads them any more.
# No rank can help there, and we need not train to know it. The adjective fades earlier: by block 6 its message has been
# taken to the end, as in tutorial 2. The surprise is the first token, `the`, which tells nothing about the review, and
# to which the loss listens most of all.
#
# ## The grid
#
# Now train: four layers × three positions × three ranks, from two seeds each, 72 small LoReFTs. Rank 1 has 257
# numbers, rank 16 sixteen times as many.
#
# **Predict:** write down, for the first token, the adjective and the last token, after which of the blocks 0, 2, 4, 6
# training will succeed. And will sixteen times the numbers rescue a bad place?

# %%
def trained(layers, positions, rank, seed, examples=training, asked=test, **settings):
    torch.manual_seed(seed)                                               # → share of right answers
    reft = minireft.LoReFT(model, rank=rank, layers=layers, positions=positions)
    config = minireft.TrainConfig(**{**dict(steps=40, lr=0.04, batch_size=8, seed=seed), **settings})
    minireft.train(model, [reft], examples, config, progress=False)
    with reft:
        return minireft.evaluate(model, tokenizer, asked, metrics=("rank",)).rank

print(f"last token, after block 2, rank 16: {trained([2], 'l1', 16, seed=0):.2f}")

# %%
layers, ranks, seeds = (0, 2, 4, 6), (1, 4, 16), (0, 1)
positions = {"first token": "f1", "adjective": [-2], "last token": "l1"}
right = torch.tensor([[[[trained([layer], place, rank, seed) for seed in seeds] for layer in layers]
                       for place in positions.values()] for rank in ranks])       # (ranks, positions, layers, seeds)
cells = right.mean(-1)                                                    # (ranks, positions, layers)
for name, row in zip(positions, cells[2]):
    print(f"rank 16, {name:12}", "  ".join(f"block {layer}: {x:.2f}" for layer, x in zip(layers, row)))
assert cells[2, 2, 1:].min() > 0.9 > 0.5 > cells[2, :2, 3].max()

# %% [markdown]
# The best cells are near 1. The last block of the first two rows did not learn: with 4,112 numbers they stand about
# where the model stood before training. Now the same with fewer numbers, all in one picture; and beside it what the
# three things contribute: the spread (standard deviation) between places when we average over ranks and seeds, between
# ranks when we average over places and seeds, and between seeds.
#
# **Predict:** order the three: where, how many, luck.

# %%
spread = {"where": cells.mean(0).std(correction=0), "how many": cells.mean((1, 2)).std(correction=0),
          "luck": right.std(-1, correction=0).mean()}
print("   ".join(f"{name}: {x:.2f}" for name, x in spread.items()))
few_well, many_badly = cells[1, 2, 2], cells[2, :2, 3].max()              # rank 4, last token; rank 16, elsewhere
print(f"1,028 numbers in a good place: {few_well:.2f}; 4,112 in a bad one: {many_badly:.2f}")
assert spread["where"] > 1.2 * spread["how many"] and few_well > many_badly + 0.3

# %%
# Picture: accuracy by position and block at three ranks; right, the spread due to place, to rank and to the seed
import matplotlib.pyplot as plt
figure, (*maps, bars) = plt.subplots(1, 4, figsize=(11, 3.2), width_ratios=(1, 1, 1, 0.8))
for axis, rank, table in zip(maps, ranks, cells):
    axis.imshow(table, vmin=0.1, vmax=1, cmap="GnBu", aspect="auto")
    for y, x in itertools.product(range(3), range(4)):
        axis.text(x, y, f"{table[y, x]:.2f}", ha="center", va="center", color="w" if table[y, x] > 0.75 else "k")
    axis.set(xticks=range(4), xticklabels=layers, yticks=range(3), yticklabels=positions if rank == 1 else [])
    axis.set(title=f"rank {rank}: {numbers([0], 'l1', rank):,} numbers", xlabel="after block")
bars.bar([name.replace(" ", "\n") for name in spread], [x.item() for x in spread.values()], color=["C0", "C2", "C3"])
bars.set(title="What makes the difference?", ylabel="spread of right answers")
plt.show()

# %% [markdown]
# Read it by rows. At the **last token** the message arrives about block 2, and an edit from there on sees what it has
# to decide. At the **adjective** it is the other way round: early is good, and by block 4 it is too late. And look
# along the ranks. In a bad cell they change next to nothing. In a good one, rank 1 is not enough in 40 steps, rank 4
# mostly is, and rank 16 surely. *Where* decides whether it works at all, *how many* how easily.
#
# ## The first token knows nothing
#
# How can an edit of `the` tell good reviews from bad? No token looks ahead, so its state is the same in all reviews.
#
# **Predict:** then what does the edit add to it, from one review to the next? And who reads that?

# %%
reviews = batch.tokens[:, :5]                                             # (B, 5)
h = states(model, reviews, 2)                                             # (B, 5, C)
apart = (h - h[:1]).norm(dim=-1).amax(0) / h.norm(dim=-1).mean(0)         # (5,)
print("how far the reviews' states are apart:", "  ".join(f"{x:.2f}" for x in apart), "  at", " ".join(sentence))
assert apart[0] < 1e-4 < 0.3 < apart[3]

# %%
torch.manual_seed(0)
reft = minireft.LoReFT(model, rank=16, layers=[2], positions="f1")
minireft.train(model, [reft], training, minireft.TrainConfig(steps=40, lr=0.04, batch_size=8), progress=False)
with reft:
    moved = states(model, reviews, 2)[:, 0] - h[:, 0]                     # (B, C) what the edit has added
    told = minireft.evaluate(model, tokenizer, test, metrics=("rank",)).rank
print(f"right: {told:.2f}; what it adds differs between reviews by {(moved - moved[0]).norm(dim=-1).max():.4f}")
assert (moved - moved[0]).norm(dim=-1).max() < 1e-3 * moved.norm(dim=-1).min() and told > 0.85

# %% [markdown]
# It adds one constant vector, the same for every review, like the vector of tutorial 2. Yet it works: all later tokens
# can look back at `the`, and what they find there is not the answer but something like an instruction, *call good amber
# and bad frost*, which the later blocks, who know good from bad, follow. That needs blocks to come: after block 6 it is
# too late.
#
# ## When you do not know where
#
# With a new task nobody has drawn the map. The usual remedy is a little everywhere: all blocks, the first and the last
# tokens. With rank 1 it costs as much as rank 8 in one block that we would have to guess.
#
# **Predict:** 2,056 numbers, in all blocks or in one. Which is better on average over the guesses? Which in the worst
# case?

# %%
spread_out = [trained("all", "f7+l7", 1, seed) for seed in seeds]
guesses = [trained([layer], "f7+l7", 8, seed=0) for layer in (0, 2, 4, 7)]
print("rank 1, all blocks, two seeds:   ", [round(x, 2) for x in spread_out])
print("rank 8 after block 0, 2, 4, or 7:", [round(x, 2) for x in guesses])
assert numbers("all", "f7+l7", 1) == numbers([0], "f7+l7", 8) == 2056
assert min(spread_out) > 0.9 and min(guesses) < 0.85 and min(spread_out) > min(guesses) + 0.1

# %% [markdown]
# One good guess is as good, a bad one is not. Do not read more into it than that. Here is a harder task: questions
# about the model's world with four choices, about things it has read but in other words (`facts`, `f7+l7`).
#
# **Predict:** again 2,056 numbers everywhere, or in block 0 alone; and twice as many in block 6 alone.

# %%
from minireft.tasks import load
facts, asked = load("facts", "train", 400), load("facts", "test", 120)
print(f"{asked[0].prompt} {asked[0].completion}")
settings, found = {"steps": 60, "lr": 0.01, "batch_size": 16}, {}
for name, layers, rank in (("rank 1, all", "all", 1), ("rank 8, block 0", [0], 8), ("rank 16, block 6", [6], 16)):
    found[name] = trained(layers, "f7+l7", rank, 0, facts, asked, **settings)
print("   ".join(f"{name}: {x:.2f}" for name, x in found.items()))
assert min(found["rank 1, all"], found["rank 8, block 0"]) > found["rank 16, block 6"] + 0.08

# %% [markdown]
# Late loses again, with twice the numbers. Between one early block and all of them nothing is decided: from other seeds
# their order changes.
#
# ## Two changes to try
#
# - Add block 7 to `layers`. At the last token it can be done, but not in 40 steps; how many does it take? (It reaches
#   only the next word: look at the loss as well.)
# - Give rank 1 at the last token 400 steps. Is it too small, or too slow?
#
# ## Exercises

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
    # solution
    p = min(first, max(n // 2, n - last))
    s = min(last, n - p)
    return list(range(p)), list(range(n - s, n))
    # end

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
    # solution
    every = runs.var(correction=0)
    return runs.mean((1, 2)).var(correction=0) / every, runs.mean((0, 2)).var(correction=0) / every
    # end

# %%
torch.manual_seed(0)
place, rank, luck = torch.randn(12, 1, 1), torch.randn(1, 3, 1), torch.randn(12, 3, 50)   # (places, ranks, seeds)
where, many = shares(place.expand(12, 3, 5))
assert abs(where - 1) < 1e-4 and abs(many) < 1e-4, "where only the place counts, it must have all"
where, many = shares(rank.expand(12, 3, 5))
assert abs(where) < 1e-4 and abs(many - 1) < 1e-4, "where only the rank counts, it must have all"
where, many = shares(luck)
assert where + many < 0.05, "where only luck counts, neither has much"

# %% [markdown]
# ## In three lines
#
# 1. Positions cost no parameters, layers and rank do; but the numbers do not say whether an edit can work.
# 2. A place works if what must be read has arrived there, and somebody still reads what is written: outside it no rank
#    helps, inside it a small one does.
# 3. Where no map is at hand, a little everywhere is the safe choice; and two seeds tell more than one.
