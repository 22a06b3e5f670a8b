"""Where in a prompt a ReFT edit stands: 'f7+l7' and the prompts' lengths become indices.

Use:  Positions.parse("f7+l7").indices(start, lengths, T)      # (B, P) int64, −1 = no token
See:  every position of a short prompt exactly once: f7+l7 on 5 tokens takes the first 2 and the last 3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """The first `first` and the last `last` real tokens of a prompt; or all of them, the generated ones too if asked."""

    first: int = 0
    last: int = 0
    all: bool = False
    generated: bool = False

    @classmethod
    def parse(cls, text: str) -> Positions:
        """'f7', 'l7', 'f7+l7', 'all' or 'all+generated'. ValueError for anything else."""
        if text == "all" or text == "all+generated":
            return cls(all=True, generated=text != "all")
        match = re.fullmatch(r"(?:f(\d+))?(\+)?(?:l(\d+))?", text) if isinstance(text, str) else None
        first, plus, last = match.groups() if match else (None, None, None)
        if (first is None and last is None) or bool(plus) != (first is not None and last is not None):
            raise ValueError(f"positions are {text!r}: expected 'fN', 'lN', 'fN+lM', 'all' or 'all+generated', e.g. 'f7+l7'")
        found = cls(first=int(first or 0), last=int(last or 0))
        if 0 in (first and int(first), last and int(last)):
            raise ValueError(f"positions are {text!r}: a count must be at least 1; leave the part out instead")
        return found

    def __str__(self) -> str:
        if self.all:
            return "all+generated" if self.generated else "all"
        return "+".join(f"{letter}{n}" for letter, n in (("f", self.first), ("l", self.last)) if n)

    def indices(self, start: Tensor, lengths: Tensor, T: int) -> Tensor:
        """Indices into each row's T tokens: start (B,) first real token, lengths (B,) prompt tokens → (B, P), −1 = none.

        With n prompt tokens and p + s > n the parts shrink to p' = min(p, max(⌊n/2⌋, n − s)) and s' = min(s, n − p'), so
        that they never meet. (The paper halves the prompt; pyreft floors both halves and skips an odd middle token.)
        """
        n, start = lengths[:, None], start[:, None]                       # (B, 1)
        if self.all:
            slot = torch.arange(T, device=n.device)                       # (T,)
            return torch.where(slot < n, start + slot, -1)                # (B, T)
        first = (n - self.last).maximum(n // 2).clamp(max=self.first)     # (B, 1) p'
        last = (n - first).clamp(max=self.last)                           # (B, 1) s'
        slot = torch.arange(self.first, device=n.device)                  # (p,)
        prefix = torch.where(slot < first, start + slot, -1)              # (B, p)
        slot = torch.arange(self.last, device=n.device)                   # (s,)
        suffix = torch.where(slot < last, start + n - last + slot, -1)    # (B, s)
        return torch.cat((prefix, suffix), dim=1)                         # (B, P)

    def groups(self, device=None) -> Tensor:
        """Which set of untied parameters each slot uses: 0 for the prefix, 1 for the suffix. (P,)"""
        return (torch.arange(self.first + self.last, device=device) >= self.first).long()


def prompt_span(tokens: Tensor, mask: Tensor | None, prompt_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """First real token and number of prompt tokens of every row, two of (B,), under padding on either side."""
    B, T = tokens.shape
    if mask is None:
        start, real = tokens.new_zeros(B), tokens.new_full((B,), T)
    else:
        start, real = mask.long().argmax(1), mask.sum(1)
    return start, real if prompt_lengths is None else prompt_lengths.to(real).minimum(real).clamp(min=0)
