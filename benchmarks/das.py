"""Does the base keep "what is asked" and "who is asked about" in subspaces of their own? Distributed alignment search.
Run: python benchmarks/das.py [--base FOLDER] [--write]      (--write updates results/das.json)
You should see, for both variables, interchange accuracy by layer, and on people never trained on: found, and its controls.

A pair is two questions about different people and different things, `question : what is the home of anna ? answer :`. The
state of one token after one layer is swapped inside a subspace R of rank r; R is turned until the base answers as if one
variable alone had been exchanged: the attribute (read at the last token), or the person (read at the name).
People are split by name: R is trained on some, its layer chosen on others, and what is reported is measured on the rest,
among the values of all attributes. Controls: the same search on a model of random weights, a random R, the whole state swapped,
nothing swapped. Geiger et al. 2023; that DAS can find structure in random models too is why the first is there.
"""

import argparse
import datetime
import json
import random
from pathlib import Path

import torch

import minireft
from minireft.adapters.more.interchange import Interchange, Pair
from minireft.tasks.world import ATTRIBUTES, PEOPLE, World

RESULTS = Path(__file__).parent / "results"
POSITION = {"attribute": -1, "person": -4}                               # of the token that is swapped: ":", and the name
KNOWN = ("home", "job", "pet", "taste", "drink", "instrument")          # what is known of people; their values are all different words


def people(seed: int = 0) -> dict[str, list[str]]:
    """48 people: 30 to train on, 8 to choose the layer, 10 to report."""
    names = list(PEOPLE)
    random.Random(seed).shuffle(names)
    return {"train": names[:30], "validation": names[30:38], "test": names[38:]}


def pairs(tokenizer, variable: str, names: list[str], count: int, seed: int) -> list[Pair]:
    """Counterfactuals among the people `names`: two people, two attributes, two of the wordings that the base has read."""
    draw, world, found = random.Random(seed), World(), []

    def question(person, attribute):
        asks = [ask for ask in ATTRIBUTES[attribute].asks if variable == "attribute" or ask.endswith("of {s}")]
        return tuple(tokenizer.encode(f"question : {draw.choice(asks).format(s=person)} ? answer :"))
    for _ in range(count):
        (person, other), (attribute, asked) = draw.sample(names, 2), draw.sample(KNOWN, 2)
        answer = world.value[(person, asked) if variable == "attribute" else (other, attribute)]
        found.append(Pair(question(person, attribute), question(other, asked), tokenizer.encode(answer)[0]))
    return found


def values(tokenizer) -> list[int]:
    """The ids of all that could be answered."""
    return sorted({tokenizer.encode(value)[0] for name in KNOWN for value in ATTRIBUTES[name].values})


def search(model, tokenizer, variable: str, layers, options) -> tuple[dict, dict, Interchange]:
    """Accuracy by layer on the people of the validation split, of what was found and of the whole state; and the best found.

    Of equally good layers the last: the deeper, the more else a state holds, so the more there is to tell apart.
    """
    split, found, whole, best, among = people(), {}, {}, None, values(tokenizer)
    train = pairs(tokenizer, variable, split["train"], 3000, seed=1)
    validation = pairs(tokenizer, variable, split["validation"], 160, seed=2)
    for layer in layers:
        torch.manual_seed(0)
        das = Interchange(model, layer, options.rank, POSITION[variable])
        das.fit(train, steps=options.steps, lr=options.lr)
        found[layer] = das.accuracy(validation, among)
        whole[layer] = Interchange(model, layer, model.config.width, POSITION[variable]).accuracy(validation, among)
        if best is None or found[layer] >= found[best.layer]:
            best = das
    return found, whole, best


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="base")
    parser.add_argument("--layers", default="all", help="which to search, e.g. 2,3,4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--pairs", type=int, default=400, help="to report on")
    parser.add_argument("--variable", choices=("attribute", "person"), action="append", help="default: both")
    parser.add_argument("--write", action="store_true", help="update results/das.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    model, tokenizer = minireft.load(options.base)
    torch.manual_seed(1)
    untrained = minireft.Model(model.config).requires_grad_(False).eval()
    layers = list(range(model.config.layers)) if options.layers == "all" else [int(x) for x in options.layers.split(",")]
    results = {}
    for variable in options.variable or ("attribute", "person"):
        test = pairs(tokenizer, variable, people()["test"], options.pairs, seed=3)
        unchanged = [Pair(p.base, p.base, p.answer) for p in test]
        by_layer, whole_by_layer, das = search(model, tokenizer, variable, layers, options)
        at_random = search(untrained, tokenizer, variable, [das.layer], options)[2]
        torch.manual_seed(2)
        turned, whole = (Interchange(model, das.layer, r, POSITION[variable]) for r in (options.rank, model.config.width))
        among = values(tokenizer)
        accuracies = {"found": das.accuracy(test, among), "random model": at_random.accuracy(test, among),
                      "random R": turned.accuracy(test, among), "whole state": whole.accuracy(test, among),
                      "nothing swapped": das.accuracy(unchanged, among), "chance": 1 / len(among),
                      "chance, knowing the attribute": sum(1 / len(ATTRIBUTES[name].values) for name in KNOWN) / len(KNOWN)}
        results[variable] = row = {
            "base": str(options.base), "date": datetime.date.today().isoformat(), "torch": torch.__version__, "rank": options.rank,
            "width": model.config.width, "steps": options.steps, "pairs": len(test), "layer": das.layer,
            "validation by layer": by_layer, "whole state by layer": whole_by_layer, **{name: round(x, 4) for name, x in accuracies.items()}}
        print(f"\n{variable}: rank {options.rank} of {model.config.width}, {len(test)} pairs of people not trained on, "
              f"standard error at most {0.5 / len(test)**0.5:.3f}")
        for name, accuracy in (("validation by layer", by_layer), ("the whole state", whole_by_layer)):
            print(f"  {name:20} " + "  ".join(f"{layer}: {x:.2f}" for layer, x in accuracy.items()))
        for name, x in accuracies.items():
            print(f"  {name:29} {x:.3f}" + f" (layer {das.layer})" * (name == "found"), flush=True)
        if options.write:
            RESULTS.mkdir(exist_ok=True)
            path = RESULTS / "das.json"
            path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), variable: row}, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
