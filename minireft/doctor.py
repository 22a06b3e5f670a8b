"""What is installed here, and what is missing: `minireft doctor`.

Use:  minireft doctor
See:  device, torch, compilers, the kernels that were built; where one was not, why, and the command that mends it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path

import torch

from . import __version__, ops
from .checkpoint import ASSETS

SOURCE = Path(__file__).parent.parent   # of a clone; elsewhere there is no csrc beside the package
OPTIONAL = {"matplotlib": "pictures", "pytest": "the tests", "jupytext": "the tutorials"}


def run() -> None:
    for name, found, mend in findings():
        print(f"{name:10} {found}")
        if mend:
            print(f"{'':10} → {mend}")


def findings() -> list[tuple[str, str, str]]:
    """(name, what was found, what to do or '')."""
    cxx, nvcc = compiler(), nvcc_path()
    rows = [("minireft", f"{__version__}, {Path(__file__).parent}", ""),
            ("python", f"{platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores", ""),
            ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads", ""),
            ("device", *device()),
            ("compiler", cxx or "none", ""),
            ("nvcc", nvcc or "none", ""), *kernels(cxx, nvcc)]
    if (ASSETS / "config.json").is_file():
        rows.append(("base", str(ASSETS), ""))
    else:
        rows.append(("base", "none is shipped here", "minireft pretrain --quick my-base, then --base my-base"))
    missing = [name for name in OPTIONAL if not importlib.util.find_spec(name)]
    rows += [(name, f"not installed: no {OPTIONAL[name]}", f"pip install {name}") for name in missing]
    return rows


def device() -> tuple[str, str]:
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        return f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB", ""
    driver = bool(shutil.which("nvidia-smi"))
    if torch.version.cuda is None:
        return "CPU; this torch was built without CUDA", "pip install a torch with CUDA" * driver
    return "CPU; this torch knows CUDA and sees no GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES" * driver


def compiler() -> str | None:
    """The C++ compiler that setup.py takes."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def nvcc_path() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(os.path.join(home, "bin", "nvcc"))


def kernels(cxx: str | None, nvcc: str | None) -> list[tuple[str, str, str]]:
    """One row a backend: there, or why not."""
    if not (SOURCE / "csrc").is_dir():
        build = "pip install --force-reinstall --no-deps --no-build-isolation PATH-OF-THE-SOURCE"
    else:
        build = "python setup.py build_ext --inplace" + ("" if Path.cwd() == SOURCE else f"   in {SOURCE}")
    broken, there = load_error(), ops.backends()
    rows, without_cxx = [], "" if cxx else "C++ compiler"
    for name, what, lacking in (("cpu", "CPU kernels", without_cxx), ("cuda", "CUDA kernels", "" if nvcc else "nvcc"),
                                ("emulator", "CUDA kernels on the CPU", without_cxx)):
        if there[name]:
            rows.append((name, f"{what}: ready", ""))
        elif broken:
            rows.append((name, f"{what}: built, but not for this torch ({broken})", build))
        elif name == "cuda" and not torch.cuda.is_available():
            rows.append((name, f"{what}: {'' if ops._cuda_built else 'not '}built; there is no GPU to run them on", ""))
        else:
            first = f"install {'the CUDA toolkit' if lacking == 'nvcc' else 'g++'}, then " * bool(lacking)
            rows.append((name, f"{what}: not built" + f", no {lacking}" * bool(lacking) + "; plain PyTorch is used",
                         first + build))
    return rows


def load_error() -> str:
    """Why the built kernels do not load; '' where they do, or where there are none."""
    library = Path(ops.__file__).with_name("_kernels.so")
    try:
        if library.exists():
            torch.ops.load_library(library)
    except OSError as error:
        return str(error).splitlines()[0]
    return ""
