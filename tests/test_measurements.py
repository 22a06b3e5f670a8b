"""The programs in benchmarks/ that make claims about adapters: what they measure is what they say.

Run:  pytest tests/test_measurements.py           # -m slow runs the smallest of each
See:  counterfactuals with the answers of the world, and ratios that are 1 for the floor.
"""

import argparse
from types import SimpleNamespace

import pytest
import torch

import minireft
from benchmarks import das, generation, neftune, training
from minireft.tasks.world import ATTRIBUTES, VOCABULARY, World


@pytest.mark.parametrize("variable", das.POSITION)
def test_counterfactuals_exchange_one_variable(variable):
    tokenizer, world, split = minireft.Tokenizer.from_words(VOCABULARY), World(), das.people()
    assert sorted(sum(split.values(), [])) == sorted(das.PEOPLE) and len({*split["train"]} & {*split["test"]}) == 0
    wording = {ask.format(s=name): (name, attribute) for attribute in das.KNOWN for name in das.PEOPLE for ask in ATTRIBUTES[attribute].asks}
    seen = set()
    for pair in das.pairs(tokenizer, variable, split["test"], 200, seed=0):
        (person, attribute), (other, asked) = (wording[tokenizer.decode(list(ids)).removeprefix("question : ").removesuffix(" ? answer :")]
                                               for ids in (pair.base, pair.source))
        assert person != other and attribute != asked and {person, other} <= {*split["test"]}
        wanted = world.value[(person, asked) if variable == "attribute" else (other, attribute)]
        assert tokenizer.decode([pair.answer]) == wanted and pair.answer in das.values(tokenizer)
        at = das.POSITION[variable]
        assert [tokenizer.decode([ids[at]]) for ids in (pair.base, pair.source)] == ([":", ":"] if variable == "attribute" else [person, other])
        seen |= {person, attribute}
    assert seen == {*split["test"], *das.KNOWN}
    assert das.pairs(tokenizer, variable, split["test"], 9, seed=0) == das.pairs(tokenizer, variable, split["test"], 9, seed=0)


def test_providers_make_the_step_that_they_are_named_after():
    model = training.base(64, 2)
    steps = training.step_providers(model, 2, 12, training.OURS[:6])
    assert set(steps) == {"floor", "inner floor", *training.OURS[:6]}
    for step in steps.values():
        for phase in step.phases():
            phase()
    losses = {name: step.loss.item() for name, step in steps.items()}
    assert losses.pop("(IA)³") > 0 and max(losses.values()) - min(losses.values()) < 1e-4  # every other one begins as the base itself
    assert model.adapters == [] and not any(site.edits for site in model.sites().values())
    householder = training.Householder(model, rank=3)
    with torch.no_grad():
        R = householder.parts()[1][0, 0]
    torch.testing.assert_close(R @ R.T, torch.eye(3), atol=1e-5, rtol=0)


def test_full_steps_train_everything_and_noise_is_heard():
    steps = training.step_providers(training.base(64, 2), 2, 12, ("full", "full, NEFTune"))
    for step in steps.values():
        for phase in step.phases():
            phase()
    assert steps["full, NEFTune"].loss != steps["full"].loss


def test_mixed_tasks_are_mixed(monkeypatch):
    monkeypatch.setattr(training, "TASKS", (1, 3))
    steps = training.task_providers(training.base(64, 2), B=5, T=12)
    assert set(steps) == {"floor", "3 tasks"}
    for step in steps.values():
        for phase in step.phases():
            phase()


def test_generation_runs_each_part_with_each_method():
    for part, runs in generation.providers(training.base(64, 2).eval(), 2, 12).items():
        assert set(runs) == {"floor", "LoReFT", "(IA)³", "LoRA", "(IA)³ merged"} and part in ("prefill", "decoding", "generate")
        for run in runs.values():
            run()


def test_ratios_are_of_the_same_round_and_to_the_own_floor(monkeypatch):
    monkeypatch.setattr(training, "installed", lambda: "")
    times = {"floor": [1.0, 2.0, 4.0], "LoReFT": [2.0, 4.0, 8.0], "pyreft's floor": [3.0, 3.0, 3.0], "pyreft": [4.5, 4.5, 4.5], "(IA)³": [1.5, 3.0, 6.0]}
    clock = SimpleNamespace(device="cpu", interleaved=lambda runs, seconds: times)
    found = training.row(clock, "step", 64, 2, 2, 12, dict.fromkeys(times), 0)["providers"]
    assert {name: f["ratio"] for name, f in found.items()} == {
        "floor": [1, 1, 1], "LoReFT": [2, 2, 2], "pyreft's floor": [1.05, 1.5, 2.4], "pyreft": [1.5] * 3, "(IA)³": [1.5] * 3}
    assert found["pyreft"]["floor"] == "pyreft's floor" and found["(IA)³"]["floor"] == "floor"      # whose inner floor was not measured


def test_intervals_are_student_s():
    assert neftune.interval([1.0, 1.0, 1.0]) == (1, 0)
    mean, half = neftune.interval([1.0, 2.0, 3.0, 4.0])                   # std √(5/3), t(0.975; 3) = 3.182
    assert mean == 2.5 and half == pytest.approx(3.182 * (5 / 3) ** 0.5 / 2)


def test_the_table_pairs_seeds():
    rows = [{name: float(seed) for name in neftune.MEASURES} for seed in range(3)]
    lines = neftune.table({"no noise": rows, "noise": [{name: x + 0.5 for name, x in row.items()} for row in rows],
                           neftune.CONTROL: [{"length": 2 * row["length"]} for row in rows]})
    assert sum("difference +0.5000 ± 0.0000" in line for line in lines) == len(neftune.MEASURES)         # seeds differ, differences do not
    assert sum(neftune.CONTROL in line for line in lines) == 1


def test_noise_is_measured_on_what_was_trained(shipped_base):
    model, tokenizer = shipped_base
    examples = minireft.tasks.load("instructions", "train", 12)
    shares = [neftune.nearest(model, examples, alpha) for alpha in (0.0, 5.0, 100.0, 1e4)]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and shares[-1] < 0.05
    own, forced = neftune.answers(model, examples), neftune.answers(model, examples, longer=4)
    for short, long in zip(own, forced):
        assert long.startswith(short) and len(long.split()) >= len(short.split()) + 4
    assert not model.head.edits
    quiet = neftune.loss(model, examples)
    with minireft.NEFTune(model.train(), alpha=100.0):                    # attached, and nothing is heard of it
        assert neftune.answers(model, examples) == own and neftune.loss(model, examples) == quiet
    model.eval()
    by_hand = minireft.evaluation.mean_log_likelihoods(model, [minireft.data.encode(tokenizer, examples[0], 96)])
    assert neftune.loss(model, examples[:1]) == pytest.approx(-by_hand[0], rel=1e-4)


@pytest.mark.slow
def test_das_on_the_shipped_base(shipped_base):
    options = argparse.Namespace(rank=16, steps=40, lr=2e-2)
    by_layer, whole, found = das.search(*shipped_base, "attribute", [4], options)
    test = das.pairs(shipped_base[1], "attribute", das.people()["test"], 200, seed=3)
    assert found.accuracy(test, das.values(shipped_base[1])) > 0.9
