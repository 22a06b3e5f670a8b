"""ReFT: the formulas against float64 by hand, edits where they belong and nowhere else, R orthonormal whatever happens to it.

Run:  pytest tests/test_reft.py
See:  every variant, tied or not, under padding on either side, with the gradients of a slow loop over positions.
"""

import numpy as np
import plain
import pytest
import small
import torch

import minireft
from minireft import Cache, ConsReFT, DiReFT, LobiReFT, LoReFT, Model, ModelConfig, NoReFT, SteeringVector
from minireft.adapters import edits, orthonormal, reft, variants
from minireft.adapters.orthonormal import orthonormalise
from minireft.positions import Positions, prompt_span

VARIANTS = [LoReFT, DiReFT, NoReFT, ConsReFT, LobiReFT]


def phi(adapter, slot, k, h):
    """Φ(h) of one row h (C,) as the papers write it: set k of the edited place `slot`."""
    own = {name: p[slot, k] for name, p in adapter.named_parameters()}
    if "m" in own:                                                        # Gram–Schmidt gives the same R, by another road
        R = torch.stack(gram_schmidt(own["m"]))
    if type(adapter) is LoReFT:
        return h + R.T @ (own["w"] @ h + own["b"] - R @ h)
    if type(adapter) is DiReFT:
        return h + own["w2"].T @ (own["w1"] @ h + own["b"])
    if type(adapter) is NoReFT:
        return h + own["w2"].T @ (own["w1"] @ h + own["b"] - own["w2"] @ h)
    if type(adapter) is ConsReFT:
        return h + R.T @ (own["b"] - R @ h)
    return h + R.T @ own["b"]


def gram_schmidt(m):
    rows = []
    for row in m:
        for before in rows:
            row = row - (row @ before) * before
        rows.append(row / row.norm())
    return rows


def named(text, tokens, mask, lengths=None):
    """The (slot, position) pairs that each row edits."""
    where = Positions.parse(text)
    indices = where.indices(*prompt_span(tokens, mask, lengths), tokens.shape[1])
    return [[(slot, i) for slot, i in enumerate(row) if i >= 0] for row in indices.tolist()]


def around(model, adapter, site, *inputs):
    """What stands at a site before and after the adapter's edit, in one pass."""
    with torch.no_grad(), small.tapped(model, site) as beneath, adapter, small.tapped(model, site) as above:
        model(*inputs)
    return beneath[site].seen[0], above[site].seen[0]


# ---------------------------------------------------------------------------------------------------- what an edit computes

@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("kind", VARIANTS)
def test_the_formula_at_the_positions_and_nothing_elsewhere(kind, fused, tied):
    for side in ("left", "right"):
        tokens, mask = small.pad(small.rows([9, 4, 2, 1]), side, more=2)  # long, exact, short, one token
        model = small.model()
        adapter = small.randomise(kind(model, rank=3, layers=1, positions="f3+l1", tied=tied, dropout=0.0 if fused else 0.5))
        h, out = around(model, adapter, "blocks.1.output", tokens, mask)  # (B, T, C)
        wide, expected = adapter.double(), h.double()
        for b, pairs in enumerate(named("f3+l1", tokens, mask)):
            for slot, t in pairs:
                expected[b, t] = phi(wide, 0, 0 if tied or slot < 3 else 1, h[b, t].double()).detach()
        untouched = (expected == h).all(-1)
        assert torch.equal(out[untouched], h[untouched]) and untouched[~mask].all()
        assert untouched.sum() == 4 * tokens.shape[1] - (4 + 4 + 2 + 1)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_the_whole_model_with_edits_on_every_layer_against_the_plain_one():
    for name in small.CONFIGS:
        model = small.model(name, dtype=torch.float64)
        adapter = small.randomise(LoReFT(model, rank=2, positions="f2+l1", tied=False)).double()
        (ids,) = small.rows([6])

        def edit(layer, h):
            h = torch.tensor(h)
            for t, k in ((0, 0), (1, 0), (5, 1)):
                h[t] = phi(adapter, layer, k, h[t])
            return h.detach().numpy()
        with adapter, torch.no_grad():
            error = np.abs(model(ids[None])[0].numpy() - plain.logits(model, ids.tolist(), edit=edit)).max()
        assert error < 1e-4                                               # rotary angles are float32; see test_model.py


@pytest.mark.parametrize("site, name", [("attention_output", "blocks.1.attention.output"), ("ffn_output", "blocks.1.ffn.down"),
                                        ("query", "blocks.1.attention.query"), ("key", "blocks.1.attention.key"),
                                        ("value", "blocks.1.attention.value"), ("embed", "embed"), ("output", "blocks.1.output")])
def test_other_sites_edit_what_they_name(site, name):
    model, tokens = small.model(), torch.stack(small.rows([5, 5]))
    adapter = small.randomise(LoReFT(model, rank=3, positions="l2", site=site, layers="all" if site == "embed" else 1))
    before, after = around(model, adapter, name, tokens)
    assert torch.equal(before[:, :3], after[:, :3])
    for b, t in ((0, 3), (0, 4), (1, 3), (1, 4)):
        torch.testing.assert_close(after[b, t], phi(adapter, 0, 0, before[b, t]).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("kind", VARIANTS)
def test_gradients_are_those_of_a_slow_loop(kind, tied):
    """Short prompts, where a gather and scatter with repeated indices would count a position twice."""
    model = small.model(dtype=torch.float64, layers=2)
    adapter = small.randomise(kind(model, rank=2, positions="f3+l3", tied=tied)).double()
    tokens, mask = small.pad(small.rows([8, 5, 2, 1]), "left")
    aim = torch.randn(*tokens.shape, small.V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = list(adapter.parameters())

    def loss(logits):
        return (logits * aim)[mask].sum()
    with adapter:
        fast = torch.autograd.grad(loss(model(tokens, mask)), parameters)

    class Slow:
        adapter = None

        def __init__(self, slot):
            self.slot = slot

        def __call__(self, operation, context):
            def run(x):
                h = operation(x)
                rows = [[h[b, t] for t in range(h.shape[1])] for b in range(h.shape[0])]
                for b, pairs in enumerate(named("f3+l3", tokens, mask)):
                    for at, t in pairs:
                        rows[b][t] = phi(adapter, self.slot, 0 if tied or at < 3 else 1, rows[b][t])
                return torch.stack([torch.stack(row) for row in rows])
            return run
    for slot in range(2):
        model.blocks[slot].output.edits.append(Slow(slot))
    slow = torch.autograd.grad(loss(model(tokens, mask)), parameters)
    for name, f, s in zip(dict(adapter.named_parameters()), fast, slow):
        torch.testing.assert_close(f, s, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("side", ("left", "right"))
def test_only_the_prompt_is_edited(side):
    model, lengths = small.model(), torch.tensor([3, 1, 0, 5])
    tokens, mask = small.pad(small.rows([7, 4, 3, 5]), side, more=1)
    adapter = small.randomise(LoReFT(model, rank=2, positions="f2+l2", layers=2))
    before, after = around(model, adapter, "blocks.2.output", tokens, mask, lengths)
    changed = (before != after).any(-1)
    start = mask.long().argmax(1)
    expected = [{0, 1, 2}, {0}, set(), {0, 1, 3, 4}]
    for b, row in enumerate(changed):
        assert {i - start[b].item() for i in row.nonzero().flatten().tolist()} == expected[b]


def test_all_and_generated_positions_with_a_cache():
    model, tokens = small.model(dtype=torch.float64), torch.stack(small.rows([6, 6]))
    for positions, same in (("all+generated", True), ("all", False), ("f9+l9", False)):
        adapter = small.randomise(LoReFT(model, rank=2, positions=positions))
        with adapter, torch.no_grad():
            cache = Cache(model, 2, 6)
            pieces = torch.cat([model(tokens[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 6))], 1)
            assert torch.allclose(pieces, model(tokens, prompt_lengths=torch.tensor([4, 4])), atol=1e-6)
            assert torch.allclose(pieces, model(tokens), atol=1e-6) == same


def test_a_decoding_step_prepares_nothing_for_the_prompt():
    model, tokens = small.model(), torch.stack(small.rows([4]))
    adapter = LoReFT(model, positions="l1")
    assert adapter.prepare(tokens, None, None, None, past=4) is None and adapter.prepare(tokens, None, None, None, past=0) is not None


def test_strength_scales_the_edit_and_nothing_else():
    model, tokens = small.model(), torch.stack(small.rows([5]))
    for kind in (*VARIANTS, SteeringVector):
        adapter = kind(model, positions="all", layers=2)
        if kind is SteeringVector:
            adapter.vectors.fill_(0.5)
        small.randomise(adapter)

        def change(strength):
            adapter.strength = strength
            before, after = around(model, adapter, "blocks.2.output", tokens)
            return after - before
        whole = change(1.0)
        assert whole.abs().max() > 0.1 and change(0.0).eq(0).all()
        torch.testing.assert_close(change(0.5), 0.5 * whole, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(change(-2.0), -2.0 * whole, atol=1e-5, rtol=1e-4)


def test_dropout_and_activation_act_on_the_edit_alone():
    model, tokens = small.model(), torch.stack(small.rows([6] * 40))
    adapter = small.randomise(LoReFT(model, rank=3, positions="all", layers=2, dropout=0.5, activation="tanh", site="output"))
    R, (W, b) = adapter.rotations()[2], (adapter.w[0, 0].detach(), adapter.b[0, 0].detach())
    before, after = around(model, adapter, "blocks.2.output", tokens)                   # evaluation mode: no dropout
    edit = (torch.tanh(before @ W.T + b) - before @ R.T) @ R
    torch.testing.assert_close(after - before, edit, atol=1e-5, rtol=1e-4)
    model.train()
    torch.manual_seed(0)
    before, after = around(model, adapter, "blocks.2.output", tokens)
    edit, found = (torch.tanh(before @ W.T + b) - before @ R.T) @ R, after - before
    dropped = found.abs() < 1e-6
    torch.testing.assert_close(found[~dropped], 2 * edit[~dropped], atol=1e-4, rtol=1e-3)    # what is kept is doubled
    assert dropped.float().mean().item() == pytest.approx(0.5, abs=5 * (0.25 / edit.numel()) ** 0.5)    # five standard errors


# ------------------------------------------------------------------------------------------------------------ orthonormality

def condition(r, C, number, generator):
    """A matrix (r, C) whose singular values run from 1 to 1 / number."""
    U, _ = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(C, r, generator=generator, dtype=torch.float64))
    return U @ torch.diag(torch.logspace(0, -np.log10(number), r, dtype=torch.float64)) @ V.T


def apart(R):
    """The largest entry of R Rᵀ − I."""
    return (R.double() @ R.double().mT - torch.eye(R.shape[-2], dtype=torch.float64)).abs().max().item()


def test_orthonormalise_gives_orthonormal_rows_of_the_same_space():
    generator = torch.Generator().manual_seed(0)
    for r, C in ((1, 1), (1, 5), (3, 3), (8, 64), (4, 16)):
        m = torch.randn(2, 3, r, C, generator=generator)
        R = orthonormalise(m)
        assert R.dtype == m.dtype and R.shape == m.shape and apart(R) < 1e-6
        torch.testing.assert_close(m @ R.mT @ R, m, atol=1e-5, rtol=1e-5)                   # the projection onto R's rows keeps M
        torch.testing.assert_close(orthonormalise(1e-6 * m), R, atol=1e-6, rtol=0)          # whatever its scale
        torch.testing.assert_close(orthonormalise(1e6 * m), R, atol=1e-6, rtol=0)
        torch.testing.assert_close(orthonormalise(R), R, atol=1e-6, rtol=0)
        for a in range(2):
            for b in range(3):
                torch.testing.assert_close(R[a, b], torch.stack(gram_schmidt(m[a, b].double())).float(), atol=1e-4, rtol=0)
    for number in (1e1, 1e3, 1e4):
        m = condition(8, 256, number, generator).float()
        assert apart(orthonormalise(m)) < 5e-7                            # REFERENCE: all in float64, 4e-7


def test_orthonormalise_passes_gradcheck():
    generator = torch.Generator().manual_seed(1)
    m = torch.randn(2, 3, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(orthonormalise, m)


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_whole_edit_passes_gradcheck(kind):
    model = small.model(dtype=torch.float64, width=8, head_dim=4)
    adapter = small.randomise(kind(model, rank=2, layers=[0, 2], positions="f2+l1", tied=False)).double()
    names = [name for name, _ in adapter.named_parameters()]
    tokens, mask = small.pad(small.rows([4, 2]), "left")
    h = torch.randn(2, 4, 8, dtype=torch.float64)

    def edited(h, *values):
        def inside(h):
            (_, first), (_, second) = adapter.edits()
            context = {adapter: adapter.prepare(tokens, mask, None, None, 0)}
            return second(lambda x: x + 0, context)(first(lambda x: x + 0, context)(h))
        return torch.func.functional_call(Holder(adapter, inside), {f"adapter.{name}": value for name, value in zip(names, values)}, (h,))
    values = [p.detach().clone().requires_grad_() for p in adapter.parameters()]
    with minireft.ops.use("reference"):                                   # the compiled ones are held to it in test_ops.py
        assert torch.autograd.gradcheck(edited, (h.requires_grad_(), *values))


class Holder(torch.nn.Module):
    def __init__(self, adapter, inside):
        super().__init__()
        self.adapter, self.inside = adapter, inside

    def forward(self, h):
        return self.inside(h)


def trained(adapter, steps, **options):
    """Steps of AdamW on a loss that pulls hard on everything."""
    model, tokens = adapter.model, torch.stack(small.rows([6, 6]))
    optimizer = torch.optim.AdamW(adapter.parameters(), **options)
    with adapter:
        for _ in range(steps):
            optimizer.zero_grad()
            model(tokens).square().mean().backward()
            optimizer.step()
    return adapter


@pytest.mark.parametrize("kind", (LoReFT, ConsReFT, LobiReFT))
def test_training_with_weight_decay_keeps_R_orthonormal(kind, tmp_path):
    model = small.model()
    adapter = kind(model, rank=4, positions="f2+l2", tied=False)
    first = adapter.rotations()
    trained(adapter, 25, lr=0.1, weight_decay=5.0)                        # M halves with every step
    assert adapter.m.norm(dim=-1).max() < 2.0
    adapter.save(tmp_path / "a")
    again = minireft.load_adapter(model, tmp_path / "a")
    assert all(torch.equal(R, S) for R, S in zip(adapter.rotations().values(), again.rotations().values()))
    trained(again, 25, lr=0.1, weight_decay=5.0)
    for one in (adapter, again):
        assert max(map(apart, one.rotations().values())) < 1e-6
    moved = [(R - S).abs().max() for R, S in zip(first.values(), again.rotations().values())]
    assert min(moved) > 0.1                                               # R was trained, it did not merely stay


def test_weight_decay_alone_leaves_R_alone():
    adapter = LoReFT(small.model(), rank=4)
    before = adapter.rotations()
    for _ in range(50):
        with torch.no_grad():
            adapter.m.mul_(0.5)                                           # 2⁻⁵⁰ in all
    assert all(torch.allclose(R, before[layer], atol=1e-6) for layer, R in adapter.rotations().items())


def test_rotations_name_layers_and_parts():
    model = small.model()
    tied, untied = LoReFT(model, rank=2, layers=[0, 2]), LoReFT(model, rank=2, layers=[2], tied=False)
    assert list(tied.rotations()) == [0, 2] and list(untied.rotations()) == ["2 prefix", "2 suffix"]
    for adapter in (tied, untied):
        for R in adapter.rotations().values():
            assert R.shape == (2, 16) and apart(R) < 1e-6 and not R.requires_grad


def test_R_is_computed_once_a_pass_and_kept_while_nothing_changes(monkeypatch):
    calls = []

    def counted(m):
        calls.append(tuple(m.shape))
        return orthonormal.orthonormalise(m)
    monkeypatch.setattr(reft, "orthonormalise", counted)
    monkeypatch.setattr(variants, "orthonormalise", counted)
    model, tokens = small.model(), torch.stack(small.rows([6, 6]))
    for kind in (LoReFT, ConsReFT, LobiReFT):
        adapter = small.randomise(kind(model, rank=2, positions="f2+l2", tied=False)).attach()

        def count(run):
            calls.clear()
            run()
            return len(calls)
        shape = (3, 2, 2, 16)                                             # all layers and both parts in one call
        assert count(lambda: model(tokens).mean().backward()) == 1 and calls == [shape]
        assert count(lambda: model(tokens).mean().backward()) == 1
        with torch.no_grad():
            kept = model(tokens)
            assert count(lambda: model(tokens)) == 0
            assert count(lambda: minireft.generate(model, model.tokenizer, ["w1 w2", "w3"], max_new_tokens=5)) == 0
            adapter.m.mul_(2).add_(0.1)
            assert count(lambda: model(tokens)) == 1 and not torch.equal(model(tokens), kept)
            adapter.strength = 0.5
            changed = model(tokens)
            assert not torch.equal(changed, kept)
            adapter.load_state_dict({name: tensor + 0.2 for name, tensor in adapter.state_dict().items()})
            assert not torch.equal(model(tokens), changed)
        optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
        with torch.no_grad():
            before = model(tokens)
        optimizer.step()
        with torch.no_grad():
            assert not torch.equal(model(tokens), before)
        adapter.detach()


def test_a_bank_computes_each_R_once(monkeypatch):
    calls = []
    monkeypatch.setattr(reft, "orthonormalise", lambda m: calls.append(1) or orthonormal.orthonormalise(m))
    model, tokens = small.model(), torch.stack(small.rows([6, 6]))
    bank = minireft.Bank({"a": LoReFT(model, rank=2), "b": LoReFT(model, rank=3)})
    calls.clear()
    with bank:
        model(tokens, tasks=bank.ids(["a", "b"]))
    assert len(calls) == 2


# ------------------------------------------------------------------------------------------------ counts, refusals, gradients

def test_parameter_counts_of_the_papers():
    with torch.device("meta"):
        llama = Model(ModelConfig(vocab_size=32000, width=4096, layers=32, heads=32, hidden=11008, context=2048, tied=False))
    assert sum(p.numel() for p in llama.parameters()) == 6_738_415_616
    assert LoReFT(llama, rank=8, layers="all", positions="f7+l7", tied=True).num_parameters() == 2_097_408
    assert LoReFT(llama, rank=4, layers=[3, 9, 18, 24], positions="f5+l5", tied=False).num_parameters() == 262_176
    assert DiReFT(llama, rank=8, layers="all", positions="f7+l7").num_parameters() == 2_097_408


@pytest.mark.parametrize("options, words", [
    ({"rank": 0}, "rank is 0"), ({"rank": 17}, "rank is 17: .* 1 to the width, 16"), ({"rank": 2.0}, "rank is 2.0"), ({"rank": "4"}, "rank is '4'"),
    ({"rank": 9, "site": "key"}, "rank is 9: .* 8"), ({"layers": [3]}, r"layers are \[3\]"), ({"positions": "f7,l7"}, "positions are 'f7,l7'"),
    ({"init": "zero"}, "init is 'zero'"), ({"tied": False, "positions": "f3"}, "'f3' have no prefix and suffix"),
    ({"tied": False, "positions": "all"}, "'all' have no prefix and suffix"), ({"dropout": 1.0}, "dropout is 1.0"), ({"dropout": -0.1}, "dropout is -0.1"),
    ({"activation": "mish"}, "activation is 'mish'"), ({"site": "head"}, "site is 'head'"), ({"site": "embed", "layers": 1}, "layers are 1")])
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        LoReFT(small.model(), **options)


def test_the_family_itself_is_no_method():
    with pytest.raises(TypeError, match="take LoReFT, DiReFT"):
        reft.ReFT(small.model())


def test_edits_that_could_meet_are_refused():
    model = small.model()
    with LoReFT(model, layers=[0, 1], positions="f3+l2"):
        for other in (LoReFT(model, layers=[1, 2], positions="l1"), DiReFT(model, layers=1, positions="all"), LoReFT(model, positions="f1", rank=1)):
            with pytest.raises(ValueError, match="another ReFT edits output of layer [01].*f3\\+l2"):
                other.attach()
            assert not other.attached and len(model.adapters) == 1
        for other in (LoReFT(model, layers=2), LoReFT(model, layers=1, positions="all", site="query")):
            with other:
                assert len(model.adapters) == 2
    with LoReFT(model, layers=1, positions="f2"), LoReFT(model, layers=1, positions="2,3"):           # these never meet
        assert len(model.adapters) == 2


@pytest.mark.parametrize("lowest", (0, 1, 2))
def test_no_gradient_is_computed_below_the_lowest_site(lowest):
    model, tokens = small.model(), torch.stack(small.rows([5]))
    names = [f"blocks.{layer}.output" for layer in range(3)]
    with small.tapped(model, "embed", *names) as taps, small.randomise(LoReFT(model, layers=list(range(lowest, 3)))) as adapter:
        model(tokens).mean().backward()
    assert not taps["embed"].seen[0].requires_grad
    assert [taps[name].seen[0].requires_grad for name in names] == [layer > lowest for layer in range(3)]
    assert all(p.grad is not None for p in adapter.parameters()) and all(p.grad is None for p in model.parameters())


def test_half_precision_models_are_edited_in_fp32():
    """bf16 parameters would lose an edit as small as this: W − R of 1e-3 beside R."""
    model = small.model(dtype=torch.bfloat16)
    adapter = LoReFT(model, rank=2, layers=2, positions="all")
    with torch.no_grad():
        adapter.w.add_(1e-3 * torch.randn(adapter.w.shape, generator=torch.Generator().manual_seed(0)))
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    h = 300 * torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    prepared = adapter.prepare(torch.zeros(1, 3, dtype=torch.long), None, None, None, 0)
    with torch.no_grad():
        out = edits.Edit(adapter, 0)(lambda x: x.clone(), {adapter: prepared})(h)
        expected = torch.stack([phi(adapter.double(), 0, 0, row) for row in h[0].double()])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out[0].double(), expected, rtol=2**-8, atol=0)                # one rounding to bf16
    assert not torch.equal(out, h)
