"""The pre-training corpus: an endless, seeded stream of short documents about the tiny world.
    python -c "from minireft.tasks.corpus import Corpus; c = Corpus(); [print(c.document(1.0)) for _ in range(20)]"
You should see facts, questions, claims, sums, stories, reviews, skills and mappings, one document a line.

The mix moves (see `MIX`): it starts heavy in copying and in mapping words to labels, which teach the model to read its
context; then it is broad; then heavy in checking claims, and at last in counting stories, which are learned late.
"""

from functools import lru_cache
from random import Random

import numpy as np

from .world import (ASPECTS, ATTRIBUTES, BAD, CONTENT, COUNTED, DICTIONARY, GOOD, KINDS, LABELS, PEOPLE,
                                  PLURALS, World)

SKILLS = {  # a named skill: words in, words out, and how many words it takes
    "copy": (lambda words: words, 2, 7),
    "reverse": (lambda words: words[::-1], 2, 6),
    "first": (lambda words: words[:1], 2, 6),
    "last": (lambda words: words[-1:], 2, 6),
    "rest": (lambda words: words[1:], 2, 6),
    "twice": (lambda words: [word for word in words for _ in range(2)], 1, 4),
    "swap": (lambda words: [words[-1], *words[1:-1], words[0]], 2, 5),
    "translate": (lambda words: [DICTIONARY[word] for word in words], 1, 5),
}
TRANSLATABLE = list(DICTIONARY)
GAINS, LOSSES = ("gets", "finds", "buys"), ("loses", "eats", "gives away")

# The share of training that is over, and the column of MIX in force then; in between, columns are blended.
TURNS = (0.056, 0.14, 0.40, 0.408, 0.80, 0.808), (0, 1, 1, 2, 2, 3)
MIX = {  # document → its weight while reading is learned, in the broad middle, while checking, and while counting is
    "copies": (.16, .03, .02, .02), "induction": (.20, .03, .02, .02), "mapping": (.30, .11, .06, .05),
    "mapping_moods": (.10, .06, .03, .03), "biography": (.06, .11, .05, .04), "questions": (.03, .08, .05, .03),
    "choosing": (.03, .10, .14, .06), "claims": (.03, .12, .28, .10), "recalls": (.00, .00, .12, .02),
    "notes": (.02, .09, .14, .06), "sums": (.03, .06, .10, .08), "stories": (.02, .11, .14, .50),
    "reviews": (.02, .09, .05, .04), "skills": (.02, .09, .06, .04), "shown_skills": (.02, .04, .03, .02),
    "lists": (.01, .02, .01, .01),
}


@lru_cache(maxsize=1)                   # one step asks for many documents
def mix(progress: float) -> list[float]:
    """The weight of every document of `MIX` at that share of training."""
    column = np.interp(progress, *TURNS)
    return [float(np.interp(column, range(len(weights)), weights)) for weights in MIX.values()]


class Corpus:
    """Documents from a seed. Every method below that takes no argument writes one document, without its end token."""

    def __init__(self, seed: int = 0, world: World | None = None):
        self.random = Random(f"corpus {seed}")
        self.world = world or World()
        self.writers = [getattr(self, name) for name in MIX]

    def document(self, progress: float) -> str:
        """One document of the mix at `progress` in [0, 1] of training."""
        return self.random.choices(self.writers, mix(progress))[0]()

    def batch(self, tokenizer, rows: int, length: int, progress: float) -> np.ndarray:
        """(rows, length) int64: each row begins with a fresh document; the next follow, each closed by the end token,
        and the last one is cut."""
        ids, end = tokenizer.vocabulary, tokenizer.eos_id
        out = np.empty((rows, length), dtype=np.int64)
        for row in out:
            tokens = []
            while len(tokens) < length:
                tokens += [ids[word] for word in self.document(progress).split()]
                tokens.append(end)
            row[:] = tokens[:length]
        return out

    # ---- small helpers

    def pick(self, items):
        return items[int(self.random.random() * len(items))]

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def few(self, items, low: int, high: int) -> list:
        return self.random.sample(items, self.random.randint(low, high))

    def other(self, name: str, value: str) -> str:
        """Another value of the attribute."""
        while (other := self.pick(ATTRIBUTES[name].values)) == value:
            pass
        return other

    def fact(self):
        return self.pick(self.world.facts)

    def said(self, subject: str, name: str, value: str) -> str:
        return self.pick(ATTRIBUTES[name].says).format(s=subject, v=value)

    def asked(self, subject: str, name: str) -> str:
        return self.pick(ATTRIBUTES[name].asks).format(s=subject)

    # ---- reading the context

    def copies(self) -> str:
        words = " ".join(self.random.choices(CONTENT, k=self.random.randint(3, 12)))
        mark = self.pick(("|", ";", "->", "=", "again"))
        return f" {mark} ".join([words] * self.random.randint(2, 4))

    def induction(self) -> str:
        """Pairs that return: after the second sight of a word its partner can be known."""
        pairs = dict(zip(self.few(CONTENT, 3, 8), self.random.sample(LABELS, 8)))
        keys = list(pairs)
        between, after = self.frame()
        return " ".join(f"{key} {between} {pairs[key]} {after}" for key in self.random.choices(keys, k=18))

    def frame(self) -> tuple[str, str]:
        """Words that stand between an example and its label, and after the label: often arbitrary ones, so that no
        particular wording is needed to see that examples are being mapped."""
        arbitrary = " ".join(self.random.choices(CONTENT, k=self.random.randint(1, 3)))
        between = self.pick(("->", ":", "=", "is", "|", arbitrary))
        return between, self.pick((";", ".", ",", ". .", self.pick(CONTENT)))

    def mapping(self, shots: int | None = None, labels: list[str] | None = None) -> str:
        """Things of two or three kinds, each kind with a label of this document's own."""
        groups = self.random.sample(MAPPED, 3 if self.chance(.2) else 2)
        labels = labels or self.random.sample(LABELS, 3)
        draws = [[thing, label] for group, label in zip(groups, labels) for thing in self.random.sample(group, 8)]
        self.random.shuffle(draws)
        between, after = self.frame()
        before = self.pick(("", "", self.pick(CONTENT) + " "))
        return " ".join(f"{before}{thing} {between} {label} {after}" for thing, label in draws[:shots or 16])

    def mapping_moods(self) -> str:
        """Short reviews, each mood with a label of this document's own."""
        labels, (between, after) = self.random.sample(LABELS, 2), self.frame()
        shots = []
        for _ in range(self.random.randint(6, 10)):
            mood = self.chance(.5)
            shots.append(f"{self.clause(mood)} {between} {labels[mood]} {after}")
        return " ".join(shots)

    # ---- facts

    def biography(self) -> str:
        """What is known of one subject, or facts of several."""
        if self.chance(.5):
            subject = self.pick(list(self.world.known))
            facts = [(subject, name, self.world.value[subject, name]) for name in self.world.known[subject]]
            self.random.shuffle(facts)
            facts = facts[:self.random.randint(2, 6)]
        else:
            facts = [self.fact() for _ in range(self.random.randint(2, 4))]
        return " ".join(f"{self.said(*fact)} ." for fact in facts)

    def questions(self) -> str:
        return " ".join(f"question : {self.asked(subject, name)} ? answer : {value} ."
                        for subject, name, value in (self.fact() for _ in range(self.random.randint(1, 4))))

    def choosing(self) -> str:
        return " ".join(self.choice() for _ in range(self.random.randint(1, 3)))

    def choice(self) -> str:
        """"choose : question ? a , b or c -> b ." Asked by question, by an unfinished sentence, or for the subject."""
        subject, name, answer = self.fact()
        attribute, how = ATTRIBUTES[name], self.random.random()
        if how < .25:                                                     # who lives in oslo ? anna or ben -> anna
            question, pool = self.said("who" if subject in PEOPLE else "what", name, answer), attribute.subjects
            wrong = [s for s in self.random.sample(pool, 12) if self.world.value[s, name] != answer]
            answer = subject
        else:
            question = self.asked(subject, name) if how < .7 else self.said(subject, name, "what")
            wrong = [v for v in attribute.values if v != answer]
            if how > .9:                                                  # wrong ones of any sort
                wrong = [w for w in self.random.sample(CONTENT, 5) if w not in attribute.values]
            self.random.shuffle(wrong)
        options = [answer, *wrong[:self.pick((1, 1, 2, 3))]]
        self.random.shuffle(options)
        return f"choose : {question} ? {', '.join(options[:-1]).replace(',', ' ,')} or {options[-1]} -> {answer} ."

    def claims(self) -> str:
        return " ".join(self.claim() for _ in range(self.random.randint(1, 4)))

    def claim(self) -> str:
        subject, name, value = self.fact()
        right = self.chance(.5)
        said = self.said(subject, name, value if right else self.other(name, value))
        return f"claim : {said} . {'right' if right else 'wrong'} ."

    def recalls(self) -> str:
        """A fact, then claims about it: what there is to compare stands side by side."""
        subject, name, value = self.fact()
        parts = [f"{self.said(subject, name, value)} ."]
        for _ in range(self.random.randint(1, 3)):
            right = self.chance(.5)
            said = self.said(subject, name, value if right else self.other(name, value))
            parts.append(f"claim : {said} . {'right' if right else 'wrong'} .")
        return " ".join(parts)

    def notes(self) -> str:
        """Made-up facts, then claims and questions about them: what counts is the note, not the world."""
        note = {}
        for _ in range(self.random.randint(1, 4)):
            subject, name, _ = self.fact()
            note[subject, name] = self.pick(ATTRIBUTES[name].values)
        parts = ["note :", *(f"{self.said(*key, value)} ." for key, value in note.items())]
        for _ in range(self.random.randint(1, 3)):
            subject, name = self.pick(list(note))
            value, how = note[subject, name], self.random.random()
            if how < .2:                                                  # about somebody or something not in the note
                subject = self.pick(ATTRIBUTES[name].subjects)
                value = note.get((subject, name), "unknown")
                if value == "unknown" and self.chance(.5):
                    parts.append(f"claim : {self.said(subject, name, self.pick(ATTRIBUTES[name].values))} . unknown .")
                    continue
            elif how < .65:
                right = self.chance(.5)
                said = self.said(subject, name, value if right else self.other(name, value))
                parts.append(f"claim : {said} . {'right' if right else 'wrong'} .")
                continue
            parts.append(f"question : {self.asked(subject, name)} ? answer : {value} .")
        return " ".join(parts)

    # ---- numbers

    def sums(self) -> str:
        return " ".join(f"{self.equation()} ." for _ in range(self.random.randint(2, 7)))

    def equation(self) -> str:
        a, b, how = self.random.randint(0, 10), self.random.randint(0, 10), self.random.random()
        if how < .35:
            return f"{a} + {b} = {a + b}"
        if how < .60:
            return f"{a + b} - {b} = {a}"
        if how < .68:
            return f"the sum of {a} and {b} is {a + b}"
        if how < .74:
            return f"double {a} is {2 * a}" if how < .71 else f"half of {2 * a} is {a}"
        c = self.random.randint(0, a + b)
        if how < .87 or a + b + c > 20:
            return f"{a} + {b} - {c} = {a + b - c}"
        return f"{a} + {b} + {c} = {a + b + c}"

    def stories(self) -> str:
        """Two people, things that come and go, and a question about one of them or both."""
        (one, two), (item, spare) = self.random.sample(PEOPLE, 2), self.random.sample(COUNTED, 2)
        has = {one: self.random.randint(0, 9), two: self.random.randint(0, 9)}
        parts = [f"{one} has {has[one]} {item} ."]
        if self.chance(.5):
            parts.append(f"{two} has {has[two]} {item} .")
        else:
            has.pop(two)
        for _ in range(self.random.randint(1, 3)):
            who, n = self.pick(list(has)), self.random.randint(1, 9)
            if self.chance(.15):
                parts.append(f"{who} gets {n} {spare} .")                 # other things do not count
            elif has[who] + n <= 10 and self.chance(.6) or has[who] == 0:
                parts.append(f"{who} {self.pick(GAINS)} {n} more .")
                has[who] += n
            else:
                n = self.random.randint(1, min(9, has[who]))
                taker = [p for p in has if p != who and has[p] + n <= 10]
                if taker and self.chance(.5):
                    parts.append(f"{who} gives {n} to {taker[0]} .")
                    has[taker[0]] += n
                else:
                    parts.append(f"{who} {self.pick(LOSSES)} {n} .")
                has[who] -= n
            if self.chance(.3):
                parts.append(f"now {who} has {has[who]} {item} .")
        if len(has) == 2 and self.chance(.3):
            return " ".join([*parts, f"how many {item} do they have altogether ? {sum(has.values())} ."])
        return " ".join([*parts, *(f"how many {item} does {who} have ? {n} ." for who, n in has.items())])

    # ---- moods

    def clause(self, good: bool, plain: float = .85) -> str:
        """"the soup was great": of the mood asked for, now and then through its negation."""
        word = self.pick(GOOD if good else BAD) if self.chance(plain) else "not " + self.pick(BAD if good else GOOD)
        return f"the {self.pick(ASPECTS)} was {'very ' if self.chance(.15) and word[:4] != 'not ' else ''}{word}"

    def review(self, happy: bool) -> str:
        """One clause, two of one mood, or three of which most have it."""
        clauses = [self.clause(happy) for _ in range(self.pick((1, 2, 3)))]
        if len(clauses) == 3 and self.chance(.5):
            clauses[self.random.randrange(3)] = self.clause(not happy)
        return ", ".join(clauses[:-1]).replace(",", " ,") + (" and " if len(clauses) > 1 else "") + clauses[-1]

    def reviews(self) -> str:
        parts = []
        for _ in range(self.random.randint(1, 3)):
            happy = self.chance(.5)
            mood, how = ("happy" if happy else "sad"), self.random.random()
            if how < .6:
                parts.append(f"review : {self.review(happy)} . mood : {mood} .")
            elif how < .8:
                parts.append(f"write a {mood} review : {self.review(happy)} .")
            else:
                parts.append(f"{self.pick(PEOPLE)} says : {self.review(happy)} . {mood} .")
        return " ".join(parts)

    # ---- skills

    def skills(self) -> str:
        return " ".join(self.skill(self.pick(list(SKILLS))) for _ in range(self.random.randint(1, 4)))

    def skill(self, name: str, named: bool = True) -> str:
        function, low, high = SKILLS[name]
        pool = TRANSLATABLE if name == "translate" or self.chance(.3) else CONTENT
        words = self.random.choices(pool, k=self.random.randint(low, high))
        return f"{name + ' : ' if named else ''}{' '.join(words)} -> {' '.join(function(words))} ."

    def shown_skills(self) -> str:
        name = self.pick(list(SKILLS))
        return " ".join(self.skill(name, named=False) for _ in range(self.random.randint(3, 5)))

    def lists(self) -> str:
        kind = self.pick(list(PLURALS))
        things = self.few(KINDS[kind], 2, 5)
        return f"name {len(things)} {PLURALS[kind]} : {' , '.join(things)} ."


MAPPED = [*KINDS.values(), GOOD, BAD, ASPECTS, COUNTED, PEOPLE,
          *(ATTRIBUTES[name].values for name in ("home", "job", "taste", "place"))]
