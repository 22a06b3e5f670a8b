"""Bases on disk: saved and loaded to the bit, and refused with a reason when they are not whole.

Run:  pytest tests/test_checkpoint.py
See:  the same configuration, tokenizer and logits from a folder as from the model that wrote it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
from safetensors import safe_open

import minireft
from minireft import load, save
from minireft.files import read_tensors, write_tensors


@pytest.mark.parametrize("name", small.CONFIGS)
def test_a_folder_gives_the_model_back_to_the_bit(name, tmp_path):
    model, (tokens, mask) = small.model(name), small.pad(small.rows([3, 6]), "left")
    save(model, model.tokenizer, tmp_path / "base")
    loaded, tokenizer = load(tmp_path / "base")
    assert loaded.config == model.config and small.same_bits(small.bits(loaded), small.bits(model))
    assert torch.equal(loaded(tokens, mask), model(tokens, mask))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters()) and loaded.tokenizer is tokenizer
    assert tokenizer.vocabulary == model.tokenizer.vocabulary and tokenizer.encode("w1 w5") == model.tokenizer.encode("w1 w5")
    assert (loaded.head.weight is loaded.embed.weight) == model.config.tied
    tensors, _ = read_tensors(tmp_path / "base" / "model.safetensors")
    assert ("head.weight" in tensors) != model.config.tied                # a shared weight is stored once


PEAK = """
import sys, torch, minireft
def status(name): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))   # kB
before = status("VmRSS")
model, _ = minireft.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print((status("VmHWM") - before) * 1024 / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_reading_takes_little_more_memory_than_the_model(tmp_path):
    """Peak resident memory over what was there before, in units of the model: 2.2 where a file is read whole, or stays mapped."""
    model = minireft.Model(minireft.ModelConfig(500, width=512, layers=12, heads=8, hidden=1408, context=64))      # 39 M parameters
    save(model, None, tmp_path / "ours")
    minireft.formats.huggingface.save(model, None, tmp_path / "theirs")
    for folder, dtype in (("ours", "float32"), ("theirs", "bfloat16")):
        out = subprocess.run([sys.executable, "-c", PEAK, tmp_path / folder, dtype], capture_output=True, text=True, check=True)
        assert 1 < float(out.stdout) < 1.2, (folder, dtype)


WRITING = """
import sys, torch
from minireft.files import write_tensors
def status(name): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))   # kB
torch.manual_seed(0)
tensors = {f"{i}": torch.randn(512, 1024).mT if i % 2 else torch.randn(1024, 512) for i in range(16)}    # 32 MB, half of it transposed
tensors |= {"again": tensors["0"], "part": tensors["2"][3:], "whole": torch.arange(3), "yes": torch.tensor([True]), "one": torch.tensor(0.5)}
for dtype in (None, torch.bfloat16):
    write_tensors(sys.argv[1], {"warm": torch.ones(2, 2)}, dtype=dtype)
    open("/proc/self/clear_refs", "w").write("5")                         # the peak begins anew
    before = status("VmRSS")
    write_tensors(sys.argv[1] + str(dtype), tensors, {"who": "x"}, dtype)
    print((status("VmHWM") - before) / (16 * 2048))
torch.save(tensors, sys.argv[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_writing_takes_no_second_copy(tmp_path):
    """Peak resident memory while writing over what was there before, in units of what is written: a sixteenth is one tensor, 1 a copy of
    all. What is written is what another reader finds, also of tensors that share memory or lie in another order than they are read."""
    path = str(tmp_path / "x")
    at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}           # what is freed goes back to the system, or the peak is chance
    out = subprocess.run([sys.executable, "-c", WRITING, path], capture_output=True, text=True, check=True, env=at_once).stdout
    assert max(map(float, out.split())) < 0.25, out
    for dtype in (None, torch.bfloat16):
        with safe_open(path + str(dtype), framework="pt") as file:
            found, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        expected = {name: tensor.to(dtype or tensor.dtype) for name, tensor in torch.load(path).items()}
        assert metadata == {"who": "x"} and found.keys() == expected.keys()
        assert all(t.dtype == expected[n].dtype and torch.equal(t, expected[n]) for n, t in found.items())
        whole = Path(path + str(dtype)).read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")                     # of the header; what is mapped of the file is aligned
        places = {name: end + row["data_offsets"][0] for name, row in json.loads(whole[8:end]).items() if name in found}
        assert all(places[n] % t.itemsize == 0 for n, t in found.items())


def test_stored_in_half_and_loaded_in_any_dtype(tmp_path):
    model = small.model()
    save(model, None, tmp_path, dtype=torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in read_tensors(tmp_path / "model.safetensors")[0].values())
    assert all(p.dtype == torch.float32 for p in model.parameters())      # the model itself is left alone
    for dtype in (None, torch.float32, torch.bfloat16, torch.float64):
        loaded, tokenizer = load(tmp_path, dtype=dtype)
        assert tokenizer is None and loaded.tokenizer is None
        for p, q in zip(loaded.parameters(), model.parameters()):
            assert p.dtype == (dtype or torch.float32) and torch.equal(p, q.bfloat16().to(p.dtype))
    assert load(tmp_path, device="cpu")[0].embed.weight.device.type == "cpu"


def test_a_loaded_base_trains_and_saves_again(tmp_path):
    model = small.model("gpt2")
    save(model, model.tokenizer, tmp_path / "a")
    loaded, tokenizer = load(tmp_path / "a")
    minireft.train(loaded, [], [minireft.Example("w1", "w2")], minireft.TrainConfig(steps=2, batch_size=1, full=True), progress=False)
    save(loaded, tokenizer, tmp_path / "b")
    again, _ = load(tmp_path / "b")
    assert small.same_bits(small.bits(again), small.bits(loaded)) and not small.same_bits(small.bits(again), small.bits(model))
    assert again.head.weight is again.embed.weight


def test_what_is_not_whole_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no base at"):
        load(tmp_path / "nowhere")
    model = small.model()
    save(model, model.tokenizer, tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    text, whole, settings = config.read_text(), weights.read_bytes(), json.loads(config.read_text())
    for broken in ("", "{", "[]", "3", json.dumps({**settings, "format": "other"}), json.dumps({**settings, "wings": 2}),
                   json.dumps({k: v for k, v in settings.items() if k != "width"}), json.dumps({k: v for k, v in settings.items() if k != "format"}),
                   json.dumps({**settings, "heads": 3}), json.dumps({**settings, "width": "16"})):
        config.write_text(broken)
        with pytest.raises(ValueError):
            load(tmp_path)
    for changed, words in (({"layers": 4}, "blocks.3"), ({"vocab_size": 30}, "embed.weight has shape \\(29, 16\\), expected \\(30, 16\\)"),
                           ({"tied": False}, "head.weight has shape None")):
        config.write_text(json.dumps({**settings, **changed}))
        with pytest.raises(ValueError, match=words):
            load(tmp_path)
    config.write_text(text)
    for damaged in (b"", whole[:50], whole[: len(whole) // 2], whole[:-3], b"\xff" * 8 + whole[8:]):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors"):
            load(tmp_path)
    write_tensors(weights, {**{name: t for name, t in model.state_dict().items() if name != "head.weight"}, "more": torch.zeros(1)})
    with pytest.raises(ValueError, match="more has shape"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load(tmp_path)


def test_a_write_that_fails_leaves_the_old_weights(tmp_path, monkeypatch):
    model = small.model()
    save(model, model.tokenizer, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("minireft.files.os.fsync", full)
    with pytest.raises(OSError, match="cannot write"):
        save(small.model(seed=1), model.tokenizer, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before and not list(tmp_path.glob("*.partial"))
