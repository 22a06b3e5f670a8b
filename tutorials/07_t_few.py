# %% [markdown]
# # 7 · T-Few: sixteen examples and a list of answers
#
# **You have sixteen examples and a list of possible answers: do the examples belong in the prompt, or in a loss?**
#
# *Before:* tutorial 6 (the vectors of (IA)³), the logarithm of a probability. *Time:* 40 minutes.
#
# Run it with `python tutorials/07_t_few.py`, step through it in a debugger, or open it as a notebook.
#
# The task is a review, and the choice between two answers that this model never gave: does it go up or down? Who says
# so, and from where, has nothing to do with it.

# %%
from dataclasses import replace

import torch

import minireft
from minireft.data import collate, encode
from minireft.losses import OBJECTIVES
from minireft.tasks import few_shot

model, tokenizer = minireft.load("base")
shots, asked = few_shot.shots("mood", subset=0), few_shot.test("mood", template=0)               # 16 × 3, 100
print(asked[0].prompt, *asked[0].choices, sep="\n    ")
assert (len(shots), len(asked)) == (48, 100) and not {e.prompt for e in shots} & {e.prompt for e in asked}

# %% [markdown]
# `shots` are sixteen reviews, each asked in three ways (three *templates*), so that nothing hangs on one wording.
# `asked` are a hundred other reviews.
#
# ## Choosing by rank
#
# A model that continues texts can choose without writing anything: give each choice the probability of being the
# continuation, and take the likelier one. A long choice is a product of more factors, so one compares the mean of log
# p over a choice's tokens, called β (Liu et al. 2022, section 3.2).
#
# **Predict:** below stands log p of every token of the two choices. Which tokens will make the difference?

# %%
def log_p(row):                                                           # encoded → log p of its answer's tokens (n,)
    with torch.no_grad():
        p = model(torch.tensor([row.ids]))[0].double().log_softmax(-1)    # (T, V) of the next token
    return torch.stack([p[t - 1, row.ids[t]] for t in range(row.prompt_length, len(row.ids))])

for choice in asked[0].choices:
    row = encode(tokenizer, replace(asked[0], completion=choice), model.config.context)
    words = [*choice.split(), "(end)"]
    print("   ".join(f"{word} {p:.1f}" for word, p in zip(words, log_p(row).tolist())), f"   β {log_p(row).mean():.2f}")
assert len(log_p(row)) == len(words) == 8

# %% [markdown]
# Every token speaks, and the names are rare words. Split the difference between the right choice and the wrong one in
# two: what the *deciding* word gives (the first one), and what all the others give. Right is ranked first where the
# two together are above 0.
#
# **Predict:** over a hundred questions, how large is each part? How often is the right choice ranked first?

# %%
def parts(examples):                                                      # → two of (N,): the deciding word, the rest
    right = [encode(tokenizer, e, model.config.context, choices=True) for e in examples]
    both = [(log_p(row), log_p(replace(row, ids=row.wrong[0]))) for row in right]                # pairs of (8,)
    difference = torch.stack([r - w for r, w in both])                    # (N, 8)
    return difference[:, 0], difference[:, 1:].sum(1)

word, rest = parts(asked)
by_library = minireft.evaluate(model, tokenizer, asked, metrics=("rank",)).rank
print(f"deciding word {word.mean():+.1f} ± {word.std():.1f}, the rest {rest.mean():+.1f} ± {rest.std():.1f}")
print(f"ranked first: {(word + rest > 0).float().mean():.2f}, by the library {by_library:.2f}")
assert abs((word + rest > 0).float().mean() - by_library) < 0.015 and 0.35 < by_library < 0.65
assert rest.std() > word.std()

# %% [markdown]
# Chance, as it should be: nobody has told the model what `up` and `down` mean here, and what it does say about the
# names drowns what it says about the verdict. (`minireft.evaluate` compares β; both choices here have eight tokens,
# so the sum tells the same.)
#
# ## Examples in the prompt
#
# The cheap way to tell it: write examples with their answers in front of the question. The context holds 128 tokens.
#
# **Predict:** how many of the sixteen fit, and how many questions are right then?

# %%
behind = [few_shot.in_context(e, shots[::3], tokenizer, model.config.context) for e in asked]    # the same template
in_prompt = minireft.evaluate(model, tokenizer, behind, metrics=("rank",)).rank
print(behind[0].prompt[:100], "...")
print(f"{behind[0].prompt.count('verdict') - 1} examples in front: {in_prompt:.2f}")
assert in_prompt < 0.7 and behind[0].prompt.count("verdict") > 4

# %% [markdown]
# Little or nothing. Is it the prompt, or this task? Ask an easier one: short clauses, each called `amber` or `frost`,
# words that name good and bad in no text the model was trained on. All sixteen examples fit in front.
#
# **Predict:** and there?

# %%
labels, easy = few_shot.shots("labels", 0)[::3], few_shot.test("labels", 0, 40)
behind_easy = [few_shot.in_context(e, labels, tokenizer, model.config.context) for e in easy]
right_easy = minireft.evaluate(model, tokenizer, behind_easy, metrics=("rank",)).rank
print(f"{behind_easy[0].prompt[-66:]} ?\nin the prompt: {right_easy:.2f}")
assert right_easy > 0.9 and all(example.prompt.count("->") == 17 for example in behind_easy)

# %% [markdown]
# There it needs no training at all. So try the prompt first; what follows is for tasks like ours, where it fails.
#
# ## Examples in a loss
#
# Now (IA)³, with the loss of all tutorials so far: the mean −log p of the right choice's tokens, called L_LM
# (`minireft.losses.likelihood`). The recipe is T-Few's, Adafactor, batches of 8, one setting for every task; only
# shorter and quicker, 60 steps at 0.05 in place of 1000 at 0.003, since the model is small.
#
# **Predict:** what will the two parts be after training, and the share ranked right?

# %%
from minireft.training import T_FEW

def tuned(*losses):
    ia3 = minireft.IA3(model)
    config = replace(T_FEW, steps=60, lr=0.05, losses=losses)
    minireft.train(model, [ia3], shots, config, progress=False)
    with ia3:
        return ia3, *parts(asked)                                         # the vectors, two of (100,)

found = {"L_LM": tuned("lm")}
ia3, word, rest = found["L_LM"]
print(f"deciding word {word.mean():+.1f}, right {(word > 0).float().mean():.2f} of the time; rest ± {rest.std():.1f}")
print(f"ranked first: {(word + rest > 0).float().mean():.2f} with {ia3.num_parameters():,} parameters")
assert (word > 0).float().mean() > 0.9 and 0.75 < (word + rest > 0).float().mean() < 0.99

# %% [markdown]
# The model has understood: the deciding word is right nearly every time. And still some questions are lost. L_LM asks
# for a likely *text*, and has no reason to make `up` and `down` differ by more than it takes; the names still speak,
# and now and then they outvote the word that matters.
#
# ## Two losses that look at the wrong choice
#
# T-Few adds what the ranking is about. The first makes wrong choices unlikely, token by token (with p_t the
# probability of the wrong choice's token t, and T tokens in all wrong choices):
#
# `L_UL = − Σ_t log(1 − p_t) / T`
#
# The second is a softmax over the choices, with β for logits: it is small only if the right one *ranks* first.
#
# `L_LN = − log( exp β(right) / Σ_choices exp β )`
#
# **Predict:** take the question above, and the vectors that L_LM has just trained. Which tokens of the wrong choice
# does L_UL find too likely?

# %%
row = encode(tokenizer, asked[0], model.config.context, choices=True)
batch = collate([row])                                                    # two rows: the right choice, the wrong one
with ia3:
    right, wrong = log_p(row), log_p(replace(row, ids=row.wrong[0]))      # (8,), (8,)
    logits = model(batch.tokens, batch.mask)                              # (2, T, V)
unlikely, betas = -torch.log(1 - wrong.exp()), torch.stack((right.mean(), wrong.mean()))         # (8,), (2,)
by_hand = {"lm": -right.mean(), "unlikelihood": unlikely.mean(), "length": -betas.log_softmax(0)[0]}
for name, value in by_hand.items():
    ours = OBJECTIVES[name].total(logits, batch) / OBJECTIVES[name].count(row)
    print(f"{name:13} by hand {value:.3f}   library {ours:.3f}")
    assert torch.allclose(value.float(), ours, rtol=1e-3)

# %%
words = [*next(c for c in asked[0].choices if c != asked[0].completion).split(), "(end)"]
print("-log(1 - p):  ", "   ".join(f"{word} {p:.1f}" for word, p in zip(words, unlikely.tolist())))
assert unlikely[[1, 2, 6, 7]].min() > 2 > 1 > unlikely[[0, 3, 5]].max() and unlikely.max() > 10
# %% [markdown]
# Not the deciding word, which is unlikely already, and not the names. The comma, `says`, the full stop and the end
# are all but certain, and L_UL wants them gone. But they stand in the *right* choice too, where L_LM wants them. Keep
# that in mind.
#
# One of them is about as certain as float32 can say; once p rounds to 1, −log(1 − p) is infinite, and no training
# survives that. `minireft.losses.unlikelihood` goes by way of the odds p / (1 − p) and stays finite (exercise 1 is
# another way). L_LN is `minireft.losses.length_normalised`.
#
# **Predict:** rank the four: L_LM alone, with L_UL, with L_LN, with both. Which moves the deciding word most?

# %%
found["+ L_UL"] = tuned("lm", "unlikelihood")
found["+ L_LN"] = tuned("lm", "length")
found["both"] = tuned("lm", "unlikelihood", "length")
rank = {name: (word + rest > 0).float().mean().item() for name, (_, word, rest) in found.items()}
for name, (_, word, rest) in found.items():
    print(f"{name:7} deciding word {word.mean():+5.1f}, the rest ± {rest.std():.1f}, ranked first {rank[name]:.2f}")

# %%
pull = {name: word.mean().item() for name, (_, word, _) in found.items()}
print("the deciding word, against L_LM:", "  ".join(f"{name} × {x / pull['L_LM']:.1f}" for name, x in pull.items()))
assert pull["+ L_LN"] > 1.5 * pull["L_LM"] and pull["+ L_UL"] < 1.4 * pull["L_LM"]
assert rank["+ L_LN"] > 0.93 and rank["+ L_LN"] > rank["L_LM"] and min(rank.values()) > in_prompt + 0.1
assert min(rest.std() for _, _, rest in found.values()) > 2

# %%
# Picture: for each loss, the deciding word's part against that of all other words; right of the dotted line is right
import matplotlib.pyplot as plt
figure, axes = plt.subplots(1, 4, figsize=(10, 3.3), sharex=True, sharey=True)
for axis, (name, (_, word, rest)) in zip(axes, found.items()):
    ok = word + rest > 0                                                  # (100,)
    axis.plot(word[ok], rest[ok], "o", word[~ok], rest[~ok], "X", ms=4)
    axis.axline((0, 0), slope=-1, color="C3", ls=":")
    axis.set(title=f"{name if name != 'both' else '+ L_UL + L_LN'}: {rank[name]:.2f}")
axes[0].set_ylabel("what the names give")
figure.supxlabel("what the deciding word gives the right choice, in nats", fontsize=11)
plt.show()

# %% [markdown]
# The spread from top to bottom, what names give, is there in every panel: no loss makes names predictable. What L_LN
# does is move the cloud to the right, away from the line, until names cannot outvote the verdict. L_UL moves it
# hardly at all: it spends its pull on commas and full stops. In the paper, on a model of three billion parameters and
# real tasks, each of the two adds a little over two points of accuracy, and both together three.
#
# ## The bill
#
# Adding and multiplying are counted as two operations (FLOPs). A forward pass takes 2 for each parameter and token,
# and 4·C a layer for each pair of tokens that attention compares.
#
# **Predict:** by which factor is a question with examples in front dearer than one without?

# %%
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

def counted(call):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()

N = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)
print(f"{N:,} parameters: {2 * N / 1e6:.2f} MFLOP a token, and attention")
assert abs(2 * N * 10 / counted(lambda: model(torch.zeros(1, 10, dtype=torch.long))) - 1) < 0.05

# %%
L, C, lengths = model.config.layers, model.config.width, {}
for name, example in (("T-Few", asked[0]), ("in the prompt", behind[0])):
    lengths[name] = T = len(encode(tokenizer, example, model.config.context).ids)
    by_hand, seen = 2 * N * T + 4 * L * C * T * T, counted(lambda: model(torch.zeros(1, T, dtype=torch.long)))
    print(f"{name}: {T} tokens, {by_hand / 1e6:.0f} MFLOP by hand, {seen / 1e6:.0f} counted, for each choice")
    assert abs(by_hand / seen - 1) < 0.01
assert 4 < lengths["in the prompt"] / lengths["T-Few"] < 10

# %% [markdown]
# Six times as dear. Training, on the other side, is paid once. The weights are frozen, so the backward pass computes
# gradients of states, and of the few vectors, but none of the weights.
#
# **Predict:** a training step costs how many forward passes? With trained weights it is three.

# %%
batch = collate([encode(tokenizer, e, model.config.context, choices=True) for e in shots[:8]])
def forward():
    return model(batch.tokens, batch.mask)                                # (16, T, V)

with ia3:
    passes = counted(lambda: OBJECTIVES["lm"].total(forward(), batch).backward()) / counted(forward)
    ia3.zero_grad()
print(f"forward and backward: {passes:.2f} forward passes")
assert 1.7 < passes < 2.2

# %% [markdown]
# And there is a fair objection: the examples in front are the same for every question. Keep their keys and values
# (the *cache*), and only the question is left to compute.
#
# **Predict:** after how many questions has training paid for itself? And against a prompt whose cache is kept?

# %%
def cost(T, front=0):                                                     # two choices, `front` tokens of T cached
    return 2 * (2 * N * (T - front) + 4 * L * C * (T - front) * T)

rows = [encode(tokenizer, e, model.config.context, choices=True) for e in shots]
spent = passes * sum(cost(len(row.ids)) for row in rows) / len(rows) * 8 * 60               # 60 steps of 8 examples
T, long = lengths["T-Few"], lengths["in the prompt"]
print(f"training: {spent / 1e9:.0f} GFLOP, once")
for name, dearer in (("no cache", cost(long) - cost(T)), ("cache kept", cost(long, long - T) - cost(T))):
    print(f"against the prompt, {name}: paid back after {spent / dearer:,.0f} questions")
kept = 2 * L * C * 4 * (long - T)                                         # keys and values, 4 bytes each
print(f"to keep: {kept / 1024:.0f} KiB of cache a task, or {4 * ia3.num_parameters() / 1024:.0f} KiB of vectors")
assert cost(long) > 4 * cost(T) and cost(long, long - T) < 1.5 * cost(T) and kept > 20 * 4 * ia3.num_parameters()

# %% [markdown]
# Without a cache training pays for itself within hundreds of questions. With one, time is almost a draw, and what
# remains is memory: a cache for every task against a small file, which can even be merged into the weights. In the
# paper, an answer costs T-Few a thousandth of what it costs a model of 175 billion parameters that reads examples;
# there the model is smaller too.
#
# ## Where it does not help
#
# One task and one draw of examples prove little. `benchmarks/tfew.py` runs five tasks, three draws of sixteen, three
# templates each, and vectors that begin with what they learned from the other tasks. Its results stand in a file.
#
# **Predict:** in `facts` and `sums` a choice is a single word and a full stop. What does L_UL do there?

# %%
import json
import statistics
from pathlib import Path
file = Path(minireft.__file__).parent.parent / "benchmarks" / "results" / "tfew.json"
accuracy = json.loads(file.read_text())["accuracy"]                       # task → method → (draws, templates)
middle = {task: {m: statistics.median(sum(x, [])) for m, x in rows.items()} for task, rows in accuracy.items()}
for method in middle["mood"]:
    print(f"{method:24}", "   ".join(f"{task} {rows[method]:.2f}" for task, rows in middle.items()))
facts, sums = middle["facts"], middle["sums"]
assert facts["L_LM + L_UL"] > facts["L_LM"] + 0.05 and sums["L_LM + L_UL"] < sums["L_LM"] - 0.2

# %%
gains = [rows["L_LM + L_LN"] - rows["L_LM"] for rows in middle.values()]
print("what L_LN adds to L_LM:", "   ".join(f"{task} {gain:+.2f}" for task, gain in zip(middle, gains)))
assert min(gains) > -0.1 and max(middle["told"][m] for m in facts) == middle["told"]["L_LM"]
assert sum(gain > 0.03 for gain in gains) == 3 and middle["labels"]["in the prompt"] > 0.95

# %% [markdown]
# It lifts `facts` and ruins `sums`. L_LN helps in three of five and is never far behind L_LM alone; no loss lifts
# `told` above it, and `labels` needs none of this. A recipe that is the same for every task is a good beginning, and
# no reason to stop looking.
#
# ## Two changes to try
#
# - Take `few_shot.shots("sums", 0)` and `few_shot.test("sums", 0)`, where a choice is one number: does L_UL help, or
#   harm? (`parts` looks at one wrong choice; `minireft.evaluate` ranks all four.)
# - Put `"unlikelihood_smoothed"` for `"unlikelihood"`: the authors' code adds 0.01 inside the logarithm. Which tokens
#   does that set free?
#
# ## Exercises

# %% [markdown]
# ### 1 · Certain, and finite (10 minutes)
#
# Write `minus_log_not`: −log(1 − p) of a token, from the logits. Where the model is certain of that token, p rounds
# to 1, and the loss and its gradient must still be numbers.
#
# *Hint:* 1 − p is the share of all the *other* tokens: a difference of two `logsumexp`.

# %%
def minus_log_not(logits, token):
    """−log(1 − p) of token (an int) under the softmax of logits (V,): a number that can be differentiated."""
    # solution
    others = torch.cat((logits[:token], logits[token + 1:]))              # (V − 1,)
    return logits.logsumexp(0) - others.logsumexp(0)
    # end

# %%
torch.manual_seed(0)
logits = torch.randn(9)                                                   # (V,)
expected = -torch.log(1 - logits.double().softmax(0)[4])
assert torch.allclose(minus_log_not(logits, 4).double(), expected, atol=1e-4), "not −log(1 − p)"
certain = torch.zeros(9).index_fill(0, torch.tensor([4]), 50.0).requires_grad_()                # (V,)
loss = minus_log_not(certain, 4)
loss.backward()
assert abs(loss.item() - (50 - torch.tensor(8.0).log().item())) < 0.01, "wrong where p rounds to 1"
assert certain.grad.isfinite().all() and certain.grad[4] > 0.9, "its gradient is no number, or gone"

# %% [markdown]
# ### 2 · The softmax over choices (10 minutes)
#
# Write `rank_loss`: L_LN of one question from log p of its choices' tokens, which are padded to one length.
#
# *Hint:* padding must count neither in the sum nor in the number of tokens.

# %%
def rank_loss(log_p, mask, right):
    """log_p (K, T) of K choices, mask (K, T) with True = a token of the choice, right: an int. → L_LN."""
    # solution
    betas = (log_p * mask).sum(1) / mask.sum(1)                           # (K,)
    return -betas.log_softmax(0)[right]
    # end

# %%
torch.manual_seed(0)
lengths = torch.tensor([2, 5, 3])
values, mask = -3 * torch.rand(3, 5), torch.arange(5) < lengths[:, None]  # (K, T) both
betas = [values[k, : lengths[k]].mean() for k in range(3)]                # padding never seen
for k in range(3):
    expected = -torch.log(betas[k].exp() / sum(beta.exp() for beta in betas))
    assert torch.allclose(rank_loss(values, mask, k), expected, atol=1e-4), "not −log softmax(β)[right]"

# %% [markdown]
# ## In three lines
#
# 1. Choices are ranked by their mean log p a token, and every token votes, those that decide nothing as well.
# 2. L_LM makes the right text likely, L_UL the wrong tokens unlikely, L_LN trains the ranking itself: here it does
#    the work.
# 3. Examples in the prompt cost nothing to begin with and something at every answer, in time or in memory; vectors
#    cost a training, and then next to nothing.
