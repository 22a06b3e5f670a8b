"""What training minimises: the language-modelling loss, and T-Few's two losses on wrong choices (Liu et al. 2022, section 3.2).

Use:  loss = cross_entropy(logits, tokens, answer);  OBJECTIVES["length"].total(logits, collate(rows)) / len(rows)
See:  nats for each answer token; a token is predicted from the one before it.

The authors' code differs from their paper: it adds 0.01 inside L_UL's logarithm ("unlikelihood_smoothed" is that), and there
each token of padding and of the right choice adds the constant −log 1.01 as well, without a gradient; its β divides by
T ** length_norm; every micro-batch is averaged by itself. Here sums are divided by the counts of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Batch, Encoded


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """−log p(token) in float32 for every token but the first of a row: logits (B, T, V), tokens (B, T) → (B, T − 1)."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(tokens[:, 1:].shape)


def cross_entropy(logits: Tensor, tokens: Tensor, answer: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Mean −log p over the tokens marked in `answer` (B, T); `count`, if given, divides instead of their number."""
    answer = answer[:, 1:]                                                # (B, T − 1) the first token is never predicted
    return (token_losses(logits, tokens) * answer).sum() / (answer.sum() if count is None else count)


def mean_log_p(logits: Tensor, batch: Batch) -> Tensor:
    """β(y) = (1/T) Σ_t log p(y_t | x, y_<t) of each row's answer, end of text included: logits (B, T, V) → (B,)."""
    answer = batch.answer[:, 1:]                                          # (B, T − 1)
    return -(token_losses(logits, batch.tokens) * answer).sum(1) / answer.sum(1)


def likelihood(logits: Tensor, batch: Batch) -> Tensor:
    """T · L_LM = −Σ_t log p(y_t | x, y_<t), summed over the right answers; L_LM is its mean a token."""
    return cross_entropy(logits, batch.tokens, batch.answer & (batch.choice == 0)[:, None], 1)


def unlikelihood(logits: Tensor, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Σ_n T⁽ⁿ⁾ · L_UL = −Σ_n Σ_t log(1 − p(ŷ_t⁽ⁿ⁾ | x, ŷ_<t⁽ⁿ⁾) + smoothing), over the wrong choices n only.

    With a token's odds p / (1 − p) = exp(z_y) / Σ_{j≠y} exp(z_j), −log(1 − p) = log(1 + odds): finite with a gradient
    even where p rounds to 1, and exact where p is tiny.
    """
    wrong = (batch.answer & (batch.choice > 0)[:, None])[:, 1:]           # (B, T − 1)
    z, y = logits[:, :-1][wrong].float(), batch.tokens[:, 1:][wrong, None]                  # (N, V), (N, 1)
    odds = z.gather(1, y)[:, 0] - z.scatter(1, y, -torch.inf).logsumexp(1)                  # (N,) their logarithm
    return -(odds.neg().sigmoid() + smoothing).log().sum() if smoothing else F.softplus(odds).sum()


def length_normalised(logits: Tensor, batch: Batch) -> Tensor:
    """Σ_examples L_LN = −log softmax_choices(β)[right]: what rank classification asks for. See `mean_log_p` for β."""
    shape = int(batch.example.max()) + 1, int(batch.choice.max()) + 1
    table = logits.new_full(shape, -torch.inf, dtype=torch.float32)       # (examples, choices) where there is no choice, −∞
    table = table.index_put((batch.example, batch.choice), mean_log_p(logits, batch))
    return F.cross_entropy(table, torch.zeros_like(table[:, 0], dtype=torch.long), reduction="sum")


class Objective(NamedTuple):
    """A loss over a whole batch that may be computed in pieces: Σ total(piece) / Σ count(example)."""

    total: Callable[[Tensor, Batch], Tensor]    # (what the model returned for a batch, the batch) → a sum
    count: Callable[[Encoded], int]             # what one example adds to the number that the sum is divided by
    choices: bool = True                        # whether examples must bring choices


OBJECTIVES = {
    "lm": Objective(likelihood, lambda row: row.predicted(row.ids), choices=False),
    "unlikelihood": Objective(unlikelihood, lambda row: sum(map(row.predicted, row.wrong))),
    "unlikelihood_smoothed": Objective(partial(unlikelihood, smoothing=0.01), lambda row: sum(map(row.predicted, row.wrong))),
    "length": Objective(length_normalised, lambda row: 1),
    "class": Objective(lambda scores, batch: F.cross_entropy(scores, batch.label, reduction="sum"), lambda row: 1, choices=False),
}
