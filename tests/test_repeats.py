"""The same request twice, and a journal that fails in the middle: one order at the exchange at most, and never two stories about it."""

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
from msgspec import Struct

from bus import server
from bus.connection import connected
from bus.errors import SILENCED
from bus.messages import Failure, Reply, Success, Trade
from tests import exchanges, servers
from tests.ordering import (
    Account,
    Mute,
    Worker,
    account,
    buy,
    error,
    executed,
    key,
    placed,
    received,
    stopped,
    trading,
    unknown,
    until,
    working,
)
from tests.rig import Rig
from tests.servers import Running
from tests.test_journal import without_jetstream
from workers.venues import Venue

pytestmark = pytest.mark.slow

PLACES = "POST /api/v1/orders"


class Market(Struct):
    """Two workers and the paper exchange. nats: the server that tests stop and continue. state: its folder."""

    state: Path
    rig: Rig
    first: Worker
    second: Worker
    nats: Running


@asynccontextmanager
async def marketing(folder: Path, **settings: Any) -> AsyncIterator[Market]:
    async with (
        servers.nats(folder / "s") as nats,
        trading(folder / "paper") as (rig, venues),
        working(folder / "s", venues, **settings) as first,
        working(folder / "s", venues, **settings) as second,
    ):
        yield Market(folder / "s", rig, first, second, nats)


@pytest_asyncio.fixture(scope="module")
async def market(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Market]:
    async with marketing(tmp_path_factory.mktemp("repeats")) as market:
        yield market


@pytest.fixture
def who() -> Account:
    return account()


# ---------------------------------------------------------------- the same request again


async def test_a_repetition_after_success_is_told_the_same_order(market: Market, who: Account) -> None:
    named = key()
    first = placed(await market.first.trade(who, named=named))
    for worker in (market.first, market.second):
        assert placed(await worker.trade(who, named=named)) == first
    assert await executed(market.rig, who) == [(named, first)]
    assert len(await received(market.rig, named)) == 1


async def test_a_repetition_after_a_refusal_is_told_the_same_refusal(market: Market, who: Account) -> None:
    named = key()
    first = await market.first.trade(who, buy("900", "60000"), named=named)
    assert await market.second.trade(who, buy("900", "60000"), named=named) == first
    assert error(first).startswith("paper 2010 ")
    assert len(await received(market.rig, named)) == 1


async def test_repetitions_while_the_first_is_open_wait_for_its_outcome(market: Market, who: Account) -> None:
    await market.rig.arm("late-reply", path=PLACES, key=who.access_key, seconds=0.7, count=1)
    named = key()
    frame = market.first.frame("trade", buy(), who, named=named)
    replies = await asyncio.gather(*(worker.answer(frame) for worker in (market.first, market.second) * 5))
    assert len({placed(reply) for reply in replies}) == 1
    assert await executed(market.rig, who) == [(named, placed(replies[0]))]
    assert len(await received(market.rig, named)) == 1


async def test_a_loop_whose_host_hung_up_waits_for_the_first_order_and_is_told_its_id(market: Market, who: Account) -> None:
    """exchange.SetTimeout below what the exchange takes: the next nonce comes while the first order is on its way."""
    await market.rig.arm("late-reply", path=PLACES, key=who.access_key, seconds=0.7, count=1)
    named = key()
    asking = asyncio.create_task(market.first.answer(market.first.frame("trade", buy(), who, named=named, left_s=5), told=False))
    await until(lambda: received(market.rig, named))
    text = error(await market.second.trade(who, left_s=5))
    order_id = placed(await asking)
    assert text.startswith(f"fenced: an equal order was placed, order id {order_id}, and its answer may not have reached you; ")
    assert await executed(market.rig, who) == [(named, order_id)]


async def test_equal_orders_that_are_asked_for_at_once_are_all_placed(market: Market, who: Account) -> None:
    replies = await asyncio.gather(*(worker.trade(who, left_s=9) for worker in (market.first, market.second) * 8))
    assert len({placed(reply) for reply in replies}) == 16
    assert len(await executed(market.rig, who)) == 16


async def test_a_repetition_of_an_unknown_order_is_told_what_was_found(market: Market, who: Account) -> None:
    await market.rig.arm("drop", path=PLACES, key=who.access_key, count=1)
    named = key()
    assert re.fullmatch(unknown(named), error(await market.first.trade(who, named=named, left_s=0.8)))
    assert re.fullmatch(unknown(named), error(await market.second.trade(who, named=named, left_s=0.3)))
    told = error(await market.second.trade(who, named=named, left_s=5))
    assert told.startswith("not placed: ")
    assert not SILENCED.search(told)
    assert len(await received(market.rig, named)) == 1


async def test_the_same_request_with_another_secret_is_refused_and_changes_nothing(market: Market, who: Account) -> None:
    named = key()
    first = placed(await market.first.trade(who, named=named))
    thief = Account(who.access_key, "guessed-guessed")
    told = "the secret key is not the one that this very request came with before; nothing was sent"
    assert error(await market.second.trade(thief, named=named)) == told
    assert placed(await market.first.trade(who, named=named)) == first
    assert len(await received(market.rig, named)) == 1
    assert named not in await market.first.unsettled()


async def test_the_exchanges_own_memory_is_not_needed(market: Market, who: Account) -> None:
    """Most exchanges know a client order id only while its order is open."""
    await market.rig.arm("duplicate-client-id", key=who.access_key)
    named = key()
    frame = market.first.frame("trade", buy("0.02", "-1", side="sell"), who, named=named)
    replies = await asyncio.gather(*(worker.answer(frame) for worker in (market.first, market.second) * 3))
    replies.append(await market.second.trade(who, buy("0.02", "-1", side="sell"), named=named))
    assert len({placed(reply) for reply in replies}) == 1
    assert len(await executed(market.rig, who)) == 1


# ---------------------------------------------------------------- a journal that fails


async def calm(market: Market) -> None:
    """Wait until orders pass again, after a test that stopped the server."""
    for worker in (market.first, market.second):
        assert isinstance(await loud(worker, account()), Success)


async def loud(worker: Worker, who: Account, order: Trade | None = None) -> Reply:
    """Ask as a robot does whose bus was away: again while it is told of the transport only."""

    async def answered() -> Reply | None:
        reply = await worker.trade(who, order)
        return None if isinstance(reply, Failure) and (reply.error.silenced or reply.code == "guard_refused") else reply

    reply = await until(answered)
    assert reply is not None
    return reply


async def test_an_order_that_was_not_journaled_was_not_sent_and_its_repetition_is_told_so(market: Market, who: Account) -> None:
    await calm(market)
    named = key()
    async with stopped(market.nats):
        begun = time.monotonic()
        told = error(await market.first.trade(who, named=named))
        assert time.monotonic() - begun < 2.5
    assert told.startswith(("network: ", "timeout: ")), told
    again = await market.second.trade(who, named=named, left_s=4)
    await asyncio.sleep(0)
    sent = await received(market.rig, named)
    if isinstance(again, Success):
        assert [row["executed"] for row in sent] == [True]  # the first had left no trace: this one is an order of its own
    else:
        assert sent == []
        assert again.error.text.startswith(("network: ", "timeout: "))
        assert await market.second.outcome(named) is not None


async def test_an_order_is_not_sent_after_a_journal_that_took_too_long(state: Path, who: Account) -> None:
    """What was left of its time has gone while the journal was asked."""
    async with (
        servers.nats(state) as nats,
        exchanges.serving() as scripted,
        working(state, cast("dict[str, Venue]", {"mute": Mute(scripted.url)})) as worker,
    ):
        named = key()
        async with stopped(nats):
            asking = asyncio.create_task(worker.trade(who, named=named, left_s=1.0, exchange="mute"))
            await asyncio.sleep(0.9)  # past the moment by which it must be sent
        assert re.match("timeout: |network: ", error(await asking))
        assert scripted.requests == []
        outcome = await until(lambda: worker.outcome(named, "mute"))
        assert outcome is not None
        assert outcome.state == "refused"
        assert scripted.requests == []


async def test_an_order_told_as_unknown_while_the_journal_was_away_is_fenced_when_it_is_back(tmp_path: Path, who: Account) -> None:
    """The mark that it is unknown was lost with the server; its host reads `unknown` long before the deadline, and tries again."""
    async with marketing(tmp_path) as market:
        rig, first, second, nats = market.rig, market.first, market.second, market.nats
        await rig.arm("latency", path=PLACES, key=who.access_key, seconds=0.3, count=1)
        await rig.arm("drop", path=PLACES, key=who.access_key, count=1)
        await rig.arm("drop", path="GET /api/v1/orders/by-client-id/*", key=who.access_key)
        named = key()
        asking = asyncio.create_task(first.trade(who, named=named, left_s=8))
        await until(lambda: second.unsettled())  # it is on its way to the exchange
        async with stopped(nats):
            await asyncio.sleep(1.6)  # the answer was lost, and the mark was not taken
            nats.send(signal.SIGKILL)
            await nats.process.wait()
        async with servers.nats(tmp_path / "s"):
            assert re.fullmatch(unknown(named), error(await asking))
            reply = await loud(second, who)
            assert error(reply).startswith("fenced: ")
            assert [row["client_order_id"] for row in await rig.ledger()] == [named]


async def test_an_outcome_that_could_not_be_journaled_is_written_later(market: Market, who: Account) -> None:
    await calm(market)
    await market.rig.arm("late-reply", path=PLACES, key=who.access_key, seconds=0.5, count=1)
    named = key()
    asking = asyncio.create_task(market.first.trade(who, named=named, left_s=6))
    await until(lambda: received(market.rig, named))
    async with stopped(market.nats):
        order_id = placed(await asking)  # what the exchange said is told, whatever the journal does
    assert placed(await market.second.trade(who, named=named, left_s=6)) == order_id
    assert await executed(market.rig, who) == [(named, order_id)]


async def test_cancels_go_on_without_jetstream_and_without_the_streams(tmp_path: Path, who: Account) -> None:
    async with trading(tmp_path / "paper") as (rig, venues), servers.nats(tmp_path / "s") as nats:
        async with working(tmp_path / "s", venues) as worker:
            ids = [placed(await worker.trade(who, buy(price=price))) for price in ("1000", "1001", "1002")]
            async with connected(server.url(tmp_path / "s", "operator"), "operator", closed=lambda: None) as operator:
                await operator.nc.jetstream().delete_stream("ORDERS")
            assert isinstance(await worker.cancel(who, ids[0]), Success)
            assert isinstance(await loud(worker, who), Success)  # the streams are made again, and trading goes on
            nats.send(signal.SIGKILL)
            await nats.process.wait()
            assert error(await worker.trade(who)).startswith("network: ")
            assert isinstance(await worker.cancel(who, ids[1]), Success)
            async with without_jetstream(tmp_path / "s"):
                await servers.eventually(lambda: worker.bus.nc.is_connected)
                begun = time.monotonic()
                assert isinstance(refused := await worker.trade(who, buy(symbol="BTC_USDT.swap")), Failure)
                assert isinstance(await worker.cancel(who, ids[2]), Success)
                assert time.monotonic() - begun < 2.5
        assert refused.code in ("bus_down", "guard_refused")
        states = [(await rig.client.other(who.access_key, who.secret_key).get(f"/api/v1/orders/{one}"))["status"] for one in ids]
        assert states == ["cancelled"] * 3


async def test_without_futures_state_a_bare_symbol_is_refused_and_not_guessed(tmp_path: Path, who: Account) -> None:
    async with trading(tmp_path / "paper") as (rig, venues), servers.nats(tmp_path / "s") as nats:
        async with working(tmp_path / "s", venues) as worker:
            nats.send(signal.SIGKILL)
            await nats.process.wait()
            async with without_jetstream(tmp_path / "s"):
                await servers.eventually(lambda: worker.bus.nc.is_connected)
                told = error(await worker.trade(who))
                assert told == "network: futures state cannot be read; nothing was guessed, nothing was sent"
        assert await rig.ledger() == []


async def test_a_full_journal_refuses_orders_lets_cancels_through_and_recovers_by_itself(tmp_path: Path, who: Account) -> None:
    async with marketing(tmp_path, keep_orders=5) as market:
        ids: list[str] = []
        refused: list[str] = []
        for number in range(30):
            reply = await market.first.trade(who, buy(price=f"{1000 + number}"))
            if isinstance(reply, Failure):
                refused.append(reply.error.text)
                assert isinstance(await market.first.cancel(who, ids[-1]), Success)
                break
            ids.append(placed(reply))
        assert refused == ["journal full: order not sent"]

        async def passes() -> bool:
            return isinstance(await market.first.trade(who, buy(price="1100")), Success)

        async def nothing_left() -> bool:
            return not await market.first.unsettled()

        await until(passes, 5)
        await until(nothing_left)
        assert len(await executed(market.rig, who)) == len(ids) + 1


async def test_a_server_that_lost_its_disk_gets_its_streams_again(tmp_path: Path, who: Account) -> None:
    async with marketing(tmp_path) as market:
        rig, worker, nats = market.rig, market.first, market.nats
        before = placed(await worker.trade(who))
        nats.send(signal.SIGKILL)
        await nats.process.wait()
        (tmp_path / "s/nats/store").rename(tmp_path / "lost")
        async with servers.nats(tmp_path / "s"):
            reply = await loud(worker, who, buy("0.02"))
            assert await executed(rig, who) == [(row, one) for row, one in await executed(rig, who) if one in (before, placed(reply))]
            assert len(await executed(rig, who)) == 2
