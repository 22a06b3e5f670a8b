"""Claim 6, memorisation: one intervention of rank 1 at one position, nested prefixes of several texts, by layer, steps and model.

The program is benchmarks/memorise.py. With one fixed prompt the edit is one constant vector, so rank can change how it is found, and not
what it can hold: rank is not varied. A seed is another text; there is nothing to select, the rate being part of memorise.py's search.
"""

import statistics

from benchmarks import memorise
from minireft import load
from minireft.data import encode_prompt
from minireft.tasks.corpus import Corpus

from .engine import Claim
from .report import JUDGEMENTS, Finding, differences

STEPS = 200
METHODS = {"first layer": (0.0, 1), "a third": (1 / 3, 1), "19 of 32": (19 / 32, 1), "last layer": (1, 1), "first layer, three times the steps": (0.0, 3)}


def measure(base, task, method, value, seed, items, scale):
    path, prompt, text = memorise.MODELS[base]
    model, tokenizer = load(path)
    if path == "base":                                                    # texts of the corpus, of 40 words at least
        corpus, words = Corpus(1000 + seed), []
        while len(words) < 40:
            words += corpus.document(0.3).split()
        text = " ".join(words[:40])
    else:
        words = text.split()
        text = " ".join(words[4 * seed :] + words[: 4 * seed])
    depth, times = METHODS[method]
    ids = encode_prompt(tokenizer, prompt, model.config.context)
    lengths = memorise.LENGTHS if scale.share == 1 else memorise.LENGTHS[:2]
    layer = round(depth * (model.config.layers - 1))
    found = memorise.longest(model, tokenizer, layer, ids, tokenizer.encode(text), scale.steps(times * STEPS), lengths, say=lambda line: None)
    return {"tokens": found["longest"], "state norm": found["state norm"], "parameters": found["parameters"]}


def verdict(found):
    """200 words are what the paper's text has at least; each base is judged by its best."""
    lines = []
    for (base, _), rows in found.items():
        held = {method: statistics.mean(run["tokens"] for run in runs) for method, runs in rows.items()}
        best = max(held, key=held.get)
        lines += [Finding(f"{base}: {method} holds {mean:.1f} tokens on average", JUDGEMENTS[0 if mean >= 200 else 1] if method == best else "")
                  for method, mean in held.items()]
    return lines + differences(found, "tokens with the first layer less those with the last", ("first layer", "last layer"), "", "tokens")


CLAIM = Claim(
    "memory", "One rank-1 edit of one state holds a text of a few hundred words",
    "LLaMA 7B, LoReFT r 1 after layer 19 of 32, last prompt position, `GO->`: a text of a few hundred words comes back in full.",
    "A constant vector of C numbers can hold at most some bits for each of them, and the rest of the model must be able to unroll it: a base of width 128 "
    "that never wrote long texts can not. Rank is not varied: with one fixed prompt the edit is one constant vector, so rank can change how it is found, and not "
    "what it can hold. The experiment that would tell: longest prefix against width on one family of models.",
    tuple((name, "texts") for name in memorise.MODELS),
    {method: (0.0,) for method in METHODS}, measure, lambda task, split, count: [], verdict, best="tokens", reference="first layer")
