"""mood: is a review more good than bad, more bad than good, or even? With negations, and clauses that count twice.
    python -c "from minireft import tasks; print(tasks.load('mood', 'train', 2))"
You should see reviews of three to six clauses, and up, down or even.

The base read shorter reviews of two moods; here it must weigh clause against clause, and "very" weighs double. Content
key: the clauses, sorted.
"""

from ..data import Example
from .world import ASPECTS, BAD, GOOD, PEOPLE

VERDICTS = ("up .", "down .", "even .")


def draw(random, world):
    verdict = random.choice(VERDICTS)
    while True:
        goods = [random.random() < .5 for _ in range(random.randint(3, 6))]
        weights = [random.choice((1, 1, 2)) for _ in goods]
        balance = sum(weight if good else -weight for good, weight in zip(goods, weights))
        if verdict == ("up ." if balance > 0 else "down ." if balance < 0 else "even ."):
            break
    clauses = []
    for good, weight, aspect in zip(goods, weights, random.sample(ASPECTS, len(goods))):
        negated = random.random() < .3
        word = random.choice(GOOD if good != negated else BAD)
        clauses.append(f"the {aspect} was {'not ' if negated else ''}{'very ' if weight == 2 else ''}{word}")
    review = clauses[0]
    for before, good, clause in zip(goods, goods[1:], clauses[1:]):
        review += f" {',' if before == good else 'but'} {clause}"
    prompt = f"{random.choice(PEOPLE)} wrote : {review} . verdict ->"
    return " ; ".join(sorted(clauses)), Example(prompt, verdict, VERDICTS)
