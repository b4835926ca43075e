"""Streams of a bridge over real NATS, HTTP and WebSockets: what a reader is told, and what a slow or a dead one costs."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import pytest
import pytest_asyncio

from bridge import push
from bridge.push import MOST_HEARD, WAITING, Waiting
from bus import market, server
from bus.listeners import listened
from tests import servers
from tests.servers import eventually
from tests.streams import TICKER, Rig, Slow, flushed, rigged, telling, text

pytestmark = pytest.mark.slow


@pytest_asyncio.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """For tests that use a symbol of their own each, and leave the feeder alive."""
    async with rigged(tmp_path_factory.mktemp("s")) as rig:
        yield rig


async def test_the_last_value_comes_first_and_then_every_new_one(shared: Rig) -> None:
    await shared.fresh(b'{"data":1}', "A_USDT")
    async with shared.dial("/stream/paper/ticker/A_USDT") as stream:
        assert await text(stream) == '{"data":1}'
        for value in range(2, 50):
            await shared.teller.tell(b'{"data":%d}' % value, "A_USDT")
            assert await text(stream) == f'{{"data":{value}}}'


@pytest.mark.parametrize(
    ("path", "symbol", "kind"),
    [
        ("/stream/paper/ticker/B_USDT.swap", "B_USDT.swap", "ticker"),
        ("/stream/paper/ticker/B%2FUSDT", "B/USDT", "ticker"),
        ("/stream/PAPER/ticker/b_usdt?token=x", "b_usdt", "ticker"),
        ("/stream/mine/ticker/%E5%B8%81_USDT", "币_USDT", "ticker"),
        ("/stream/paper/candles-15/B_USDT", "B_USDT", "candles-15"),
    ],
)
async def test_a_path_names_exchange_kind_and_symbol_as_a_host_does(shared: Rig, path: str, symbol: str, kind: str) -> None:
    async with shared.dial(path) as stream:
        await shared.teller.tell(b'{"data":"own"}', symbol, kind)
        assert await text(stream) == '{"data":"own"}'


@pytest.mark.parametrize(
    ("path", "status", "error"),
    [
        ("/stream/papper/ticker/X", 404, "no exchange named 'papper' here; did you mean paper?"),
        ("/stream/okx/ticker/X", 404, "no feeder tells ticker of 'okx'"),
        ("/stream/paper/depth/X", 404, "no feeder tells depth of 'paper'"),
        ("/stream/paper/balance/X", 404, "kind: expected one of"),
        ("/stream/paper/candles-0/X", 404, "kind: expected one of"),
        ("/stream/paper/ticker/", 404, "symbol: expected 1 to 64"),
        ("/stream/paper/ticker/A%20B", 404, "symbol: expected 1 to 64"),
        ("/stream/paper/ticker/" + "%E5%B8%81" * 60, 404, "a name must have 1 to 200 signs"),
        ("/stream/*/ticker/X", 404, "no exchange named"),
        ("/stream/paper/*/X", 404, "kind: expected one of"),
        ("/stream/paper/ticker/X/Y", 404, "expected /stream/<exchange>/<kind>/<symbol>"),
        ("/stream/paper/ticker", 404, "expected /stream/<exchange>/<kind>/<symbol>"),
        ("/stream", 404, "expected /stream/<exchange>/<kind>/<symbol>"),
        ("/stream/paper/ticker/X", 426, "open this address as a WebSocket, as Dial() does"),
    ],
)
async def test_what_is_wrong_with_a_request_is_told_in_plain_http(shared: Rig, path: str, status: int, error: str) -> None:
    async with shared.session.get(shared.address + path) as response:
        assert (response.status, response.content_type) == (status, "application/json")
        told = await response.json()
    assert list(told) == ["error"]
    assert told["error"].startswith(error)
    assert ("paper", "ticker", "X") not in shared.follower.entries  # who cannot listen wishes nothing
    if status == 404:
        with pytest.raises(aiohttp.WSServerHandshakeError) as raised:
            await shared.session.ws_connect(shared.address + path)
        assert raised.value.status == 404


async def test_a_withdrawal_and_a_value_that_nobody_proves_are_told_once_and_the_value_again(shared: Rig) -> None:
    await shared.fresh(b'{"data":1}', "C_USDT")
    path = "/stream/paper/ticker/C_USDT"
    async with shared.dial(path) as stream, shared.dial(path) as second:
        for one in (stream, second):
            assert await text(one) == '{"data":1}'
        await shared.teller.tell(market.withdrawal("gap"), "C_USDT", age_ms=market.WITHDRAWN)
        for one in (stream, second):
            assert await text(one) == '{"error":"stale: gap"}'
        await shared.teller.tell(b'{"data":2}', "C_USDT")
        assert await text(stream) == '{"data":2}'
        shared.teller.beating = False
        died_s = asyncio.get_running_loop().time()
        assert await text(stream) == push.UNPROVEN.decode()
        assert 1 < asyncio.get_running_loop().time() - died_s < market.BEAT_OLD_S + 1
        async with shared.dial(path) as late:
            with pytest.raises(TimeoutError):
                await text(late, 1)  # a value that is not fresh is not told, and nothing else is told twice
            shared.teller.beating = True
            assert [await text(late), await text(stream)] == ['{"data":2}', '{"data":2}']
        assert [await text(second) for _ in range(3)] == ['{"data":2}', push.UNPROVEN.decode(), '{"data":2}']
        await shared.teller.tell(b'{"data":3}', "C_USDT")
        assert [await text(stream), await text(second)] == ['{"data":3}', '{"data":3}']


async def test_a_value_that_is_proven_only_after_it_came_is_told_then(shared: Rig) -> None:
    """One of unknown age: the next beat that knows tells it."""
    await shared.fresh(b'{"data":1}', "D_USDT")
    async with shared.dial("/stream/paper/ticker/D_USDT") as stream:
        assert await text(stream) == '{"data":1}'
        await shared.teller.tell(b'{"data":2}', "D_USDT", age_ms=60_000)
        assert await text(stream) == push.UNPROVEN.decode()
        shared.teller.prove("D_USDT")
        assert await text(stream) == '{"data":2}'


async def test_a_value_that_is_proven_between_two_looks_is_told_as_well(shared: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await shared.fresh(b'{"data":1}', "DD_USDT")
    async with shared.dial("/stream/paper/ticker/DD_USDT") as stream:
        assert await text(stream) == '{"data":1}'
        monkeypatch.setattr(push, "CHECK_S", 1.5)
        await shared.teller.tell(b'{"data":2}', "DD_USDT", age_ms=60_000)
        shared.teller.prove("DD_USDT")
        told = await text(stream)
        assert (await text(stream) if told == push.UNPROVEN.decode() else told) == '{"data":2}'


async def test_a_reader_hears_that_there_is_nothing(shared: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "PATIENCE_S", 0.5)
    async with shared.dial("/stream/paper/ticker/NOTHING") as stream:
        assert await text(stream) == push.NOTHING.decode()
        await shared.teller.tell(b'{"data":1}', "NOTHING")
        assert await text(stream) == '{"data":1}'


async def test_a_slow_reader_loses_the_oldest_is_told_how_many_and_costs_others_nothing(shared: Rig) -> None:
    path, count, filling = "/stream/paper/ticker/E_USDT", 1500, "x" * 4000
    lost_before = shared.sample("fmzbus_stream_lost_total") or 0
    async with Slow.dial(shared.address, path) as slow, shared.dial(path) as quick:
        [at_slow] = shared.streams._readers["paper", "ticker", "E_USDT"] - {shared.reader(quick)}
        protocol = at_slow._request.protocol
        for value in range(count):
            await shared.teller.tell(b'{"data":[%d,"%b"]}' % (value, filling.encode()), "E_USDT")
            if value % 32 == 31 or value == count - 1:
                for expected in range(value - value % 32, value + 1):
                    assert msgspec.json.decode(await text(quick))["data"][0] == expected
                assert len(at_slow.waiting) <= WAITING
                assert protocol.transport is not None
                assert protocol.transport.get_write_buffer_size() <= push.BUFFER + 2 * 4096
        got: list[int] = []
        lost = 0
        while not got or got[-1] != count - 1:
            kind, content = await slow.frame()
            assert kind == aiohttp.WSMsgType.TEXT
            told = msgspec.json.decode(content)
            if "lost" in told:
                following_value = msgspec.json.decode((await slow.frame())[1])["data"][0]
                assert following_value == (got[-1] if got else -1) + told["lost"] + 1
                got.append(following_value)
                lost += told["lost"]
            else:
                assert told["data"][0] == (got[-1] if got else -1) + 1
                got.append(told["data"][0])
        assert lost + len(got) == count
        assert lost > 1000
        assert shared.sample("fmzbus_stream_lost_total") == lost_before + lost
        await shared.teller.tell(b'{"data":"after"}', "E_USDT")
        assert await slow.frame() == (1, b'{"data":"after"}')
        assert await text(quick) == '{"data":"after"}'


def test_what_waited_longer_than_it_counts_as_fresh_is_lost_but_never_the_newest() -> None:
    now_s, lost = [0.0], [0]

    def lose() -> None:
        lost[0] += 1

    waiting = Waiting(5.0, lose, lambda: now_s[0])
    for content in (b"1", b"2", b"3"):
        waiting.put(content)
    now_s[0] = 5.1
    assert waiting.take() == [b'{"lost":2}', b"3"]
    waiting.put(b"4")
    now_s[0] = 10.2
    waiting.put(b"5")
    now_s[0] = 15.1
    waiting.put(b"6")
    assert [waiting.take(), waiting.take(), len(waiting)] == [[b'{"lost":1}', b"5"], [b"6"], 0]
    assert lost == [3]


def test_the_oldest_of_more_than_64_is_lost() -> None:
    lost: list[None] = []
    waiting = Waiting(5.0, lambda: lost.append(None), lambda: 0.0)
    for value in range(WAITING + 3):
        waiting.put(b"%d" % value)
    assert (len(waiting), len(lost)) == (WAITING, 3)
    assert waiting.take() == [b'{"lost":3}', b"3"]
    assert waiting.take() == [b"4"]


async def test_frames_of_a_reader_are_ignored_pings_answered_and_a_long_one_ends_the_stream(shared: Rig) -> None:
    await shared.fresh(b'{"data":1}', "F_USDT")
    path = "/stream/paper/ticker/F_USDT"
    async with Slow.dial(shared.address, path) as reader:
        assert await reader.frame() == (1, b'{"data":1}')
        for kind, content in ((1, b'{"data":"evil"}'), (2, b"\xff"), (1, b"z" * (MOST_HEARD - 1)), (10, b"pong unasked")):
            reader.send(kind, content)
        reader.send(9, b"hello")
        assert await reader.frame() == (10, b"hello")
        await shared.teller.tell(b'{"data":2}', "F_USDT")
        assert await reader.frame() == (1, b'{"data":2}')
        reader.send(1, b"z" * (MOST_HEARD + 1))
        kind, content = await reader.frame()
        assert (kind, content[:2]) == (8, (1009).to_bytes(2, "big"))
    async with Slow.dial(shared.address, path) as reader:
        assert await reader.frame() == (1, b'{"data":2}')
        reader.send(8, (1000).to_bytes(2, "big"))
        assert (await reader.frame())[0] == 8
    await eventually(lambda: ("paper", "ticker", "F_USDT") not in shared.streams._readers)


async def test_readers_that_vanish_or_never_answer_a_ping_are_let_go(shared: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await eventually(lambda: shared.sample("fmzbus_streams") == 0)
    monkeypatch.setattr(push, "HEARTBEAT_S", 0.4)
    path = "/stream/paper/ticker/G_USDT"
    async with Slow.dial(shared.address, path) as vanishes, Slow.dial(shared.address, path) as silent, shared.dial(path) as alive:
        await eventually(lambda: shared.sample("fmzbus_streams") == 3)
        answering = asyncio.ensure_future(alive.receive())  # which answers pings meanwhile
        vanishes.writer.transport.abort()
        assert (await silent.frame())[0] == 9
        await eventually(lambda: shared.streams.open == 1)
        await shared.teller.tell(b'{"data":1}', "G_USDT")
        assert (await answering).data == '{"data":1}'
    await eventually(lambda: shared.streams.open == 0)


async def test_a_full_bridge_refuses_one_more_and_takes_it_when_one_has_gone(shared: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await eventually(lambda: shared.streams.open == 0)
    monkeypatch.setattr(push, "MOST", 2)
    async with shared.dial():
        async with shared.dial(), shared.session.get(shared.address + TICKER) as response:
            assert (response.status, await response.json()) == (503, {"error": "network busy: 2 streams are open already"})
        await eventually(lambda: shared.streams.open == 1)
        async with shared.dial():
            pass


async def test_a_wish_lives_as_long_as_its_reader(state: Path) -> None:
    async with rigged(state, unused_s=1.0) as rig:
        key = ("paper", "ticker", "BTC_USDT")
        async with rig.dial() as stream:
            with pytest.raises(TimeoutError):
                await text(stream, 2.5)  # two and a half times as long as what is unused is kept
            assert key in rig.follower.entries
            await rig.follower.leave(key)  # as after a minute in which the process was stopped
            await eventually(lambda: key in rig.follower.entries)
            await flushed(rig.follower._bus.nc)
            await rig.teller.tell(b'{"data":1}')
            assert await text(stream) == '{"data":1}'
        await eventually(lambda: key not in rig.follower.entries)


async def test_a_value_that_grows_old_is_told_to_be_stale(state: Path) -> None:
    async with rigged(state, dict.fromkeys(market.KINDS, 1.0)) as rig:
        await rig.fresh(b'{"data":1}')
        async with rig.dial() as stream:
            assert await text(stream) == '{"data":1}'
            rig.teller.prove("BTC_USDT", age_ms=10_000)
            assert await text(stream, 2) == push.UNPROVEN.decode()


async def test_a_bridge_that_stops_ends_every_stream_with_1001_also_one_that_does_not_read(state: Path) -> None:
    async with rigged(state) as rig:
        await rig.fresh(b'{"data":1}')
        async with rig.dial() as stream, Slow.dial(rig.address, TICKER) as slow:
            assert await text(stream) == '{"data":1}'
            for value in range(300):
                await rig.teller.tell(b'{"data":[%d,"%b"]}' % (value, b"x" * 4000))
                assert f"[{value}," in await text(stream)
            began_s = asyncio.get_running_loop().time()
            stopping = asyncio.ensure_future(rig.streams.close_all())
            message = await stream.receive(2)
            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1001)
            await stopping
            assert asyncio.get_running_loop().time() - began_s < push.CLOSE_S + 1
            await eventually(lambda: rig.streams.open == 0, 2)
            async with rig.session.get(rig.address + TICKER) as response:
                assert (response.status, await response.json()) == (503, {"error": "network busy: the bridge is stopping"})
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while await slow.frame(3):  # until the connection has ended; a TimeoutError where it only fell silent
                    pass


@pytest.mark.parametrize("last", [b"", b"\x88\x82\0\0\0\0\x03\xe8", b"\x83\x80\0\0\0\0"], ids=["pings", "close", "nonsense"])
async def test_a_reader_that_sends_and_never_reads_costs_little_and_is_cut_off(
    shared: Rig, monkeypatch: pytest.MonkeyPatch, last: bytes
) -> None:
    """It asks for pongs without end, so that no heartbeat finds it dead; or ends the stream, and does not take what was sent before."""
    monkeypatch.setattr(push, "STUCK_S", 1.0)
    monkeypatch.setattr(push, "CLOSE_S", 0.5)
    async with Slow.dial(shared.address, "/stream/paper/ticker/H_USDT") as slow:
        [reader] = shared.streams._readers["paper", "ticker", "H_USDT"]
        protocol = reader._request.protocol
        if not last:
            for _ in range(10_000):
                slow.send(9, b"p" * 125)
        else:
            await shared.teller.tell(b'{"data":"%b"}' % (b"x" * 500_000), "H_USDT")
        await eventually(lambda: protocol.writing_paused)
        assert protocol.transport is not None
        assert protocol.transport.get_write_buffer_size() < (500_000 if last else push.BUFFER + 4096)
        slow.writer.write(last)
        await eventually(lambda: ("paper", "ticker", "H_USDT") not in shared.streams._readers)
        await eventually(lambda: protocol.transport is None)


async def test_a_real_bridge_streams_bounds_what_twenty_slow_readers_cost_and_says_good_bye(state: Path) -> None:
    """Twenty that do not read would keep 80 MB, each its own 4 MB, if nothing bounded them."""
    async with servers.nats(state), telling(state) as teller, servers.bridge(state, routes__mine="paper") as (bridge, address):
        path = "/stream/mine/ticker/BTC_USDT"
        async with aiohttp.ClientSession() as session, contextlib.AsyncExitStack() as stack:
            quick = await stack.enter_async_context(session.ws_connect(address + path))
            slow = [await stack.enter_async_context(Slow.dial(address, path)) for _ in range(20)]

            async def pass_on(first: int, last: int) -> None:
                for value in range(first, last):
                    await teller.tell(b'{"data":[%d,"%b"]}' % (value, b"x" * 4000))
                    if value % 32 == 31:
                        while f"[{value}," not in await text(quick):
                            pass

            async with asyncio.timeout(5):
                while ("paper", "ticker", "BTC_USDT") not in await listened([server.monitor(state)]):
                    pass
            await pass_on(0, 160)  # by then whatever a process needs once is there
            before = memory_kb(bridge.process.pid)
            await pass_on(160, 1184)
            assert memory_kb(bridge.process.pid) - before < 20_000
            kind, _ = await slow[0].frame()
            assert kind == aiohttp.WSMsgType.TEXT
            bridge.send(signal.SIGTERM)
            while (message := await quick.receive(5)).type is aiohttp.WSMsgType.TEXT:
                pass
            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1001)
            assert await asyncio.wait_for(bridge.process.wait(), 10) == 0
        assert "Traceback" not in bridge.output


def memory_kb(pid: int) -> int:
    """What of a process lies in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4
