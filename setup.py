"""Builds minireft, and csrc into one shared object, minireft/_kernels.so, with ninja: incremental, file by file.
`python setup.py build_ext --inplace` builds in place for this machine; `pip install .` and wheels are for any x86-64-v3.
You should see the compilers' commands go by for half a minute; with no C++ compiler, one line, and plain PyTorch instead.

  MINIREFT_KERNELS=0    build no kernels at all: plain PyTorch
  MINIREFT_CUDA=0|1     without or surely with the CUDA kernels   (default: with them where nvcc is found)
  MINIREFT_ARCHS=80;90  compute capabilities                      (default: this machine's GPU, else 80; PTX of the last)
  MINIREFT_MARCH=native the -march of the CPU kernels             (default: native in place, else x86-64-v3)
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class Kernels(build_ext):
    """One build.ninja for everything under csrc."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"       # loaded by torch, not imported: no Python tag in its name

    def run(self):
        if os.environ.get("MINIREFT_KERNELS") == "0":
            self.extensions = []
            return
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if not compiler or not shutil.which("ninja") and not importlib.util.find_spec("ninja"):
            print("minireft: no C++ compiler or no ninja found; building without kernels, plain PyTorch will be used")
            self.extensions = []
            return
        target = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve()
        if self.inplace:
            target = ROOT / self.get_ext_filename(self.extensions[0].name)
        march = os.environ.get("MINIREFT_MARCH") or ("native" if self.inplace else "x86-64-v3")
        objects = ROOT / "build" / f"kernels-{march}"
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_file(compiler, march, target))
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        subprocess.check_call([*ninja, "-C", str(objects)])

    def get_outputs(self):
        return [self.get_ext_fullpath(e.name) for e in self.extensions]

    def copy_extensions_to_source(self):
        pass                                                    # already there


def ninja_file(compiler: str, march: str, target: Path) -> str:
    """The whole build: each source to one object, all objects to the shared object."""
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    nvcc = find_nvcc()
    cuda = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    emulator = sorted((ROOT / "csrc/emulator").glob("*.cpp")) if cuda else []
    flags = "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -g1"
    machine = f"-march={march}" if march == "native" or platform.machine() in ("x86_64", "AMD64") else ""
    features = "-DTORCH_TARGET_VERSION=0x020b000000000000"      # the stable ABI of torch 2.11
    features += " -DMINIREFT_WITH_CUDA" * bool(nvcc and cuda) + " -DMINIREFT_WITH_EMULATOR" * bool(emulator)
    lines = [
        f"cxx = {compiler}", f"nvcc = {nvcc}", f"flags = {flags}", f"csrc = {ROOT / 'csrc'}",
        "rule cpp", "  command = $cxx $flags $extra -I$csrc -MD -MF $out.d -c $in -o $out", "  depfile = $out.d", "  deps = gcc",
        "rule cuda", "  command = $nvcc -std=c++17 -O3 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden $extra -I$csrc "
        "-MD -MF $out.d -c $in -o $out", "  depfile = $out.d", "  deps = gcc",
        "rule link", "  command = $cxx -shared $in -o $out $extra",
    ]
    objects = []

    def add(rule: str, source: Path, prefix: str, extra: str):
        objects.append(f"{prefix}{source.stem}.o")
        lines.extend([f"build {objects[-1]}: {rule} {source}", f"  extra = {extra}"])

    add("cpp", ROOT / "csrc/bindings.cpp", "", f"{features} -isystem {torch / 'include'}")
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        add("cpp", source, "cpu_", f"{machine} {rounding(source)} -Wno-maybe-uninitialized -Wno-uninitialized")
    if emulator:
        for source in [*cuda, *emulator]:
            add("cpp", source, "emulated_", f"-DMINIREFT_EMULATOR -x c++ -O1 {rounding(source)}")
    if nvcc and cuda:
        for source in cuda:
            add("cuda", source, "cuda_", gencode(nvcc))
    link = f"-L{torch / 'lib'} -ltorch_cpu -lc10"
    if nvcc and cuda:
        link += f" -L{cuda_library_folder(nvcc)} -lcudart_static -ldl -lrt -lpthread"
    lines += [f"build {target}: link {' '.join(objects)}", f"  extra = {link}", f"default {target}", ""]
    return "\n".join(lines)


def rounding(source: Path) -> str:
    """Noise agrees to the bit across backends: there a * b + c must round twice, elsewhere once is faster."""
    return "-ffp-contract=off" if source.stem == "noisy_embedding" else "-ffp-contract=fast"


def find_nvcc() -> str | None:
    """nvcc, where MINIREFT_CUDA allows it: on the path, under CUDA_HOME or in /usr/local/cuda."""
    wanted = os.environ.get("MINIREFT_CUDA", "")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which(os.path.join(home, "bin", "nvcc"))
    if wanted == "1" and not nvcc:
        raise SystemExit("MINIREFT_CUDA=1 but there is no nvcc: put it on the PATH or set CUDA_HOME")
    return nvcc


def gencode(nvcc: str) -> str:
    """Machine code for each architecture, and PTX of the last for whatever comes after it."""
    archs = os.environ.get("MINIREFT_ARCHS", "").replace(",", ";").replace(".", "")
    if not archs:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True).stdout if shutil.which("nvidia-smi") else ""
        archs = ";".join(sorted({line.strip().replace(".", "") for line in found.splitlines() if line.strip()})) or "80"
    archs = archs.split(";")
    return " ".join([f"-gencode arch=compute_{a},code=sm_{a}" for a in archs]
                    + [f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"])


def cuda_library_folder(nvcc: str) -> Path:
    """Where libcudart_static.a is: asked of nvcc, which may be a script that stands elsewhere."""
    shown = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    top = next(line.split("TOP=")[1].strip() for line in shown.splitlines() if "TOP=" in line)
    return next(p.parent for p in sorted(Path(top).glob("**/libcudart_static.a")))


setup(ext_modules=[Extension("minireft._kernels", sources=[])], cmdclass={"build_ext": Kernels})
