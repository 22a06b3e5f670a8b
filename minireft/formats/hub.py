"""Models by their name on the Hugging Face hub, where `huggingface_hub` and a network are present.

Use:  minireft.load("org/name")                   # a folder of that name on this machine comes first
See:  the files that minireft reads, fetched once into huggingface_hub's own cache; no pickled weights among them.
"""

from __future__ import annotations

import re
from pathlib import Path

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")


def is_name(path) -> bool:
    """Whether it reads org/name, and is no mistyped path: then the first folder would be here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path))) and not Path(path).parent.exists()


def fetch(name: str) -> Path:
    """The folder that holds a model's files. FileNotFoundError says what is missing: the library, the network or the model."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"there is no base at {name}; to fetch a model of that name from the hub: pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(FILES)))
    except Exception as error:                                            # whatever the network and the library come up with
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(f"there is no base at {name}, and the hub gave no model of that name ({type(error).__name__}: {reason}): "
                                "check the name and the network, or fetch its folder by other means") from error
