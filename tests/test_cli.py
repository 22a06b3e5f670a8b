"""The command line: every command as a process, and everything a user can get wrong.

Use:  pytest tests/test_cli.py
See:  a mistake is one line that says what to do, a non-zero status, and nothing half-written.
"""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minireft
from minireft.cli import main

RESULTS = Path(__file__).parent.parent / "benchmarks/results/kernels.jsonl"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
TUNE = ("tune", "--task", "facts", "--limit", "64", "--batch-size", "4", "--quiet")


def command(*args) -> list[str]:
    return [sys.executable, "-m", "minireft", *map(str, args)]


def minireft_process(*args, **more) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args), capture_output=True, text=True, env=ENVIRONMENT | more.pop("env", {}), timeout=250, **more)


def one_line(text: str) -> bool:
    return text.count("\n") == 1 and text.startswith("minireft: ") and "Traceback" not in text


# ------------------------------------------------------------------------------------------------------------ what works

def test_tune_generate_and_evaluate_as_processes(tiny_base, tmp_path):
    out = tmp_path / "run"
    tuned = minireft_process(*TUNE, "--base", tiny_base, "--steps", 60, "--rank", 2, "--layers", 1, "--positions", "f1+l2", "--untied",
                             "--neftune", 5, "--out", out)
    assert tuned.returncode == 0, tuned.stderr
    assert "trainable parameters: 260 of" in tuned.stdout                 # 2 · (2·2·32 + 2)
    assert sorted(p.name for p in out.iterdir()) == ["adapter.safetensors", "checkpoint.before.pt", "checkpoint.pt", "log.jsonl"]
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 60 and losses[-1] < losses[0]

    # The command that it names next works as it stands.
    again = re.search(r"now: minireft (.*)", tuned.stdout)[1]
    scored = minireft_process(*shlex.split(again), "--limit", 20)
    assert scored.returncode == 0 and re.fullmatch(r"rank 0\.\d{3} ± 0\.\d{3}, exact 0\.\d{3} ± 0\.\d{3} on 20 examples\n", scored.stdout)

    prompts = ["anna lives in", "the colour of the apple is"]
    written = minireft_process("generate", "--base", tiny_base, "--adapter", out / "adapter.safetensors", "--max-new-tokens", 3, *prompts)
    model, tokenizer = minireft.load(tiny_base)
    with minireft.load_adapter(model, out / "adapter.safetensors"):
        assert written.stdout.splitlines() == minireft.generate(model, tokenizer, prompts, 3)


def test_full_tuning_on_a_file_gives_a_base(tiny_base, tmp_path, capsys):
    data = tmp_path / "mine.jsonl"
    data.write_text('{"prompt": "anna lives in", "completion": "rome"}\n\n{"prompt": "ben lives in", "completion": "oslo"}\n')
    out = tmp_path / "run"
    assert main(["tune", "--data", str(data), "--method", "full", "--lr", "1e-2", "--steps", "40", "--batch-size", "2", "--quiet",
                 "--base", str(tiny_base), "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["generate", "--base", str(out / "base"), "anna lives in", "ben lives in"]) == 0
    assert capsys.readouterr().out.split() == ["rome", "oslo"]            # it learned what the file says
    assert main(["evaluate", "--base", str(out / "base"), "--data", str(data)]) == 0
    assert capsys.readouterr().out == "exact 1.000 ± 0.000 on 2 examples\n"


@pytest.mark.parametrize("method", ["direft", "ia3", "lora"])
def test_every_method_saves_what_evaluate_loads(method, tiny_base, tmp_path, capsys):
    assert main([*TUNE, "--base", str(tiny_base), "--method", method, "--steps", "3", "--out", str(tmp_path / "run")]) == 0
    assert main(["evaluate", "--task", "instructions", "--limit", "5", "--base", str(tiny_base),
                 "--adapter", str(tmp_path / "run" / "adapter.safetensors")]) == 0
    assert "obeyed 0.000 ± 0.000 on 5 examples" in capsys.readouterr().out


def test_demo_draws_and_saves(tiny_base, tmp_path):
    done = minireft_process("demo", "--quick", "--base", tiny_base, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("LoReFT", "(IA)³", "LoRA", "full", "full + NEFTune"):
        assert re.search(rf"^  {re.escape(name)} +[\d,]+ +[\d.]+% +0\.\d{{3}} ± 0\.\d{{3}} +0\.\d{{3}} ± 0\.\d{{3}} +\d+$", done.stdout, re.M), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.png", "ia3.safetensors", "lora.safetensors", "loreft.safetensors", "results.json"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "demo.png").stat().st_size > 20_000


def test_doctor_and_help():
    found = minireft_process("doctor")
    assert found.returncode == 0 and torch.__version__ in found.stdout and not found.stderr
    for name, there in minireft.ops.backends().items():
        assert (": ready" in re.search(rf"^{name} .*", found.stdout, re.M)[0]) == there
    helped = minireft_process("--help")
    verbs = re.findall(r"^  (\w+)  ", helped.stdout, re.M)
    assert verbs[:5] == ["demo", "tune", "generate", "evaluate", "doctor"] and "pretrain" in verbs[5:]


@pytest.mark.parametrize("tool", ["bench", "profile", "analyse", "reproduce"])
def test_tools_that_need_the_source(tool, tmp_path, refused, monkeypatch):
    shown = minireft_process(tool, "--help")
    assert shown.returncode == 0 and f"usage: minireft {tool}" in shown.stdout.replace("kernels.py", "minireft bench")
    if tool == "analyse":
        assert minireft_process(tool, "neftune", "--seeds", "1").stderr.endswith("--seeds 1: expected 2 to 7\n")      # the program's own word
        tool = ["analyse", "neftune"]
    monkeypatch.setattr(minireft, "__file__", str(tmp_path / "minireft" / "__init__.py"))   # as when installed from a wheel
    assert "run it in a clone of the source" in refused(*([tool] if isinstance(tool, str) else tool))


def test_packing_is_for_methods_that_edit_no_positions(tiny_base, tmp_path, refused):
    tune = ["tune", "--task", "facts", "--limit", "4", "--steps", "1", "--pack", "--quiet", "--base", tiny_base]
    assert "rows that are not packed" in refused(*tune, "--out", tmp_path / "a")
    assert main([*map(str, tune), "--method", "ia3", "--out", str(tmp_path / "b")]) == 0


# ----------------------------------------------------------------------------------------------------- stopped and resumed

def test_an_interrupted_run_says_how_to_resume_and_ends_in_the_same_bits(tiny_base, tmp_path):
    settings = [*TUNE, "--base", str(tiny_base), "--steps", "400", "--neftune", "5"]
    straight = subprocess.Popen(command(*settings, "--out", tmp_path / "straight"), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    out = tmp_path / "stopped"
    # A shell that runs the tests in the background has them, and so their children, ignore Ctrl-C: this one must hear it.
    stopped = subprocess.Popen(command(*settings, "--out", out), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    log = out / "log.jsonl"
    while (not log.exists() or log.read_text().count("\n") < 60) and stopped.poll() is None:   # steps after the checkpoint of step 50
        time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=120)
    assert stopped.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert not (out / "adapter.safetensors").exists()

    again = re.search(r"minireft (tune .*--resume)", said)[1]             # the very command that it printed
    resumed = minireft_process(*shlex.split(again))
    assert resumed.returncode == 0, resumed.stderr
    assert straight.wait(200) == 0
    one, other = (load_file(tmp_path / name / "adapter.safetensors") for name in ("straight", "stopped"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(400))                                      # no step missing, none twice


def test_a_pretraining_that_is_asked_to_end_leaves_nothing_behind(tmp_path):
    out = tmp_path / "place"
    out.mkdir()
    asked = subprocess.Popen(command("pretrain", "--quick", "--quiet", out / "base"), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not list(out.glob(".base-*/meeting")) and asked.poll() is None:                  # its processes are at work
        time.sleep(0.02)
    asked.terminate()
    _, said = asked.communicate(timeout=60)
    assert asked.returncode == 130 and said == "minireft: interrupted\n" and list(out.iterdir()) == []


def test_a_finished_run_is_not_overwritten_and_another_run_not_resumed(tiny_base, tmp_path, refused):
    settings = [*TUNE, "--base", tiny_base, "--steps", 3, "--out", tmp_path / "run"]
    assert main([*map(str, settings)]) == 0
    assert "--resume" in refused(*settings)
    assert "its config differ" in refused(*settings, "--seed", 1, "--resume")
    assert "its adapters differ" in refused(*settings, "--rank", 2, "--resume")
    assert "its data differ" in refused(*settings, "--limit", 9, "--resume")
    assert "its base differ" in refused(*settings, "--resume", "--base", other_base(tiny_base, tmp_path))
    assert main([*map(str, settings), "--resume"]) == 0                   # nothing left to do is no mistake


# --------------------------------------------------------------------------------------------------------------- mistakes

@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a command that must fail: one line on stderr (returned), a status above 0, no file added or changed."""
    def run(*args) -> str:
        capsys.readouterr()
        before = snapshot(tmp_path)
        try:
            status = main([*map(str, args)])
        except SystemExit as stop:      # argparse
            status = stop.code
        said = capsys.readouterr()
        assert status not in (0, None) and one_line(said.err), said.err
        assert snapshot(tmp_path) == before
        return said.err
    return run


def snapshot(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def other_base(tiny_base, tmp_path):
    """The same base but for its weights."""
    model, tokenizer = minireft.load(tiny_base)
    torch.manual_seed(1)
    model.reset()
    minireft.save(model, tokenizer, tmp_path / "other")
    return tmp_path / "other"


@pytest.mark.parametrize("wrong, told", [
    ("--rank 0", "rank is 0: expected a whole number from 1 to"), ("--rank 33", "width, 32"), ("--rank many", "invalid"),
    ("--layers 7", "from 0 to 1"), ("--layers 1,1", "distinct"), ("--layers last", "expected 'all'"),
    ("--positions g3", "'fN+lM'"), ("--positions f0", "at least 1"), ("--positions f3 --untied", "no prefix and suffix"),
    ("--method ia3 --sites key,nose", "site 'nose' is unknown"), ("--method ia3 --rank 0", "rank means nothing to ia3: expected sites, init_scale"),
    ("--method lora --rank 33", "rank is 33"), ("--method magic", "invalid choice: 'magic'"),
    ("--task riddles", "there is no task 'riddles': choose from facts"), ("--base nowhere", "there is no base at nowhere"),
    ("--steps 0", "0 is out of range"), ("--lr -1", "-1 is out of range"), ("--lr nan", "nan is out of range"),
    ("--neftune -1", "-1 is out of range"), ("--device cuda:9" if not torch.cuda.is_available() else "--rank 0", ""),
])
def test_settings_that_cannot_be(wrong, told, tiny_base, tmp_path, refused):
    said = refused("tune", "--task", "facts", "--base", tiny_base, "--steps", 2, "--out", tmp_path / "run", *wrong.split())
    assert told in said


def test_a_loss_that_is_not_finite(tiny_base, tmp_path, capsys):
    settings = [*TUNE, "--base", str(tiny_base), "--method", "full", "--steps", "100", "--out", str(tmp_path / "run")]
    assert main([*settings, "--lr", "1e30"]) == 1
    said = capsys.readouterr().err
    assert one_line(said) and re.search(r"the loss became .*(nan|inf).* at step \d+: lower the learning rate", said)
    assert not (tmp_path / "run" / "base").exists()
    model, _ = minireft.load(tiny_base)
    assert all(p.isfinite().all() for p in model.parameters())            # the base's files are as they were
    assert main([*settings, "--steps", "3"]) == 0                         # and the same folder may be used again
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("wrong, told", [
    ([""], "the prompt is '': expected at least one word"), (["the " * 200], "does not fit the context"),
    (["anna zzyzx"], "'zzyzx' not in the vocabulary"), (["anna", "--top-p", "1.5"], "top_p is 1.5"),
    (["anna", "--max-new-tokens", "0"], "0 is out of range"), ([], "PROMPT")])
def test_prompts_that_cannot_be(wrong, told, tiny_base, refused):
    assert told in refused("generate", "--base", tiny_base, *wrong)


@pytest.mark.parametrize("row, told", [
    ('{"prompt": "anna"}', "'completion' is None"), ('{"prompt": "anna", "completion": ', "line 3"), ('["anna", "ben"]', "it is a list"),
    ('{"prompt": " ", "completion": "oslo"}', "'prompt' is ' '"), ('{"prompt": 3, "completion": "oslo"}', "'prompt' is 3"),
    ('{"prompt": "anna", "completion": "oslo", "choices": ["rome"]}', "'choices' is ['rome']"), ("\xff", "line 3"),
    ('{"prompt": "anna", "completion": "zzyzx"}', "'zzyzx' not in the vocabulary"), ('{"prompt": "anna", "completion": "%s"}' % ("the " * 99), "does not fit")])
def test_rows_that_cannot_be(row, told, tiny_base, tmp_path, refused):
    data = tmp_path / "mine.jsonl"
    data.write_bytes(b'{"prompt": "anna", "completion": "oslo"}\n\n' + row.encode("latin-1") + b"\n")
    said = refused("tune", "--data", data, "--base", tiny_base, "--out", tmp_path / "run")
    assert told in said and ("line 3" in said and str(data) in said or "vocabulary" in said or "fit" in said)


def test_files_that_are_not_there_or_empty(tiny_base, tmp_path, refused):
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "holds no rows" in refused("tune", "--data", tmp_path / "empty.jsonl", "--base", tiny_base, "--out", tmp_path / "run")
    assert "there is no file" in refused("evaluate", "--data", tmp_path / "none.jsonl", "--base", tiny_base)
    assert "there is no file" in refused("generate", "--base", tiny_base, "--adapter", tmp_path / "none.safetensors", "anna")
    assert "there is no split 'exam'" in refused("evaluate", "--task", "facts", "--split", "exam", "--base", tiny_base)


def test_adapters_that_do_not_fit(tiny_base, tmp_path, refused, capsys):
    model, _ = minireft.load(tiny_base)
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    minireft.LoReFT(model, rank=2).save(good)
    generate = ("generate", "--base", tiny_base, "anna", "--adapter")
    for content in (b"", good.read_bytes()[:-9], good.read_bytes()[:40], os.urandom(500)):
        bad.write_bytes(content)
        assert "no whole safetensors file" in refused(*generate, bad)
    assert "holds no minireft adapter" in refused(*generate, tiny_base / "model.safetensors")
    save_file({"x": torch.ones(3)}, bad)
    assert "holds no minireft adapter" in refused(*generate, bad)
    other = other_base(tiny_base, tmp_path)
    elsewhere = ("generate", "--base", other, "anna", "--adapter", good)
    assert "was made for another base" in refused(*elsewhere)
    assert main([*map(str, elsewhere), "--force"]) == 0


def test_bases_that_are_damaged(tiny_base, tmp_path, refused):
    for name, content, told in (("model.safetensors", (tiny_base / "model.safetensors").read_bytes()[:-100], "no whole safetensors file"),
                                ("model.safetensors", b"", "no whole safetensors file"), ("config.json", b"{", "does not describe"),
                                ("config.json", b"\xff\xfe", "does not describe"), ("config.json", b"[]", "does not describe"),
                                ("config.json", b'{"format": "minireft base", "width": 8}', "does not describe"),
                                ("tokenizer.json", b"{}", "tokenizer.json")):
        broken = tmp_path / "broken"
        shutil.copytree(tiny_base, broken)
        (broken / name).write_bytes(content)
        assert told in refused("generate", "--base", broken, "anna")
        shutil.rmtree(broken)
    shutil.copytree(tiny_base, tmp_path / "silent", ignore=shutil.ignore_patterns("tokenizer.json"))
    assert "has no tokenizer.json" in refused("generate", "--base", tmp_path / "silent", "anna")


def test_checkpoints_that_are_damaged(tiny_base, tmp_path, refused):
    settings = [*TUNE, "--base", tiny_base, "--steps", 3, "--out", tmp_path / "run"]
    assert main([*map(str, settings)]) == 0
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    for content in (b"", whole[: len(whole) // 2], os.urandom(500)):
        checkpoint.write_bytes(content)
        assert "delete it to start over" in refused(*settings, "--resume")
    torch.save({"something": "else"}, checkpoint)
    assert "no checkpoint of a run" in refused(*settings, "--resume")


# ----------------------------------------------------------------------------------------------------- disks and processes

def test_folders_that_cannot_be_written(tiny_base, tmp_path, refused):
    (tmp_path / "file").write_text("not a folder")
    assert "cannot write" in refused(*TUNE, "--base", tiny_base, "--steps", 2, "--out", tmp_path / "file" / "run")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if not os.access(locked, os.W_OK):  # root may write anywhere
        assert "cannot write" in refused(*TUNE, "--base", tiny_base, "--steps", 2, "--out", locked / "run")


@pytest.mark.parametrize("most", [150, 3000])    # bytes a file: the log ends within a line; the checkpoint does not fit
def test_a_full_disk(most, tiny_base, tmp_path):
    full = minireft_process(*TUNE, "--base", tiny_base, "--steps", 10, "--out", tmp_path,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
    assert full.returncode == 1 and one_line(full.stderr) and "cannot write" in full.stderr, full.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl"]      # no adapter, no checkpoint, nothing partial
    for line in (tmp_path / "log.jsonl").read_text().splitlines(keepends=True):
        assert line.endswith("\n") and json.loads(line)


def test_a_process_shows_one_line_and_its_traceback_only_when_asked(tmp_path):
    wrong = minireft_process("generate", "--base", tmp_path, "anna")
    assert wrong.returncode == 1 and one_line(wrong.stderr) and not wrong.stdout
    asked = minireft_process("generate", "--base", tmp_path, "anna", env={"MINIREFT_DEBUG": "1"})
    assert asked.returncode == 1 and "Traceback" in asked.stderr and "FileNotFoundError" in asked.stderr


@pytest.mark.parametrize("words", [
    ["inspect", "base"], ["bench", "--compare", RESULTS, RESULTS],
    pytest.param(["profile", "scale", "--N", 64, "--C", 256, "--source"], marks=pytest.mark.emulator)], ids=lambda words: words[0])
def test_a_reader_that_has_seen_enough_is_no_mistake(words):
    if words[0] == "profile" and not shutil.which(ENVIRONMENT.get("CXX", "g++")):
        pytest.skip("no C++ compiler here")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command(*words), env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == "" and done.returncode == 1
