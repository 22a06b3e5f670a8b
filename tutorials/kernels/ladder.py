"""The kernel ladder: h + Aᵀ(D h + b) in six versions, each removing one named cost, run and counted in the emulator.
Run:  python tutorials/kernels/ladder.py [--N 448] [--C 1024] [--r 8]      # or: Rung("v3")(h, down, up, bias)
See:  a line a version: sectors touched a row and element, and what of it is h, the weights, the output.

The emulator compiles the same source as nvcc would, in a second, and counts the same numbers on every machine; it times nothing.
"""

import argparse
import ctypes
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.emulator import _with_headers  # noqa: E402

VERSIONS = {path.stem.partition("_")[0]: path for path in sorted(HERE.glob("v*.cu"))}
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
SECTOR = 32                             # bytes


class Problem(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("h", "down", "up", "bias", "out")] + [(name, ctypes.c_int64) for name in ("N", "C", "r")]


class Event(ctypes.Structure):
    """One step of one thread: an access to memory, or its arrival at a barrier, where bytes is 0."""
    _fields_ = [(name, ctypes.c_int64) for name in ("block", "thread", "line", "store", "shared", "address", "bytes")]


SMALL = """#include "ladder.h"
namespace minireft::MINIREFT_BACKEND {{
__global__ void edit(Problem p) {{
{body}
}}
const char* run(const Problem& p, void* stream) {{ return LAUNCH((edit), dim3({blocks}), {threads}, 0, stream, p); }}
}}
"""


class Rung:
    """A version of the ladder, compiled for the emulator when it is first asked for. text: another source in its place, to try
    things. Raises ValueError for a version that is not there, RuntimeError with the compiler's words for what does not compile."""

    def __init__(self, version: str, text: str | None = None, flags: str = "-O2"):
        if version not in VERSIONS:
            raise ValueError(f"there is no version {version!r}: expected one of {', '.join(VERSIONS)}")
        self.source, folder = VERSIONS[version], ROOT / "build" / "ladder"
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(_with_headers(self.source) + f"{text} {flags}".encode()).hexdigest()[:16]
        if text is not None:
            self.source = folder / f"{version}-{name}.cu"
            self.source.write_text(text)
        library = folder / f"{version}-{name}.so"
        if not library.exists():
            partial = library.with_suffix(f".{os.getpid()}")
            command = f"{os.environ.get('CXX', 'g++')} -x c++ -std=c++17 -g1 {flags} -fPIC -shared -DMINIREFT_EMULATOR -ffp-contract=off"
            done = subprocess.run([*command.split(), f"-I{HERE}", str(self.source), "-o", str(partial)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{self.source.name} does not compile for the emulator:\n{done.stderr[:3000]}")
            partial.rename(library)
        self.library = ctypes.CDLL(str(library))
        self.library.ladder_run.restype = self.library.ladder_counts.restype = ctypes.c_char_p
        self.library.ladder_run.argtypes = (ctypes.POINTER(Problem), ctypes.c_void_p)
        self.library.ladder_trace.restype, self.library.ladder_trace.argtypes = ctypes.c_int64, (ctypes.c_void_p,)
        self.library.ladder_order.argtypes = (ctypes.c_int, ctypes.c_uint64)

    @classmethod
    def small(cls, body: str, threads: int = 32, blocks: int = 1) -> "Rung":
        """A kernel of a few lines, to try things with: the C of its body, where p.h is read and p.out written, p.N rows of p.C."""
        return cls("v1", SMALL.format(body=body, threads=threads, blocks=blocks))

    def __call__(self, h: Tensor, down: Tensor | None = None, up: Tensor | None = None, bias: Tensor | None = None, order: str = "forward", seed: int = 1) -> Tensor:
        """h (N, C), down and up (r, C), bias (r,), float32 and contiguous, on the CPU → (N, C). Without weights they are of
        rank 0. order: of a block's threads."""
        down, up, bias = h.new_zeros(0, h.shape[1]) if down is None else down, h.new_zeros(0, h.shape[1]) if up is None else up, \
            h.new_zeros(0) if bias is None else bias
        tensors = [h, down, up, bias]
        if any(t.dtype != torch.float32 or not t.is_contiguous() or t.device.type != "cpu" for t in tensors):
            raise ValueError("the ladder takes contiguous float32 tensors on the CPU")
        out = torch.full_like(h, torch.nan)                               # (N, C) what a kernel forgets stays NaN
        self.library.ladder_order(ORDERS[order], seed)
        problem = Problem(*(t.data_ptr() for t in (*tensors, out)), *h.shape, len(down))
        wrong = self.library.ladder_run(ctypes.byref(problem), None)
        if wrong:
            raise RuntimeError(f"{self.source.name}: {wrong.decode()}")
        return out

    def trace(self, h: Tensor, *weights: Tensor, order: str = "forward", seed: int = 1) -> list[Event]:
        """What every thread did to memory, and where it met a barrier, in the order in which it happened. Addresses are bytes from
        the start of out for what lies in it; in shared memory, from the lowest that is touched; the machine's own elsewhere."""
        self.library.ladder_trace(None)
        events = ctypes.POINTER(Event)()
        try:
            out = self(h, *weights, order=order, seed=seed)
        finally:
            count = self.library.ladder_trace(ctypes.byref(events))
        found = [Event.from_buffer_copy(events[i]) for i in range(count)]
        lowest = min((e.address for e in found if e.shared), default=0)
        for e in found:
            inside = 0 <= e.address - out.data_ptr() < out.nbytes
            e.address -= lowest if e.shared else out.data_ptr() if inside else 0
        return found

    def count(self, h: Tensor, *weights: Tensor) -> dict:
        """What one run costs: memory instructions of warps, the sectors and bytes of them, the bytes that reached device memory
        through the model of L2, the share of 16-byte accesses that waste nothing, bank conflicts, barriers, shuffles."""
        self.library.ladder_count()
        try:
            self(h, *weights)
        finally:
            found = json.loads(self.library.ladder_counts())
        sites = [site for kernel in found["kernels"] for site in kernel["sites"]]
        outside = [site for site in sites if not site["shared"]]
        instructions = sum(site["instructions"] for site in outside)
        return {"instructions": instructions, "sectors": sum(site["sectors"] for site in outside),
                "used": sum(site["bytes"] for site in outside), "memory bytes": found["bytes"],
                "coalesced": sum(site["full"] for site in outside) / instructions, "bank conflicts": sum(site["conflicts"] for site in sites),
                **{name: sum(kernel[name] for kernel in found["kernels"]) for name in ("barriers", "shuffles", "fma", "launches")}}


def least_sectors(N: int, C: int, r: int) -> int:
    """Every row read once and written once, D and A read once."""
    return (2 * N * C + 2 * r * C + r) * 4 // SECTOR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("N", 448), ("C", 1024), ("r", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    N, C, r = options.N, options.C, options.r
    torch.manual_seed(0)
    inputs = torch.randn(N, C), torch.randn(r, C) / C**0.5, torch.randn(r, C), torch.randn(r)
    print(f"N {N}, C {C}, r {r}: at least {least_sectors(N, C, r):,} sectors of {SECTOR} bytes")
    for version, path in VERSIONS.items():
        c = Rung(version).count(*inputs)
        print(f"{path.stem:24} {c['sectors']:11,} sectors, {c['sectors'] / least_sectors(N, C, r):6.2f} × the least; {c['used'] / (c['sectors'] * SECTOR):4.0%} "
              f"of them used; {c['instructions']:9,} instructions, {c['bank conflicts']:,} bank conflicts, {c['barriers'] / max(1, -(-N // 4)):.1f} barriers a block of 4 rows")


if __name__ == "__main__":
    main()
