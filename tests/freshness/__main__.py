"""`python -m tests.freshness`: play cases, say what was answered in each. Status 1 when an answer was stale or wrong, a fault did not
strike, or the cache did not serve again in time."""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from bus.lifecycle import reason
from tests.freshness import cases
from tests.freshness.acts import CASES


def say(line: str) -> None:
    """For the person who waits."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def _played(args: argparse.Namespace) -> cases.Total:
    if args.clusters > 1 and len(args.fault) > 1:
        options = ["--seconds", str(args.seconds), "--seed", str(args.seed), *(["--verbose"] if args.verbose else [])]
        return await cases.run_beside(args.fault, *options, clusters=args.clusters, say=say)
    with tempfile.TemporaryDirectory(prefix="freshness-") as folder:
        where = args.keep or Path(folder)
        return await cases.run(where, args.fault, seed=args.seed, for_s=args.seconds, say=say, verbose=args.verbose)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.freshness", description="Hosts poll while things break; see tests/freshness/.")
    parser.add_argument("--fault", nargs="+", choices=list(CASES), metavar="NAME", default=list(CASES), help="only these, in this order")
    parser.add_argument("--seconds", type=float, default=cases.FOR_S, help=f"how long most faults last (default {cases.FOR_S})")
    parser.add_argument("--seed", type=int, default=cases.SEED, help="of the market and its trader (default 1)")
    parser.add_argument("--clusters", type=int, default=cases.CLUSTERS, help=f"side by side (default {cases.CLUSTERS})")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="put the folder of the one cluster there, with every process' log, and leave it"
    )
    parser.add_argument("--list", action="store_true", help="names of all faults")
    parser.add_argument("--verbose", action="store_true", help="also how long each took, and the errors that hosts were told")
    args = parser.parse_args()
    if args.keep:
        args.clusters = 1
    if args.list:
        say("\n".join(CASES))
        return 0
    try:
        total = asyncio.run(_played(args))
    except BaseExceptionGroup as e:
        why = reason(e)
        if not isinstance(why, RuntimeError):
            raise
        sys.exit(str(why))  # with the last words of what did not come up
    say(total.line)
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
