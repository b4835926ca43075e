"""The paper exchange's WebSocket over real loopback, with a bare client: requests, login, packing, limits, and how connections end."""

import asyncio
import gc
import json
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paper import NOW_S, README, Client, Clock, exchange, until
from tests.reader import BTC, Book, connected, depth
from workers.venues.paper import channels, connection, sockets
from workers.venues.paper import market as model
from workers.venues.paper.auth import sign
from workers.venues.paper.errors import Refused
from workers.venues.paper.markets import MARKETS

# Login


@pytest.mark.parametrize(
    ("changed", "code"),
    [({"sign": "0" * 64}, 1002), ({"secret": "another"}, 1002), ({"timestamp": str(NOW_S * 1000 - 6000)}, 1002), ({"key": ""}, 1001)],
)
async def test_a_wrong_login_is_refused(client: Client, changed: dict[str, str], code: int) -> None:
    await client.get("/api/v1/account")
    async with connected(client) as reader:
        answer = await reader.login(client, **changed)
        assert (answer["id"], answer["op"], answer["code"]) == (1, "login", code)
        refused = await reader.ask("subscribe", {"channel": "orders"})
        assert (refused["code"], refused["message"]) == (1001, "orders: log in first")


async def test_a_login_goes_stale_and_holds_for_one_account(client: Client, clock: Clock) -> None:
    async with connected(client) as reader:
        timestamp = str(NOW_S * 1000)
        signature = sign(b"secret-1", timestamp=timestamp, window="", verb="LOGIN", target="/ws/v1", body=b"")
        old = {"key": "key-1", "timestamp": timestamp, "sign": signature, "secret": "secret-1"}
        clock.now_s += 6
        assert (await reader.ask("login", old))["code"] == 1003
        assert (await reader.ask("login", old | {"timestamp": int(timestamp)}))["code"] == 1003
        assert (await reader.login(client))["code"] == 0
        assert (await reader.login(client))["code"] == 0
        assert (await reader.login(client.other("key-2", "secret-2")))["code"] == 2002


def test_the_readmes_login_is_right() -> None:
    text = README.read_text()
    signature = sign(b"demo-secret", timestamp="1795168693000", window="", verb="LOGIN", target="/ws/v1", body=b"")
    assert f'"key": "demo", "timestamp": "1795168693000", "sign": "{signature}"' in text


# Requests


@pytest.mark.parametrize(
    ("frame", "answer"),
    [
        ("{", {"id": None, "op": None, "code": 1006}),
        ('{"op": "ping", "args": ' + "[" * 10_000, {"id": None, "op": None, "code": 1006}),
        ('{"id": 5, "op": "sing"}', {"id": 5, "op": "sing", "code": 2002}),
        ('{"id": 5, "op": "subscribe"}', {"id": 5, "op": "subscribe", "code": 2002}),
        ('{"id": "a", "op": "subscribe", "args": [{"channel": "depth"}]}', {"id": "a", "op": "subscribe", "code": 2002}),
        ('{"op": "subscribe", "args": [{"channel": "depth", "symbol": "X"}]}', {"id": None, "op": "subscribe", "code": 2001}),
        ('{"op": "subscribe", "args": [{"channel": "ticker", "symbol": "BTC_USDT", "levels": 5}]}', {"id": None, "code": 2002}),
        ('{"op": "subscribe", "args": [{"channel": "depth", "symbol": "BTC_USDT", "levels": 201}]}', {"id": None, "code": 2002}),
        ('{"op": "subscribe", "args": [{"channel": "candles", "symbol": "BTC_USDT"}]}', {"id": None, "code": 2002}),
        ('{"op": "login", "args": [{"key": "k"}]}', {"id": None, "op": "login", "code": 2002}),
    ],
)
async def test_a_wrong_request_is_told_what_is_wrong_and_the_connection_goes_on(client: Client, frame: str, answer: Any) -> None:
    async with connected(client) as reader:
        await reader.ws.send_str(frame)
        told = await reader.answer()
        assert {name: told[name] for name in answer} == answer
        assert 0 < len(told["message"]) <= 200
        await reader.ws.send_bytes(b"\x00")
        assert (await reader.answer())["code"] == 1006
        assert await reader.ask("ping") == {"id": 1, "op": "pong", "time": NOW_S * 1000}


words = st.sampled_from(["op", "args", "id", "subscribe", "login", "channel", "symbol", "depth", "BTC_USDT", "levels", "key", "sign"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=80) | words, lambda inner: st.lists(inner) | st.dictionaries(words, inner)
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(frame=st.text() | values.map(json.dumps) | st.fixed_dictionaries({"op": words, "args": st.lists(values)}).map(json.dumps))
def test_any_frame_is_understood_or_refused(frame: str) -> None:
    assert channels.head(frame).keys() == {"id", "op"}
    with suppress(Refused):
        wanted = channels.request(frame)
        with suppress(Refused):
            channels.login(wanted.args)
        for argument in wanted.args:
            channels.asked(argument)


async def test_a_request_counts_whole_or_not_at_all(client: Client) -> None:
    async with connected(client) as reader:
        refused = await reader.ask("subscribe", BTC, {"channel": "ticker", "symbol": "NO_SUCH"})
        assert refused["code"] == 2001
        assert (await reader.ask("unsubscribe", BTC))["code"] == 2002


@pytest.mark.parametrize("compress", ["gzip", "deflate_raw"])
async def test_messages_are_packed_on_request(client: Client, clock: Clock, compress: str) -> None:
    async with connected(client) as plain, connected(client, compress) as packed:
        assert await packed.subscribe(**BTC) == await plain.subscribe(**BTC)
        clock.now_s += 1
        assert await packed.next() == await plain.next()


async def test_what_is_no_handshake_is_refused_as_any_request(client: Client) -> None:
    assert await client("GET", "/ws/v1", signed=False) == (400, {"code": 2002, "message": "/ws/v1 is a WebSocket: expected its handshake"})
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        async with connected(client, "brotli"):
            pass
    assert refused.value.status == 400


async def test_permessage_deflate_is_not_agreed_to(client: Client) -> None:
    async with connected(client, compress=15) as reader:
        assert reader.ws.compress == 0
        assert (await reader.ask("ping"))["op"] == "pong"


# Limits


async def test_a_connection_may_have_a_hundred_subscriptions(client: Client) -> None:
    bars = [{"channel": "candles", "symbol": "BTC_USDT", "interval": n} for n in range(1, 101)]
    async with connected(client) as reader:
        assert (await reader.ask("subscribe", *bars))["code"] == 0
        for n in range(1, 101):
            assert (await reader.next())["interval"] == n
        refused = await reader.ask("subscribe", BTC)
        assert (refused["code"], refused["message"]) == (2002, "args: a connection may have 100 subscriptions")
        assert (await reader.ask("subscribe", bars[0]))["code"] == 0
        assert (await reader.ask("unsubscribe", bars[0]))["code"] == 0
        assert (await reader.ask("subscribe", BTC))["code"] == 0


async def test_an_address_may_have_fifty_connections(client: Client) -> None:
    open_ones = [await client.session.ws_connect(f"{client.base}/ws/v1") for _ in range(50)]
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await client.session.ws_connect(f"{client.base}/ws/v1")
    assert (refused.value.status, refused.value.headers is not None and refused.value.headers["Retry-After"]) == (429, "1")
    await open_ones[0].close()
    open_ones[0] = await client.session.ws_connect(f"{client.base}/ws/v1")
    for ws in open_ones:
        await ws.close()


async def test_more_than_twenty_requests_in_a_second_are_refused_then_cut_off(client: Client, clock: Clock) -> None:
    async with connected(client) as reader:
        assert [(await reader.ask("ping"))["op"] for _ in range(20)] == ["pong"] * 20
        refused = await reader.ask("ping")
        assert (refused["code"], refused["retry_after"]) == (1101, 1)
        clock.now_s += 1
        assert (await reader.ask("ping"))["op"] == "pong"
        for _ in range(30):
            await reader.ws.send_str('{"op": "ping"}')
        answers = [await reader.read() for _ in range(29)]
        assert [a.get("code") for a in answers] == [None] * 19 + [1101] * 10
        assert await reader.read() == 1008


async def test_a_ban_holds_for_sockets_too(tmp_path: Path, clock: Clock) -> None:
    async with exchange(tmp_path, clock, limit_a_minute=16) as client, connected(client) as reader:
        for _ in range(11):
            assert (await reader.ask("ping"))["op"] == "pong"
        codes = [(await reader.ask("ping"))["code"] for _ in range(8)]
        clock.now_s += 1
        codes += [(await reader.ask("ping"))["code"] for _ in range(4)]
        assert codes == [1101] * 10 + [1102] * 2
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await client.session.ws_connect(f"{client.base}/ws/v1")
        assert refused.value.status == 418


async def test_a_frame_of_64_kib_is_read_and_a_larger_one_closes(client: Client) -> None:
    async with connected(client) as reader:
        frame = '{"id": 1, "op": "ping"}'
        await reader.ws.send_str(frame + " " * (64 * 1024 - len(frame)))
        assert (await reader.answer())["op"] == "pong"
        await reader.ws.send_str(frame + " " * (64 * 1024 - len(frame) + 1))
        assert await reader.read() == 1009


async def test_a_slow_reader_is_closed_and_told_why(client: Client, clock: Clock) -> None:
    def narrow(address: Any) -> socket.socket:
        made = socket.socket(address[0], address[1], address[2])
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        return made

    connector = aiohttp.TCPConnector(socket_factory=narrow)
    async with aiohttp.ClientSession(connector=connector) as session:
        slow = Client(session, client.base, clock)
        async with connected(slow) as reader, connected(client) as quick:
            every = [{"channel": "depth", "symbol": symbol, "levels": 200} for symbol in MARKETS]
            assert (await reader.ask("subscribe", *every))["code"] == 0
            books = {symbol: Book(200) for symbol in list(MARKETS)[:4]}
            for symbol, book in books.items():
                book.apply(await quick.subscribe(channel="depth", symbol=symbol, levels=200))
            held = [c for c in gc.get_objects() if isinstance(c, connection.Connection) and len(c.subscriptions) == len(MARKETS)]
            assert len(held) == 1

            async def a_second_passes() -> None:
                clock.now_s += 1
                for symbol in MARKETS:
                    await depth(client, symbol, 1)
                for _ in books:
                    delta = await quick.next()
                    books[delta["symbol"]].apply(delta)

            for _ in range(200):
                await a_second_passes()
                if held[0]._ended.done():
                    break
            # What it had not read is thrown away; what was on its way still arrives, and the reason last.
            while isinstance(message := await reader.read(), dict):
                pass
            assert message == 4001
            # A reader that keeps up gets any amount.
            for _ in range(30):
                await a_second_passes()
            assert (await quick.ask("ping"))["op"] == "pong"


async def test_pings_come_every_15_s_and_silence_for_30_s_ends_it(client: Client, clock: Clock) -> None:
    async with connected(client, autoping=False) as mute, connected(client) as polite:

        async def pinged() -> None:
            async with asyncio.timeout(5):
                assert (await mute.ws.receive()).type is WSMsgType.PING

        clock.now_s += 14
        assert (await mute.ask("ping"))["op"] == "pong"
        clock.now_s += 1
        await pinged()
        await mute.ws.pong()
        assert (await mute.ask("ping"))["op"] == "pong"
        for _ in range(3):
            assert (await polite.ask("ping"))["op"] == "pong"
            clock.now_s += 15
            await pinged()
        # A client answers only while it reads.
        assert (await polite.ask("ping"))["op"] == "pong"
        clock.now_s += 1
        assert await mute.read() == 4002
        assert (await polite.ask("ping"))["op"] == "pong"


async def test_nothing_is_told_before_it_is_on_disk(client: Client, clock: Clock) -> None:
    (served,) = [found for found in gc.get_objects() if isinstance(found, sockets.Sockets) and found._clock is clock]
    market, bid = MARKETS["BTC_USDT"], model.depth(7, "BTC_USDT", NOW_S).bids[0][0]
    falls = next(second for second in range(NOW_S + 1, NOW_S + 500) if model.second(7, "BTC_USDT", second).low < bid - 50)
    async with connected(client) as reader:
        await reader.login(client)
        await reader.subscribe(channel="orders")
        order = await client.order("BTC_USDT", "buy", type="limit", price=market.price_text(bid - 20), amount="0.001")
        assert (await reader.next())["order"] == order
        disk = threading.Event()
        held = served._store.submit(lambda _: disk.wait(5))
        clock.now_s = falls
        await until(lambda: any(b'"fill"' in message.text for _, message, _ in served._line))
        # Filled in memory, and neither in the queue of the connection nor sent.
        assert served._engine.open_orders[1] == {}
        assert not any(connection._queue for connection in served._connections)
        assert not held.done()
        disk.set()
        assert [(await reader.next())["type"] for _ in range(2)] == ["fill", "order"]


async def test_a_disk_that_hangs_ends_the_connections_before_the_memory(
    client: Client, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (served,) = [found for found in gc.get_objects() if isinstance(found, sockets.Sockets) and found._clock is clock]
    monkeypatch.setattr(sockets, "MOST_IN_LINE", 3)
    async with connected(client) as reader:
        for symbol in list(MARKETS)[:4]:
            await reader.subscribe(channel="ticker", symbol=symbol)
        disk = threading.Event()
        served._store.submit(lambda _: disk.wait(5))
        clock.now_s += 1
        assert await reader.read() == 1011
        disk.set()
    await until(lambda: not served._line)


# What is left behind


async def test_nothing_is_left_of_those_who_have_gone(client: Client, clock: Clock) -> None:
    (served,) = [found for found in gc.get_objects() if isinstance(found, sockets.Sockets) and found._clock is clock]
    port = int(client.base.rpartition(":")[2])
    async with connected(client) as one, connected(client) as two:
        for reader in (one, two):
            await reader.login(client)
            args = [BTC, {"channel": "orders"}, {"channel": "trades", "symbol": "ETH_USDT"}, {"channel": "ticker", "symbol": "ETH_USDT"}]
            assert (await reader.ask("subscribe", *args))["code"] == 0
        _, rude = await asyncio.open_connection("127.0.0.1", port)
        rude.write(b"GET /ws/v1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n")
        rude.write(b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
        await until(lambda: len(served._connections) == 3)
        assert (len(served._owners[1]), len(served._topics["ETH_USDT"]), served._addresses) == (2, 2, {"127.0.0.1": 3})
        rude.transport.abort()
        await until(lambda: len(served._connections) == 2)
        await one.ws.close()
    await until(lambda: not served._addresses)
    assert (served._connections, served._topics, served._owners, list(served._line)) == ({}, {}, {}, [])
    assert not [found for found in gc.get_objects() if isinstance(found, connection.Connection) and found.account == 1 and found.key]


async def test_a_stopping_exchange_says_goodbye(tmp_path: Path, clock: Clock) -> None:
    async with aiohttp.ClientSession() as session:
        async with exchange(tmp_path, clock) as client:
            ws = await session.ws_connect(f"{client.base}/ws/v1")
            reading = asyncio.create_task(ws.receive())
        async with asyncio.timeout(5):
            assert (await reading).data == 1001
        await ws.close()
