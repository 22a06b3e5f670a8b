# %% [markdown]
# # 3 · LoReFT from its equation
#
# **What does h + Rᵀ(W h + b − R h) do to a vector: what is overwritten, and what is left?**
#
# *Before:* tutorials 1 and 2 (stream, site, edit, difference of means), loss and gradient descent. *Time:* 35 minutes.
#
# Run it with `python tutorials/03_loreft_from_its_equation.py`, step through it in a debugger, or open it as a
# notebook.
#
# Tutorial 2 ended with a wish that no fixed vector can grant: call good reviews sad **and** bad ones happy. Here is
# where we stand.

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
# ## The equation on paper
#
# LoReFT (Wu et al. 2024, equation 2) edits a vector h of C numbers:
#
# `Φ(h) = h + Rᵀ(W h + b − R h)`
#
# `R` has r rows of C numbers, each of length 1 and at right angles to the others; `W` has the same shape, `b` has r
# numbers; r, the *rank*, is small. Read it from the inside. `R h` is what h has along the rows of R: r numbers.
# `W h + b` is what it *should* have there. The difference is what is missing, and Rᵀ turns those r numbers back into a
# vector that is added.
#
# Take C = 2 and r = 1, so that everything lies in a plane, and four points h there.
#
# **Predict:** in which directions can a point of the plane move?

# %%
R, W, b = torch.tensor([[0.8, 0.6]]), torch.tensor([[-0.3, 0.5]]), torch.tensor([1.0])           # (r, C), (r, C), (r,)
across = torch.tensor([[-0.6, 0.8]])                                      # (1, C) at right angles to R
h = points = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-1.0, -1.0], [3.0, 1.0]])                    # (4, C)
edited = h + (h @ W.T + b - h @ R.T) @ R                                  # (4, C)
row = lambda x: " ".join(f"{number:5.2f}" for number in x.flatten())
print("along R: ", row(h @ R.T), "  → ", row(edited @ R.T))
print("W h + b: ", row(h @ W.T + b))
print("across R:", row(h @ across.T), "  → ", row(edited @ across.T))
assert torch.allclose(edited @ R.T, h @ W.T + b, atol=1e-5)               # overwritten
assert torch.allclose(edited @ across.T, h @ across.T, atol=1e-5)         # left

# %% [markdown]
# That is the whole idea. **Overwritten:** the r numbers along R become W h + b, whatever they were. **Left:**
# everything at right angles to R. Points move along R and in no other direction. The equation says so itself. Multiply
# it by R from the left: R Φ(h) = R h + R Rᵀ(W h + b − R h). Rows of length 1 at right angles mean R Rᵀ = I, so R h
# falls out and W h + b is left.
#
# What W and b are decides what is written. Three choices are worth knowing by heart.
#
# **Predict:** W = 0, b = 0. Then W = R, b = 0. Then W = −R, b = 2m: where does a point go whose number along R is m +
# 1?

# %%
def loreft(h, R, W, b):                                                   # (..., C), (r, C), (r, C), (r,) → (..., C)
    return h + (h @ W.T + b - h @ R.T) @ R

m = 1.0
for name, W, b in (("W =  0, b = 0 ", 0 * R, [0.0]), ("W =  R, b = 0 ", R, [0.0]), ("W = -R, b = 2m", -R, [2 * m])):
    after = loreft(h, R, W, torch.tensor(b)) @ R.T                        # (4, 1)
    print(name, " ", row(h @ R.T), "  → ", row(after.round(decimals=2) + 0))
assert torch.allclose(loreft(h, R, 0 * R, torch.zeros(1)) @ R.T, torch.zeros(4, 1), atol=1e-5)
assert torch.allclose(loreft(h, R, R, torch.zeros(1)), h, atol=1e-5)
assert torch.allclose(after - m, -(h @ R.T - m), atol=1e-5)

# %% [markdown]
# The first erases. The second changes nothing, which is why the library starts there. The third is a **mirror** at m:
# m + 1 goes to m − 1, and back. A mirror reads before it writes. It is what we need.
#
# ## A mirror for moods, by hand
#
# In the model: R is the unit vector along the difference of means, m the number half-way between the two means. We
# stand at the last token after the last block, where all that remains is the norm and the head. Half of the words are
# kept hidden again.
#
# **Predict:** how many of the hidden good reviews are called sad, and how many of the bad ones happy?

# %%
HAPPY, SAD = tokenizer.vocabulary["happy"], tokenizer.vocabulary["sad"]
def tokens_of(words):
    return torch.tensor([tokenizer.encode(f"review : the {a} was {word} . mood :") for a in ASPECTS for word in words])

good, bad, new_good, new_bad = map(tokens_of, (GOOD[:7], BAD[:7], GOOD[7:], BAD[7:]))            # (98, T) each
h_good, h_bad = (states(model, tokens, L - 1)[:, -1] for tokens in (good, bad))                  # (98, C) both
v = h_bad.mean(0) - h_good.mean(0)                                        # (C,)
R = (v / v.norm())[None]                                                  # (1, C)
m = (h_good.mean(0) + h_bad.mean(0)) @ R.T / 2                            # (1,)
print(f"along R: good {(h_good @ R.T).mean():.1f}, bad {(h_bad @ R.T).mean():.1f}, the mirror stands at {m.item():.1f}")
assert (h_good @ R.T).max() < m < (h_bad @ R.T).min()                     # the mirror stands between all of them

# %%
def mirror(operation, context):
    def edited(x):                                                        # (B, T, C)
        x = operation(x).clone()                                          # (B, T, C)
        x[:, -1] = loreft(x[:, -1], R, -R, 2 * m)
        return x
    return edited

model.blocks[L - 1].output.edits.append(mirror)
by_hand = model(new_good), model(new_bad)                                 # two of (98, T, V)
model.blocks[L - 1].output.edits.clear()
flipped = [(logits[:, -1].argmax(-1) == word).float().mean().item() for logits, word in zip(by_hand, (SAD, HAPPY))]
print(f"hidden good called sad: {flipped[0]:.2f}   hidden bad called happy: {flipped[1]:.2f}")
assert min(flipped) > 0.9

# %% [markdown]
# Both at once, and nothing was trained: one direction, read and written.
#
# ## The same from the library
#
# `minireft.LoReFT` is that equation as an adapter. It keeps `w`, `b`, and a matrix `m` from which R is made: any
# matrix whose rows are independent gives rows of length 1 at right angles
# (`minireft.adapters.orthonormal.orthonormalise` says how). The edit itself is one operation,
# `minireft.ops.low_rank_edit_at_`, its formula in plain PyTorch is `minireft.reference.low_rank_edit`.
#
# **Predict:** how many parameters does one edit of rank 1 have? And what does a new one change?

# %%
reft = minireft.LoReFT(model, rank=1, layers=[L - 1], positions="l1")     # l1: the last token of the prompt
plain = model(new_good)                                                   # (98, T, V)
with reft:
    print(reft.num_parameters(), "parameters; changes nothing:", torch.allclose(model(new_good), plain, atol=1e-3))
    assert torch.allclose(model(new_good), plain, atol=1e-3) and reft.num_parameters() == 2 * C + 1
    with torch.no_grad():
        for parameter, value in ((reft.m, R), (reft.w, -R), (reft.b, 2 * m)):
            parameter.copy_(value)
    same = [torch.allclose(model(x), y, atol=1e-2) for x, y in zip((new_good, new_bad), by_hand)]
print("with our R, W and b it is our mirror:", same)
assert all(same) and torch.allclose(reft.rotations()[L - 1], R, atol=1e-5)

# %% [markdown]
# ## Train it
#
# So far R, W and b came from us. Now forget them: start from a random R and let gradient descent (`minireft.train`)
# find all three, from reviews with the answer exchanged. The model's weights stay as they are. Before and after, we
# count over the hidden words how often the model finds the exchanged answer the likelier of the two
# (`minireft.evaluate` calls that `rank`, because it ranks the answers; it has nothing to do with r).
#
# **Predict:** how many of the hidden reviews does it exchange after 100 steps? Will its R have anything to do with
# ours?

# %%
def exchanged(goods, bads):
    pairs = [(w, "sad .") for w in goods] + [(w, "happy .") for w in bads]
    return [minireft.Example(f"review : the {a} was {w} . mood :", mood, choices=("happy .", "sad ."))
            for a in ASPECTS for w, mood in pairs]

training, test = exchanged(GOOD[:7], BAD[:7]), exchanged(GOOD[7:], BAD[7:])
print(training[0].prompt, training[0].completion)
torch.manual_seed(0)
trained = minireft.LoReFT(model, rank=1, layers=[L - 1], positions="l1")
before = minireft.evaluate(model, tokenizer, test, metrics=("rank",)).rank
run = minireft.train(model, [trained], training, minireft.TrainConfig(steps=100, lr=0.01), progress=False)
print(f"loss of the first batch {run.losses[0]:.2f}, of the last {run.losses[-1]:.2f}")

# %%
longer = torch.cat((new_good, torch.full((98, 1), SAD)), 1)               # (98, T + 1) with a verdict behind it
with trained:
    after = minireft.evaluate(model, tokenizer, test, metrics=("rank",)).rank
    chance = model(new_good)[:, -1].softmax(-1)[:, SAD].mean()
    behind = model(longer, prompt_lengths=torch.full((98,), 9))[:, -1]    # (98, V) what may follow the verdict
R_found = trained.rotations()[L - 1]                                      # (1, C)
cosine = (R_found @ R.T).item()
print(f"hidden reviews exchanged: before {before:.2f}, after {after:.2f}; chance of sad for good ones {chance:.2f}")
print(f"cosine of its R to ours {abs(cosine):.2f}")
assert torch.allclose(behind, model(longer)[:, -1], atol=1e-3)
assert before < 0.1 and after > 0.9 and chance > 0.8 and abs(cosine) > 0.4

# %% [markdown]
# What is left of the loss belongs to the tokens behind the verdict: an edit after the last block reaches the next word
# and no other. A random direction among C would have a cosine of about 1/√C to ours, and training came much closer:
# the loss leads to where the mood is written.
#
# What did it learn to write? For each state, draw the number that was there, R h, against the number that is put
# there, W h + b. An edit that changes nothing would lie on the diagonal.
#
# **Predict:** on which side do the good reviews start, and on which do they end?

# %%
turned = -1 if cosine < 0 else 1                                          # R and −R, with W and b, are the same edit
new = [states(model, tokens, L - 1)[:, -1] for tokens in (new_good, new_bad)]                    # two of (98, C)
there = [turned * (h @ R_found.T)[:, 0] for h in new]                     # two of (98,)
W_found, b_found = trained.w[0, 0].detach(), trained.b[0, 0].detach()     # (1, C), (1,)
put = [turned * (h @ W_found.T + b_found)[:, 0] for h in new]             # two of (98,)
print(f"was there:    good {there[0].mean():4.0f}, bad {there[1].mean():4.0f}")
print(f"is put there: good {put[0].mean():4.0f}, bad {put[1].mean():4.0f}")
assert there[0].mean() < there[1].mean() and put[0].mean() > put[1].mean()

# %% [markdown]
# The order has turned around: training has found a mirror of its own, on a slope of its own.
#
# And what is left? Everything at right angles to R, C − 1 of C numbers. To draw it we take the direction in which the
# rest varies most.
#
# **Predict:** our edit moves every review through the mirror. How far does it move them in that other direction?

# %%
import matplotlib.pyplot as plt
h = torch.cat(new)                                                        # (196, C)
rest = h - h @ R.T @ R                                                    # (196, C) at right angles to R
side = torch.linalg.svd(rest - rest.mean(0), full_matrices=False).Vh[0]   # (C,) where the rest varies most
out = loreft(h, R, -R, 2 * m)                                             # (196, C)
flat = lambda x: torch.stack(((x @ R.T)[:, 0], x @ side), 1)              # (N, C) → (N, 2) along R, along side
along, aside = (flat(out) - flat(h)).abs()[:, 0].mean(), (flat(out) - flat(h)).abs()[:, 1].max()
print(f"moved along R by {along:.1f} on average, in that other direction by {aside:.3f} at most")
assert along > 1 and aside < 0.01

# %%
# Picture: states move along R and stay where they are across it, on paper and in the model; right, what training writes
figure, (paper, left, right) = plt.subplots(1, 3, figsize=(10.5, 3.8))
for axis, before, after, colour in ((paper, points, edited, "C4"), (left, flat(h[:98:9]), flat(out[:98:9]), "C0"),
                                    (left, flat(h[98::9]), flat(out[98::9]), "C1")):
    lines = torch.stack((before, after)).permute(2, 0, 1)                 # x and y, each (2, N)
    axis.plot(*before.T, "o", *after.T, "x", *lines, "-", color=colour, ms=5, lw=0.7)
right.legend(right.plot(there[0], put[0], "o", there[1], put[1], "o", ms=4), ["good reviews", "bad reviews"])
for axis, start, slope in ((paper, (0, 0), 0.6 / 0.8), (left, (m.item(), 0), float("inf")), (right, (0, 0), 1)):
    axis.axline(start, slope=slope, color="C3", ls=":")
paper.set(title="On paper (dotted: along R)", xlabel="first number", ylabel="second number", aspect="equal")
left.set(title="Mirror (dotted) by hand: ● → ×", xlabel="along R", ylabel="at right angles to R")
right.set(title="Trained (dotted: no change)", xlabel="R h, what was there", ylabel="W h + b, what is written")
plt.show()

# %% [markdown]
# On paper the points move from ● to × in parallel, all along R. In the middle the same with 128 numbers, for every
# ninth review: the lines are level, for the height, at right angles to R, stays. On the right, the trained edit writes
# a low number where a high one was and a high one where a low one was.
#
# ## More than one direction
#
# Nothing in the equation says r = 1, one layer or one token. For real work: a few directions, every block, the first
# and the last tokens of the prompt (`f7+l7`: seven each). The rows of R are at right angles, R Rᵀ = I, so what is
# written along one does not disturb what is written along another.
#
# The task is a harder one: reviews of three to six clauses, with negations, where `very` counts twice; and a verdict
# of up, down or even, words that the model has never seen used so. It chooses among three.
#
# **Predict:** how often does the model choose right before any training?

# %%
from minireft import tasks
training, test = tasks.load("mood", "train", 512), tasks.load("mood", "test", 200)
validation = tasks.load("mood", "validation", 200)
before = minireft.evaluate(model, tokenizer, test, metrics=("rank",))
shortest = min(test, key=lambda example: len(example.prompt))
print(shortest.prompt, shortest.completion)
print(f"test, before: {before}")
assert before.rank < 0.6

# %% [markdown]
# The three parts share no review. A model that guesses would be right in one of three.
#
# **Predict:** and after 200 steps of training?

# %%
torch.manual_seed(0)
verdicts = minireft.LoReFT(model, rank=4, layers="all", positions="f7+l7")
run = minireft.train(model, [verdicts], training, minireft.TrainConfig(steps=200, lr=0.01), progress=False)
with verdicts:
    after = [minireft.evaluate(model, tokenizer, part, metrics=("rank",)) for part in (validation, test)]
verdicts.print_trainable_parameters()
print(f"validation, after: {after[0]}\ntest, after: {after[1]}")
assert after[0].rank > before.rank + 0.2 and after[1].rank > before.rank + 0.2

# %%
far = max((R @ R.T - torch.eye(4)).abs().max().item() for R in verdicts.rotations().values())          # R (r, C)
print("R Rᵀ = I after 200 steps of training:", far < 1e-4)
print("shapes: m and w", tuple(verdicts.w.shape), " b", tuple(verdicts.b.shape))
assert far < 1e-4 and verdicts.num_parameters() == L * (2 * 4 * C + 4)
assert 0.004 < verdicts.num_parameters() / sum(parameter.numel() for parameter in model.parameters()) < 0.006

# %% [markdown]
# About half a percent of the model's weights, all of them in `verdicts`; the model itself is what it was. It would be
# surprising if R had drifted: R is made anew from `m` in every step, so no optimiser can bend it.
#
# ## Two changes to try
#
# - Train the mirror after an early block and at the word (`layers=[1]`, `positions=[5]`). Does it still learn? From
#   every seed?
# - Take the reading away: `minireft.ConsReFT` writes a constant b (W = 0), `minireft.LobiReFT` adds one. Which half of
#   the exchange can each do?
#
# ## Exercises

# %% [markdown]
# ### 1 · Two matrices in place of three (8 minutes)
#
# The library's kernel computes h + Aᵀ(D h + d), with two matrices and a vector. Write `folded`: the D, A and d that
# make it LoReFT.
#
# *Hint:* the bracket of LoReFT holds h twice. Collect.

# %%
def folded(R, W, b):
    """D (r, C), A (r, C), d (r,) such that h + Aᵀ(D h + d) is h + Rᵀ(W h + b − R h)."""
    # solution
    return W - R, R, b
    # end

# %%
torch.manual_seed(0)
R2, W2, b2 = torch.linalg.qr(torch.randn(C, 4)).Q.T, torch.randn(4, C), torch.randn(4)           # (r, C), (r, C), (r,)
D, A, d = folded(R2, W2, b2)
h = torch.randn(5, C)
expected = h + (h @ W2.T + b2 - h @ R2.T) @ R2                            # (5, C)
assert torch.allclose(minireft.reference.low_rank_edit(h, D, A, d), expected, atol=1e-3), "that is another edit"

# %% [markdown]
# ### 2 · Borrow a coordinate (10 minutes)
#
# LoReFT descends from an experiment: give one sentence's state what *another* sentence's state has along R, and see
# whether the answer follows. Write `interchange`.
#
# *Hint:* as LoReFT, with the other state's R s in place of W h + b.

# %%
def interchange(h, s, R):
    """h (N, C) with what s (N, C) has along the rows of R (r, C), and everything else its own: (N, C)."""
    # solution
    return h + (s @ R.T - h @ R.T) @ R
    # end

# %%
torch.manual_seed(0)
Q = torch.linalg.qr(torch.randn(C, C)).Q.T                                # (C, C) rows at right angles
R2, others = Q[:3], Q[3:]                                                 # (3, C), (C - 3, C)
h, s = torch.randn(5, C), torch.randn(5, C)
mixed = interchange(h, s, R2)                                             # (5, C)
assert torch.allclose(mixed @ R2.T, s @ R2.T, atol=1e-3), "along R it must be the other's"
assert torch.allclose(mixed @ others.T, h @ others.T, atol=1e-3), "everything else must stay"

# %% [markdown]
# ## In three lines
#
# 1. LoReFT overwrites the r numbers that a state has along the rows of R with W h + b; everything at right angles to R
#    is left.
# 2. W = R changes nothing, W = 0 writes a constant, W = −R is a mirror: because W reads h, it can treat different
#    inputs differently.
# 3. R, W and b can be put in by hand or found by training; either way the model's weights stay as they are.
