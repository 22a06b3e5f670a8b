# %% [markdown]
# # 14 · Bring your own model and data
#
# **How do you get from a folder that somebody else made to an adapter that does your job?**
#
# *Before:* tutorial 3 (LoReFT, positions), tutorial 6 (the vectors of (IA)³, merging). *Time:* 35 minutes.
#
# Run it with `python tutorials/14_bring_your_own_model_and_data.py`, step through it in a debugger, or open it as a
# notebook.
#
# A published model is a folder. So that this page runs anywhere, it writes one first: our base, in the form of Hugging
# Face. From here on it is a stranger's, and all that we know is in the folder. Put the path of your own in `folder`,
# and read on.

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
# ## What is in the folder?
#
# The configuration is a dozen numbers, and they say how large everything is.
#
# **Predict:** the file of weights has 7,141,576 bytes, 4 for a number. From the configuration alone, how many numbers
# should there be: embedding, and in each block queries, keys, values, output, three matrices of the feed-forward, two
# norms?

# %%
config = json.loads((folder / "config.json").read_text())
C, F, L, V = (config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
shared = config["num_key_value_heads"] * config["head_dim"]               # width of keys and of values
block = 2 * C * C + 2 * C * shared + 3 * C * F + 2 * C
stored = load_file(folder / "model.safetensors")                          # {name: tensor}
print(f"{config['model_type']}: {V * C + L * block + C:,} numbers by the configuration, ",
      f"{sum(w.numel() for w in stored.values()):,} in the file")
assert V * C + L * block + C == sum(w.numel() for w in stored.values()) and config["tie_word_embeddings"]

# %% [markdown]
# Such a sum is worth doing for any model: it says at once whether a head is *tied* (the embedding serves twice, and
# stands in the file once), and whether something is in the file that the configuration does not speak of. The command
# `minireft inspect FOLDER` does it without reading a weight, and says what each method would train.
#
# `minireft.load` reads the folder. It imports no other library; a table of names says which tensor goes where.
#
# **Predict:** where in our model is their `model.layers.2.self_attn.k_proj.weight`, and is it the same to the bit?

# %%
model, tokenizer = minireft.load(folder)                                  # ..., device="cuda", dtype=torch.bfloat16)
theirs = stored["model.layers.2.self_attn.k_proj.weight"]
ours = model.blocks[2].attention.key.weight
print(tuple(theirs.shape), tuple(ours.shape), "equal to the bit:", torch.equal(theirs, ours))
print(f"a context of {model.config.context} tokens; end of text is token {tokenizer.eos_id}")
assert torch.equal(theirs, ours) and not any(p.requires_grad for p in model.parameters())

# %% [markdown]
# On a GPU the same line takes `device="cuda"`, and `dtype=torch.bfloat16` halves the weights; adapters stay in
# float32 either way, and every line below is the same.
#
# ## Your data
#
# Now the file. Each line has a prompt and its completion, and, because a score by ranking is less noisy than one by
# writing, the choices. Real files have a bad line somewhere, so ours gets one.
#
# **Predict:** line 3 has no completion. What should a program do: leave it out, stop, or learn an empty answer?

# %%
def write(name, examples):
    rows = [{"prompt": e.prompt, "completion": e.completion, "choices": e.choices} for e in examples]
    (work / name).write_text("\n".join(map(json.dumps, rows)) + "\n")

for name, count in (("train", 400), ("validation", 100), ("test", 150)):
    write(f"{name}.jsonl", tasks.load("facts", name, count))
lines = (work / "train.jsonl").read_text().splitlines()
(work / "bad.jsonl").write_text("\n".join([*lines[:2], '{"prompt": "who is it ?"}', *lines[2:]]))
try:
    minireft.read_examples(work / "bad.jsonl")
except ValueError as error:
    print(str(error).replace(f"{work}/", "").partition(";")[0])

# %% [markdown]
# It stops and names the line. A row that is left out in silence is a result that nobody can explain later; with
# `skip_bad_rows=True` it is left out, and counted aloud.
#
# `minireft.read_examples` knows the papers' files as well, by their first row: LLM-Adapters, Alpaca, GSM8K, T-Few's
# tasks, SST-2, TREC. What matters is the *prompt* that each puts around a row, and where it looks for the answer.
#
# **Predict:** a row of the commonsense sets that ReFT is measured on. What does the model read, and what is right?

# %%
row = {"instruction": "Is ice cold?\n\nAnswer format: true/false", "input": "", "output": "the correct answer is true",
       "answer": "true"}
(work / "boolq.json").write_text(json.dumps([row]))
(example,) = minireft.read_examples(work / "boolq.json")
right = minireft.formats.datasets.FORMATS[example.format].right
print(f"format {example.format}\nreads  {example.prompt!r}\nwrites {example.completion!r}")
for written in ("the correct answer is true", "true or false", "it is cold"):
    print(f"{written!r} is", "right" if right(written, example) else "wrong")
assert right("true or false", example) and not right("it is cold", example)

# %% [markdown]
# The first word that is one of the choices counts, as in the papers' own code; so "true or false" is right. A metric is
# a program: read it before you believe its number.
#
# ## How far is the model already?
#
# **Predict:** four choices. The model has read these facts, but never in this wording. Better than 0.25?

# %%
training, validation, test = (minireft.read_examples(work / f"{n}.jsonl") for n in ("train", "validation", "test"))
before = minireft.evaluate(model, tokenizer, test, metrics=("rank",))
lengths = [len(tokenizer.encode(e.prompt)) for e in training]
print(test[0].prompt, test[0].completion)
print(f"{before}; prompts have {min(lengths)} to {max(lengths)} tokens")
assert before.rank < 0.45 and max(lengths) < model.config.context

# %% [markdown]
# The standard error stands beside the score: two of them are the least difference to speak of. And the lengths say
# which positions make sense: the papers' `f7+l7` would edit most of such a prompt, `f3+l3` edits its ends.
#
# ## A paper's settings, and your own
#
# `minireft.recipe` makes the adapter and the configuration of a paper, prints both, and takes changes.
#
# **Predict:** the paper tuned models of 7 billion numbers at a learning rate of 9e-4. Ours has not two million. Is
# that rate right for it, too high, or too low?

# %%
def tuned(lr, show=None):
    torch.manual_seed(0)
    changes = dict(rank=4, positions="f3+l3", steps=60, batch_size=16, lr=lr)
    adapters, settings = minireft.recipe("reft-commonsense", model, training, show=show, **changes)
    minireft.train(model, adapters, training, settings, progress=False)
    return adapters[0]

def score(adapter, examples):
    with adapter:
        return minireft.evaluate(model, tokenizer, examples, metrics=("rank",)).rank

papers = tuned(9e-4, show=print)
print(f"right on validation items: {score(papers, validation):.2f}")
assert score(papers, validation) > before.rank + 0.1

# %% [markdown]
# It learns. Whether it could learn more, only a comparison says: on *validation* items, since whoever chooses on the
# test items reports his luck.
#
# **Predict:** three times the rate, ten times, a hundred times. Where is the best, and where does it break?

# %%
rates = (9e-4, 3e-3, 1e-2, 1e-1)
tried = {lr: papers if lr == 9e-4 else tuned(lr) for lr in rates}
chosen_on = {lr: score(adapter, validation) for lr, adapter in tried.items()}
best = max(chosen_on, key=chosen_on.get)
reft, after = tried[best], score(tried[best], test)
print("validation:", {f"{lr:g}": round(share, 2) for lr, share in chosen_on.items()}, f"\nso {best:g}")
print(f"test items, looked at once: {before.rank:.2f} → {after:.2f}")
assert best > 9e-4 and after > before.rank + 0.15 and chosen_on[1e-1] < chosen_on[best] - 0.2

# %% [markdown]
# Too low for sixty steps, and a hundred times as much breaks it; the two in between differ by less than their errors.
# A recipe is where to begin, not where to end.
#
# ## Save, load, generate
#
# **Predict:** the folder has seven megabytes. How large is the adapter's file? And what happens if you load it on a
# model of the same shape that has learned something else?

# %%
reft.save(work / "mine.safetensors")
fresh, _ = minireft.load(folder)                                          # an adapter stands on one model object
with minireft.load_adapter(fresh, work / "mine.safetensors") as again:
    print(minireft.generate(fresh, tokenizer, [e.prompt for e in test[:5]]), "\nof", [e.completion for e in test[:5]])
print(f"{(work / 'mine.safetensors').stat().st_size:,} bytes, {again.num_parameters():,} numbers")
fresh.blocks[0].ffn.down.weight.data.mul_(1.01)
try:
    minireft.load_adapter(fresh, work / "mine.safetensors")
except ValueError as error:
    print(str(error).replace(f"{work}/", "")[:110], "...")

# %% [markdown]
# An edit is a change *of this base's states*; on another it is noise of the same size. So the file remembers the base's
# fingerprint, and asks for `force=True` before it goes elsewhere.
#
# ## To pyreft and back
#
# Others use other libraries. `minireft.formats.pyreft` writes the folder that pyreft reads: a file for each layer, and
# a configuration.
#
# **Predict:** two things of ours have no place in it. One is the base's fingerprint. The other decides which tokens are
# edited: what comes out if you forget to say it?

# %%
pyreft.write(reft, work / "for-pyreft")
name = sorted((work / "for-pyreft").glob("*.bin"))[0]
R = torch.load(name, weights_only=True)["rotate_layer"].T                 # (r, C), orthonormal rows
probe = torch.tensor([tokenizer.encode(test[0].prompt)])                  # (1, T)
with reft:
    expected = model(probe)                                               # (1, T, V)
off = {}
for said in ({}, {"positions": "f3+l3"}):
    with minireft.load_adapter(model, work / "for-pyreft", **said):
        off[said.get("positions")] = (model(probe) - expected).abs().max().item()
print(f"largest difference without a word {off[None]:.0f}, with positions {off['f3+l3']:.0e}")
assert torch.allclose(R @ R.T, torch.eye(len(R)), atol=1e-5) and off["f3+l3"] < 1e-3 < 1 < off[None]

# %% [markdown]
# Without a word the folder is read as `f7+l7`, the papers' choice: no error, and another model. Say positions whenever
# you import from there. `torch.load(..., weights_only=True)` above is how any torch file is read here: a pickle from a
# stranger may run a program.
#
# ## To PEFT and back, and into the weights
#
# The same with (IA)³ and PEFT: `minireft.formats.peft`.
#
# **Predict:** PEFT scales the *input* of `down_proj`, we scale the activation. Is that the same number?

# %%
torch.manual_seed(0)
ia3 = minireft.IA3(model)
minireft.train(model, [ia3], training, minireft.TrainConfig(steps=60, lr=0.05), progress=False)
peft.write(ia3, work / "for-peft")
with ia3, torch.no_grad():
    expected = model(probe)
with minireft.load_adapter(model, work / "for-peft"), torch.no_grad():
    imported = model(probe)
names = sorted(load_file(work / "for-peft" / "adapter_model.safetensors"))
print(len(names), "tensors, such as", names[0], f"\noff by {(imported - expected).abs().max():.0e}")
assert torch.allclose(imported, expected, atol=1e-4)

# %% [markdown]
# It is: what `down_proj` reads is the activation. And if the one who is to use it has no adapter library at all, the
# vectors go into the weights, and the folder is an ordinary one again. `minireft merge` is the same as a command.
#
# **Predict:** merged, written, read again: equal to the bit, equal within rounding, or only about as good?

# %%
ia3.merge()
huggingface.save(model, tokenizer, work / "mine")
ia3.unmerge()
plain, _ = minireft.load(work / "mine")
with torch.no_grad():
    difference = (plain(probe) - expected).abs().max().item()
results = {"before": before.rank, "LoReFT at 0.0009": score(papers, test), f"LoReFT at {best:g}": after,
           "(IA)³, merged": minireft.evaluate(plain, tokenizer, test, metrics=("rank",)).rank}
print(f"off by {difference:.0e} of numbers up to {expected.abs().max():.0f}")
print("test items:", {way: round(share, 2) for way, share in results.items()})
assert difference < 1e-3 and results["(IA)³, merged"] > before.rank + 0.2

# %%
# Picture: left, validation accuracy at four learning rates, the paper's first; right, test accuracy before and after
import matplotlib.pyplot as plt
figure, (left, middle) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(1.2, 1))
left.semilogx(rates, list(chosen_on.values()), "o-")
left.axvline(9e-4, color="C3", ls=":", label="the recipe's, for 7 billion numbers")
left.set(xlabel="learning rate", ylabel="right on validation items", title="Whose learning rate?", ylim=(0, 1))
left.legend(loc="lower right")
middle.bar(range(4), list(results.values()), color=["C7", "C0", "C0", "C1"])
middle.set_xticks(range(4), [way.replace(" at ", "\nat ").replace(", ", ",\n") for way in results])
middle.axhline(0.25, color="k", ls=":")
middle.set(ylabel="right on test items", title="From folder to answer (dotted: chance)", ylim=(0, 1))
plt.show()

# %% [markdown]
# On a command line it is `minireft tune --base FOLDER --data FILE --out RUN`, then `minireft evaluate` and
# `minireft generate` with `--adapter`. What your own calls in other libraries are called here: [Coming from pyreft,
# PEFT or TRL](../coming_from.md).
#
# ## Two changes to try
#
# - Put a real checkpoint in `folder`: any of the Llama family, GPT-2, OPT. Or llama2.c's `stories260K.bin`, which
#   `minireft.load` reads as it is: 260,032 numbers that tell stories.
# - Give `tuned` only the first 32 rows of `training`. Does the best rate stay the best? How large is the standard error
#   of that answer?
#
# ## Exercises

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
    # solution
    rows, C = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, C)                  # (H, D/2, 2, C)
    return pairs.transpose(1, 2).reshape(rows, C)
    # end

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
    # solution
    import re
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(found[-1]) if found else None
    # end

# %%
for text, number in (("5 boxes of 200 make 1,000.", 1000), ("so -3.5 it is", -3.5), ("3 + 4 = 7, I think", 7),
                     ("no idea", None), ("$12.50", 12.5), ("", None)):
    found = last_number(text)
    assert found == number, f"in {text!r} it finds {found}"

# %% [markdown]
# ## In three lines
#
# 1. A model is a configuration and named tensors: count them before you trust them; a table says what goes where.
# 2. Name the data's format, know its metric, stop at bad rows; choose on validation items, look at the test once.
# 3. An adapter belongs to its base; other libraries' files carry less than ours, so say positions, and never unpickle.
