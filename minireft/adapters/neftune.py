"""NEFTune: noise on the token embeddings while a model trains, and at no other time (Jain et al. 2023, algorithm 1).

Use:  noise = NEFTune(model, alpha=5.0); minireft.train(model, adapters=[noise], ..., full fine-tuning or with others)
See:  x' = x + (α / √(T·C)) ε,  ε ~ U[−1, 1]: a sequence's noise has a norm of about α / √3, however long it is.
"""

from __future__ import annotations

import math

import torch

from .. import ops
from .base import Adapter


class Noise:
    """Replaces the gather of embeddings by gather and noise in one pass."""

    def __init__(self, adapter: NEFTune):
        self.adapter = adapter

    def __call__(self, operation, context):
        prepared = context[self.adapter]
        if prepared is None:
            return operation
        options, weight = self.adapter.options, self.adapter.model.embed.weight
        return lambda ids: ops.noisy_embedding(ids, weight, options["alpha"], *prepared, distribution=options["distribution"])


class NEFTune(Adapter):
    """alpha α ≥ 0; length "real" (each example's own tokens, also where a row packs several documents, and none on padding:
    the authors' training code) or "padded" (the whole row: the paper's algorithm and the libraries); distribution "uniform" or "gaussian" (the
    ablation: N(0, 1) in the place of U[−1, 1]); seed of the noise. No parameters. Of an encoder–decoder only what the
    encoder reads gets noise. Raises ValueError for values out of range.

    The noise is a function of (seed, step, example, token, channel), not of torch's generator: padding, packing, batching
    and resuming do not change it. Every pass is a new step; the trainer says before each which step and examples it is (`begin`),
    so that the pieces of a batch share one. Silent unless the model is in training mode.
    """

    def __init__(self, model, alpha: float = 5.0, length: str = "real", distribution: str = "uniform", seed: int = 0):
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha < 0:
            raise ValueError(f"alpha is {alpha!r}: expected a finite number of at least 0; the paper uses 5, 10 and 15")
        for name, value, known in (("length", length, ("real", "padded")), ("distribution", distribution, ("uniform", "gaussian"))):
            if value not in known:
                raise ValueError(f"{name} is {value!r}: expected {' or '.join(map(repr, known))}")
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed!r}: expected a whole number from 0 to 2³² − 1")
        super().__init__(model, alpha=float(alpha), length=length, distribution=distribution, seed=seed)
        self.seed = torch.tensor([seed, 0], device=model.embed.weight.device)             # (2,) seed and the next pass's step
        self.rows = None                                                  # (B,) whose the next pass's rows are, or (B, T) its tokens

    def edits(self):
        return [(self.model.embed, Noise(self))]

    def attach(self):
        super().attach()
        edits = self.model.embed.edits                                    # noise comes first: others edit what was embedded
        edits.insert(0, edits.pop())
        return self

    def refuse(self, other):
        if isinstance(other, NEFTune):
            raise ValueError("a NEFTune is attached already: a second one would add noise twice")

    def begin(self, step, rows=None):
        self.seed[1] = step
        self.rows = rows

    def prepare(self, tokens, mask, prompt_lengths, tasks, past):
        if not self.model.training or past:
            return None
        B, T = tokens.shape
        seed, rows, self.rows = self.seed.clone(), self.rows, None        # what `begin` said holds for one pass
        self.seed[1] += 1
        if rows is None and mask is not None and mask.dtype != torch.bool:                  # as if each document had a row
            most = mask.amax(1, keepdim=True)                             # (B, 1)
            rows = most.cumsum(0) - most + mask - 1                       # (B, T)
        if mask is None or self.options["length"] == "padded":
            return seed, tokens.new_full((B,), T), rows, None
        same = mask[:, :, None] == mask[:, None, :]                       # (B, T, T) tokens of one document, or of one row
        lengths = same.sum(2) * (mask > 0)                                # (B, T) padding has length 0: no noise there
        return seed, lengths, rows, same.tril().sum(2) - 1                # (B, T) a token's index wherever it is packed or padded
