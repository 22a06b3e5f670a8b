"""arithmetic: stories of three numbers, two steps and unread wordings.
    python -c "from minireft import tasks; print(tasks.load('arithmetic', 'train', 2))"
You should see short stories that end in a question, and a number.

The base can add, subtract and double, and can follow plainer stories; here it must see which numbers count, and how.
Content key: the three numbers in order of size, so no split shares its operands with another, whatever the story.
"""

from ..data import Example
from .world import COUNTED, NUMBERS, PEOPLE

STORIES = {  # story → the answer from its numbers a, b, c
    "{p} packs {a} {x} and {b} {y} . {q} takes {c} away . how many are left": lambda a, b, c: a + b - c,
    "{p} counts {a} {x} , {q} counts {b} {x} and {c} {y} . how many {x} are there": lambda a, b, c: a + b,
    "{p} has {a} {x} left , {b} are lost and {q} took {c} . how many had {p}": lambda a, b, c: a + b + c,
    "{p} had {a} {x} . {q} had {b} less . then {q} found {c} . how many has {q}": lambda a, b, c: a - b + c,
    "{p} bought two packs of {a} {x} . {q} took {b} and lost {c} . how many has {p}": lambda a, b, c: 2 * a - b,
    "{p} gave {a} {x} to {q} , {b} to a friend and still has {c} . how many did {p} give away": lambda a, b, c: a + b,
}


def draw(random, world):
    story, answer = random.choice(list(STORIES.items()))
    while True:
        a, b, c = numbers = [random.randint(1, 9) for _ in range(3)]
        if 0 <= (result := answer(a, b, c)) <= 20 and (b <= a or "less" not in story):
            break
    (p, q), (x, y) = random.sample(PEOPLE, 2), random.sample(COUNTED, 2)
    prompt = story.format(p=p, q=q, x=x, y=y, a=a, b=b, c=c) + " ? ->"
    return " ".join(map(str, sorted(numbers))), Example(prompt, f"{result} .", tuple(f"{n} ." for n in NUMBERS))
