"""Many hosts at once: each calls in a closed loop over a connection of its own, and leaves it only after `Connection: close`."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

Question = tuple[str, str, dict[str, Any]]
"""Path, method, params."""


class Asked(Struct, frozen=True):
    """One request and what came of it. reply: the envelope; broken: what the connection did instead. sent_s: monotonic."""

    number: int
    sent_s: float
    took_s: float
    reply: dict[str, Any] = {}
    broken: str = ""


def ticker(path: str) -> Callable[[int], Question]:
    return lambda _number: (path, "ticker", {"symbol": "BTC_USDT"})


def order(path: str) -> Callable[[int], Question]:
    """Each order's amount is the number of its request, so that tests/held.py answers each with its own."""
    return lambda number: (path, "trade", {"symbol": "BTC_USDT", "type": "buy", "price": 1, "amount": number})


class Load:
    """asked: every finished request. said_close: connections whose last reply said that it was the last."""

    def __init__(self, address: str, question: Callable[[int], Question], first: int) -> None:
        url = urlsplit(address)
        self._where = (url.hostname or "", url.port or 0)
        self._question = question
        self._numbers = itertools.count(first)
        self._stopping = False
        self.asked: list[Asked] = []
        self.said_close = 0

    @property
    def good(self) -> int:
        return sum("data" in one.reply for one in self.asked)

    @property
    def errors(self) -> list[str]:
        """The texts of all refusals."""
        return [one.reply["error"] for one in self.asked if "error" in one.reply]

    @property
    def broken(self) -> list[Asked]:
        """Requests that got no answer: refused, reset, cut off, or answered with anything but one whole HTTP 200."""
        return [one for one in self.asked if one.broken]

    async def host(self) -> None:
        """One host. After a broken connection it waits a moment, as robots do."""
        reader: asyncio.StreamReader | None = None
        writer: asyncio.StreamWriter | None = None
        while not self._stopping:
            number, sent_s = next(self._numbers), time.monotonic()
            try:
                if reader is None or writer is None:
                    reader, writer = await asyncio.open_connection(*self._where)
                reply, last = await _post(reader, writer, self._question(number))
                self.asked.append(Asked(number, sent_s, time.monotonic() - sent_s, reply=reply))
                if last:
                    self.said_close += 1
                    await _leave(writer)
                    reader = writer = None
            except (OSError, asyncio.IncompleteReadError, ValueError) as e:
                self.asked.append(Asked(number, sent_s, time.monotonic() - sent_s, broken=repr(e)))
                if writer is not None:
                    await _leave(writer)
                reader = writer = None
                await asyncio.sleep(0.05)
        if reader is not None and writer is not None:
            writer.write_eof()
            rest = await reader.read()
            if rest:  # more answers than questions
                self.asked.append(Asked(0, time.monotonic(), 0, broken=f"came unasked: {rest!r}"))
            await _leave(writer)

    def stop(self) -> None:
        self._stopping = True


@asynccontextmanager
async def loaded(address: str, question: Callable[[int], Question], hosts: int, first: int = 1) -> AsyncIterator[Load]:
    """Call from that many hosts until left; on the way out each waits for its last answer. first: number of the first request."""
    load = Load(address, question, first)
    async with asyncio.TaskGroup() as group:
        for _ in range(hosts):
            group.create_task(load.host())
        try:
            yield load
        finally:
            load.stop()


async def _post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: Question) -> tuple[dict[str, Any], bool]:
    """-> (envelope, whether it said that the connection ends). Raises ValueError for anything but HTTP 200 with JSON."""
    path, method, params = question
    body = msgspec.json.encode({"access_key": "a", "secret_key": "s", "nonce": time.time_ns(), "method": method, "params": params})
    writer.write(b"POST /%b HTTP/1.1\r\nHost: bridge\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body)) + body)
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    content = await reader.readexactly(int(headers["content-length"]))
    if status != "HTTP/1.1 200 OK":
        raise ValueError(f"{status}: {content!r}")
    return msgspec.json.decode(content, type=dict[str, Any]), headers.get("connection", "").lower() == "close"


async def _leave(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):  # it was broken already
        await writer.wait_closed()
