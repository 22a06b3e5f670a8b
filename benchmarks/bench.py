"""Measures minireft on this machine, and says what got slower since.
Run: minireft bench [kernels | training | generation | all] [its options]        (minireft bench kernels --help explains one)
     minireft bench --compare before.jsonl after.jsonl
You should see a line for every shape and a table for every step; nothing is written down without --write.

kernels      every operation beside plain PyTorch, torch.compile and the formula as it is usually written (the default)
training     a training step with each method over the frozen base's; PEFT and pyreft beside where they are installed
generation   prefill, decoding, and both as a user calls them
all          all three, written to benchmarks/results, then README's and the tutorials' tables and the pictures: 15 minutes
--compare    which of our rows got slower in the second file, beyond noise: the median by over 5 % and outside both spreads
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                                             # so that it also runs as a file
from benchmarks import generation, harness, kernels, training  # noqa: E402
from minireft.cli import reader_may_leave  # noqa: E402

PROGRAMS = {"kernels": kernels, "training": training, "generation": generation}


def compare(before: str, after: str) -> int:
    """Prints what got slower; the exit status says whether anything did."""
    try:
        found = harness.slower(harness.read(before), harness.read(after))
    except (OSError, ValueError, KeyError) as error:
        print(f"minireft bench --compare: {error}", file=sys.stderr)
        return 2
    for times, provider, what in found:
        print(f"×{times:.2f} slower  {provider}  {what}")
    print(f"{len(found)} rows got slower beyond noise")
    return 1 if found else 0


def everything() -> int:
    """All results of this machine, and all that is made from them."""
    for program in PROGRAMS.values():
        program.main(["--write"])
    python = Path(os.environ.get("MINIREFT_PYREFT", ROOT / ".venv/pyreft/bin/python"))
    if python.is_file():
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        for program in ("training", "generation"):
            subprocess.run([str(python), str(ROOT / f"benchmarks/{program}.py"), "--peers", "--write"], env=environment, check=True)
    else:
        print(f"pyreft takes no part: there is no {python} (make peers-pyreft makes it; MINIREFT_PYREFT names another)")
    from benchmarks import plot, readme                                   # these need matplotlib
    plot.main()
    readme.main([])
    return 0


@reader_may_leave()
def main(argv: list[str]) -> int:
    if argv == ["all"]:
        return everything()
    if argv[:1] and argv[0] in PROGRAMS:
        PROGRAMS[argv[0]].main(argv[1:])
        return 0
    if argv[:1] == ["--compare"] or argv[:1] in (["--help"], ["-h"]):
        parser = argparse.ArgumentParser(prog="minireft bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--compare", nargs=2, metavar=("BEFORE", "AFTER"), help="two files of results")
        return compare(*parser.parse_args(argv).compare)
    if argv[:1] and not argv[0].startswith("-"):
        print(f"minireft bench: {argv[0]!r} is nothing to measure: expected one of {', '.join([*PROGRAMS, 'all'])}", file=sys.stderr)
        return 2
    kernels.main(argv)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
