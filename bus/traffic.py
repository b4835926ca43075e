"""`fmzbus bench-traffic`: simulated hosts, for demos and for sizing. Open loop: what is late stays late and shows in the percentiles."""

import asyncio
import contextlib
import random
import re
import signal
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator

import aiohttp
from msgspec import Struct, field

from bus import call

READS = {"ticker": ("symbol={symbol}",), "depth": ("symbol={symbol}",), "accounts": ()}
SYMBOLS = ("BTC_USDT", "ETH_USDT", "LTC_USDT", "ETH_BTC")
MONEY = {"USDT": "20", "BTC": "0.001"}
"""What a market buy spends, by quote currency."""
MOST_OPEN = 10_000
"""Requests waiting for an answer, above which the hosts hold back: the system is far behind the rate asked of it."""


class Second(Struct):
    """What happened in one second. held: requests that were due and not sent, because MOST_OPEN were open."""

    sent: int = 0
    ok: int = 0
    held: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    spans_ms: list[float] = []

    def percentile(self, percent: int) -> float:
        if len(self.spans_ms) < 2:
            return self.spans_ms[0] if self.spans_ms else 0.0
        return statistics.quantiles(self.spans_ms, n=100, method="inclusive")[percent - 1]

    def add(self, other: "Second") -> None:
        self.sent += other.sent
        self.ok += other.ok
        self.held += other.held
        self.errors.update(other.errors)
        self.spans_ms += other.spans_ms

    def line(self) -> str:
        failed = sum(self.errors.values())
        text = f"sent {self.sent:6d}  ok {self.ok:6d}  errors {failed:4d}"
        text += f"  p50 {self.percentile(50):7.2f} ms  p99 {self.percentile(99):7.2f} ms"
        return text + (f"  held back {self.held}" if self.held else "")


class Traffic:
    """hosts: each with an account and a session path of its own. rate: requests a second of all together. trade: orders too."""

    def __init__(
        self, session: aiohttp.ClientSession, address: str, exchange: str, *, hosts: int, rate: float, trade: bool, seed: int
    ) -> None:
        self._session = session
        self._address = address
        self._exchange = exchange
        self._hosts = hosts
        self._rate = rate
        self._methods = [*READS, *(("trade",) if trade else ())]
        self._random = random.Random(seed)
        self._open: set[asyncio.Task[None]] = set()
        self._second = Second()
        self._stopped = False

    def stop(self) -> None:
        """Send no more; run() still waits for the last answers."""
        self._stopped = True

    def take(self) -> Second:
        """What happened since the last call."""
        second, self._second = self._second, Second()
        return second

    async def run(self, seconds: float) -> None:
        """Send on schedule, then wait for the last answers."""
        started = time.monotonic()
        due = 0
        while (elapsed := time.monotonic() - started) < seconds and not self._stopped:
            while due < elapsed * self._rate:
                moment, due = started + due / self._rate, due + 1
                if len(self._open) >= MOST_OPEN:
                    self._second.held += 1
                    continue
                task = asyncio.create_task(self._one(moment))
                self._open.add(task)
                task.add_done_callback(self._open.discard)
            await asyncio.sleep(min(0.01, 1 / self._rate))
        if self._open:
            await asyncio.wait(self._open)

    async def _one(self, due: float) -> None:
        """One request; its time counts from when it was due."""
        host = self._random.randrange(self._hosts)
        method = self._random.choice(self._methods)
        symbol = self._random.choice(SYMBOLS)
        arguments = [argument.format(symbol=symbol) for argument in READS.get(method, ())]
        if method == "trade":
            side, amount = self._random.choice((("buy", MONEY[symbol.partition("_")[2]]), ("sell", "0.1")))
            arguments = [f"symbol={symbol}", f"type={side}", "price=-1", f"amount={amount}"]
        body = call.body(method, arguments, f"traffic-{host}", "traffic")
        self._second.sent += 1
        try:
            async with self._session.post(f"{self._address}/{self._exchange}/host-{host}", json=body) as response:
                reply = await response.json()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as e:
            self._second.errors[type(e).__name__] += 1
            return
        self._second.spans_ms.append((time.monotonic() - due) * 1000)
        if "error" in reply:
            self._second.errors[_kind(reply["error"])] += 1
        else:
            self._second.ok += 1


def _kind(error: str) -> str:
    """Its first words, up to a colon that is not inside quotes."""
    found = re.match(r"""(?:'[^']*'|"[^"]*"|[^:])*""", error)
    return found[0] if found else error


@contextlib.contextmanager
def _interrupted(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls stop; a second one interrupts as usual."""
    loop = asyncio.get_running_loop()

    def once() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop()

    loop.add_signal_handler(signal.SIGINT, once)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextlib.asynccontextmanager
async def sessions() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=30)) as session:
        yield session


async def drive(
    address: str, exchange: str, *, hosts: int, rate: float, seconds: float, trade: bool, seed: int, show: Callable[[int, Second], None]
) -> Second:
    """Run the traffic until its time is over, or Ctrl-C; show(second number, what happened) is called every second. Returns the sum."""
    total = Second()
    async with sessions() as session:
        traffic = Traffic(session, address, exchange, hosts=hosts, rate=rate, trade=trade, seed=seed)
        with _interrupted(traffic.stop):
            running = asyncio.create_task(traffic.run(seconds))
            number = 0
            while not running.done():
                await asyncio.wait([running], timeout=1)
                number += 1
                second = traffic.take()
                total.add(second)
                show(number, second)
            await running
    return total
