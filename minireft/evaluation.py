"""Evaluation: does the model rank the right choice highest, and does it write the right answer?

Use:  scores = evaluate(model, tokenizer, examples); print(scores)
See:  shares of right answers with their standard errors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .adapters import labels_of, task_ids
from .data import Encoded, Example, collate, encode, encode_prompt, padded, wrong_choices
from .generation import evaluating, generate_ids
from .losses import mean_log_p
from .model import Model


@dataclass(frozen=True)
class Scores:
    """rank: share of examples whose likeliest choice is right (None without choices); exact: share written exactly."""

    n: int
    rank: float | None
    exact: float | None
    answers: tuple[str, ...] = ()       # what was written, in the order of the examples

    def standard_error(self, name: str) -> float:
        """√(p(1 − p)/n) of 'rank' or 'exact'."""
        p = getattr(self, name)
        return (p * (1 - p) / self.n) ** 0.5

    def __str__(self) -> str:
        parts = [f"{name} {getattr(self, name):.3f} ± {self.standard_error(name):.3f}" for name in ("rank", "exact")
                 if getattr(self, name) is not None]
        return f"{', '.join(parts)} on {self.n} examples"


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
    chooses among its own labels. "exact": the greedy continuation must equal the completion, token for token. metrics:
    None takes both, or "exact" alone where some examples bring no choices.
    Raises ValueError for no examples, an unknown metric, and for "rank" without a completion and another to choose from.
    """
    if not examples:
        raise ValueError("there are no examples to evaluate on")
    labels = labels_of(model.adapters)
    metrics = metrics or (("rank",) if labels else ("rank", "exact") if all(e.choices for e in examples) else ("exact",))
    if not set(metrics) <= {"rank", "exact"}:
        raise ValueError(f"metrics are {metrics!r}: expected some of rank, exact")
    context, rank, exact, answers = model.config.context, None, None, []
    with evaluating(model):
        if "rank" in metrics and labels:
            found = classify(model, tokenizer, [e.prompt for e in examples], batch_size)
            rank = sum(label == e.completion for label, e in zip(found, examples)) / len(examples)
        elif "rank" in metrics:
            rows = [[encode(tokenizer, replace(e, completion=c), context) for c in (e.completion, *wrong_choices(e))] for e in examples]
            scores, right = iter(mean_log_likelihoods(model, sum(rows, []), batch_size)), 0
            for choices in rows:                                          # the right one stands first
                best = [next(scores) * (1 if length_normalised else row.predicted(row.ids)) for row in choices]
                right += best[0] > max(best[1:])
            rank = right / len(examples)
        if "exact" in metrics:
            wanted = [tokenizer.encode(e.completion) for e in examples]
            prompts = [encode_prompt(tokenizer, e.prompt, context - 1) for e in examples]
            for first in range(0, len(examples), batch_size):
                most = max(map(len, wanted[first : first + batch_size])) + 1            # one more: the end must come in time
                tasks = task_ids(model, [e.task for e in examples[first : first + batch_size]])
                answers += generate_ids(model, prompts[first : first + batch_size], most, tokenizer.eos_id, tasks=tasks)
            exact = sum(a == w for a, w in zip(answers, wanted)) / len(examples)
    return Scores(len(examples), rank, exact, tuple(map(tokenizer.decode, answers)))
