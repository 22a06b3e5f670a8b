"""Claim 5, T-Few: what each loss is worth, against in-context learning at equal shots. The program is benchmarks/tfew.py; one recipe, no selection.

Only tasks that the base can learn from its prompt at all are fair to in-context learning; the base's in-context gates are in its model card.
"""

from dataclasses import replace

from benchmarks import tfew
from minireft.tasks import few_shot
from minireft.training import T_FEW

from .engine import Claim
from .methods import fresh
from .report import differences, paired

METHODS = ("zero-shot", "in the prompt", *tfew.METHODS, "all three, pre-trained")


def measure(base, task, method, value, seed, items, scale):
    """items: a list of questions for each template."""
    model, _ = fresh(base, scale)
    config, examples = replace(tfew.CONFIG, steps=scale.steps(tfew.CONFIG.steps), seed=seed), few_shot.shots(task, seed)
    if method == "zero-shot":
        scores = tfew.ranked(model, items)
    elif method == "in the prompt":
        scores = tfew.ranked(model, [tfew.shown(model, asked, examples[t::3]) for t, asked in enumerate(items)])
    else:
        before, learned = None, replace(config, losses=tfew.METHODS.get(method, T_FEW.losses))
        if method.endswith("pre-trained"):
            longer = replace(config, steps=2 * config.steps, batch_size=16, losses=("lm",))
            before = tfew.tuned(model, tfew.mixture(task, longer.steps), longer)
        with tfew.tuned(model, examples, learned, before):
            scores = tfew.ranked(model, items)
    return {"accuracy": sum(scores) / len(scores)}


def items(task: str, split: str, count: int) -> list:
    every = few_shot.items(task, split, count // 2)
    return [[few_shot.example(task, item, template) for item in every] for template in tfew.TEMPLATES]


def verdict(found):
    """Beating the prompt counts where examples in it help the base at all."""
    lines = []
    for unit, rows in found.items():
        gain = paired(rows, ("in the prompt", "zero-shot"), "accuracy")
        reads = bool(gain) and gain[0] > gain[1]
        lines += differences({unit: rows}, "all three losses over the prompt" + ("" if reads else ", whose examples do not help this base"),
                             ("all three", "in the prompt"), "more" if reads else "")
    return lines + [finding for what, pair in (
        ("L_UL beside L_LM", ("L_LM + L_UL", "L_LM")), ("L_LN beside L_LM", ("L_LM + L_LN", "L_LM")),
        ("pre-trained vectors", ("all three, pre-trained", "all three"))) for finding in differences(found, what, pair, "more")]


CLAIM = Claim(
    "shots", "(IA)³ with three losses beats in-context learning at equal shots, at a small part of the cost",
    "T0-3B, mean of 11 held-out sets: (IA)³ alone 61.7, + L_LN 64.05, + L_UL 64.06, both 64.6, + pre-trained vectors 65.8. At 11B: T-Few 72.4, GPT-3 "
    "175B in context 66.6, at 1.1e12 against 1.4e15 FLOPs an example.",
    "The base is not instruction-tuned as T0 is: examples in its prompt help on labels alone, so only there is the prompt a rival, and there both are at "
    "the ceiling. Answers of one word leave little for L_UL to do. FLOPs, memory and disk are in tfew.json, which "
    "benchmarks/tfew.py measures. The experiment that would tell: longer choices on a base that was tuned on a mixture of prompted tasks.",
    tuple(("shipped", task) for task in few_shot.names()), {method: (0.0,) for method in METHODS}, measure, items, verdict, reference="in the prompt")
