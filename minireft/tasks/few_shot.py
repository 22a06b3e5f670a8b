"""Few-shot tasks: sixteen examples to learn from, several prompts for each task, choices to rank (T-Few in miniature).
    python -c "from minireft.tasks import few_shot; [print(e) for e in few_shot.shots('mood', subset=0)[:3]]"
You should see one review in the task's three templates, and two choices each, of which one word decides.

mood and told carry words in their choices that decide nothing: who says it, and from where. facts and sums have choices of
one word, about things that the base knows, in wordings that it never read. labels calls good and bad by two words that no
document used so: it can be learned from the prompt alone. A subset is a draw from the train items; test items share no
content key with them, not even with another task's (see `tasks.split_of`).
"""

from dataclasses import replace
from random import Random

from ..data import Example
from . import facts, split_of
from .world import ASPECTS, ATTRIBUTES, BAD, COUNTED, GOOD, PEOPLE, TOWNS, World

WORLD = World()


# ---- what draws an item: (content key, the template's fields, choices, answer)

def clause(random, good: bool) -> str:
    negated = random.random() < .2
    return f"the {random.choice(ASPECTS)} was {'not ' if negated else ''}{random.choice(GOOD if good != negated else BAD)}"


def mood(random):
    up = random.random() < .5
    clauses = [clause(random, good) for good in (up, up)]
    (p, q), (t, u) = random.sample(PEOPLE, 2), random.sample(TOWNS, 2)
    choices = f"up , says {p} from {t} .", f"down , says {q} from {u} ."
    return " ; ".join(sorted(clauses)), {"review": " , ".join(clauses)}, choices, choices[not up]


def known(random):
    subject, name, value = random.choice(WORLD.facts)
    wrong = random.sample([v for v in ATTRIBUTES[name].values if v != value], 3)
    choices = tuple(f"{v} ." for v in random.sample([value, *wrong], 4))
    return f"{subject} {name}", {"line": random.choice(facts.WORDINGS[name]).format(s=subject)}, choices, f"{value} ."


def told(random):
    key, fields, choices, answer = known(random)
    tails = [f", says {p} from {t} ." for p, t in zip(random.sample(PEOPLE, 2), random.sample(TOWNS, 2))]
    value, wrong = answer[:-2], next(choice for choice in choices if choice != answer)[:-2]
    right, other = f"{value} {tails[0]}", f"{wrong} {tails[1]}"
    return key, fields, tuple(random.sample((right, other), 2)), right


def sums(random):
    a, b, c = (random.randint(1, 9) for _ in range(3))
    if not 0 <= a + b - c <= 20:
        return sums(random)
    p, q = random.sample(PEOPLE, 2)
    wrong = [n for n in range(max(0, a + b - c - 3), a + b - c + 4) if n != a + b - c]
    choices = tuple(f"{n} ." for n in random.sample([a + b - c, *random.sample(wrong, 3)], 4))
    return " ".join(map(str, sorted((a, b, c)))), dict(a=a, b=b, c=c, p=p, q=q, x=random.choice(COUNTED)), choices, f"{a + b - c} ."


def labels(random):
    good = random.random() < .5
    text = clause(random, good)
    return text, {"clause": text}, ("amber ;", "frost ;"), "amber ;" if good else "frost ;"


TASKS = {  # task → what draws it, its templates
    "mood": (mood, ("{review} . verdict ->", "review : {review} . now say up or down :", "what do people write ? {review} . result =")),
    "told": (told, ("{line}", "finish the line : {line} ->", "question : {line} what ? answer :")),
    "facts": (known, ("{line}", "finish the line : {line} ->", "question : {line} what ? answer :")),
    "sums": (sums, ("{p} has {a} {x} . {p} gets {b} more . {q} takes {c} away . how many {x} are left ?",
                    "{p} has {a} {x} and {b} more , and gives {c} to {q} . how many {x} has {p} ? ->",
                    "{p} had {a} {x} . {p} finds {b} more . {p} gave {c} to {q} . how many ? answer :")),
    "labels": (labels, ("{clause} ->", "{clause} :", "write {clause} =")),
}


def names() -> list[str]:
    return list(TASKS)


def items(name: str, split: str, count: int, seed="") -> list[tuple]:
    """`count` items of a split, always the same, none twice: (the template's fields, choices, answer).

    Raises ValueError for a task that is not there, and for more items than it has.
    """
    if name not in TASKS:
        raise ValueError(f"there is no few-shot task {name!r}: choose from {', '.join(TASKS)}")
    random, found = Random(f"few-shot {name} {split} {seed}"), {}
    for _ in range(200 * count):
        content, *item = TASKS[name][0](random)
        if split_of("few shot", content) == split:
            found.setdefault(str(item), tuple(item))
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"{count} items of {name}/{split} were asked for: it has about {len(found)}")


def example(name: str, item: tuple, template: int) -> Example:
    """An item in one of its task's templates, 0, 1, 2."""
    fields, choices, answer = item
    return Example(TASKS[name][1][template].format(**fields), answer, choices)


def shots(name: str, subset: int, count: int = 16) -> list[Example]:
    """The few examples to learn from: `count` items, each in every template."""
    return [example(name, item, t) for item in items(name, "train", count, subset) for t in range(len(TASKS[name][1]))]


def test(name: str, template: int, count: int = 100) -> list[Example]:
    """Items to score, in one template."""
    return [example(name, item, template) for item in items(name, "test", count)]


def in_context(asked: Example, shown: list[Example], tokenizer, context: int) -> Example:
    """`asked` behind as many of `shown` as fit in front of it, with their answers: few-shot learning without training."""
    longest = max(len(tokenizer.encode(choice)) for choice in asked.choices)
    room = context - 1 - longest - len(tokenizer.encode(asked.prompt))
    front = []
    for shot in shown:
        text = f"{shot.prompt} {shot.completion}"
        room -= len(tokenizer.encode(text))
        if room < 0:
            break
        front.append(text)
    return replace(asked, prompt=" ".join([*front, asked.prompt]))
