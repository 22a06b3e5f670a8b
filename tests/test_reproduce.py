"""`minireft reproduce`: selection cannot see the test items, a stopped run goes on, and a page says what the cells say.

Run:  pytest tests/test_reproduce.py              # -m slow runs every claim with --quick
See:  a claim of made-up numbers through the whole machinery, and one real cell of each kind that trains.
"""

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minireft
from benchmarks.reproduce import ablation, engine, methods, noise, report, run
from benchmarks.reproduce.claims import CLAIMS
from minireft import tasks

FOLDER = Path(run.__file__).parent
TINY = engine.Scale("tiny", seeds=3, items=4, validation=3, share=0.02)


def toy(log, stop=None):
    """A claim whose numbers are a formula: the best value is 0.3 on validation items and 0.1 on test items."""
    def measure(base, task, method, value, seed, items, scale):
        log.append((base, task, method, value, seed, tuple(items)))
        if stop and len(log) == stop:
            raise KeyboardInterrupt
        best = 0.3 if items[0].startswith("validation") else 0.1
        return {"accuracy": 1 - abs(value - best) + 0.01 * seed * (method == "b"), "parameters": 7}

    def split(task, name, count):
        log.append(name)
        return [f"{name} {i}" for i in range(count)]
    return engine.Claim("toy", "Better", "80.2", "Small.", (("one", "x"), ("two", "x")), {"a": (0.1, 0.3), "b": (0.1, 0.3, 0.9), "c": (0.0,)},
                        measure, split, lambda found: report.differences(found, "a less b", ("a", "b"), "not less"), reference="a")


# ------------------------------------------------------------------------------------------- selection and the test items

def test_selection_ends_before_the_test_is_opened(tmp_path):
    log, store = [], engine.Store(tmp_path)
    claim = toy(log)
    engine.run_claim(claim, store, TINY)
    for base in ("one", "two"):
        mine = [entry for entry in log if isinstance(entry, str) or entry[0] == base]
        assert {items[0].split()[0] for *_, seed, items in (e for e in mine if not isinstance(e, str)) if seed == 0} == {"validation"}
        assert {items[0].split()[0] for *_, seed, items in (e for e in mine if not isinstance(e, str)) if seed} == {"test"}
    assert [entry for entry in log if isinstance(entry, str)] == ["validation", "test"] * 2
    first = log.index("test")
    assert all(entry[4] == 0 for entry in log[1:first]) and len(log[1:first]) == 5        # 2 + 3 values; "c" has nothing to select
    tested = {(method, value) for _, _, method, value, seed, _ in (e for e in log if not isinstance(e, str)) if seed}
    assert tested == {("a", 0.3), ("b", 0.3), ("c", 0.0)}                 # what validation says, although 0.1 is better in the test
    openings = [json.loads(line) for line in store.openings.read_text().splitlines()]
    assert [(o["base"], o["chosen"]) for o in openings] == [(base, {"a": 0.3, "b": 0.3, "c": 0.0}) for base in ("one", "two")]


def test_the_test_stays_closed_while_a_selection_cell_is_missing(tmp_path):
    log, store = [], engine.Store(tmp_path)
    claim = toy(log)
    engine.run_claim(claim, store, TINY)
    store.cells = {key: cell for key, cell in store.cells.items() if not (cell["phase"] == "select" and cell["value"] == 0.9)}
    log.clear()
    with pytest.raises(ValueError, match="1 selection cells.*stays closed"):
        engine.open_test(claim, "one", "x", TINY, store)
    assert log == []


def test_another_choice_after_the_opening_is_refused(tmp_path):
    store = engine.Store(tmp_path)
    engine.run_claim(toy([]), store, TINY)
    for cell in store.cells.values():
        if cell["phase"] == "select" and cell["method"] == "a":
            cell["accuracy"] = 1 - cell["accuracy"]                       # somebody changes their mind
    with pytest.raises(ValueError, match="were opened on .* with other choices"):
        engine.open_test(toy([]), "one", "x", TINY, store)


def test_one_function_asks_for_test_items():
    asked = []
    for path in FOLDER.glob("*.py"):
        for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                if name in ("split", "load", "items", "examples", "open_ended", "steering", "test") and any(
                        isinstance(a, ast.Constant) and a.value == "test" for a in (*call.args, *(k.value for k in call.keywords))):
                    asked.append((path.name, function.name))
    assert asked == [("engine.py", "open_test")]


def test_a_real_selection_reads_no_test_item(tmp_path, monkeypatch):
    whole = tasks.load

    def closed(name, split, limit=None):
        assert split != "test", "selection read the test split"
        return whole(name, split, limit)
    monkeypatch.setattr(tasks, "load", closed)
    claim = replace(ablation.CLAIM, units=(("shipped", "facts"),), methods={"LoReFT": (1e-3, 1e-2)})
    store = engine.Store(tmp_path)
    with pytest.raises(AssertionError, match="selection read the test split"):            # the first thing after selection
        engine.run_claim(claim, store, TINY)
    assert {cell["phase"] for cell in store.cells.values()} == {"select"} and len(store.cells) == 2
    assert store.openings.exists()                                        # on record before any item is seen


# ------------------------------------------------------------------------------------------------------------- resumption

def test_a_stopped_run_goes_on_to_the_same_page(tmp_path):
    page = {}
    for name, stops in (("whole", ()), ("stopped", (3, 5, 9))):
        store = engine.Store(tmp_path / name)
        for stop in stops:
            with pytest.raises(KeyboardInterrupt):
                engine.run_claim(toy([], stop), store, TINY)
            store = engine.Store(tmp_path / name)                         # as a new process finds it
        before, log = len(store.cells), []
        engine.run_claim(toy(log), store, TINY)
        assert sum(not isinstance(entry, str) for entry in log) == 28 - before             # 2 × (5 + 9), and none twice
        report.write([toy([])], store, TINY)
        page[name] = [(tmp_path / name / file).read_text() for file in ("toy.json", "RESULTS.md")]
        assert len(store.path.read_text().splitlines()) == 28
    assert page["whole"] == page["stopped"] and "complete" in page["whole"][1]


def test_time_that_is_up_leaves_a_page_that_says_so(tmp_path):
    store = engine.Store(tmp_path)
    engine.run_claim(toy([]), store, TINY, until=0)
    assert not store.cells
    report.write([toy([])], store, TINY)
    assert "**State:** not run." in (tmp_path / "RESULTS.md").read_text()
    engine.run_claim(toy([]), store, TINY, units=[("two", "x")])
    report.write([toy([])], store, TINY)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| two | x | b | 0.1: 0.800, 0.3: 1.000, 0.9: 0.400 |" in text and "| two | x | a | 0.3 | 3 | 0.800 ± 0.000 |" in text
    assert "partly: 14 of 28 cells" in text and "> **Published, not ours.** 80.2" in text and (tmp_path / "toy.png").stat().st_size > 5000


def test_the_table_s_numbers_and_the_sentences():
    rows = {"a": [{"seed": s, "accuracy": x} for s, x in ((1, 0.5), (2, 0.7), (3, 0.9))], "b": [{"seed": s, "accuracy": x} for s, x in ((3, 0.8), (2, 0.5))]}
    mean, half, n = report.paired(rows, ("a", "b"), "accuracy")
    assert (round(mean, 9), n) == (0.15, 2) and half == pytest.approx(12.706 * 0.05)       # differences 0.2 and 0.1: std √2/20, over √2
    found = {("base", "t"): rows, ("other", "t"): {"a": rows["a"]}, ("base", "u"): rows}
    assert [str(finding) for finding in report.differences(found, "it", ("a", "b"), "more", task="t")] == [
        "it (base, t): +0.150 ± 0.635 (2 seeds): no difference shown"]
    assert report.differences(found, "it", ("a", "b"))[1] == ("it (base, u): +0.150 ± 0.635 (2 seeds): no difference shown", "")
    assert report.said(0.2, 0.1, 5).endswith("more") and report.said(-0.2, 0.1, 5).endswith("less")


@pytest.mark.parametrize("mean, half, more, less, not_less, same", [
    (0.2, 0.1, "as published", "against it", "as published", "against it"), (-0.2, 0.1, "against it", "as published", "against it", "against it"),
    (0.0, 0.04, "not shown", "not shown", "as published", "as published"), (0.0, 0.2, "not shown", "not shown", "not shown", "not shown"),
    (-0.03, 0.01, "against it", "as published", "as published", "as published"), (0.3, float("nan"), *["not shown"] * 4)])
def test_a_judgement_follows_from_where_the_interval_lies(mean, half, more, less, not_less, same):
    assert [report.judged(mean, half, e) for e in ("more", "less", "not less", "same")] == [more, less, not_less, same]


def test_a_summary_counts_what_the_papers_speak_of():
    findings = [report.Finding("", judgement) for judgement in ("not shown", "as published", "", "as published")]
    assert report.summary(findings) == "2 as published, 1 not shown" and report.summary(findings[2:3]) == "–"


# --------------------------------------------------------------------------------------------------------- cells that train

@pytest.mark.parametrize("method", ("frozen", "in context", "LoReFT", "prompt tuning", "prefix tuning", "full"))
def test_a_cell_is_the_same_twice_and_leaves_the_base_alone(method):
    items = methods.examples("steering", "validation", 6)
    before = {name: p.clone() for name, p in methods.fresh("shipped", TINY)[0].state_dict().items()}
    first, again = (methods.score("shipped", "steering", method, 1e-2, 3, items, TINY) for _ in range(2))
    assert first == again and (first["parameters"] == 0) == (method in methods.UNTRAINED)
    model, _ = methods.fresh("shipped", TINY)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()) and model.adapters == []


def test_examples_in_the_prompt_are_read_and_the_bare_base_reads_none(monkeypatch):
    seen, items = [], methods.examples("facts", "validation", 3)

    def ids(model, prompts, most, eos):
        seen.append([model.tokenizer.decode(p) for p in prompts])
        return [[] for _ in prompts]
    monkeypatch.setattr(methods, "generate_ids", ids)
    for method in ("frozen", "in context"):
        assert methods.score("shipped", "facts", method, 0.0, 2, items, TINY)["accuracy"] == 0
    shot = methods.training_set("facts", 2, 1)[0]
    assert seen[0] == [e.prompt for e in items]
    for text, e in zip(seen[1], items):
        assert text.startswith(f"{shot.prompt} {shot.completion} ") and text.endswith(e.prompt) and 70 < len(text.split()) < 120


def test_the_splits_of_what_is_made_here_do_not_meet():
    key = {"steering": lambda e: " ".join(sorted(e.prompt.split()[:-1])),
           "open-ended": lambda e: tuple(w for w in e.prompt.split() if w in noise.WORLD.known)}
    made = {"steering": methods.steering, "open-ended": noise.open_ended}
    for name, make in made.items():
        keys = {split: {key[name](e) for e in make(split, 60)} for split in ("train", "validation", "test")}
        assert not keys["train"] & keys["test"] and not keys["validation"] & (keys["train"] | keys["test"]) and make("test", 5) == make("test", 60)[:5]
    words = methods.steering("test", 1)[0]
    assert words.completion == " ".join(words.prompt.split()[:-1][::-1]) + " ."


@pytest.mark.skipif(not methods.STORIES.is_file(), reason="needs the public data (MINIREFT_DATA): stories260K and TinyStories")
def test_a_real_model_s_stories_are_scored_by_whether_somebody_speaks():
    splits = {split: [e.prompt for e in methods.examples("speech", split)] for split in ("train", "validation", "test")}
    assert not set(splits["validation"]) & set(splits["test"]) and not set(splits["train"]) & set(splits["test"]) and len(splits["test"]) == 200
    assert not any('"' in prompt for split in splits.values() for prompt in split)
    found = methods.score("stories260K", "speech", "frozen", 0.0, 0, methods.examples("speech", "validation", 24), TINY)
    assert 0 < found["accuracy"] < 1 and found["parameters"] == 0


def test_truth_is_of_whoever_was_asked_about_and_said_once():
    examples = noise.open_ended("validation", 40)
    assert all(noise.truth(e.prompt, e.completion) == 1 for e in examples)
    prompt, said = examples[0].prompt, noise.WORLD.say("anna", "home")
    assert noise.truth("please write about anna . ->", f"{said} . {said} .") == 0.5 and noise.truth("please write about ben . ->", f"{said} .") == 0
    assert noise.truth(prompt, "") == 0 == noise.truth(prompt, "nonsense .")


def test_the_formulas_that_are_only_here():
    model, _ = methods.fresh("shipped", TINY)
    torch.manual_seed(0)
    plain = ablation.Unsubtracted(model, rank=3)
    for p in plain.parameters():
        p.data += 0.1 * torch.randn_like(p)
    W, V, R, b = plain.parts()
    assert V.eq(0).all() and torch.allclose(R @ R.mT, torch.eye(3).expand(8, 1, 3, 3), atol=1e-5) and W is plain.w
    tokens = torch.arange(3, 13)[None]
    quiet = model(tokens)
    with noise.Dropout(model, 0.5):
        assert torch.equal(model(tokens), quiet)
        assert not torch.equal(model.train()(tokens), quiet)
    assert torch.equal(model.eval()(tokens), quiet) and model.embed.edits == []


# ------------------------------------------------------------------------------------------------------------ the program

@pytest.mark.parametrize("arguments, words", [
    (["--claim", "nothing"], "there is no claim 'nothing': choose from efficiency, places"), (["--claim", "shots", "--unit", "x/y"], "shots has no unit 'x/y'"),
    (["--workers", "0"], "--workers 0 --minutes inf: expected at least 1 process"), (["--minutes", "-1"], "minutes from 0")])
def test_a_mistake_is_one_line(arguments, words, capsys, tmp_path):
    assert run.main([*arguments, "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("minireft: ") and not (tmp_path / "new").exists()


def test_what_needs_absent_data_is_left_out_and_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(methods, "STORIES", tmp_path / "nowhere.bin")
    assert run.main(["--claim", "memory", "--unit", "stories260K/texts", "--quick", "--workers", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"memory: stories260K/texts left out: there is no {methods.STORIES}" in out and "memory: not run" in out
    assert not (tmp_path / "cells.jsonl").exists() and "| stories260K |" not in (tmp_path / "RESULTS.md").read_text()


def test_every_claim_says_what_was_published_and_what_would_tell():
    assert list(CLAIMS) == ["efficiency", "places", "ablation", "noise", "shots", "memory", "overhead"]
    for claim in CLAIMS.values():
        assert claim.published and "experiment that would tell" in claim.why and claim.units and (claim.reference in claim.methods)
        assert len({len(grid) for grid in claim.methods.values() if len(grid) > 1}) <= 1   # equal grids
        assert claim.verdict({}) == []


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_quick_runs_everything(tmp_path):
    done = subprocess.run([sys.executable, "-m", "minireft", "reproduce", "--quick", "--out", str(tmp_path)], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "RESULTS.md").read_text()
    whole = [claim for claim in CLAIMS.values() if not any(methods.absent(base) for base, _ in claim.units)]
    assert text.count("**State:** complete") == len(whole) and len(list(tmp_path.glob("*.png"))) == len(CLAIMS)
