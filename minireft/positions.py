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
    """The first `first` and the last `last` real tokens of a prompt; or all, the generated ones too if asked; or a list."""

    first: int = 0
    last: int = 0
    all: bool = False
    generated: bool = False
    listed: tuple[int, ...] = ()        # indices of real prompt tokens, negative ones from the end; beyond the prompt: no edit
    strict: bool = False                # a prompt too short for what is asked is an error, not a case for the rule below

    @classmethod
    def parse(cls, text) -> Positions:
        """'f7', 'l7', 'f7+l7', 'all', 'all+generated', or indices: [0, 3, -1] or '0,3,-1'. ValueError for anything else."""
        if isinstance(text, Positions):
            return text
        listed = [text] if isinstance(text, int) else text
        if isinstance(text, str) and re.fullmatch(r"-?\d+(,-?\d+)*", text):
            listed = [int(x) for x in text.split(",")]
        if isinstance(listed, (list, tuple)) and all(type(x) is int for x in listed):
            if len(set(listed)) < len(listed) or not listed:
                raise ValueError(f"positions are {text!r}: expected at least one index, each once")
            return cls(listed=tuple(listed))
        if text == "all" or text == "all+generated":
            return cls(all=True, generated=text != "all")
        match = re.fullmatch(r"(?:f(\d+))?(\+)?(?:l(\d+))?", text) if isinstance(text, str) else None
        first, plus, last = match.groups() if match else (None, None, None)
        if (first is None and last is None) or bool(plus) != (first is not None and last is not None):
            raise ValueError(f"positions are {text!r}: expected 'fN', 'lN', 'fN+lM', 'all', 'all+generated' or "
                             "indices, e.g. 'f7+l7' or '0,3,-1'")
        found = cls(first=int(first or 0), last=int(last or 0))
        if 0 in (first and int(first), last and int(last)):
            raise ValueError(f"positions are {text!r}: a count must be at least 1; leave the part out instead")
        return found

    def __str__(self) -> str:
        if self.all:
            return "all+generated" if self.generated else "all"
        if self.listed:
            return ",".join(map(str, self.listed))
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
        if self.listed:
            slot = torch.tensor(self.listed, device=n.device)             # (P,)
            slot = torch.where(slot < 0, slot + n, slot)                  # (B, P) from the end: 0 ... n − 1 where it exists
            once = (slot[:, :, None] == slot[:, None, :]).tril(-1).any(2)                  # 0 and −1 of a prompt of one token
            return torch.where((slot >= 0) & (slot < n) & ~once, start + slot, -1)         # (B, P)
        slot = torch.arange(self.first + self.last, device=n.device)      # (P,)
        prefix = slot < self.first                                        # (P,) the rest counts from the prompt's end
        token = torch.where(prefix, slot, slot - len(slot) + n)           # (B, P)
        border = (n - self.last).maximum(n // 2).clamp(max=self.first)    # (B, 1) p', where the suffix may begin
        return torch.where((token < border) == prefix, start + token, -1)                  # (B, P)

    def may_meet(self, other: Positions) -> bool:
        """Whether some prompt exists in which both name one token."""
        def ends(p):                                                      # what it names from the front, and from the back
            return ({*range(p.first), *(i for i in p.listed if i >= 0)},
                    {*range(-p.last, 0), *(i for i in p.listed if i < 0)})
        (front, back), (front2, back2) = ends(self), ends(other)
        return bool(self.all or other.all or front & front2 or back & back2 or front and back2 or back and front2)

    def find(self, tokens: Tensor, mask: Tensor | None, prompt_lengths: Tensor | None) -> Tensor:
        """`indices` in a batch of `Model.forward`: (B, P)."""
        start, lengths = prompt_span(tokens, mask, None if self.generated else prompt_lengths)          # two of (B,)
        return self.indices(start, lengths, tokens.shape[1])

    @property
    def least(self) -> int:
        """How many tokens must be found in every prompt: under the strict rule all that are asked for, otherwise 0."""
        return (self.first + self.last + len(self.listed)) * self.strict

    def groups(self, device=None) -> Tensor:
        """Which set of untied parameters each slot uses: 0 for the prefix, 1 for the suffix. (P,)"""
        return (torch.arange(self.first + self.last, device=device) >= self.first).long()


def demand(positions: Tensor, least: int | Tensor) -> None:
    """The strict rule: ValueError where a row of positions (B, P) holds fewer than `least`, a number or (B,). The prompts
    must be looked at, so on a GPU it waits for them; inside torch.compile nothing can be looked at, and nothing is checked."""
    if torch.compiler.is_compiling() or isinstance(least, int) and least == 0:
        return
    found = (positions >= 0).sum(1)                                       # (B,)
    if (found < least).any():
        row = int((found < least).nonzero()[0])
        wanted = least if isinstance(least, int) else int(least[row])
        raise ValueError(f"the prompt in row {row} is too short for its positions: {int(found[row])} of {wanted} can be edited, and "
                         "strict=True demands all; ask for fewer, leave the row out, or set strict=False for the short-prompt rule")


def prompt_span(tokens: Tensor, mask: Tensor | None, prompt_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """First real token and number of prompt tokens of every row, two of (B,), under padding on either side."""
    B, T = tokens.shape
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"the mask holds {mask.dtype} document numbers: a row that packs several has no one prompt, so positions in it "
                         "are not defined; train ReFT and its kin on rows that are not packed")
    if mask is None:
        start, real = tokens.new_zeros(B), tokens.new_full((B,), T)
    else:
        start, real = mask.long().argmax(1), mask.sum(1)
    return start, real if prompt_lengths is None else prompt_lengths.to(real).minimum(real).clamp(min=0)
