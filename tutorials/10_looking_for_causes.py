# %% [markdown]
# # 10 · Looking for causes
#
# **You can read something in a model's state. How do you find out whether the model uses it?**
#
# *Before:* tutorials 1 to 3 (stream, site, edit, difference of means, what R overwrites). *Time:* 40 minutes.
#
# Run it with `python tutorials/10_looking_for_causes.py`, step through it in a debugger, or open it as a notebook.
#
# We ask the model six things about people: where they live, what they do, which pet they keep, and so on. We call
# such a thing an *attribute*. All questions end with the same colon, and the answer comes out of the colon's vector.
# So that vector must come to know two things: *who* is meant, and *what is asked*. We follow the second.

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
# Whatever we find, we find on the people of `train`, and score on those of `test`.
#
# ## Reading is easy
#
# Each attribute is asked in two wordings. A *linear probe* looks at the colon's vectors and is fitted, by least
# squares, to say which of the six is asked. Beside our model we put one of the same shape that has learned nothing:
# its weights are random numbers.
#
# **Predict:** for people it has not seen, how often is the probe right, after block 3 of our model? And after block 5
# of the random one? A guess is right in one of six.

# %%
def colons(m, layer, names):                                              # → (N, C) vectors, (N,) which attribute
    asks = [(k, wording) for k, attribute in enumerate(KNOWN) for wording in ATTRIBUTES[attribute].asks]
    texts = [[f"question : {wording.format(s=name)} ? answer :" for name in names] for _, wording in asks]
    found = [states(m, torch.tensor([tokenizer.encode(t) for t in rows]), layer)[:, -1] for rows in texts]
    return torch.cat(found), torch.tensor([k for k, _ in asks]).repeat_interleave(len(names))

torch.manual_seed(1)
untrained = minireft.Model(model.config).requires_grad_(False).eval()
h, asked = colons(model, 3, split["train"])
print(f"{len(h)} questions about {len(split['train'])} people, a vector of {h.shape[1]} numbers each")
assert h.shape == (12 * 30, C) and asked.bincount().tolist() == [60] * 6

# %%
def probe(m, layer):
    with_one = lambda x: torch.cat((x, torch.ones(len(x), 1)), 1).double()                       # (N, C + 1)
    (h, asked), (new, truth) = colons(m, layer, split["train"]), colons(m, layer, split["test"])
    fitted = torch.linalg.lstsq(with_one(h), torch.eye(6).double()[asked]).solution              # (C + 1, 6)
    return ((with_one(new) @ fitted).argmax(1) == truth).float().mean().item()

read = {"block 3": probe(model, 3), "block 5": probe(model, 5), "block 5, random weights": probe(untrained, 5)}
print("right about new people:", {place: round(share, 2) for place, share in read.items()})
assert min(read.values()) > 0.9

# %% [markdown]
# All three. In the random model too, though it cannot answer anything: attention carries some of every word to every
# later place, and what is mixed in can be unmixed. That something *can be read* from a state tells what is there, and
# nothing about what the model does with it.
#
# ## An experiment instead
#
# To find a cause, change it. Ask a *base* question, but at one stop give the last colon the vector that it has in
# another question, the *source*. This is an **interchange intervention**. The base asks about one person, the source
# about something else of somebody else.
#
# **Predict:** three answers are possible. The base's own; the source's; or a third, that neither question has: the
# base's person, and what the source asks. After which block do you expect which?

# %%
base, source = "question : what is the home of anna ? answer :", "question : which pet does carl keep ? answer :"
third = "question : which pet does anna keep ? answer :"
tokens, other = (torch.tensor([tokenizer.encode(text)]) for text in (base, source))              # (1, T)
answers = minireft.generate(model, tokenizer, [base, source, third], max_new_tokens=1)
print("base, source, third:", *answers)
assert len(set(answers)) == 3

# %%
def swap(operation, context):
    return lambda x: torch.cat((operation(x)[:, :-1], s), 1)                                     # (1, T, C)

said = []
for layer, block in enumerate(model.blocks):
    s = states(model, other, layer)[:, -1:]                               # (1, 1, C) the source's
    block.output.edits.append(swap)
    said.append(tokenizer.decode([model(tokens)[0, -1].argmax()]))
    block.output.edits.clear()
print("swapped after block 0, 1, ...:", *said)
assert [said[0], said[-1], said[4]] == answers

# %% [markdown]
# The third answer appears. Swapped after block 4, the colon's vector says what is asked, and not yet of whom: `anna`
# is fetched after that, from her own place. A block later the vector brings `carl` along.
#
# One pair proves little. `benchmarks/das.py` draws 400, of people from `test`.
# `minireft.adapters.more.interchange.Pair` holds the tokens of base and source, and the third answer;
# `minireft.adapters.more.interchange.Interchange` does the swap. For now it swaps everything: its rank is C.
#
# **Predict:** three curves over the blocks, one for each answer. Can more than one be at 1?

# %%
from minireft.adapters.more.interchange import Interchange, Pair
among = values(tokenizer)                                                 # every value of the six attributes, as tokens
test = pairs(tokenizer, "attribute", split["test"], 400, seed=3)
print("base:  ", tokenizer.decode(test[0].base), "\nsource:", tokenizer.decode(test[0].source))
print("third: ", tokenizer.decode([test[0].answer]))

def own_answers(questions):                                               # the model's own, nothing swapped → (400,)
    words = minireft.generate(model, tokenizer, [tokenizer.decode(q) for q in questions], max_new_tokens=1)
    return torch.tensor([tokenizer.vocabulary[word] for word in words])

candidates = {"the base's": own_answers([p.base for p in test]), "the source's": own_answers([p.source for p in test]),
              "the third": torch.tensor([p.answer for p in test])}
assert all(len(tokens) == 400 for tokens in candidates.values())

# %%
whole = {name: [] for name in candidates}
for layer in range(L):
    with torch.no_grad():
        logits = Interchange(model, layer, rank=C, position=-1).logits(test)                     # (400, V)
    said = torch.tensor(among)[logits[:, among].argmax(-1)]               # (400,) the likeliest of all values
    for name, tokens in candidates.items():
        whole[name].append((said == tokens).float().mean().item())
for name, shares in whole.items():
    print(f"{name:13} after block 0, 1, ...:", "  ".join(f"{share:.2f}" for share in shares))
assert min(whole["the base's"][:3]) > 0.9 and whole["the third"][4] > 0.95 and min(whole["the source's"][5:]) > 0.95
assert max(whole["the third"][5:]) < 0.2

# %% [markdown]
# One after the other: the base's, for one block the third, then the source's. (What is left over at the end, 0.08,
# are pairs in which both people happen to have the same.)
#
# Now look back at the probe. After block 3 it reads what is asked without a mistake, and swapping that very vector
# changes nothing: it is there, and not used from there. After block 5 it reads as well, and the swap replaces too much.
#
# ## A part of the state, by hand
#
# Is what is asked a *part* of the vector after block 5, that could be exchanged alone? Tutorial 3 knows how to
# overwrite a part: with rows of R of length 1 and at right angles, `h + Rᵀ(R s − R h)` has what s has along R, and is
# h everywhere else. And tutorial 2 knows directions that mean something: differences of means. Six attributes have
# six means, and they span five directions.
#
# **Predict:** exchange these five of 128 numbers after block 5. How many of the 400 give the third answer? And with
# five directions at random?

# %%
def directions(layer):                                                    # → (5, C)
    h, asked = colons(model, layer, split["train"])                       # (N, C), (N,)
    means = torch.stack([h[asked == k].mean(0) for k in range(6)])        # (6, C)
    return torch.linalg.qr((means[1:] - means[:1]).T).Q.T

R = directions(5)
print("R Rᵀ = I:", torch.allclose(R @ R.T, torch.eye(5), atol=1e-4), tuple(R.shape))
assert torch.allclose(R @ R.T, torch.eye(5), atol=1e-4)

# %%
def exchanged(R, layer):
    swap = Interchange(model, layer, rank=len(R), position=-1)
    with torch.no_grad():
        swap.m.copy_(R)
    return swap.accuracy(test, among)

by_means = {"after block 5": exchanged(R, 5),
            "five at random": exchanged(torch.linalg.qr(torch.randn(C, 5)).Q.T, 5),
            "after block 3": exchanged(directions(3), 3)}
print("the third answer:", {name: round(share, 2) for name, share in by_means.items()})
assert by_means["after block 5"] > 0.95 and by_means["five at random"] < 0.05 and by_means["after block 3"] < 0.1

# %% [markdown]
# Practically all of them, with nothing trained; the person stays who it was. So after block 5 what is asked stands in
# five directions that later blocks read. After block 3 the same recipe finds directions as well, and nobody reads them.
#
# ## Search: DAS
#
# For means we had to know the six attributes and sort questions by them. **Distributed alignment search** (Geiger et
# al. 2023) needs no sorting. It starts from a random R and turns it by gradient descent until the swapped runs answer
# as they should; the model's weights stay as they are. That is `Interchange.fit`, thirty lines.
#
# **Predict:** R has 16 rows. How many third answers, for people never trained on? Will its 16 directions contain our
# five?

# %%
train = pairs(tokenizer, "attribute", split["train"], 3000, seed=1)
def search(m, layer, rank, pairs=train, steps=30, lr=0.02):
    torch.manual_seed(0)
    found = Interchange(m, layer, rank, position=-1)
    found.losses = found.fit(pairs, steps, lr)
    return found

das = search(model, 5, rank=16)
score, overlap = das.accuracy(test, among), similarity(das.rotation(), R)
print(f"loss {das.losses[0]:.1f} → {das.losses[-1]:.2f}, the third answer: {score:.2f}")
print(f"of our five directions it holds {overlap:.0%}; 16 at random would hold {16 / C:.0%}")
assert score > 0.95 and overlap > 0.5

# %% [markdown]
# (`minireft.reading.similarity` compares two subspaces.) The search, which was told nothing of attributes, and the
# means, which were told nothing of answers, found nearly the same place.
#
# **Predict:** with how few directions does it work? Six things can be told apart in a plane, or on a line.

# %%
by_rank = {rank: search(model, 5, rank, steps=45).accuracy(test, among) for rank in range(1, 6)}
print("the third answer, by rank:", {rank: round(share, 2) for rank, share in by_rank.items()})
assert by_rank[1] < 0.2 and by_rank[2] < 0.6 and by_rank[3] < 0.85 and by_rank[5] > 0.9

# %% [markdown]
# It takes five, one fewer than there are attributes, as with the means: each one more direction tells one more
# attribute apart. The model spends a direction on each, where a line would have had room for all.
#
# ## Why you should not believe this yet
#
# A search with 16 · 128 numbers to turn is told which answers to produce. If it is strong enough it may *make* a path
# to them, from whatever lies around, where the model itself has none. Then it would succeed in any model. And its
# score on the pairs it was trained on says little: here is how that looks with few pairs.
#
# **Predict:** train on 16 pairs only. The third answer on those 16? On the 400?

# %%
few = search(model, 5, rank=16, pairs=train[:16])
own_score, new_score = few.accuracy(train[:16], among), few.accuracy(test, among)
print(f"16 pairs: {own_score:.2f} on the pairs it was trained on, {new_score:.2f} on new people")
assert own_score > 0.95 and new_score < own_score - 0.1

# %% [markdown]
# So the score counts only on new people, and only against *controls*, each of which removes one excuse:
#
# - **the random model**: the same search, in a model that has learned nothing. If it succeeds there, the success is
#   the search's own;
# - **the whole state**: everything swapped at the same place. If that succeeds too, R has told nothing apart;
# - **random directions**, as many: if they succeed, any R would do;
# - **nothing swapped**, the base as its own source: what an accuracy starts from.
#
# **Predict:** each of the four, at block 5. And which of them would have failed us at block 4?

# %%
R16 = torch.linalg.qr(torch.randn(C, 16)).Q.T                             # (16, C)
scores = {"found": score, "random model": search(untrained, 5, rank=16).accuracy(test, among),
          "whole state": whole["the third"][5], "random directions": exchanged(R16, 5),
          "nothing swapped": das.accuracy([Pair(p.base, p.base, p.answer) for p in test], among)}
print("\n".join(f"{name:18} {share:.2f}" for name, share in scores.items()))
print(f"a guess among the values of the attribute asked: {sum(1 / len(ATTRIBUTES[a].values) for a in KNOWN) / 6:.2f}")
assert max(share for name, share in scores.items() if name != "found") < 0.2 < 0.95 < scores["found"]

# %%
# Picture: left, answers by the block after which the whole vector was swapped; right, R after block 5 and controls
import matplotlib.pyplot as plt
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1.3, 1))
for i, ((name, shares), x, y) in enumerate(zip(whole.items(), (1, 5.6, 3.3), (0.92, 0.92, 1.04))):
    left.plot(range(L), shares, "s^o"[i] + "-", color=f"C{i}")
    left.text(x, y, name, color=f"C{i}", weight="bold")
left.plot([5], [score], "*", color="C2", markeredgecolor="black", ms=18, zorder=3)
left.annotate("R alone is swapped:\nthe third", (5, score - 0.03), (4.9, 0.5), arrowprops={"arrowstyle": "->"})
left.set(xlabel="the last colon's vector swapped after block", ylabel="share of 400 pairs", ylim=(-0.03, 1.13))
bars = right.barh(list(scores), list(scores.values()), color=["C2", *["C3"] * 4])
right.bar_label(bars, fmt="%.2f", padding=4)
right.set(xlabel="share of third answers, after block 5", xlim=(0, 1.2), ylim=(4.6, -0.6))
plt.show()

# %% [markdown]
# None of the controls comes near. At block 4 the whole state scores 1.00: there a found R would have shown nothing,
# and this is why we went on to block 5.
#
# ## What has been shown, and what has not
#
# Shown: after block 5, the last colon's vector holds what is asked in a subspace of its own, and what comes later
# reads it there. Not shown: that it is the only place, or that some other variable of ours is kept so neatly. *Who* is
# meant is not, for one. `benchmarks/das.py` looked for it at the name, after the blocks where the whole state works.
#
# **Predict:** 48 people, 16 directions. Does the search find the person?

# %%
import json
person = json.loads((RESULTS / "das.json").read_text())["person"]
for name in ("found", "whole state", "random R", "random model", "nothing swapped"):
    print(f"{name:16} {person[name]:.2f}")
assert person["whole state"] > 0.95 > 0.7 > person["found"] > person["nothing swapped"] + 0.2

# %% [markdown]
# Half. By the measure above 48 people may need 47 directions; a search of rank 16 that fails is no proof that there is
# nothing, either.
#
# And now look at LoReFT again: `h + Rᵀ(W h + b − R h)`. It is this interchange, with W h + b in the place of R s: it
# learns to *make up* the source.
#
# ## Two changes to try
#
# - Search after block 6 and 7. How late can what is asked still be exchanged, when the answer is all but written?
# - Give the random model a better chance: let the expected answers be its *own* to the third question, not the
#   world's. Watch what "nothing swapped" scores then, before you believe what "found" does.
#
# ## Exercises

# %% [markdown]
# ### 1 · Directions between means (10 minutes)
#
# Write `span`: orthonormal rows for all differences between k means, and for nothing else.
#
# *Hint:* differences to the first mean will do; `torch.linalg.qr` makes *columns* orthonormal.

# %%
def span(means):
    """means (k, C), k ≤ C → R (k − 1, C): R Rᵀ = I, and every difference of two means lies in the span of its rows."""
    # solution
    return torch.linalg.qr((means[1:] - means[:1]).T).Q.T
    # end

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
    # solution
    counts = (third != base) & (third != source)                          # (N,)
    return (said == third)[counts].float().mean().item()
    # end

# %%
third, base = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([9, 9, 3, 9, 9, 9])
source = torch.tensor([8, 2, 8, 8, 8, 8])                                 # the second pair and the third do not count
assert clear_share(third, third, base, source) == 1, "where it is always said, the share is 1"
assert clear_share(base, third, base, source) == 0, "the base's own answer is none"
assert clear_share(source, third, base, source) == 0, "the source's own answer is none"
half = torch.tensor([1, 2, 3, 4, 9, 9])
assert clear_share(half, third, base, source) == 0.5, "two of the four that count"

# %% [markdown]
# ## In three lines
#
# 1. A probe shows what can be read; only an exchange shows what is used.
# 2. Swap along R alone, `h + Rᵀ(R s − R h)`, and an answer that stands in neither question says that R carries what
#    you think it carries.
# 3. A search can fool you: new people, a random model, the whole state and random directions are part of the result.
