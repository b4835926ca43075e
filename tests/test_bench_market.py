"""The bench of market data tells the truth: about an exchange that knows better, about delays that are known, and by its arithmetic."""

import asyncio
import itertools
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web

from bus import server, subjects
from bus.config import Venue
from bus.connection import connected
from tests import servers
from tests.bench.exchange import LEVELS, Channel, Told
from tests.bench.load import Report
from tests.bench.market import Cached, Overload, Taken, answered, burst, cached_figures, newest_after, overload_figures
from tests.bench.measure import Round, Side, ask, cpu_seconds, neighbours, output_of
from tests.bench.rig import rigged, symbols
from tests.bench.soak import Window, judged
from tests.bench.stand import Stand
from tests.bench.watch import Delays, poll, question, sent_ns
from workers.book import Book
from workers.updates import BookDelta, BookSnapshot, Quote
from workers.updates import Channel as Subscribed

pytestmark = pytest.mark.slow

ORDER: list[Channel] = [("ticker", "S0000_USDT"), ("depth", "S0000_USDT"), ("ticker", "S0001_USDT")]


@asynccontextmanager
async def exchange() -> AsyncIterator[str]:
    async with servers.running(sys.executable, "-m", "tests.bench.exchange") as one:
        yield (await one.said(r"(?m)^ready (\S+)"))[1]


async def read(session: aiohttp.ClientSession, url: str) -> bytes:
    async with session.get(url) as response:
        return await response.read()


async def test_the_stand_in_exchange_sends_what_it_says_in_turn_and_on_schedule() -> None:
    async with exchange() as url, aiohttp.ClientSession() as session:
        stand = Stand("stand", Venue(base_url=url))
        got: dict[Channel, list[int]] = {channel: [] for channel in ORDER}
        turns: list[Channel] = []
        book = Book()
        async with session.ws_connect(stand.socket_url(), decode_text=False) as socket:
            for frame in stand.subscribe([Subscribed(*channel) for channel in ORDER], LEVELS):
                await socket.send_str(frame)
            for _ in ORDER:
                [update] = stand.parse((await socket.receive()).data)
                if isinstance(update, BookSnapshot):
                    book.snapshot(update.bids, update.asks, update.sequence)
            began_s = time.monotonic()
            await read(session, f"{url}/flow?rate=300")
            while len(turns) < 150:
                [update] = stand.parse((await socket.receive()).data)
                channel = (update.channel.kind, update.channel.instrument)
                turns.append(channel)
                match update:
                    case Quote(ticker=ticker):
                        got[channel].append(int(ticker.vol))
                    case BookDelta():
                        book.apply(update.bids, update.asks, previous=update.previous, sequence=update.sequence)
                        got[channel].append(int(book.top(1)[0][0][1]))
            took_s = time.monotonic() - began_s
            await read(session, f"{url}/flow?rate=0")
            told = msgspec.json.decode(await read(session, f"{url}/told"), type=Told)
            whole = await read(session, f"{url}/depth?symbol=S0000_USDT")
    assert told.order == ORDER
    assert turns == [ORDER[number % 3] for number in range(150)]
    sent = [got[channel][number] for number in range(50) for channel in ORDER]
    assert sent == sorted(sent)
    assert len(set(sent)) == 150
    assert (told.late, told.unsent, told.asked) == (0, 0, 0)
    assert told.sent >= 150
    assert took_s >= 0.45  # 150 of 300 a second
    [snapshot] = stand.parse(whole)
    assert isinstance(snapshot, BookSnapshot)
    assert snapshot.asks[0][1] == told.last["depth.S0000_USDT"]
    assert (len(snapshot.asks), len(snapshot.bids)) == (LEVELS, LEVELS)


LATE_S, EACH_S = 0.03, 0.01


async def test_a_poller_times_every_update_from_its_sending() -> None:
    """Against a server that shows a value LATE_S after it was sent, one of another channel every EACH_S."""
    began_ns = time.monotonic_ns()
    each_ns = int(EACH_S * 1e9)

    async def handle(request: web.BaseRequest) -> web.Response:
        asked = msgspec.json.decode(await request.read())
        turn = ORDER.index((asked["method"], asked["params"]["symbol"]))
        shown = (time.monotonic_ns() - began_ns - int(LATE_S * 1e9)) // each_ns  # the newest that is shown, of any channel
        newest = began_ns + (shown - (shown - turn) % 3) * each_ns
        field = b'"vol":' if asked["method"] == "ticker" else b'"asks":[[1000,'
        return web.Response(body=b'{"data":{%b%d}}' % (field, newest))

    listener = await asyncio.get_running_loop().create_server(web.Server(handle, access_log=None), "127.0.0.1", 0)
    address = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/stand"
    found = await poll(address, ORDER, seconds=0.6, warm_up_s=0.1)
    listener.close()
    assert 55 <= found.count <= 61
    assert found.asked >= found.count
    assert LATE_S * 1000 <= found.p50_ms < LATE_S * 1000 + 5
    assert found.p50_ms <= found.p99_ms <= found.max_ms


async def test_a_poller_that_is_told_an_error_says_so() -> None:
    async def handle(request: web.BaseRequest) -> web.Response:
        await request.read()
        return web.Response(body=b'{"error":"busy"}')

    listener = await asyncio.get_running_loop().create_server(web.Server(handle, access_log=None), "127.0.0.1", 0)
    address = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/stand"
    with pytest.raises(ValueError, match=r'200 .*"error":"busy"'):
        await poll(address, ORDER, seconds=5)
    listener.close()


async def test_a_listener_times_what_it_hears(tmp_path: Path) -> None:
    async with servers.nats(tmp_path), connected(server.url(tmp_path, "operator"), "operator", closed=lambda: None) as bus:
        what = (server.url(tmp_path, "reader"), "feed.stand.>", "--seconds", "1.5")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bench.watch", "listen", *what), stdout=asyncio.subprocess.PIPE
        )
        reading = asyncio.ensure_future(process.communicate())
        sent = 0
        while not reading.done():
            await bus.nc.publish(
                subjects.feed("stand", "ticker", "S0000_USDT"), b'{"data":{"vol":%d}}' % (time.monotonic_ns() - 50_000_000)
            )
            sent += 1
            await asyncio.wait((reading,), timeout=0.02)
        found = msgspec.json.decode((await reading)[0], type=Delays)
    assert 0 < found.count <= sent
    assert 50 <= found.p50_ms < 60


async def test_the_constant_reference_answers_the_same_bytes_to_all() -> None:
    content = b'{"data":{"vol":1}}'
    async with servers.running(sys.executable, "-m", "tests.bench.reference", "constant", "--reply", content.decode()) as bare:
        assert await ask((await bare.said(r"(?m)^ready (\S+)"))[1], question("ticker", "S0000_USDT")) == content


async def test_two_sides_are_measured_in_turns_by_one_load_generator() -> None:
    asked: list[str] = []

    async def handle(request: web.BaseRequest) -> web.Response:
        await request.read()
        asked.append(request.path)
        return web.Response(body=b'{"data":1}')

    listener = await asyncio.get_running_loop().create_server(web.Server(handle, access_log=None), "127.0.0.1", 0)
    address = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    sides = [Side(name, f"{address}/{name}", {"http": os.getpid()}) for name in ("ours", "reference")]
    what = (*(msgspec.json.encode(side).decode() for side in sides), "--connections", "2", "--rounds", "3", "--seconds", "0.1")
    found = msgspec.json.decode(await output_of("tests.bench.pairs", *what), type=list[Round])
    listener.close()
    assert [one.side for one in found] == ["ours", "reference", "reference", "ours", "ours", "reference"]
    assert [path for path, _ in itertools.groupby(asked)] == ["/ours", "/reference", "/ours", "/reference"]
    assert sum(one.report.sent for one in found) == len(asked)
    assert len(neighbours(found)) == 3
    assert all(0 < one.cpu_s["http"] * one.report.sent / 10_000 <= one.elapsed_s * 1.1 for one in found)


def test_the_cpu_time_of_a_process_is_what_it_says_itself() -> None:
    before, own = cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() < own + 0.05:
        pass
    after, own_after = cpu_seconds(os.getpid()), time.process_time()
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(own_after - own, abs=0.005)
    assert cpu_seconds(2**22 + 1) is None  # above any pid that Linux gives


async def test_market_data_flow_through_the_whole_system_and_a_burst_leaves_the_newest(tmp_path: Path) -> None:
    channels = [(kind, symbol) for symbol in symbols(5) for kind in ("ticker", "depth")]
    async with rigged(tmp_path) as rig:
        await rig.flow(200)
        await rig.cached(channels)
        before = await answered(rig, "ticker")
        answers = [await rig.ask(("ticker", symbol)) for symbol in symbols(5)]
        after = await answered(rig, "ticker")
        told = await rig.told()
        ended = asyncio.Event()
        newest = asyncio.create_task(newest_after(rig, channels, ended))
        found = await burst(rig, 2000, 0.5, ended)
        newest_s = await newest
    assert (after[0] - before[0], after[1] - before[1]) == (5, 0)
    assert [answer.result for answer in answers] == ["hit"] * 5
    assert all(0 < time.monotonic_ns() - sent_ns(answer.content) < 30e9 for answer in answers)
    assert sorted(told.order) == sorted(channels)
    assert found.sent == found.read
    assert found.sent == pytest.approx(1000, rel=0.5)
    assert found.told + found.conflated == found.sent
    assert newest_s < 5


# ---------------------------------------------------------------- arithmetic


def cached_round(side: str, connections: int, *, rate: float, p50_ms: float, cpu_s: float) -> Round:
    report = Report(
        connections=connections,
        seconds=1,
        sent=5000,
        requests=5000,
        errors=0,
        rate=rate,
        p50_ms=p50_ms,
        p90_ms=p50_ms,
        p99_ms=p50_ms,
        max_ms=p50_ms,
    )
    return Round(side=side, report=report, cpu_s={"http": cpu_s}, elapsed_s=2.0)


def test_the_figures_are_ratios_of_neighbours() -> None:
    rounds = [
        cached_round(side, connections, rate=rate, p50_ms=p50_ms, cpu_s=cpu_s)
        for connections in (64, 1)
        for side, rate, p50_ms, cpu_s in (("ours", 900, 1.2, 1.6), ("reference", 1000, 1.0, 1.0))
    ]
    figures = {one.name: one for one in cached_figures(Cached("ticker", rounds, 0.9995))}
    whole = figures["cached ticker, 1 connection: CPU bridge, with the updates"]
    assert (whole.ours, whole.ratio, whole.ok) == (1.6, 1.6, False)
    assert (figures["cached ticker, 1 connection: rate"].ratio, figures["cached ticker, 1 connection: rate"].ok) == (0.9, True)
    assert figures["cached ticker, 1 connection: p50"].ok is False
    assert figures["cached ticker: part from the cache"].ok is True


def test_what_an_overload_lost_is_what_was_neither_told_nor_counted() -> None:
    burst_of = Taken(sent=30_000, rate=9990.0, read=30_000, told=20_000, conflated=9_990, settled_s=0.1, memory_mb=60)
    found = overload_figures(Overload(tries=[], takes=3330.0, burst=burst_of, newest_s=1.2, before_mb=58))
    lost, newest, growth = found[-3:]
    assert (lost.ours, lost.ok) == (10, False)
    assert (newest.ours, newest.ok) == (1.2, False)
    assert (growth.ours, growth.ok) == (2, True)


def window(at_s: float, **fields: object) -> Window:
    usual = Window(at_s=at_s, delay_ms=1.0, p99_ms=5.0, memory_mb={"bridge": 50.0, "feeder": 60.0}, asked=2000, missed=0)
    return msgspec.structs.replace(usual, **fields)


def test_a_soak_sees_what_grows() -> None:
    times = [10.0 * number for number in range(1, 61)]
    assert judged([window(at_s) for at_s in times]) == []
    assert judged([window(at_s, delay_ms=9.0 if at_s <= 60 else 1.0) for at_s in times]) == []  # the first minute is not judged
    grown = [window(at_s, delay_ms=1 + at_s / 200, memory_mb={"bridge": 50 + at_s / 60, "feeder": 60.0}) for at_s in times]
    assert judged(grown) == ["the median delay grew from 1.48 to 3.88 ms", "bridge grew from 51.6 to 59.6 MB"]
    assert judged([window(at_s, missed=3) for at_s in times]) == ["180 of 120000 answers did not come from the cache"]
    assert judged([window(at_s, delay_ms=at_s**2 / 10) for at_s in times[:3]]) == ["the median delay grew from 40.00 to 90.00 ms"]
