"""Runs that survive: killed at any instant, on a disk that fails, beside another process, with numbers that go wrong.

Run:  pytest tests/test_runs.py                   # -m slow kills fifty times, not ten
See:  whatever ended a run, resuming it ends in the bits of the run that nothing ended.
"""

import fcntl
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings

import pytest
import small
import torch

from minireft import Example, LoReFT, NEFTune, TrainConfig, files, memory, runs, train, training
from minireft.data import Batch

EXAMPLES = [Example(" ".join(f"w{(7 * i + j) % 20}" for j in range(2 + i % 5)), " ".join(f"w{(3 * i + j) % 20}" for j in range(1 + i % 3)))
            for i in range(11)]


def config(**changes):
    return TrainConfig(**{**dict(steps=6, batch_size=4, lr=0.02, save_every=2, warmup=0.3), **changes})


def fresh():
    """Dropout draws from torch's generator, AdamW keeps moments, the noise counts steps: all that a checkpoint must hold."""
    torch.manual_seed(0)
    model = small.model()
    return model, [LoReFT(model, rank=2, positions="all", dropout=0.3), NEFTune(model)]


def run(out, resume=False, examples=EXAMPLES, **changes):
    model, adapters = fresh()
    done = train(model, adapters, examples, config(**changes), out=out, resume=resume, progress=False)
    return done, small.bits(adapters[0])


def learned(out) -> dict:
    """What the last checkpoint holds of the adapter, read without the code that is tested."""
    return torch.load(out / "checkpoint.pt", weights_only=True)["modules"]["adapter 0"]


def log_of(out):
    return [(line["step"], line["loss"]) for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())]


# ------------------------------------------------------------------------------------------------------------- killed

def life(out, before=None, **changes) -> int:
    """A child that trains or goes on until it has finished or is killed; its process number."""
    child = os.fork()                                                     # torch is loaded already
    if child == 0:
        try:
            sys.stderr = open(os.devnull, "w")
            if before:
                before()
            torch.manual_seed(time.time_ns())                             # whatever was drawn before does not matter
            run(out, resume=True, **changes)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def end_of(child) -> int:
    """How it ended: 0 finished, −9 killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lines(out) -> int:
    return (out / "log.jsonl").read_bytes().count(b"\n") if (out / "log.jsonl").exists() else 0


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_random_moments_ends_in_the_same_bits(kills, tmp_path):
    """Most moments are some steps after it went on, so that lives build on one another; the rest are soon after its birth."""
    settings = dict(steps=40, save_every=3)
    _, expected = run(tmp_path / "whole", **settings)
    seed = random.randrange(10**6)
    draw, killed, finished, went_on = random.Random(seed), 0, 0, 0
    while killed < kills or finished == 0:
        out = tmp_path / f"run {finished}"
        while True:
            child, more, ended = life(out, **settings), draw.choice((0, 2, 4, 6)), None
            if killed < kills:
                most = lines(out) + more
                while more and lines(out) < most and ended is None:
                    time.sleep(0.0005)
                    over, status = os.waitpid(child, os.WNOHANG)
                    ended = os.waitstatus_to_exitcode(status) if over else None
                if ended is None:
                    time.sleep(draw.uniform(0, 0.01 if more else 0.1))
                    os.kill(child, signal.SIGKILL)
            ended = end_of(child) if ended is None else ended
            assert ended in (0, -signal.SIGKILL), f"resuming failed after kill {killed}, seed {seed}"
            killed += ended != 0
            went_on += ended != 0 and runs.started(out)
            if ended == 0:
                break
        assert small.same_bits(learned(out), expected) and log_of(out) == log_of(tmp_path / "whole"), f"seed {seed}"
        finished += 1
    assert went_on >= kills / 2                                           # else it always began anew, which is no test


WRITES = ("write_bytes", "append_line", "save")


def die_at(instant: int, functions):
    """Has this process killed just before the instant-th line that it executes in these functions of runs.py and files.py."""
    lines, where = [0], (runs.__file__, files.__file__)

    def trace(frame, event, _):
        if frame.f_code.co_filename not in where or functions and frame.f_code.co_name not in functions:
            return None
        if event == "line":
            lines[0] += 1
            if lines[0] == instant:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)


@pytest.mark.parametrize("functions, every, least", [(WRITES, 3, 40), pytest.param((), 1, 100, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_before_any_line_that_writes_ends_in_the_same_bits(functions, every, least, tmp_path):
    """The instants between two lines: in the log, the checkpoint, and the moment when the last becomes the one before. Every
    third by default, which meets all lines of two steps' three writes but not in each; all of them, and the rest of both files, when slow."""
    settings = dict(steps=2, save_every=1)
    _, expected = run(tmp_path / "whole", **settings)
    instant = 1
    while True:
        out = tmp_path / str(instant)
        ended = end_of(life(out, lambda: die_at(instant, functions), **settings))
        if ended == 0:
            break
        assert ended == -signal.SIGKILL and (runs.started(out) or lines(out) < 2)           # once there is a checkpoint, there is one
        assert end_of(life(out, **settings)) == 0, f"resuming failed after a kill at instant {instant}"
        assert small.same_bits(learned(out), expected) and log_of(out) == log_of(tmp_path / "whole"), instant
        shutil.rmtree(out)
        instant += every
    assert instant > least


# ---------------------------------------------------------------------------------------------- files that were damaged

def bad_at(name, out, content=None):
    whole = (out / name).read_bytes()
    (out / name).write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :] if content is None else content)


@pytest.mark.parametrize("content", (None, b"", b"no checkpoint"))        # None: one bit of it is another
def test_a_damaged_checkpoint_gives_way_to_the_one_before(content, tmp_path):
    _, expected = run(tmp_path)
    bad_at("checkpoint.pt", tmp_path, content)
    with pytest.warns(RuntimeWarning, match="checkpoint.pt is damaged.*going on from the one before it, at step 4"):
        done, found = run(tmp_path, resume=True)
    assert done.first_step == 4 and small.same_bits(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(tmp_path, resume=True)[0].losses == []                 # the damaged one is gone, and
    assert runs.torch.load(tmp_path / "checkpoint.before.pt")["step"] == 4                  # did not become the one before
    for name in runs.NAMES:
        bad_at(name, tmp_path)
    with pytest.raises(ValueError, match="checkpoint.before.pt is damaged, or no checkpoint of a run .*checksum.*: delete it to start over"):
        run(tmp_path, resume=True)
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(ValueError, match="is damaged"):
        run(tmp_path, resume=True)


def test_a_new_run_does_not_go_on_from_what_was_there(tmp_path):
    run(tmp_path)
    run(tmp_path, steps=2)                                                # another run in its place: one checkpoint
    assert not (tmp_path / "checkpoint.before.pt").exists()
    bad_at("checkpoint.pt", tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        run(tmp_path, steps=2, resume=True)


# ------------------------------------------------------------------------------------------------------ two processes

def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with files.locked(tmp_path / "lock"):
            os.write(writer, b"!")
            signal.pause()
        os._exit(1)
    os.read(reader, 1)
    model, adapters = fresh()
    with pytest.raises(OSError, match=rf"{tmp_path} is in use by another process \(process {child}\): wait until it has ended, or name"):
        train(model, adapters, EXAMPLES, config(), out=tmp_path, progress=False)
    assert model.adapters == [] and sorted(p.name for p in tmp_path.iterdir()) == ["lock"]
    os.kill(child, signal.SIGKILL)                                        # it cannot tidy up
    end_of(child)
    run(tmp_path)
    assert not (tmp_path / "lock").exists()                               # train let it go
    with pytest.raises(OSError, match="cannot write"):
        with files.locked(tmp_path / "log.jsonl" / "beneath a file"):
            pass


def test_a_lock_that_was_taken_away_after_it_was_opened_is_made_anew(tmp_path, monkeypatch):
    path, flock = tmp_path / "lock", fcntl.flock

    def late(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()                                                     # by its holder, who ends
        flock(file, how)
    monkeypatch.setattr(fcntl, "flock", late)
    with files.locked(path):
        assert path.read_text() == f"process {os.getpid()}\n"
    assert not path.exists()


# -------------------------------------------------------------------------------------------------- numbers going wrong

def test_the_batch_that_gave_nan_is_saved_and_can_be_replayed(tmp_path, monkeypatch):
    true, seen, bad = training.backward, [], [3]

    def burst(model, adapters, rows, step, *more):
        total = true(model, adapters, rows, step, *more)
        seen.append((step, total.item(), rows))
        if step in bad:
            adapters[0].b.grad.fill_(float("nan"))
        return total
    monkeypatch.setattr(training, "backward", burst)
    with pytest.raises(FloatingPointError, match="at step 3: lower the learning rate.*its batch is in .*failed.json, and failed.pt is the run just"):
        run(tmp_path)
    told, (step, total, rows) = json.loads((tmp_path / "failed.json").read_text()), seen[-1]
    assert told["step"] == step == 3 and "at step 3" in told["error"]
    assert [row["ids"] for row in told["batch"]] == [row.ids for row in rows]
    assert [(row["prompt"], row["completion"]) for row in told["batch"]] == [(EXAMPLES[row["example"]].prompt, EXAMPLES[row["example"]].completion)
                                                                             for row in told["batch"]]
    shutil.copy(tmp_path / "failed.pt", tmp_path / "checkpoint.pt")       # as the message says
    with pytest.raises(FloatingPointError):
        run(tmp_path, resume=True)
    assert seen[-1] == (step, total, rows)                                # the first step it took, to the same bits
    bad.clear()                                                           # and where the cause is gone, the run goes on
    done, found = run(tmp_path, resume=True)
    whole, expected = run(tmp_path / "whole")
    assert done.first_step == 3 and done.losses == whole.losses[3:] and small.same_bits(found, expected)


def test_a_batch_that_cannot_be_saved_does_not_hide_the_error(tmp_path, monkeypatch):
    true = files.write_bytes

    def full(path, *more):
        if "failed" in str(path):
            raise OSError(f"cannot write {path}: No space left")
        return true(path, *more)
    monkeypatch.setattr(files, "write_bytes", full)
    model, adapters = fresh()
    with torch.no_grad():
        adapters[0].b.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss became nan .*; the batch could not be saved: cannot write .*No space left"):
        train(model, adapters, EXAMPLES, config(), out=tmp_path, progress=False)


# ------------------------------------------------------------------------------------------------------- out of memory

@pytest.fixture
def little(monkeypatch):
    """little(n, at): from step `at` on, passes of more than n examples do not fit. Returns what was tried: (step, examples)."""
    true, pieces = Batch.through, []

    def arrange(most, at=0, error=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")):
        def through(batch, model, tasks=None):
            if batch.tokens.is_meta:                                      # the estimate, which needs no memory
                return true(batch, model, tasks)
            step = int(model.adapters[-1].seed[1])                        # NEFTune's
            pieces.append((step, int(batch.example.max()) + 1))
            if pieces[-1][1] > most and step >= at:
                torch.rand(7)                                             # what the failed piece drew does not count
                raise error
            return true(batch, model, tasks)
        monkeypatch.setattr(Batch, "through", through)
        return pieces
    return arrange


def test_pieces_are_found_and_a_resumed_run_keeps_them(tmp_path, little, monkeypatch):
    given, expected = run(tmp_path / "given", accumulate=2)
    pieces = little(2)
    found, bits = run(tmp_path / "found", accumulate="auto")
    assert pieces == [(0, 4)] + [(step, 2) for step in range(6) for _ in range(2)]          # found once
    assert found.losses == given.losses and small.same_bits(bits, expected)

    little(2, at=3)                                                       # memory becomes short in the middle
    whole, bits = run(tmp_path / "whole", accumulate="auto")
    assert whole.losses[0] != given.losses[0]                             # other pieces draw other dropout
    killed, true = tmp_path / "killed", training.one_step

    def interrupted(model, adapters, rows, step, *more):
        if step == 5:
            raise KeyboardInterrupt
        return true(model, adapters, rows, step, *more)
    monkeypatch.setattr(training, "one_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(killed, accumulate="auto")
    monkeypatch.setattr(training, "one_step", true)
    pieces = little(99)                                                   # there is room again: the pieces stay as they were
    pieces.clear()
    done, resumed = run(killed, accumulate="auto", resume=True)
    assert pieces == [(step, 2) for step in (4, 5) for _ in range(2)] and done.losses == whole.losses[4:] and small.same_bits(resumed, bits)


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
                                   MemoryError()))
def test_out_of_memory_ends_in_advice_and_the_last_checkpoint_is_kept(error, tmp_path, little):
    little(2, at=3, error=error)
    number = r"\d+(\.\d+)? [MG]B"
    with pytest.raises(MemoryError, match=rf"out of memory at step 3: examples of up to 9 tokens, 4 at a time, take about {number}, weights "
                       rf"included: try half the micro-batch, 2 \({number}\), recompute=True \({number}\), .*; the last checkpoint is kept"):
        run(tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 2
    little(2, at=3, error=error)
    assert run(tmp_path, resume=True, accumulate=2)[0].first_step == 2    # as advised
    little(0)
    with pytest.raises(MemoryError, match="out of memory at step 0: .*, 1 at a time, .*: try recompute=True"):
        run(tmp_path / "none", accumulate="auto")


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path, little):
    little(2, error=RuntimeError("the shapes do not fit"))
    with pytest.raises(RuntimeError, match="the shapes do not fit"):
        run(tmp_path, accumulate="auto")


def test_the_first_pieces_are_those_of_the_estimate(tmp_path, monkeypatch, little):
    model, adapters = fresh()
    a, b = memory.line(model, adapters, config(accumulate=2), 8)
    weights = memory.size(model.parameters())
    for pieces, free in ((1, a + 4.1 * b), (2, a + 3.9 * b), (4, a + 1.9 * b), (4, 0.0)):
        monkeypatch.setattr(memory, "free_bytes", lambda device: (free - weights) / 0.9)
        assert memory.fewest_pieces(model, adapters, config(), 8, 4) == pieces
    assert memory.fewest_pieces(model, adapters, config(), 8, 6, choices=1) == 6
    assert [memory.more_pieces(n, 12) for n in (1, 2, 4, 6, 12)] == [2, 4, 12, 12, 12]


def test_tensorboard_is_written_where_it_is_and_named_where_it_is_not(tmp_path, monkeypatch):
    model, adapters = fresh()
    with pytest.raises(ValueError, match="tensorboard=True needs a folder"):
        train(model, adapters, EXAMPLES, config(), progress=False, tensorboard=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)     # as where the package is not installed
    with pytest.raises(ValueError, match="tensorboard is not installed: pip install tensorboard, or leave it out"):
        train(model, adapters, EXAMPLES, config(), out=tmp_path / "without", progress=False, tensorboard=True)
    assert model.adapters == [] and not (tmp_path / "without" / "log.jsonl").exists()
    monkeypatch.undo()
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    train(model, adapters, EXAMPLES, config(), out=tmp_path / "with", progress=False, tensorboard=True)
    assert any((tmp_path / "with" / "tensorboard").iterdir())
