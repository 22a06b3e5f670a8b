# %% [markdown]
# # 2 · Edit one vector by hand
#
# **Can you change a model's mind by adding one vector to one token, with no training at all?**
#
# *Before:* tutorial 1 (stream, site, edit), the softmax. *Time:* 25 minutes.
#
# Run it with `python tutorials/02_edit_one_vector_by_hand.py`, step through it in a debugger, or open it as a
# notebook.
#
# In tutorial 1 we swapped whole vectors between sentences, and answers went along. A vector that was swapped says
# everything at once. Here we make one ourselves that is to say a single thing. The model can tell whether a review is
# happy or sad: this we want to turn around, and nothing else. Look first.

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
# ## What differs between happy and sad?
#
# The world has 14 good words, 14 bad ones and 14 things to say them of. We take half of the words to look at and keep
# the other half hidden. What we find must work on words that we never looked at.
#
# **Predict:** how many of the 14 × 14 reviews of each kind does the model get right?

# %%
HAPPY, SAD = tokenizer.vocabulary["happy"], tokenizer.vocabulary["sad"]
WORD, LAST = 5, 8                                                         # the good or bad word's token, and the last

def tokens_of(words):                                                     # → (B, T)
    texts = [f"review : the {aspect} was {word} . mood :" for aspect in ASPECTS for word in words]
    return torch.tensor([tokenizer.encode(text) for text in texts])

def share(tokens, mood):                                                  # (B, T) → how many rows answer `mood`
    return (model(tokens)[:, -1].argmax(-1) == mood).float().mean().item()

good, bad, new_good, new_bad = map(tokens_of, (GOOD[:7], BAD[:7], GOOD[7:], BAD[7:]))            # (98, 9) each
print(f"hidden words: good called happy {share(new_good, HAPPY):.2f}, bad called sad {share(new_bad, SAD):.2f}")
assert share(new_good, HAPPY) > 0.95 and share(new_bad, SAD) > 0.95

# %% [markdown]
# `minireft.reading.states` gives the stream after a block, as the recorder of tutorial 1's exercise does. Take it after
# block 1, at the word itself: one vector for each review. The mean of the bad ones less the mean of the good ones is a
# *difference of means*: what single words have of their own cancels, what all bad words share against all good ones
# stays.
#
# **Predict:** compare its length with the distance between a single bad word's vector and a single good one's. Longer
# or shorter?

# %%
LAYER = 1
h_good, h_bad = states(model, good, LAYER)[:, WORD], states(model, bad, LAYER)[:, WORD]          # (98, C) both
v = h_bad.mean(0) - h_good.mean(0)                                        # (C,)
single = (h_bad[:, None] - h_good[None, :]).norm(dim=-1).mean()           # over all pairs
print(f"a state is {h_good.norm(dim=-1).mean():.1f} long, two are {single:.1f} apart, v is {v.norm():.1f} long")
assert v.norm() < single

# %% [markdown]
# Shorter, as a mean of vectors is never longer than the vectors are on average: what was about being `great` rather
# than `lovely` has cancelled. `v` is our guess at the direction from happy to sad.
#
# ## Add it to one vector
#
# Nine tokens, L blocks, and we change a single vector of that whole grid: token 5 (the word) after block 1. We add
# `v`. The word stays `great`, its token is still the token of `great`, and no weight changes.
#
# **Predict:** of the 98 reviews with good words that we kept hidden, how many does the model now call sad?

# %%
def adding(vector, place):
    def edit(operation, context):
        def edited(x):                                                    # (B, T, C)
            x = operation(x).clone()                                      # (B, T, C)
            x[:, place] += vector
            return x
        return edited
    return edit

model.blocks[LAYER].output.edits.append(adding(v, WORD))
print(f"sad of the good reviews: {share(new_good, SAD):.2f}")
assert share(new_good, SAD) > 0.9
model.blocks[LAYER].output.edits.clear()

# %% [markdown]
# You should see almost all of them. But perhaps any push of that length confuses the model into saying sad. So push it
# just as far in directions drawn at random.
#
# **Predict:** sad of the good reviews, for five random directions of the same length.

# %%
torch.manual_seed(0)
found = []
for _ in range(5):
    random = torch.randn(C)                                               # (C,)
    model.blocks[LAYER].output.edits.append(adding(random * v.norm() / random.norm(), WORD))
    found.append(share(new_good, SAD))
    model.blocks[LAYER].output.edits.clear()
print("sad of the good reviews, five random pushes:", [round(x, 2) for x in found])
assert sum(found) / 5 < 0.3

# %% [markdown]
# The direction matters, not the push. It would be surprising if random directions worked: of C directions at right
# angles to each other, only a few mean anything to the blocks that read this token.
#
# And how much of it is needed? Scale `v` by s.
#
# **Predict:** does the probability of `happy` fall in a straight line from s = 0 to s = 1, or does it tip over?

# %%
chances = []
for s in (0, 0.25, 0.5, 0.75, 1, 1.5):
    model.blocks[LAYER].output.edits.append(adding(s * v, WORD))
    chances.append(model(new_good)[:, -1].softmax(-1)[:, HAPPY].mean().item())
    model.blocks[LAYER].output.edits.clear()
    print(f"s = {s:<4}   probability of happy {chances[-1]:.2f}")
assert chances[1] > 0.9 and chances[3] < 0.1 and chances[5] < 0.1

# %% [markdown]
# It tips over: nothing at a quarter, everything at three quarters. The model decides between two words, and v crosses
# the line between them.
#
# ## Where does it work?
#
# We chose block 1 and the word. Try every block, at the word and at the last token, each with the difference of means
# of its own place.
#
# **Predict:** two curves over the blocks, one for the word, one for the last token. Where is each high?

# %%
sad = {}                                                                  # (place, kind) → a share for each block
for place in (WORD, LAST):
    for layer in range(L):
        mean = (states(model, bad, layer) - states(model, good, layer))[:, place].mean(0)        # (C,)
        random = torch.randn(C)
        for kind, push in (("means", mean), ("random", random * mean.norm() / random.norm())):
            model.blocks[layer].output.edits.append(adding(push, place))
            sad.setdefault((place, kind), []).append(share(new_good, SAD))
            model.blocks[layer].output.edits.clear()
word, end = sad[WORD, "means"], sad[LAST, "means"]
assert word[0] > 0.9 and word[-1] == 0 and end[0] < 0.2 and end[-1] > 0.9
assert max(sad[WORD, "random"] + sad[LAST, "random"]) < 0.3

# %%
# Picture: good reviews called sad, by the block after which v was added, at the word and at the last token
import matplotlib.pyplot as plt
for place, name, colour, at in ((WORD, "at the word", "C0", (2, 1.03)), (LAST, "at the last token", "C1", (5.8, 1.03))):
    plt.plot(sad[place, "random"], "s--", color=colour, ms=11, mfc="none", alpha=0.6)
    plt.plot(sad[place, "means"], "o-", color=colour)
    plt.text(*at, name, color=colour, weight="bold", ha="center")
plt.text(-0.08, 0.05, "squares: a random vector as long, at either place")
plt.gca().set(xlabel="difference of means added after block", ylabel="good reviews called sad", ylim=(-0.05, 1.12))
plt.title("The mood leaves the word and arrives at the last token")
plt.show()

# %% [markdown]
# The curves change places. Early, the mood sits at the word; later blocks carry it to the last token, and from then on
# an edit at the word comes too late: nobody reads there any more. That the first curve ends at exactly 0 needs no
# measurement: after the last block no token looks at another.
#
# ## The same from the library
#
# `minireft.SteeringVector` is this edit as an adapter, with `strength` for s. It is the simplest of the methods that
# edit states and leave the weights alone, *representation finetuning*, ReFT for short: `h + v`.
#
# **Predict:** how many of its parameters are trained?

# %%
steer = minireft.SteeringVector(model, vectors=v[None], layers=[LAYER], positions=[WORD])        # vectors (1, C)
model.blocks[LAYER].output.edits.append(adding(v, WORD))
by_hand = model(new_good)                                                 # (B, T, V)
model.blocks[LAYER].output.edits.clear()
with steer:
    by_library = model(new_good)                                          # (B, T, V)
    print(minireft.generate(model, tokenizer, reviews, max_new_tokens=1), steer.num_parameters(), "trained parameters")
assert torch.allclose(by_hand, by_library, atol=1e-3) and steer.num_parameters() == 0

# %% [markdown]
# ## What one vector cannot do
#
# Now a harder wish: good reviews should be called sad **and** bad ones happy.
#
# **Predict:** with `v` added, what are the bad reviews called? With strength −1, what are the good ones called?

# %%
for strength in (1.0, -1.0):                                              # v added, and v subtracted
    steer.strength = strength
    with steer:
        flipped = share(new_good, SAD), share(new_bad, HAPPY)
    print(f"strength {strength:+.0f}:  good called sad {flipped[0]:.2f}   bad called happy {flipped[1]:.2f}")
    assert min(flipped) < 0.1 and max(flipped) > 0.9

# %% [markdown]
# One half or the other, never both. The edit adds the same vector to everything, whatever stands there. To exchange
# two moods it would have to look first and decide then. That is what LoReFT adds, and tutorial 3.
#
# ## Two changes to try
#
# - Make `v` from a single word on each side: `GOOD[:1]`, `BAD[:1]`. Does it still work on the hidden words? At which
#   strength?
# - Push bad reviews towards happy (`-v`), and then run the random control for that direction. Is it as clean as ours
#   was? What does the model answer when it cannot make out a mood at all?
#
# ## Exercises

# %% [markdown]
# ### 1 · Erase instead of add (8 minutes)
#
# Write `erase`: take out of each row of `h` what it has along `v`, and leave the rest alone.
#
# *Hint:* make `v` a unit vector u first. The part of a row along u is the number h · u times u.

# %%
def erase(h, v):
    """h (N, C) without its part along v (C,): (N, C)."""
    # solution
    u = v / v.norm()                                                      # (C,)
    return h - (h @ u)[:, None] * u
    # end

# %%
torch.manual_seed(0)
h, direction = torch.randn(6, C), 3 * torch.randn(C)
other = torch.linalg.qr(torch.stack((direction, torch.randn(C)), 1)).Q[:, 1]   # (C,) at right angles to the direction
assert (erase(h, direction) @ direction).abs().max() < 1e-3, "something is left along v"
assert torch.allclose(erase(h, direction) @ other, h @ other, atol=1e-3), "another direction has changed too"
assert torch.allclose(erase(erase(h, direction), direction), erase(h, direction), atol=1e-4), "twice must be as once"

# %% [markdown]
# ### 2 · Aim instead of push (10 minutes)
#
# Write `aim`: whatever a row has along `v`, put it at `target`, measured along the unit vector of `v`. Nothing else
# may change.
#
# *Hint:* what has to be added is the target less what is there already.

# %%
def aim(h, v, target):
    """h (N, C) moved along v (C,) until h · v / ‖v‖ is target: (N, C)."""
    # solution
    u = v / v.norm()                                                      # (C,)
    return h + (target - h @ u)[:, None] * u
    # end

# %%
torch.manual_seed(0)
h, direction = torch.randn(6, C), 3 * torch.randn(C)
moved = aim(h, direction, 2.5) - h                                        # (6, C)
unit = direction / direction.norm()
assert torch.allclose(aim(h, direction, 2.5) @ unit, torch.full((6,), 2.5), atol=1e-4), "a row misses the target"
assert torch.allclose(moved, (moved @ unit)[:, None] * unit, atol=1e-4), "a row moved in another direction too"

# %% [markdown]
# ## In three lines
#
# 1. The mean difference of states between two kinds of text is a direction that means something, also for words it was
#    not made from.
# 2. Added to a single token after a single block it changes the answer; a random vector of that length does not; and
#    the place decides.
# 3. It is the same push for every input: it cannot read before it writes.
