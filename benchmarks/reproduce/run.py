"""The papers' claims in miniature, with seeds and error bars: every claim, or one, from selection to its page.
Run: minireft reproduce [--claim NAME] [--quick] [--minutes N] [--workers 2] [--out FOLDER]
You should see a bar for each unit, and in FOLDER cells.jsonl, a JSON, a table and a picture for each claim, and RESULTS.md.

A stopped run goes on where it was: finished cells are kept. The published run is in benchmarks/results/reproduce. Where there
is no sister base yet, it is pre-trained first. See engine.py for how selection is kept from the test items.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.reproduce import methods, report  # noqa: E402
from benchmarks.reproduce.claims import CLAIMS  # noqa: E402
from benchmarks.reproduce.engine import FULL, QUICK, Store, run_claim  # noqa: E402
from minireft.cli import reader_may_leave  # noqa: E402


@reader_may_leave()
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="minireft reproduce", description=__doc__.split("\n")[0])
    parser.add_argument("--claim", metavar="NAME", action="append", help=f"one of {', '.join(CLAIMS)}; may be repeated (default: all)")
    parser.add_argument("--quick", action="store_true", help="few steps, items and seeds: whether it runs, not what it shows")
    parser.add_argument("--unit", metavar="BASE/TASK", help="only this base and task of the claim")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="N", help="begin no cell after N minutes; run again to go on")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes of one thread (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: benchmarks/results/reproduce, or runs/reproduce-quick")
    parser.add_argument("--table", action="store_true", help="run nothing: write the pages anew from the cells that are there")
    args = parser.parse_args(argv)
    names = args.claim or list(CLAIMS)
    if wrong := [name for name in names if name not in CLAIMS]:
        print(f"minireft: there is no claim {wrong[0]!r}: choose from {', '.join(CLAIMS)}", file=sys.stderr)
        return 2
    if args.workers < 1 or not args.minutes >= 0:
        print(f"minireft: --workers {args.workers} --minutes {args.minutes:g}: expected at least 1 process, and minutes from 0", file=sys.stderr)
        return 2
    scale = QUICK if args.quick else FULL
    store = Store(args.out or (ROOT / "runs/reproduce-quick" if args.quick else ROOT / "benchmarks/results/reproduce"))
    until = time.time() + 60 * args.minutes
    for name in names if not args.table else ():
        claim = CLAIMS[name]
        units = [unit for unit in claim.units if args.unit in (None, "/".join(unit))]
        if not units:
            print(f"minireft: {name} has no unit {args.unit!r}: choose from {', '.join('/'.join(unit) for unit in claim.units)}", file=sys.stderr)
            return 2
        if without := [unit for unit in units if methods.absent(unit[0])]:
            print(f"{name}: {', '.join('/'.join(unit) for unit in without)} left out: there is no {methods.STORIES}, of the public data (MINIREFT_DATA)")
            units = [unit for unit in units if unit not in without]
        for base in dict.fromkeys(base for base, _ in units):
            if time.time() <= until:
                methods.ensure(base, scale)
        try:
            run_claim(claim, store, scale, args.workers, until, not sys.stderr.isatty(), units)
        except KeyboardInterrupt:
            print("minireft: interrupted; what has finished is kept, run it again to go on", file=sys.stderr)
            break
        print(f"{name}: {report.state(*report.progress(claim, store, scale))}", flush=True)
    report.write(list(CLAIMS.values()), store, scale)
    print(f"in {store.folder}: RESULTS.md, and a table and a picture for each claim")
    return 0


if __name__ == "__main__":
    sys.exit(main())
