"""Generation: a batch of prompts in, their continuations out.

Use:  texts = generate(model, tokenizer, ["prompt", ...], max_new_tokens=64)
See:  the prompt is edited once, in the first pass; every later token costs what it costs without adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .data import encode_prompt
from .model import Cache, Model


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """The next token of each row: logits (B, V) → (B,). Greedy at temperature 0; otherwise a draw from the nucleus of top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)          # two of (B, V)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)                       # the likeliest tokens that hold top_p together
    return ids.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


@torch.no_grad()
def generate_ids(model: Model, prompts: list[list[int]], max_new_tokens: int, eos: int | None, temperature: float = 0.0,
                 top_p: float = 1.0, seed: int = 0, tasks: Tensor | None = None) -> list[list[int]]:
    """Token ids in, new token ids out (without the end of text). Ends at `eos`, max_new_tokens, or a full context."""
    device, B, T = model.embed.weight.device, len(prompts), max(map(len, prompts))
    generator = torch.Generator(device).manual_seed(seed) if temperature else None
    tokens, mask = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.bool)
    for i, ids in enumerate(prompts):                                     # padded on the left: all rows end together
        tokens[i, T - len(ids):], mask[i, T - len(ids):] = torch.tensor(ids), True
    tokens, mask = tokens.to(device), mask.to(device)
    steps = min(max_new_tokens, model.config.context - T)
    cache, new = Cache(model, B, T + steps), []
    done = torch.zeros(B, dtype=torch.bool, device=device)
    training = model.training
    model.eval()
    try:
        for step in range(steps):
            padded = mask if step == 0 and not mask.all() else None
            h, context = model.stream(tokens, padded, tasks=tasks, cache=cache)             # (B, T or 1, C)
            tokens = pick(model.head(h[:, -1], context=context), temperature, top_p, generator)[:, None]   # (B, 1)
            new.append(tokens)
            if eos is not None:
                done |= tokens[:, 0] == eos
                if done.all():
                    break
    finally:
        model.train(training)
    rows = torch.cat(new, 1).tolist() if new else [[] for _ in prompts]   # (B, steps)
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def generate(model: Model, tokenizer, prompts: list[str], max_new_tokens: int = 64, temperature: float = 0.0,
             top_p: float = 1.0, seed: int = 0, tasks: Tensor | None = None) -> list[str]:
    """The continuation of each prompt, as text.

    temperature 0 is greedy; top_p in (0, 1] keeps the likeliest tokens that hold that probability together; `seed` makes
    a draw repeatable; tasks (B,) as in `Model.forward`. A row ends at the end of text or where the context is full.
    Raises ValueError for an empty prompt, one that fills the context, and settings out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}: expected 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: expected a number above 0 and at most 1")
    if isinstance(prompts, str):
        raise ValueError(f"prompts are one string, {prompts[:40]!r}: expected a list of strings")
    if not prompts:
        return []
    ids = [encode_prompt(tokenizer, prompt, model.config.context - 1) for prompt in prompts]
    return [tokenizer.decode(row) for row in generate_ids(model, ids, max_new_tokens, tokenizer.eos_id, temperature, top_p, seed, tasks)]
