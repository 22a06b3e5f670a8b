"""Measures of texts: against worked examples and slow definitions.

Run:  pytest tests/test_texts.py
See:  the counts of the papers' own examples, and properties that hold for any words.
"""

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minireft.tasks import texts

WORDS = st.lists(st.sampled_from("abc"), max_size=7)


def subsequences(words):
    return {tuple(words[i] for i in at) for n in range(len(words) + 1) for at in combinations(range(len(words)), n)}


@given(WORDS, WORDS)
def test_the_longest_common_subsequence_is_the_longest_of_all(a, b):
    assert texts.common(a, b) == texts.common(b, a) == max(map(len, subsequences(a) & subsequences(b)))


@given(WORDS, WORDS)
def test_rouge_l_is_the_harmonic_mean_of_precision_and_recall(a, b):
    value, longest = texts.rouge_l(a, b), texts.common(a, b)
    assert 0 <= value <= 1 and (value == 1) == (a == b)
    if longest:
        precision, recall = longest / len(a), longest / len(b)
        assert value == pytest.approx(2 * precision * recall / (precision + recall))
    else:
        assert value == (a == b == [])


def test_rouge_l_of_lin_s_example():
    """Lin 2004, section 3.1: police killed the gunman; both candidates share a bigram, and only the order tells them apart."""
    reference = "police killed the gunman".split()
    assert texts.rouge_l("police kill the gunman".split(), reference) == 0.75
    assert texts.rouge_l("the gunman kill police".split(), reference) == 0.5


def test_bleu_counts_as_papineni_does():
    """Papineni et al. 2002, section 2.1: seven times "the" has a modified unigram precision of 2/7."""
    the, reference = "the the the the the the the".split(), "the cat is on the mat".split()
    assert texts.bleu([the], [reference], most=1) == pytest.approx(2 / 7)
    assert texts.bleu([the], [reference]) == 0                            # no bigram is found
    short = "the cat is on".split()                                       # all its n-grams are there: brevity alone counts
    assert texts.bleu([short], [reference]) == pytest.approx(math.exp(1 - 6 / 4))
    a, b = "a b c d e".split(), "a b c x e".split()                       # 4/5, 2/4, 1/3, 0/2: and another pair without fault
    assert texts.bleu([a, a], [b, a]) == pytest.approx((9 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** 0.25)


@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=4, max_size=8), min_size=1, max_size=4))
def test_bleu_of_equal_texts_is_1_and_of_strangers_0(answers):
    assert texts.bleu(answers, answers) == pytest.approx(1)
    assert texts.bleu(answers, [["z"] * 5 for _ in answers]) == 0
    longer = [answer + ["z"] for answer in answers]
    assert 0 < texts.bleu(longer, answers) < 1                            # no brevity, less precision
    with pytest.raises(ValueError, match="references: expected one for each"):
        texts.bleu(answers, [])


def test_repetition_counts_within_an_answer():
    assert texts.repetition(["a b a b a".split()]) == 0.5                 # ab ba ab ba: two of four came before
    assert texts.repetition(["a b".split(), "a b".split()]) == 0          # in another answer it is no repetition
    assert texts.repetition(["a b a b a".split(), "c d e f g".split()]) == 0.25
    assert texts.repetition([["a"], []]) == 0


def test_log_diversity_of_known_counts():
    once, loop = "a b c d e f".split(), "a b a b a b".split()
    assert texts.log_diversity([once]) == pytest.approx(20)               # nothing repeats: the cap
    kept = (2 / 5) * (2 / 4) * (2 / 3)                                    # unique of all 2-, 3- and 4-grams
    assert texts.log_diversity([loop]) == pytest.approx(-math.log(1 - kept))
    assert texts.log_diversity([loop]) < texts.log_diversity([loop, once]) < texts.log_diversity([once])
