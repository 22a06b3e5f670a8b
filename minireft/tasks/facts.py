"""facts: multiple choice about what the base knows, in wordings that it never read (commonsense in miniature).
    python -c "from minireft import tasks; print(tasks.load('facts', 'train', 2))"
You should see lines to finish, with four options each.

The wrong options are chosen so that knowing the subject is not enough: one is true of it under another attribute, one
is a wrong value of the right attribute, one is neither. Content key: the subject, so test asks about others than train.
"""

from ..data import Example
from .world import ATTRIBUTES

WORDINGS = {  # each ends where the value is to stand
    "home": ("a letter to {s} goes to", "to visit {s} you travel to"),
    "job": ("people pay {s} for work as a", "{s} is trained as a"),
    "pet": ("{s} takes a walk with the", "{s} buys food for the"),
    "taste": ("{s} wants a new wall in", "the flag of {s} would be"),
    "drink": ("{s} fills the cup with", "when thirsty {s} sips"),
    "instrument": ("at the party {s} performs on the", "{s} needs a lesson on the"),
    "colour": ("a picture of the {s} needs paint in", "on the picture the {s} would be"),
    "place": ("to get the {s} you walk into the", "the {s} stays on a shelf in the"),
    "kind": ("a shop puts the {s} next to every other", "the {s} is left over as a"),
}


def draw(random, world):
    subject, name, answer = random.choice(world.facts)
    known = [world.value[subject, other] for other in world.known[subject] if other != name]
    same = [value for value in ATTRIBUTES[name].values if value != answer]
    values = set(ATTRIBUTES[name].values)
    other = random.choice([n for n in ATTRIBUTES if not values & set(ATTRIBUTES[n].values)])
    pool = [value for value in ATTRIBUTES[other].values if value not in known]
    options = [answer, random.choice(same), random.choice(known or same), random.choice(pool)]
    if len(set(options)) < 4:
        return draw(random, world)
    random.shuffle(options)
    line = random.choice(WORDINGS[name]).format(s=subject)
    prompt = f"finish the line : {line} ? {options[0]} , {options[1]} , {options[2]} or {options[3]} ->"
    return subject, Example(prompt, f"{answer} .", tuple(f"{option} ." for option in options))
