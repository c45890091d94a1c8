"""`python -m kinora.bench.parity DIR`: run every golden case below DIR, one row a case, exit 1 on any failure."""

import argparse
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from .case import find_cases
from .registry import load_handlers
from .runner import Result, run_case


def _row(result: Result) -> str:
    worst = result.worst
    error = f"{max((v.error for v in result.verdicts), default=float('nan')):.2e}"
    limit = worst.limit if worst else "-"
    verdict = "ok" if result.passed else "FAIL"
    detail = "" if result.passed else result.problem or (f"{worst.name}: {worst.error:.2e}" if worst else "")
    row = f"{result.case.system:12} {result.case.name:34} {error:>9}  {limit:>24}  {verdict:4} {detail}"
    return row.rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kinora.bench.parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder of golden cases, searched recursively")
    parser.add_argument("--only", default="*", help="run only SYSTEM/CASE names that match this pattern")
    parser.add_argument("--verbose", action="store_true", help="print every tensor and the traceback of errors")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        print(
            f"parity: {args.folder} is not a folder; pass the folder that holds the golden cases",
            file=sys.stderr,
        )
        return 2
    cases = [c for c in find_cases(args.folder) if fnmatchcase(f"{c.system}/{c.name}", args.only)]
    if not cases:
        print(f"parity: no golden case (.json) below {args.folder} matches {args.only!r}", file=sys.stderr)
        return 2
    load_handlers()
    torch.manual_seed(0)
    failed = 0
    print(f"{'system':12} {'case':34} {'max error':>9}  {'tolerance':>24}  verdict")
    for case in cases:
        result = run_case(case)
        failed += not result.passed
        print(_row(result), flush=True)
        if args.verbose:
            for v in result.verdicts:
                print(f"    {v.name:40} error {v.error:.2e}  limit {v.limit}  {'ok' if v.passed else 'FAIL'}")
            if result.trace:
                print(result.trace)
    print(f"{len(cases) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
