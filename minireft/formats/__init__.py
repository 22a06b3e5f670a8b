"""Other people's files, one module each: huggingface.py, llama2c.py (bases), pyreft.py, peft.py (adapters), convert.py.

Use:  minireft.load(path) and minireft.load_adapter(model, path) look at what lies there and come here by themselves
See:  the other program's logits, without importing it and without unpickling anything.
"""

from pathlib import Path

from . import peft, pyreft


def read_adapter(folder, model) -> tuple[str, dict, dict]:
    """(kind, options, tensors) of the adapter in somebody else's folder. ValueError where it is none that is known."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if pyreft.is_folder(folder):
        return pyreft.read(folder)
    if peft.is_folder(folder):
        return peft.read(folder, model)
    raise ValueError(f"{folder} holds no adapter that is known: expected a file of minireft's, "
                     "or a folder of pyreft's or PEFT's")
