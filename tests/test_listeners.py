"""Who listens to market data: the real server's list of subscriptions, and monitors that are none."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiomqtt
import nats
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import server, subjects
from bus.listeners import MOST, listened, parse
from tests import servers
from tests.streams import flushed

pytestmark = pytest.mark.slow

PAPER = ("paper", "ticker", "BTC_USDT")


@asynccontextmanager
async def monitor(answer: bytes, *, wait: bool = False) -> AsyncIterator[str]:
    """Something on a port that sends these bytes to whoever asks. wait: one each 0.1 s, and the connection stays open."""
    over = asyncio.Event()

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for byte in answer if wait else b"":
            writer.write(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), 0.1)
        if wait:
            await over.wait()
        else:
            writer.write(answer)
        writer.close()

    listener = await asyncio.start_server(tell, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        over.set()


def page(content: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (status, len(content), content)


@pytest.mark.parametrize(
    ("subject", "key"),
    [
        ("feed.paper.ticker.BTC_USDT", PAPER),
        ("feed.paper.depth.BTC_USDT=2Eswap", ("paper", "depth", "BTC_USDT.swap")),
        ("feed.okx.candles-15.BTC_USDT", ("okx", "candles-15", "BTC_USDT")),
        ("feed.paper.ticker.*", None),
        ("feed.paper.*.BTC_USDT", None),
        ("feed.*.ticker.BTC_USDT", None),
        ("feed.paper.ticker.>", None),
        ("feed.>", None),
        (">", None),
        ("feed.paper.ticker", None),
        ("feed.paper.ticker.BTC_USDT.swap", None),
        ("beat.paper.ticker.BTC_USDT", None),
        ("feed.paper.ticker.BTC=5FUSDT", None),  # values of BTC_USDT are never told there
        ("feed.paper.ticker.BTC=2", None),
        ("feed.paper.ticker.=FF", None),
        ("feed.paper.ticker.=2A", ("paper", "ticker", "*")),  # a symbol like any other
        ("feed.paper.ticker." + "X" * 201, None),
    ],
)
def test_only_the_exact_feed_of_one_symbol_is_a_wish(subject: str, key: tuple[str, str, str] | None) -> None:
    assert parse(subject) == key


@given(st.text(), st.text())
def test_any_subject_is_read_as_the_feed_that_has_it_or_as_none(text: str, symbol: str) -> None:
    for subject in (text, f"feed.paper.ticker.{symbol}"):
        key = parse(subject)
        assert key is None or subjects.feed(*key) == subject


async def test_listeners_over_nats_and_mqtt_are_found_while_they_listen(state: Path) -> None:
    port = server.free_port()
    async with servers.running(*server.command(state, port)):
        await server.wait_ready(state)
        monitors = [server.monitor(state)]
        assert await listened(monitors) == set()
        reader = await nats.connect(server.url(state, "reader"))
        one = await reader.subscribe(subjects.feed("paper", "depth", "BTC_USDT.swap"))
        await reader.subscribe("feed.paper.*.ETH_USDT")
        await flushed(reader)
        assert await listened(monitors) == {("paper", "depth", "BTC_USDT.swap")}
        password = server.settings(state).passwords["reader"]
        async with aiomqtt.Client("127.0.0.1", port, username="reader", password=password) as mqtt:
            await mqtt.subscribe("feed/paper/ticker/BTC_USDT", qos=0)
            await mqtt.subscribe("feed/paper/ticker/ETH_USDT=2Eswap", qos=1)
            await mqtt.subscribe("feed/paper/trades/+", qos=0)
            both = {PAPER, ("paper", "ticker", "ETH_USDT.swap")}
            assert await listened(monitors) == both | {("paper", "depth", "BTC_USDT.swap")}
            await one.unsubscribe()
            await flushed(reader)
            assert await listened(monitors) == both
        async with asyncio.timeout(5):
            while await listened(monitors):  # until the server has let go of the client
                pass
        await reader.close()


async def test_three_thousand_listeners_are_all_found_every_time(state: Path) -> None:
    async with servers.nats(state):
        reader = await nats.connect(server.url(state, "reader"))
        for number in range(3000):
            await reader.subscribe(f"feed.paper.ticker.S{number}")
        await flushed(reader)
        for _ in range(5):
            assert await listened([server.monitor(state)]) == {("paper", "ticker", f"S{number}") for number in range(3000)}
        await reader.close()


async def test_the_listeners_of_several_servers_come_together(state: Path, tmp_path: Path) -> None:
    async with servers.nats(state), servers.nats(tmp_path / "t"):
        folders = (state, tmp_path / "t")
        readers = [await nats.connect(server.url(folder, "reader")) for folder in folders]
        for number, reader in enumerate(readers):
            await reader.subscribe(f"feed.paper.ticker.S{number}")
            await flushed(reader)
        assert await listened([server.monitor(folder) for folder in folders]) == {("paper", "ticker", "S0"), ("paper", "ticker", "S1")}
        for reader in readers:
            await reader.close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "closed connection without response"),
        (b"SSH-2.0\r\n\r\n", "SSH-2.0"),
        (page(b"", b"404 Not Found"), "HTTP 404"),
        (page(b"<html>"), "malformed"),
        (page(b'{"subscriptions_list":[{"subject":1,"x":' + b"[" * 100_000), "expected `str`"),
        (page(b'{"x":' + b"[" * 100_000), "recursion"),
        (page(b'{"subscriptions_list":[{"subject":"\xff"}]}'), "utf-8"),
        (page(b'{"total":%d}' % (MOST + 1)), f"more than {MOST}"),
    ],
)
async def test_a_monitor_that_answers_nonsense_is_named(answer: bytes, said: str) -> None:
    async with monitor(answer) as address:
        with pytest.raises(OSError, match="no list of subscriptions") as raised:
            await listened([address])
    assert address in str(raised.value)
    assert said.lower() in str(raised.value).lower()


@pytest.mark.parametrize("answer", [b"", page(b'{"total":0,"subscriptions_list":[]}')])
async def test_a_monitor_that_hangs_or_trickles_is_given_up_after_a_second(answer: bytes) -> None:
    async with monitor(answer, wait=True) as address:
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(OSError, match="within 1 s") as raised:
            await listened([address])
        assert asyncio.get_running_loop().time() - began_s < 1.5
        assert address in str(raised.value)


async def test_a_monitor_that_is_not_there_or_no_address_is_an_oserror() -> None:
    for address in (f"http://127.0.0.1:{server.free_port()}", "http://127.0.0.1:port", "no address", ""):
        with pytest.raises(OSError, match="no list of subscriptions"):
            await listened([address])


async def test_an_empty_list_is_no_error() -> None:
    async with monitor(page(b'{"total":0}')) as address:
        assert await listened([address]) == set()
