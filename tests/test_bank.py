"""Banks: every row of a batch with the adapter that it names, at a cost that does not know how many tasks there are.

Run:  pytest tests/test_bank.py
See:  logits, gradients, generated text and whole training runs equal to those of each adapter alone.
"""

import collections

import pytest
import small
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import minireft
from minireft import IA3, Bank, ConsReFT, DiReFT, Example, LobiReFT, LoRA, LoReFT, NoReFT, SteeringVector, TrainConfig
from minireft.adapters import edits, reft
from minireft.adapters.compose import Subspace

BANKS = {                               # members that differ in all that may differ
    "LoReFT": lambda m: {"a": LoReFT(m, rank=3, layers=[0, 2], positions="f2+l1", tied=False),
                         "b": LoReFT(m, rank=1, layers=1, positions="all"), "c": LoReFT(m, rank=5, positions="0,-2")},
    "kin": lambda m: {"a": DiReFT(m, rank=2, positions="l4"), "b": NoReFT(m, positions="f2+l2", tied=False), "c": ConsReFT(m, layers=[1]),
                      "d": LobiReFT(m, rank=1, positions="f1"), "e": SteeringVector(m, torch.randn(2, 16), layers=[0, 2])},
    "generated": lambda m: {"a": LoReFT(m, rank=2, positions="all+generated"), "b": LoReFT(m, rank=3, positions="f1+l1")},
    "queries": lambda m: {"a": LoReFT(m, rank=2, site="query"), "b": DiReFT(m, rank=4, site="query", layers=[2])},
    "embedding": lambda m: {"a": LoReFT(m, rank=2, site="embed"), "b": LoReFT(m, rank=3, site="embed", positions="l1")},
    "IA3": lambda m: {"a": IA3(m), "b": IA3(m, sites=("query", "ffn", "ffn_output")), "c": IA3(m, sites="key", layer_norm=True)},
    "LoRA": lambda m: {"a": LoRA(m, rank=2, alpha=3), "b": LoRA(m, rank=4, sites=("up", "value", "attention_output"))},
}


def made(kind, model):
    members = BANKS[kind](model)
    for seed, member in enumerate(members.values()):
        small.randomise(member, seed, std=0.2)
    return members


def batch(count, side="left"):
    return small.pad(small.rows([3 + 5 * i % 7 for i in range(count)]), side)


def alone(model, adapter, *inputs, **more):
    """The logits of a batch with `adapter` standing by itself; None: with nothing."""
    if adapter is None:
        return model(*inputs, **more)
    with adapter:
        return model(*inputs, **more)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", BANKS)
def test_each_row_is_that_of_its_adapter_alone(kind, side):
    model = small.model()
    members = made(kind, model)
    names = [None, *members, *reversed(members), None, list(members)[0]]
    tokens, mask = batch(len(names), side)
    prompts = torch.tensor([1 + i % 4 for i in range(len(names))])
    for lengths in (None, prompts):
        singles = {name: alone(model, members.get(name), tokens, mask, lengths) for name in {*names}}
        bank = Bank(members)
        with bank:
            mixed = model(tokens, mask, lengths, bank.ids(names))
        assert len({x.sum().item() for x in singles.values()}) == len(singles)             # the tasks do differ
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row][mask[row]], singles[name][row][mask[row]])
            if name is None:
                assert torch.equal(mixed[row], singles[None][row])


@pytest.mark.parametrize("kind", BANKS)
def test_gradients_are_those_of_each_adapter_on_its_own_rows(kind):
    model = small.model()
    members = made(kind, model)
    names = [*members, None, *members]
    tokens, mask = batch(len(names))
    bank = Bank(members)
    with bank:
        model(tokens, mask, tasks=bank.ids(names)).square().mean((1, 2)).sum().backward()
    mixed = {name: {n: p.grad.clone() for n, p in m.named_parameters()} for name, m in members.items()}
    for name, member in members.items():
        member.zero_grad()
        mine = torch.tensor([n == name for n in names])
        loss = alone(model, member, tokens, mask)[mine].square().mean((1, 2)).sum()
        if not mixed[name]:
            continue                                                      # a steering vector trains nothing
        loss.backward()
        for n, p in member.named_parameters():
            scale = p.grad.abs().max().item()
            assert scale > 0
            torch.testing.assert_close(mixed[name][n], p.grad, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", BANKS)
def test_generation_is_that_of_each_adapter_alone(kind):
    model = small.model()
    members = made(kind, model)
    prompts = ["w1 w5 w2", "w7", "w3 w3 w9 w4 w8 w2 w6", "w11 w12", "w20 w1 w2 w3 w4"]
    names = (list(members) + [None] + list(members))[: len(prompts)]
    wanted = []
    for prompt, name in zip(prompts, names):
        adapter = members.get(name)
        if adapter:
            adapter.attach()
        wanted += minireft.generate(model, model.tokenizer, [prompt], max_new_tokens=6)
        if adapter:
            adapter.detach()
    bank = Bank(members)
    with bank:
        assert minireft.generate(model, model.tokenizer, prompts, max_new_tokens=6, tasks=bank.ids(names)) == wanted


# ------------------------------------------------------------------------------------------- training on examples, together

def lesson(task, shift):
    """Full batches of one task: from the prompt's first word, the word `shift` further on."""
    return [Example(f"w{i} w{2 * i % 7} w9", f"w{i + shift}", (f"w{i + shift}", f"w{i + shift + 1}", "w0"), task=task) for i in range(1, 9)]


@pytest.mark.parametrize("kind, lr", [("LoReFT", 2e-2), ("IA3", 5e-2), ("LoRA", 2e-2)])
def test_trained_together_they_learn_what_each_learns_alone(kind, lr):
    make = {"LoReFT": lambda m, i: LoReFT(m, rank=2 + 2 * i, positions="f2+l2"), "IA3": lambda m, i: IA3(m),
            "LoRA": lambda m, i: LoRA(m, rank=2 + i)}[kind]
    lessons, config = {"one": lesson("one", 2), "two": lesson("two", 11)}, dict(steps=30, lr=lr, clip=0)

    def fresh():
        model = small.model()
        torch.manual_seed(0)
        return model, {name: make(model, i) for i, name in enumerate(lessons)}
    model, members = fresh()
    bank = Bank(members)
    both = lessons["one"] + lessons["two"]
    run = minireft.train(model, [bank], both, TrainConfig(batch_size=16, **config), model.tokenizer, progress=False)
    assert not bank.attached and run.losses[-1] < 0.6 * run.losses[0]
    with bank:
        together = minireft.evaluate(model, model.tokenizer, both)
        ids = bank.ids([e.task for e in both])
        written = minireft.generate(model, model.tokenizer, [e.prompt for e in both], max_new_tokens=2, tasks=ids)
    answers, right = [], 0
    model, members = fresh()
    for name, member in members.items():
        minireft.train(model, [member], lessons[name], TrainConfig(batch_size=8, **config), model.tokenizer, progress=False)
        for (n, p), q in zip(member.named_parameters(), dict(zip(lessons, bank.members))[name].parameters()):
            # The mean over both tasks' tokens halves a gradient. Adam cancels factors but for its ε of 1e-8.
            torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-4, msg=f"{name} {n}")
        with member:
            scores = minireft.evaluate(model, model.tokenizer, lessons[name])
        answers, right = answers + list(scores.answers), right + scores.rank * scores.n
    assert list(together.answers) == answers and together.rank == right / len(both)
    assert [w.split()[:1] for w in written] == [a.split()[:1] for a in answers]


# -------------------------------------------------------------------------------------------------------------------- cost

class Count(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["LoReFT", "IA3", "LoRA"])
def test_cost_is_flat_in_the_number_of_tasks(kind):
    make = {"LoReFT": lambda m, i: LoReFT(m, rank=1 + i % 3), "IA3": lambda m, i: IA3(m), "LoRA": lambda m, i: LoRA(m, rank=1 + i % 3)}[kind]
    tokens, found = torch.stack(small.rows([5] * 12)), set()
    for size in (1, 2, 12):
        model = small.model()
        bank = Bank({f"task {i}": make(model, i) for i in range(size)}).attach()
        for tasks in ([0] * 12, [i % size for i in range(12)], [-1] * 12):
            with torch.no_grad():
                model(tokens, tasks=torch.tensor(tasks))                  # the padded weights are made here, once
                with Count() as count:
                    model(tokens, tasks=torch.tensor(tasks))
            found.add(tuple(sorted(count.calls.items())))
    assert len(found) == 1


def test_one_launch_a_site_and_one_orthonormalisation_a_member(monkeypatch):
    calls = collections.Counter()

    def counted(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.update([name]) or function(*a, **k))
    model = small.model()
    bank = Bank({f"task {i}": LoReFT(m, positions="f2+l2", tied=i % 2 == 0) for i, m in enumerate([model] * 6)}).attach()
    counted(edits.ops, "low_rank_edit_at_")
    counted(reft, "orthonormalise")
    tokens, tasks = torch.stack(small.rows([5] * 7)), torch.tensor([0, 1, 2, 3, 4, 5, -1])
    model(tokens, tasks=tasks).sum().backward()
    assert calls == {"low_rank_edit_at_": 3, "orthonormalise": 6}         # three layers, six members
    calls.clear()
    with torch.no_grad():
        model(tokens, tasks=tasks)
        model(tokens, tasks=tasks)
        assert calls == {"low_rank_edit_at_": 6, "orthonormalise": 6}     # without gradients it is kept
        before = model(tokens, tasks=tasks)
        bank.members[4].b += 1                                            # until a parameter changes
        after = model(tokens, tasks=tasks)
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [True, True, True, True, False, True, True]


# ---------------------------------------------------------------------------------------------------------------- the rest

def test_strength_of_a_member_and_of_the_whole():
    model = small.model()
    members = made("LoReFT", model)
    tokens, mask = batch(4)
    bank = Bank(members)
    names = ["a", "b", "c", None]
    with torch.no_grad():
        def run():
            with bank:
                return model(tokens, mask, tasks=bank.ids(names))
        full, base = run(), model(tokens, mask)
        members["b"].strength = 0.0
        torch.testing.assert_close(run(), torch.stack([full[0], base[1], full[2], base[3]]))
        bank.strength = 0.0
        torch.testing.assert_close(run(), base)
        members["b"].strength = bank.strength = 1.0
        assert torch.equal(run(), full)


def test_the_strict_rule_asks_only_the_rows_of_its_own_member():
    model = small.model()
    members = {"strict": LoReFT(model, positions="f3+l2", strict=True), "lenient": LoReFT(model, positions="f3+l4"), "all": LoReFT(model, positions="all")}
    tokens, mask = small.pad(small.rows([4, 5, 2, 1]), "left")
    bank = Bank(members).attach()
    model(tokens, mask, tasks=bank.ids(["lenient", "strict", "all", None]))
    with pytest.raises(ValueError, match="the prompt in row 2 is too short.*2 of 5.*strict=True"):
        model(tokens, mask, tasks=bank.ids(["lenient", "strict", "strict", None]))
    with pytest.raises(ValueError, match="the prompt in row 1 is too short.*3 of 5"):
        model(tokens, mask, torch.tensor([4, 3, 2, 1]), bank.ids(["lenient", "strict", "all", None]))


def test_slices_of_one_parent_chosen_by_each_example():
    model = small.model()
    parent = small.randomise(LoReFT(model, rank=4, positions="f2+l1", tied=False), std=0.2)
    slices = {"low": Subspace(parent, [0, 1]), "high": Subspace(parent, [3])}
    for seed, one in enumerate(slices.values()):
        small.randomise(one, seed, std=0.2)
        one.write_back()
    bank = Bank({**slices, "all": parent})
    tokens, mask = batch(5)
    names = ["high", "all", None, "low", "low"]
    singles = {name: alone(model, {**slices, "all": parent}.get(name), tokens, mask) for name in {*names}}
    with bank:
        mixed = model(tokens, mask, tasks=bank.ids(names))
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], singles[name][row])


# --------------------------------------------------------------------------------------------------------------- bad input

def test_what_is_no_bank_is_refused():
    model = small.model()
    lo = LoReFT(model)
    for members, message in [
            ({}, "the bank is empty"),
            ({"a": lo, "b": IA3(model)}, "one kind of adapter: got IA3, LoReFT"),
            ({"a": lo, "b": LoReFT(small.model())}, "'b' was made for another model object"),
            ({"a": lo, "b": LoReFT(model, dropout=0.1)}, "'b' has dropout, an activation or another site"),
            ({"a": lo, "b": LoReFT(model, activation="relu")}, "'b' has dropout, an activation or another site"),
            ({"a": lo, "b": LoReFT(model, site="ffn_output")}, "'b' has dropout, an activation or another site"),
            ({"a": minireft.NEFTune(model)}, "one kind of adapter: got NEFTune"),
            ({"a": Bank({"b": lo})}, "one kind of adapter: got Bank")]:
        with pytest.raises(ValueError, match=message):
            Bank(members)
    with lo, pytest.raises(ValueError, match="'a' is attached by itself"):
        Bank({"a": lo})
    assert model.adapters == []


def test_tasks_that_are_not_there_are_named():
    model = small.model()
    bank, tokens = Bank({"mood": LoReFT(model), "facts": LoReFT(model)}), torch.stack(small.rows([4, 4]))
    assert bank.ids(["facts", None, "mood"]).tolist() == [1, -1, 0]
    with pytest.raises(ValueError, match="task 'moods' is not in this bank: expected one of mood, facts, or None"):
        bank.ids(["mood", "moods"])
    with pytest.raises(ValueError, match="nothing is attached that reads them"):
        model(tokens, tasks=bank.ids(["mood", None]))
    with bank:
        for wrong in ([2, 0], [0, -2]):
            with pytest.raises(ValueError, match="expected ids from −1 to 1; bank.ids"):
                model(tokens, tasks=torch.tensor(wrong))
        with pytest.raises(ValueError, match="no tasks are given: pass tasks=bank.ids"):
            model(tokens)
        with pytest.raises(ValueError, match="tasks has shape"):
            model(tokens, tasks=torch.tensor([0]))
        for options in ({}, {"beams": 2}):
            with pytest.raises(ValueError, match="no tasks are given"):
                minireft.generate(model, model.tokenizer, ["w1"], **options)
            with pytest.raises(ValueError, match="tasks has shape"):
                minireft.generate(model, model.tokenizer, ["w1"], tasks=bank.ids(["mood", "mood"]), **options)
        with pytest.raises(ValueError, match="task 'sums' is not in this bank"):
            minireft.evaluate(model, model.tokenizer, [Example("w1", "w2", task="sums")])
        assert not model.training


def test_training_refuses_wrong_tasks_before_the_first_step():
    model = small.model()
    bank = Bank({"mood": LoReFT(model), "facts": LoReFT(model)})
    before = small.bits(bank)
    for task, message in [("sums", "task 'sums' is not in this bank"), (None, "some examples name no task")]:
        with pytest.raises(ValueError, match=message):
            minireft.train(model, [bank], [Example("w1", "w2", task="mood"), Example("w1", "w3", task=task)],
                           TrainConfig(batch_size=2), model.tokenizer, progress=False)
        assert model.adapters == [] and small.same_bits(small.bits(bank), before)


def test_nothing_works_twice():
    model = small.model()
    for make in (LoReFT, IA3, LoRA):
        members = {"a": make(model), "b": make(model)}
        bank = Bank(members)
        with members["a"], pytest.raises(ValueError, match="'a' is attached or merged by itself"):
            bank.attach()
        with bank, pytest.raises(ValueError, match="stands in a bank that is attached|another ReFT edits"):
            members["b"].attach()
        with bank, pytest.raises(ValueError, match="another bank is attached"):
            Bank({"c": make(model)}).attach()
        assert model.adapters == [] and all(not site.edits for site in model.sites().values())
    members["a"] = IA3(model)
    bank = Bank({"a": members["a"]})
    members["a"].merge()
    with pytest.raises(ValueError, match="attached or merged by itself"):
        bank.attach()
    bank = Bank({"a": LoReFT(model, positions="f2")})
    with LoReFT(model, positions="l1"), pytest.raises(ValueError, match="another ReFT edits output of layer 0"):
        bank.attach()
    with LoReFT(model, positions="2,3"), bank:                            # apart from each other they may stand together
        model(torch.stack(small.rows([5])), tasks=torch.tensor([0]))


def test_a_bank_of_slices_is_not_saved(tmp_path):
    parent = LoReFT(small.model(), rank=4)
    with pytest.raises(ValueError, match="'low' is a Subspace, which no file holds by itself: save its parent"):
        Bank({"low": Subspace(parent, [0]), "all": parent}).save(tmp_path / "bank")
    assert list(tmp_path.iterdir()) == []
