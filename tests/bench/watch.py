"""Processes that watch how long a value takes from the stand-in exchange to whoever wants it: each value carries when it was sent.

`poll` asks a bridge over one kept-alive connection, without a pause, for the channel that the exchange sends next, until it answers with
what was sent after all that was seen before; then for the one after. So each update of each channel is timed by when it could first be
seen, give or take one round trip. `listen` is a plain NATS subscriber.
"""

import argparse
import asyncio
import re
import sys
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec
import nats
import uvloop
from msgspec import Struct
from nats.aio.msg import Msg

from tests.bench.exchange import Channel
from tests.bench.load import Connection, percentile, prepared

SENT = re.compile(rb'(?:"vol":|"asks":\[\[1000,)(\d+)')
"""Where exchange.py puts the moment of sending, as hosts see it."""
NANO = 1_000_000


class Delays(Struct, frozen=True, kw_only=True):
    """From when the exchange sent to when it was seen. count: updates that were timed; asked: answers that a poller read for that."""

    count: int
    asked: int
    p50_ms: float
    p99_ms: float
    max_ms: float


def summary(delays_ms: list[float], asked: int) -> Delays:
    delays_ms.sort()
    p50_ms, p99_ms, max_ms = (percentile(delays_ms, percent) for percent in (50, 99, 100))
    return Delays(count=len(delays_ms), asked=asked, p50_ms=p50_ms, p99_ms=p99_ms, max_ms=max_ms)


def sent_ns(content: bytes) -> int:
    """When the exchange sent a value, time.monotonic_ns(). Raises ValueError for an answer that has none."""
    found = SENT.search(content)
    if found is None:
        raise ValueError(f"no value of the stand-in exchange: {content[:200].decode(errors='replace')}")
    return int(found[1])


def question(kind: str, symbol: str) -> bytes:
    """The body of a host's read."""
    keys = {"access_key": "a", "secret_key": "b", "nonce": 1_500_793_319_499_123_457}
    return msgspec.json.encode(keys | {"method": kind, "params": {"symbol": symbol}})


class Poll:
    """order: in which the exchange sends."""

    def __init__(self, url: str, order: Sequence[Channel], *, warm_up_s: float, seconds: float) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.sent = 0
        self.delays_ms: list[float] = []
        self.asked = 0
        self.ended = asyncio.get_running_loop().create_future()
        self._requests = [prepared(self.host, self.port, parts.path, question(*channel)) for channel in order]
        self._at = 0
        self._newest_ns = 0
        self._begin = time.perf_counter() + warm_up_s
        self._end = self._begin + seconds

    @property
    def request(self) -> bytes:
        return self._requests[self._at]

    def answered(self, status: bytes, body: bytes, _sent_at: float, now: float) -> bool:
        try:
            at_ns = sent_ns(body)
        except ValueError as e:
            self.wrong(f"{status.decode(errors='replace')} {e}")
            return False
        measured = self._begin <= now < self._end
        self.asked += measured
        if at_ns > self._newest_ns:
            if measured:
                self.delays_ms.append((time.monotonic_ns() - at_ns) / NANO)
            self._newest_ns = at_ns
            self._at = (self._at + 1) % len(self._requests)
        return now < self._end

    def wrong(self, what: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(ValueError(what))

    def lost(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def poll(url: str, order: Sequence[Channel], *, seconds: float, warm_up_s: float = 0.5) -> Delays:
    """Raises OSError when nobody listens there, ValueError for an answer that is wrong."""
    watching = Poll(url, order, warm_up_s=warm_up_s, seconds=seconds)
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: Connection(watching), watching.host, watching.port)
    connection.send(time.perf_counter())
    async with asyncio.timeout(warm_up_s + seconds + 5):
        await watching.ended
    return summary(watching.delays_ms, watching.asked)


async def listen(url: str, subject: str, *, seconds: float) -> Delays:
    nc = await nats.connect(url)
    delays_ms: list[float] = []

    async def hear(message: Msg) -> None:
        now_ns = time.monotonic_ns()
        delays_ms.append((now_ns - sent_ns(message.data)) / NANO)

    await nc.subscribe(subject, cb=hear)
    await asyncio.sleep(seconds)
    await nc.close()
    return summary(delays_ms, len(delays_ms))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.watch", description=__doc__)
    parser.add_argument("part", choices=("poll", "listen"))
    parser.add_argument("url", help="service address of the exchange at a bridge; of NATS")
    parser.add_argument("what", help="JSON of the channels in the order of sending; a subject")
    parser.add_argument("--seconds", type=float, default=5)
    args = parser.parse_args()
    try:
        if args.part == "poll":
            order = msgspec.json.decode(args.what, type=list[Channel])
            found = uvloop.run(poll(args.url, order, seconds=args.seconds))
        else:
            found = uvloop.run(listen(args.url, args.what, seconds=args.seconds))
    except (OSError, ValueError) as e:
        sys.exit(str(e))
    if not found.count:
        sys.exit(f"no update was seen in {args.seconds:g} s")
    print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    main()
