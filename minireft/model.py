"""A decoder-only transformer in one file, with a named site at every place where an adapter may stand.

Use:  model = Model(ModelConfig(...)); logits = model(tokens)         # (B, T) int64 → (B, T, V)
See:  `list(model.sites())` names every site; the model itself knows no method that will ever stand there.

Letters:  B batch  T new tokens  S all tokens so far  C width  H heads  G key/value heads  D head width  F hidden  V vocabulary
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Frozen: a model is what its configuration says."""

    vocab_size: int                     # V
    width: int                          # C
    layers: int                         # L
    heads: int                          # H
    hidden: int                         # F, the feed-forward's inner width
    context: int                        # the most tokens in one sequence
    kv_heads: int | None = None         # G; fewer than H is grouped-query attention; None means H
    head_dim: int | None = None         # D; None means C / H
    norm: str = "rms"                   # "rms" | "layer"
    norm_eps: float = 1e-5
    positions: str = "rotary"           # "rotary" | "learned"
    rotary_base: float = 10000.0
    activation: str = "swiglu"          # "swiglu" (gated) | "gelu" | "gelu_tanh"
    tied: bool = True                   # the output head shares the embedding's weight
    bias: bool = False                  # biases on every Linear
    qkv_bias: bool = False              # biases on query, key and value only

    def __post_init__(self):
        for name in ("vocab_size", "width", "layers", "heads", "hidden", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        choices = {"norm": ("rms", "layer"), "positions": ("rotary", "learned"), "activation": ("swiglu", "gelu", "gelu_tanh")}
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
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions turn pairs of channels")


# ---------------------------------------------------------------------------------------------------------------- sites

class Site(nn.Module):
    """A named place in the model: an operation, and the edits that stand on it.

    An edit is called with the operation that it wraps (the site's own, or the edit's before it) and the context of this
    forward pass, and returns the operation to run instead. Edits hold no parameters, so the model's own parameters and
    their names are the same with and without them.
    """

    def __init__(self):
        super().__init__()
        self.edits: list = []           # in the order of attachment

    def operation(self, x: Tensor) -> Tensor:
        return x

    def forward(self, *inputs: Tensor, context: dict):
        operation = self.operation
        for edit in self.edits:
            operation = edit(operation, context)
        return operation(*inputs)


class Embedding(Site):
    """embed(ids): (B, T) → (B, T, C)."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))              # (V, C)

    def operation(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Linear(Site):
    """y = x Wᵀ + b: (..., in) → (..., out)."""

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def operation(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Norm(Site):
    """RMSNorm, x / rms(x) ⊙ w, or LayerNorm, (x − mean) / std ⊙ w + b: (B, T, C) → (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.width))
        self.bias = nn.Parameter(torch.empty(config.width)) if config.norm == "layer" else None

    def operation(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class KeysValues(Site):
    """The projections' outputs, bias included, before any rotary turn: k, v (B, T, G·D) → k, v."""

    def operation(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


class Activation(Site):
    """The feed-forward's non-linearity: silu(gate) ⊙ up, or gelu(u): (B, T, F) → (B, T, F)."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def operation(self, *inputs: Tensor) -> Tensor:
        if self.kind == "swiglu":
            gate, up = inputs
            return F.silu(gate) * up
        return F.gelu(inputs[0], approximate="tanh" if self.kind == "gelu_tanh" else "none")


# ------------------------------------------------------------------------------------------------------------- positions

def rotary_angles(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles: positions (B, T) → two of (B, 1, T, D/2). Su et al. 2021, eq. 34."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)   # (D/2,)
    angle = positions[:, None, :, None].float() * frequency               # (B, 1, T, D/2)
    return angle.cos(), angle.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns channel i against channel i + D/2 by the position's angle: x (B, H, T, D)."""
    a, b = x.float().chunk(2, dim=-1)                                     # two of (B, H, T, D/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Cache:
    """Keys and values of the tokens seen so far, so that a new token costs one token's work.

    capacity: the most tokens (prompt and new ones, padding included) that will be written.
    """

    def __init__(self, model: Model, batch: int, capacity: int):
        c, like = model.config, model.embed.weight
        shape = (c.layers, batch, c.kv_heads, capacity, c.head_dim)       # (L, B, G, S, D)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.mask = torch.ones(batch, capacity, dtype=torch.bool, device=like.device)      # (B, S), True = real token
        self.padded = False                                               # whether any token so far is padding
        self.length = 0                                                   # tokens written, padding included
        self.longest = 0                                                  # real tokens of the row that has most

    def see(self, mask: Tensor | None, T: int) -> Tensor | None:
        """Takes in the mask (B, T) of the tokens about to be written; returns that of all (B, S), None if none is padding."""
        if mask is not None:
            self.padded = True
            self.mask[:, self.length : self.length + T] = mask
        self.longest = self.longest + T if mask is None else int(self.mask[:, : self.length + T].sum(1).max())
        return self.mask[:, : self.length + T] if self.padded else None

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Puts k, v (B, G, T, D) at `start` and returns all so far: two of (B, G, S, D)."""
        end = start + k.shape[2]
        self.keys[layer, :, :, start:end] = k
        self.values[layer, :, :, start:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keeps the batch rows `rows` (B',), in that order: beam search and finished sequences."""
        self.keys, self.values, self.mask = self.keys[:, rows], self.values[:, rows], self.mask[rows]
        self.longest = int(self.mask[:, : self.length].sum(1).max())


@dataclass
class Step:
    """What every layer of one forward pass shares."""

    context: dict                       # adapter → what it prepared for this pass
    rotary: tuple | None                # cos and sin, two of (B, 1, T, D/2)
    visible: Tensor | None              # (B, 1, T, S) True = may be attended to; None: the plain causal triangle, or everything
    causal: bool
    cache: Cache | None
    past: int                           # tokens in the cache before this pass


# ---------------------------------------------------------------------------------------------------------------- blocks

class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c, self.config, self.layer = config, config, layer
        bias = c.bias or c.qkv_bias
        self.query = Linear(c.width, c.heads * c.head_dim, bias)
        self.key = Linear(c.width, c.kv_heads * c.head_dim, bias)
        self.value = Linear(c.width, c.kv_heads * c.head_dim, bias)
        self.kv = KeysValues()
        self.output = Linear(c.heads * c.head_dim, c.width, c.bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:                   # (B, T, C) → (B, T, C)
        B, T, _ = x.shape
        context, heads = step.context, lambda y: y.view(B, T, -1, self.config.head_dim).transpose(1, 2)
        q = heads(self.query(x, context=context))                         # (B, H, T, D)
        k, v = self.kv(self.key(x, context=context), self.value(x, context=context), context=context)   # two of (B, T, G·D)
        k, v = heads(k), heads(v)                                         # two of (B, G, T, D)
        if step.rotary:
            q, k = turn(q, *step.rotary), turn(k, *step.rotary)
        if step.cache:
            k, v = step.cache.write(self.layer, step.past, k, v)          # two of (B, G, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=step.visible, is_causal=step.causal,
                                           enable_gqa=self.config.kv_heads < self.config.heads)         # (B, H, T, D)
        return self.output(y.transpose(1, 2).reshape(B, T, -1), context=context)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Linear(config.width, config.hidden, config.bias) if config.activation == "swiglu" else None
        self.up = Linear(config.width, config.hidden, config.bias)
        self.act = Activation(config.activation)
        self.down = Linear(config.hidden, config.width, config.bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:                   # (B, T, C) → (B, T, C)
        context = step.context
        inputs = [linear(x, context=context) for linear in (self.gate, self.up) if linear is not None]  # each (B, T, F)
        return self.down(self.act(*inputs, context=context), context=context)


class Block(nn.Module):
    """h ← h + attention(norm(h));  h ← h + ffn(norm(h));  then the site `output`: the stream that goes on."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm, self.attention = Norm(config), Attention(config, layer)
        self.ffn_norm, self.ffn = Norm(config), FeedForward(config)
        self.output = Site()

    def forward(self, h: Tensor, step: Step) -> Tensor:                   # (B, T, C) → (B, T, C)
        context = step.context
        h = h + self.attention(self.attention_norm(h, context=context), step)
        h = h + self.ffn(self.ffn_norm(h, context=context), step)
        return self.output(h, context=context)


class Model(nn.Module):
    """The whole decoder. Weights are drawn from torch's generator: normal, std 0.02, residual outputs divided by √(2L)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, self.config = config, config
        self.adapters: list = []            # those attached, in order; each prepares once a forward pass
        self.recompute = False              # True: blocks are run again in the backward pass instead of kept in memory
        self.tokenizer = None               # whoever loads a model with its tokenizer leaves it here
        self.embed = Embedding(c.vocab_size, c.width)
        self.position = Embedding(c.context, c.width) if c.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.layers))
        self.norm = Norm(c)
        self.head = Linear(c.width, c.vocab_size, False)
        if c.tied:
            self.head.weight = self.embed.weight
        self.reset()

    def reset(self) -> None:
        """Draws every weight anew."""
        for name, parameter in self.named_parameters():
            if "norm" in name and name.endswith("weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                residual = name.endswith(("attention.output.weight", "ffn.down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * self.config.layers) if residual else 1))

    def sites(self) -> dict[str, Site]:
        """Every place where an adapter may stand, by its path: 'embed', 'blocks.0.attention.query', 'blocks.0.output' ..."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Site)}

    def forward(self, tokens: Tensor, mask: Tensor | None = None, prompt_lengths: Tensor | None = None,
                tasks: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits of the next token after every token.

        tokens (B, T) int64; mask (B, T) bool, True = real token (padding stands on either side, never inside);
        prompt_lengths (B,) real tokens that belong to the prompt, counted from the first real one (None: the whole row);
        tasks (B,) int64, the row's adapter in a bank, −1 = none; cache: see `Cache`. Returns (B, T, V).
        Raises ValueError for wrong shapes and for more tokens than the context or the cache holds.
        """
        h, context = self.stream(tokens, mask, prompt_lengths, tasks, cache)
        return self.head(h, context=context)                              # (B, T, V)

    def stream(self, tokens: Tensor, mask: Tensor | None = None, prompt_lengths: Tensor | None = None,
               tasks: Tensor | None = None, cache: Cache | None = None) -> tuple[Tensor, dict]:
        """All of `forward` but the head: the normed stream (B, T, C), and the context that the head's site wants."""
        self._check(tokens, mask, prompt_lengths, tasks, cache)
        past, T = cache.length if cache else 0, tokens.shape[1]
        context = {adapter: adapter.prepare(tokens, mask, prompt_lengths, tasks, past) for adapter in self.adapters}

        real = mask if cache is None else cache.see(mask, T)              # (B, S), or None where nothing is padding
        if real is None:
            positions = torch.arange(past, past + T, device=tokens.device)[None]           # (1, T)
        else:                                                             # a token's position counts the real ones before it
            positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, past:]                 # (B, T)
        rotary = None
        if self.position is None:
            rotary = rotary_angles(positions, self.config.head_dim, self.config.rotary_base)
        visible = visibility(real, past, T, tokens.device)
        step = Step(context, rotary, visible, causal=visible is None and T > 1, cache=cache, past=past)

        h = self.embed(tokens, context=context)                           # (B, T, C)
        if self.position is not None:
            h = h + self.position(positions, context=context)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():                # gradient checkpointing: keep h, not what is inside
                h = checkpoint(block, h, step, use_reentrant=False)
            else:
                h = block(h, step)                                        # (B, T, C)
        if cache:
            cache.length = past + T
        return self.norm(h, context=context), context

    def _check(self, tokens, mask, prompt_lengths, tasks, cache) -> None:
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise ValueError(f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}: expected int64 of shape (B, T), not empty")
        B, T = tokens.shape
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise ValueError(f"tokens are {tokens.min()} ... {tokens.max()}: expected ids of this model's vocabulary of {self.config.vocab_size}")
        for name, value, shape in (("mask", mask, (B, T)), ("prompt_lengths", prompt_lengths, (B,)), ("tasks", tasks, (B,))):
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {shape} beside tokens {(B, T)}")
        if tasks is not None and not self.adapters:
            raise ValueError("tasks are given, and nothing is attached that reads them: attach the bank first")
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype}: expected torch.bool, True = real token")
        longest, total = (T + cache.longest, T + cache.length) if cache else (T, T)
        if longest > self.config.context:
            raise ValueError(f"{longest} tokens do not fit this model's context of {self.config.context}: shorten the prompt")
        if cache and (total > cache.mask.shape[1] or B != cache.mask.shape[0]):
            raise ValueError(f"the cache holds {tuple(cache.mask.shape)} (rows, tokens): {(B, total)} do not fit")


def visibility(real: Tensor | None, past: int, T: int, device) -> Tensor | None:
    """Which tokens each new token attends to, (B or 1, 1, T, S) bool; None where the plain causal rule says it all."""
    if real is None and (past == 0 or T == 1):
        return None
    visible = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)          # (T, S)
    if real is None:
        return visible[None, None]
    itself = torch.ones_like(visible).triu(past) & visible                # padding sees itself: a softmax over nothing is NaN
    return (visible & real[:, None, :] | itself)[:, None]                 # (B, 1, T, S)
