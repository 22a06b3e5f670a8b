"""The oracle itself, against arithmetic done by hand: loops, published numbers, and autograd for the written gradients.
Run: pytest tests/test_reference.py
You should see each formula agree with its slow spelling, and Philox with the vectors its authors published.
"""

import math

import pytest
import torch

from minireft import reference


def case(dtype=torch.float64, K=None):
    generator = torch.Generator().manual_seed(3)
    bank = () if K is None else (K,)
    h, down, up, bias = (torch.randn(*s, generator=generator, dtype=dtype) for s in (
        (3, 7, 10), (*bank, 4, 10), (*bank, 4, 10), (*bank, 4)))
    return h, torch.tensor([[0, 6, -1], [3, -1, -1], [2, 1, 5]]), down, up, bias


def test_low_rank_edit_is_the_papers_equation():
    h, _, W, R, b = case()
    R = torch.linalg.qr(R.T)[0].T                                                 # orthonormal rows
    for b_, t in ((0, 0), (2, 5)):
        x = h[b_, t]
        by_hand = x + R.T @ (W @ x + b - R @ x)
        torch.testing.assert_close(reference.low_rank_edit(h, W - R, R, b)[b_, t], by_hand)
    out = reference.low_rank_edit(h, W - R, R, b)
    torch.testing.assert_close(out @ R.T, h @ W.T + b)                            # what LoReFT says: R Φ(h) = W h + b
    assert torch.equal(reference.low_rank_edit(h, 0 * W, R, 0 * b), h)


@pytest.mark.parametrize("tasks", [None, torch.tensor([1, -1, 2]), torch.tensor([[1, 0, 2], [2, -1, 0], [1, 1, -1]])])
def test_edit_at_positions_is_one_row_at_a_time(tasks):
    h, positions, *weights = case(K=None if tasks is None else 3)
    out, expected = reference.low_rank_edit_at(h, positions, *weights, tasks), h.clone()
    for b, row in enumerate(positions.tolist()):
        for p, t in enumerate(row):
            k = 0 if tasks is None else int(tasks.view(3, -1).expand(3, 3)[b, p])
            if t >= 0 and k >= 0:
                w = weights if tasks is None else [v[k] for v in weights]
                expected[b, t] = reference.low_rank_edit(h[b, t], *w)
    torch.testing.assert_close(out, expected)
    untouched = (expected == h).all(-1)
    assert untouched.sum() >= 15 and torch.equal(out[untouched], h[untouched])
    assert reference.low_rank_edit_at_(h, positions, *weights, tasks) is h and torch.equal(h, out)


@pytest.mark.parametrize("tasks", [None, torch.tensor([1, -1, 1]), torch.tensor([[1, 0, 2], [2, -1, 0], [1, 1, -1]])])
def test_written_gradients_are_those_of_autograd(tasks):
    def agree(function, backward, leaves, *rest):
        leaves = [t.clone().requires_grad_() for t in leaves]
        out = function(*leaves, *rest)
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
        for a, b in zip(torch.autograd.grad(out, leaves, g), backward(g, *leaves, *rest), strict=True):
            torch.testing.assert_close(a, b)

    h, positions, *weights = case(K=None if tasks is None else 3)
    if tasks is None:
        agree(reference.low_rank_edit, reference.low_rank_edit_backward, (h, *weights))
    agree(lambda h, *w: reference.low_rank_edit_at(h, positions, *w, tasks),
          lambda g, h, *w: reference.low_rank_edit_at_backward(g, h, positions, *w, tasks), (h, *weights))
    if tasks is None or tasks.dim() == 1:
        x, up, l = h, h.flip(0), torch.randn(*(() if tasks is None else (3,)), 10, dtype=h.dtype)
        agree(reference.scale, reference.scale_backward, (x, l), tasks)
        agree(reference.gelu_scale, reference.gelu_scale_backward, (x, l), tasks)
        agree(reference.gelu_scale, reference.gelu_scale_backward, (x, l), tasks, "tanh")
        agree(reference.swiglu_scale, reference.swiglu_scale_backward, (x, up, l), tasks)


def test_scales_stand_behind_the_activation_and_spare_rows_without_a_task():
    x, l = torch.linspace(-2, 2, 12, dtype=torch.float64).view(3, 4), torch.full((1, 4), -1.0, dtype=torch.float64)
    tasks = torch.tensor([0, -1, 0])
    gelu = torch.tensor([[v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in x.tolist()], dtype=torch.float64)
    sign = torch.tensor([[-1.0], [1.0], [-1.0]], dtype=torch.float64)
    torch.testing.assert_close(reference.gelu_scale(x, l, tasks), sign * gelu)    # gelu(l x) would be another number
    torch.testing.assert_close(reference.swiglu_scale(x, x, l, tasks), sign * x * x / (1 + (-x).exp()))
    assert torch.equal(reference.scale(x, l, tasks), sign * x)


def test_results_round_once_to_the_dtype_of_the_activations():
    h, _, down, up, bias = case(torch.float32)
    half = reference.low_rank_edit(h.bfloat16(), down, up, bias)
    assert torch.equal(half, reference.low_rank_edit(h.bfloat16().float(), down, up, bias).bfloat16())


@pytest.mark.parametrize("counter, key, words", [      # Random123's kat_vectors for philox4x32-10
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1])])
def test_philox_gives_the_published_words(counter, key, words):
    assert [int(w) for w in reference.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])] == words


def test_noise_has_the_size_of_the_paper_and_depends_on_the_counter_alone():
    ids, weight, seed = torch.zeros(8, 200, dtype=torch.long), torch.zeros(1, 64), torch.tensor([7, 3])
    noise = reference.noisy_embedding(ids, weight, 5.0, seed)
    size = 5 / math.sqrt(200 * 64)
    assert noise.abs().max() <= size and abs(noise.mean()) < 4 * size / math.sqrt(3 * noise.numel())
    assert abs(noise.var() / (size ** 2 / 3) - 1) < 0.02                          # α² / (3 T C)
    normal = reference.noisy_embedding(ids, weight, 5.0, seed, distribution="gaussian")
    assert abs(normal.std() / size - 1) < 0.02
    for other in (torch.tensor([8, 3]), torch.tensor([7, 4])):
        assert abs((reference.noisy_embedding(ids, weight, 5.0, other) * noise).mean() / noise.var()) < 0.02
    assert abs((noise[0] * noise[1]).mean() / noise.var()) < 0.05 and abs((noise[:, :-1] * noise[:, 1:]).mean() / noise.var()) < 0.02
    assert torch.equal(noise, reference.noisy_embedding(ids, weight, 5.0, seed)) and torch.equal(
        reference.noisy_embedding(ids, weight, 5.0, 7), reference.noisy_embedding(ids, weight, 5.0, torch.tensor([7, 0])))


def test_padding_packing_and_micro_batches_do_not_change_the_noise():
    weight, seed = torch.randn(50, 24), torch.tensor([1, 2])
    a, b = torch.arange(6), torch.arange(20, 24)
    alone = [reference.noisy_embedding(doc[None], weight, 5.0, seed, lengths=torch.tensor([len(doc)]), rows=torch.tensor([row]))[0]
             for doc, row in ((a, 4), (b, 9))]
    ids = torch.zeros(2, 6, dtype=torch.long)
    ids[0], ids[1, :4] = a, b
    right = reference.noisy_embedding(ids, weight, 5.0, seed, lengths=torch.tensor([6, 4]), rows=torch.tensor([4, 9]))
    assert torch.equal(right[0], alone[0]) and torch.equal(right[1, :4], alone[1])
    assert torch.equal(right[1, 4:], weight[ids[1, 4:]])                          # padding stays without noise
    ids[1] = torch.cat([torch.zeros(2, dtype=torch.long), b])
    left = reference.noisy_embedding(ids, weight, 5.0, seed, lengths=torch.tensor([6, 4]), rows=torch.tensor([4, 9]),
                                     index=torch.stack([torch.arange(6), torch.arange(6) - 2]))
    assert torch.equal(left[1, 2:], alone[1]) and torch.equal(left[1, :2], weight[ids[1, :2]])
    packed = reference.noisy_embedding(
        torch.cat([a, b])[None], weight, 5.0, seed, lengths=torch.tensor([[6] * 6 + [4] * 4]),
        rows=torch.tensor([[4] * 6 + [9] * 4]), index=torch.cat([torch.arange(6), torch.arange(4)])[None])
    assert torch.equal(packed[0], torch.cat(alone))


def test_positions_named_twice_or_outside_are_refused():
    h, _, *weights = case()
    for positions, words in (([[1, 1]], "got 1 twice in row 0"), ([[0, 7]], "got 7"), ([[-2, 0]], "got -2")):
        with pytest.raises(ValueError, match=words):
            reference.low_rank_edit_at(h[:1], torch.tensor(positions), *weights)
