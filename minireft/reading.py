"""Reading what an adapter learned: states seen along R, tokens a direction promotes, subspaces compared, (IA)³'s vectors.

Use:  promoted(model, tokenizer, reft.rotations()[3][0]); similarity(R_a, R_b); project(model, tokens, layer, R)
See:  plain linear algebra on the rows of R, (r, C).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .adapters.more.vectors import vectors                              # what (IA)³ turned up and down
from .adapters.orthonormal import orthonormalise


class Record:
    """Keeps what passes a site. It is put on by `states` and taken off again."""

    adapter = None                      # belongs to none, so no adapter's detach takes it away

    def __call__(self, operation, context):
        def keep(x):
            self.seen = operation(x)
            return self.seen
        return keep


@torch.no_grad()
def states(model, tokens: Tensor, layer: int, mask: Tensor | None = None) -> Tensor:
    """The stream after block `layer`, edits included: tokens (B, T) → (B, T, C)."""
    record, edits = Record(), model.blocks[layer].output.edits
    edits.append(record)
    try:
        model.stream(tokens, mask)
    finally:
        edits.remove(record)
    return record.seen.clone()


def project(model, tokens: Tensor, layer: int, R: Tensor, mask: Tensor | None = None) -> Tensor:
    """Coordinates of the stream after block `layer` in the subspace of R (r, C): (B, T, r)."""
    return states(model, tokens, layer, mask).float() @ R.T.float()


@torch.no_grad()
def promoted(model, tokenizer, direction: Tensor, count: int = 5) -> tuple[list[str], list[str]]:
    """The tokens whose logits rise and fall most when the last state moves along `direction` (C,): through the last norm's
    scale and the unembedding, its linear part. The sign of a direction is arbitrary: read both lists."""
    direction = direction.float()
    if model.norm.bias is not None:                                       # a LayerNorm takes the mean away
        direction = direction - direction.mean()
    push = model.head.weight.float() @ (direction * model.norm.weight.float())              # (V,)
    order = push.argsort(descending=True).tolist()
    return [tokenizer.decode([i]) for i in order[:count]], [tokenizer.decode([i]) for i in order[::-1][:count]]


@torch.no_grad()
def similarity(a: Tensor, b: Tensor) -> float:
    """‖A Bᵀ‖² / min(r_a, r_b), A and B orthonormal bases of the spans of two sets of rows (r, C): 1 where one subspace holds
    the other, 0 where they are orthogonal, about r/C by chance."""
    return float((orthonormalise(a.float()) @ orthonormalise(b.float()).T).square().sum() / min(len(a), len(b)))
