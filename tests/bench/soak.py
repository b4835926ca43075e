"""`make soak`: market data for ten minutes, while hosts poll; neither delays nor memory may grow.

1,000 updates a second over 100 symbols flow from the stand-in exchange through feeder, NATS and bridge. Hosts poll tickers and depths at
random all the time; in each window of ten seconds one of them asks without a pause for a second, so that each update is timed
(watch.py). Status 1 and the reason at the end where something grew, or was not answered from the cache.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from bus.lifecycle import running
from tests.bench.exchange import Channel
from tests.bench.market import FLOW, KINDS, SYMBOLS
from tests.bench.measure import Failed, output_of, resident_mb
from tests.bench.rig import Rig, rigged, symbols
from tests.bench.watch import Delays

SOAK_S = 600.0
WINDOW_S = 10.0
TIMED_S = 1.0
WATCHED_S = 2.0
"""What a process needs to time updates for a second."""
MINUTE_S = 60.0
"""The first is not judged; the second is what the last is compared with."""
HOSTS = 20
PAUSE_S = 0.1
"""Between two requests of a host."""
MOST_DELAY, SLACK_MS = 1.5, 0.5
"""The median delay of the last minute may be that many times that of the second, and a little more: others use the machine too."""
MOST_MEMORY, SLACK_MB = 1.10, 1.0
JUDGED = ("bridge", "feeder", "nats")
MOST_MISSES = 0.001


class Window(Struct, frozen=True, kw_only=True):
    """Ten seconds. at_s: since the beginning; delay_ms: median, from sent to answered; memory_mb: by process; asked, missed: by hosts."""

    at_s: float
    delay_ms: float
    p99_ms: float
    memory_mb: dict[str, float]
    asked: int
    missed: int

    def line(self) -> str:
        memory = "  ".join(f"{name} {mb:.1f} MB" for name, mb in self.memory_mb.items())
        hosts = f"{self.asked} answers, {self.missed} not from the cache"
        return f"{self.at_s:5.0f} s  delay p50 {self.delay_ms:.2f} ms, p99 {self.p99_ms:.2f} ms  {memory}  {hosts}"


def judged(windows: Sequence[Window]) -> list[str]:
    """What grew; nothing, where all is well. Compares the last minute with the second; of a short run its last third with the second."""
    end_s = windows[-1].at_s
    part_s = min(MINUTE_S, end_s / 3)
    first = [one for one in windows if part_s < one.at_s <= 2 * part_s] or windows[:1]
    last = [one for one in windows if one.at_s > end_s - part_s]
    wrong = []
    before_ms, after_ms = (statistics.median(one.delay_ms for one in part) for part in (first, last))
    if after_ms > before_ms * MOST_DELAY + SLACK_MS:
        wrong.append(f"the median delay grew from {before_ms:.2f} to {after_ms:.2f} ms")
    for name in windows[-1].memory_mb:
        before_mb, after_mb = (statistics.median(one.memory_mb[name] for one in part) for part in (first, last))
        if after_mb > before_mb * MOST_MEMORY + SLACK_MB:
            wrong.append(f"{name} grew from {before_mb:.1f} to {after_mb:.1f} MB")
    asked, missed = (sum(getattr(one, of) for one in windows) for of in ("asked", "missed"))
    if missed > asked * MOST_MISSES:
        wrong.append(f"{missed} of {asked} answers did not come from the cache")
    return wrong


class Hosts:
    """asked: answers so far; missed: those that did not come from the cache."""

    def __init__(self, rig: Rig, channels: Sequence[Channel]) -> None:
        self._rig = rig
        self._channels = channels
        self.asked = self.missed = 0

    async def poll(self) -> None:
        """Raises Failed for an answer that is an error."""
        while True:
            channel = random.choice(self._channels)
            answer = await self._rig.ask(channel)
            if not answer.content.startswith(b'{"data"'):
                raise Failed(f"{channel} is answered with {answer.content[:200].decode(errors='replace')}")
            self.asked += 1
            self.missed += answer.result != "hit"
            await asyncio.sleep(PAUSE_S * random.uniform(0.5, 1.5))


async def soak(state: Path, seconds: float, *, window_s: float = WINDOW_S) -> list[Window]:
    """Raises Failed; prints a line each window."""
    windows: list[Window] = []
    async with rigged(state) as rig:
        channels = [(kind, symbol) for symbol in symbols(SYMBOLS) for kind in KINDS]
        await rig.flow(FLOW)
        await rig.cached(channels)
        hosts = Hosts(rig, channels)
        began_s = time.monotonic()
        async with running(*(hosts.poll() for _ in range(HOSTS))):
            while (at_s := time.monotonic() - began_s) < seconds:
                asked, missed = hosts.asked, hosts.missed
                await asyncio.sleep(max(0.0, window_s - WATCHED_S))
                order = msgspec.json.encode((await rig.told()).order).decode()
                timed = await output_of("tests.bench.watch", "poll", rig.address, order, "--seconds", str(TIMED_S))
                delays = msgspec.json.decode(timed, type=Delays)
                found = {name: resident_mb(rig.pids[name]) for name in JUDGED}
                at_s = time.monotonic() - began_s
                windows.append(
                    Window(
                        at_s=at_s,
                        delay_ms=delays.p50_ms,
                        p99_ms=delays.p99_ms,
                        memory_mb={name: mb for name, mb in found.items() if mb is not None},
                        asked=hosts.asked - asked,
                        missed=hosts.missed - missed,
                    )
                )
                print(windows[-1].line(), flush=True)
    return windows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SOAK_S, help="how long (default %(default)g)")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="fmzbus-") as folder:
            windows = asyncio.run(soak(Path(folder) / "soak", args.seconds))
    except* (Failed, AssertionError, OSError, ValueError) as e:
        first: BaseException = e
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        sys.exit(f"soak: {type(first).__name__}: {first}")
    if wrong := judged(windows):
        sys.exit(f"soak: {'; '.join(wrong)}")
    print(f"nothing grew in {windows[-1].at_s:.0f} s")


if __name__ == "__main__":
    main()
