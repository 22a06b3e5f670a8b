# %% [markdown]
# # 8 · NEFTune: noise that keeps its size
#
# **Why would anyone blur every word that a model learns from, and how much blur is the right amount?**
#
# *Before:* tutorial 1 (embedding, sites, edits), training loss and test loss. *Time:* 30 minutes.
#
# Run it with `python tutorials/08_neftune_noise_that_keeps_its_size.py`, step through it in a debugger, or open it as a
# notebook.
#
# Here are 48 questions, one about everybody in the model's world, and what it answers.

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
# ## Blurred words
#
# The first thing that happens to a token is its row of the embedding: C numbers. We add noise to them, every number for
# itself, drawn evenly from −s to s. Then we ask two things: is the blurred vector still nearest to its own row? And
# does the model still answer?
#
# **Predict:** the numbers of a row are about 0.2 in size. At which s do words get mixed up: 0.1, 0.5, 2? And which of
# the two breaks first, the nearest row or the answer?

# %%
torch.manual_seed(0)
nearest, right = [], []
for s in (0, 0.1, 0.2, 0.3, 0.5, 1, 2):
    x = weight[people] + s * (2 * torch.rand(*people.shape, C) - 1)       # (B, T, C)
    nearest.append((torch.cdist(x.flatten(0, 1), weight).argmin(-1) == people.flatten()).float().mean().item())
    model.embed.edits.append(lambda operation, context: lambda ids: x)
    right.append((model(people)[:, -1].argmax(-1) == homes).float().mean().item())
    model.embed.edits.clear()
    print(f"s = {s:<4} nearest row is its own: {nearest[-1]:.2f}   right answers: {right[-1]:.2f}")
print(f"size of a row's numbers: {weight.std():.2f}")
assert nearest[4] > 0.99 and right[1] > 0.9 and nearest[-1] < 0.5 and right[4] < 0.3 and 0.15 < weight.std() < 0.3

# %% [markdown]
# Surprised? In C dimensions the rows stand so far apart that noise twice their size mixes up no words. But the model
# loses the answer long before: it reads more from a vector than which row is nearest. So noise can matter while every
# word is still itself. That is the range in which NEFTune (Jain et al. 2023) works, at the lower end: it trains a model
# to give its answer through the blur.
#
# ## How much? A size that does not depend on the length
#
# Take one s for all. A sentence of T tokens gets T · C random numbers, each of variance s² / 3, since a number drawn
# evenly from −1 to 1 has variance 1/3. So the *whole* noise is about s √(T C / 3) long.
#
# **Predict:** a sentence of 64 tokens against one of 4: how many times as long is its noise?

# %%
def uniform(T):                                                           # → (T, C)
    return 2 * torch.rand(T, C) - 1

s, alpha, lengths = 0.1, 5.0, (4, 16, 64)
fixed = [(s * uniform(T)).norm().item() for T in lengths]
scaled = [(alpha / (T * C) ** 0.5 * uniform(T)).norm().item() for T in lengths]
print("one s for all:  ", [round(x, 2) for x in fixed])
print("α / √(T C):     ", [round(x, 2) for x in scaled], f"  and α / √3 = {alpha / 3 ** 0.5:.2f}")
assert 3.7 < fixed[2] / fixed[0] < 4.3 and all(abs(x - alpha / 3**0.5) < 0.15 for x in scaled)

# %% [markdown]
# Four times as long, √16. NEFTune divides it away: `x' = x + α / √(T C) · ε`, ε evenly from −1 to 1. A sentence's noise
# then has one size, α / √3, however long the sentence and however wide the model. α is 5, 10 or 15 in the paper.
#
# ## From the library
#
# `minireft.NEFTune` is an adapter without parameters on the site `embed`. Noise belongs to training: in evaluation, and
# while it writes, the model must not hear it.
#
# **Predict:** four passes over the same question with the noise attached: twice in training mode, once in evaluation
# mode, once again after the trainer's `begin(0)`. Which of them are equal?

# %%
noise = minireft.NEFTune(model, alpha=5.0, seed=0)
quiet = model(people[:1])                                                 # (1, T, V)
with noise:
    model.train()
    first, second = model(people[:1]), model(people[:1])
    noise.begin(0)                                                        # the number of the step that comes
    again = model(people[:1])
    model.eval()
    evaluated = model(people[:1])
print("two steps equal:", torch.equal(first, second), "  step 0 again:", torch.equal(first, again),
      "  evaluation is quiet:", torch.equal(evaluated, quiet))
assert not torch.equal(first, second) and torch.equal(first, again) and torch.equal(evaluated, quiet)

# %% [markdown]
# The noise of a step can be had again: it is not drawn from a running generator but computed from (seed, step, example,
# token, channel), see `minireft.reference.philox_noise`. So a run that was stopped and resumed, or cut into smaller
# batches, trains on the very same noise.
#
# ## Padding: whose length is T?
#
# Sentences of unlike length share a batch, so the short ones are filled up with padding. The paper's algorithm and the
# usual libraries take T to be the padded length. The authors' own training code takes each sentence's real length, and
# so do we: `length="real"`, with no noise on the padding.
#
# **Predict:** a sentence of 5 tokens stands beside one of 20. How long is its noise under either rule, on its own
# tokens? α is 5.

# %%
def heard(noise, batch):                                                  # what is added to the embedding: (B, T, C)
    kept = []
    with noise:
        model.embed.edits.append(lambda operation, context: lambda ids: kept.append(operation(ids)) or kept[0])
        noise.begin(0, batch.example)
        model.train().stream(batch.tokens, batch.mask)
        model.embed.edits.pop()
    model.eval()
    return kept[0] - weight[batch.tokens]

rows = [encode(tokenizer, minireft.Example(" ".join(PEOPLE[:n]), PEOPLE[0]), model.config.context) for n in (3, 18, 8)]
print("tokens:", [len(row.ids) for row in rows])
assert [len(row.ids) for row in rows] == [5, 20, 10]

# %%
batch, own = collate(rows), {}
for length in ("real", "padded"):
    added = heard(minireft.NEFTune(model, alpha=5.0, length=length), batch)                      # (B, T, C)
    own[length] = [x[real].norm().item() for x, real in zip(added, batch.mask)]
    on_padding = added[~batch.mask].abs().max().item()
    print(f"{length:7}", "noise on own tokens:", [round(n, 2) for n in own[length]], f"  on padding: {on_padding:.2f}")
    assert (on_padding == 0) == (length == "real")
assert all(abs(n - 5 / 3**0.5) < 0.2 for n in own["real"]) and abs(own["padded"][0] / own["padded"][1] - 0.5) < 0.05

# %% [markdown]
# Under the padded rule the short sentence hears half as much: √(5 / 20). How much depends on who happens to stand
# beside it, and padding gets noise that nobody reads.
#
# ## Packing: several sentences in a row
#
# Padding is wasted work. `minireft.data.pack` lays several examples into one row instead, and numbers them in the mask:
# 1, 2, 3. Attention stays within a number, places are counted anew.
#
# **Predict:** three sentences in one row. Is each one's noise the same as in a row of its own, to the bit? And what the
# model makes of it?

# %%
together = pack(rows, model.config.context)
print("mask:", together.mask[0].tolist())
apart, packed = (heard(minireft.NEFTune(model, alpha=5.0), b) for b in (batch, together))      # (3, 20, C), (1, 35, C)
same = [torch.equal(packed[0][together.example[0] == i], apart[i][batch.mask[i]]) for i in range(3)]
logits = model(together.tokens, together.mask)                            # (1, T, V)
alone = model(torch.tensor([rows[2].ids]))                                # (1, 10, V)
close = torch.allclose(logits[0][together.example[0] == 2], alone[0], atol=1e-3)
print(f"{batch.tokens.numel()} places unpacked, {together.tokens.numel()} packed; noise equal: {same}; logits: {close}")
assert all(same) and close and together.tokens.numel() == 35

# %% [markdown]
# ## What it does to training
#
# Now all of the model's weights are trained on 96 instructions, again and again, until it knows them almost by heart;
# once without noise, once with α = 8. Both losses are measured *without* noise, on the 96 and on 150 that it never saw.
# (`pack=True` trains on packed rows.)
#
# **Predict:** which of the two has the lower loss on the 96? Which on the others?

# %%
training, test = tasks.load("instructions", "train", 96), tasks.load("instructions", "test", 150)
def loss_on(model, examples):                                             # nats a token, quiet
    batch = collate([encode(tokenizer, example, model.config.context) for example in examples])
    with torch.no_grad():
        return minireft.losses.cross_entropy(model(batch.tokens, batch.mask), batch.tokens, batch.answer).item()

config, losses = minireft.TrainConfig(steps=100, lr=5e-4, full=True, pack=True), {}
for name, noises in (("no noise", []), ("α = 8", [dict(alpha=8.0)])):
    student, _ = minireft.load("base")
    minireft.train(student, [minireft.NEFTune(student, **noise) for noise in noises], training, config, progress=False)
    losses[name] = [loss_on(student, training), loss_on(student, test)]
    print(f"{name:9} loss on the 96: {losses[name][0]:.3f}   on others: {losses[name][1]:.3f}")
assert losses["α = 8"][0] > 1.3 * losses["no noise"][0] and losses["α = 8"][1] < losses["no noise"][1] - 0.03

# %% [markdown]
# The noisy student knows its 96 less well and the others a little better: it could not learn them letter by letter,
# since it never saw the same vectors twice. That is what the paper reports of language models, too.
#
# Is it a *better* student? The paper's were: judges liked their answers far more. Do not take that from us. Four seeds,
# 256 instructions, and a program that checks whether an instruction was obeyed (`minireft analyse neftune` runs it and
# keeps what it found):
#
# **Predict:** does the noisy student obey more often?

# %%
import json
from pathlib import Path
found = json.loads((Path(minireft.__file__).parent.parent / "benchmarks/results/neftune.json").read_text())["runs"]
means = {}
for measure in ("train loss", "test loss", "ROUGE-L", "obeyed", "length"):
    pairs = [(a[measure], b[measure]) for a, b in zip(found["no noise"], found["uniform, α = 5"])]
    difference = torch.tensor([b - a for a, b in pairs])                  # (seeds,)
    means[measure] = difference.mean().item(), 3.18 * difference.std().item() / len(pairs) ** 0.5
    print(f"{measure:11} difference with α = 5: {means[measure][0]:+.3f} ± {means[measure][1]:.3f}")
assert means["train loss"][0] > means["train loss"][1] and means["ROUGE-L"][0] < -means["ROUGE-L"][1]
assert abs(means["obeyed"][0]) < means["obeyed"][1] and abs(means["test loss"][0]) < means["test loss"][1]

# %%
# Picture: left, the noise on a sentence by its length under three rules; right, the losses of both students
import matplotlib.pyplot as plt
figure, (left, middle) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1.3, 1))
n = torch.arange(1, 65)                                                   # a sentence of n tokens beside one of 64
left.plot(n, s * (n * C / 3).sqrt(), n, alpha * (n / 64 / 3).sqrt(), n, alpha / 3**0.5 + 0 * n)
left.plot([5, 20, 10], own["real"], "o", color="C2")
left.legend(["one s for all", "α / √(T C), T padded to 64", "α / √(T C), T real", "the same, measured above"])
left.set(xlabel="tokens in the sentence", ylabel="noise on its own tokens", title="One rule keeps its size")
for i, (name, pair) in enumerate(losses.items()):
    middle.bar([0.36 * i, 1 + 0.36 * i], pair, 0.34, label=name)
middle.set(xticks=[0.18, 1.18], xticklabels=["the 96", "others"], ylabel="nats a token", title="Losses without noise")
middle.legend(loc="upper left")
plt.show()

# %% [markdown]
# ± is a 95 % interval. Less by heart, that much is clear: the loss on the training items is higher, and answers to them
# overlap less with theirs (ROUGE-L). With more examples than our 96 the gain on others is within the interval, and
# instructions are not obeyed more often. Instructions of this world have one form of answer each, and little to gain
# from freedom; the paper's judges compared free prose, which noise made longer. Noise keeps a model from learning its
# data word by word. It is no promise beyond.
#
# ## Two changes to try
#
# - Train with `distribution="gaussian"`. Its numbers have variance 1 instead of 1/3: to compare like with like, what α
#   must you take?
# - Train with α = 50, where words begin to be mixed up. Which loss tells you first?
#
# ## Exercises

# %% [markdown]
# ### 1 · NEFTune in three lines (8 minutes)
#
# Write `neftune`: the noise that is to be added, by real lengths and with none on padding.
#
# *Hint:* a row's real length is the sum of its mask. Watch the shapes: (B,), (B, T), (B, T, C).

# %%
def neftune(eps, mask, alpha):
    """eps (B, T, C) evenly from −1 to 1, mask (B, T) True = real token: α / √(T_b C) · ε, 0 on padding. (B, T, C)"""
    # solution
    lengths = mask.sum(1)                                                 # (B,)
    scale = alpha / (lengths * eps.shape[2]) ** 0.5                       # (B,)
    return scale[:, None, None] * eps * mask[:, :, None]
    # end

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
    # solution
    same = documents[:, :, None] == documents[:, None, :]                 # (B, T, T)
    return same.sum(2) * (documents > 0)
    # end

# %%
documents = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 0]])                   # (2, 8)
expected = torch.tensor([[3, 3, 3, 2, 2, 1, 0, 0], [1, 6, 6, 6, 6, 6, 6, 0]])
result = own_lengths(documents)
assert torch.equal(result[documents == 0], expected[documents == 0]), "padding has a length"
assert torch.equal(result, expected), f"got {result.tolist()}"

# %% [markdown]
# ## In three lines
#
# 1. NEFTune adds fresh noise to the embeddings while a model trains, and at no other time.
# 2. Divided by √(T C) a sentence's noise has one size; T is the sentence's own length, whether it is padded or packed.
# 3. It keeps the model from learning by heart; whether that makes answers better has to be measured, each time anew.
