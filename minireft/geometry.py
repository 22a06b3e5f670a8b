"""Where tokens stand and who sees whom: rotary turns, relative positions, visibility.

Use:  visible, index = visibility(documents, past, T, causal, device); cos, sin = rotary_angles(index, D, base)
See:  a token sees its own document, before it or both ways; padding sees padding; positions restart with every document.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


def rotary_angles(positions: Tensor, head_dim: int, base: float, scaling: tuple | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles: positions (B, T) → two of (B, 1, T, D/2). Su et al. 2021, eq. 34.

    scaling (factor, low, high, original): turns slower than `low` in the `original` context are slowed by the factor, those
    faster than `high` are kept, straight lines between (Llama 3.1); original 0 slows all (linear interpolation).
    """
    frequency = base ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)   # (D/2,)
    if scaling:
        factor, low, high, original = scaling
        kept = ((original * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = positions[:, None, :, None].float() * frequency               # (B, 1, T, D/2)
    return angle.cos(), angle.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns channel i against channel i + D/2 by the position's angle: x (B, H, T, D)."""
    a, b = x.float().chunk(2, dim=-1)                                     # two of (B, H, T, D/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class RelativePositions(nn.Module):
    """A learned bias on every head's scores by the distance key − query (Raffel et al. 2020, section 2.1): near distances
    have a bucket each, far ones share one by logarithm, and those beyond `relative_furthest` the last."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.buckets, self.furthest = config.relative_buckets, config.relative_furthest
        self.weight = nn.Parameter(torch.empty(self.buckets, config.heads))                # (buckets, H)

    def bucket(self, distance: Tensor, causal: bool) -> Tensor:
        later, buckets = 0, self.buckets
        if not causal:                                                    # half the buckets are for later keys
            buckets //= 2
            later = (distance > 0) * buckets
        distance = (-distance).clamp(min=0) if causal else distance.abs()
        near = buckets // 2
        far = near + ((distance / near).clamp(min=1).log() / math.log(self.furthest / near) * (buckets - near)).long()
        return later + torch.where(distance < near, distance, far.clamp(max=buckets - 1))

    def forward(self, past: int, T: int, causal: bool, visible: Tensor | None) -> Tensor:
        """What is added to the scores, (B or 1, H, T, S): the bias, and −∞ where nothing may be seen."""
        keys = torch.arange(past + T, device=self.weight.device)          # (S,)
        distance = keys - keys[past:, None]                               # (T, S)
        bias = F.embedding(self.bucket(distance, causal), self.weight).permute(2, 0, 1)[None]           # (1, H, T, S)
        visible = distance <= 0 if visible is None and causal else visible
        return bias if visible is None else bias.masked_fill(~visible, -torch.inf)


def visibility(real: Tensor | None, past: int, T: int, causal: bool, device) -> tuple[Tensor | None, Tensor]:
    """Which tokens each new token attends to, (B or 1, 1, T, S) bool or None where the plain causal rule or none says it
    all; and each new token's index in its document, (B or 1, T). A token sees its own document; padding sees padding.
    """
    index = torch.arange(past, past + T, device=device)[None]             # (1, T)
    if real is None and (not causal or past == 0 or T == 1):
        return None, index
    if real is None:
        return (torch.arange(past + T, device=device) <= index[0, :, None])[None, None], index
    same = real[:, past:, None] == real[:, None, :]                       # (B, T, S)
    before = same.tril(past)
    return (before if causal else same)[:, None], before.sum(-1) - 1
