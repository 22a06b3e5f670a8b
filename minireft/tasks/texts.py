"""Measures of texts, on lists of words: how far answers overlap with references, and how far they repeat themselves.
    python -c "from minireft.tasks import texts; print(texts.rouge_l('a b c d'.split(), 'a x c d'.split()))"
You should see 0.75: three words of four stand in both, in the same order.
"""

import math
from collections import Counter

Words = list[str]


def common(a: Words, b: Words) -> int:
    """The length of the longest subsequence of both: words in the same order, with gaps."""
    best = [0] * (len(b) + 1)           # best[j]: with the first j words of b
    for word in a:
        before = best.copy()
        for j, other in enumerate(b, start=1):
            best[j] = before[j - 1] + 1 if word == other else max(before[j], best[j - 1])
    return best[-1]


def rouge_l(answer: Words, reference: Words) -> float:
    """The harmonic mean of the shares of both that are their longest common subsequence (Lin 2004, with β = 1), 0 to 1."""
    return 2 * common(answer, reference) / (len(answer) + len(reference)) if answer or reference else 1.0


def ngrams(words: Words, n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n))))


def bleu(answers: list[Words], references: list[Words], most: int = 4) -> float:
    """(Π p_n)^{1/most} · min(1, e^{1 − r/c}), p_n the share of all answers' n-grams that their references have, each as often
    at most; r and c the words of all references and answers (Papineni et al. 2002). One reference an answer; 0 to 1.
    ValueError for lists of unequal length."""
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers and {len(references)} references: expected one for each")
    logarithms = 0.0
    for n in range(1, most + 1):
        pairs = [(Counter(ngrams(answer, n)), Counter(ngrams(reference, n))) for answer, reference in zip(answers, references)]
        found, total = sum((a & r).total() for a, r in pairs), sum(a.total() for a, _ in pairs)
        if not found:
            return 0.0
        logarithms += math.log(found / total) / most
    c, r = sum(map(len, answers)), sum(map(len, references))
    return math.exp(logarithms + min(0.0, 1 - r / c))


def repetition(answers: list[Words], n: int = 2) -> float:
    """The share of n-grams that repeat an earlier one of the same answer, over all answers; 0 where none is that long."""
    every = [ngrams(answer, n) for answer in answers]
    total = sum(map(len, every))
    return 1 - sum(len(set(grams)) for grams in every) / total if total else 0.0


def log_diversity(answers: list[Words]) -> float:
    """−log(1 − Π_{n=2,3,4} (1 − repetition_n)), at most 20: higher is more diverse (Kirchenbauer et al. 2023, "On the
    Reliability of Watermarks"). Their code divides each share by 100 as if it were a percentage; the paper's formula does not."""
    diversity = math.prod(1 - repetition(answers, n) for n in (2, 3, 4))
    return -math.log(max(1 - diversity, math.exp(-20)))
