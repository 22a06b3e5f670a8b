"""`minireft inspect` and `minireft merge`: what lies at a path, without its weights, and a base that has taken an adapter in.

Run:  pytest tests/test_overview.py               # tests/test_peers_families.py has transformers open what was merged
See:  the papers' counts on a 7B model that is nothing but a config.json; a merged base with its adapter's logits.
"""

import json
import re

import pytest
import torch

import minireft
import small
from minireft.cli import main
from minireft.formats import huggingface, peft
from minireft.formats.convert import merge
from minireft.formats.overview import overview

LLAMA_7B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}


def test_a_7b_model_from_its_config_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    page = re.sub(" +", " ", overview(tmp_path))
    for line in ("model decoder: 32 layers of width 4096, 32 heads of 128", "parameters 6,738,415,616: 26.95 GB in float32, 13.48 GB in bfloat16",
                 "block.attention.key 0–31 4096 → 4096 536,870,912", "block.ffn.act 0–31 (B, T, 11008)", "tokenizer none",
                 "LoReFT, rank 4, f7+l7, all layers 1,048,704 0.0156%", "(IA)³, key, value, ffn 614,400 0.0091%",
                 "LoRA, rank 8, query, value 4,194,304 0.0622%", "full 6,738,415,616 100.0000%"):
        assert f"\n{line}\n" in f"\n{page}\n", line


@pytest.mark.parametrize("name", [*small.CONFIGS, *small.ENCODERS, *small.BOTH])
def test_every_architecture_adds_up(name, tmp_path):
    model = small.model(name)
    minireft.save(model, model.tokenizer, tmp_path)
    page, total = overview(tmp_path), sum(p.numel() for p in model.parameters())
    found = {line.split()[0]: int(line.split()[-1].replace(",", "")) for line in page.splitlines() if re.match(r"(block|embed|norm|head|pos|enc|dec)\S* .*\d$", line)}
    relative = sum(p.numel() for n, p in model.named_parameters() if "relative" in n)      # the one part that no adapter can stand on
    assert sum(found.values()) + relative == total and f"parameters  {total:,}:" in page and "ends with <eos>" in page
    assert {re.sub(r"^blocks\.\d+", "block", site) for site in model.sites()} <= set(re.findall(r"^\S+", page, re.MULTILINE))
    assert f"{minireft.IA3(model).num_parameters():,}" in page.split("(IA)³")[1].splitlines()[0]


def test_adapters_ours_and_others(tmp_path):
    model = small.model("llama")
    minireft.LoReFT(model, rank=2, layers="0,2", positions="f1+l2").save(tmp_path / "reft.safetensors")
    page = overview(tmp_path / "reft.safetensors")                        # it remembers the shape of its base
    assert "LoReFT(rank=2, layers=[0, 2], positions='f1+l2'" in page and "stands on   block.output\n" in page and "trained     132 parameters" in page
    assert "decoder: 3 layers of width 16" in page
    lora = minireft.LoRA(model, rank=2, sites=("query", "up"))
    peft.write(lora, tmp_path / "peft")
    with pytest.raises(ValueError, match="does not describe its base: name it with --base"):
        overview(tmp_path / "peft")
    minireft.save(model, None, tmp_path / "base")
    page = overview(tmp_path / "peft", tmp_path / "base")
    assert "stands on   block.attention.query, block.ffn.up" in page and f"trained     {lora.num_parameters()} parameters" in page
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        overview(tmp_path / "nothing")


def test_inspect_reads_no_weights(tmp_path, monkeypatch, capsys):
    model = small.model("gpt2")
    huggingface.save(model, None, tmp_path / "theirs")
    minireft.save(model, None, tmp_path / "ours")
    monkeypatch.setattr(minireft.files, "read_tensor", lambda *_: pytest.fail("a weight was read"))
    assert overview(tmp_path / "theirs") == overview(tmp_path / "ours")
    assert main(["inspect", str(tmp_path / "ours")]) == 0 and "16 → 16 + bias" in capsys.readouterr().out


MERGED = [(name, kind) for name in ("llama", "gpt2", "roberta", "t5 1.1") for kind in ("LoRA", "IA3")]
SHAPES = {"t5 1.1": dict(positions="relative", activation="geglu_tanh", tied=False, encoder_layers=1, relative_buckets=6, relative_furthest=9),
          "roberta": dict(masked_head=True)}


def adapted(name: str, kind: str, **changes):
    """A base whose configuration is one of Hugging Face's, and a random adapter on every place that it has."""
    base = small.model("roberta" if name == "roberta" else "gpt2" if name == "gpt2" else "llama", **({"kv_heads": 4} if "t5" in name else {}), **SHAPES.get(name, {}), **changes)
    adapter = minireft.LoRA(base, rank=2, alpha=3, sites="all") if kind == "LoRA" else minireft.IA3(
        base, sites=("key", "value", "ffn", "query", "attention_output", "ffn_output"), layer_norm=True)
    return base, small.randomise(adapter)


def logits(model):
    tokens, mask = small.pad(small.rows([7, 4]), "left")
    given = dict(decoder_tokens=torch.tensor([[0, 5, 9], [0, 8, 21]])) if model.two else {}
    return model(tokens, mask, **given), torch.ones(2, 3) > 0 if model.two else mask


@pytest.mark.parametrize("name, kind", MERGED)
def test_a_merged_base_computes_what_the_adapter_did(name, kind, tmp_path):
    base, adapter = adapted(name, kind)
    minireft.save(base, base.tokenizer, tmp_path / "base")
    adapter.save(tmp_path / "adapter.safetensors")
    before, mask = logits(base)
    with adapter:
        expected, _ = logits(base)
    assert "IA3" in merge(tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "merged") or kind == "LoRA"
    got, tokenizer = minireft.load(tmp_path / "merged")
    assert (before - expected)[mask].abs().max() > 0.1
    assert (logits(got)[0] - expected)[mask].abs().max() < 2e-5 * expected.abs().max() and tokenizer.vocab_size == base.tokenizer.vocab_size


def test_what_cannot_be_merged_is_refused_and_nothing_written(tmp_path, capsys):
    model = small.model("llama")
    minireft.save(model, None, tmp_path / "base")
    for adapter in (minireft.LoReFT(model), minireft.DiReFT(model), minireft.NEFTune(model)):
        adapter.save(tmp_path / "adapter.safetensors")
        with pytest.raises(ValueError, match=f"a {type(adapter).__name__} cannot be merged: no weights"):
            merge(tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "merged")
    lora = small.randomise(minireft.LoRA(model, rank=2))
    lora.save(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="is there already"):
        merge(tmp_path / "base", tmp_path / "lora.safetensors", tmp_path / "base")
    with pytest.raises(ValueError, match="a base can be written as minireft, huggingface"):
        merge(tmp_path / "base", tmp_path / "lora.safetensors", tmp_path / "merged", to="peft")
    minireft.save(small.model("llama", seed=5), None, tmp_path / "other")
    arguments = ["merge", str(tmp_path / "lora.safetensors"), str(tmp_path / "merged"), "--to", "minireft", "--base"]
    assert main([*arguments, str(tmp_path / "other")]) == 1 and "made for another base" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert main([*arguments, str(tmp_path / "base"), "--dtype", "bfloat16"]) == 0
    with lora, torch.no_grad():
        expected, mask = logits(model)
    assert (logits(minireft.load(tmp_path / "merged")[0])[0] - expected)[mask].abs().max() < 0.05 * expected.abs().max()
