"""Two sides in turns from one load generator, a process beside: short rounds, so that what others do on the machine meets both alike.

Both sides run on one core meanwhile and the load generator on another, where the system can do that. Else it is mostly the scheduler that
is compared: over one connection a server that shares the core of who asks it takes half the time of one that does not (measured).
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import uvloop

from tests.bench.load import Load
from tests.bench.measure import Failed, Round, Side, cpu_per_10k, cpu_seconds, turns


@contextmanager
def pinned(sides: Sequence[Side]) -> Iterator[None]:
    """Keep the processes of all sides on one core and this one on another."""
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    if len(cores) < 2:
        yield
        return
    places = {pid: {cores[0]} for side in sides for pid in side.pids.values()} | {os.getpid(): {cores[1]}}
    before = {pid: os.sched_getaffinity(pid) for pid in places}
    try:
        for pid, place in places.items():
            os.sched_setaffinity(pid, place)
        yield
    finally:
        for pid, place in before.items():
            os.sched_setaffinity(pid, place)


async def one_round(side: Side, connections: int, seconds: float, warm_up_s: float) -> Round:
    """Raises Failed, OSError."""
    load = Load(side.url, side.body, side.expect, connections=connections, warm_up_s=warm_up_s, seconds=seconds)
    before = {name: cpu_seconds(pid) for name, pid in side.pids.items()}
    began_s = time.perf_counter()
    report = await load.run()
    elapsed_s = time.perf_counter() - began_s
    if report.errors or not report.requests:
        raise Failed(f"{side.name}: {report.errors} of {report.sent} requests failed, the first with: {report.first_error}")
    return Round(side=side.name, report=report, cpu_s=cpu_per_10k(side.pids, before, report.sent), elapsed_s=elapsed_s)


async def all_rounds(ours: Side, reference: Side, connections: int, rounds: int, seconds: float, warm_up_s: float) -> list[Round]:
    return [await one_round(side, connections, seconds, warm_up_s) for side in turns(ours, reference, rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.pairs", description=__doc__)
    parser.add_argument("ours", help="JSON of a Side")
    parser.add_argument("reference", help="JSON of a Side")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--warm-up", type=float, default=0.05)
    args = parser.parse_args()
    ours, reference = (msgspec.json.decode(side, type=Side) for side in (args.ours, args.reference))
    try:
        with pinned((ours, reference)):
            found = uvloop.run(all_rounds(ours, reference, args.connections, args.rounds, args.seconds, args.warm_up))
    except (Failed, OSError) as e:
        sys.exit(str(e))
    print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    main()
