"""The kernel ladder of tutorials/kernels: every version against the reference in the emulator, and every count as its header predicts.

Run:  pytest tests/test_ladder.py
See:  each version touches fewer sectors than the one before, until the library's own kernel; a dropped barrier or tail is found.
"""

import shutil

import pytest
import torch

from minireft import reference
from tutorials.kernels.ladder import ORDERS, VERSIONS, Rung, least_sectors

pytestmark = [pytest.mark.emulator, pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs a C++ compiler, g++")]
SHAPES = [(1, 1, 1), (5, 36, 3), (9, 33, 9), (3, 301, 2), (4, 1028, 8), (2, 64, 17)]      # N, C, r: odd widths, rows and ranks


def problem(N, C, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h, down, up, bias = (torch.randn(*shape, generator=generator) for shape in ((N, C), (r, C), (r, C), (r,)))
    return h, down / C**0.5, up / r**0.5, bias


def wrong(rung, order="forward", seed=1) -> list:
    """The shapes at which it errs by more than twice what plain float32 errs, or two roundings."""
    found = []
    for shape in SHAPES:
        inputs = problem(*shape)
        exact = reference.low_rank_edit(*(t.double() for t in inputs))
        budget = 2 * max((torch.addmm(inputs[0], torch.addmm(inputs[3], inputs[0], inputs[1].T), inputs[2]) - exact).norm(), 2**-24 * exact.norm())
        if not (rung(*inputs, order=order, seed=seed) - exact).norm() <= budget:            # NaN is an error
            found.append(shape)
    return found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_the_reference(version, order):
    assert not wrong(Rung(version), order, seed=7)


def test_every_count_is_as_predicted():
    """Sectors of eight floats: of h and the output, and of D and A. What the headers say, and nothing else is touched but δ's bias."""
    N, C, r = 64, 256, 8
    row, weights = N * C // 8, 2 * r * C // 8                             # sectors of all rows, of D and A
    predicted = {"v1": 8 * (r + 2) * row + 8 * weights * N // 32, "v2": (r + 2) * row + weights * N, "v3": 3 * row + weights * N,
                 "v4": 3 * row + weights * N // 4, "v5": 2 * row + weights * N // 4, "v6": 3 * row + weights * N // 4}
    counted = {version: Rung(version).count(*problem(N, C, r)) for version in VERSIONS}
    for version, sectors in predicted.items():
        assert sectors <= counted[version]["sectors"] <= 1.02 * sectors, version
    ladder = [counted[version]["sectors"] for version in ("v1", "v2", "v3", "v4", "v5")]
    assert ladder == sorted(ladder, reverse=True) and ladder[-1] > least_sectors(N, C, r)
    assert counted["v1"]["used"] < 0.15 * 32 * counted["v1"]["sectors"] and counted["v2"]["used"] > 0.98 * 32 * counted["v2"]["sectors"]
    assert counted["v2"]["instructions"] > 3.9 * counted["v3"]["instructions"]
    assert counted["v6"]["bank conflicts"] == counted["v5"]["bank conflicts"] == 0
    assert counted["v6"]["shuffles"] < 0.5 * counted["v4"]["shuffles"]    # scatter_sum


@pytest.mark.parametrize("version, old, new", [
    ("v4", "    __syncthreads();  // all shares are there, and all have done with the δ before\n", ""), ("v5", "    __syncthreads();  // δ is there, and nobody reads the shares any more\n", ""),
    ("v2", "c = lane; c < p.C; c += 32) {", "c = lane; c + 32 <= p.C; c += 32) {"), ("v3", "sum[j] = over_warp(sum[j])", "sum[j] = sum[j]"),
    ("v1", "load(p.bias + j)", "0"), ("v4", "(j0 ? p.out : p.h)", "p.h"), ("v5", "if (i < rows && c < p.C) store", "if (i < rows && c + V < p.C) store")])
def test_a_wrong_version_is_found(version, old, new):
    text = VERSIONS[version].read_text()
    assert text.count(old) == 1
    rung = Rung(version, text.replace(old, new))
    assert any(wrong(rung, order, seed) for order in ORDERS for seed in (1, 2))


def test_the_trace_says_who_touched_what_and_who_waited():
    body = "SHARED(float, s, 64); const int i = threadIdx.x; store(s + i, load(p.h + i)); __syncthreads(); store(p.out + i, load(s + 63 - i));"
    for order in ORDERS:
        events = Rung.small(body, threads=64).trace(torch.arange(64.0)[None], order=order)
        assert len(events) == 5 * 64 and [e.bytes for e in events].count(0) == 64
        assert all(e.address == 4 * e.thread for e in events if e.store and e.bytes)              # of s, and of out
        assert all(e.address == 4 * (63 - e.thread) for e in events if e.shared and not e.store)
        arrivals = [i for i, e in enumerate(events) if not e.bytes]
        assert max(arrivals) < min(i for i, e in enumerate(events) if e.shared and not e.store)   # nobody passes before all have come


def test_mistakes_are_named():
    h, down, up, bias = problem(2, 8, 1)
    with pytest.raises(ValueError, match="no version 'v9': expected one of v1, v2"):
        Rung("v9")
    with pytest.raises(ValueError, match="contiguous float32"):
        Rung("v1")(h.double(), down, up, bias)
    with pytest.raises(RuntimeError, match="v5 keeps its rows in registers"):
        Rung("v5")(*problem(1, 4100, 1))
    with pytest.raises(RuntimeError, match="does not compile"):
        Rung("v1", "nonsense")
