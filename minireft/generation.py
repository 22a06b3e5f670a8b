"""Generation: a batch of prompts in, their continuations out.

Use:  texts = generate(model, tokenizer, ["prompt", ...], max_new_tokens=64)
See:  the prompt is edited once, in the first pass; every later token costs what it costs without adapters.
"""

from __future__ import annotations

import contextlib

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


def left_padded(prompts: list[list[int]], device) -> tuple[Tensor, Tensor | None]:
    """Tokens and mask, (B, T) both, all rows ending together; no mask where nothing is padding."""
    B, T = len(prompts), max(map(len, prompts))
    tokens, mask = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.bool)
    for i, ids in enumerate(prompts):
        tokens[i, T - len(ids):], mask[i, T - len(ids):] = torch.tensor(ids), True
    return tokens.to(device), None if mask.all() else mask.to(device)


def begin(model: Model, prompts: list[list[int]]) -> tuple[Tensor, Tensor | None, Tensor | None, list[int]]:
    """The first pass over a batch of prompts: tokens and mask (B, T), an encoder–decoder's decoder_tokens (B, 1), and how
    many tokens of its context each row has taken. ValueError for a model that generates nothing."""
    device, start = model.embed.weight.device, model.config.start
    if model.config.architecture == "encoder":
        raise ValueError("an encoder generates nothing: it fills in masked tokens, or classifies; see minireft.classify")
    tokens, mask = left_padded(prompts, device)                           # (B, T)
    if start is None:
        return tokens, mask, None, [len(ids) for ids in prompts]
    return tokens, mask, torch.full((len(prompts), 1), start, device=device), [1] * len(prompts)


@contextlib.contextmanager
def evaluating(model: Model):
    """Evaluation mode without gradients; what was before, afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def generate_ids(model: Model, prompts: list[list[int]], max_new_tokens: int, eos: int | None, temperature: float = 0.0,
                 top_p: float = 1.0, seed: int = 0, tasks: Tensor | None = None) -> list[list[int]]:
    """Token ids in, new token ids out (without the end of text). Ends at `eos`, max_new_tokens, or a full context.

    A row that has ended leaves the batch, so that no row's end depends on the others.
    """
    device, most = model.embed.weight.device, model.config.context
    generator = torch.Generator(device).manual_seed(seed) if temperature else None
    tokens, mask, given, used = begin(model, prompts)
    new, rows, steps = [[] for _ in prompts], list(range(len(prompts))), min(max_new_tokens, most - min(used))
    cache = Cache(model, len(rows), (tokens if given is None else given).shape[1] + steps)
    with evaluating(model):
        for step in range(steps):
            first = dict(mask=mask, decoder_tokens=given) if step == 0 else {}
            h, context = model.stream(tokens, tasks=tasks, cache=cache, **first)           # (B, T or 1, C)
            tokens = pick(model.head(h[:, -1], context=context), temperature, top_p, generator)[:, None]   # (B, 1)
            for row, token in zip(rows, tokens[:, 0].tolist()):
                new[row].append(token)
            going = [i for i, row in enumerate(rows) if new[row][-1] != eos and used[row] + len(new[row]) < most]
            if not going:
                break
            if len(going) < len(rows):
                keep = torch.tensor(going, device=device)
                cache.select(keep)
                tokens, tasks, rows = tokens[keep], tasks if tasks is None else tasks[keep], [rows[i] for i in going]
    return [cut(row, eos) for row in new]


def search_ids(model: Model, prompts: list[list[int]], max_new_tokens: int, eos: int | None, beams: int,
               tasks: Tensor | None = None) -> list[list[int]]:
    """Beam search: keeps the `beams` likeliest continuations K of each prompt; returns the best by mean log p a token."""
    device, B, K = model.embed.weight.device, len(prompts), beams
    tokens, mask, given, used = begin(model, prompts)
    steps = min(max_new_tokens, model.config.context - max(used))
    cache = Cache(model, B, max(used) + steps)
    score, length = torch.full((B, K), -torch.inf, device=device), torch.zeros(B, K, device=device)
    score[:, 0] = 0.0                                                     # all beams of a prompt begin as one
    done, new = torch.zeros(B, K, dtype=torch.bool, device=device), torch.empty(B, K, 0, dtype=torch.long, device=device)
    first = torch.arange(B, device=device)[:, None]                       # (B, 1)
    with evaluating(model):
        for step in range(steps):
            start = dict(mask=mask, decoder_tokens=given) if step == 0 else {}
            h, context = model.stream(tokens, tasks=tasks, cache=cache, **start)           # (B or B·K, T or 1, C)
            p = model.head(h[:, -1], context=context).float().log_softmax(-1)
            if step == 0:                                                 # from here on every prompt has K rows
                each = torch.arange(B, device=device).repeat_interleave(K)
                cache.select(each)
                p, tasks = p[each], tasks if tasks is None else tasks[each]
            p = p.view(B, K, -1)                                          # (B, K, V)
            if eos is not None:                                           # a finished beam repeats its end for nothing
                p = torch.where(done[:, :, None], -torch.inf, p)
                p[:, :, eos] = torch.where(done, 0.0, p[:, :, eos])
            score, place = (score[:, :, None] + p).flatten(1).topk(K, dim=1)                # (B, K) both
            beam, token = place // p.shape[-1], place % p.shape[-1]       # (B, K) both
            new = torch.cat((new[first, beam], token[:, :, None]), dim=2)                   # (B, K, steps so far)
            length = length[first, beam] + ~done[first, beam]
            done = done[first, beam] | (token == eos) if eos is not None else done
            cache.select((first * K + beam).flatten())
            tokens = token.view(B * K, 1)
            if done.all():
                break
    best = (score / length.clamp(min=1)).argmax(1)                        # (B,)
    return [cut(row, eos) for row in new[first[:, 0], best].tolist()]


def cut(row: list[int], eos: int | None) -> list[int]:
    return row[: row.index(eos)] if eos in row else row


def generate(model: Model, tokenizer, prompts: list[str], max_new_tokens: int = 64, temperature: float = 0.0,
             top_p: float = 1.0, seed: int = 0, beams: int = 1, tasks: Tensor | None = None) -> list[str]:
    """The continuation of each prompt, as text.

    temperature 0 is greedy; top_p in (0, 1] keeps the likeliest tokens that hold that probability together; `seed` makes
    a draw repeatable; beams above 1 search for the continuation of the highest mean log-likelihood a token; tasks (B,) as
    in `Model.forward`. A row ends at the end of text or where its context is full (a search: where that of its longest
    prompt is). Raises ValueError for an empty prompt, one that fills the context, and settings out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}: expected 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: expected a number above 0 and at most 1")
    if beams < 1 or beams > 1 and temperature:
        raise ValueError(f"beams is {beams}: expected at least 1, and a search (above 1) goes with temperature 0 only")
    if isinstance(prompts, str):
        raise ValueError(f"prompts are one string, {prompts[:40]!r}: expected a list of strings")
    if not prompts:
        return []
    ids = [encode_prompt(tokenizer, prompt, model.config.context - 1) for prompt in prompts]
    if beams > 1:
        rows = search_ids(model, ids, max_new_tokens, tokenizer.eos_id, beams, tasks)
    else:
        rows = generate_ids(model, ids, max_new_tokens, tokenizer.eos_id, temperature, top_p, seed, tasks)
    return [tokenizer.decode(row) for row in rows]
