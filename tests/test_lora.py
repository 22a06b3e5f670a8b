"""LoRA: W + (α/r) B A at every Linear, and nothing at the start.

Run:  pytest tests/test_lora.py
See:  the adapted model against the plain one with the sum written into its weights.
"""

import numpy as np
import plain
import pytest
import small
import torch

from minireft import LoRA, Model, ModelConfig

LINEARS = {"query", "key", "value", "attention_output", "gate", "up", "ffn_output"}


@pytest.mark.parametrize("name", small.CONFIGS)
def test_agrees_with_the_sum_written_into_the_weights(name):
    (ids,) = small.rows([6])
    for sites, rank, alpha in (("all", 3, 16), (("query", "value"), 2, 1.5), ("ffn_output", 16, 4)):
        model = small.model(name, dtype=torch.float64, layers=2)
        lora = small.randomise(LoRA(model, rank=rank, alpha=alpha, sites=sites)).double()
        own = {key: p.detach().numpy() for key, p in lora.named_parameters()}
        delta = {site: [alpha / rank * own[f"{site}_b"][layer] @ own[f"{site}_a"][layer] for layer in range(2)] for site in lora.sites}
        with lora, torch.no_grad():
            error = np.abs(model(ids[None])[0].numpy() - plain.logits(model, ids.tolist(), delta=delta)).max()
        assert error < 1e-4                                               # rotary angles are float32; see test_model.py


def test_all_means_every_linear_of_a_block():
    assert set(LoRA(small.model("llama"), sites="all").sites) == LINEARS
    assert set(LoRA(small.model("gpt2"), sites="all").sites) == LINEARS - {"gate"}


def test_starts_with_b_zero_and_a_drawn():
    lora = LoRA(small.model(), rank=4, sites="all")
    for name, p in lora.named_parameters():
        if name.endswith("_b"):
            assert p.eq(0).all()
        else:                                                             # as torch draws a Linear: U(−1/√in, 1/√in)
            assert p.std() > 0.4 / p.shape[-1] ** 0.5 and p.abs().max() <= p.shape[-1] ** -0.5


def test_parameter_counts():
    with torch.device("meta"):
        model = Model(ModelConfig(vocab_size=32000, width=4096, layers=32, heads=32, kv_heads=8, hidden=14336, context=2048))
    assert LoRA(model, rank=8).num_parameters() == 32 * 8 * ((4096 + 4096) + (4096 + 1024))
    assert LoRA(model, rank=2, sites="all").num_parameters() == 32 * 2 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))


def test_gradients_pass_gradcheck():
    model = small.model(dtype=torch.float64, layers=1, width=8, head_dim=2, hidden=6, positions="learned")
    lora = small.randomise(LoRA(model, rank=2, sites="all")).double()
    tokens = torch.stack(small.rows([3]))
    names = [name for name, _ in lora.named_parameters()]

    def logits(*values):
        context = {lora: {site: (values[names.index(f"{site}_a")] * 8, values[names.index(f"{site}_b")]) for site in lora.sites}}
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(1, 3, 8)
        return model.blocks[0].ffn.up(x, context=context) + model.blocks[0].ffn.gate(x, context=context)
    with lora:
        assert torch.autograd.gradcheck(logits, [p.detach().clone().requires_grad_() for p in lora.parameters()])
        model(tokens).square().mean().backward()
    assert all(p.grad is not None for p in lora.parameters()) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("options, words", [
    ({"rank": 0}, "rank is 0"), ({"rank": 17}, "rank is 17"), ({"rank": 1.5}, "rank is 1.5"), ({"sites": "head"}, "site 'head'"),
    ({"sites": ("query", "kv")}, "site 'kv'"), ({"sites": []}, "at least one"), ({"alpha": float("nan")}, "alpha is nan"), ({"alpha": "16"}, "alpha is '16'")])
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        LoRA(small.model(), **options)


def test_a_plain_feed_forward_has_no_gate():
    with pytest.raises(ValueError, match="site 'gate' is unknown here"):
        LoRA(small.model("gpt2"), sites="gate")
