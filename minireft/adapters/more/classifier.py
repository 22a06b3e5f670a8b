"""A classification head that is trained with a method, and saved with it: the GLUE setting of the papers.

Use:  head = Classifier(model, ("sad", "happy"), LoReFT(model, rank=1, positions="f3")); minireft.train(model, [head], examples)
See:  model(tokens) gives (B, classes) in the place of (B, T, V) while it stands; `minireft.classify` names the labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank import Bank
from ..base import Adapter

POOLS = ("first", "last", "mean")


class Classify:
    """Stands in the place of the output head."""

    def __init__(self, adapter: Classifier):
        self.adapter = adapter

    def __call__(self, operation, context):
        return lambda h: self.adapter.scores(h, context[self.adapter])


class Classifier(Adapter):
    """W₂ tanh(W₁ h + b₁) + b₂ of the pooled state h, the head of RoBERTa (Liu et al. 2019): C·C + C + classes·(C + 1) parameters.

    labels: the names of the classes; an example's completion is one of them. method: the adapter that is trained with the
    head and attached, detached, saved and loaded with it, made for the same model and not attached; None trains the head
    alone, a probe. pool: "first" or "last" real token, or the "mean" of all; None takes "mean" for an encoder and "last"
    for a decoder. Raises ValueError for labels that are not at least two different texts, and for an encoder–decoder,
    which writes its labels.
    """

    def __init__(self, model, labels, method: Adapter | None = None, pool: str | None = None):
        labels = tuple(labels) if isinstance(labels, (list, tuple)) else labels
        if not isinstance(labels, tuple) or len(set(labels)) < max(2, len(labels)) or not all(isinstance(x, str) and x for x in labels):
            raise ValueError(f"labels are {labels!r}: expected at least two names, each once")
        if model.two:
            raise ValueError("an encoder–decoder writes its labels: train it on completions, without a classifier")
        if method is not None and (isinstance(method, (Bank, Classifier)) or method.model is not model or method.attached):
            raise ValueError(f"the method is a {type(method).__name__}: expected an adapter, no bank, made for this model and not attached")
        pool = pool or ("mean" if model.config.encoder_layers else "last")
        if pool not in POOLS:
            raise ValueError(f"pool is {pool!r}: expected one of {', '.join(POOLS)}")
        kind = None if method is None else [type(method).__name__, method.options]
        super().__init__(model, labels=list(labels), method=kind, pool=pool)
        self.labels, self.method, self.pool, C = labels, method, pool, model.config.width
        self.w1, self.b1 = self.parameter(C, C), self.parameter(C)
        self.w2, self.b2 = self.parameter(len(labels), C), self.parameter(len(labels))      # zeros: no class is favoured
        torch.nn.init.normal_(self.w1, std=C**-0.5)

    @classmethod
    def rebuild(cls, model, options):
        from .. import KINDS                                              # the kinds know the head, and the head the kinds
        kind = options["method"]
        return cls(model, options["labels"], kind and KINDS[kind[0]].rebuild(model, kind[1]), options["pool"])

    def edits(self):
        return [(self.model.head, Classify(self))]

    def refuse(self, other):
        if isinstance(other, Classifier):
            raise ValueError("a classifier is attached already: detach it first")

    def attach(self):
        super().attach()
        try:
            if self.method is not None:
                self.method.attach()
        except ValueError:
            super().detach()                                              # both or none
            raise
        return self

    def detach(self):
        if self.attached and self.method is not None and self.method.attached:
            self.method.detach()
        return super().detach()

    def begin(self, step, rows=None):
        if self.method is not None:
            self.method.begin(step, rows)

    def prepare(self, tokens, mask, prompt_lengths, tasks, past):
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError("the mask holds document numbers: a classifier scores a row as a whole, do not pack")
        return torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask

    def scores(self, h: Tensor, mask: Tensor) -> Tensor:
        """h (B, T, C), mask (B, T) → (B, classes), in float32."""
        if h.dim() != 3:
            raise ValueError("a classifier stands on this model: it scores whole prompts and generates nothing; see minireft.classify")
        if self.pool == "mean":
            pooled = (h * mask[:, :, None]).sum(1, dtype=torch.float32) / mask.sum(1, keepdim=True)     # (B, C)
        else:
            at = mask.long().argmax(1) if self.pool == "first" else mask.shape[1] - 1 - mask.long().flip(1).argmax(1)   # (B,)
            pooled = h[torch.arange(len(h), device=h.device), at].float()                   # (B, C)
        return F.linear(torch.tanh(F.linear(pooled, self.w1, self.b1)), self.w2, self.b2)


def labels_of(adapters) -> tuple[str, ...] | None:
    """The labels of the classifier among these adapters; None where there is none."""
    return next((adapter.labels for adapter in adapters if isinstance(adapter, Classifier)), None)
