"""entailment: does a claim follow from a text, contradict it, or is it left open?
    python -c "from minireft import tasks; print(tasks.load('entailment', 'train', 2))"
You should see made-up facts, a claim, and right, wrong or unknown.

The base checks claims against notes in plain wordings. Here the text is not called a note, so the base answers by what
it knows of the world; half the claims are worded as no note is; and an unknown one comes close to the text, which gives
its value to another subject. Content key: subject and attribute of the claim.
"""

from ..data import Example
from .facts import WORDINGS
from .world import ATTRIBUTES

LABELS = ("right .", "wrong .", "unknown .")


def draw(random, world):
    (subject, name, _), *others = random.sample(world.facts, 4)
    attribute, label = ATTRIBUTES[name], random.choice(LABELS)
    value = random.choice(attribute.values)
    text = {(s, n): random.choice(ATTRIBUTES[n].values) for s, n, _ in others}
    text[random.choice([s for s in attribute.subjects if s != subject]), name] = value     # of another subject
    while len(text) > (3 if label == "unknown ." else 2):
        text.pop(next(iter(text)))
    if label != "unknown .":
        text[subject, name] = value if label == "right ." else random.choice([v for v in attribute.values if v != value])
    elif (subject, name) in text:
        return draw(random, world)
    lines = [random.choice(ATTRIBUTES[n].says).format(s=s, v=v) for (s, n), v in text.items()]
    random.shuffle(lines)
    wordings = (*attribute.says, *(f"{wording} {{v}}" for wording in WORDINGS[name]))
    hypothesis = random.choice(wordings).format(s=subject, v=value)
    return f"{subject} {name}", Example(f"text : {' . '.join(lines)} . claim : {hypothesis} .", label, LABELS)
