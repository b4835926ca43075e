"""The answer of a bridge as its bytes: what a connection that stays open gets, and who gets aiohttp's own response instead."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime

import msgspec
import pytest
import pytest_asyncio
from msgspec import Struct

from tests import held, servers
from tests.servers import Running, eventually

pytestmark = pytest.mark.slow


class Stage(Struct):
    exchange: held.Exchange
    bridge: Running
    address: str


@pytest_asyncio.fixture(scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    """A bridge and a worker of the exchange whose answers tell their questions."""
    state = tmp_path_factory.mktemp("s")
    async with (
        held.exchanging() as exchange,
        servers.nats(state),
        servers.worker(state, **exchange.settings),
        servers.bridge(state, **exchange.settings) as (bridge, address),
    ):
        yield Stage(exchange, bridge, address)


def request(number: int, head: str = "", version: str = "1.1", method: str = "ticker") -> bytes:
    """What a host sends to hear this number. head: more header lines."""
    params = {"symbol": f"{number}_USDT"}
    body = msgspec.json.encode({"access_key": "a", "secret_key": "s", "nonce": 1, "method": method, "params": params})
    return f"POST /held HTTP/{version}\r\nHost: b\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body


class Got(Struct, frozen=True):
    """status: the line. headers: in the order in which they came, names as they were written."""

    status: str
    headers: dict[str, str]
    body: bytes

    @property
    def last(self) -> int:
        last: int = msgspec.json.decode(self.body)["data"]["last"]
        return last


@asynccontextmanager
async def connection(stage: Stage) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = stage.address.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


async def receive(reader: asyncio.StreamReader) -> Got:
    """One answer, by its Content-Length: a wrong one makes nonsense of the next."""
    async with asyncio.timeout(10):
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        headers = dict(line.split(": ", 1) for line in lines)
        return Got(status, headers, await reader.readexactly(int(headers["Content-Length"])))


async def silent(reader: asyncio.StreamReader) -> bool:
    """Whether nothing more comes for a while, and the connection stays open."""
    try:
        async with asyncio.timeout(0.2):
            await reader.read(1)
    except TimeoutError:
        return True
    return False


async def ended(reader: asyncio.StreamReader) -> bool:
    async with asyncio.timeout(5):
        return await reader.read() == b""


def assert_plain(got: Got) -> None:
    """The one head that all of them have, and nothing of aiohttp's."""
    assert (got.status, list(got.headers)) == ("HTTP/1.1 200 OK", ["Content-Type", "Content-Length", "Date"])
    assert got.headers["Content-Type"] == "application/json"
    assert abs(parsedate_to_datetime(got.headers["Date"]).timestamp() - time.time()) < 5
    assert got.headers["Date"].endswith(" GMT")


async def test_a_kept_connection_is_answered_with_one_head_and_serves_on(stage: Stage) -> None:
    async with connection(stage) as (reader, writer):
        for number in (7, 70, 7_000_000):
            writer.write(request(number))
            got = await receive(reader)
            assert_plain(got)
            assert (got.last, got.headers["Content-Length"]) == (number, str(len(got.body)))
        writer.write(request(7, method="nonsense"))
        got = await receive(reader)
        assert_plain(got)
        assert b'{"error":' in got.body
        assert await silent(reader)
        writer.write(request(8))
        assert (await receive(reader)).last == 8


async def test_requests_that_come_at_once_are_answered_in_their_order(stage: Stage) -> None:
    async with connection(stage) as (reader, writer):
        for first in (10, 100):
            writer.write(b"".join(request(first + number) for number in range(5)))
            answers = [await receive(reader) for _ in range(5)]
            assert [got.last for got in answers] == [first + number for number in range(5)]
            for got in answers:
                assert_plain(got)
        assert await silent(reader)


async def test_the_date_goes_on(stage: Stage) -> None:
    async with connection(stage) as (reader, writer):
        writer.write(request(20))
        first = parsedate_to_datetime((await receive(reader)).headers["Date"])
        await asyncio.sleep(1.1)
        writer.write(request(20))
        assert parsedate_to_datetime((await receive(reader)).headers["Date"]) > first


@pytest.mark.parametrize(
    ("version", "head", "told", "stays"),
    [
        ("1.1", "Connection: close\r\n", "close", False),
        ("1.1", "Connection: Close\r\n", "close", False),
        ("1.0", "", None, False),
        ("1.0", "Connection: keep-alive\r\n", "keep-alive", True),
        ("1.1", "Fmzbus-Trace: 1\r\n", None, True),
        ("1.1", "Fmzbus-Trace: 1\r\nConnection: close\r\n", "close", False),
    ],
)
async def test_whoever_wants_something_else_gets_aiohttps_own_response(
    stage: Stage, version: str, head: str, told: str | None, *, stays: bool
) -> None:
    async with connection(stage) as (reader, writer):
        writer.write(request(30, head, version))
        got = await receive(reader)
        assert got.status == f"HTTP/{version} 200 OK"
        assert (got.headers["Content-Type"], got.headers.get("Connection"), got.last) == ("application/json", told, 30)
        assert {"Date", "Server"} <= got.headers.keys()
        assert ("Server-Timing" in got.headers) == ("Fmzbus-Cache" in got.headers) == ("Trace" in head)
        if stays:
            writer.write(request(31))
            got = await receive(reader)
            assert_plain(got)
            assert got.last == 31
        else:
            assert await ended(reader)


async def test_the_last_of_several_requests_may_close(stage: Stage) -> None:
    async with connection(stage) as (reader, writer):
        writer.write(request(40) + request(41, "Fmzbus-Trace: 1\r\n") + request(42) + request(43, "Connection: close\r\n"))
        answers = [await receive(reader) for _ in range(4)]
        assert [got.last for got in answers] == [40, 41, 42, 43]
        assert ["Server" in got.headers for got in answers] == [False, True, False, True]
        assert [got.headers.get("Connection") for got in answers] == [None, None, None, "close"]
        assert await ended(reader)


@pytest.mark.parametrize("abrupt", [False, True])
async def test_a_host_that_has_gone_before_its_answer_does_no_harm(stage: Stage, *, abrupt: bool) -> None:
    said, before = len(stage.bridge.output), len(stage.exchange.arrivals)
    stage.exchange.hold()
    async with connection(stage) as (_, writer):
        writer.write(request(50 + abrupt) + request(60 + abrupt))  # the second waits behind the first
        await eventually(lambda: len(stage.exchange.arrivals) > before)
        if abrupt:
            writer.transport.abort()
        else:
            writer.close()
            await writer.wait_closed()
    async with connection(stage) as (reader, writer):
        writer.write(request(70 + abrupt))  # taken after the other's end was seen
        await eventually(lambda: len(stage.exchange.arrivals) == before + 2)
        stage.exchange.release()
        assert (await receive(reader)).last == 70 + abrupt
        writer.write(request(80 + abrupt))
        assert (await receive(reader)).last == 80 + abrupt
    assert '"level":"error"' not in stage.bridge.output[said:]
    assert "Traceback" not in stage.bridge.output
