"""instructions: requests with many right answers, and a program that checks whether an answer obeys.
    python -c "from minireft import tasks; print(tasks.load('instructions', 'train', 5))"
You should see requests such as "please name 3 animals but not the dog . end with thanks . ->".

Content key: what is asked for (the words, the list, the subject, the aspects), so a test request is a new one.
"""

import re

from ..data import Example
from .world import ASPECTS, ATTRIBUTES, BAD, CONTENT, DICTIONARY, GOOD, KINDS, PEOPLE, PLURALS, World

KIND_OF = {plural: kind for kind, plural in PLURALS.items()}
WORLD = World()


def draw(random, world):
    request, content, body = random.choice((say, say, listing, telling, lines))(random)
    prompt, answer = f"please {request} .", body
    if random.random() < .4:
        prompt, answer = f"{prompt} start with sure .", f"sure : {answer}"
    if random.random() < .4:
        prompt, answer = f"{prompt} end with thanks .", f"{answer} thanks"
    return content, Example(f"{prompt} ->", f"{answer} .")


def say(random):
    """Words to say backwards, two times, or in the second language."""
    how = random.choice(("backwards", "two times", "in the other language"))
    words = random.sample(list(DICTIONARY) if how.endswith("language") else CONTENT, random.randint(2, 5))
    return f"say {' '.join(words)} {how}", " ".join(sorted(words)), " ".join(SAID[how](words))


def listing(random):
    """Two to five things of a kind, without one of them."""
    plural, count = random.choice(list(KIND_OF)), random.randint(2, 5)
    left_out, *things = random.sample(KINDS[KIND_OF[plural]], count + 1)
    request = f"name {count} {plural}" + (f" but not the {left_out}" if random.random() < .7 else "")
    return request, request, " , ".join(things)


def telling(random):
    """Anything true of a subject."""
    subject = random.choice(list(WORLD.known))
    statement = random.choice(sorted(true_statements(subject)))
    return f"tell me something about {'' if subject in PEOPLE else 'the '}{subject}", subject, statement


def lines(random):
    """A clause of one mood on each of one or two aspects."""
    mood, aspects = random.choice(list(MOODS)), random.sample(ASPECTS, random.randint(1, 2))
    body = " and ".join(f"the {aspect} was {random.choice(MOODS[mood])}" for aspect in aspects)
    return f"write something {mood} about the {' and the '.join(aspects)}", f"{mood} {' '.join(sorted(aspects))}", body


SAID = {"backwards": lambda words: words[::-1], "two times": lambda words: words * 2,
        "in the other language": lambda words: [DICTIONARY.get(word, word) for word in words]}
MOODS = {"nice": {*GOOD, *(f"very {w}" for w in GOOD), *(f"not {w}" for w in BAD)},
         "bad": {*BAD, *(f"very {w}" for w in BAD), *(f"not {w}" for w in GOOD)}}
MOODS = {mood: sorted(words) for mood, words in MOODS.items()}


def true_statements(subject: str) -> set[str]:
    """Every wording of everything that is true of the subject."""
    return {wording.format(s=subject, v=WORLD.value[subject, name])
            for name in WORLD.known[subject] for wording in ATTRIBUTES[name].says}


def obeys(prompt: str, answer: str) -> bool:
    """Whether the answer does what a prompt of this family asks, all of it and nothing else. ValueError for others."""
    request = re.fullmatch(r"please (.+?) \.( start with sure \.)?( end with thanks \.)? ->", prompt)
    if not request:
        raise ValueError(f"no instruction that can be checked: {prompt!r}")
    body = answer.removesuffix(".").strip()
    for asked, wanted in ((request[2], r"sure : (.+)"), (request[3], r"(.+) thanks")):
        if asked:
            found = re.fullmatch(wanted, body)
            if not found:
                return False
            body = found[1]
    what = request[1]
    if found := re.fullmatch(r"say (.+) (backwards|two times|in the other language)", what):
        return body.split() == SAID[found[2]](found[1].split())
    if found := re.fullmatch(r"name (\d+) (\w+)(?: but not the (\w+))?", what):
        things = body.split(" , ")
        return (len(things) == len(set(things)) == int(found[1]) and found[3] not in things
                and set(things) <= set(KINDS[KIND_OF[found[2]]]))
    if found := re.fullmatch(r"tell me something about (?:the )?(\w+)", what):
        return body in true_statements(found[1])
    if found := re.fullmatch(r"write something (nice|bad) about the (\w+)(?: and the (\w+))?", what):
        clauses = [re.fullmatch(r"the (\w+) was (.+)", clause) for clause in body.split(" and ")]
        wanted = [aspect for aspect in found.groups()[1:] if aspect]
        return all(clauses) and [c[1] for c in clauses] == wanted and all(c[2] in MOODS[found[1]] for c in clauses)
    raise ValueError(f"no instruction that can be checked: {prompt!r}")
