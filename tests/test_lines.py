"""What is followed over the sockets of one exchange, how it is asked for, and when it was true: against a real WebSocket server."""

import asyncio
import contextlib
import json
import random
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import pytest
import uvloop

from bus import market
from tests import paper
from tests.servers import eventually
from tests.tiny import BOOK, A, B, C, Exchange, Heard, Tiny, elsewhere, reading, served, tiny, within
from workers import lines
from workers.updates import BookSnapshot, Channel, Quote, Refused, Tape, Update
from workers.venues.paper import feed as paper_feed

pytestmark = pytest.mark.slow

# Following


async def test_updates_are_heard_in_the_order_in_which_they_were_sent() -> None:
    async with served(Exchange(hello=500)) as exchange, reading(Tiny(exchange.url)) as heard:
        heard.lines.follow(A)
        heard.lines.follow(B)
        heard.lines.follow(A)
        await eventually(lambda: len(heard.updates) == 1000)
        assert heard.of(A) == heard.of(B) == list(range(1, 501))
        assert exchange.asked[0][2] == {"ask": ["A", "B"], "levels": 20}
        assert (heard.lines.connections, heard.lines.live, heard.lost) == (1, True, [])
        assert heard.registry.get_sample_value("fmzbus_feed_frames_total", {"exchange": "tiny"}) == 1000


async def test_250_channels_go_over_three_connections_with_one_frame_each() -> None:
    channels = [Channel("ticker", f"M{i}") for i in range(250)]
    async with served(Exchange(hello=1)) as exchange, reading(Tiny(exchange.url)) as heard:
        for channel in channels:
            heard.lines.follow(channel)
        assert not heard.lines.live
        await eventually(lambda: len(heard.updates) == 250)
        assert sorted(len(names) for _, names in exchange.rows("ask")) == [50, 100, 100]
        assert {name for _, names in exchange.rows("ask") for name in names} == {channel.instrument for channel in channels}
        assert (heard.lines.connections, heard.lines.live, heard.connects("open")) == (3, True, 3)


async def test_what_was_left_is_not_heard_and_the_last_one_closes_the_connection() -> None:
    async with served(Exchange(hello=1)) as exchange, reading(Tiny(exchange.url)) as heard:
        heard.lines.follow(A)
        heard.lines.follow(B)
        await eventually(lambda: len(heard.updates) == 2)
        heard.lines.leave(A)
        heard.lines.leave(A)
        ws = exchange.where["A"]
        await ws.send_str(json.dumps({"of": "A", "n": 7}))
        await exchange.tell("B", 8)
        await eventually(lambda: heard.of(B) == [1, 8])
        await eventually(lambda: exchange.rows("drop") == [(0, ["A"])])
        assert heard.of(A) == [1]
        heard.lines.leave(B)
        await eventually(lambda: ws.closed)
        assert ws.close_code == aiohttp.WSCloseCode.OK
        assert (heard.lines.connections, heard.lost) == (0, [])
        heard.lines.follow(C)
        await eventually(lambda: heard.of(C) == [1])


async def test_what_is_left_and_followed_at_once_is_asked_for_anew() -> None:
    async with served(Exchange(hello=1)) as exchange, reading(Tiny(exchange.url)) as heard:
        heard.lines.follow(A)
        heard.lines.follow(B)
        await eventually(lambda: len(heard.updates) == 2)
        heard.lines.leave(A)
        heard.lines.follow(A)
        await eventually(lambda: heard.of(A) == [1, 1])
        assert [list(row) for _, _, row in exchange.asked] == [["ask", "levels"], ["drop"], ["ask", "levels"]]


async def test_a_place_that_became_free_is_taken_without_exceeding_what_a_socket_may_have() -> None:
    async with served(Exchange(hello=1)) as exchange, reading(tiny(exchange.url, per_socket=2)) as heard:
        for channel in (A, B):
            heard.lines.follow(channel)
        await eventually(lambda: len(heard.updates) == 2)
        heard.lines.leave(A)
        heard.lines.follow(C)
        await eventually(lambda: heard.of(C) == [1])
        assert [row for _, _, row in exchange.asked[1:]] == [{"drop": ["A"]}, {"ask": ["C"], "levels": 20}]
        assert len(exchange.sockets) == 1


async def test_a_refused_channel_is_told_and_not_asked_for_again_not_even_after_a_loss() -> None:
    async with served(Exchange()) as exchange, reading(Tiny(exchange.url)) as heard:
        heard.lines.follow(A)
        heard.lines.follow(B)
        await eventually(lambda: "B" in exchange.where)
        await exchange.tell("A", 0, no="unknown symbol")
        await eventually(lambda: heard.of(A) == ["unknown symbol"])
        await exchange.sockets[0].close()
        await eventually(lambda: len(exchange.asked) == 2)
        assert exchange.rows("ask")[1] == (1, ["B"])
        heard.lines.leave(A)
        heard.lines.follow(C)
        await eventually(lambda: exchange.rows("ask")[2:] == [(1, ["C"])])
        assert exchange.rows("drop") == []


# Again


async def test_again_unsubscribes_and_subscribes_at_once_and_then_ever_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    async with served(Exchange(hello=1)) as exchange, reading(Tiny(exchange.url)) as heard:
        heard.lines.follow(A)
        for times in range(1, 5):
            await eventually(lambda times=times: len(heard.updates) == times)  # type: ignore[misc]
            heard.lines.again(A, "gap")
            heard.lines.again(A, "gap")  # it waits already
        await eventually(lambda: len(heard.updates) == 5)
        dropped = [moment for moment, _, row in exchange.asked if "drop" in row]
        asked = [moment for moment, _, row in exchange.asked if "ask" in row][1:]
        waits = [after - before for before, after in zip(dropped, asked, strict=True)]
        assert within(waits, (0, 0.25, 0.5, 1.0))
        assert (heard.of(A), len(exchange.sockets), heard.lost) == ([1] * 5, 1, [])


async def test_again_begins_without_delay_after_a_time_of_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "PEACE_S", 0.0)
    monkeypatch.setattr(lines, "AGAIN_S", 60.0)
    async with served(Exchange(hello=1)) as exchange, reading(Tiny(exchange.url)) as heard:
        heard.lines.follow(A)
        for times in range(1, 5):
            await eventually(lambda times=times: len(heard.updates) == times)  # type: ignore[misc]
            heard.lines.again(A, "gap")
        await eventually(lambda: len(heard.updates) == 5)


async def test_while_a_channel_waits_to_be_asked_for_anew_nothing_of_it_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "AGAIN_S", 60.0)
    async with served(Exchange(hello=1)) as exchange, reading(Tiny(exchange.url)) as heard:
        heard.lines.follow(A)
        heard.lines.follow(B)
        ws = None
        for times in range(1, 3):
            await eventually(lambda times=times: len(heard.of(A)) == times)  # type: ignore[misc]
            ws = exchange.where["A"]
            heard.lines.again(A, "gap")
        assert ws is not None
        await ws.send_str(json.dumps({"of": "A", "n": 7}))
        await exchange.tell("B", 8)
        await eventually(lambda: heard.of(B) == [1, 8])
        assert heard.of(A) == [1, 1]


async def test_deltas_of_the_subscription_before_are_not_heard() -> None:
    """They are on their way when the gap is noticed, and would only be taken for the next gap."""
    async with served(Exchange()) as exchange, reading(Tiny(exchange.url)) as heard:
        heard.lines.follow(BOOK)
        await eventually(lambda: "BOOK" in exchange.where)
        await exchange.tell("BOOK", 1, whole=True)
        await exchange.tell("BOOK", 2)
        await exchange.tell("BOOK", 4)
        await eventually(lambda: heard.of(BOOK) == [1, 2, 4])
        heard.lines.again(BOOK, "gap")
        await eventually(lambda: len(exchange.rows("ask")) == 2)
        await exchange.tell("BOOK", 5)
        await exchange.tell("BOOK", 6, whole=True)
        await exchange.tell("BOOK", 7)
        await eventually(lambda: heard.of(BOOK)[-1] == 7)
        assert heard.of(BOOK) == [1, 2, 4, 6, 7]


# Requests


def test_delays_grow_to_their_most_and_no_two_are_alike() -> None:
    assert lines.pause_s(0, 0.1, 5.0) == 0
    for tries, most_s in [(1, 0.1), (2, 0.2), (6, 3.2), (7, 5.0), (10_000, 5.0)]:
        delays = [lines.pause_s(tries, 0.1, 5.0) for _ in range(100)]
        assert most_s / 2 <= min(delays) < max(delays) <= most_s
        assert len(set(delays)) > 50


async def test_requests_keep_to_the_pace_and_what_is_wanted_meanwhile_goes_into_one_frame() -> None:
    async with served(Exchange(hello=1)) as exchange, reading(tiny(exchange.url, requests_per_s=5)) as heard:
        for i in range(30):
            heard.lines.follow(Channel("ticker", f"M{i}"))
            await asyncio.sleep(0.02)
        await eventually(lambda: len(heard.updates) == 30)
        asked = exchange.rows("ask")
        assert [len(names) for _, names in asked] == [1, 1, 1, 1, 26]  # and a ping
        assert exchange.asked[-1][0] - exchange.asked[0][0] >= 1


async def test_an_exchange_that_wants_to_hear_something_hears_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "KEEPALIVE_S", 0.2)
    async with served(Exchange()) as exchange, reading(tiny(exchange.url, keepalive='{"op": "ping"}')) as heard:
        heard.lines.follow(A)
        await eventually(lambda: len(exchange.asked) == 4)
        assert [row for _, _, row in exchange.asked[1:]] == [{"op": "ping"}] * 3
        moments = [moment for moment, _, _ in exchange.asked]
        assert within([moments[3] - moments[0]], [0.6])


# When it was true


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("rate", [50, 20_000])
def test_what_lay_in_the_socket_while_the_loop_stood_still_is_not_taken_for_new(run: Any, rate: int) -> None:
    """Undated frames of a server in another thread, each with the moment at which it was sent as its number (in us)."""
    urls: list[str] = []
    end = threading.Event()

    async def send() -> None:
        exchange = Exchange()
        async with served(exchange):
            urls.append(exchange.url)
            while not end.is_set():
                if "A" in exchange.where and not exchange.where["A"].closed:
                    with contextlib.suppress(ConnectionError):
                        for _ in range(max(1, rate // 200)):
                            await exchange.tell("A", int(time.monotonic() * 1e6), pad="x" * 200)
                await asyncio.sleep(max(1 / rate, 0.005))

    async def read() -> Heard:
        await eventually(lambda: urls)
        async with reading(Tiny(urls[0])) as heard:
            heard.lines.follow(A)
            await eventually(lambda: heard.updates and proven(heard) > time.monotonic() - 1.5)
            before = len(heard.updates)
            time.sleep(1.5)  # noqa: ASYNC251 - the loop stands still, as in a stopped process
            resumed_s = time.monotonic()
            await eventually(lambda: len(heard.updates) > before)
            assert proven(heard, before) < resumed_s - 1.4
            await eventually(lambda: proven(heard) > resumed_s)  # and it recovers
        return heard

    def proven(heard: Heard, number: int = -1) -> float:
        return heard.updates[number][1]

    with elsewhere(send):
        try:
            heard = run(read())
        finally:
            end.set()
    sent = [(update.sequence, proven_s) for update, proven_s in heard.updates if isinstance(update, BookSnapshot)]
    assert len(sent) > 50
    assert all(proven_s <= (sequence or 0) / 1e6 + 1e-6 for sequence, proven_s in sent)
    assert heard.lost == []


async def test_a_dated_frame_is_proven_by_its_date_and_lateness_shows() -> None:
    async with served(Exchange()) as exchange, reading(Tiny(exchange.url)) as heard:
        heard.lines.follow(A)
        await eventually(lambda: "A" in exchange.where)
        now_s = market.clock()
        heard.lines._lag.calibrate(int(time.time() * 1000), now_s, now_s)
        for n, late_s in enumerate((0.0, 2.0, 0.0), 1):
            await exchange.tell("A", n, at=int((time.time() - late_s) * 1000))
        await eventually(lambda: len(heard.updates) == 3)
        moments = [proven_s for _, proven_s in heard.updates]
        assert moments[1] - moments[0] == pytest.approx(-2.0, abs=0.05)
        assert moments[2] - moments[0] == pytest.approx(0.0, abs=0.05)
        assert heard.registry.get_sample_value("fmzbus_feed_lag_seconds_sum", {"exchange": "tiny"}) == pytest.approx(2.0, abs=0.05)


async def test_as_long_as_the_exchanges_clock_is_not_known_a_date_proves_nothing() -> None:
    async with served(Exchange()) as exchange, reading(Tiny(exchange.url)) as heard:
        heard.lines.follow(A)
        await eventually(lambda: "A" in exchange.where)
        before_s = market.clock()
        await exchange.tell("A", 1, at=int((time.time() + 100) * 1000))
        await eventually(lambda: heard.updates)
        ((_, proven_s),) = heard.updates
        assert proven_s <= before_s  # by the newest ping that was answered before it


async def test_others_have_their_turn_while_frames_come_faster_than_they_are_read() -> None:
    """Three flooded connections, and hearing a frame takes 1 ms: without turns a buffer of some hundred frames would be read at once."""
    exchange = Exchange()
    urls: list[str] = []
    end = threading.Event()

    async def flood() -> None:
        async with served(exchange):
            urls.append(exchange.url)
            while not end.is_set():
                for name in list(exchange.where):
                    with contextlib.suppress(ConnectionError, TimeoutError):
                        async with asyncio.timeout(0.05):
                            for n in range(50):
                                await exchange.tell(name, n)
                await asyncio.sleep(0.001)
            for ws in exchange.sockets:
                if ws._writer is not None:
                    ws._writer.transport.abort()  # it is full: nobody would read a close

    def busy(_: Update) -> None:
        until_s = time.perf_counter() + 0.001
        while time.perf_counter() < until_s:
            pass

    with elsewhere(flood):
        try:
            await eventually(lambda: urls)
            async with reading(tiny(urls[0], per_socket=1), hearing=busy) as heard:
                for channel in (A, B, C):
                    heard.lines.follow(channel)
                await eventually(lambda: len(heard.updates) > 100)
                gaps, last_s = [], time.monotonic()
                for _ in range(50):
                    await asyncio.sleep(0)
                    gaps.append(time.monotonic() - last_s)
                    last_s = time.monotonic()
                shares = {channel.instrument: len(heard.of(channel)) for channel in (A, B, C)}
                assert statistics.median(gaps) < 0.1  # not the most: other processes want the processor too
                assert min(shares.values()) > sum(shares.values()) / 10
        finally:
            end.set()


# The paper exchange


class Paper(Tiny):
    """Its client's feed, without the client."""

    def subscribe(self, channels: Sequence[Channel], levels: int) -> list[str]:
        return paper_feed.subscribe(channels, levels)

    def unsubscribe(self, channels: Sequence[Channel], levels: int) -> list[str]:
        return paper_feed.unsubscribe(channels, levels)

    def parse(self, frame: bytes) -> Sequence[Update]:
        return paper_feed.parse(frame)


async def test_the_paper_exchange_is_read(client: paper.Client) -> None:
    kinds = [paper_feed.channel(kind, "BTC_USDT", 0) for kind in ("ticker", "depth", "trades")]
    unknown = paper_feed.channel("ticker", "NO_SUCH", 0)
    async with reading(Paper(paper_feed.socket_url(client.base))) as heard:
        for channel in (*kinds, unknown):
            heard.lines.follow(channel)
        await eventually(lambda: len(heard.updates) >= 4)
        first = {update.channel: update for update, _ in heard.updates}
        assert [type(first[channel]) for channel in (*kinds, unknown)] == [Quote, BookSnapshot, Tape, Refused]
        assert heard.lines.live
        assert all(proven_s <= time.monotonic() for _, proven_s in heard.updates)
