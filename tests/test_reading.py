"""Reading tools: what they say against what a forward pass does.

Run:  pytest tests/test_reading.py
See:  states, promoted tokens and similarities of subspaces that are known beforehand.
"""

import pytest
import small
import torch

from minireft import DiReFT, LoReFT
from minireft.adapters.orthonormal import orthonormalise
from minireft.reading import project, promoted, similarity, states


def test_states_are_those_that_pass_edits_included():
    model = small.model()
    tokens, mask = small.pad(small.rows([6, 3]), "left")
    adapter = small.randomise(LoReFT(model, layers=[1]))
    for attached in (False, True):
        with torch.no_grad(), small.tapped(model, "blocks.2.output", "blocks.1.output") as beneath:
            if attached:
                adapter.attach()
            seen = states(model, tokens, 2, mask)
            assert torch.equal(seen, beneath["blocks.2.output"].seen[0])
            different = not torch.equal(states(model, tokens, 1, mask), beneath["blocks.1.output"].seen[-1])
            assert different is attached                                  # the edit stands on top of the tap
        R = orthonormalise(torch.randn(3, 16))
        torch.testing.assert_close(project(model, tokens, 2, R, mask), torch.einsum("btc,rc->btr", seen, R))
    adapter.detach()
    with pytest.raises(ValueError):
        states(model, tokens + 99, 1)
    assert not any(site.edits for site in model.sites().values())


@pytest.mark.parametrize("name", ["llama", "qwen", "gpt2", "neox"])
def test_promoted_is_what_a_small_step_along_the_direction_does(name):
    model, direction = small.model(name), torch.randn(16)
    up, down = promoted(model, model.tokenizer, direction, count=3)
    # Around a state of norm √C with nothing else along the direction, the norm's own change is of second order.
    away = torch.randn(16)
    away -= away.mean() if model.norm.bias is not None else 0
    d = direction - (direction.mean() if model.norm.bias is not None else 0)
    away = away - (away @ d) / (d @ d) * d
    away *= 4 / away.norm()

    def logits(step):
        with torch.no_grad():
            return model.head(model.norm((away + step * direction)[None, None].double().float(), context={}), context={})[0, 0].double()
    rise = (logits(1e-2) - logits(-1e-2)).argsort(descending=True).tolist()
    assert up == [model.tokenizer.decode([i]) for i in rise[:3]] and down == [model.tokenizer.decode([i]) for i in rise[::-1][:3]]
    assert promoted(model, model.tokenizer, -direction, count=3) == (down, up)


def test_similarity_of_subspaces_that_are_known():
    torch.manual_seed(0)
    R = orthonormalise(torch.randn(8, 64))
    turn = orthonormalise(torch.randn(3, 3))
    assert similarity(R[:3], R[:3]) == pytest.approx(1) and similarity(R[:3], turn @ R[:3]) == pytest.approx(1)
    assert similarity(R[:3], R[3:6]) == pytest.approx(0, abs=1e-6) and similarity(R[:4], R[2:6]) == pytest.approx(0.5)
    assert similarity(R[:2], R[:6]) == similarity(R[:6], R[:2]) == pytest.approx(1)        # one holds the other
    stretched = torch.tensor([[2.0, 1, 0], [0, 3, 1], [0, 0, 0.1]]) @ R[:3]                # no orthonormal rows, the same span
    assert similarity(stretched, R[:3]) == pytest.approx(1, abs=1e-4)
    chance = [similarity(orthonormalise(torch.randn(4, 64)), R[:4]) for _ in range(200)]
    assert sum(chance) / 200 == pytest.approx(4 / 64, rel=0.1)


def test_layers_and_tasks_compare():
    model = small.model()
    a, b = small.randomise(LoReFT(model, rank=2)), small.randomise(DiReFT(model, rank=3))
    table = [[similarity(x, y) for y in b.rotations().values()] for x in a.rotations().values()]
    assert all(0 <= value <= 1 + 1e-6 for row in table for value in row) and len(table) == len(table[0]) == 3
