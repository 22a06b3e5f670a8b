"""Claim 7, overhead: what each method adds to a training step, to the prompt's pass and to decoding after it.

Timed as benchmarks/training.py and generation.py do, over the same floors; a seed is a repetition of all of it.
"""

import statistics

import torch

from benchmarks import generation, harness, training
from benchmarks.neftune import interval

from .engine import Claim
from .methods import METHODS as KNOWN
from .methods import UNTRAINED
from .report import Finding, judged

METHODS = [name for name in KNOWN if name not in (*UNTRAINED, "full")]
PARTS = {"step": "a training step", "prompt": "the prompt's pass", "decoding": "decoding"}
SECONDS, B, T = 1.5, 4, 64


def measure(base, task, method, value, seed, items, scale):
    model, tokens = training.base(256, 4), torch.randint(training.V, (B, T))
    tokens[:, :8] = 0                                                     # placeholders, where a method wants them
    (adapter,) = KNOWN[method](training.twin(model))
    adapter.attach()
    bare, answer = training.twin(model), torch.ones(B, T, dtype=torch.bool)
    bare.blocks[0].output.edits.append(training.Floor())
    steps = {"floor": training.Step([], bare, tokens, answer).phases(), "method": training.Step(list(adapter.parameters()), adapter.model, tokens, answer).phases()}
    clock, found = harness.Clock("cpu"), {}
    pairs = {"step": steps, **{part: {"floor": run(model, tokens), "method": run(adapter.model, tokens)}
                               for part, run in (("prompt", generation.prefill), ("decoding", generation.decoding))}}
    for part, providers in pairs.items():
        times = clock.interleaved(providers, SECONDS * scale.share)
        floor, own = ([sum(t) if isinstance(t, list) else t for t in times[name]] for name in ("floor", "method"))
        found[part] = harness.ratios(own, floor)[1]
    return found | {"parameters": adapter.num_parameters()}


def verdict(found):
    """Published is what decoding costs: edits of the prompt nothing, LoRA something."""
    lines = []
    for rows in found.values():
        for method, runs in rows.items():
            expected = {"LoReFT": "same", "DiReFT": "same"}.get(method, "more" if method.startswith("LoRA") else "")
            over = judged(*interval([run["decoding"] - 1 for run in runs]), expected) if expected else ""
            lines.append(Finding(f"{method}: " + ", ".join(f"{statistics.median(run[part] for run in runs):.2f} × {name}" for part, name in PARTS.items()), over))
    return lines


CLAIM = Claim(
    "overhead", "Edits of the prompt cost nothing at generation; LoRA costs until it is merged",
    "ReFT's authors: interventions at fixed prompt positions add nothing to a decoding step. Figures in milliseconds are not comparable across machines.",
    "A model this small spends much of a step on the calls themselves, so ratios are upper bounds for larger ones. LoRA, DoRA and (IA)³ can be merged, "
    "after which they cost nothing; here they are not. The experiment that would tell: the same at width 4,096 on a GPU.",
    (("256 wide, 4 layers", f"{B} × {T} tokens"),), {method: (0.0,) for method in METHODS}, measure, lambda task, split, count: [],
    verdict, best="step", lower=True, reference="LoReFT")
