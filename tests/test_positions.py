"""Positions: strings that are understood or refused, and indices that name every prompt token at most once, never padding.

Run:  pytest tests/test_positions.py
See:  the rule for short prompts against the examples of the formula, and as a property of every length and padding.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minireft.positions import Positions, prompt_span


def at(text, n, T=None, start=0):
    """What `text` names in one row of n prompt tokens that begin at `start`, −1 left out: (prefix, suffix) or all in a list."""
    where = Positions.parse(text)
    (row,) = where.indices(torch.tensor([start]), torch.tensor([n]), T or start + n).tolist()
    if where.all or where.listed:
        return [i for i in row if i >= 0]
    return [i for i in row[: where.first] if i >= 0], [i for i in row[where.first :] if i >= 0]


@pytest.mark.parametrize("text, found", [
    ("f7+l7", Positions(7, 7)), ("f3", Positions(3, 0)), ("l1", Positions(0, 1)), ("f12+l1", Positions(12, 1)),
    ("all", Positions(all=True)), ("all+generated", Positions(all=True, generated=True)),
    ("0,3,-1", Positions(listed=(0, 3, -1))), ([0, -2], Positions(listed=(0, -2))), ((5,), Positions(listed=(5,))),
    ("4", Positions(listed=(4,))), (4, Positions(listed=(4,)))])
def test_strings_that_are_understood(text, found):
    assert Positions.parse(text) == found
    assert Positions.parse(str(found)) == found == Positions.parse(found)            # what is saved is what was asked for


@pytest.mark.parametrize("text", ["", "f", "l", "f+l", "+", "f7+", "+l7", "l7+f7", "f7l7", "f7 + l7", "F7", "f-1", "f1.5", "f7+l7+l7",
                                  "first", "every", "all+", None, 1.5, True, [], [1, 1], "2,2", [0.5], ["f7"], [None], "f7\n"])
def test_other_strings_are_refused_by_name(text):
    with pytest.raises(ValueError, match="positions are") as error:
        Positions.parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["f0", "l0", "f0+l3", "f3+l0"])
def test_a_count_of_nothing_is_refused(text):
    with pytest.raises(ValueError, match=f"'{text.replace('+', '.')}': a count must be at least 1"):
        Positions.parse(text)


@pytest.mark.parametrize("text, n, prefix, suffix", [
    ("f7+l7", 5, [0, 1], [2, 3, 4]), ("f2+l10", 11, [0, 1], list(range(2, 11))), ("f3+l5", 8, [0, 1, 2], [3, 4, 5, 6, 7]),
    ("f1", 1, [0], []), ("f4", 2, [0, 1], []), ("f7+l7", 20, list(range(7)), list(range(13, 20))), ("l1", 6, [], [5]),
    ("f10+l2", 11, list(range(9)), [9, 10]), ("f7+l7", 1, [], [0]), ("f7+l7", 0, [], []), ("l4", 2, [], [0, 1])])
def test_short_prompts_as_documented(text, n, prefix, suffix):
    assert at(text, n) == (prefix, suffix)
    assert at(text, n, T=n + 5, start=3) == ([i + 3 for i in prefix], [i + 3 for i in suffix])


@given(p=st.integers(0, 9), s=st.integers(0, 9), n=st.integers(0, 25), start=st.integers(0, 4), after=st.integers(0, 4))
def test_every_token_once_and_in_order(p, s, n, start, after):
    if p + s == 0:
        return
    where = Positions(p, s)
    indices = where.indices(torch.tensor([start]), torch.tensor([n]), start + n + after)
    assert indices.shape == (1, p + s) and indices.dtype == torch.int64
    prefix, suffix = ([i - start for i in part if i >= 0] for part in (indices[0, :p].tolist(), indices[0, p:].tolist()))
    assert prefix == list(range(len(prefix)))                             # the prefix begins at the first token
    assert suffix == list(range(n - len(suffix), n))                      # the suffix ends at the last
    assert len(prefix) + len(suffix) == min(n, p + s)                     # nothing twice, nothing left out
    if p + s <= n:
        assert (len(prefix), len(suffix)) == (p, s)
    else:                                                                 # each part gets its half, or all that it asked for
        assert len(prefix) >= min(p, n // 2) and len(suffix) >= min(s, n // 2)


@given(listed=st.lists(st.integers(-6, 6), min_size=1, max_size=6, unique=True), n=st.integers(0, 8), start=st.integers(0, 3))
def test_listed_indices_each_token_once(listed, n, start):
    found = at(listed, n, T=start + n + 2, start=start)
    assert found == list(dict.fromkeys(start + (i if i >= 0 else i + n) for i in listed if -n <= i < n))


def test_all_takes_the_prompt_and_nothing_else():
    assert at("all", 4, T=9, start=2) == [2, 3, 4, 5] and at("all", 0, T=3) == []


@given(st.data())
def test_may_meet_says_whether_some_prompt_has_both(data):
    some = st.one_of(st.builds(Positions, st.integers(1, 3), st.integers(0, 3)), st.builds(Positions, st.just(0), st.integers(1, 3)),
                     st.builds(lambda x: Positions(listed=tuple(x)), st.lists(st.integers(-3, 3), min_size=1, max_size=3, unique=True)),
                     st.just(Positions(all=True)))
    a, b = data.draw(some), data.draw(some)

    def named(where, n):
        return {i for i in where.indices(torch.tensor([0]), torch.tensor([n]), n)[0].tolist() if i >= 0}
    meets = any(named(a, n) & named(b, n) for n in range(1, 12))
    assert a.may_meet(b) == b.may_meet(a)
    assert a.may_meet(b) or not meets                                     # a meeting is never missed


@pytest.mark.parametrize("a, b, meet", [("f2", "2", False), ("0,1", "2,3", False), ("-1", "-2", False), ("f2", "l1", True),
                                        ("f3", "2", True), ("l3", "-3", True), ("l3", "-4", False), ("0", "-1", True), ("9", "all", True)])
def test_positions_that_never_meet_may_stand_on_one_layer(a, b, meet):
    assert Positions.parse(a).may_meet(Positions.parse(b)) is meet


def test_groups_tell_prefix_from_suffix():
    assert Positions(2, 3).groups().tolist() == [0, 0, 1, 1, 1]


def test_prompt_span_counts_real_tokens_from_the_first_real_one():
    tokens = torch.zeros(4, 6, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    for lengths, expected in ((None, [4, 3, 6, 0]), (torch.tensor([2, 2, 9, 1]), [2, 2, 6, 0]), (torch.tensor([-1, 0, 3, 3]), [0, 0, 3, 0])):
        start, n = prompt_span(tokens, mask, lengths)
        assert start.tolist() == [0, 3, 0, 0] and n.tolist() == expected
    start, n = prompt_span(tokens, None, torch.tensor([1, 2, 3, 9], dtype=torch.int32))
    assert start.tolist() == [0, 0, 0, 0] and n.tolist() == [1, 2, 3, 6]
