"""Examples, and how they become batches of token ids.

Use:  batch = collate([encode(tokenizer, Example("the cat is", "red"), context=96)])
See:  prompt and completion are encoded apart and joined, so the prompt's length in tokens is known exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """A prompt and its completion; `choices` (the completion among them) make it a multiple choice. id: its number;
    task: which adapter of a bank it is for; answer: what must be found in what is written, by the rules of its `format`
    (formats/datasets.py)."""

    prompt: str
    completion: str = ""
    choices: tuple[str, ...] = ()
    id: int | None = None
    task: str | None = None
    answer: str | None = None
    format: str = "prompts"


@dataclass(frozen=True)
class Encoded:
    ids: list[int]                      # prompt, completion, end of text
    prompt_length: int                  # how many of them are the prompt's
    task: str | None = None
    wrong: tuple[list[int], ...] = ()   # of a multiple choice: the ids with each wrong choice for a completion
    label: int | None = None            # for a classifier: which of its labels is right; `ids` are the prompt alone then

    def predicted(self, ids: list[int]) -> int:
        """How many of `ids` (or of a wrong choice's) are to be predicted: all behind the prompt, but never the first."""
        return len(ids) - max(1, self.prompt_length)


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. `answer` marks the tokens that are to be predicted: the completion and the end of text.

    A multiple choice takes a row for each choice, the right one (choice 0) first. For an encoder–decoder, tokens are the
    decoder's: its start and the completion. Where a row packs several examples, `mask` numbers them, 1, 2, ...
    """

    tokens: Tensor                      # (B, T) int64
    mask: Tensor                        # (B, T) bool, True = real token
    prompt_lengths: Tensor | None       # (B,), or None where rows are packed
    answer: Tensor                      # (B, T) bool
    example: Tensor                     # (B,) which example a row belongs to: 0, 1, ... in order; (B, T) a packed row's tokens
    choice: Tensor                      # (B,) which of its choices a row holds: 0 the right one, then the wrong ones
    label: Tensor | None = None         # (B,) for a classifier
    prompt: Tensor | None = None        # (B, S) what an encoder–decoder's encoder reads, and its mask
    prompt_mask: Tensor | None = None

    def to(self, device) -> Batch:
        return replace(self, **{name: tensor.to(device) for name, tensor in vars(self).items() if tensor is not None})

    def through(self, model, tasks: Tensor | None = None) -> Tensor:
        """What the model returns for this batch: logits (B, T, V) for `tokens`, or a classifier's scores (B, classes)."""
        if self.prompt is None:
            return model(self.tokens, self.mask, self.prompt_lengths, tasks)
        return model(self.prompt, self.prompt_mask, None, tasks, decoder_tokens=self.tokens)


def encode_prompt(tokenizer, text: str, context: int) -> list[int]:
    """Ids of a prompt, led by the tokenizer's beginning of text if it has one. ValueError when empty or too long."""
    if not text.strip():
        raise ValueError(f"the prompt is {text!r}: expected at least one word")
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids += tokenizer.encode(text)
    if len(ids) > context:
        raise ValueError(f"a prompt of {len(ids)} tokens does not fit the context of {context}: shorten it: {text[:60]!r}...")
    return ids


def wrong_choices(example: Example) -> list[str]:
    """An example's choices without its completion. ValueError when the completion, or anything else, is not among them."""
    wrong = [choice for choice in example.choices if choice != example.completion]
    if len(wrong) == len(example.choices) or not wrong:
        what = f"the completion {example.completion!r} is not among the choices" if wrong else "nothing to choose from:"
        raise ValueError(f"{what} {example.choices} of {example.prompt[:60]!r}: expected the completion and at least one other")
    return wrong


def encode(tokenizer, example: Example, context: int, choices: bool = False) -> Encoded:
    """Ids of prompt + completion + end of text; with `choices`, of the wrong ones as well.

    Raises ValueError when something does not fit, for a completion or choice without tokens, and choices that are not two.
    """
    prompt, rows = encode_prompt(tokenizer, example.prompt, context), []
    for text in (example.completion, *(wrong_choices(example) if choices else ())):
        answer = tokenizer.encode(text)
        if not answer:
            raise ValueError(f"the completion {text!r} of {example.prompt[:60]!r} has no tokens: expected an answer to learn")
        ids = prompt + answer + ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
        if len(ids) > context:
            raise ValueError(f"an example of {len(ids)} tokens does not fit the context of {context}: shorten it: {example.prompt[:60]!r}...")
        if ids in rows[:1]:
            raise ValueError(f"the choice {text!r} has the same tokens as the completion {example.completion!r}: no model can tell them apart")
        rows.append(ids)
    return Encoded(rows[0], len(prompt), example.task, tuple(rows[1:]))


def encode_label(tokenizer, example: Example, labels: tuple[str, ...], context: int) -> Encoded:
    """Ids of the prompt, and which of a classifier's labels the completion is. ValueError when it is none of them."""
    if example.completion not in labels:
        raise ValueError(f"the completion {example.completion!r} of {example.prompt[:60]!r} is none of the classifier's labels {labels}")
    ids = encode_prompt(tokenizer, example.prompt, context)
    return Encoded(ids, len(ids), example.task, label=labels.index(example.completion))


def padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of unequal length, padded on the right: tokens and mask, (B, T) both."""
    lengths = torch.tensor([len(ids) for ids in rows])                    # (B,)
    tokens = torch.full((len(rows), int(lengths.max())), pad)             # (B, T)
    for row, ids in zip(tokens, rows):
        row[: len(ids)] = torch.tensor(ids)
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def collate(rows: list[Encoded], pad: int = 0, start: int | None = None) -> Batch:
    """A batch of these examples; the choices of one follow one another. start: of an encoder–decoder (ModelConfig.start)."""
    laid = [(i, j, ids) for i, row in enumerate(rows) for j, ids in enumerate((row.ids, *row.wrong))]
    example, choice = torch.tensor([(i, j) for i, j, _ in laid]).T        # two of (B,)
    lengths = torch.tensor([row.prompt_length for row in rows])[example]  # (B,)
    label = None if rows[0].label is None else torch.tensor([row.label for row in rows])
    if start is None:
        tokens, mask = padded([ids for _, _, ids in laid], pad)           # (B, T) both
        return Batch(tokens, mask, lengths, mask & (torch.arange(tokens.shape[1]) >= lengths[:, None]), example, choice, label)
    prompt, prompt_mask = padded([ids[:n] for (_, _, ids), n in zip(laid, lengths)], pad)  # (B, S) both
    tokens, mask = padded([[start, *ids[n:]] for (_, _, ids), n in zip(laid, lengths)], pad)             # (B, T) both
    return Batch(tokens, mask, lengths, mask & (torch.arange(tokens.shape[1]) > 0), example, choice, label, prompt, prompt_mask)


def pack(rows: list[Encoded], most: int, pad: int = 0) -> Batch:
    """A batch with several examples in a row, each in the first row where no more than `most` tokens come together.

    They do not see one another, so loss and gradients are those of `collate`. ValueError for what cannot share a row: choices,
    classes, and examples of more than `most` tokens.
    """
    lines: list[list[int]] = []                                           # which examples share a row
    for i, row in enumerate(rows):
        if row.wrong or row.label is not None or len(row.ids) > most:
            raise ValueError(f"example {i} of {len(row.ids)} tokens cannot be packed: expected a prompt and a completion, without "
                             f"choices or classes, of {most} tokens at most")
        line = next((line for line in lines if sum(len(rows[j].ids) for j in [*line, i]) <= most), None)
        if line is None:
            lines.append(line := [])
        line.append(i)

    def laid(of) -> Tensor:                                               # (B, T) of(place in its row, example, token)
        return padded([[of(n, i, k) for n, i in enumerate(line) for k in range(len(rows[i].ids))] for line in lines], 0)[0]
    tokens, _ = padded([sum((rows[i].ids for i in line), []) for line in lines], pad)
    answer = laid(lambda n, i, k: k >= max(1, rows[i].prompt_length)).bool()
    return Batch(tokens, laid(lambda n, i, k: n + 1), None, answer, laid(lambda n, i, k: i), torch.zeros(len(lines), dtype=torch.long))


@lru_cache(maxsize=4)
def shuffled(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    """0 ... n − 1 in the order of one pass over the data."""
    return tuple(torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist())


def order(n: int, seed: int, first: int, count: int) -> list[int]:
    """Which of n examples come at places first ... first + count − 1 of an endless shuffled stream.

    Each pass over the data is a permutation of its own, a function of (seed, pass): nothing to save, nothing to replay.
    """
    return [shuffled(n, seed, place // n)[place % n] for place in range(first, first + count)]


def batch_at(step: int, lengths: list[int], seed: int, size: int, bucket: int = 1) -> list[int]:
    """The examples of a step: `size` of the stream above, or, with `bucket` > 1, of those that this many steps share.

    Those are sorted by length, cut into batches, and the batches shuffled: a batch then holds examples of like length, which
    need less padding, and every example comes exactly as often as without. It is a function of (seed, step) as well. What
    changes: a step's examples are no longer independent of one another, its gradient leans to its length, and steps differ
    in their number of tokens, over which each one's loss is averaged. A bucket never reaches over more than one pass's length.
    """
    bucket = max(1, min(bucket, len(lengths) // size))
    first, place = step // bucket * bucket, step % bucket
    drawn = order(len(lengths), seed, first * size, bucket * size)
    if bucket > 1:
        drawn.sort(key=lengths.__getitem__)                               # stable: ties stay in the stream's order
        place = shuffled(bucket, seed, first)[place]
    return drawn[place * size : (place + 1) * size]
