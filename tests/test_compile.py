"""The same result by every way of running: compiled in one graph, in half precision, in pieces, recomputed.

Run:  pytest tests/test_compile.py                # -m slow adds the compiler that writes C++
See:  losses and gradients of the plain run: to the bit where the arithmetic is the same, otherwise within stated rounding.
"""

import pytest
import small
import torch

import minireft
from minireft import (IA3, Bank, ConsReFT, DiReFT, Example, LobiReFT, LoRA, LoReFT, NEFTune, NoReFT, SteeringVector, TrainConfig)
from minireft.adapters.compose import Subspace
from minireft.losses import cross_entropy

MAKERS = {
    "untied": lambda m: [LoReFT(m, rank=3, positions="f2+l1", tied=False)],
    "of all": lambda m: [DiReFT(m, rank=2, positions="all+generated")],
    "listed": lambda m: [NoReFT(m, rank=2, positions="0,2"), LobiReFT(m, rank=1, positions="1")],
    "of constants": lambda m: [ConsReFT(m, rank=2), SteeringVector(m, torch.ones(3, 24), site="query")],
    "a slice": lambda m: [Subspace(LoReFT(m, rank=4), [1, 3])],
    "(IA)3": lambda m: [IA3(m, sites=("key", "value", "ffn", "attention_output"), layer_norm=True)],
    "several": lambda m: [LoReFT(m, layers=[0, 2]), LoRA(m, rank=2, sites="all"), IA3(m), NEFTune(m)],
    "a bank of ReFTs": lambda m: [Bank({"a": LoReFT(m, rank=2, positions="f1+l2", tied=False), "b": DiReFT(m, rank=3, layers=[1]),
                                        "c": LoReFT(m, rank=1, positions="all")})],
    "a bank of (IA)3": lambda m: [Bank({"a": IA3(m), "b": IA3(m, sites="query"), "c": IA3(m, sites="ffn")})],
    "a bank of LoRAs": lambda m: [Bank({"a": LoRA(m, rank=2), "b": LoRA(m, rank=3, sites="up"), "c": LoRA(m, rank=1)})],
}


def standing(name, dtype=torch.float32):
    """A model in training mode with the adapters on it, the adapters, and a batch for them."""
    model = small.model("qwen", dtype=dtype).train()
    torch.manual_seed(5)
    adapters = [small.randomise(adapter, seed, std=0.1).attach() for seed, adapter in enumerate(MAKERS[name](model))]
    tokens, mask = small.pad(small.rows([6, 3, 8, 5]))
    tasks = torch.tensor([2, 0, -1, 1]) if isinstance(adapters[0], Bank) else None
    return model, adapters, (tokens, mask, torch.tensor([4, 2, 6, 3]), tasks)


def gradients(run, adapters, batch):
    """The loss of one step, and the gradient of every parameter by name."""
    tokens, mask, lengths, _ = batch
    for adapter in adapters:
        adapter.begin(0)                                                  # the same noise again
    answer = mask & (torch.arange(tokens.shape[1]) >= lengths[:, None])
    loss = cross_entropy(run(*batch), tokens, answer)
    named = {f"{i} {name}": p for i, adapter in enumerate(adapters) for name, p in adapter.named_parameters()}
    return loss.item(), dict(zip(named, torch.autograd.grad(loss, named.values())))


def agree(found, expected, rounding):
    """Losses, and gradients in norm, within a relative error."""
    assert found[0] == pytest.approx(expected[0], rel=rounding, abs=rounding)
    assert found[1].keys() == expected[1].keys()
    for name, g in expected[1].items():
        assert g.norm() > 0 and (found[1][name] - g).norm() <= rounding * g.norm(), name


FEW = ("untied", "several", "a bank of ReFTs", "a bank of (IA)3")         # a graph takes seconds to trace


@pytest.mark.parametrize("name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in MAKERS])
def test_compiled_in_one_graph(name):
    model, adapters, batch = standing(name)
    expected = gradients(model, adapters, batch)
    torch._dynamo.reset()
    agree(gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), adapters, batch), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_compiled_to_machine_code_also_for_other_lengths(name):
    model, adapters, batch = standing(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for cut in (8, 7, 6):
        shorter = (batch[0][:, :cut], batch[1][:, :cut], batch[2].clamp(max=cut - 3), batch[3])
        agree(gradients(compiled, adapters, shorter), gradients(model, adapters, shorter), 1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_recomputing_blocks_changes_no_bit(name):
    model, adapters, batch = standing(name)
    expected = gradients(model, adapters, batch)
    model.recompute = True
    found = gradients(model, adapters, batch)
    assert found[0] == expected[0] and all(torch.equal(g, found[1][n]) for n, g in expected[1].items())


def test_recomputing_draws_the_same_dropout():
    model, adapters, batch = standing("untied")
    adapters[0].detach()
    adapter = small.randomise(LoReFT(model, rank=3, dropout=0.5), std=0.1).attach()
    found = []
    for model.recompute in (False, True):
        torch.manual_seed(1)
        found.append(gradients(model, [adapter], batch))
    assert found[0][0] == found[1][0] and all(torch.equal(g, found[1][1][n]) for n, g in found[0][1].items())


@pytest.mark.parametrize("name", MAKERS)
def test_half_precision_is_as_near_as_its_base_alone(name):
    """Weights in bf16, or autocast: no further from the float32 run than a few roundings to 8 bits, parameters in float32."""
    model, adapters, batch = standing(name)
    expected = gradients(model, adapters, batch)

    def autocast(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return model(*inputs)
    half_model, half_adapters, _ = standing(name, torch.bfloat16)
    for one, other in zip(adapters, half_adapters):
        other.load_state_dict(one.state_dict())
    for found in (gradients(autocast, adapters, batch), gradients(half_model, half_adapters, batch)):
        assert all(g.dtype == torch.float32 for g in found[1].values())
        agree(found, expected, 0.15)


def test_pieces_make_the_same_step():
    """Accumulation, recomputation and both, against the plain run; autocast within its rounding."""
    examples = [Example(" ".join(f"w{(i * j) % 20}" for j in range(2 + i % 4)), " ".join([f"w{i}"] * (1 + i % 3))) for i in range(12)]

    def trained(**options):
        model = small.model()
        torch.manual_seed(2)
        adapters = [LoReFT(model, rank=2), NEFTune(model)]
        run = minireft.train(model, adapters, examples, TrainConfig(steps=5, batch_size=6, **options), model.tokenizer, progress=False)
        return run.losses, adapters[0].w.detach()
    losses, w = trained()
    for options in ({"accumulate": 2}, {"accumulate": 6}, {"recompute": True}, {"accumulate": 3, "recompute": True}):
        again, v = trained(**options)
        assert again == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(v, w, atol=2e-4, rtol=1e-3)
    assert trained(bf16=True)[0] == pytest.approx(losses, rel=2e-2)
