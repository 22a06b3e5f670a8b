"""llama2.c's files: a model .bin (the legacy layout, version 1, or version 2 in int8) and the tokenizer .bin beside it.

Use:  model, tokenizer = minireft.load("stories260K.bin")      # takes tok512.bin or tokenizer.bin from the same folder
See:  an ordinary model; the rows of query and key were put into the order that our rotary positions want.

Layouts: github.com/karpathy/llama2.c, export.py (legacy_export, version1_export, version2_export), runq.c and tokenizer.py.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers

from ..model import Model, ModelConfig
from ..tokenizer import Tokenizer
from .huggingface import fill

NORMS = ("blocks.{}.attention_norm.weight", "blocks.{}.ffn_norm.weight")
ATTENTION = tuple(f"blocks.{{}}.attention.{name}.weight" for name in ("query", "key", "value", "output"))
FFN = tuple(f"blocks.{{}}.ffn.{name}.weight" for name in ("gate", "down", "up"))           # their w1, w2, w3
ROTARY = "a table of cosines and sines"                                                    # in the file, but not learned
# The order of the tensors; of every one that has a layer, all layers follow one another.
LEGACY = ("embed.weight", NORMS[0], *ATTENTION, NORMS[1], *FFN, "norm.weight", ROTARY, "head.weight")
IMPROVED = (*NORMS, "norm.weight", "embed.weight", *ATTENTION, *FFN, "head.weight")
MAGIC = 0x616B3432                                                                         # "ak42"


def read_header(path: Path) -> tuple[ModelConfig, tuple[str, ...], int, int]:
    """The configuration, the order of the tensors, where they begin, and how many weights share a scale: 0 for float32."""
    with open(path, "rb") as file:
        header = file.read(256).ljust(64, b"\0")
    group = 0
    if struct.unpack_from("<I", header)[0] == MAGIC:
        version = struct.unpack_from("<i", header, 4)[0]
        if version not in (1, 2):
            raise ValueError(f"{path} is a llama2.c file of version {version}: expected the legacy layout, or version 1 or 2")
        sizes, tied, order, start = struct.unpack_from("<7i", header, 8), bool(header[36]), IMPROVED, 256
        if version == 2:
            group = struct.unpack_from("<i", header, 37)[0]
    else:
        sizes = struct.unpack_from("<7i", header)
        tied, order, start = sizes[5] > 0, LEGACY, 28                     # a negative vocabulary says: the head is its own
    width, hidden, layers, heads, kv_heads, vocabulary, context = sizes
    try:
        config = ModelConfig(abs(vocabulary), width, layers, heads, hidden, context, kv_heads=kv_heads, tied=tied)
    except ValueError as error:
        raise ValueError(f"{path} is no llama2.c model: {error}") from error
    if group < 0 or group and (width % group or hidden * width % group):
        raise ValueError(f"{path} is quantised in groups of {group}: expected a divisor of its width {width}")
    return config, order, start, group


def shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What the file holds of each, by the names above."""
    C, F, own, shared = c.width, c.hidden, c.heads * c.head_dim, c.kv_heads * c.head_dim
    return {"embed.weight": (c.vocab_size, C), "norm.weight": (C,), "head.weight": (0,) if c.tied else (c.vocab_size, C),
            ROTARY: (c.context, c.head_dim), **dict.fromkeys(NORMS, (C,)),
            **dict(zip(ATTENTION, ((own, C), (shared, C), (shared, C), (C, own)))), **dict(zip(FFN, ((F, C), (C, F), (F, C))))}


def halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rotary pairs (2i, 2i + 1) of every head → (i, i + D/2): the rows of query and key, (H·D, C)."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def stored(name: str, shape: tuple[int, ...], group: int) -> list[tuple[str, int]]:
    """The arrays that hold one tensor, (dtype, length): float32, or in version 2, but for norms, int8 and its groups' scales."""
    n = math.prod(shape)
    return [("<i1", n), ("<f4", n // group)] if group and len(shape) == 2 and n else [("<f4", n)]


def load(path, device=None, dtype=None):
    """(model, tokenizer) of a llama2.c file; tokenizer None where neither tok<V>.bin nor tokenizer.bin lies beside it."""
    path = Path(path)
    config, order, start, group = read_header(path)
    shape = shapes(config)
    layout = [(name.format(layer), name, stored(name, shape[name], group))                 # one after the other
              for name in order for layer in range(config.layers if "{}" in name else 1)]
    expected = start + sum(np.dtype(kind).itemsize * n for _, _, arrays in layout for kind, n in arrays)
    if path.stat().st_size != expected:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes where its header promises {expected:,}: "
                         "it is cut off, or no llama2.c model; fetch it again")
    beside = [path.with_name(name) for name in (f"tok{config.vocab_size}.bin", "tokenizer.bin")]
    tokenizer = next((read_tokenizer(file, config.vocab_size) for file in beside if file.is_file()), None)
    with torch.device("meta"):
        model = Model(config)
    with open(path, "rb") as file:
        file.seek(start)
        for ours, name, arrays in () if torch.device(device or "cpu").type == "meta" else layout:
            numbers, *scales = (np.fromfile(file, kind, n) for kind, n in arrays)
            if name == ROTARY or not len(numbers):
                continue
            if scales:
                if not (scales[0] >= 0).all() or not np.isfinite(scales[0]).all():
                    raise ValueError(f"{path} has scales of {ours} that are none: it was written by an export.py that put all "
                                     "scales at the end, or is damaged; export it again")
                numbers = numbers.reshape(-1, group) * scales[0][:, None]
            weight = torch.from_numpy(numbers).view(shape[name])
            fill(model, ours, halves(weight, config.head_dim) if name in ATTENTION[:2] else weight, device, dtype)
    model.tie()
    model.requires_grad_(False).eval()
    model.tokenizer = tokenizer
    return model, tokenizer


def read_tokenizer(path, vocab_size: int) -> Tokenizer:
    """A tokenizer .bin: int32 longest piece, then for each id float32 score, int32 length and the piece's bytes.

    Text is led by a space, cut into characters (bytes, where a character is no piece) and the neighbours whose union has
    the best score are merged until none is a piece. `tokenizers` does that when its merges stand in order of score.
    End of text is <s>: the stories that these models learned from are told apart by it, and nothing else.
    """
    data, at, pieces = Path(path).read_bytes(), 4, []
    try:
        while at < len(data) and len(pieces) <= vocab_size:
            score, length = struct.unpack_from("<fi", data, at)
            if not 0 < length <= len(data) - at - 8:
                raise ValueError(f"a piece of {length} bytes at byte {at}")
            pieces.append((data[at + 8 : at + 8 + length].decode(), score))
            at += 8 + length
    except (struct.error, ValueError) as error:                           # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path} is no llama2.c tokenizer ({error}): fetch it again") from error
    if len(pieces) != vocab_size:
        raise ValueError(f"{path} holds {len(pieces)} pieces: the model beside it has a vocabulary of {vocab_size}")
    # The file writes a space as itself and puts <s> and </s> on lines of their own.
    scores = {(piece.strip("\n") if i < 3 else piece).replace(" ", "▁"): score for i, (piece, score) in enumerate(pieces)}
    if len(scores) != vocab_size:
        raise ValueError(f"{path} names a piece twice: fetch it again")
    vocabulary = {piece: i for i, piece in enumerate(scores)}
    merges = [(piece[:cut], piece[cut:]) for piece in sorted(scores, key=lambda piece: -scores[piece]) if vocabulary[piece] >= 3
              for cut in range(1, len(piece)) if piece[:cut] in scores and piece[cut:] in scores]
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    inner.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in list(vocabulary)[:3]])
    return Tokenizer(inner, {"bos": "<s>", "eos": "<s>"})
