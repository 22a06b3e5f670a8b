"""Bases on disk: a folder with config.json, model.safetensors and tokenizer.json.

Use:  model, tokenizer = load("base")            # the one that is shipped; or a folder
See:  the same logits as the model that save() wrote; None for a tokenizer where the folder has none.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from . import files
from .formats import hub, huggingface, llama2c
from .model import Model, ModelConfig
from .tokenizer import Tokenizer

ASSETS = Path(__file__).parent / "assets"
SHIPPED = {"base": ASSETS, "encoder": ASSETS / "encoder", "encoder-decoder": ASSETS / "encoder-decoder"}
HUGGING_FACE = "a folder of Hugging Face's"


def load(path="base", device=None, dtype=None):
    """(model, tokenizer) from "base", the decoder that is shipped, or its small sisters "encoder" and "encoder-decoder"; from a
    folder of ours or Hugging Face's, a llama2.c .bin, or "org/name" of the hub. Evaluation mode, gradients off until someone trains it.

    device: where the model goes (None: the CPU; "meta": its shape alone, no weights are read); dtype: of its weights (None:
    float32). Raises FileNotFoundError, or ValueError for a folder that is damaged or foreign.
    """
    folder = hub.fetch(path) if hub.is_name(path) else SHIPPED.get(str(path), Path(path))
    if folder.suffix == ".bin" and folder.is_file():
        return llama2c.load(folder, device, dtype)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"there is no base at {folder}: expected 'base' or a folder with config.json and model.safetensors")
    try:
        settings = json.loads((folder / "config.json").read_text())
        kind = settings.pop("format", HUGGING_FACE if "model_type" in settings else None)
        config = ModelConfig(**settings) if kind == "minireft base" else None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} does not describe a minireft base ({error}): fetch or write the folder again") from error
    if kind == HUGGING_FACE:
        return huggingface.load(folder, settings, device, dtype)
    if config is None:
        raise ValueError(f"{folder / 'config.json'} has format {kind!r}: expected 'minireft base', or a model_type of Hugging Face's")
    with torch.device("meta"):
        model = Model(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}              # a shared weight under its first name
    with files.opened(folder / "model.safetensors") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(f"{folder / 'model.safetensors'} does not fit its config.json: {name} has shape {found.get(name)}, "
                             f"expected {expected.get(name)}")
    for name in () if torch.device(device or "cpu").type == "meta" else expected:
        huggingface.fill(model, name, files.read_tensor(folder / "model.safetensors", name), device, dtype)
    model.tie()
    model.requires_grad_(False).eval()
    tokenizer = folder / "tokenizer.json"
    model.tokenizer = Tokenizer.from_file(tokenizer) if tokenizer.is_file() else None
    return model, model.tokenizer


def save(model: Model, tokenizer, path, dtype=None) -> None:
    """Writes a base as a folder that `load` reads; dtype of the stored weights (None: as they are)."""
    folder = Path(path)
    files.write_tensors(folder / "model.safetensors", dict(model.named_parameters()), dtype=dtype)       # a shared weight under its first name
    files.write_text(folder / "config.json", json.dumps({"format": "minireft base", **asdict(model.config)}, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
