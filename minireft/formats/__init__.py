"""Other people's files, one module each: huggingface.py, hub.py, llama2c.py (bases), pyreft.py, peft.py, tfew.py (adapters),
convert.py.

Use:  minireft.load(path) and minireft.load_adapter(model, path) look at what lies there and come here by themselves
See:  the other program's logits, without importing it and without unpickling anything.
"""

from pathlib import Path

from . import peft, pyreft, tfew


def is_foreign(path) -> bool:
    """Whether an adapter's path is in somebody else's form: a folder, or a torch file."""
    return Path(path).is_dir() or tfew.is_file(path)


def read_adapter(folder, model) -> tuple[str, dict, dict]:
    """(kind, options, tensors) of the adapter in somebody else's folder or file. ValueError where it is none that is known."""
    if tfew.is_file(folder):
        return tfew.read(folder, model)
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if pyreft.is_folder(folder):
        return pyreft.read(folder)
    if peft.is_folder(folder):
        return peft.read(folder, model)
    raise ValueError(f"{folder} holds no adapter that is known: expected a file of minireft's, "
                     "a folder of pyreft's or PEFT's, or T-Few's torch file")
