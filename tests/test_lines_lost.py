"""How connections to an exchange end, and how Lines go on: against a real WebSocket server, and bare sockets that misbehave."""

import asyncio
import contextlib
import gc
import hashlib
import itertools
import random
import re
import socket
import time
from base64 import b64encode

import aiohttp
import pytest
from aiohttp import web

from tests.servers import eventually
from tests.tiny import A, B, C, Exchange, Tiny, reading, served, tiny, within
from workers import lines
from workers.updates import Update

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("end", ["close", "abort", "garbage"])
async def test_a_connection_that_ends_is_told_at_once_and_opened_anew(end: str) -> None:
    async with served(Exchange(hello=1)) as exchange, reading(Tiny(exchange.url)) as heard:
        heard.lines.follow(A)
        heard.lines.follow(B)
        await eventually(lambda: len(heard.updates) == 2)
        ws, exchange.hello = exchange.sockets[0], 2
        match end:
            case "close":
                await ws.close(code=4002, message=b"no pong")
                why = "tiny closed the connection: 4002 no pong"
            case "abort":
                assert ws._writer is not None
                ws._writer.transport.abort()
                why = "the connection to tiny broke: 1006"
            case _:
                await ws.send_str('{"of": ')
                why = "tiny sent a frame that makes no sense: JSONDecodeError"
        await eventually(lambda: heard.lost, 0.5)
        assert heard.lost == [([A, B], why)]
        await eventually(lambda: len(heard.updates) == 6)
        assert heard.of(A) == heard.of(B) == [1, 1, 2]
        assert exchange.rows("ask") == [(0, ["A", "B"]), (1, ["A", "B"])]
        assert (heard.lines.live, heard.connects("lost"), len(heard.lost)) == (True, 1, 1)


async def test_while_nobody_listens_every_attempt_is_told_and_they_become_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    attempts: list[float] = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound and not listening: refused
        async with reading(Tiny("ws://127.0.0.1:{}/".format(*probe.getsockname()[1:]))) as heard:
            heard.lines.follow(A)
            while len(attempts) < 5:
                await eventually(lambda: len(heard.lost) > len(attempts))
                attempts.append(time.monotonic())
            assert heard.lost == [([A], "no connection to tiny")] * 5
            assert (heard.connects("error"), heard.lines.connections, heard.lines.live) == (5, 0, False)
    waits = [after - before for before, after in itertools.pairwise(attempts)]
    assert within(waits, (0.1, 0.2, 0.4, 0.8))


async def test_a_handshake_that_is_never_answered_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with reading(Tiny("ws://127.0.0.1:{}/".format(*silent.getsockname()[1:]))) as heard:
            heard.lines.follow(A)
            await eventually(lambda: len(heard.lost) == 2)
            assert heard.lost == [([A], "tiny did not answer the handshake within 0.3 s")] * 2
            assert heard.connects("timeout") == 2


async def test_a_429_to_a_handshake_holds_all_connections_for_as_long_as_the_exchange_says() -> None:
    exchange = Exchange(refusal=web.Response(status=429, headers={"Retry-After": "1"}), hello=1)
    async with served(exchange), reading(tiny(exchange.url, per_socket=1)) as heard:
        heard.lines.follow(A)
        await eventually(lambda: heard.lost)
        heard.lines.follow(B)
        await eventually(lambda: len(heard.updates) == 2)
        assert heard.lost == [([A], "tiny answered 429 to the handshake")]
        assert len(exchange.shaken) == 3
        assert min(exchange.shaken[1:]) - exchange.shaken[0] >= 0.99


async def test_an_exchange_without_a_socket_is_asked_again_later() -> None:
    async with served(Exchange(hello=1)) as exchange:
        feed = Tiny("")
        async with reading(feed) as heard:
            heard.lines.follow(A)
            await eventually(lambda: heard.lost)
            assert heard.lost[0] == ([A], "tiny has no socket now")
            feed.url = exchange.url
            await eventually(lambda: heard.of(A) == [1])


async def test_a_socket_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that vanished sends neither data nor an end."""
    monkeypatch.setattr(lines, "SILENT_S", 0.2)

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        key = re.findall(rb"(?i)sec-websocket-key: (\S+)", head)[0]
        writer.write(b"HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Accept: %b\r\n\r\n" % accept(key))
        with contextlib.suppress(ConnectionError):
            while await reader.read(4096):
                pass
        writer.close()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    async with server, reading(Tiny("ws://127.0.0.1:{}/".format(*server.sockets[0].getsockname()[1:]))) as heard:
        heard.lines.follow(A)
        await eventually(lambda: heard.lost)
        assert heard.lost[0] == ([A], "the connection to tiny broke: No PONG received after 0.1 seconds")


def accept(key: bytes) -> bytes:
    return b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())  # noqa: S324 - RFC 6455's own


async def test_what_is_no_fault_of_the_exchange_ends_the_run() -> None:
    def broken(update: Update) -> None:
        raise AssertionError("ours")

    async with served(Exchange(hello=1)) as exchange:
        with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 - it ends the body, wherever that is
            async with reading(Tiny(exchange.url), hearing=broken) as heard:
                heard.lines.follow(A)
                await asyncio.Event().wait()
        assert caught.group_contains(AssertionError, match="ours")
        await eventually(lambda: exchange.sockets[0].closed)


async def test_cancelling_closes_every_connection_and_loses_nothing(recwarn: pytest.WarningsRecorder) -> None:
    async with served(Exchange(hello=1)) as exchange:
        async with reading(tiny(exchange.url, per_socket=1)) as heard:
            for channel in (A, B, C):
                heard.lines.follow(channel)
            await eventually(lambda: len(heard.updates) == 3)
        await eventually(lambda: all(ws.closed for ws in exchange.sockets))
        assert [ws.close_code for ws in exchange.sockets] == [aiohttp.WSCloseCode.OK] * 3
        assert (heard.lost, heard.lines.connections) == ([], 0)
        gc.collect()
        assert not list(recwarn)
