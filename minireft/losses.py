"""What training minimises. Each loss takes logits (B, T, V) and the tokens they should predict.

Use:  loss = cross_entropy(logits, tokens, answer)
See:  nats for each answer token; a token is predicted from the one before it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """−log p(token) in float32 for every token but the first of a row: logits (B, T, V), tokens (B, T) → (B, T − 1)."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(tokens[:, 1:].shape)


def cross_entropy(logits: Tensor, tokens: Tensor, answer: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Mean −log p over the tokens marked in `answer` (B, T); `count`, if given, divides instead of their number."""
    answer = answer[:, 1:]                                                # (B, T − 1) the first token is never predicted
    return (token_losses(logits, tokens) * answer).sum() / (answer.sum() if count is None else count)
