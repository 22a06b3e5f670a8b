"""Examples, and how they become batches of token ids.

Use:  batch = collate([encode(tokenizer, Example("the cat is", "red"), context=96)])
See:  prompt and completion are encoded apart and joined, so the prompt's length in tokens is known exactly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """A prompt and its completion; `choices` (the completion among them) make it a multiple choice. id: its number;
    task: which adapter of a bank it is for."""

    prompt: str
    completion: str = ""
    choices: tuple[str, ...] = ()
    id: int | None = None
    task: str | None = None


@dataclass(frozen=True)
class Encoded:
    ids: list[int]                      # prompt, completion, end of text
    prompt_length: int                  # how many of them are the prompt's
    task: str | None = None


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. `answer` marks the tokens that are to be predicted: the completion and the end of text."""

    tokens: Tensor                      # (B, T) int64
    mask: Tensor                        # (B, T) bool, True = real token
    prompt_lengths: Tensor              # (B,)
    answer: Tensor                      # (B, T) bool

    def to(self, device) -> Batch:
        return replace(self, **{name: tensor.to(device) for name, tensor in vars(self).items()})


def read_examples(path) -> list[Example]:
    """Examples from a .jsonl file: a line is an object with "prompt", "completion" and, for a multiple choice, "choices".

    Raises FileNotFoundError; ValueError that names the file and the line of a row that is malformed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}: expected .jsonl, a prompt and a completion on every line")
    examples = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"it is a {type(row).__name__}")
            for name in ("prompt", "completion"):
                if not isinstance(row.get(name), str) or not row[name].strip():
                    raise ValueError(f"{name!r} is {row.get(name)!r}")
            choices = row.get("choices", [])
            if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices) or choices and row["completion"] not in choices:
                raise ValueError(f"'choices' is {choices!r}: a list of texts, the completion among them, is expected there")
        except ValueError as error:                                       # a JSON error and a wrong encoding are ValueErrors too
            raise ValueError(f'{path}, line {number}: {error}; expected {{"prompt": "some text", "completion": "some text"}}') from error
        examples.append(Example(row["prompt"], row["completion"], tuple(choices), id=len(examples)))
    if not examples:
        raise ValueError(f"{path} holds no rows: expected a prompt and a completion on every line")
    return examples


def encode_prompt(tokenizer, text: str, context: int) -> list[int]:
    """Ids of a prompt, led by the tokenizer's beginning of text if it has one. ValueError when empty or too long."""
    if not text.strip():
        raise ValueError(f"the prompt is {text!r}: expected at least one word")
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids += tokenizer.encode(text)
    if len(ids) > context:
        raise ValueError(f"a prompt of {len(ids)} tokens does not fit the context of {context}: shorten it: {text[:60]!r}...")
    return ids


def encode(tokenizer, example: Example, context: int) -> Encoded:
    """Ids of prompt + completion + end of text. ValueError when the whole does not fit, or an empty completion."""
    prompt = encode_prompt(tokenizer, example.prompt, context)
    completion = tokenizer.encode(example.completion)
    if not completion:
        raise ValueError(f"the completion {example.completion!r} of {example.prompt[:60]!r} has no tokens: expected an answer to learn")
    ids = prompt + completion + ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
    if len(ids) > context:
        raise ValueError(f"an example of {len(ids)} tokens does not fit the context of {context}: shorten it: {example.prompt[:60]!r}...")
    return Encoded(ids, len(prompt), example.task)


def collate(rows: list[Encoded], pad: int = 0) -> Batch:
    """Rows of unequal length, padded on the right."""
    B, T = len(rows), max(len(row.ids) for row in rows)
    tokens, lengths = torch.full((B, T), pad), torch.tensor([len(row.ids) for row in rows])         # (B, T), (B,)
    for i, row in enumerate(rows):
        tokens[i, : len(row.ids)] = torch.tensor(row.ids)
    prompt_lengths, slot = torch.tensor([row.prompt_length for row in rows]), torch.arange(T)       # (B,), (T,)
    mask = slot < lengths[:, None]                                        # (B, T)
    return Batch(tokens, mask, prompt_lengths, mask & (slot >= prompt_lengths[:, None]))


def order(n: int, seed: int, first: int, count: int) -> list[int]:
    """Which of n examples come at places first ... first + count − 1 of an endless shuffled stream.

    Each pass over the data is a permutation of its own, a function of (seed, pass): nothing to save, nothing to replay.
    """
    places, shuffled = range(first, first + count), {}
    for epoch in {place // n for place in places}:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        shuffled[epoch] = torch.randperm(n, generator=generator).tolist()
    return [shuffled[place // n][place % n] for place in places]
