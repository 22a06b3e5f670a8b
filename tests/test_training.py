"""Training against a plain loop, stopped and resumed to the bit, with nothing touched but what is to be trained.

Run:  pytest tests/test_training.py
See:  runs that were interrupted at any step end in the bits of the run that was not.
"""

import json
import math
from dataclasses import replace

import pytest
import small
import torch
import torch.nn.functional as F

import minireft
from minireft import IA3, DiReFT, Example, LoRA, LoReFT, NEFTune, TrainConfig, train, training
from minireft.data import Encoded, encode, order

EXAMPLES = [Example(" ".join(f"w{(7 * i + j) % 20}" for j in range(2 + i % 5)), " ".join(f"w{(3 * i + j) % 20}" for j in range(1 + i % 3)))
            for i in range(11)]
QUIET = dict(progress=False)


def config(**changes):
    return TrainConfig(**{**dict(steps=6, batch_size=4, lr=0.02, save_every=2, warmup=0.3), **changes})


def adapters_for(kind, model):
    """The adapters of one way to train, the same on every call."""
    torch.manual_seed(0)
    return {"LoReFT and NEFTune": lambda: [LoReFT(model, rank=2, positions="f2+l1", tied=False), NEFTune(model, alpha=2.0)],
            "LoReFT with dropout": lambda: [LoReFT(model, rank=2, positions="all", dropout=0.5)],
            "IA3 by Adafactor": lambda: [IA3(model)], "LoRA": lambda: [LoRA(model, rank=2)],
            "LoReFT": lambda: [LoReFT(model, rank=2)], "full": lambda: [], "full and DiReFT": lambda: [DiReFT(model, rank=1)]}[kind]()


KINDS = {"LoReFT and NEFTune": dict(weight_decay=0.1), "LoReFT with dropout": dict(accumulate=2), "IA3 by Adafactor": dict(optimizer="adafactor"),
         "full": dict(schedule="cosine", lr=1e-3), "full and DiReFT": dict(optimizer="adafactor", full=True)}


def settings_of(kind):
    return config(full=kind.startswith("full"), **{k: v for k, v in KINDS[kind].items() if k != "full"})


def state(model, adapters):
    return {f"{i} {name}": tensor for i, module in enumerate((model, *adapters)) for name, tensor in small.bits(module).items()}


# ------------------------------------------------------------------------------------------------------- against a plain loop

def plain_training(model, adapters, settings, clip):
    """Every example by itself, without padding; the mean over the answer tokens of the batch; the optimiser of torch."""
    rows = [encode(model.tokenizer, e, small.CONTEXT) for e in EXAMPLES]
    parameters = [p for adapter in adapters for p in adapter.parameters()] + (list(model.parameters()) if settings.full else [])
    optimizer, losses, norms = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay), [], []
    model.requires_grad_(settings.full).train()
    for adapter in adapters:
        adapter.attach()
    for step in range(settings.steps):
        terms = []
        for i in order(len(rows), settings.seed, step * settings.batch_size, settings.batch_size):
            ids, n = rows[i].ids, rows[i].prompt_length
            logits = model(torch.tensor([ids]), prompt_lengths=torch.tensor([n]))[0]
            terms += [-F.log_softmax(logits[t - 1], -1)[ids[t]] for t in range(n, len(ids))]
        loss = torch.stack(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in parameters))
        if clip and norm > clip:
            for p in parameters:
                p.grad.mul_(clip / norm)
        rise = round(settings.warmup * settings.steps)
        optimizer.param_groups[0]["lr"] = settings.lr * ((step + 1) / rise if step < rise else 1 - (step - rise) / (settings.steps - rise))
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    for adapter in adapters:
        adapter.detach()
    return losses, norms


@pytest.mark.parametrize("kind", ("LoReFT", "LoRA", "full"))
@pytest.mark.parametrize("accumulate, clip", [(1, 0.0), (2, 0.5), (4, 0.5)])
def test_train_is_the_plain_loop(kind, accumulate, clip):
    results = []
    for way in ("plain", "train"):
        model = small.model()
        adapters = adapters_for(kind, model)
        settings = config(clip=clip, accumulate=accumulate, weight_decay=0.1, full=kind == "full", lr=1e-3)
        if way == "plain":
            losses, norms = plain_training(model, adapters, settings, clip)
            assert not clip or max(norms) > clip                          # else clipping would not be tried
        else:
            losses = train(model, adapters, EXAMPLES, settings, **QUIET).losses
        results.append((losses, state(model, adapters)))
    (losses, expected), (others, found) = results
    assert others == pytest.approx(losses, rel=1e-4)
    for name in expected:                                                 # Adam divides tiny gradients by their own size
        torch.testing.assert_close(found[name], expected[name], atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind, lr", [("LoReFT", 0.05), ("IA3 by Adafactor", 0.1), ("LoRA", 0.05), ("full", 0.01)])
def test_the_loss_falls_and_nothing_else_moves(kind, lr):
    model = small.model()
    base, adapters = small.bits(model), adapters_for(kind, model)
    settings = config(steps=60, lr=lr, full=kind == "full", optimizer="adafactor" if "Adafactor" in kind else "adamw")
    run = train(model, adapters, EXAMPLES[:4], settings, **QUIET)
    assert len(run.losses) == 60 and run.first_step == 0 and run.seconds > 0
    assert run.losses[-1] < 0.6 * run.losses[0]
    assert small.same_bits(small.bits(model), base) == (kind != "full")
    assert model.adapters == [] and not model.training
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for adapter in adapters for p in adapter.parameters())


def test_no_gradient_is_computed_below_the_lowest_site_nor_for_the_base():
    model = small.model().requires_grad_(True)                            # as a new Model is
    names = ["embed", "blocks.0.output", "blocks.1.output", "blocks.2.output"]
    with small.tapped(model, *names) as taps:                             # beneath the edits of layers 1 and 2
        train(model, [LoReFT(model, layers=[1, 2])], EXAMPLES, config(steps=1, accumulate=2), **QUIET)
    assert [[seen.requires_grad for seen in taps[name].seen] for name in names] == [[False] * 2] * 3 + [[True] * 2]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("accumulate", (1, 2))
def test_noise_is_told_every_step_and_numbers_that_never_repeat(accumulate, monkeypatch):
    model, told = small.model(), []
    monkeypatch.setattr(NEFTune, "begin", lambda self, step, rows: told.append((step, rows.tolist())))
    train(model, [LoReFT(model), NEFTune(model)], EXAMPLES, config(accumulate=accumulate), **QUIET)
    assert [step for step, _ in told] == [step for step in range(6) for _ in range(accumulate)]
    assert sum((rows for _, rows in told), []) == list(range(24))


def test_a_standing_adapter_that_is_not_trained_stays_as_it_is():
    model = small.model()
    standing = small.randomise(LoReFT(model, rank=2, layers=0)).attach()
    before = small.bits(standing)
    ia3, reft = IA3(model), LoReFT(model, rank=2, layers=1).attach()
    train(model, [ia3, reft], EXAMPLES, config(), **QUIET)
    assert small.same_bits(small.bits(standing), before) and all(p.grad is None for p in standing.parameters())
    assert all(p.requires_grad for p in standing.parameters())
    assert model.adapters == [standing, reft] and not ia3.attached        # what was attached stays attached


def test_gradients_that_were_left_behind_do_not_count():
    states = []
    for leave in (True, False):
        model = small.model()
        (adapter,) = adapters_for("LoReFT", model)
        if leave:
            for p in adapter.parameters():
                p.grad = torch.full_like(p, 100.0)
        train(model, [adapter], EXAMPLES, config(), **QUIET)
        states.append(small.bits(adapter))
    assert small.same_bits(*states)


def test_padding_changes_neither_loss_nor_training():
    long = Encoded([3] * small.CONTEXT, small.CONTEXT - 1)                # drawn into no batch of the first run: it only pads
    rows = [encode(small.model().tokenizer, e, small.CONTEXT) for e in EXAMPLES]
    short = [row for row in rows if len(row.ids) < 8]
    logits = [small.model()(torch.tensor([row.ids]))[0] for row in short]
    alone = sum(F.cross_entropy(l[row.prompt_length - 1 : -1], torch.tensor(row.ids[row.prompt_length :]), reduction="sum").item()
                for l, row in zip(logits, short))
    count = sum(len(row.ids) - row.prompt_length for row in short)
    from minireft.data import collate
    from minireft.losses import cross_entropy
    for filler in (0, 5):
        batch = collate([*short, long], pad=filler)
        answer = batch.answer.clone()
        answer[-1] = False
        loss = cross_entropy(small.model()(batch.tokens, batch.mask, batch.prompt_lengths), batch.tokens, answer)
        assert loss.item() == pytest.approx(alone / count, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- stop and resume

def fresh(kind):
    model = small.model()
    return model, adapters_for(kind, model)


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(line["seconds"] > 0 and line["tokens_per_second"] > 0 and 0.05 < line["peak_gb"] < 50 for line in lines)
    return [{k: v for k, v in line.items() if k in ("step", "loss", "lr")} for line in lines]


@pytest.fixture
def stop(monkeypatch):
    """stop(step, where): the next run dies at that step, "before" it, or in the "middle", its gradients there but not used."""
    true_step, true_clip = training.one_step, torch.nn.utils.clip_grad_norm_

    def arrange(at, where, error):
        def one_step(model, adapters, rows, step, *more):
            if step == at and where == "before":
                raise error
            if step == at:
                monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", die)
            return true_step(model, adapters, rows, step, *more)

        def die(*_, **__):
            raise error
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", true_clip)
        monkeypatch.setattr(training, "one_step", one_step)
    return arrange


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_runs_end_in_the_same_bits(kind, tmp_path, stop):
    settings = settings_of(kind)
    model, adapters = fresh(kind)
    torch.manual_seed(5)
    whole = train(model, adapters, EXAMPLES, settings, out=tmp_path / "whole", **QUIET)
    expected, log = state(model, adapters), log_of(tmp_path / "whole")
    assert [line["step"] for line in log] == list(range(6)) and [line["loss"] for line in log] == whole.losses
    assert [line["lr"] for line in log] == [settings.rate(step) for step in range(6)]
    for step, where, error in [(0, "before", KeyboardInterrupt), (1, "middle", RuntimeError), (2, "before", RuntimeError),
                               (3, "middle", KeyboardInterrupt), (5, "middle", RuntimeError)]:
        for again in ("new objects", "same objects"):
            out = tmp_path / f"{step} {again}"
            model, adapters = fresh(kind)
            torch.manual_seed(5)
            stop(step, where, error)
            with pytest.raises(error):
                train(model, adapters, EXAMPLES, settings, out=out, **QUIET)
            assert not model.training and model.adapters == []
            stop(None, None, None)
            if step < 2 and again == "same objects":
                continue                                                  # no checkpoint yet: such a run begins with what it is given
            if again == "new objects":
                model, adapters = fresh(kind)
            torch.manual_seed(5 if step < 2 else 99)
            run = train(model, adapters, EXAMPLES, settings, out=out, resume=True, **QUIET)
            assert run.first_step == step // 2 * 2
            assert run.losses == whole.losses[run.first_step :]
            assert small.same_bits(state(model, adapters), expected)
            assert log_of(out) == log


def test_a_run_may_be_interrupted_again_and_again(tmp_path, stop):
    kind, settings = "LoReFT and NEFTune", config(save_every=1)
    model, adapters = fresh(kind)
    train(model, adapters, EXAMPLES, settings, out=tmp_path / "whole", **QUIET)
    expected = state(model, adapters)
    for step in range(6):
        model, adapters = fresh(kind)
        stop(step, "middle", RuntimeError)
        with pytest.raises(RuntimeError):
            train(model, adapters, EXAMPLES, settings, out=tmp_path / "b", resume=step > 0, **QUIET)
    stop(None, None, None)
    train(model, adapters, EXAMPLES, settings, out=tmp_path / "b", resume=True, **QUIET)
    assert small.same_bits(state(model, adapters), expected) and log_of(tmp_path / "b") == log_of(tmp_path / "whole")
    done = train(*fresh(kind), EXAMPLES, settings, out=tmp_path / "b", resume=True, **QUIET)            # nothing left to do
    assert done.losses == [] and done.first_step == 6 and log_of(tmp_path / "b") == log_of(tmp_path / "whole")


def test_a_new_run_in_the_folder_begins_a_new_log(tmp_path):
    for _ in range(2):
        train(*fresh("LoReFT"), EXAMPLES, config(), out=tmp_path, **QUIET)
    assert [line["step"] for line in log_of(tmp_path)] == list(range(6))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')                                     # as a killed process leaves it
    train(*fresh("LoReFT"), EXAMPLES, config(), out=tmp_path, resume=True, **QUIET)
    assert [line["step"] for line in log_of(tmp_path)] == list(range(6))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train(*fresh("LoReFT"), EXAMPLES, config(), out=tmp_path, **QUIET)
    other_base = small.model(seed=1)
    for name, (model, adapters), examples, settings in [
            ("config", fresh("LoReFT"), EXAMPLES, config(lr=0.5)), ("data", fresh("LoReFT"), EXAMPLES[:-1], config()),
            ("adapters", fresh("LoRA"), EXAMPLES, config()), ("base", (other_base, adapters_for("LoReFT", other_base)), EXAMPLES, config())]:
        before = state(model, adapters)
        with pytest.raises(ValueError, match=f"of another run: its {name} differ"):
            train(model, adapters, examples, settings, out=tmp_path, resume=True, **QUIET)
        assert small.same_bits(state(model, adapters), before)
    for free in ({"accumulate": 2}, {"recompute": True}, {"save_every": 1}):                # where memory is short, a run may go on with these
        assert train(*fresh("LoReFT"), EXAMPLES, config(**free), out=tmp_path, resume=True, **QUIET).losses == []


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    true, calls = minireft.files.os.fsync, []

    def fails_at_the_second(handle):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return true(handle)
    monkeypatch.setattr(minireft.files.os, "fsync", fails_at_the_second)
    model, adapters = fresh("LoReFT")
    with pytest.raises(OSError, match="cannot write .*checkpoint.pt: No space left"):
        train(model, adapters, EXAMPLES, config(), out=tmp_path, **QUIET)
    assert model.adapters == [] and sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 2
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError):
        train(*fresh("LoReFT"), EXAMPLES, config(), out=blocked, **QUIET)


# --------------------------------------------------------------------------------------------------------- numbers going wrong

@pytest.mark.parametrize("bad", (float("nan"), float("inf"), 3e38))
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run(bad, tmp_path):
    model, (adapter,) = fresh("LoReFT")
    train(model, [adapter], EXAMPLES, config(), out=tmp_path, **QUIET)
    checkpoint = (tmp_path / "checkpoint.pt").read_bytes()
    with torch.no_grad():
        adapter.b.fill_(bad)
    before = small.bits(adapter)
    with pytest.raises(FloatingPointError, match="at step 0: lower the learning rate \\(0.02\\)"):
        train(model, [adapter], EXAMPLES, config(), out=tmp_path, **QUIET)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before.values(), small.bits(adapter).values()))
    assert (tmp_path / "checkpoint.pt").read_bytes() == checkpoint and model.adapters == []


def test_a_gradient_that_overflows_alone_ends_the_run(monkeypatch):
    model, (adapter,) = fresh("LoReFT")
    before = small.bits(adapter)
    adapter.b.register_hook(lambda g: g * float("inf"))
    for clip in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="its gradient (nan|inf) at step 0"):
            train(model, [adapter], EXAMPLES, config(clip=clip), **QUIET)
    assert small.same_bits(small.bits(adapter), before)


def test_autocast_trains_fp32_parameters(monkeypatch):
    model, (adapter, _) = fresh("LoReFT and NEFTune")
    with small.tapped(model, "blocks.0.ffn.up") as taps:
        half = train(model, [adapter], EXAMPLES, config(bf16=True), **QUIET)
    assert taps["blocks.0.ffn.up"].seen[0].dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in adapter.parameters())
    model, (other, _) = fresh("LoReFT and NEFTune")
    single = train(model, [other], EXAMPLES, config(), **QUIET)
    assert half.losses == pytest.approx(single.losses, rel=0.05) and half.losses != single.losses
    for kind in ("IA3 by Adafactor", "LoRA", "full"):
        model, adapters = fresh(kind)
        losses = train(model, adapters, EXAMPLES[:4], config(bf16=True, steps=40, lr=0.02, full=kind == "full"), **QUIET).losses
        assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("kind", ("LoReFT", "IA3 by Adafactor", "LoRA"))
def test_bf16_weights_carry_fp32_adapters(kind):
    model = small.model(dtype=torch.bfloat16)
    base, adapters = small.bits(model), adapters_for(kind, model)
    losses = train(model, adapters, EXAMPLES[:4], config(steps=40, lr=0.02, recompute=True), **QUIET).losses
    assert losses[-1] < 0.9 * losses[0] and small.same_bits(small.bits(model), base)
    assert all(p.dtype == torch.float32 for p in adapters[0].parameters())
    single, others = fresh(kind)
    assert losses[0] == pytest.approx(train(single, others, EXAMPLES[:4], config(steps=1), **QUIET).losses[0], rel=0.03)


@pytest.mark.parametrize("kind", ("LoReFT and NEFTune", "IA3 by Adafactor", "full"))
def test_recomputing_blocks_changes_nothing(kind):
    results = []
    for recompute in (False, True):
        model, adapters = fresh(kind)
        losses = train(model, adapters, EXAMPLES, config(recompute=recompute, full=kind == "full"), **QUIET).losses
        results.append((losses, state(model, adapters)))
        assert model.recompute is False
    assert results[0][0] == results[1][0] and small.same_bits(results[0][1], results[1][1])


# ------------------------------------------------------------------------------------------------------ settings and examples

def test_rates():
    linear = [TrainConfig(steps=10, warmup=0.2, lr=1.0).rate(step) for step in range(10)]
    assert linear == pytest.approx([0.5, 1.0, *(1 - i / 8 for i in range(8))])
    cosine = [TrainConfig(steps=10, warmup=0.2, lr=2.0, schedule="cosine").rate(step) for step in range(10)]
    assert cosine == pytest.approx([1.0, 2.0, *(1 + math.cos(math.pi * i / 8) for i in range(8))])
    constant = [TrainConfig(steps=4, warmup=0.0, lr=3.0, schedule="constant").rate(step) for step in range(4)]
    assert constant == [3.0] * 4
    assert TrainConfig(steps=1).rate(0) == TrainConfig().lr


def test_order_is_a_permutation_of_its_own_every_pass():
    stream = order(7, 0, 0, 28)
    passes = [stream[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes) and len({tuple(one) for one in passes}) == 4
    assert order(7, 0, 5, 9) == stream[5:14] and order(7, 1, 0, 28) != stream


@pytest.mark.parametrize("change, words", [
    ({"steps": 0}, "steps is 0"), ({"batch_size": 0}, "batch_size is 0"), ({"accumulate": 3}, "batch_size 4 cannot be cut into 3"),
    ({"lr": 0.0}, "lr is 0.0"), ({"lr": float("nan")}, "lr is nan"), ({"optimizer": "sgd"}, "optimizer is 'sgd'"), ({"schedule": "step"}, "schedule is 'step'"),
    ({"warmup": 1.0}, "warmup is 1.0"), ({"warmup": -0.1}, "warmup is -0.1"), ({"clip": -1.0}, "clip is -1.0"), ({"clip": float("nan")}, "clip is nan"),
    ({"save_every": 0}, "save_every is 0"), ({"accumulate": 0}, "accumulate is 0: expected at least 1, or \"auto\""),
    ({"accumulate": "most"}, "accumulate is 'most'"), ({"bucket": 0}, "bucket is 0"), ({"bucket": 4, "pack": True}, "leave one of them out")])
def test_settings_out_of_range_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        config(**change)


def test_runs_that_cannot_be_are_refused_before_they_begin():
    model, (adapter,) = fresh("LoReFT")
    for adapters, examples, words in [([adapter], [], "no examples"), ([], EXAMPLES, "nothing to train"), ([NEFTune(model)], EXAMPLES, "nothing to train"),
                                      ([adapter], [Example("w1 w99", "w2")], "'w99' not in the vocabulary"), ([adapter], [Example("", "w2")], "the prompt is ''"),
                                      ([adapter], [Example("w1", "")], "has no tokens"), ([adapter], [Example("w1 " * 23, "w2")], "does not fit the context of 24"),
                                      ([LoReFT(small.model())], EXAMPLES, "another model object"), ([adapter, LoReFT(model)], EXAMPLES, "another ReFT edits")]:
        with pytest.raises(ValueError, match=words):
            train(model, adapters, examples, config(), **QUIET)
        assert model.adapters == [] and not model.training and not adapter.attached


def test_rows_without_a_prompt_learn_from_all_but_the_first_token():
    rows = [Encoded([4, 5, 6, 7], 0), Encoded([8, 9], 1)]
    model = small.model()
    losses = [F.cross_entropy(model(torch.tensor([row.ids]))[0, :-1], torch.tensor(row.ids[1:]), reduction="sum").item() for row in rows]
    run = train(model, [LoReFT(model, positions="l1")], rows, config(steps=1, batch_size=2), **QUIET)
    assert run.losses[0] == pytest.approx(sum(losses) / 4, rel=1e-5)


# ----------------------------------------------------------------------------------------------- choices to compare (T-Few)

def lesson():
    """Examples with one to three wrong choices of unequal lengths, so that no two pieces of a batch hold equally many tokens."""
    text = lambda i, n: " ".join(f"w{(5 * i + 3 * j + n) % 20}" for j in range(n))
    return [Example(text(i, 1 + i % 4), text(i, 1 + i % 3), tuple(text(i, n) for n in range(1, 2 + max(1, i % 4))) + (text(i + 1, 1 + i % 2), text(i, 1 + i % 3)))
            for i in range(9)]


TFEW = dict(losses=("lm", "unlikelihood", "length"))


def test_the_losses_are_summed_over_the_whole_batch():
    """Every example and choice by itself, without padding; each loss divided by its own count over the batch."""
    for losses in (("lm",), ("unlikelihood",), ("length",), TFEW["losses"]):
        model = small.model()
        (adapter,) = adapters_for("LoReFT", model)
        rows, expected = [encode(model.tokenizer, e, small.CONTEXT, choices=True) for e in lesson()], []
        for i in order(len(rows), 0, 0, 8):
            def terms(ids):
                p = model(torch.tensor([ids]), prompt_lengths=torch.tensor([rows[i].prompt_length]))[0].double().log_softmax(-1)
                return [p[t - 1, ids[t]].item() for t in range(rows[i].prompt_length, len(ids))]
            expected.append([terms(ids) for ids in (rows[i].ids, *rows[i].wrong)])
        means = [[sum(terms) / len(terms) for terms in example] for example in expected]
        wrong = [-math.log1p(-math.exp(p)) for example in expected for terms in example[1:] for p in terms]
        right = [-p for example in expected for p in example[0]]
        parts = {"lm": sum(right) / len(right), "unlikelihood": sum(wrong) / len(wrong),
                 "length": sum(math.log(sum(map(math.exp, m))) - m[0] for m in means) / 8}
        run = train(model, [adapter], lesson(), config(steps=1, batch_size=8, losses=losses), **QUIET)
        assert run.losses[0] == pytest.approx(sum(parts[name] for name in losses), rel=1e-4)


@pytest.mark.parametrize("name", ("unlikelihood", "length", "all"))
def test_pieces_of_a_batch_make_the_same_step(name):
    results = []
    for accumulate in (1, 4):
        model = small.model()
        (adapter,) = adapters_for("IA3 by Adafactor", model)
        settings = config(steps=4, batch_size=8, accumulate=accumulate, losses=TFEW["losses"] if name == "all" else (name,), optimizer="adafactor")
        results.append((train(model, [adapter], lesson(), settings, **QUIET).losses, state(model, [adapter])))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4) and results[0][0][-1] != results[0][0][0]
    for key, tensor in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], tensor, atol=2e-4, rtol=1e-3, msg=key)


def test_choices_share_their_example_number_and_task(monkeypatch):
    model, told, seen = small.model(), [], []
    adapters = {name: small.randomise(LoReFT(model, rank=2), seed=i) for i, name in enumerate(("one", "two"))}
    bank, forward = minireft.Bank(adapters), model.forward
    monkeypatch.setattr(NEFTune, "begin", lambda self, step, rows: told.append(rows.tolist()))
    monkeypatch.setattr(model, "forward", lambda tokens, mask, lengths, tasks: seen.append(tasks.tolist()) or forward(tokens, mask, lengths, tasks))
    examples = [replace(e, task=("one", "two")[i % 2]) for i, e in enumerate(lesson())]
    train(model, [bank, NEFTune(model)], examples, config(steps=2, batch_size=4, accumulate=2, **TFEW), **QUIET)
    numbers = [number for rows in told for number in rows]
    assert sorted(set(numbers)) == list(range(8)) and len(numbers) > 16   # one number for all choices of an example
    chosen = order(9, 0, 0, 8)
    assert [task for rows in seen for task in rows] == [chosen[number] % 2 for number in numbers]


def test_interrupted_runs_with_choices_resume_and_other_choices_are_other_data(tmp_path, stop):
    settings = config(optimizer="adafactor", **TFEW)
    model, adapters = fresh("IA3 by Adafactor")
    whole = train(model, adapters, lesson(), settings, **QUIET)
    expected = state(model, adapters)
    model, adapters = fresh("IA3 by Adafactor")
    stop(3, "middle", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        train(model, adapters, lesson(), settings, out=tmp_path, **QUIET)
    stop(None, None, None)
    other = [replace(e, choices=(e.completion, "w19 w19")) for e in lesson()]
    model, adapters = fresh("IA3 by Adafactor")
    with pytest.raises(ValueError, match="of another run: its data differ"):
        train(model, adapters, other, settings, out=tmp_path, resume=True, **QUIET)
    run = train(model, adapters, lesson(), settings, out=tmp_path, resume=True, **QUIET)
    assert run.first_step == 2 and run.losses == whole.losses[2:] and small.same_bits(state(model, adapters), expected)


@pytest.mark.parametrize("example, words", [
    (Example("w1", "w2"), r"nothing to choose from: \(\) of 'w1': expected the completion and at least one other"),
    (Example("w1", "w2", ("w2",)), r"nothing to choose from: \('w2',\)"), (Example("w1", "w9", ("w2", "w3")), "'w9' is not among the choices"),
    (Example("w1", "w2", ("w2", " ")), "the completion ' ' of 'w1' has no tokens"), (Example("w1", "w2", ("w2", "W2")), "'W2' has the same tokens"),
    (Example("w1", "w2", ("w2", "w3 " * 23)), "does not fit the context of 24"), (Encoded([3, 4], 1), "some examples were encoded without")])
def test_examples_without_choices_to_compare_are_refused(example, words):
    for losses in (("unlikelihood",), ("lm", "length")):
        model, (adapter,) = fresh("LoReFT")
        with pytest.raises(ValueError, match=words):
            train(model, [adapter], [*lesson(), example], config(losses=losses), **QUIET)
        assert model.adapters == []


def test_choices_are_not_looked_at_unless_a_loss_compares_them():
    plain = [Example(e.prompt, e.completion) for e in lesson()]
    strange = [Example(e.prompt, e.completion, ("w1 " * 30, "nothing")) for e in lesson()]
    results = []
    for examples in (plain, strange):
        model, adapters = fresh("LoReFT")
        results.append((train(model, adapters, examples, config(), **QUIET).losses, state(model, adapters)))
    assert results[0][0] == results[1][0] and small.same_bits(results[0][1], results[1][1])


@pytest.mark.parametrize("losses", ("lm", "", (), ("lm", "ul"), ["nothing"]))
def test_unknown_losses_are_named(losses):
    with pytest.raises(ValueError, match="losses are .*: expected a tuple of some of lm, unlikelihood"):
        config(losses=losses)


def test_the_recipe_of_the_paper():
    recipe = training.T_FEW
    assert (recipe.steps, recipe.batch_size, recipe.lr, recipe.optimizer, recipe.schedule) == (1000, 8, 3e-3, "adafactor", "linear")
    rates = [recipe.rate(step) for step in (0, 59, 60, 530, 999)]
    assert rates == pytest.approx([3e-3 / 60, 3e-3, 3e-3, 1.5e-3, 3e-3 / 940]) and recipe.losses == TFEW["losses"]
