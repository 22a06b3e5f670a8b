# %% [markdown]
# # 1 · The transformer and its sites
#
# **Where inside a transformer could you change something, and what would be flowing there?**
#
# *Before:* Python, PyTorch's tensors, matrix products. *Time:* 25 minutes.
#
# Run it with `python tutorials/01_transformer_and_sites.py`, step through it in a debugger, or open it as a notebook.
# The model is small enough to be taken apart by hand: it was trained on sentences that a program wrote about a made-up
# world of 48 people.

# %%
import torch

import minireft
from minireft.model import Step, rotary_angles
from minireft.tasks.world import ATTRIBUTES, PEOPLE, World

model, tokenizer = minireft.load("base")
L, C, V = model.config.layers, model.config.width, model.config.vocab_size
weights = sum(parameter.numel() for parameter in model.parameters())
print(f"L = {L} blocks, vectors of C = {C} numbers, V = {V} words, {weights:,} weights")

# %% [markdown]
# ## A question goes in
#
# The model knows whole words only. Each word has a number, its *token*; a sentence of T words becomes T tokens. For
# every token the model returns V scores, the *logits*: one for each word that might come next. `B` counts sentences
# side by side, here one.
#
# **Predict:** the last token is the colon after `answer`. What should the highest of its V scores belong to?

# %%
sentence = "question : where does anna live ? answer :"
tokens = torch.tensor([tokenizer.encode(sentence)])                       # (B, T)
logits = model(tokens)                                                    # (B, T, V)
answer = tokenizer.decode([logits[0, -1].argmax()])
print(list(zip(sentence.split(), tokens[0].tolist())))
print(tuple(logits.shape), answer)
assert answer == World().value["anna", "home"]

# %% [markdown]
# You should see the town where anna lives in that world. It stands nowhere in the question, so the weights know it. We
# will find out where on the way it is fetched.
#
# ## The bus
#
# The first thing that happens is a look-up: a token's number picks a row of the *embedding*, a vector of C numbers.
# From here to the end there is one such vector for each token. Together they are the *residual stream*, and we call it
# `h`.
#
# **Predict:** the sentence has two colons. Are their two vectors equal at this point? Will they be equal at the end?

# %%
h = model.embed.weight[tokens]                                            # (B, T, C)
first, last = 1, tokens.shape[1] - 1                                      # where the colons stand
end, _ = model.stream(tokens)                                             # (B, T, C) all the way through
apart = ((end[0, first] - end[0, last]).norm() / end[0, last].norm()).item()
print(tuple(h.shape), "equal at the start:", torch.equal(h[0, first], h[0, last]))
print(f"their distance at the end: {apart:.2f} of the last one's length")
assert torch.equal(h[0, first], h[0, last]) and apart > 0.3

# %% [markdown]
# Equal at the start: the row depends on the word alone. On its way each vector collects what its place and its
# neighbours have to say.
#
# It collects by addition, and by nothing else. A *block* (`minireft.model.Block`) does two things. **Attention** looks
# at the tokens so far and brings something from them: each token asks with a *query*, is found by its *key*, and hands
# over its *value*. The **feed-forward** works on each token by itself: it widens the vector to a *hidden layer*, bends
# that by a non-linear function (the *activation*), and narrows it again. Each reads a copy of `h` brought to a standard
# size (the *norm*) and **adds** its result to `h`. Think of a bus with named stops: passengers board, nobody is asked
# to leave.
#
# Here is block 0 by hand. `step` is what all blocks of one pass share: how far to turn queries and keys for each place
# in the sentence, and that no token may look ahead. (`context` is where edits find what they need to know of the pass.
# There are no edits yet, so it is empty.)
#
# **Predict:** if only the last token's vector enters the feed-forward, does that token's result change?

# %%
rotary = rotary_angles(torch.arange(tokens.shape[1])[None], model.config.head_dim, model.config.rotary_base)
step = Step(context={}, rotary=rotary, visible=None, causal=True, cache=None, past=0)
block = model.blocks[0]
a = block.attention(block.attention_norm(h, context={}), step)            # (B, T, C)
f = block.ffn(block.ffn_norm(h + a, context={}), step)                    # (B, T, C)
alone = block.ffn(block.ffn_norm((h + a)[:, -1:], context={}), step)      # (B, 1, C)
print("h + a + f is the block:", torch.allclose(h + a + f, block(h, step), atol=1e-4))
print("the feed-forward of one token needs no other:", torch.allclose(alone[:, 0], f[:, -1], atol=1e-4))
assert torch.allclose(h + a + f, block(h, step), atol=1e-4) and torch.allclose(alone[:, 0], f[:, -1], atol=1e-4)

# %% [markdown]
# ## All the way by hand
#
# Now everybody in the world, one question each, through all the blocks. We keep every piece that is added.
#
# **Predict:** how many pieces have been added up, for each token, when the stream arrives?

# %%
questions = [f"question : where does {name} live ? answer :" for name in PEOPLE]
tokens = torch.tensor([tokenizer.encode(text) for text in questions])     # (B, T)
h = model.embed.weight[tokens]                                            # (B, T, C)
pieces = [h]
for block in model.blocks:
    for norm, part in ((block.attention_norm, block.attention), (block.ffn_norm, block.ffn)):
        pieces.append(part(norm(h, context={}), step))                    # (B, T, C)
        h = h + pieces[-1]
logits = model.head(model.norm(h, context={}), context={})                # (B, T, V)
before = model(tokens)                                                    # (B, T, V) what the library says
print(len(pieces), "pieces; as the library computes it:", torch.allclose(logits, before, atol=1e-3))
assert len(pieces) == 1 + 2 * L and torch.allclose(logits, before, atol=1e-3)

# %% [markdown]
# That is the whole of `minireft.model.Model`: an embedding, twice L additions, one last norm, and the *head*, which
# multiplies by a matrix to get the logits. (Open the file next to this page: the outer loop above stands in its
# `_stack`, the inner one in `Block.forward`.)
#
# ## Where does the answer get on?
#
# How sure the model is of a town: its logit less the mean logit of the other towns, the *margin*. The head is a matrix
# product and the stream a sum, so the margin is a sum too, with one term for each piece. (The last norm divides by one
# number for each token; we take that number as it is.)
#
# **Predict:** which pieces at the last colon carry the answer? The embedding, which is the same for everybody? Early
# blocks? Late ones?

# %%
home = torch.tensor([tokenizer.vocabulary[World().value[name, "home"]] for name in PEOPLE])      # (B,)
towns = torch.tensor([tokenizer.vocabulary[town] for town in ATTRIBUTES["home"].values])         # (12,)
E = model.head.weight * model.norm.weight                                 # (V, C) what the head reads a vector with
right_less_others = E[home] - (E[towns].sum(0) - E[home]) / (len(towns) - 1)                     # (B, C)
size = h[:, -1].square().mean(-1, keepdim=True).sqrt()                    # (B, 1) what the norm divides by
shares = torch.stack([(piece[:, -1] / size * right_less_others).sum(-1).mean() for piece in pieces])   # (1 + 2L,)
right = logits[:, -1].gather(1, home[:, None])[:, 0]                      # (B,)
margin = (right - (logits[:, -1, towns].sum(1) - right) / (len(towns) - 1)).mean()
print(f"margin {margin:.2f}, sum of all shares {shares.sum():.2f}, of the later half {shares[1 + L:].sum():.2f}")
assert abs(margin - shares.sum()) < 0.01 and shares[1 + L:].sum() > 0.8 * margin > 1
assert abs(shares[0]) < 0.1 * margin

# %% [markdown]
# You should see two equal numbers, and nearly all of them in the later half. It would be surprising if the embedding
# had a share: at the last colon everybody has the same one.
#
# ## Change something at a stop
#
# Every place where something may be changed is a `minireft.model.Site`: a small operation with a list of *edits*. An
# edit is given the operation and returns the operation to run in its place. Ours lets the operation run and then swaps
# passengers: at the last token, everybody gets the vector of the person before.
#
# **Predict:** swap right after the embedding. How many answers change? Swap after the last block: what does everybody
# answer?

# %%
def swap_last(operation, context):
    def edited(x):                                                        # (B, T) or (B, T, C)
        x = operation(x).clone()                                          # (B, T, C)
        x[:, -1] = x[:, -1].roll(1, 0)
        return x
    return edited

own = before[:, -1].argmax(-1)                                            # (B,) everybody's answer
model.embed.edits.append(swap_last)
unchanged = (model(tokens)[:, -1].argmax(-1) == own).float().mean()
model.embed.edits.clear()
print(f"swapped after the embedding, {unchanged:.0%} answer as before")
assert unchanged == 1

# %%
stop = model.blocks[-1].output
stop.edits.append(swap_last)
neighbours = (model(tokens)[:, -1].argmax(-1) == own.roll(1)).float().mean()
stop.edits.clear()
print(f"swapped after the last block, {neighbours:.0%} answer for the person before them")
assert neighbours == 1

# %% [markdown]
# Both are exact, and no accident: after the embedding all colons are alike; after the last block nothing is left to
# run but the norm and the head, so whoever has the vector has the answer. In between lies the stop where the answer
# boards.
#
# **Predict:** draw the curve from 0 to 1 over the stops before you look. The bars below it are the shares of the
# margin from above.

# %%
stops, moved = [model.embed, *(block.output for block in model.blocks)], []
differ = own != own.roll(1)                                               # (B,) neighbours in one town tell nothing
for site in stops:
    site.edits.append(swap_last)
    swapped = model(tokens)[:, -1].argmax(-1)                             # (B,)
    moved.append((swapped == own.roll(1))[differ].float().mean().item())
    site.edits.clear()
print("share of answers that move, embed to the last block:", [round(share, 2) for share in moved])
assert torch.equal(model(tokens), before)                                 # every edit is off again: the same bits
assert moved[0] == 0 and max(moved[: L // 2]) < 0.2 and moved[-1] == 1
assert moved[6] > 0.95 and shares[: 1 + 2 * 6].sum() < 0.5 * margin       # after block 5: settled, but not yet loud

# %%
# Picture: above, the answers that move with the last token's vector, by stop; below, what each stop adds to the margin
import matplotlib.pyplot as plt
figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 5))
above.plot(range(L + 1), moved, "o-", color="C1")
above.set(ylabel="share of answers moved", title="Swapped at this stop, the last token's vector takes the answer along")
for first, bars, name, colour in ((0.82, shares[1::2], "attention", "C0"), (1.18, shares[2::2], "feed-forward", "C2")):
    below.bar([first + i for i in range(L)], bars, 0.35, label=name, color=colour)
below.bar(0, shares[0], 0.35, label="embedding", color="C3")
below.set(ylabel="added to the margin", title="What boards at each stop, for the right town", xticks=range(L + 1),
          xticklabels=["embed", *(f"block {i}" for i in range(L))], xlabel="stop on the residual stream")
below.legend(loc="upper left")
plt.show()

# %% [markdown]
# Nothing at the last colon knows the answer before the late blocks bring it there. Now compare the two halves at block
# 5: from there on the vector takes every answer along, though not half of the margin is on board. What attention brings
# there settles *which* town; the blocks after it read that from the same vector and say it louder.
#
# *Where* a change is made decides what it can do. And it comes off without a trace: a site without edits runs its own
# operation, so the bits are those of the start.
#
# ## The named stops
#
# **Predict:** we edited `embed` and a block's `output`. How many sites does one block have in all? Count: two norms,
# four matrices of attention, three of the feed-forward, and three places between them.

# %%
sites = model.sites()
for name, site in sites.items():
    if "blocks" not in name or name.startswith("blocks.0."):
        print(f"{name:28}{type(site).__name__:12}", tuple(site.weight.shape) if hasattr(site, "weight") else "")
assert len(sites) == 12 * L + 3 and not any(site.edits for site in sites.values())

# %% [markdown]
# `attention.output` is the matrix through which what attention has gathered goes back into the stream. Two matrices
# widen in the feed-forward, and `gate` decides how much of `up` passes; `down` narrows. The three places between them
# have no weights: `kv` sees keys and values on their way to attention, `act` is the activation, and a block's own
# `output` is the stream when it leaves the block.
#
# The methods of this library are edits on these sites, packed with their parameters into an *adapter*. The model knows
# none of them, and here we only ask where they stand. NEFTune adds noise to the embedding. (IA)³ scales keys, values
# and the hidden layer. LoRA changes matrices. LoReFT edits the stream.
#
# **Predict:** which of the names above does each stand on, and which of the four has nothing to train?

# %%
names, where = {site: name for name, site in sites.items()}, {}
for adapter in (minireft.NEFTune(model), minireft.IA3(model), minireft.LoRA(model), minireft.LoReFT(model)):
    method, stands = type(adapter).__name__, [names[site] for site, _ in adapter.edits()]
    where[method] = sorted({name.split(".", 2)[-1] for name in stands})
    print(f"{method:8}{adapter.num_parameters():7,} parameters, {len(stands):2} sites: {', '.join(where[method])}")
    with adapter:                                                         # on for this pass, off afterwards
        model(tokens)
assert where["NEFTune"] == ["embed"] and where["LoReFT"] == ["output"] and where["IA3"] == ["attention.kv", "ffn.act"]
assert minireft.NEFTune(model).num_parameters() == 0
assert torch.equal(model(tokens), before)                                 # all are off again: the same bits

# %% [markdown]
# See `minireft.NEFTune`, `minireft.IA3`, `minireft.LoRA` and `minireft.LoReFT`; `minireft.adapters.base.Adapter` puts
# them on and takes them off.
#
# ## Two changes to try
#
# - Swap the vector of the *name* instead of the last one: `x[:, 4]`. At which stops does the answer move now, and why
#   is the curve turned around?
# - Ask something else: `which pet does {name} keep`, with `"pet"` for `"home"`. Does the answer board at the same
#   stop?
#
# ## Exercises

# %% [markdown]
# ### 1 · A recorder (8 minutes)
#
# Write `record`: run the model once and return what left the site, with the site's edits afterwards as they were
# before.
#
# *Hint:* an edit may keep what the operation returns in a list before it passes it on. Take it off whatever happens.

# %%
def record(site, tokens):
    """What the site's operation returned during model(tokens)."""
    # solution
    kept = []
    def keep(operation, context):
        def edited(*inputs):
            kept.append(operation(*inputs))
            return kept[-1]
        return edited
    site.edits.append(keep)
    try:
        model(tokens)
    finally:
        site.edits.remove(keep)
    return kept[0]
    # end

# %%
ask = torch.tensor([tokenizer.encode("question : where does anna live ? answer :")])             # (1, T)
assert torch.equal(record(model.embed, ask), model.embed.weight[ask])
assert torch.equal(record(model.head, ask), model(ask))
assert record(model.blocks[1].ffn.up, ask).shape == (*ask.shape, model.config.hidden)
assert not any(site.edits for site in model.sites().values())

# %% [markdown]
# ### 2 · A block without attention (10 minutes)
#
# Write `without_attention`: the logits when the attention of one block adds nothing to the stream and all else runs as
# usual.
#
# *Hint:* what attention adds leaves through the site `attention.output`. The stream itself does not pass there.

# %%
def without_attention(tokens, layer):
    """Logits (B, T, V) with block `layer`'s attention silent."""
    # solution
    site = model.blocks[layer].attention.output
    site.edits.append(lambda operation, context: lambda x: torch.zeros_like(operation(x)))
    try:
        return model(tokens)
    finally:
        site.edits.clear()
    # end

# %%
ask = torch.tensor([tokenizer.encode("question : where does anna live ? answer :")])             # (1, T)
for layer in (0, L - 1):
    turns = rotary_angles(torch.arange(ask.shape[1])[None], model.config.head_dim, model.config.rotary_base)
    shared, x = Step({}, turns, None, True, None, 0), model.embed.weight[ask]                    # (1, T, C)
    for number, block in enumerate(model.blocks):
        x = x + block.ffn(block.ffn_norm(x, context={}), shared) if number == layer else block(x, shared)
    expected = model.head(model.norm(x, context={}), context={})                                 # (1, T, V)
    assert torch.allclose(without_attention(ask, layer), expected, atol=1e-3), f"block {layer} adds something else"
assert not any(site.edits for site in model.sites().values())

# %% [markdown]
# ## In three lines
#
# 1. A transformer is a stream of one vector for each token, to which attention and feed-forward add, block after
#    block.
# 2. Every place where something may be changed is a site with a name; an edit on it replaces one operation and comes
#    off without a trace.
# 3. Where a change is made decides what it can do: the answer is not at the last token before the late blocks have
#    brought it.
