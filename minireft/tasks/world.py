"""The tiny world: who lives where, which thing has which colour, and every word that can be said about it.
    python -c "from minireft.tasks.world import World; w = World(); print(w.say('anna', 'home'), len(w.facts))"
You should see one sentence about anna's home and the number of facts, the same on every machine.

Everything else is written from here: the pre-training corpus (corpus.py), the skill gates (gates.py) and the downstream
families. The vocabulary is closed: a word that is not in `VOCABULARY` cannot be written, and the tokenizer says so.
"""

from dataclasses import dataclass
from random import Random

# ---- words ----------------------------------------------------------------------------------------------------------

PEOPLE = """
    adam ali anna bella ben carl cora dan dora emil eva fay finn gina gus hana hugo ines ivan jack jane kim kurt
    lena leo max mia nina noah olga omar paul pia rosa ruth sam sara tina theo ugo uma vera vic will yara yuri
    zane zoe
    """.split()

KINDS = {  # a kind of thing → its members; the plural is what lists are asked by
    "animal": "dog cat horse cow sheep goat duck mouse rabbit fox".split(),
    "fruit": "apple pear plum grape lemon peach cherry melon fig mango".split(),
    "tool": "hammer saw drill rake spade knife brush ladder axe shovel".split(),
    "garment": "shirt hat coat scarf sock glove belt boot dress jacket".split(),
    "vehicle": "car bus train boat bike truck plane tram ship van".split(),
    "instrument": "piano violin drum flute guitar harp trumpet organ bell horn".split(),
    "furniture": "table chair bed shelf desk lamp sofa bench stool cupboard".split(),
    "drink": "water milk tea coffee juice wine beer cocoa soda cider".split(),
}
PLURALS = {"animal": "animals", "fruit": "fruits", "tool": "tools", "garment": "garments", "vehicle": "vehicles",
           "instrument": "instruments", "drink": "drinks"}
COLOURS = "red blue green yellow black white brown pink gray purple".split()
TOWNS = "oslo rome paris cairo lima tokyo delhi berlin madrid dublin vienna athens".split()
JOBS = "baker doctor teacher farmer painter driver singer nurse cook pilot".split()
ROOMS = "kitchen garden garage hall attic cellar library barn".split()
NUMBERS = [str(n) for n in range(21)]
COUNTED = "apples books coins cards stones nuts cups stamps keys shells".split()  # what stories count

ASPECTS = "food staff music film play room story price view bread meal soup song bath".split()
GOOD = "great good lovely fine nice warm kind fresh tasty bright superb sweet clean fair".split()
BAD = "awful bad nasty poor dull cold rude stale bland grim terrible sour dirty weak".split()

PLAIN = """
    river cloud storm tower bridge market forest island mountain castle church school street window door mirror
    candle basket bottle blanket pillow button needle thread ribbon feather leaf root branch seed flower grass
    sand clay iron silver gold copper marble paper ink stamp coin flag rope chain wheel engine anchor rocket
    planet star moon sun comet winter summer spring autumn morning evening north south east west king queen knight
    giant dragon ghost robot
    """.split()
# These stand as labels in no document of the corpus, though they are ordinary words of it elsewhere: a model that maps
# an example to one of them has learned to read the examples of its context, not to remember which words are labels.
HELD_OUT_LABELS = "amber basil cedar ember frost hazel ivory jade maple opal raven tulip".split()

FUNCTION_WORDS = """
    . , ; : ? -> = + - | the a an is of in it and or not very but to has have gets gives finds loses buys eats
    more now how many does do who what where which question answer choose claim right wrong note unknown review
    mood happy sad write sum double half name about say says said altogether kept colour place kind home job pet
    drink lives works as keeps owns likes live keep like best drinks favourite plays hold find asks for was with
    from his her both they all then away again copy reverse first last rest twice swap translate same other thing
    things word words after before
    """.split()
# The wordings of the downstream families: in the corpus they occur only scattered, as words to copy and to map.
TASK_WORDS = """
    letter goes visit you travel work people pay walk takes buys food wants new wall flag would be fills cup when
    thirsty party performs on needs lesson picture paint get into shop puts next every finish line ends options
    pick number bag there are still left counts bought by came with packs each gave ago his friend total put away
    box result wrote verdict up down even text so true false open maybe stays cares sips trained please thanks
    sure backwards two three language end begin start without tell me something list nice in order only send start
    ok done go mind yes no good bad great less than had lost found added took shelf guess customer left over at
    did give times
    """.split()


def _invented(count: int, taken: set[str]) -> list[str]:
    """Two-syllable words that mean nothing in the first language, for the second one."""
    random, words = Random("second language"), []
    while len(words) < count:
        word = "".join(random.choice("bdfgklmnprstvz") + random.choice("aeiou") for _ in range(2))
        if word not in taken and word not in words:
            words.append(word)
    return words


THINGS = [thing for kind in KINDS if kind != "drink" for thing in KINDS[kind]]
_TRANSLATED = KINDS["animal"] + KINDS["fruit"] + KINDS["tool"] + COLOURS
_FIRST = list(dict.fromkeys([
    *FUNCTION_WORDS, *NUMBERS, *PEOPLE, *KINDS, *PLURALS.values(), *THINGS, *KINDS["drink"], *COLOURS, *TOWNS, *JOBS,
    *ROOMS, *COUNTED, *ASPECTS, *GOOD, *BAD, *PLAIN, *HELD_OUT_LABELS, *TASK_WORDS]))
# A word → its word in the second language, which is spoken word by word.
DICTIONARY = dict(zip(_TRANSLATED, _invented(len(_TRANSLATED), set(_FIRST))))
VOCABULARY = _FIRST + list(DICTIONARY.values())
# Words that may be copied, reversed, mapped: everything but punctuation. Labels: all of these but the held-out ones.
CONTENT = [word for word in VOCABULARY if word.isalnum()]
LABELS = [word for word in CONTENT if word not in HELD_OUT_LABELS and not word.isdigit()]

# ---- facts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attribute:
    """One thing that can be known: who has it, which values it takes, how it is said and asked. Every wording ends in
    the value, so that a sentence without its last word is a question too."""

    subjects: tuple[str, ...]
    values: tuple[str, ...]
    says: tuple[str, ...]
    asks: tuple[str, ...]


ATTRIBUTES = {name: Attribute(*map(tuple, fields)) for name, fields in {
    "home": (PEOPLE, TOWNS, ["{s} lives in {v}", "the home of {s} is {v}", "{s} is from {v}"],
             ["where does {s} live", "what is the home of {s}"]),
    "job": (PEOPLE, JOBS, ["{s} works as a {v}", "the job of {s} is {v}", "{s} is a {v}"],
            ["what is the job of {s}", "{s} works as what"]),
    "pet": (PEOPLE, KINDS["animal"], ["{s} keeps a {v}", "the pet of {s} is a {v}", "{s} owns a {v}"],
            ["which pet does {s} keep", "what is the pet of {s}"]),
    "taste": (PEOPLE, COLOURS, ["{s} likes the colour {v}", "the favourite colour of {s} is {v}", "{s} likes {v}"],
              ["which colour does {s} like", "what is the favourite colour of {s}"]),
    "drink": (PEOPLE, KINDS["drink"], ["{s} drinks {v}", "the favourite drink of {s} is {v}", "{s} asks for {v}"],
              ["what does {s} drink", "what is the favourite drink of {s}"]),
    "instrument": (PEOPLE, KINDS["instrument"],
                   ["{s} plays the {v}", "the instrument of {s} is the {v}", "{s} has the {v}"],
                   ["which instrument does {s} play", "what is the instrument of {s}"]),
    "colour": (THINGS, COLOURS, ["the {s} is {v}", "the colour of the {s} is {v}", "the {s} has the colour {v}"],
               ["which colour is the {s}", "what is the colour of the {s}"]),
    "place": (THINGS, ROOMS, ["the {s} is in the {v}", "the {s} is kept in the {v}", "find the {s} in the {v}"],
              ["where is the {s}", "where is the {s} kept"]),
    "kind": (THINGS + KINDS["drink"], list(KINDS), ["the {s} is a kind of {v}", "the {s} is of the kind {v}"],
             ["of which kind is the {s}", "what kind of thing is the {s}"]),
}.items()}


class World:
    """The facts: `facts` is a list of (subject, attribute, value), the same for the same seed."""

    def __init__(self, seed: int = 0):
        random = Random(f"world {seed}")
        kind_of = {thing: kind for kind, things in KINDS.items() for thing in things}
        self.facts = [(subject, name, kind_of[subject] if name == "kind" else random.choice(attribute.values))
                      for name, attribute in ATTRIBUTES.items() for subject in attribute.subjects]
        self.value = {(subject, name): value for subject, name, value in self.facts}
        self.known: dict[str, list[str]] = {}  # subject → what is known about it
        for subject, name, _ in self.facts:
            self.known.setdefault(subject, []).append(name)

    def say(self, subject: str, name: str, value: str | None = None, wording: int = 0) -> str:
        """The fact as a sentence without its full stop; with `value`, a sentence that may be false."""
        return ATTRIBUTES[name].says[wording].format(s=subject, v=value or self.value[subject, name])
