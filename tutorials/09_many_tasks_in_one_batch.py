# %% [markdown]
# # 9 · Many tasks in one batch
#
# **Eight customers have eight adapters for one model: must their requests wait in eight queues?**
#
# *Before:* tutorials 3 to 5 (LoReFT, positions, R). *Time:* 35 minutes.
#
# Run it with `python tutorials/09_many_tasks_in_one_batch.py`, step through it in a debugger, or open it as a notebook.
#
# This model knows eight skills by name: it can copy words, reverse them, say each twice, translate them into a made-up
# language, and so on.

# %%
import random

import torch

import minireft
from minireft.tasks.corpus import SKILLS, TRANSLATABLE

model, tokenizer = minireft.load("base")
L, C = model.config.layers, model.config.width
for skill in SKILLS:
    print(f"{skill:10}", minireft.generate(model, tokenizer, [f"{skill} : dog cat horse ->"], max_new_tokens=8))
assert minireft.generate(model, tokenizer, ["reverse : dog cat horse ->"], max_new_tokens=8) == ["horse cat dog ."]

# %% [markdown]
# ## Eight adapters, one word
#
# Each customer wants to say `go`, and each means another skill. That is eight LoReFTs of rank 1 at the first token: as
# tutorial 4 has shown, what stands there is heard by all that follows.
#
# **Predict:** how many numbers has each, and how often does the model do what is wanted, before training and after 40
# steps?

# %%
def lesson(skill, part, count):                                           # → examples: "go : a b c -> ..."
    draw = random.Random(f"{part} {skill}")
    words = [draw.choices(TRANSLATABLE, k=3) for _ in range(count)]
    return [minireft.Example(f"go : {' '.join(w)} ->", f"{' '.join(SKILLS[skill][0](w))} .", task=skill) for w in words]

def exact(skill):                                                         # the share of new requests written exactly
    return minireft.evaluate(model, tokenizer, lesson(skill, "test", 25), metrics=("exact",)).exact

before = {skill: exact(skill) for skill in SKILLS}
print("right before:", "  ".join(f"{skill} {share:.2f}" for skill, share in before.items()))
assert max(before.values()) < 0.1

# %%
reft, alone, config = {}, {}, minireft.TrainConfig(steps=40, lr=0.02, batch_size=8)
for skill in SKILLS:
    torch.manual_seed(0)
    reft[skill] = minireft.LoReFT(model, rank=1, layers="all", positions="f1")
    minireft.train(model, [reft[skill]], lesson(skill, "train", 64), config, progress=False)
    with reft[skill]:
        alone[skill] = exact(skill)
print(f"right with {reft['copy'].num_parameters():,} numbers each:")
print("  ".join(f"{skill} {share:.2f}" for skill, share in alone.items()))
assert sorted(alone.values())[2] > 0.8 and min(alone.values()) > 0.2

# %% [markdown]
# They hit, most of them always, with about a thousandth of the model's weights. Now the requests come in, all mixed.
# With one adapter on the model at a time they must be sorted into eight batches, one after the other.
#
# ## Each row its own edit, by hand
#
# Tutorial 3 wrote the edit as h + Rᵀ(W h + b − R h). Collect: h + Rᵀ((W − R) h + b), in the library's names
# h + upᵀ(down h + bias). In a batch every row may take *another* down, up and bias: stack those of all tasks, and let
# each row pick its own by its task's number, −1 for none.
#
# **Predict:** rows with the tasks 0, 1, 1, none. Which of these four rows change, and do rows 1 and 2 change alike?

# %%
def edit_rows(h, tasks, down, up, bias):                                  # (B, C), (B,), (K, r, C) twice, (K, r)
    own = tasks.clamp(min=0)                                              # (B,)
    delta = torch.einsum("brc,bc->br", down[own], h) + bias[own]          # (B, r)
    return h + torch.einsum("br,brc->bc", delta * (tasks >= 0)[:, None], up[own])                # (B, C)

torch.manual_seed(0)
down, up, bias = torch.randn(2, 3, C), torch.randn(2, 3, C), torch.randn(2, 3)              # (K, r, C) twice, (K, r)
tasks = torch.tensor([0, 1, 1, -1])                                       # (B,)
h = torch.randn(1, C).expand(4, C)                                        # (B, C) the same state in every row
by_hand = edit_rows(h, tasks, down, up, bias)                             # (B, C)
print("moved by:", [f"{x:.0f}" for x in (by_hand - h).norm(dim=1)])
assert torch.allclose(by_hand[1], by_hand[2], atol=1e-2) and torch.equal(by_hand[3], h[3])

# %%
at = torch.zeros(4, 1).long()                                             # (B, P) the position that each row edits
by_library = minireft.ops.low_rank_edit_at(h[:, None].contiguous(), at, down, up, bias, tasks)       # (B, 1, C)
print("the library's operation is ours:", torch.allclose(by_library[:, 0], by_hand, atol=1e-2))
assert torch.allclose(by_library[:, 0], by_hand, atol=1e-2) and not torch.allclose(by_hand[0], by_hand[1], atol=1)

# %% [markdown]
# The stack wants one shape, (K, r, C), and adapters may have different ranks. So the smaller ones are filled up with
# rows of zeros: such a row reads 0, adds 0, and nothing of it is to be seen.
#
# ## The bank
#
# `minireft.Bank` does this for a whole model: adapters of one kind by name, different in rank, layers or positions if
# they like. `bank.ids` turns names into numbers.
#
# **Predict:** the *same* request eight times, each row with another task, and once with none.

# %%
bank = minireft.Bank(reft)
names, text = [*SKILLS, None], "go : dog cat horse ->"
with bank:
    answers = minireft.generate(model, tokenizer, [text] * 9, max_new_tokens=8, tasks=bank.ids(names))
print("\n".join(f"{name!s:10} {answer}" for name, answer in zip(names, answers)))
assert answers[names.index("reverse")] == "horse cat dog ." and len(set(answers[:8])) >= 6

# %% [markdown]
# One pass, nine rows, eight meanings of `go`; a slip in one of them is that adapter's own. It would be surprising if a
# neighbour mattered: rows of a batch never look at each other. Check it against each adapter alone.
#
# **Predict:** are the logits equal? For the row without a task, to the bit?

# %%
request = torch.tensor([tokenizer.encode("go : dog cat horse ->")])       # (1, T)
with torch.no_grad():
    plain = model(request.expand(9, -1))                                  # (9, T, V)
    with bank:
        mixed = model(request.expand(9, -1), tasks=bank.ids(names))       # (9, T, V)
    singles = []
    for skill in SKILLS:
        with reft[skill]:
            singles.append(model(request)[0])                             # (T, V)
print(f"largest difference to each alone: {(mixed[:8] - torch.stack(singles)).abs().max():.1e}", end="; ")
print("no task, the same bits:", torch.equal(mixed[8], plain[8]))
assert torch.allclose(mixed[:8], torch.stack(singles), atol=1e-2) and torch.equal(mixed[8], plain[8])

# %% [markdown]
# An adapter that nobody has heard of is an error, not a silent row without one:

# %%
try:
    bank.ids(["sing"])
except ValueError as error:
    print(error)
    assert "'sing' is not in this bank" in str(error)

# %% [markdown]
# ## What does it cost?
#
# 32 requests for K tasks. One way: sort them, put on each adapter in turn, run K batches of 32 / K rows. The other: one
# batch with the bank. We count the tensor operations that PyTorch is asked for, which are the same on every machine,
# and take the time, which is this machine's.
#
# **Predict:** for K = 1, 2, 4, 8: what do the two counts do? And the two times?

# %%
import time
from torch.utils._python_dispatch import TorchDispatchMode

class Counter(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))

with Counter() as counter, torch.no_grad():
    model(request)
print("a pass of the model without any adapter:", counter.count, "operations")
assert counter.count > 10 * L

# %%
@torch.no_grad()
def measured(call):                                                       # → operations, milliseconds
    call()                                                                # what is computed once and kept is done
    with Counter() as counter:
        call()
    times = []
    for _ in range(7):
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    return counter.count, min(times)

print("32 requests, no adapter:", measured(lambda: model(request.expand(32, -1)))[0], "operations as well")

# %%
Ks, found, requests = (1, 2, 4, 8), {"in turn": [], "in a bank": []}, request.expand(32, -1)    # (B, T)
for K in Ks:
    some = {skill: reft[skill] for skill in [*SKILLS][:K]}
    bank, tasks = minireft.Bank(some), torch.arange(32) % K               # (B,)
    def in_turn():
        for adapter in some.values():
            with adapter:
                model(requests[: 32 // K])
    with bank:
        found["in a bank"].append(measured(lambda: model(requests, tasks=tasks)))
    found["in turn"].append(measured(in_turn))
print("eight tasks in a bank:", found["in a bank"][3][0], "operations")

# %%
for name, pairs in found.items():
    print(f"{name:10}", "   ".join(f"K = {K}: {n:4} op., {ms:3.0f} ms" for K, (n, ms) in zip(Ks, pairs)))
turn, together = ([n for n, _ in found[name]] for name in ("in turn", "in a bank"))
assert turn[3] > 7.5 * turn[0] and together[3] < 1.3 * together[0] and together[3] < turn[3] / 4

# %% [markdown]
# Flat, to the operation. In turn, the count grows as K; the time grows less, since a smaller batch is quicker, but it
# grows. The bank does not know K: it picks rows from a stack, and whether the stack holds two tasks or two hundred is a
# matter of memory, 8 KiB a task, where a merged copy of the model would be 7 MiB. Batches of mixed tasks are one reason
# that Liu et al. (2022) give for such small adapters (`minireft.Bank` holds (IA)³ and LoRA as well).

# %%
# Picture: left, operations for 32 requests by the number of their tasks; right, the time they take on this machine
import matplotlib.pyplot as plt
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
for axis, column, title in ((axes[0], 0, "Operations for 32 requests"), (axes[1], 1, "Milliseconds (this machine)")):
    for (name, pairs), mark in zip(found.items(), ("s-", "o-")):
        axis.plot(Ks, [pair[column] for pair in pairs], mark, label=name)
    axis.set(xlabel="tasks among the 32 requests", title=title, ylim=(0, None), xticks=Ks)
axes[0].set_ylabel("tensor operations")
axes[1].set_ylabel("milliseconds")
axes[0].legend()
plt.show()

# %% [markdown]
# ## One R, two skills
#
# Another way to have two skills: one LoReFT with 64 directions, of which the first 32 learn one thing and the last 32
# another, each without the other (`minireft.Subspace`; R is fixed, a slice trains its rows of W and b). The rows of R
# are at right angles, so neither writes where the other writes.
#
# **Predict:** after the second skill has been learned, is the first one's edit still the same? And if both slices work
# at once, `reverse` and `translate`: what will the model answer to `go : dog cat horse ->`?

# %%
torch.manual_seed(0)
parent = minireft.LoReFT(model, rank=64, layers="all", positions="f1+l1")
slices = {"reverse": minireft.Subspace(parent, range(32)), "translate": minireft.Subspace(parent, range(32, 64))}
longer = minireft.TrainConfig(steps=80, lr=0.03, batch_size=8)
for skill, part in slices.items():
    minireft.train(model, [part], lesson(skill, "train", 64), longer, progress=False)
for part in slices.values():
    part.write_back()                                                     # into the parent's rows of W and b
with minireft.Bank({**slices, "both": parent}) as bank:
    rows = minireft.generate(model, tokenizer, [text] * 3, max_new_tokens=8, tasks=bank.ids(bank.names))
print("\n".join(f"{name:10} {answer}" for name, answer in zip(bank.names, rows)))
assert rows[:2] == [f"{' '.join(SKILLS[s][0](['dog', 'cat', 'horse']))} ." for s in slices] and rows[2] not in rows[:2]

# %%
h = 10 * torch.randn(5, C)                                                # some states
def change(adapter):                                                      # what its edit after block 0 adds: (5, C)
    W, V, U, b = (part[0, 0].detach() for part in adapter.parts())        # (r, C) three times, (r,)
    return (h @ (W - V).T + b) @ U

first, second = map(change, slices.values())
R = parent.rotations()[0]                                                 # (64, C)
print("the two slices' edits make the parent's:", torch.allclose(first + second, change(parent), atol=1e-2))
print(f"the first writes {(first @ R[:32].T).norm():.1f} along its rows, {(first @ R[32:].T).norm():.0e} along others")
assert torch.allclose(first + second, change(parent), atol=1e-2)
assert (first @ R[32:].T).norm() < 1e-4 * (first @ R[:32].T).norm()

# %% [markdown]
# As vectors the two skills stay out of each other's way, exactly: their sum is the parent's edit. And each by itself
# does what it was taught, if the bank lets its row choose it. But both at once are *not* a reversed translation: what
# comes out is neither. At right angles is a promise about what is written at one place. The blocks behind it read sums
# of directions, have never met this one, and both skills answer the same question. So let rows choose, or train the two
# together; `minireft.weighted_sum`, which makes one adapter of several, promises no more than this sum.
#
# ## Two changes to try
#
# - Make the slices answer different questions: let the second learn `few_shot.shots("labels", 0)` of tutorial 4. Does
#   `reverse` survive when both are on? (It hears the second slice's edit, too.)
# - Give the bank adapters of ranks 1, 4 and 16: what happens to the count of operations, and to the time?
#
# ## Exercises

# %% [markdown]
# ### 1 · Different ranks, one stack (10 minutes)
#
# Write `stacked`: edits of different ranks as one stack, filled up so that each does what it did.
#
# *Hint:* a row of `up` that is zero adds nothing, whatever is read.

# %%
def stacked(edits):
    """edits: K of down (r_k, C), up (r_k, C), bias (r_k,) → down, up (K, r, C) and bias (K, r), r the largest rank."""
    # solution
    r = max(len(bias) for _, _, bias in edits)
    fill = lambda w: torch.cat((w, w.new_zeros(r - len(w), *w.shape[1:])))
    return tuple(torch.stack([fill(edit[i]) for edit in edits]) for i in range(3))
    # end

# %%
torch.manual_seed(0)
edits = [(torch.randn(r, C), torch.randn(r, C), torch.randn(r)) for r in (2, 5, 1)]
h = torch.randn(3, C)                                                     # (B, C) a row for each
down, up, bias = stacked(edits)
assert down.shape == up.shape == (3, 5, C) and bias.shape == (3, 5), "not one stack of the largest rank"
for k, (d, u, b) in enumerate(edits):
    own = (h[k] @ down[k].T + bias[k]) @ up[k]                            # (C,)
    assert torch.allclose(own, (h[k] @ d.T + b) @ u, atol=1e-3), f"edit {k} does something else in the stack"

# %% [markdown]
# ### 2 · The same for a scale (8 minutes)
#
# (IA)³ multiplies by a vector. Write `scaled` for a batch of mixed tasks.
#
# *Hint:* in PyTorch `l[-1]` is the last one, and no error.

# %%
def scaled(x, l, tasks):
    """x (B, T, C), l (K, C), tasks (B,) with −1 for none: each row times the vector of its task. (B, T, C)"""
    # solution
    own = torch.where(tasks[:, None] < 0, 1.0, l[tasks.clamp(min=0)])     # (B, C)
    return x * own[:, None]
    # end

# %%
torch.manual_seed(0)
x, l, tasks = torch.randn(4, 4, C), torch.randn(3, C), torch.tensor([2, -1, 0, 2])
result = scaled(x, l, tasks)
assert torch.equal(result[1], x[1]), "a row without a task has changed"
for row, task in ((0, 2), (2, 0), (3, 2)):
    assert torch.allclose(result[row], x[row] * l[task]), f"row {row} has another task's vector"

# %% [markdown]
# ## In three lines
#
# 1. In a bank each row of a batch picks its own weights by its task's number: many adapters, one pass.
# 2. The number of operations does not depend on the number of tasks, and each row gets what its adapter alone gives.
# 3. Slices of one R do not write over each other, but two skills at once are a new input to the model: let rows choose,
#    and measure what is combined.
