"""Every CUDA kernel compiles for every supported architecture, without torch, and keeps its numbers in registers.
Run: pytest tests/test_cuda_compile.py     (skipped where there is no nvcc)
You should see no spilled register and no stack frame in any kernel; a function that uses local memory is named.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which(os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc"))

pytestmark = pytest.mark.skipif(not NVCC, reason="no nvcc here: put it on the PATH or set CUDA_HOME")


def compile_for(job: tuple[Path, int]) -> tuple[Path, int, str]:
    source, arch = job
    done = subprocess.run(
        [NVCC, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", "-o", os.devnull, str(source)],
        capture_output=True,
        text=True,
    )
    return source, arch, done.stdout + done.stderr + ("\nerror: nvcc failed" if done.returncode else "")


def local_memory(report: str) -> list[str]:
    """The functions that ptxas -v says use a stack frame or spill, with how much."""
    found, function = [], "?"
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            function = match[1]
        match = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if match and any(map(int, match.groups())):
            found.append(f"{function}: {line.strip()}")
    return found


@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_every_architecture_without_spills():
    """About 80 seconds of processor time, in which two compilers run at once."""
    assert SOURCES
    jobs = [(source, arch) for source in SOURCES for arch in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        for source, arch, report in pool.map(compile_for, jobs):
            assert "error" not in report, f"{source.name} for sm_{arch}: {report[-2000:]}"
            assert "Compiling entry function" in report
            assert not local_memory(report), f"{source.name} for sm_{arch}: {local_memory(report)}"


def test_a_kernel_that_uses_local_memory_is_found(tmp_path):
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void kernel(float* out, int i) { float v[64]; for (int k = 0; k < 64; k++) v[k] = out[k];\n"
        "  for (int k = 0; k < 64; k++) v[(i + k * k) % 64] += 1; out[i] = v[i]; }\n"
    )
    assert any("kernel" in line for line in local_memory(compile_for((source, 80))[2]))
