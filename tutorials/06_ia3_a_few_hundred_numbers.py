# %% [markdown]
# # 6 · (IA)³: a few hundred numbers a layer
#
# **Can a model learn a task if it may only turn what it has up or down?**
#
# *Before:* tutorial 1 (sites, edits, keys and values, feed-forward). *Time:* 30 minutes.
#
# Run it with `python tutorials/06_ia3_a_few_hundred_numbers.py`, step through it in a debugger, or open it as a
# notebook.
#
# The model has read what is a fruit, who likes which colour and who does what job, but never in these words. Look
# first.

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
# ## Knobs
#
# The feed-forward of a block widens each token's vector to F numbers, bends them (the *activation*), and narrows them
# again. Think of F units, each on to some degree. We put a knob on each: a number `l` that multiplies it. All knobs at
# 1 is the model as it is.
#
# **Predict:** the activation of one token, its first five units. Multiply it by l = 1, and by l = −1 *before* the
# non-linearity instead of behind it. Is −γ(g) the same as γ(−g)?

# %%
question = torch.tensor([tokenizer.encode(test[0].prompt)])               # (1, T)
act = model.blocks[3].ffn.act                                             # γ(gate) ⊙ up, a site
seen, l = [], torch.ones(F)

def knobs(operation, context):
    return lambda gate, up: seen.append((gate, up, operation(gate, up))) or l * operation(gate, up)

act.edits.append(knobs)
turned = model(question)                                                  # (1, T, V)
act.edits.clear()
gate, up, y = (x[0, -1, :5] for x in seen[0])                             # (5,) each
for name, numbers in (("as it is", y), ("negated behind", -y), ("negated before", act.operation(-gate, up))):
    print(f"{name:15}", "  ".join(f"{x:6.3f}" for x in numbers))
assert torch.equal(turned, model(question)) and not torch.allclose(act.operation(-gate, up), -y, atol=0.01)

# %% [markdown]
# With all knobs at 1 not a bit has changed. And the place matters: γ bends, so a knob before it is another knob. (IA)³
# (Liu et al. 2022) puts it **behind**: `(l ⊙ γ(W x)) W₂`.
#
# ## 384 numbers, by hand
#
# Now let gradient descent turn the knobs of that one block, and nothing else: F numbers. First the loss,
# `minireft.losses.cross_entropy` on the tokens of the answers, for 64 items that we shall not train on.
#
# **Predict:** an answer is one word of four, a full stop and the end. What would be the loss a token of a guess among
# the four that knew the rest: above 1 or below?

# %%
rows = [encode(tokenizer, example, model.config.context) for example in training]
def loss_of(some):
    batch = collate(some)
    return cross_entropy(model(batch.tokens, batch.mask), batch.tokens, batch.answer)

with torch.no_grad():
    held_out = [loss_of(rows[-64:]).item()]
print(f"loss on 64 items: {held_out[0]:.2f}; of such a guess log 4 / 3 = {torch.tensor(4.0).log() / 3:.2f}")
assert held_out[0] > 1

# %% [markdown]
# Above 1, far from even that guess. Here is training, all of it: a vector of ones, an edit that multiplies, and 60
# steps.
#
# **Predict:** where does the loss get to? And how many of the test items are right then?

# %%
l = torch.ones(F, requires_grad=True)                                     # (F,)
act.edits.append(lambda operation, context: lambda gate, up: l * operation(gate, up))
optimizer = torch.optim.Adam([l], lr=0.05)
for step in range(60):
    optimizer.zero_grad()
    loss_of(rows[8 * step : 8 * step + 8]).backward()
    optimizer.step()
held_out.append(loss_of(rows[-64:]).item())
print(f"loss on 64 other items {held_out[0]:.2f} → {held_out[1]:.2f}; l from {l.min():.1f} to {l.max():.1f}")
assert held_out[1] < 0.6 * held_out[0]

# %%
by_hand = minireft.evaluate(model, tokenizer, test, metrics=("rank",)).rank
act.edits.clear()
print(f"right with {F} numbers in one block: {by_hand:.2f}, before {before:.2f}")
assert by_hand < before + 0.2

# %% [markdown]
# Half of the loss is gone, and still there are hardly more right answers. One block's knobs do not reach far enough: on
# to all of them.
#
# ## The same from the library
#
# `minireft.IA3` puts such a vector on three sites of every block: the keys, the values, and the activation.
#
# `softmax(Q (l_k ⊙ K)ᵀ / √d) (l_v ⊙ V)` and `(l_ff ⊙ γ(W x)) W₂`
#
# It stores l − 1, so that a new one is zeros, and weight decay, if there is any, pulls towards the model as it was.
#
# **Predict:** how many numbers a block, and what share of the model in all? How many items are right after 150 steps?

# %%
torch.manual_seed(0)
ia3 = minireft.IA3(model)
run = minireft.train(model, [ia3], training, minireft.TrainConfig(steps=150, lr=0.05), progress=False)
with ia3:
    after = minireft.evaluate(model, tokenizer, test, metrics=("rank",)).rank
ia3.print_trainable_parameters()
print(f"a block has {ia3.num_parameters() // L} of them; right: {before:.2f} before, {after:.2f} after")
assert ia3.num_parameters() == L * (2 * model.config.kv_heads * model.config.head_dim + F)
assert after > before + 0.3 and after > by_hand + 0.2

# %% [markdown]
# A few hundred numbers a block, and no new direction anywhere: each unit still writes what it always wrote, only louder
# or more softly. The knowledge was there; what had to be learned is which of it to listen to.
#
# ## Merging
#
# A knob on a unit is a factor on that unit's column of W₂; a knob on a key is a factor on a row of W_k. So the vectors
# can vanish into the weights. By hand first.
#
# **Predict:** y is (T, F), `down` is (C, F). Which dimension of `down` does l multiply?

# %%
down, y = model.blocks[3].ffn.down.weight, seen[0][2][0]                  # (C, F), (T, F)
l_ff = ia3.vectors()["ffn"][3].detach()                                   # (F,)
scaled, folded = (l_ff * y) @ down.T, y @ (down * l_ff).T                 # (T, C) both
print("largest difference:", f"{(scaled - folded).abs().max():.1e}", " of numbers up to", f"{scaled.abs().max():.1f}")
assert torch.allclose(scaled, folded, atol=1e-3) and not torch.allclose(scaled, y @ down.T, atol=0.1)

# %% [markdown]
# `ia3.merge()` does this for every vector, biases included. After it nothing is attached, and the model costs what it
# always cost.
#
# **Predict:** is the merged model as good? And can we have the old one back, if some l were exactly 0?

# %%
base = {name: weight.clone() for name, weight in model.state_dict().items()}
with torch.no_grad():
    ia3.ffn[3, 0] = -1.0                                                  # stored is l − 1: this unit's l is 0
ia3.merge()
merged = minireft.evaluate(model, tokenizer, test, metrics=("rank",)).rank
column = model.blocks[3].ffn.down.weight[:, 0].abs().max().item()
ia3.unmerge()
same = all(torch.equal(weight, base[name]) for name, weight in model.state_dict().items())
print(f"merged: {merged:.2f} right, silenced column at most {column}; unmerged: every bit as before: {same}")
assert abs(merged - after) < 0.05 and column == 0 and same

# %% [markdown]
# Dividing by l would have given 0 / 0 in that column. The library keeps the original tensors while others stand in
# their place, and it refuses to unmerge when the weights have been changed since.
#
# ## What was turned up, what down?
#
# `minireft.reading.vectors` lists every vector: mean, spread, extremes, and the units that went furthest. Here are
# the rows of the feed-forwards.
#
# **Predict:** do the means lie above 1 or below? Are there knobs below 0, so that a unit's sign is turned around?

# %%
report = reading.vectors(ia3, count=2)
table = str(report).splitlines()
print("\n".join([table[0], *(line for line in table if line.startswith("ffn"))]))
every = torch.cat([l.flatten() for l in report.l.values()])               # (N,) all of them
print(f"all {len(every):,}: mean {every.mean():.2f}, std {every.std():.2f}; below 0: {(every < 0).float().mean():.1%}")
assert abs(every.mean() - 1) < 0.1 and every.std() > 0.2 and 0 < (every < 0).float().mean() < 0.05

# %% [markdown]
# The mean stays at 1: turning up and turning down balance. A few went through 0 and beyond. What does the unit that was
# amplified most of all write? `minireft.reading.promoted` names the tokens whose scores its column of W₂ raises most.
#
# **Predict:** the task asks what somebody uses, plays, drives, is. Words of which kind would help?

# %%
layer, unit = divmod(report.l["ffn"].argmax().item(), F)
raised, lowered = reading.promoted(model, tokenizer, model.blocks[layer].ffn.down.weight[:, unit], count=6)
print(f"block {layer}, unit {unit}, l = {report.l['ffn'][layer, unit]:.2f}\n  raises {raised}\n  lowers {lowered}")
assert report.l["ffn"][layer, unit] > 2

# %% [markdown]
# Suggestive, and no proof: that a unit's words look right says nothing about whether it is needed. So test it. Take
# the numbers that moved furthest from 1 and put them *back* to 1; and for comparison as many drawn at random.
#
# **Predict:** of all the numbers, put back the 30 % that moved most. What is left of the accuracy? And with 30 % at
# random?

# %%
learned = torch.cat([p.detach().flatten() for p in ia3.parameters()])     # (N,) l − 1
orders = {"that moved most": learned.abs().argsort(descending=True), "at random": torch.randperm(len(learned))}
shares, right = (0, 0.03, 0.1, 0.3, 1), {name: [] for name in orders}
for name, order in orders.items():
    for share in shares:
        kept = learned.index_fill(0, order[: int(share * len(order))], 0)
        torch.nn.utils.vector_to_parameters(kept, ia3.parameters())
        with ia3:
            right[name].append(minireft.evaluate(model, tokenizer, test, metrics=("rank",)).rank)
    print(f"put back those {name:16}", "  ".join(f"{share:.0%}: {r:.2f}" for share, r in zip(shares, right[name])))
assert right["that moved most"][3] < right["at random"][3] - 0.05 and right["at random"][4] == before
assert right["that moved most"][1] > after - 0.2 and right["that moved most"][3] > before + 0.05

# %%
# Picture: left, every knob of the feed-forwards by block, most near 1; right, accuracy as knobs are put back to 1
import matplotlib.pyplot as plt
figure, (left, middle) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1.25, 1))
report.draw([left], ["ffn"])
left.set(ylabel="l, the knob's setting", xlabel="block", title=f"The {F} knobs of each feed-forward (bars: mean ± std)")
for name, accuracies in right.items():
    middle.plot([100 * share for share in shares], accuracies, "o-", label=f"put back those {name}")
middle.axhline(before, color="C3", ls=":", label="before training")
middle.set(xlabel="% of the numbers put back to 1", ylabel="right answers", title="Which of them matter?", ylim=(0, 1))
middle.legend()
plt.show()

# %% [markdown]
# The far ones matter more than their share, and yet there is no handful of magic units: without the 3 % that moved most
# nearly all of it is left, and without the 30 % some of it still. A large l alone is no explanation.
#
# ## What a knob cannot do
#
# A unit that is silent stays silent: l · 0 = 0. LoReFT writes along directions of its own choice, at a few tokens;
# (IA)³ turns what is there, at every token, and then costs nothing. Two tasks in one batch, each row with its own
# vectors, is `minireft.Bank`; two sets of vectors made one is `minireft.adapters.compose.weighted_sum`.
#
# ## Two changes to try
#
# - Train `minireft.IA3(model, sites="ffn")`, then `sites="key,value"`. Which half carries more of this task?
# - Train with `weight_decay=0.1`. The knobs come closer to 1: how many can you now put back, the far ones first, before
#   the accuracy falls below 0.7?
#
# ## Exercises

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
    # solution
    return l[:, None] * weight, l * bias
    # end

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
    # solution
    return (a.log() * (1 - s) + b.log() * s).exp()
    # end

# %%
a, b = torch.tensor([4.0, 1.0, 0.25, 9.0]), torch.tensor([1.0, 1.0, 4.0, 1.0])
assert torch.allclose(between(a, b, 0.5), torch.tensor([2.0, 1.0, 1.0, 3.0])), "half-way is another place"
assert torch.allclose(between(a, b, 0.0), a) and torch.allclose(between(a, b, 1.0), b), "it does not go from a to b"
quarter = between(a, b, 0.25)
assert torch.allclose(between(quarter, b, 1 / 3), between(a, b, 0.5)), "equal steps are not equal factors"

# %% [markdown]
# ## In three lines
#
# 1. (IA)³ multiplies keys, values and feed-forward activations by one learned number a channel: a few hundred a block,
#    1 at the start.
# 2. It writes no new direction; trained, it folds into the weights and costs nothing, and comes out again to the bit if
#    the originals were kept.
# 3. The vectors can be read, but a large number is not yet a reason: put it back to 1 and see what is lost.
