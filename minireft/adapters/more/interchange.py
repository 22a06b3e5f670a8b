"""Interchange interventions, and DAS: finding the subspace of a hidden state that carries a variable (Geiger et al. 2023).

Use:  das = Interchange(model, layer=3, rank=4, position=-1); das.fit(pairs); das.accuracy(test_pairs)
See:  with the source's value swapped in, the model answers as if the base's prompt had said what the source's said.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...positions import Positions
from ..base import Adapter, pick_layers
from ..orthonormal import orthonormalise


@dataclass(frozen=True)
class Pair:
    """A counterfactual: run `base` with the variable's value taken from `source`; `answer` is the token id to expect."""

    base: tuple[int, ...]               # token ids
    source: tuple[int, ...]
    answer: int


class Swap:
    """h ← h + Rᵀ(R s − R h) at one position: inside R's subspace the source's state, outside it the base's own."""

    def __init__(self, adapter: Interchange):
        self.adapter = adapter

    def __call__(self, operation, context):
        where, R = context[self.adapter]

        def swap(x):
            h = operation(x)                                              # (B, T, C)
            at = where[:, :, None].expand(-1, -1, h.shape[-1])            # (B, 1, C)
            state = h.gather(1, at)
            if self.adapter.source is None:                               # reading the source
                self.adapter.seen = state.detach()
                return h
            return h.scatter_add(1, at, ((self.adapter.source - state).float() @ R.T @ R).to(h.dtype))
        return swap


class Interchange(Adapter):
    """One subspace of rank r (1 to C) at the output of one layer and one prompt position (negative: from the end)."""

    def __init__(self, model, layer: int, rank: int = 1, position: int = -1):
        (layer,), C = pick_layers(model, layer), model.config.width
        if not isinstance(rank, int) or not 1 <= rank <= C:
            raise ValueError(f"rank is {rank!r}: expected a whole number from 1 to the model's width, {C}")
        super().__init__(model, layer=layer, rank=rank, position=position)
        self.layer, self.where = layer, Positions.parse([position])
        self.m = self.parameter(rank, C)
        with torch.no_grad():
            self.m.copy_(orthonormalise(torch.randn_like(self.m)))
        self.source = self.seen = None                                    # (B, 1, C) what is swapped in, and what was read

    def edits(self):
        return [(self.model.blocks[self.layer].output, Swap(self))]

    def prepare(self, tokens, mask, prompt_lengths, tasks, past):
        where = self.where.find(tokens, mask, prompt_lengths)             # (B, 1)
        if (where < 0).any():
            raise ValueError(f"position {self.where} lies beyond a prompt of this batch: choose one that every prompt has")
        return where, orthonormalise(self.m)

    def rotation(self) -> Tensor:
        """R (r, C)."""
        return orthonormalise(self.m.detach())

    def logits(self, pairs: list[Pair]) -> Tensor:
        """The last token's logits (B, V) of every base, with the source's value swapped in. Attaches itself for as long as it runs."""
        with self:
            try:
                with torch.no_grad():
                    self.model.stream(*pad([p.source for p in pairs], self.model.embed.weight.device))
                self.source = self.seen
                tokens, mask = pad([p.base for p in pairs], self.model.embed.weight.device)
                last = mask.sum(1) - 1                                    # (B,)
                return self.model(tokens, mask)[torch.arange(len(pairs), device=last.device), last]
            finally:
                self.source = self.seen = None

    def fit(self, pairs: list[Pair], steps: int = 200, lr: float = 1e-2, batch_size: int = 32, seed: int = 0) -> list[float]:
        """Turns R until the swapped runs give the counterfactual answers. Returns the losses; the model stays as it is.
        Raises ValueError for no pairs, or a prompt without the position."""
        if not pairs:
            raise ValueError("there are no pairs to fit to")
        optimizer, generator, losses = torch.optim.AdamW([self.m], lr=lr, weight_decay=0), torch.Generator().manual_seed(seed), []
        frozen = [p for p in self.model.parameters() if p.requires_grad]
        self.model.requires_grad_(False)
        try:
            for step in range(steps):
                chosen = [pairs[i] for i in torch.randint(len(pairs), (batch_size,), generator=generator).tolist()]
                answers = torch.tensor([p.answer for p in chosen], device=self.m.device)
                loss = F.cross_entropy(self.logits(chosen).float(), answers)
                loss.backward()
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 - step / steps)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        finally:
            for p in frozen:
                p.requires_grad_(True)
        return losses

    @torch.no_grad()
    def accuracy(self, pairs: list[Pair], among: list[int] | None = None, batch_size: int = 128) -> float:
        """Interchange accuracy: the share of pairs whose likeliest token (of the ids `among`, if given) is the answer."""
        if not pairs:
            raise ValueError("there are no pairs to score")
        right = 0
        for first in range(0, len(pairs), batch_size):
            chosen = pairs[first : first + batch_size]
            logits = self.logits(chosen)                                  # (B, V)
            if among is not None:
                keep = torch.full_like(logits, -torch.inf)
                keep[:, among] = 0
                logits = logits + keep
            right += (logits.argmax(-1).cpu() == torch.tensor([p.answer for p in chosen])).sum().item()
        return right / len(pairs)


def pad(rows, device) -> tuple[Tensor, Tensor]:
    """Token ids of unequal length, padded on the right: tokens and mask, (B, T) both."""
    T = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows], device=device)
    mask = torch.arange(T, device=device) < torch.tensor([[len(row)] for row in rows], device=device)
    return tokens, mask
