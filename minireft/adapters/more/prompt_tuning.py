"""Prompt tuning: learned vectors in the place of words in front of the prompt (Lester et al. 2021; P-tuning, Liu et al. 2021).

Use:  prompt = PromptTuning(model, tokens=8); minireft.train(model, [prompt], prompt.examples(examples))
See:  the prompt begins with 8 placeholders, whose embeddings are what is learned: P·C numbers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...positions import Positions
from ..base import Adapter


def put(x: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """x (B, T, C) with rows (P, C) at positions (B, P)."""
    return x.scatter(1, positions[:, :, None].expand(-1, -1, x.shape[-1]), rows.to(x.dtype).expand(len(x), -1, -1))


class Embedded:
    """The placeholders' embeddings become the learned ones."""

    def __init__(self, adapter: PromptTuning):
        self.adapter = adapter

    def __call__(self, operation, context):
        if context[self.adapter] is None:                                 # a decoding step: they are in the cache
            return operation
        positions, rows = context[self.adapter]                           # (B, P), (P, C)
        return lambda ids: put(operation(ids), positions, rows)           # (B, T, C)


class VirtualTokens(Adapter):
    """P tokens that stand for no word: placeholders in front of a prompt, which a method gives its own vectors.

    They are tokens like others: they take room in the context and count as the prompt's, padding, caches and other adapters
    treat them as they treat words, and `examples` and `prompts` put them there. A prompt without them is a ValueError.
    words: the ids of the P words that it starts from; None draws them; () leaves zeros, to be loaded into.
    """

    def __init__(self, model, tokens: int, words, **options):
        if not isinstance(tokens, int) or not 1 <= tokens < model.config.context:
            raise ValueError(f"tokens are {tokens!r}: expected a whole number from 1 to below the model's context, {model.config.context}")
        if words is not None and len(words) not in (0, tokens):
            raise ValueError(f"words are {list(words)!r}: expected {tokens} token ids to start from, or None to draw them")
        super().__init__(model, tokens=tokens, words=[], **options)       # a file's parameters are loaded into zeros
        self.word, self.placeholders = self.find_placeholders(tokens)
        behind = 0 if model.tokenizer is None or model.tokenizer.bos_id is None else 1     # a beginning of text stays first
        self.where = Positions(listed=tuple(range(behind, behind + tokens)))
        self.create(tokens)
        if words is None:
            words = torch.randint(model.config.vocab_size, (tokens,)).tolist()
        if len(words) and not model.embed.weight.is_meta:
            with torch.no_grad():
                self.start(torch.tensor(words, device=model.embed.weight.device))

    # -- what a method defines

    def create(self, P: int) -> None:
        """Makes the parameters, of zeros."""
        raise TypeError("VirtualTokens is what PromptTuning and PrefixTuning share: take one of them")

    def start(self, words: Tensor) -> None:
        """Sets them to what these words (P,) are to the base."""

    def vectors(self):
        """What the edits put at the placeholders."""

    # -- what they share

    def find_placeholders(self, P: int) -> tuple[str, list[int]]:
        """A word that is one token each time it is repeated, and the ids of P of them; '' and zeros for a model without a tokenizer."""
        if (tokenizer := self.model.tokenizer) is None:
            return "", [0] * P
        for i in range(tokenizer.vocab_size):
            text = tokenizer.decode([i]).strip()
            if text.isalnum() and len(ids := tokenizer.encode(f"{text} " * P + text)) == P + 1:
                return text, ids[:P]
        raise ValueError("this model's tokenizer has no word that stays one token when it is repeated: virtual tokens find no place")

    def prompts(self, prompts: list[str]) -> list[str]:
        """The prompts with the placeholders in front."""
        return [f"{self.word} " * self.options["tokens"] + prompt for prompt in prompts]

    def examples(self, examples: list) -> list:
        """The examples with the placeholders in front of their prompts."""
        return [replace(example, prompt=prompt) for example, prompt in zip(examples, self.prompts([e.prompt for e in examples]))]

    def prepare(self, tokens, mask, prompt_lengths, tasks, past):
        if past:
            return None
        positions = self.where.find(tokens, mask, prompt_lengths)         # (B, P)
        if not torch.compiler.is_compiling():
            there = (positions >= 0) & (tokens.gather(1, positions.clamp(min=0)) == tokens.new_tensor(self.placeholders))
            if not there.all():
                raise ValueError(f"the prompt in row {int((~there.all(1)).nonzero()[0])} does not begin with {self.options['tokens']} placeholders: "
                                 f"pass prompts through .prompts() and examples through .examples() of this {type(self).__name__}")
        return positions, self.ready(self.vectors)


class PromptTuning(VirtualTokens):
    """Learned embeddings E (P, C), which start as the words' own: the base reads P words in front of each prompt, drawn from its
    vocabulary (Lester et al. 2021, section 3.2).

    encoder m: P-tuning's prompt encoder, here residual, E + tanh(E W₁ᵀ + b₁) W₂ᵀ with m units, W₂ = 0 at the start;
    P·C numbers, and m·(2C + 1) with an encoder. Raises ValueError for values out of range.
    """

    def __init__(self, model, tokens: int = 8, encoder: int = 0, words=None):
        if not isinstance(encoder, int) or encoder < 0:
            raise ValueError(f"encoder is {encoder!r}: expected its number of units, or 0 for none")
        super().__init__(model, tokens, words, encoder=encoder)

    def create(self, P):
        C, m = self.model.config.width, self.options["encoder"]
        self.embeddings = self.parameter(P, C)
        if m:
            self.w1, self.b1, self.w2 = self.parameter(m, C), self.parameter(m), self.parameter(C, m)
            torch.nn.init.uniform_(self.w1, -(C**-0.5), C**-0.5)

    def start(self, words):
        self.embeddings.copy_(self.model.embed.weight[words])

    def edits(self):
        return [(self.model.embed, Embedded(self))]

    def vectors(self):
        E = self.embeddings                                               # (P, C)
        return E if not self.options["encoder"] else E + F.linear(torch.tanh(F.linear(E, self.w1, self.b1)), self.w2)
