"""Claim 2, where to intervene: layers, prefix and suffix counts, tied and untied, rank: the four hyperparameters as heat maps."""

import re

from minireft import LoReFT

from .engine import Claim
from .methods import examples, score
from .report import differences, heat_map

RANKS, POSITIONS = (1, 4, 8), ("l1", "f3+l3", "f7+l7")
LAYERS = {"first": lambda n: [0], "middle": lambda n: [(n - 1) // 2], "last": lambda n: [n - 1], "every other": lambda n: list(range(0, n, 2)),
          "all": lambda n: list(range(n))}                                # of n
METHODS = {f"r {r}, {where}": dict(rank=r, positions=where) for r in RANKS for where in POSITIONS}
METHODS |= {f"{name} layers, {where}": dict(rank=4, positions=where, layers=layers) for name, layers in LAYERS.items() if name != "all"
            for where in POSITIONS}
METHODS |= {f"untied, r {r}, {where}": dict(rank=r, positions=where, tied=False) for r in (2, 4) for where in POSITIONS[1:]}


def measure(base, task, method, value, seed, items, scale):
    how = dict(METHODS[method])
    layers = how.pop("layers", LAYERS["all"])
    return score(base, task, method, value, seed, items, scale, make=lambda m: [LoReFT(m, layers=layers(m.config.layers), **how)])


def verdict(found):
    """What each of the four does, the others held."""
    return [finding for what, pair, expected in (
        ("more positions", ("r 4, f7+l7", "r 4, l1"), "more"), ("a higher rank", ("r 8, f3+l3", "r 1, f3+l3"), "same"),
        ("all layers for the middle one", ("r 4, f3+l3", "middle layers, f3+l3"), "more"),
        ("untying prefix and suffix", ("untied, r 4, f3+l3", "r 4, f3+l3"), "same"),
        ("untying at equal parameters", ("untied, r 2, f3+l3", "r 4, f3+l3"), "same")) for finding in differences(found, what, pair, expected)]


def draw(figure, claim, found):
    rows = [f"r {r}" for r in RANKS] + [f"{name} layers" for name in LAYERS if name != "all"] + [f"untied, r {r}" for r in (2, 4)]
    heat_map(figure, found, rows, POSITIONS, lambda method: re.fullmatch(r"(.+), (\S+)", method).groups())


CLAIM = Claim(
    "places", "More positions and all layers help; tied suffices; rank matters little",
    "The paper searches prefix and suffix counts from 1 to 11, layers, ranks from 1 to 8 and tying for each task: commonsense takes r 8, f7+l7 tied on "
    "all layers; instructions r 4, f5+l5 untied on four layers; GLUE r 1, f1 to f11. It prints no full grid.",
    "Prompts here have 10 to 40 tokens, so f7+l7 is most of a prompt where it is a small part of the paper's. Rank counts for arithmetic, where a new "
    "operation must be put together, and is not shown to for facts, which the base only has to be told to say. An edit of the last layer alone reaches "
    "nothing but the first word of the answer, and that through the last position alone: that row of the map is constant. Arithmetic is learned suddenly "
    "or not at all within these 150 steps, so its seeds lie far apart, and one seed chose the rate. To give a story of stories260K its speech, one middle "
    "layer does better than all five: what is asked is one direction of the state, and later edits, each learning for itself, may undo it; the rates end at "
    "0.015 here, where all layers took 0.07 in the claim above. The experiment that would tell: the same "
    "map on longer prompts, and with steps until every seed has stopped learning.",
    (("shipped", "facts"), ("shipped", "arithmetic"), ("stories260K", "speech")), {method: (3e-3, 1.5e-2) for method in METHODS},
    measure, examples, verdict, reference="r 4, f7+l7", draw=draw)
