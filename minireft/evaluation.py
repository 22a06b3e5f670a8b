"""Evaluation: does the model rank the right choice highest, and does it write the right answer?

Use:  scores = evaluate(model, tokenizer, examples); print(scores)
See:  shares of right answers with their standard errors.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from statistics import fmean

from torch import Tensor

from .adapters import labels_of, task_ids
from .data import Encoded, Example, collate, encode, encode_prompt, padded, wrong_choices
from .formats.datasets import FORMATS
from .generation import evaluating, generate_ids
from .losses import mean_log_p
from .model import Model

METRICS = ("rank", "exact", "answer", "loss")


@dataclass(frozen=True)
class Scores:
    """Shares of examples, None where not asked for: rank, whose likeliest choice is right; exact, written exactly; answer,
    whose answer stands in what was written. loss: −log p of the completion, nats a token, the mean over examples. errors: their
    standard errors over n examples of so many questions; those of one task, format and id are wordings of one question."""

    n: int
    rank: float | None = None
    exact: float | None = None
    answers: tuple[str, ...] = ()       # what was written, in the order of the examples
    answer: float | None = None
    loss: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    questions: int = 0

    def __str__(self) -> str:
        parts = [f"{name} {getattr(self, name):.3f} ± {self.errors[name]:.3f}" for name in METRICS if name in self.errors]
        return f"{', '.join(parts)} on {self.n} examples" + (f" of {self.questions} questions" if self.questions < self.n else "")


def clustered_error(values: list[float], questions: list) -> float:
    """The standard error of a mean whose values of one question depend on each other: √(Σ_q (Σ_{i in q} (x_i − x̄))²) / n (Miller 2024,
    Adding Error Bars to Evals, clustered standard errors). Where every question stands once it is the usual one, √(p(1 − p)/n) of a
    share; where all stand equally often, that of the mean over their own means."""
    mean, sums = fmean(values), defaultdict(float)
    for value, question in zip(values, questions):
        sums[question] += value - mean
    return sum(s * s for s in sums.values()) ** 0.5 / len(values)


def mean_log_likelihoods(model: Model, rows: list[Encoded], batch_size: int = 64) -> list[float]:
    """β(y) = (1/T) Σ log p(y_t | x, y_<t) of each row's completion, end of text included (T-Few, section 3.2)."""
    if model.config.architecture == "encoder":
        raise ValueError("an encoder gives no probability of a completion: attach a Classifier, and it chooses among its labels")
    device, scores = model.embed.weight.device, [0.0] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))  # rows of like length pad little
    for first in range(0, len(rows), batch_size):
        chosen = by_length[first : first + batch_size]
        batch, tasks = collate([rows[i] for i in chosen], start=model.config.start).to(device), task_ids(model, [rows[i].task for i in chosen])
        with evaluating(model):
            betas = mean_log_p(batch.through(model, tasks), batch)        # (B,)
        for i, score in zip(chosen, betas.tolist()):
            scores[i] = score
    return scores


def classify(model: Model, tokenizer, prompts: list[str], batch_size: int = 64, tasks: Tensor | None = None) -> list[str]:
    """The label of each prompt by the classifier that stands on the model. ValueError where none does."""
    labels, device, found = labels_of(model.adapters), model.embed.weight.device, []
    if labels is None:
        raise ValueError("no classifier is attached: attach one (minireft.Classifier, or load_adapter), or rank choices with evaluate")
    rows = [encode_prompt(tokenizer, text, model.config.context) for text in prompts]
    with evaluating(model):
        for first in range(0, len(rows), batch_size):
            tokens, mask = padded(rows[first : first + batch_size], 0)    # (B, T) both
            scores = model(tokens.to(device), mask.to(device), tasks=None if tasks is None else tasks[first : first + batch_size])
            found += [labels[i] for i in scores.argmax(-1).tolist()]
    return found


def evaluate(model: Model, tokenizer, examples: list[Example], metrics=None, batch_size: int = 64,
             length_normalised: bool = True) -> Scores:
    """Scores the model, with whatever adapters are attached, in evaluation mode.

    "rank": among an example's choices the one of the highest mean log-likelihood a token must be its completion; with
    length_normalised=False the one of the highest log-likelihood; a tie is not right. A classifier that is attached
    chooses among its own labels. "exact": the greedy continuation must equal the completion, token for token. "answer": the
    example's answer must stand in the greedy continuation where the rules of its format look. "loss": see `Scores`.
    metrics: None takes what is usual for the examples' format (formats/datasets.py); that is "rank" and "exact" for prompts
    and completions, or "exact" alone where some bring no choices.
    Raises ValueError for no examples, an unknown metric, "rank" without a completion and another to choose from, and "answer" where
    an example has none.
    """
    if not examples:
        raise ValueError("there are no examples to evaluate on")
    labels = labels_of(model.adapters)
    usual = ("rank",) if labels else FORMATS[examples[0].format].metrics if len({e.format for e in examples}) == 1 else None
    metrics = metrics or usual or (("rank", "exact") if all(e.choices for e in examples) else ("exact",))
    if not set(metrics) <= set(METRICS):
        raise ValueError(f"metrics are {metrics!r}: expected some of {', '.join(METRICS)}")
    context, each, answers = model.config.context, {}, []                 # each: metric → what every example scores
    with evaluating(model):
        if "rank" in metrics and labels:
            chosen = classify(model, tokenizer, [e.prompt for e in examples], batch_size)
            each["rank"] = [label == e.completion for label, e in zip(chosen, examples)]
        elif "rank" in metrics:
            rows = [[encode(tokenizer, replace(e, completion=c), context) for c in (e.completion, *wrong_choices(e))] for e in examples]
            scores, each["rank"] = iter(mean_log_likelihoods(model, sum(rows, []), batch_size)), []
            for choices in rows:                                          # the right one stands first
                best = [next(scores) * (1 if length_normalised else row.predicted(row.ids)) for row in choices]
                each["rank"].append(best[0] > max(best[1:]))
        if "loss" in metrics:
            each["loss"] = [-b for b in mean_log_likelihoods(model, [encode(tokenizer, e, context) for e in examples], batch_size)]
        if "answer" in metrics:
            if missing := [e for e in examples if e.answer is None or not FORMATS[e.format].right]:
                raise ValueError(f"{missing[0].prompt[:60]!r} has no answer to look for: use other metrics, or a format that has")
            answers = write(model, tokenizer, examples, [FORMATS[e.format].max_new_tokens for e in examples], batch_size)
            each["answer"] = [FORMATS[e.format].right(tokenizer.decode(ids), e) for e, ids in zip(examples, answers)]
        if "exact" in metrics:
            wanted = [tokenizer.encode(e.completion) for e in examples]
            answers = write(model, tokenizer, examples, [len(ids) + 1 for ids in wanted], batch_size)       # the end must come in time
            each["exact"] = [a == w for a, w in zip(answers, wanted)]
    questions = [i if e.id is None else (e.task, e.format, e.id) for i, e in enumerate(examples)]
    return Scores(len(examples), **{name: fmean(x) for name, x in each.items()}, answers=tuple(map(tokenizer.decode, answers)),
                  errors={name: clustered_error(x, questions) for name, x in each.items()}, questions=len(set(questions)))


def write(model: Model, tokenizer, examples: list[Example], most: list[int], batch_size: int) -> list[list[int]]:
    """The greedy continuation of each prompt: as many tokens as the most in its batch."""
    prompts, written = [encode_prompt(tokenizer, e.prompt, model.config.context - 1) for e in examples], []
    for first in range(0, len(examples), batch_size):
        some = slice(first, first + batch_size)
        tasks = task_ids(model, [e.task for e in examples[some]])
        written += generate_ids(model, prompts[some], max(most[some]), tokenizer.eos_id, tasks=tasks)
    return written
