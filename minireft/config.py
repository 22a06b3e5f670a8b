"""The shape of a model, as plain data. A file of it is a base's config.json.

Use:  config = ModelConfig(vocab_size=500, width=128, layers=8, heads=4, hidden=384, context=96)
See:  `encoder_layers` makes it a decoder (0), an encoder (all of them) or an encoder–decoder; errors name what does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Frozen: a model is what its configuration says."""

    vocab_size: int                     # V
    width: int                          # C
    layers: int                         # L, all of them
    heads: int                          # H
    hidden: int                         # F, the feed-forward's inner width
    context: int                        # the most tokens in one sequence
    kv_heads: int | None = None         # G; fewer than H is grouped-query attention; None means H
    head_dim: int | None = None         # D; None means C / H
    norm: str = "rms"                   # "rms" | "layer"
    norm_eps: float = 1e-5
    positions: str = "rotary"           # "rotary" | "learned" | "relative" (a bias on the scores by bucket of distance)
    rotary_base: float = 10000.0
    rotary_scaling: tuple | None = None # (factor, low, high, original context), see geometry.py
    relative_buckets: int = 32
    relative_furthest: int = 128        # distances from here on share the last bucket
    activation: str = "swiglu"          # gated: "swiglu" | "geglu_tanh"; plain: "gelu" | "gelu_tanh" | "relu"
    tied: bool = True                   # the output head shares the embedding's weight
    masked_head: bool = False           # BERT's head, with a layer of its own before the vocabulary
    bias: bool = False                  # biases on every Linear
    qkv_bias: bool = False              # biases on query, key and value only
    qk_norm: bool = False               # queries and keys are normed, head by head, before rotary turns
    encoder_layers: int = 0             # so many layers, from the first, see both ways: 0 a decoder, L an encoder, else both
    norm_first: bool = True             # False: post-norm, each sum is normed, the embedding too, and nothing at the end
    start: int | None = None            # the token before a decoder's first, where there is an encoder too; None means 0

    def __post_init__(self):
        for name in ("vocab_size", "width", "layers", "heads", "hidden", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        choices = {"norm": ("rms", "layer"), "positions": ("rotary", "learned", "relative"),
                   "activation": ("swiglu", "geglu_tanh", "gelu", "gelu_tanh", "relu")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(known)}")
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.head_dim is None:
            if self.width % self.heads:
                raise ValueError(f"width {self.width} is no multiple of heads {self.heads}: change one, or set head_dim")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        for name in ("kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}")
        if self.masked_head and self.activation in ("swiglu", "geglu_tanh"):
            raise ValueError(f"masked_head has a plain activation of its own, and activation is {self.activation!r}: expected gelu, gelu_tanh or relu")
        if not 0 <= self.encoder_layers <= self.layers:
            raise ValueError(f"encoder_layers is {self.encoder_layers}: expected 0 (a decoder) to layers {self.layers} (an encoder)")
        if self.rotary_scaling is not None:
            if len(self.rotary_scaling) != 4 or not self.rotary_scaling[0] >= 1 or not self.rotary_scaling[1] < self.rotary_scaling[2]:
                raise ValueError(f"rotary_scaling is {self.rotary_scaling}: expected (factor from 1, low, high above it, original context)")
            object.__setattr__(self, "rotary_scaling", tuple(self.rotary_scaling))
        object.__setattr__(self, "start", (self.start or 0) if 0 < self.encoder_layers < self.layers else None)
        if not 4 <= self.relative_buckets < 2 * self.relative_furthest:
            raise ValueError(f"relative_buckets is {self.relative_buckets}: expected 4 to twice relative_furthest {self.relative_furthest}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions turn pairs of channels")

    @property
    def architecture(self) -> str:
        return "decoder" if self.encoder_layers == 0 else "encoder" if self.start is None else "encoder-decoder"
