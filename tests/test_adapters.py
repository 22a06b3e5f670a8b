"""What every adapter promises: nothing changes at the start, nothing is left behind, a file gives it back to the bit.

Run:  pytest tests/test_adapters.py
See:  each kind of adapter on each kind of model, alone and together, attached, detached, saved, loaded and compiled.
"""

import itertools
import json
import random

import pytest
import small
import torch

from minireft import (IA3, RED, Bank, Bottleneck, ConsReFT, DiReFT, DoRA, LobiReFT, LoRA, LoReFT, NEFTune, NoReFT, SteeringVector, load_adapter)
from minireft.adapters.base import fingerprint, same_base
from minireft.files import read_tensors, write_tensors

MAKERS = {                              # one of each kind, with no option at its default where there is a choice
    "LoReFT": lambda m: LoReFT(m, rank=3, layers=[0, 2], positions="f2+l1", tied=False),
    "LoReFT paper": lambda m: LoReFT(m, rank=2, positions="all+generated", init="paper", site="ffn_output"),
    "LoReFT activation": lambda m: LoReFT(m, rank=2, positions="l3", dropout=0.3, activation="tanh", init="paper", site="query"),
    "DiReFT": lambda m: DiReFT(m, rank=1, layers=1, positions="0,-1"),
    "NoReFT": lambda m: NoReFT(m, rank=2, positions="f3"),
    "ConsReFT": lambda m: ConsReFT(m, rank=2, positions="l2"),
    "LobiReFT": lambda m: LobiReFT(m, rank=2, site="embed"),
    "SteeringVector": lambda m: SteeringVector(m, torch.randn(2, 16), layers="0,1"),
    "IA3": lambda m: IA3(m, sites=("value", "ffn", "query", "ffn_output"), init_scale=0.1, layer_norm=True),
    "LoRA": lambda m: LoRA(m, rank=2, alpha=7, sites=("key", "up", "attention_output")),
    "DoRA": lambda m: DoRA(m, rank=2, alpha=7, sites=("key", "up", "attention_output"), norm_gradient=True),
    "Bottleneck": lambda m: Bottleneck(m, width=3, activation="tanh", scale=0.7),
    "Bottleneck, parallel": lambda m: Bottleneck(m, width=3, form="parallel", activation="silu"),
    "RED": lambda m: RED(m, site="output"),
    "NEFTune": lambda m: NEFTune(m, alpha=2.5, length="padded", distribution="gaussian", seed=3),
    "Bank": lambda m: Bank({"a": LoReFT(m, rank=2, positions="f1"), "b": LoReFT(m, rank=1, layers=2, positions="l2")}),
}
IDENTITY = {
    "LoReFT": lambda m: LoReFT(m, rank=4, positions="f2+l2"),
    "LoReFT untied": lambda m: LoReFT(m, rank=4, positions="f2+l2", tied=False),
    "LoReFT of full rank": lambda m: LoReFT(m, rank=16, positions="all"),
    "LoReFT with dropout": lambda m: LoReFT(m, rank=4, dropout=0.5),
    "LoReFT on queries": lambda m: LoReFT(m, rank=4, site="query"),
    "LoReFT on the embedding": lambda m: LoReFT(m, rank=4, site="embed", positions="all"),
    "DiReFT": lambda m: DiReFT(m, positions="all"),
    "NoReFT": lambda m: NoReFT(m, positions="all"),
    "LobiReFT": lambda m: LobiReFT(m, positions="all"),
    "IA3": lambda m: IA3(m),
    "IA3 everywhere": lambda m: IA3(m, sites=("key", "value", "ffn", "query", "attention_output", "ffn_output"), layer_norm=True),
    "LoRA": lambda m: LoRA(m, sites="all"),
    "DoRA": lambda m: DoRA(m, sites="all"),
    "Bottleneck": lambda m: Bottleneck(m),
    "Bottleneck, parallel": lambda m: Bottleneck(m, form="parallel"),
    "RED": lambda m: RED(m),
    "NEFTune": lambda m: NEFTune(m, alpha=50.0),
    "Bank": lambda m: Bank({"a": LoReFT(m), "b": LoReFT(m, rank=2)}),
}


def batch():
    return small.pad(small.rows([3, 7, 1]), "left")


def logits(model, training=False):
    tokens, mask = batch()
    banked = any(isinstance(adapter, Bank) for adapter in model.adapters)
    with torch.no_grad():
        return model(tokens, mask, tasks=torch.tensor([1, 0, -1]) if banked else None)


@pytest.mark.parametrize("name", small.CONFIGS)
@pytest.mark.parametrize("kind", IDENTITY)
def test_the_start_is_the_identity_to_the_bit(kind, name):
    for dtype in (torch.float32, torch.bfloat16):
        model = small.model(name, dtype=dtype)
        before = logits(model)
        with IDENTITY[kind](model):
            assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", MAKERS)
def test_attached_it_works_and_detached_nothing_is_left(kind):
    model = small.model()
    before, weights, names = logits(model), small.bits(model), list(model.state_dict())
    adapter = small.randomise(MAKERS[kind](model))
    assert torch.equal(logits(model), before)                             # making one attaches nothing
    adapter.attach()
    if kind != "NEFTune":
        assert not torch.allclose(logits(model), before, atol=1e-3)
    assert list(model.state_dict()) == names and not any(p.requires_grad for p in model.parameters())
    adapter.detach()
    assert torch.equal(logits(model), before) and small.same_bits(small.bits(model), weights)
    assert model.adapters == [] and all(site.edits == [] for site in model.sites().values())


@pytest.mark.parametrize("name", ("gemma", "gpt2"))                       # learned positions: rotary ones are turned in float32
@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind not in ("NEFTune", "SteeringVector")])
def test_gradients_against_finite_differences(kind, name):
    model, (tokens, mask), step = small.model(name, dtype=torch.float64), batch(), 1e-6
    adapter = small.randomise(MAKERS[kind](model)).double()
    parameters, tasks = list(adapter.parameters()), torch.tensor([1, 0, -1]) if kind == "Bank" else None
    for training in (False, True) if kind != "LoReFT activation" else (False,):             # that one has dropout
        model.train(training)                                             # the fused activations stand in training only
        with adapter:
            def loss():
                return model(tokens, mask, tasks=tasks)[mask].sin().sum()
            gradients = torch.autograd.grad(loss(), parameters)
            for p, g in zip(parameters, gradients):
                direction = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
                with torch.no_grad():
                    p.add_(step * direction)
                    above = loss()
                    p.sub_(2 * step * direction)
                    below = loss()
                    p.add_(step * direction)
                slope = ((above - below) / (2 * step)).item()
                assert (g * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-6) and slope != 0


def test_several_stand_together_and_leave_in_any_order():
    shuffle = random.Random(0)
    for _ in range(12):
        model = small.model()
        adapters = [small.randomise(make(model), seed) for seed, make in enumerate((
            lambda m: LoReFT(m, layers=[0, 1]), lambda m: DiReFT(m, layers=2, positions="l1"), lambda m: LoRA(m, sites="all"),
            lambda m: IA3(m, sites=("key", "ffn", "query")), lambda m: IA3(m, sites=("value", "ffn", "query")), lambda m: NEFTune(m)))]
        shuffle.shuffle(adapters)
        for adapter in adapters:
            adapter.attach()
        remaining = list(adapters)
        while remaining:
            leaving = shuffle.choice(remaining)
            leaving.detach()
            remaining.remove(leaving)
            standing = logits(model)
            for adapter in remaining:                                     # the same ones, put on anew
                adapter.detach()
            for adapter in remaining:
                adapter.attach()
            assert torch.equal(logits(model), standing)
        assert torch.equal(logits(model), logits(small.model()))


def test_edits_of_one_site_apply_in_the_order_of_attachment():
    model, (row,) = small.model(), small.rows([4])
    ia3, lora = small.randomise(IA3(model, sites="query")), small.randomise(LoRA(model, rank=2, alpha=2, sites="query"))
    site, l = model.blocks[0].attention.query, 1 + ia3.query[0]
    x = torch.randn(1, 4, 16)
    beside = x @ lora.query_a[0].T @ lora.query_b[0].T

    def run(*order):
        for adapter in order:
            adapter.attach()
        context = {adapter: adapter.prepare(row[None], None, None, None, 0) for adapter in order}
        out = site(x, context=context)
        for adapter in order:
            adapter.detach()
        return out
    torch.testing.assert_close(run(ia3, lora), site(x, context={}) * l + beside)
    torch.testing.assert_close(run(lora, ia3), (site(x, context={}) + beside) * l)


def test_a_with_statement_detaches_after_an_exception_too():
    model = small.model()
    before, adapter = logits(model), small.randomise(LoReFT(model))
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            with adapter:
                assert adapter.attached
                raise error
        assert not adapter.attached and torch.equal(logits(model), before)
    with adapter:
        adapter.detach()                                                  # leaving early is allowed
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", MAKERS)
def test_attaching_twice_and_detaching_what_is_not_there_are_errors(kind):
    model = small.model()
    adapter = MAKERS[kind](model)
    with pytest.raises(ValueError, match="is not attached"):
        adapter.detach()
    with adapter:
        with pytest.raises(ValueError, match="attached already"):
            adapter.attach()
        assert model.adapters == [adapter]


# ------------------------------------------------------------------------------------------------------ saving and loading

@pytest.mark.parametrize("kind", MAKERS)
def test_a_file_gives_it_back_to_the_bit(kind, tmp_path):
    model = small.model()
    adapter = small.randomise(MAKERS[kind](model))
    path = tmp_path / "new folder" / "adapter.safetensors"
    adapter.save(path)
    loaded = load_adapter(model, path)
    assert type(loaded) is type(adapter) and loaded.options == adapter.options and not loaded.attached and model.adapters == []
    assert small.same_bits(small.bits(loaded), small.bits(adapter))
    outputs = []
    for one in (adapter, loaded):
        model.train()                                                     # NEFTune speaks; dropout is the one thing that is drawn
        torch.manual_seed(0)
        with one:
            outputs.append(logits(model))
    assert torch.equal(*outputs)
    loaded.save(tmp_path / "again.safetensors")
    (tensors, metadata), (tensors_again, metadata_again) = read_tensors(path), read_tensors(tmp_path / "again.safetensors")
    assert small.same_bits(tensors, tensors_again) and metadata == metadata_again


@pytest.mark.parametrize("name, slowed", [*((name, None) for name in small.CONFIGS), ("llama", (4.0, 1.0, 4.0, 16))])    # Llama 3.1's is a tuple
def test_another_base_is_refused_unless_forced(name, slowed, tmp_path):
    base = small.model(name, rotary_scaling=slowed)
    adapter = small.randomise(LoReFT(base))
    adapter.save(tmp_path / "a")
    other = small.model(name, seed=1, rotary_scaling=slowed)
    with pytest.raises(ValueError, match="made for another base.*weights in embed.weight.*force=True"):
        load_adapter(other, tmp_path / "a")
    forced = load_adapter(other, tmp_path / "a", force=True)
    assert small.same_bits(small.bits(forced), small.bits(adapter))
    forced.save(tmp_path / "b")                                           # it remembers the base that it was made for
    assert load_adapter(base, tmp_path / "b").options == adapter.options
    for changed in ({"layers": 4}, {"norm_eps": 1e-4}, {"rotary_base": 7.0}, {"rotary_scaling": (2.0, 1.0, 4.0, 16)}):
        with pytest.raises(ValueError, match=f"its base has {list(changed)[0]}"):
            load_adapter(small.model(name, **{"rotary_scaling": slowed, **changed}), tmp_path / "a")
    with pytest.raises(ValueError, match="does not fit this model"):
        load_adapter(small.model(name, width=20, head_dim=4), tmp_path / "a", force=True)


def test_one_changed_matrix_makes_another_base(tmp_path):
    base = small.model()
    LoReFT(base).save(tmp_path / "a")
    for name, parameter in base.named_parameters():
        other = small.model()
        with torch.no_grad():
            other.get_parameter(name).mul_(1.05)
        with pytest.raises(ValueError, match=f"other weights in {name}"):
            load_adapter(other, tmp_path / "a")


def test_the_same_base_in_another_dtype_is_accepted(tmp_path):
    for there, here in itertools.permutations((torch.float32, torch.bfloat16, torch.float64), 2):
        LoReFT(small.model(dtype=there)).save(tmp_path / "a")
        adapter = load_adapter(small.model(dtype=here), tmp_path / "a")
        assert all(p.dtype == torch.float32 for p in adapter.parameters())


def test_a_base_without_weights_makes_no_fingerprint():
    with torch.device("meta"):
        model = small.Model(small.ModelConfig(**small.SHAPE))
    assert fingerprint(model) is None and same_base(None, fingerprint(small.model())) == ""


def test_bad_files_are_refused_in_one_sentence(tmp_path):
    model, path = small.model(), tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_adapter(model, path)
    adapter = LoReFT(model)
    adapter.save(path)
    whole, (tensors, metadata) = path.read_bytes(), read_tensors(path)
    for damaged in (b"", b"not a file of tensors", whole[:20], whole[: len(whole) // 2], whole[:-1], b"\xff" * 8 + whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="a.safetensors"):
            load_adapter(model, path)
    changes = [{"format": "other"}, {"kind": "Unknown"}, {"options": "{"}, {"options": '{"rank": 99}'}, {"options": '{"ranks": 4}'},
               {"options": "[]"}, {"base": "{"}, {"base": '{"config": 3}'}, {"kind": "LoRA"}]
    for change in changes:
        write_tensors(path, tensors, {**metadata, **change})
        with pytest.raises(ValueError):
            load_adapter(model, path)
    for name in metadata:
        if name != "version":
            write_tensors(path, tensors, {key: value for key, value in metadata.items() if key != name})
            with pytest.raises(ValueError, match="a.safetensors"):
                load_adapter(model, path)
    write_tensors(path, {**tensors, "more": tensors["b"]}, metadata)
    with pytest.raises(ValueError, match="does not fit this model"):
        load_adapter(model, path)


def test_saving_where_nothing_can_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = small.model(), tmp_path / "a.safetensors"
    LoReFT(model).save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("minireft.files.os.fsync", full)
    with pytest.raises(OSError, match="cannot write .*a.safetensors: No space left on device; nothing was changed"):
        small.randomise(LoReFT(model)).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(OSError, match="cannot write"):
        LoReFT(model).save(path / "inside a file")


# ---------------------------------------------------------------------------------------------------------------- the rest

def test_trainable_parameters_are_printed(capsys):
    model = small.model()
    LoReFT(model, rank=2, positions="f1").print_trainable_parameters()
    base = sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out == f"trainable parameters: 198 of a base of {base:,} ({198 / base:.4%})\n"


@pytest.mark.parametrize("layers, picked", [("all", [0, 1, 2]), (1, [1]), ([2, 0], [0, 2]), ("2,0", [0, 2]), ((0,), [0]), (range(2), [0, 1])])
def test_layers_are_picked(layers, picked):
    assert LoReFT(small.model(), layers=layers).layers == picked


@pytest.mark.parametrize("layers", [3, -1, [0, 3], "0,3", [], "", "last", [0, 0], None, [None], 1.5, [1.5], "1.5", "0,"])
def test_wrong_layers_are_named(layers):
    with pytest.raises(ValueError, match="layers are") as error:
        LoReFT(small.model(), layers=layers)
    assert repr(layers) in str(error.value)


def test_compiled_first_attached_and_detached_later_is_honoured():
    """Where a hook would be ignored. Gradients, and every kind, are compiled in test_compile.py."""
    model, (tokens, mask) = small.model(layers=1), batch()
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    quiet = fast(tokens, mask)
    torch.testing.assert_close(quiet, model(tokens, mask), atol=1e-5, rtol=1e-5)
    for adapter in (small.randomise(LoReFT(model)), small.randomise(IA3(model)), NEFTune(model, alpha=50.0)):
        model.train(isinstance(adapter, NEFTune))
        with adapter:
            adapter.begin(4)
            expected = model(tokens, mask)
            adapter.begin(4)
            torch.testing.assert_close(fast(tokens, mask), expected, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(expected, quiet, atol=1e-3)
        model.eval()
        torch.testing.assert_close(fast(tokens, mask), quiet, atol=1e-5, rtol=1e-5)
