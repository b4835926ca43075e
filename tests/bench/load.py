"""The load generator, a process beside: a closed loop over keep-alive connections, percentiles as JSON.

It speaks just enough HTTP to cost next to nothing: one prepared request, a protocol on the bare transport, one clock reading a reply.
"""

import argparse
import asyncio
import math
import sys
import time
from array import array
from collections.abc import Sequence
from typing import Protocol, cast
from urllib.parse import urlsplit

import msgspec
import uvloop
from msgspec import Struct

BODY = b'{"access_key":"a","secret_key":"b","nonce":1500793319499123457,"method":"ticker","params":{"symbol":"BTC_USDT"}}'
"""A ticker request as a host sends it; a read, so that the nonce may repeat."""
HEAD_END = b"\r\n\r\n"
LENGTH = b"content-length:"
PATIENCE_S = 15.0
"""How long the last answers may take: more than any deadline of a bridge."""
WRONG_SHOWN = 200


class Report(Struct, frozen=True, kw_only=True):
    """What came of one run.

    sent: all requests, with those of the warm-up and the last ones. requests: right answers inside the measured seconds; rate and
    percentiles are theirs. errors: wrong or missing answers at any time; first_error: the first of them.
    """

    connections: int
    seconds: float
    sent: int
    requests: int
    errors: int
    rate: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    first_error: str = ""


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The nearest rank: the smallest value that at least `percent` of all do not exceed; 0 of nothing."""
    return ascending[max(math.ceil(len(ascending) * percent / 100), 1) - 1] if ascending else 0.0


class Asking(Protocol):
    """Who asks over a connection. request: what is sent next."""

    sent: int

    @property
    def request(self) -> bytes: ...
    def answered(self, status: bytes, body: bytes, sent_at: float, now: float) -> bool: ...
    def wrong(self, what: str) -> None: ...
    def lost(self) -> None: ...


def prepared(host: str, port: int, path: str, body: bytes) -> bytes:
    """The bytes of one POST."""
    head = f"POST {path or '/'} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Load:
    """One run. expect: the body of a right answer; b"" accepts any HTTP 200 that is not an FMZ error."""

    def __init__(self, url: str, body: bytes, expect: bytes, *, connections: int, warm_up_s: float, seconds: float) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.request = prepared(self.host, self.port, parts.path, body)
        self.connections = connections
        self.sent = self.errors = 0
        self._expect = expect
        self._first_error = ""
        self._warm_up_s = warm_up_s
        self._seconds = seconds
        self._took = array("d")
        self._begin = self._end = math.inf
        self._open = connections
        self._all_ended = asyncio.Event()
        self._reconnecting: set[asyncio.Task[None]] = set()

    async def run(self) -> Report:
        """Raises OSError when nobody listens there."""
        first = [await self._connect() for _ in range(self.connections)]
        now = time.perf_counter()
        self._begin = now + self._warm_up_s
        self._end = self._begin + self._seconds
        for connection in first:
            connection.send(now)
        await asyncio.sleep(self._end - time.perf_counter())
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._all_ended.wait()
        except TimeoutError:
            for _ in range(self._open):
                self.wrong("no answer")
        took = sorted(self._took)
        return Report(
            connections=self.connections,
            seconds=self._seconds,
            sent=self.sent,
            requests=len(took),
            errors=self.errors,
            rate=len(took) / self._seconds,
            p50_ms=percentile(took, 50) * 1000,
            p90_ms=percentile(took, 90) * 1000,
            p99_ms=percentile(took, 99) * 1000,
            max_ms=percentile(took, 100) * 1000,
            first_error=self._first_error,
        )

    async def _connect(self) -> "Connection":
        return (await asyncio.get_running_loop().create_connection(lambda: Connection(self), self.host, self.port))[1]

    def answered(self, status: bytes, body: bytes, sent_at: float, now: float) -> bool:
        """Count one answer. Whether the connection shall go on."""
        right = status == b"200" and (body == self._expect if self._expect else not body.startswith(b'{"error"'))
        if not right:
            self.wrong(f"{status.decode(errors='replace')} {body.decode(errors='replace')}")
        elif self._begin <= now < self._end:
            self._took.append(now - sent_at)
        return now < self._end

    def wrong(self, what: str) -> None:
        self.errors += 1
        self._first_error = self._first_error or what[:WRONG_SHOWN]

    def lost(self) -> None:
        """A connection is gone; another takes its place while the run goes on."""
        if time.perf_counter() < self._end:
            task = asyncio.get_running_loop().create_task(self._again())
            self._reconnecting.add(task)
            task.add_done_callback(self._reconnecting.discard)
        else:
            self._ended()

    async def _again(self) -> None:
        try:
            (await self._connect()).send(time.perf_counter())
        except OSError as e:
            self.wrong(f"cannot connect again: {e}")
            self._ended()

    def _ended(self) -> None:
        self._open -= 1
        if not self._open:
            self._all_ended.set()


class Connection(asyncio.Protocol):
    """One kept-alive connection, on which the next request goes out when the answer has come."""

    def __init__(self, load: Asking) -> None:
        self._load = load
        self._buffer = b""
        self._sent_at: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it

    def send(self, now: float) -> None:
        self._sent_at = now
        self._load.sent += 1
        self._transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
        head_end = data.find(HEAD_END)
        end = head_end + len(HEAD_END) + _length(data[:head_end]) if head_end >= 0 else math.inf
        if len(data) < end:
            self._buffer = data
            return
        self._buffer = b""
        now = time.perf_counter()
        assert self._sent_at is not None
        if self._load.answered(data[9:12], data[head_end + len(HEAD_END) :], self._sent_at, now):
            self.send(now)
        else:
            self._sent_at = None
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self._sent_at is not None:
            self._load.wrong(f"connection closed without an answer ({error})")
        self._load.lost()


def _length(head: bytes) -> int:
    """Content-Length of a reply's head, 0 where it has none."""
    begin = head.lower().find(LENGTH)
    return int(head[begin + len(LENGTH) :].split(b"\r\n", 1)[0]) if begin >= 0 else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.load",
        description="POST one request again and again over keep-alive connections, each waiting for its answer; print JSON.",
        epilog="Example, beside `fmzbus up --bench`: python -m tests.bench.load http://127.0.0.1:6666/null -c 64 -s 5",
    )
    parser.add_argument("url", help="service address of an exchange, as a host has it")
    parser.add_argument("-c", "--connections", type=int, default=64, help="how many at once (default 64)")
    parser.add_argument("-s", "--seconds", type=float, default=3.0, help="how long to measure (default 3)")
    parser.add_argument("-w", "--warm-up", type=float, default=0.5, help="seconds before that, not measured (default 0.5)")
    parser.add_argument("--body", default=BODY.decode(), help="what to POST; default a ticker request")
    parser.add_argument("--expect", default="", help="the exact right answer; default any HTTP 200 that is not an FMZ error")
    args = parser.parse_args()

    async def run() -> Report:
        load = Load(
            args.url,
            args.body.encode(),
            args.expect.encode(),
            connections=args.connections,
            warm_up_s=args.warm_up,
            seconds=args.seconds,
        )
        return await load.run()

    try:
        report = uvloop.run(run())
    except OSError as e:
        sys.exit(f"no answer from {args.url}: {e}")
    print(msgspec.json.encode(report).decode())


if __name__ == "__main__":
    main()
