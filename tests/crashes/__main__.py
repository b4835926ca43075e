"""`python -m tests.crashes`: play cases, print what is found and how much was at stake. Status 1 when something was found."""

import argparse
import asyncio
import contextlib
import sys
import tempfile
from pathlib import Path

from tests.crashes import cases

CLUSTERS = 6
"""Side by side: more make two cores the bottleneck, fewer leave them idle."""
SEED = 1


def say(line: str) -> None:
    """For the person who waits."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crashes", description="Orders while things break; see tests/crashes/verdict.py.")
    parser.add_argument("--cases", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--seed", type=int, default=SEED, help="each case is drawn from the seed and its number (default 1)")
    parser.add_argument("--case", type=int, help="only this one, to replay it")
    parser.add_argument("--times", type=int, default=1, help="that one so often, for what depends on the moment")
    parser.add_argument("--clusters", type=int, default=CLUSTERS, help=f"side by side (default {CLUSTERS})")
    parser.add_argument(
        "--stop-at-first", nargs="?", const="any", choices=["any", *cases.KINDS], help="begin no further case once such a thing was found"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="put the clusters' folders there, with the logs of every process, and leave them"
    )
    parser.add_argument("--verbose", action="store_true", help="a line for each case")
    args = parser.parse_args()
    numbers = [args.case] * args.times if args.case is not None else list(range(1, args.cases + 1))
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crashes-")))
        total = asyncio.run(
            cases.run(
                folder,
                args.seed,
                numbers,
                clusters=args.clusters,
                say=say,
                stop_at=args.stop_at_first,
                verbose=args.verbose,
            )
        )
    for line in total.lines:
        say(line)
    return 1 if total.found.total() else 0


if __name__ == "__main__":
    sys.exit(main())
