"""How the bench measures: two sides in turns, and what the operating system tells of their processes."""

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import msgspec
from msgspec import Struct
from rich.console import Console

from tests.bench.load import BODY, Report

MANY, ONE = 64, 1
LOADS = (MANY, ONE)
PER = 10_000
"""CPU seconds are told for that many requests."""

err = Console(stderr=True, highlight=False, soft_wrap=True)


class Failed(Exception):
    """Something did not run, so that a figure would mean nothing; the text says what."""


class Side(Struct, frozen=True):
    """What is measured. pids: "http" (bridge, or what stands in its place), and of the path also "worker" (or responder) and "nats".
    expect: the body of a right answer, b"" for any that is not an error."""

    name: str
    url: str
    pids: dict[str, int]
    body: bytes = BODY
    expect: bytes = b""


class Round(Struct, frozen=True, kw_only=True):
    """One measurement of one side. cpu_s: per 10,000 requests, by process; empty where the system does not tell. elapsed_s: what
    cpu_s was spent in, with the start of the load generator."""

    side: str
    report: Report
    cpu_s: dict[str, float]
    elapsed_s: float


class Plan(Struct, frozen=True, kw_only=True):
    """How long it takes: rounds of each side at each number of connections, seconds of one, starts of the whole system; trades of
    each kind in a round, seconds of the schedule of orders; rounds of cached answers, seconds of watching delays and of an overload."""

    rounds: int
    seconds: float
    warm_up_s: float
    starts: int
    trades: int
    orders_s: float
    cached_rounds: int
    cached_s: float
    watch_s: float
    overload_s: float


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
    """User and system time so far, None where the system does not tell. Of Linux: clock_getcpuclockid(3), which counts ns, not ticks."""
    try:
        return time.clock_gettime((~pid << 3) | 2) if sys.platform == "linux" else None
    except OSError:
        return None


def resident_mb(pid: int) -> float | None:
    """Resident memory, None where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def cpu_share(pids: dict[str, int], seconds: float) -> dict[str, float]:
    """CPU seconds a second, by process, while time goes by; without those of which the system does not tell."""
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    began_s = time.perf_counter()
    await asyncio.sleep(seconds)
    return {name: spent / (time.perf_counter() - began_s) for name, spent in spent_since(before, pids).items()}


def spent_since(before: dict[str, float | None], pids: dict[str, int]) -> dict[str, float]:
    pairs = {name: (before[name], cpu_seconds(pid)) for name, pid in pids.items()}
    return {name: now - then for name, (then, now) in pairs.items() if then is not None and now is not None}


def cpu_per_10k(pids: dict[str, int], before: dict[str, float | None], requests: int) -> dict[str, float]:
    """CPU seconds per 10,000 requests since `before`, by process; without those of which the system does not tell."""
    return {name: spent * PER / requests for name, spent in spent_since(before, pids).items()}


# ---------------------------------------------------------------- measuring


async def ask(url: str, body: bytes = BODY) -> bytes:
    async with aiohttp.ClientSession() as session, session.post(url, data=body) as response:
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


async def measured(side: Side, connections: int, seconds: float, warm_up_s: float) -> Round:
    """Run the load generator once against one side."""
    arguments = ["--connections", str(connections), "--seconds", str(seconds), "--warm-up", str(warm_up_s)]
    arguments += ["--body", side.body.decode(), "--expect", side.expect.decode()]
    before = {name: cpu_seconds(pid) for name, pid in side.pids.items()}
    began_s = time.perf_counter()
    report = msgspec.json.decode(await output_of("tests.bench.load", side.url, *arguments), type=Report)
    elapsed_s = time.perf_counter() - began_s
    if report.errors or not report.requests:
        raise Failed(f"{side.name}: {report.errors} of {report.sent} requests failed, the first with: {report.first_error}")
    return Round(side=side.name, report=report, cpu_s=cpu_per_10k(side.pids, before, report.sent), elapsed_s=elapsed_s)


def turns(ours: Side, reference: Side, rounds: int) -> Iterator[Side]:
    """Pairs of neighbours: ours, reference, reference, ours, ... so that neither is always the first."""
    for number in range(rounds):
        yield from (ours, reference) if number % 2 == 0 else (reference, ours)


def counted(connections: int) -> str:
    return f"{connections} connection{'s' if connections > 1 else ''}"


def neighbours(rounds: list[Round]) -> list[tuple[Round, Round]]:
    """-> (ours, reference)"""
    mine, others = ([one for one in rounds if one.side == side] for side in ("ours", "reference"))
    return list(zip(mine, others, strict=True))
