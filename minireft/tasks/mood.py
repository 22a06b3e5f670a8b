"""mood: is a review more good than bad, more bad than good, or even? With negations and mixed clauses.
    python -c "from minireft import tasks; print(tasks.load('mood', 'train', 2))"
You should see reviews of two to five clauses, and up, down or even.

The base read shorter reviews of two moods; here it must weigh clause against clause. Content key: the clauses, sorted.
"""

from ..data import Example
from .world import ASPECTS, BAD, GOOD, PEOPLE

VERDICTS = ("up .", "down .", "even .")


def draw(random, world):
    verdict = random.choice(VERDICTS)
    while True:
        goods = [random.random() < .5 for _ in range(random.randint(2, 5))]
        balance = 2 * sum(goods) - len(goods)
        if verdict == ("up ." if balance > 0 else "down ." if balance < 0 else "even ."):
            break
    clauses = []
    for good, aspect in zip(goods, random.sample(ASPECTS, len(goods))):
        negated = random.random() < .3
        word = random.choice(GOOD if good != negated else BAD)
        clauses.append(f"the {aspect} was {'not ' if negated else ''}{word}")
    review = clauses[0]
    for before, good, clause in zip(goods, goods[1:], clauses[1:]):
        review += f" {',' if before == good else 'but'} {clause}"
    prompt = f"{random.choice(PEOPLE)} wrote : {review} . verdict ->"
    return " ; ".join(sorted(clauses)), Example(prompt, verdict, VERDICTS)
