"""Pre-training for a few steps: a folder that loads, or nothing at all.

Run:  pytest tests/test_pretraining.py
See:  a loss that falls, a model card written by the run, and no rest of a run that failed.
"""

import json
import math
import multiprocessing
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minireft import ModelConfig, Tokenizer, checkpoint, evaluate, pretraining
from minireft.pretraining import Recipe, answer, fill_in, learning_rate, pretrain
from minireft.tasks import gates
from minireft.tasks.corpus import Corpus
from minireft.tasks.world import VOCABULARY

TINY = Recipe(width=32, layers=1, heads=2, hidden=48, context=32, steps=30, rows=8, warmup=3, compile=False)


@pytest.fixture
def quick_gates(monkeypatch):
    """Scoring 2,200 items would take longer than the training."""
    monkeypatch.setattr(gates, "score", lambda model, tokenizer: dict.fromkeys(gates.CHANCE, 0.5))


def test_a_few_steps_write_a_folder_that_loads(tmp_path, quick_gates):
    report = pretrain(tmp_path / "base", processes=1, progress=False, recipe=TINY)
    files = sorted(path.name for path in (tmp_path / "base").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    model, tokenizer = checkpoint.load(tmp_path / "base")
    assert model.config.width == 32 and tokenizer.vocab_size == len(VOCABULARY) + 3
    assert torch.isfinite(model(torch.tensor([tokenizer.encode("anna lives in oslo .")]))).all()
    assert report["loss"] < 6.3 and report["tokens"] == 30 * 8 * 32 and report["cpu_seconds"] > 0
    card = (tmp_path / "base" / "README.md").read_text()
    assert "| choosing | 0.500 | 0.40 | 0.95 | **fails** |" in card and f"{report['parameters']:,} parameters" in card


def test_the_same_seed_gives_the_same_bits_and_another_gives_others(tmp_path, quick_gates):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain(tmp_path / name, seed=seed, processes=1, progress=False, recipe=TINY)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_two_processes_end_with_one_model(tmp_path):
    """In a subprocess, since `spawn` needs a main module. Before every step the processes compare all their weights."""
    program = f"""
import atexit, os, sys, torch
from minireft import pretraining
from minireft.tasks import gates
def work(rank, *rest):
    gates.score = lambda model, tokenizer: dict.fromkeys(gates.CHANCE, 0.5)
    average, seen = pretraining.average_gradients, []
    def compare(model, processes):
        total = torch.stack([p.detach().double().sum() for p in model.parameters()])
        everyone = [torch.empty_like(total) for _ in range(processes)]
        pretraining.dist.all_gather(everyone, total)
        assert torch.equal(everyone[0], everyone[1])
        seen.append(total)
        average(model, processes)
    pretraining.average_gradients = compare
    atexit.register(os.abort)           # as threads of gloo do now and then while the interpreter is torn down
    ORIGINAL(rank, *rest)
    assert len(seen) == 3 and not torch.equal(seen[0], seen[2])
ORIGINAL = pretraining._work
if __name__ == "__main__":
    pretraining._work = work
    recipe = pretraining.Recipe(width=32, layers=1, heads=2, hidden=48, context=32, steps=3, rows=8, warmup=3, compile=False)
    print(pretraining.pretrain(sys.argv[1] + "/base", processes=2, progress=False, recipe=recipe)["tokens"])
"""
    script = tmp_path / "two.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(3 * 8 * 32)] and (tmp_path / "base" / "README.md").is_file()


def test_a_run_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(pretraining, "learning_rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "base", processes=1, progress=False, recipe=TINY)
    assert list(tmp_path.iterdir()) == [] and not multiprocessing.active_children()


def run_out_of_disk(rank, processes):
    raise OSError("cannot write there: no space left")


def test_a_full_disk_in_a_process_is_one_line():
    with pytest.raises(OSError, match="^cannot write there: no space left$"):
        pretraining._together(run_out_of_disk, 2)
    assert not multiprocessing.active_children()


def test_a_folder_that_exists_is_not_touched(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine").write_text("kept")
    with pytest.raises(ValueError, match="exists already"):
        pretrain(tmp_path / "base", progress=False, recipe=TINY)
    assert (tmp_path / "base" / "mine").read_text() == "kept"


def test_rows_that_cannot_be_shared_are_refused(tmp_path):
    with pytest.raises(ValueError, match="8 rows a step cannot be shared by 3 processes"):
        pretrain(tmp_path / "base", processes=3, progress=False, recipe=TINY)


def test_the_learning_rate_follows_its_recipe():
    recipe = Recipe(steps=1000, warmup=10, peak=2.0, rates=((0, 0.4, 1), (1, 1, 0.1)))
    rates = [learning_rate(step, recipe) for step in range(1000)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[399] == 2.0
    assert rates[700] == pytest.approx(2 * (0.1 + 0.9 * 0.5)) and rates[-1] == pytest.approx(0.2, abs=0.02)


def test_the_shipped_base_passes_its_gates_as_its_card_says(shipped_base):
    card = (checkpoint.ASSETS / "README.md").read_text()
    model, tokenizer = shipped_base
    scores = gates.score(model, tokenizer, count=40, seed=1)
    for name, least in gates.PASS.items():
        assert f"| {name} |" in card
        assert scores[name] >= least - 0.1, (name, scores[name])
    assert json.loads((checkpoint.ASSETS / "config.json").read_text())["vocab_size"] == len(VOCABULARY) + 3
    assert sum(path.stat().st_size for path in checkpoint.ASSETS.rglob("*")) < 12_000_000


# ------------------------------------------------------------------------------------------------------------ the other two

@pytest.mark.parametrize("arch", ("encoder", "encoder-decoder"))
def test_the_other_two_are_trained_and_load(arch, tmp_path, quick_gates, monkeypatch):
    monkeypatch.setitem(pretraining.OTHERS, arch, replace(TINY, layers=2, context=64, arch=arch))
    report = pretrain(tmp_path / "base", processes=1, progress=False, arch=arch)
    model, _ = checkpoint.load(tmp_path / "base")
    assert model.config.encoder_layers == {"encoder": 2, "encoder-decoder": 1}[arch] and report["loss"] < 6.35     # log 604 is 6.40
    assert {"encoder": "An encoder of", "encoder-decoder": "An encoder–decoder of"}[arch] in (tmp_path / "base" / "README.md").read_text()
    with pytest.raises(ValueError, match="arch is 'mixer': expected one of decoder"):
        pretrain(tmp_path / "other", arch="mixer")


def test_an_encoder_is_asked_for_what_it_is_not_shown():
    tokenizer, seen = Tokenizer.from_words(VOCABULARY), {}
    tokens = torch.randint(3, tokenizer.vocab_size, (64, 65), generator=torch.Generator().manual_seed(0))

    def model(shown):                     # knows nothing: its loss is log V, whatever it is asked for
        seen["shown"] = shown
        return torch.zeros(*shown.shape, tokenizer.vocab_size)
    loss = fill_in(model, tokens, tokenizer, torch.Generator().manual_seed(1))
    shown, hidden = seen["shown"], seen["shown"] == tokenizer.mask_id
    assert loss.item() == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-5)
    other = (shown != tokens[:, :-1]) & ~hidden
    assert abs(hidden.float().mean() - 0.24) < 0.03 and abs(other.float().mean() - 0.03) < 0.012     # 4,096 draws: over 4 sigma

    def oracle(shown):                    # right about every hidden token, and wrong about the rest: asked for only 30 %
        return 30.0 * F.one_hot(torch.where(hidden, tokens[:, :-1], 3), tokenizer.vocab_size)
    asked = fill_in(oracle, tokens, tokenizer, torch.Generator().manual_seed(1)).item()
    assert asked == pytest.approx(30 * 0.06 / 0.30, rel=0.2)               # 3 % shown as others and 3 % as they are, of 30 %


def test_an_encoder_decoder_answers_and_fills_in_what_it_has_read():
    tokenizer = Tokenizer.from_words(VOCABULARY)
    rows = torch.from_numpy(Corpus(3).batch(tokenizer, 16, 129, 1.0))
    marks, hidden = set(tokenizer.encode(": -> = ? .")), tokenizer.mask_id

    class Model:
        config = ModelConfig(tokenizer.vocab_size, 8, 2, 2, 8, 128, encoder_layers=1, start=2)

        def __call__(self, prompt, mask, decoder_tokens):
            right, spans = torch.zeros_like(decoder_tokens), 0
            for row, ids, real, given, wanted in zip(rows.tolist(), prompt.tolist(), mask, decoder_tokens.tolist(), right):
                wanted[: len(given) - 1] = torch.tensor(given[1:])
                whole, ids, (first, *given) = given[-1] == 0, ids[: int(real.sum())], [i for i in given if i]
                cut = next(t for t in range(30, 120) if row[t : t + 12] == given[:12] and row[t - 3 : t] == ids[-3:])
                assert first == 2 and ids[-1] == row[cut - 1] and ids[-1] in marks
                told, read = given[12:], []                               # put back what is hidden: the row again, up to the cut
                for i in ids:
                    if i == hidden:
                        spans, n = spans + 1, next((k for k in range(1, 4) if len(told) == k + 1 or told[k + 1 : k + 2] == [hidden]), 3)
                        assert told[0] == hidden
                        read, told = read + told[1 : n + 1], told[n + 1 :]
                    else:
                        read.append(i)
                assert not whole or read == row[:cut]                     # of the longest row the last token is not given
            assert spans > 50
            return 30.0 * F.one_hot(right, tokenizer.vocab_size)
    loss = answer(Model(), rows, tokenizer, torch.Generator().manual_seed(0)).item()
    assert loss < 30 * 16 / 300                                           # right about all but a row's last token, which is not given


@pytest.mark.parametrize("name", sorted(set(checkpoint.SHIPPED) - {"base"}))
def test_the_other_two_that_are_shipped_do_what_their_cards_say(name):
    """Within the noise of 200 items, and not by chance."""
    card = (checkpoint.SHIPPED[name] / "README.md").read_text()
    model, tokenizer = checkpoint.load(name)
    assert f" of {sum(p.numel() for p in model.parameters()):,} parameters" in card
    items = gates.examples(100, seed=1)
    for gate in ("facts", "moods"):
        said = float(re.search(rf"\| {gate} \| ([.\d]+)", card)[1])
        scored = gates.filled(model, tokenizer, items[gate]) if name == "encoder" else evaluate(model, tokenizer, items[gate], metrics=("rank",)).rank
        assert said > gates.CHANCE[gate] + 0.2 and abs(scored - said) < 0.15, gate
