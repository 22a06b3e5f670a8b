# %% [markdown]
# # Exercises to 1 · The transformer and its sites
#
# Written by tutorials/make.py from 01_transformer_and_sites.py. Copy this file, replace each line
# `raise NotImplementedError("your turn")`
# and run the copy: no error means that every check has passed.

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
# ### 1 · A recorder (8 minutes)
#
# Write `record`: run the model once and return what left the site, with the site's edits afterwards as they were
# before.
#
# *Hint:* an edit may keep what the operation returns in a list before it passes it on. Take it off whatever happens.

# %%
def record(site, tokens):
    """What the site's operation returned during model(tokens)."""
    raise NotImplementedError("your turn")

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
    raise NotImplementedError("your turn")

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
