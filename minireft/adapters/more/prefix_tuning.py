"""Prefix tuning: learned keys and values on every layer in front of the prompt (Li & Liang 2021).

Use:  prefix = PrefixTuning(model, tokens=8); minireft.train(model, [prefix], prefix.examples(examples))
See:  h_i = P_θ[i] for the P tokens of the prefix (their equation 3): 2·P·G·D numbers a layer, where G·D is a key's width.
"""

from __future__ import annotations

from ..base import pick_layers
from .prompt_tuning import VirtualTokens, put


class KeysAndValues:
    """The placeholders' keys and values in one layer become the learned ones."""

    def __init__(self, adapter: PrefixTuning, slot: int):
        self.adapter, self.slot = adapter, slot

    def __call__(self, operation, context):
        if context[self.adapter] is None:                                 # a decoding step: they are in the cache
            return operation
        positions, (keys, values) = context[self.adapter]                 # (B, P), two of (L, P, G·D)

        def replaced(k, v):
            k, v = operation(k, v)                                        # two of (B, T, G·D)
            return put(k, positions, keys[self.slot]), put(v, positions, values[self.slot])
        return replaced


class Reading:
    """Keeps the keys and values that pass by."""

    adapter = None

    def __init__(self):
        self.seen = None

    def __call__(self, operation, context):
        def read(k, v):
            self.seen = operation(k, v)
            return self.seen
        return read


class PrefixTuning(VirtualTokens):
    """Learned keys and values (L, P, G·D) of P tokens, before any rotary turn. They start as those of P words that the base
    reads, so a decoder begins as the base behind these words; an encoder's words would see the prompt, its prefix does not.

    The paper trains them through an MLP, which is thrown away afterwards; here they are trained themselves, with that start in
    the MLP's place. Raises ValueError for values out of range, and while another adapter is attached.
    """

    def __init__(self, model, tokens: int = 8, words=None):
        if model.adapters and (words is None or len(words)):
            raise ValueError(f"a {type(model.adapters[0]).__name__} is attached, and a prefix starts from what the base makes of words: "
                             "make the prefix first, then attach")
        super().__init__(model, tokens, words)

    def create(self, P):
        self.layers = pick_layers(self.model, "all")                      # of an encoder–decoder, those that read the prompt
        shape = len(self.layers), P, self.model.blocks[0].attention.key.weight.shape[0]
        self.key, self.value = self.parameter(*shape), self.parameter(*shape)              # (L, P, G·D)

    def start(self, words):
        places, reading = [site for site, _ in self.edits()], [Reading() for _ in self.layers]
        for site, one in zip(places, reading):
            site.edits.append(one)
        try:
            self.model.stream(words[None], **({"decoder_tokens": words[None]} if self.model.two else {}))
        finally:
            for site, one in zip(places, reading):
                site.edits.remove(one)
        for stack, which in ((self.key, 0), (self.value, 1)):
            for row, one in zip(stack, reading):
                row.copy_(one.seen[which][0])

    def edits(self):
        return [(self.model.blocks[layer].attention.kv, KeysAndValues(self, slot)) for slot, layer in enumerate(self.layers)]

    def vectors(self):
        return self.key, self.value
