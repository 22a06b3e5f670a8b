"""Transformers in one file: decoder, encoder, encoder–decoder, with a named site at every place where an adapter may stand.

Use:  model = Model(ModelConfig(...)); logits = model(tokens)         # (B, T) int64 → (B, T, V)
See:  `list(model.sites())` names every site; the model itself knows no method that will ever stand there.

Letters:  B batch  T new tokens  S all tokens so far  C width  H heads  G key/value heads  D head width  F hidden  V vocabulary
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cache import Cache
from .config import ModelConfig
from .geometry import RelativePositions, rotary_angles, turn, visibility


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

    def __init__(self, config: ModelConfig, width: int | None = None):
        super().__init__()
        self.eps, width = config.norm_eps, width or config.width
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if config.norm == "layer" else None

    def operation(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class KeysValues(Site):
    """The projections' outputs, bias included, before any rotary turn: k, v (B, T, G·D) → k, v."""

    def operation(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


GATED = {"swiglu": F.silu, "geglu_tanh": partial(F.gelu, approximate="tanh")}
PLAIN = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}


class Activation(Site):
    """The feed-forward's non-linearity γ: γ(gate) ⊙ up, or γ(u): (B, T, F) → (B, T, F)."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def operation(self, *inputs: Tensor) -> Tensor:
        if self.kind in GATED:
            gate, up = inputs
            return GATED[self.kind](gate) * up
        return PLAIN[self.kind](inputs[0])


class MaskedHead(Linear):
    """BERT's way to the vocabulary: V norm(γ(D h + d)) + b (Devlin et al. 2018): (B, T, C) → (B, T, V)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.width, config.vocab_size, True)
        self.dense, self.norm = nn.Linear(config.width, config.width), nn.LayerNorm(config.width, config.norm_eps)
        self.activation = PLAIN[config.activation]

    def operation(self, x: Tensor) -> Tensor:
        return super().operation(self.norm(self.activation(self.dense(x))))


@dataclass
class Step:
    """What every layer of one pass through a stack shares."""

    context: dict                       # adapter → what it prepared for this pass
    rotary: tuple | None                # cos and sin, two of (B, 1, T, D/2)
    visible: Tensor | None              # (B, 1, T, S) True = may be attended to, or (B, H, T, S) a bias; None: see causal
    causal: bool                        # True: the plain causal triangle
    cache: Cache | None
    past: int                           # tokens in the cache before this pass
    memory: Tensor | None = None        # (B, S, C) what the encoder made of its tokens, and which are real: (B, 1, 1, S)
    memory_visible: Tensor | None = None


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
        self.query_norm, self.key_norm = (Norm(c, c.head_dim), Norm(c, c.head_dim)) if c.qk_norm else (None, None)
        self.output = Linear(c.heads * c.head_dim, c.width, c.bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:                   # (B, T, C) → (B, T, C)
        q, (k, v) = self.queries(x, step), self.keys_values(x, step)      # (B, H, T, D), two of (B, G, T, D)
        if step.rotary:
            q, k = turn(q, *step.rotary), turn(k, *step.rotary)
        if step.cache:
            k, v = step.cache.write(self.layer, step.past, k, v)          # two of (B, G, S, D)
        return self.mix(q, k, v, step.visible, step.causal, step)

    def heads(self, y: Tensor) -> Tensor:                                 # (B, T, H·D) → (B, H, T, D)
        return y.view(*y.shape[:2], -1, self.config.head_dim).transpose(1, 2)

    def queries(self, x: Tensor, step: Step) -> Tensor:
        q = self.heads(self.query(x, context=step.context))               # (B, H, T, D)
        return self.query_norm(q, context=step.context) if self.query_norm else q

    def keys_values(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        k, v = self.key(x, context=step.context), self.value(x, context=step.context)      # two of (B, T, G·D)
        k, v = map(self.heads, self.kv(k, v, context=step.context))       # two of (B, G, T, D)
        return self.key_norm(k, context=step.context) if self.key_norm else k, v

    def mix(self, q, k, v, visible: Tensor | None, causal: bool, step: Step) -> Tensor:    # → (B, T, C)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal,
                                           enable_gqa=self.config.kv_heads < self.config.heads)         # (B, H, T, D)
        return self.output(y.transpose(1, 2).flatten(2), context=step.context)


class CrossAttention(Attention):
    """A decoder's look at what the encoder made: no positions, and keys and values that are computed once a sequence."""

    def forward(self, x: Tensor, step: Step) -> Tensor:                   # (B, T, C) → (B, T, C)
        known = step.cache.memory if step.cache else {}
        if self.layer not in known:
            known[self.layer] = self.keys_values(step.memory, step)       # two of (B, G, S, D)
        return self.mix(self.queries(x, step), *known[self.layer], step.memory_visible, False, step)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Linear(config.width, config.hidden, config.bias) if config.activation in GATED else None
        self.up = Linear(config.width, config.hidden, config.bias)
        self.act = Activation(config.activation)
        self.down = Linear(config.hidden, config.width, config.bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:                   # (B, T, C) → (B, T, C)
        context = step.context
        inputs = [linear(x, context=context) for linear in (self.gate, self.up) if linear is not None]  # each (B, T, F)
        return self.down(self.act(*inputs, context=context), context=context)


class Block(nn.Module):
    """h ← h + part(norm(h)), or post-norm norm(h + part(h)), for each part: attention, a look at the encoder where there is
    one, feed-forward. Then the site `output`: the stream that goes on."""

    def __init__(self, config: ModelConfig, layer: int, cross: bool):
        super().__init__()
        self.norm_first = config.norm_first
        self.attention_norm, self.attention = Norm(config), Attention(config, layer)
        self.cross_norm, self.cross = (Norm(config), CrossAttention(config, layer)) if cross else (None, None)
        self.ffn_norm, self.ffn = Norm(config), FeedForward(config)
        self.output = Site()

    def forward(self, h: Tensor, step: Step) -> Tensor:                   # (B, T, C) → (B, T, C)
        for norm, part in ((self.attention_norm, self.attention), (self.cross_norm, self.cross), (self.ffn_norm, self.ffn)):
            if part is not None and self.norm_first:
                h = h + part(norm(h, context=step.context), step)
            elif part is not None:
                h = norm(h + part(h, step), context=step.context)
        return self.output(h, context=step.context)


def place(config: ModelConfig) -> tuple[nn.Module | None, nn.Module | None]:
    """What tells a stack its tokens' places, beside rotary turns: a learned table, or a bias on the scores."""
    learned, relative = config.positions == "learned", config.positions == "relative"
    return Embedding(config.context, config.width) if learned else None, RelativePositions(config) if relative else None


class Model(nn.Module):
    """The whole. Weights are drawn from torch's generator: normal, std 0.02, residual outputs divided by √(2L).

    `blocks` holds every layer in the order of the flow: an encoder's, then a decoder's. Where there are both, the encoder
    begins with `embed` and has an `encoder_norm`, the decoder begins with `decoder_embed`, which is the same weight.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, self.config = config, config
        self.adapters: list = []            # those attached, in order; each prepares once a forward pass
        self.recompute = False              # True: blocks are run again in the backward pass instead of kept in memory
        self.tokenizer = None               # whoever loads a model with its tokenizer leaves it here
        self.embed = Embedding(c.vocab_size, c.width)
        self.position, self.relative = place(c)
        n, self.two = c.encoder_layers, 0 < c.encoder_layers < c.layers   # two: an encoder and a decoder
        self.blocks = nn.ModuleList(Block(c, i - n if i >= n else i, cross=self.two and i >= n) for i in range(c.layers))
        self.norm = Norm(c)
        self.head = MaskedHead(c) if c.masked_head else Linear(c.width, c.vocab_size, False)
        if self.two:
            self.encoder_position, self.encoder_relative = place(c)
            self.encoder_norm, self.decoder_embed = Norm(c), Embedding(c.vocab_size, c.width)
        self.tie()
        self.reset()

    def tie(self) -> None:
        """Makes weights that are one by the configuration one tensor: after weights were assigned from elsewhere."""
        for site in ([self.head] if self.config.tied else []) + ([self.decoder_embed] if self.two else []):
            site.weight = self.embed.weight

    def reset(self) -> None:
        """Draws every weight anew."""
        for name, parameter in self.named_parameters():
            if "norm" in name and name.endswith("weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif not parameter.is_meta:                                   # there are no numbers there, and asking costs 70 MB of imports
                residual = name.endswith(("attention.output.weight", "cross.output.weight", "ffn.down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * self.config.layers) if residual else 1))

    def sites(self) -> dict[str, Site]:
        """Every place where an adapter may stand, by its path: 'embed', 'blocks.0.attention.query', 'blocks.0.output' ..."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Site)}

    def forward(self, tokens: Tensor, mask: Tensor | None = None, prompt_lengths: Tensor | None = None,
                tasks: Tensor | None = None, cache: Cache | None = None, decoder_tokens: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the next token after every token; an encoder's, of the token itself.

        tokens (B, T) int64; mask (B, T) bool, True = real token (padding stands on either side, never inside), or int64,
        the number of the document that a token belongs to, 0 = padding, where a row packs several that must not meet;
        prompt_lengths (B,) real tokens that belong to the prompt, counted from the first real one (None: the whole row);
        tasks (B,) int64, the row's adapter in a bank, −1 = none; cache: see `Cache`; decoder_tokens (B, U), for an
        encoder–decoder alone: `start` and what follows it, and the logits are (B, U, V). Its filled cache holds what was
        encoded: from then on `tokens` are the decoder's. Raises ValueError for wrong shapes and for more tokens than the
        context or the cache holds.
        """
        h, context = self.stream(tokens, mask, prompt_lengths, tasks, cache, decoder_tokens)
        return self.head(h, context=context)                              # (B, T, V)

    def stream(self, tokens: Tensor, mask: Tensor | None = None, prompt_lengths: Tensor | None = None, tasks: Tensor | None = None,
               cache: Cache | None = None, decoder_tokens: Tensor | None = None) -> tuple[Tensor, dict]:
        """All of `forward` but the head: the normed stream (B, T, C), and the context that the head's site wants."""
        self._check(tokens, mask, prompt_lengths, tasks, cache, decoder_tokens)
        past = cache.length if cache else 0
        context = {adapter: adapter.prepare(tokens, mask, prompt_lengths, tasks, past) for adapter in self.adapters}
        memory = seen = None
        if self.config.encoder_layers and past == 0:
            memory = self._stack(True, tokens, mask, context)             # (B, T, C)
            if not self.two:
                return memory, context
            seen = None if mask is None else (mask > 0)[:, None, None]    # (B, 1, 1, T)
            tokens, mask = decoder_tokens, None
        if cache:
            mask = cache.see(mask, tokens.shape[1])
            seen = cache.memory_visible = seen if past == 0 else cache.memory_visible
        return self._stack(False, tokens, mask, context, cache, past, memory, seen), context

    def _stack(self, encoder: bool, tokens: Tensor, real: Tensor | None, context: dict, cache: Cache | None = None, past: int = 0,
               memory: Tensor | None = None, memory_visible: Tensor | None = None) -> Tensor:
        """Embeds tokens (B, T) and runs them through the blocks of one stack; real (B, S) as `mask`: (B, T, C)."""
        c, T, n = self.config, tokens.shape[1], self.config.encoder_layers
        blocks, embed = (self.blocks[:n], self.embed) if encoder else (self.blocks[n:], self.decoder_embed if self.two else self.embed)
        position, relative, norm = (getattr(self, "encoder_" * (encoder and self.two) + name) for name in ("position", "relative", "norm"))
        visible, index = visibility(real, past, T, not encoder, tokens.device)
        rotary = rotary_angles(index, c.head_dim, c.rotary_base, c.rotary_scaling) if c.positions == "rotary" else None
        if relative is not None:                                          # the bias says as well who is seen
            visible = relative(past, T, not encoder, visible)             # (B or 1, H, T, S)
        step = Step(context, rotary, visible, not encoder and visible is None and T > 1, cache, past, memory, memory_visible)
        h = embed(tokens, context=context)                                # (B, T, C)
        if position is not None:
            h = h + position(index, context=context)
        if not c.norm_first:
            h = norm(h, context=context)
        for block in blocks:
            if self.recompute and torch.is_grad_enabled():                # gradient checkpointing: keep h, not what is inside
                h = checkpoint(block, h, step, use_reentrant=False)
            else:
                h = block(h, step)                                        # (B, T, C)
        if cache:
            cache.length = past + T
        return norm(h, context=context) if c.norm_first else h

    def _check(self, tokens, mask, prompt_lengths, tasks, cache, decoder_tokens) -> None:
        self._check_ids("tokens", tokens)
        first = cache is None or cache.length == 0
        if (decoder_tokens is not None) != (self.two and first):
            raise ValueError("decoder_tokens are for an encoder–decoder's first pass, and needed there: "
                             + ("give the start token and what follows it" if self.two and first else "leave them out here"))
        if decoder_tokens is not None:
            self._check_ids("decoder_tokens", decoder_tokens)
        if cache and self.config.architecture == "encoder":
            raise ValueError("an encoder sees both ways: nothing can be cached, call it without")
        B, T = tokens.shape
        for name, value, shape in (("mask", mask, (B, T)), ("prompt_lengths", prompt_lengths, (B,)), ("tasks", tasks, (B,))):
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {shape} beside tokens {(B, T)}")
        if tasks is not None and not self.adapters:
            raise ValueError("tasks are given, and nothing is attached that reads them: attach the bank first")
        if mask is not None and mask.dtype not in ((torch.bool, torch.int64) if cache is None else (torch.bool,)):
            raise ValueError(f"mask is {mask.dtype}: expected torch.bool, True = real token; or, without a cache, int64 document numbers")
        if mask is not None and mask.dtype != torch.bool and mask.device.type == "cpu" and not torch.compiler.is_compiling():
            begins = F.pad(mask, (1, 0)).diff() != 0                      # (B, T)
            pieces = mask.mul(begins).sort(1).values                      # (B, T) the numbers that begin a piece, behind zeros
            if (mask < 0).any() or ((pieces[:, 1:] == pieces[:, :-1]) & (pieces[:, 1:] > 0)).any():
                raise ValueError(f"mask is {mask.tolist()}: expected each document's number, above 0, on one unbroken piece of its row, "
                                 "and 0 for padding")
        new = T if decoder_tokens is None else decoder_tokens.shape[1]
        longest = max(T, new + (cache.longest if cache else 0))
        if longest > self.config.context:
            raise ValueError(f"{longest} tokens do not fit this model's context of {self.config.context}: shorten the prompt")
        if cache and (new + cache.length > cache.mask.shape[1] or B != cache.mask.shape[0]):
            raise ValueError(f"the cache holds {tuple(cache.mask.shape)} (rows, tokens): {(B, new + cache.length)} do not fit")

    def _check_ids(self, name: str, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
            raise ValueError(f"{name} are {ids.dtype} of shape {tuple(ids.shape)}: expected int64 of shape (B, T), not empty")
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            raise ValueError(f"{name} are {ids.min()} ... {ids.max()}: expected ids of this model's vocabulary of {self.config.vocab_size}")
