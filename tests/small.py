"""Tiny models of every configuration with weights large enough to matter, and the batches, tokenizer and probe to test them.

Use:  model = small.model("llama"); tokens, mask = small.pad(small.rows([3, 7]), "left")
See:  a forward pass in a millisecond, in which every weight, norm and bias changes the logits.
"""

import contextlib

import torch

from minireft import Model, ModelConfig, Tokenizer

V, CONTEXT = 29, 24
SHAPE = dict(vocab_size=V, width=16, layers=3, heads=4, hidden=20, context=CONTEXT)
CONFIGS = {                             # every choice of ModelConfig at least once; odd sizes on purpose
    "llama": dict(kv_heads=2),
    "qwen": dict(kv_heads=1, head_dim=6, qkv_bias=True, tied=False),
    "gpt2": dict(norm="layer", positions="learned", activation="gelu_tanh", bias=True),
    "neox": dict(norm="layer", activation="gelu", bias=True, tied=False),
    "gemma": dict(positions="learned", norm_eps=1e-3, rotary_base=100.0),
}
ENCODERS = {                            # the same for the two architectures that see both ways
    "roberta": dict(encoder_layers=3, norm="layer", norm_first=False, positions="learned", activation="gelu", bias=True),
    "modern": dict(encoder_layers=3, kv_heads=2),
}
BOTH = {
    "t5": dict(encoder_layers=1, positions="relative", relative_buckets=6, relative_furthest=9, tied=False),
    "bart": dict(encoder_layers=2, norm="layer", norm_first=False, positions="learned", activation="gelu", bias=True, start=1),
    "two": dict(encoder_layers=2, kv_heads=2),
}
WORDS = [f"w{i}" for i in range(V - 3)]  # the tokenizer's first three ids are <pad>, <eos> and <unk>


def model(name: str = "llama", seed: int = 0, dtype=torch.float32, **changes) -> Model:
    """A model of configuration `name` in evaluation mode, its base frozen as `load` leaves it."""
    made = Model(ModelConfig(**{**SHAPE, **{**CONFIGS, **ENCODERS, **BOTH}[name], **changes}))
    randomise(made, seed)
    made.tokenizer = Tokenizer.from_words(WORDS)
    return made.to(dtype).requires_grad_(False).eval()


def randomise(module, seed: int = 1, std: float = 0.3):
    """Draws every parameter anew: normal, and around 1 where a norm scales. Returns the module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(around + std * torch.randn(p.shape, generator=generator))
    return module


def rows(lengths, seed: int = 0) -> list[torch.Tensor]:
    """Random token ids, one tensor for each length; no special tokens among them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, V, (n,), generator=generator) for n in lengths]


def pad(rows, side: str = "right", more: int = 0, filler: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens and mask (B, T), T the longest row and `more`."""
    T = max(map(len, rows)) + more
    tokens, mask = torch.full((len(rows), T), filler), torch.zeros(len(rows), T, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(T - len(row), T)
        tokens[i, at], mask[i, at] = row, True
    return tokens, mask


def bits(module) -> dict:
    """A copy of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Tap:
    """An edit that changes nothing and keeps what its site gives."""

    adapter = None

    def __init__(self):
        self.seen = []

    def __call__(self, operation, context):
        def run(*inputs):
            out = operation(*inputs)
            self.seen.append(out)
            return tuple(x.clone() for x in out) if isinstance(out, tuple) else out.clone()     # others may write in place
        return run


@contextlib.contextmanager
def tapped(model, *names: str):
    """Taps on sites, put beneath what is attached later: {name: Tap}."""
    sites, taps = model.sites(), {name: Tap() for name in names}
    for name, tap in taps.items():
        sites[name].edits.append(tap)
    try:
        yield taps
    finally:
        for name, tap in taps.items():
            sites[name].edits.remove(tap)
