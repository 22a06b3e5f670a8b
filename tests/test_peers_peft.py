"""minireft beside PEFT: LoRA and (IA)³ folders in and out, on the Llama family and GPT-2.

Run:  pytest -m peers tests/test_peers_peft.py
See:  logits within 1e-5 in fp32 on random tiny weights, padded on either side.
"""

import pytest
import torch

import minireft
import small
from minireft.formats import peft as ours
from test_peers_pyreft import STD, TOLERANCE, both, prompts, their_logits

pytestmark = pytest.mark.peers
peft = pytest.importorskip("peft")


def differ(model, mine, adapter, side="left"):
    tokens, mask = prompts(side)
    with torch.no_grad():
        expected, before = their_logits(model, tokens, mask), mine(tokens, mask)
        with adapter:
            logits = mine(tokens, mask)
    assert (expected - before)[mask].abs().max() > 0.1
    return (logits - expected)[mask].abs().max().item()


THEIRS = [
    ("llama", dict(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])),
    ("llama", dict(r=2, lora_alpha=2, target_modules="all-linear", use_rslora=True)),
    ("qwen2", dict(r=2, lora_alpha=4, target_modules=["k_proj", "down_proj"], layers_to_transform=[1])),
    ("gpt2", dict(r=3, lora_alpha=6, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)),
    ("llama", dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    ("llama", dict(target_modules=["k_proj", "q_proj", "o_proj", "up_proj"], feedforward_modules=[])),
    ("mistral", dict(target_modules=["v_proj", "down_proj"], feedforward_modules=[])),
    ("gpt2", dict(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True)),
]


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("name, settings", THEIRS, ids=str)
def test_saved_there_and_imported_here(tmp_path, name, settings, side):
    model, mine = both(name, tmp_path / "base")
    kind = peft.LoraConfig if "r" in settings else peft.IA3Config
    adapted = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(3)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data += STD * torch.randn(p.shape, generator=generator)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    difference = differ(adapted, mine, minireft.load_adapter(mine, tmp_path / "adapter"), side)
    print(f"{name} {settings}: {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name, make", (
    ("llama", lambda model: minireft.LoRA(model, rank=3, alpha=7, sites="all")),
    ("gpt2", lambda model: minireft.LoRA(model, rank=2, sites=("attention_output", "ffn_output"))),
    ("llama", lambda model: minireft.IA3(model)),
    ("qwen2", lambda model: minireft.IA3(model, sites=("query", "ffn_output"))),
    ("gpt2", lambda model: minireft.IA3(model, sites=("query", "key", "value", "ffn"))),
), ids=("llama lora", "gpt2 lora", "llama ia3", "qwen2 ia3", "gpt2 ia3"))
def test_made_here_and_exported_there(tmp_path, name, make):
    model, mine = both(name, tmp_path / "base")
    adapter = small.randomise(make(mine), std=STD)
    ours.write(adapter, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    difference = differ(adapted, mine, adapter)
    print(f"exported {name} {type(adapter).__name__}: {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name, settings, sites", (("llama", {}, ("query", "value")), ("qwen2", {"alpha": 3}, ("key", "ffn_output"))))
def test_dora_beside_theirs(tmp_path, name, settings, sites):
    """Their weights in ours: the same logits and, the norm a constant in both, the same gradients."""
    model, mine = both(name, tmp_path / "base")
    modules = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj", "ffn_output": "mlp.down_proj"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=settings.get("alpha", 16), use_dora=True,
                                                         target_modules=[modules[site].split(".")[1] for site in sites])).eval()
    dora, generator = minireft.DoRA(mine, rank=3, sites=sites, **settings), torch.Generator().manual_seed(3)
    theirs = {}
    for site in sites:
        for layer in range(mine.config.layers):
            module = adapted.base_model.model.model.layers[layer].get_submodule(modules[site])
            for part, p in (("a", module.lora_A["default"].weight), ("b", module.lora_B["default"].weight),
                            ("m", module.lora_magnitude_vector["default"].weight)):
                p.data += STD * torch.randn(p.shape, generator=generator)
                dora.get_parameter(f"{site}_{part}").data[layer] = p.data
                theirs[f"{site}_{part}", layer] = p
    tokens, mask = prompts("left")
    expected = their_logits(adapted, tokens, mask)
    with dora:
        logits = mine(tokens, mask)
    assert (logits - expected)[mask].abs().max() <= TOLERANCE
    logits[mask].sin().sum().backward()
    expected[mask].sin().sum().backward()
    for (key, layer), p in theirs.items():
        torch.testing.assert_close(dora.get_parameter(key).grad[layer], p.grad, atol=1e-4, rtol=1e-3)


def largest(differences) -> float:
    return max(float(d.detach().abs().max()) for d in differences)


def test_mixed_batches_and_an_unmerge_with_a_zero_beside_theirs(tmp_path, capsys):
    """PEFT 0.21 takes adapter_names for (IA)³ and ignores them, unknown ones too; its unmerge divides. Measured, printed, and
    ours must be exact: a row of a mixed batch as its adapter alone, an unknown name an error, and the original bits again."""
    model, mine = both("llama", tmp_path / "base")
    folders, names = [tmp_path / name for name in "ab"], ("a", "b")
    for seed, folder in enumerate(folders):
        made = small.randomise(minireft.IA3(mine), seed, STD)
        made.key.data[0, 0] = -1.0                                        # a vector with a zero: l − 1 is stored
        ours.write(made, folder)
    adapted = peft.PeftModel.from_pretrained(model, folders[0], adapter_name="a")
    adapted.load_adapter(folders[1], "b")
    adapted.eval()
    tokens, _ = prompts("left", lengths=(7, 7))
    alone = {}
    with torch.no_grad():
        for name in names:
            adapted.set_adapter(name)
            alone[name] = adapted(tokens).logits
        theirs = largest(adapted(tokens, adapter_names=list(names)).logits[i] - alone[name][i] for i, name in enumerate(names))
        adapted.set_adapter("a")
        before = {name: p.clone() for name, p in adapted.named_parameters()}
        adapted.merge_adapter(["a"])
        adapted.unmerge_adapter()
    left = largest(p - before[name] for name, p in adapted.named_parameters())

    loaded = {name: minireft.load_adapter(mine, folder) for name, folder in zip(names, folders)}
    bank = minireft.Bank(loaded)
    with bank, torch.no_grad():
        mixed = mine(tokens, tasks=bank.ids(list(names)))
        with pytest.raises(ValueError, match="'nobody' is not in this bank"):
            bank.ids(["a", "nobody"])
    here = largest(mixed[i] - alone[name][i] for i, name in enumerate(names))
    bits = small.bits(mine)
    loaded["a"].merge()
    assert not small.same_bits(small.bits(mine), bits)
    loaded["a"].unmerge()
    with capsys.disabled():
        print(f"\nmixed batch against each alone: PEFT {theirs:.1e}, here {here:.1e}; weights after merge and unmerge: PEFT {left:.1e}, here 0")
    assert here <= TOLERANCE and here <= theirs + TOLERANCE and small.same_bits(small.bits(mine), bits)
