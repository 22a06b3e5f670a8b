"""Files that are whole or not there: atomic writes, checksums, a lock, and tensors read without unpickling.

Use:  write_tensors(path, tensors, metadata); tensors, metadata = read_tensors(path); with locked(folder / "lock"): ...
See:  a write that fails (full disk, no permission) leaves the old file as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
          torch.uint8: "U8", torch.bool: "BOOL"}                          # as a safetensors file calls them


def write_bytes(path, data, before=None) -> None:
    """Writes bytes, or parts one after the other, beside `path`, flushes to the disk, then renames; what was there takes the
    name `before`, if one is given. OSError says what went wrong and where."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; choose a folder that can be written to") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.writelines([data] if isinstance(data, bytes) else data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"cannot write {path}: {error.strerror}; nothing was changed there") from error
        raise


def write_text(path, text: str) -> None:
    write_bytes(path, text.encode())


def write_checked(path, data: bytes, before=None) -> None:
    """`write_bytes` of the data and, behind it, its SHA-256."""
    write_bytes(path, (data, hashlib.sha256(data).digest()), before)


def read_checked(path) -> bytes:
    """What `write_checked` wrote; ValueError for anything else."""
    data = Path(path).read_bytes()
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise ValueError(f"its {len(data):,} bytes do not have the checksum at their end")
    return data[:-32]


@contextlib.contextmanager
def locked(path):
    """Holds the lock of a file, which is there while it lasts; the system lets it go when the process ends, however it ends.
    OSError when another process holds it."""
    import fcntl                                                          # not on Windows, where nothing else here needs it
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; choose a folder that can be written to") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise OSError(f"{Path(path).parent} is in use by another process ({file.read().strip()}): "
                          "wait until it has ended, or name another folder") from None
        if not Path(path).exists() or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            with locked(path):                                            # who held it took it away after we had opened it
                yield
            return
        file.truncate(0)
        with contextlib.suppress(OSError):                                # who holds it is a courtesy: a full disk is not an error here
            os.write(file.fileno(), f"process {os.getpid()}\n".encode())
        try:
            yield
        finally:
            Path(path).unlink(missing_ok=True)


def append_line(path, line: str) -> None:
    """Adds a line to a file; where it does not fit whole, the file stays as it was."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab", buffering=0)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; choose a folder that can be written to") from error
    with file:
        end, data = file.seek(0, os.SEEK_END), line.encode() + b"\n"
        try:
            whole = file.write(data) == len(data)
        except OSError:
            whole = False
        if not whole:
            file.truncate(end)
            raise OSError(f"cannot write {path}: the disk or the quota is full; what was there is unchanged")


def write_tensors(path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, dtype=None) -> None:
    """One safetensors file, stored as dtype (None: as they are): the length of a header of JSON, the header, then the tensors' own
    bytes, widest numbers first; whole once each, where they share memory, too. Only what is not contiguous, not on the CPU or of
    another dtype is copied, one tensor at a time. KeyError for a dtype that the format has no name for."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    tensors = dict(sorted(tensors.items(), key=lambda item: -(dtype or item[1].dtype).itemsize))
    for name, t in tensors.items():
        kind = dtype or t.dtype
        header[name] = {"dtype": DTYPES[kind], "shape": list(t.shape), "data_offsets": [end, end := end + t.numel() * kind.itemsize]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                       # so the numbers behind it are aligned
    parts = (t.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy() for t in tensors.values())
    write_bytes(path, chain([len(text).to_bytes(8, "little"), text], parts))


def read_tensors(path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. FileNotFoundError; ValueError for one that is corrupt, cut off or foreign."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def read_tensor(path, name: str) -> Tensor:
    """One tensor of a safetensors file. What is mapped of a file stays in memory until it is closed, so big ones are opened anew."""
    with opened(path) as file:
        return file.get_tensor(name)


def read_torch(path) -> dict[str, Tensor]:
    """A torch file of named tensors, read with weights only, so that no code in it runs. ValueError for anything else."""
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:                                            # torch.load raises whatever it stumbles over
        raise ValueError(f"{path} holds more than tensors, or is broken ({type(error).__name__}): save it again as safetensors") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{path} holds a {type(found).__name__}: expected named tensors and nothing else")
    return found


@contextmanager
def opened(path):
    """A safetensors file, as `safe_open` gives it. FileNotFoundError; ValueError for one that is corrupt, cut off or foreign."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): it may be cut off; fetch or write it again") from error
