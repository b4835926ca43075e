"""workers/orders.py between nats-server and the paper exchange: what a host is told, what the exchange got, what the journal says."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import pytest_asyncio
from msgspec import Struct

from bus import config
from bus.journal import Outcome
from bus.messages import Success
from tests import exchanges, servers
from tests.ordering import (
    SETTLE_AFTER_S,
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
from workers.venues import Venue
from workers.venues.bitgo import Bitgo

pytestmark = pytest.mark.slow

FULL = "POST /api/v1/orders"
LOOKS = "GET /api/v1/orders/by-client-id/*"


class Market(Struct):
    """Two workers, the paper exchange, and one that answers as scripted, as /mute and /bitgo. state: of NATS."""

    state: Path
    rig: Rig
    first: Worker
    second: Worker
    scripted: exchanges.Exchange


@pytest_asyncio.fixture(scope="module")
async def market(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Market]:
    folder = tmp_path_factory.mktemp("orders")
    async with servers.nats(folder / "s"), trading(folder / "paper") as (rig, venues), exchanges.serving() as scripted:
        others = {"mute": Mute(scripted.url), "bitgo": Bitgo("bitgo", config.Venue(base_url=scripted.url))}
        venues |= cast("dict[str, Venue]", others)
        async with working(folder / "s", venues) as first, working(folder / "s", venues) as second:
            yield Market(folder / "s", rig, first, second, scripted)


@pytest.fixture
def who() -> Account:
    return account()


async def settled(worker: Worker, named: str, exchange: str = "paper") -> Outcome:
    """The outcome, once there is one, and nothing is left of what it took to find it."""

    async def gone() -> Outcome | None:
        return None if named in await worker.unsettled() else await worker.outcome(named, exchange)

    outcome = await until(gone)
    assert outcome is not None
    return outcome


# ---------------------------------------------------------------- a clear answer


async def test_an_order_is_journaled_from_intent_to_outcome(market: Market, who: Account) -> None:
    named, begun_ms = key(), time.time() * 1000
    order_id = placed(await market.first.trade(who, buy("0.02", "1000.50"), named=named))
    assert await executed(market.rig, who) == [(named, order_id)]
    intent = await market.first.intent(named)
    assert (intent.exchange, intent.path, intent.method, intent.key) == ("paper", "paper", "trade", named)
    assert (intent.symbol, intent.side, intent.offset, intent.price, intent.amount) == ("BTC_USDT", "buy", "", "1000.5", "0.02")
    assert re.fullmatch("[0-9a-f]{16}", intent.account)
    assert intent.worker == market.first.bus.process
    outcome = await settled(market.first, named)
    assert (outcome.state, outcome.by, outcome.order_id, outcome.process) == ("placed", "worker", order_id, market.first.bus.process)
    times = [begun_ms - 50, intent.asked_ms, intent.received_ms, outcome.sent_ms, outcome.answered_ms, time.time() * 1000 + 50]
    assert times == sorted(times)
    assert outcome.answered_ms < intent.expires_at_ms
    entry = await market.second.entry(named)
    assert entry is not None
    assert (entry.frame, entry.unknown) == (b"", None)  # the sealed keys went with the outcome
    assert intent.received_ms <= entry.journaled_ms <= outcome.sent_ms + 1
    assert outcome.answered_ms <= entry.outcome_ms


async def test_the_exchange_gets_the_deadline_as_the_orders_own_expiry(market: Market, who: Account) -> None:
    named = key()
    placed(await market.first.trade(who, named=named))
    (row,) = await received(market.rig, named)
    assert json.loads(row["body"])["expires_at"] == (await market.first.intent(named)).expires_at_ms


async def test_a_market_order_is_journaled_as_such(market: Market, who: Account) -> None:
    named = key()
    placed(await market.first.trade(who, buy("100", "-1"), named=named))
    intent = await market.first.intent(named)
    assert (intent.price, intent.amount) == ("market", "100")


async def test_a_refusal_is_an_outcome_and_an_equal_order_may_be_tried_again(market: Market, who: Account) -> None:
    named = key()
    told = error(await market.first.trade(who, buy("900", "60000"), named=named))
    assert told.startswith("paper 2010 ")
    outcome = await settled(market.first, named)
    assert (outcome.state, outcome.code) == ("refused", "venue_rejected")
    assert told.endswith(outcome.message)
    assert error(await market.first.trade(who, buy("900", "60000"))) == told
    assert await executed(market.rig, who) == []


async def test_an_exchange_that_cannot_be_reached_got_nothing(state: Path, tmp_path: Path, who: Account) -> None:
    async with servers.nats(state):
        async with trading(tmp_path / "paper") as (_, venues):
            pass
        async with working(state, venues) as worker:
            named = key()
            assert error(await worker.trade(who, named=named)).startswith("network: no connection to paper")
            assert (await settled(worker, named)).state == "refused"
            assert error(await worker.trade(who)).startswith("network: no connection to paper")  # not fenced


async def test_a_refusal_that_quotes_a_key_is_not_in_the_journal(market: Market, who: Account) -> None:
    named = key()
    market.scripted.will(exchanges.json({"code": 500, "msg": f"no account {who.access_key} with {who.secret_key}"}))
    reply = await market.first.trade(who, buy(symbol="BTC_CNY"), named=named, exchange="bitgo")
    assert error(reply) == "no account *** with ***"
    assert (await settled(market.first, named, "bitgo")).message == "no account *** with ***"
    named = key()
    error(await market.first.trade(who, buy(symbol=who.secret_key), named=named))  # a robot that mistakes one field for another
    files = [path.read_bytes() for path in (market.state / "nats" / "store").rglob("*") if path.is_file()]
    assert any(named.encode() in content for content in files)  # that is where it would be
    assert not any(secret.encode() in content for content in files for secret in (who.access_key, who.secret_key))


async def test_a_key_that_is_a_number_stands_in_no_orders_way(market: Market) -> None:
    who = Account("50000000", "secret-of-a-number")
    market.scripted.will(exchanges.json({"id": 9}))
    assert placed(await market.first.trade(who, buy(price="50000000"), exchange="mute")) == "9"


async def test_an_answer_is_journaled_though_the_deadline_passes_meanwhile(state: Path, who: Account) -> None:
    """Where an order cannot be looked up, what its exchange said is all that anybody will ever know."""
    async with (
        servers.nats(state) as nats,
        exchanges.serving() as scripted,
        working(state, cast("dict[str, Venue]", {"mute": Mute(scripted.url)})) as worker,
    ):
        scripted.will(msgspec.structs.replace(exchanges.json({"id": 9}), delay_s=0.3))
        named = key()
        asking = asyncio.create_task(worker.trade(who, named=named, exchange="mute", left_s=1.0))
        await servers.eventually(lambda: scripted.requests)
        async with stopped(nats):
            reply = await asking
        assert isinstance(reply, Success) or re.fullmatch(unknown(named), error(reply))

        async def known() -> bool:
            return await worker.outcome(named, "mute") is not None

        await until(known, 5)
        outcome = await worker.outcome(named, "mute")
        assert outcome is not None
        assert (outcome.state, outcome.order_id) == ("placed", 9)


# ---------------------------------------------------------------- no clear answer

EXECUTED: list[dict[str, Any]] = [
    {"kind": "execute-then-drop"},
    {"kind": "http-503", "executed": True},
    {"kind": "http-502-html", "executed": True},
    {"kind": "html-200", "executed": True},
    {"kind": "truncated-json", "executed": True},
    {"kind": "no-id"},
    {"kind": "late-reply", "seconds": 4},
]
NOT_EXECUTED: list[dict[str, Any]] = [
    {"kind": "drop"},
    {"kind": "http-503", "executed": False},
    {"kind": "html-200", "executed": False},
    {"kind": "truncated-json", "executed": False},
]


@pytest.mark.parametrize("fault", EXECUTED, ids=lambda fault: fault["kind"])
async def test_an_order_that_was_executed_unseen_is_found_while_its_host_waits(market: Market, fault: dict[str, Any], who: Account) -> None:
    await market.rig.arm(**fault | {"path": FULL, "key": who.access_key, "count": 1})
    named, begun = key(), time.monotonic()
    order_id = placed(await market.first.trade(who, named=named))
    assert time.monotonic() - begun < 2.0
    assert await executed(market.rig, who) == [(named, order_id)]
    outcome = await settled(market.first, named)
    assert (outcome.state, outcome.by, outcome.order_id) == ("placed", "settler", order_id)
    assert outcome.looked >= 1
    placed(await market.second.trade(who))  # an equal one: nothing is in its way
    assert len(await executed(market.rig, who)) == 2


async def test_orders_that_were_not_executed_are_unknown_then_absent_behind_their_expiry(market: Market) -> None:
    await asyncio.gather(*(not_executed(market, fault, account()) for fault in NOT_EXECUTED))


async def not_executed(market: Market, fault: dict[str, Any], who: Account) -> None:
    await market.rig.arm(**fault | {"path": FULL, "key": who.access_key, "count": 1})
    named, again = key(), key()
    assert re.fullmatch(unknown(named), error(await market.first.trade(who, named=named, left_s=1.0))), fault
    fenced = f"fenced: an equal order of this account has no known outcome yet, client order id {named}; nothing was sent"
    assert error(await market.second.trade(who, buy("0.010", "1000.0"), named=again)) == fenced
    assert error(await market.first.trade(who)) == fenced
    placed(await market.second.trade(who, buy("0.01", "1001")))
    outcome = await settled(market.first, named)
    assert (outcome.state, outcome.by) == ("absent", "settler"), fault
    entry = await market.first.entry(named)
    assert entry is not None
    assert entry.outcome_ms > entry.intent.expires_at_ms + SETTLE_AFTER_S * 1000
    assert entry.unknown is not None
    assert [one for one, _ in await executed(market.rig, who)] != [named]
    placed(await market.second.trade(who))
    assert error(await market.second.trade(who, named=again)) == fenced  # told before, told again
    assert await received(market.rig, again) == []


async def test_an_order_that_no_look_up_finds_yet_is_not_called_absent(market: Market, who: Account) -> None:
    await market.rig.arm("execute-then-drop", path=FULL, key=who.access_key, count=1)
    await market.rig.arm("stale-read", key=who.access_key, seconds=1.2)
    named = key()
    assert re.fullmatch(unknown(named), error(await market.first.trade(who, named=named, left_s=1.0)))
    outcome = await settled(market.first, named)
    assert (outcome.state, (named, outcome.order_id)) == ("placed", (await executed(market.rig, who))[0])


async def test_an_exchange_whose_clock_is_behind_may_still_take_the_order(market: Market, who: Account) -> None:
    """It is 2 s behind: the order reaches it after our expiry, before its own; only its own clock proves anything."""
    await market.rig.arm("clock-skew", seconds=-2)
    try:
        await market.rig.arm("latency", path=FULL, key=who.access_key, seconds=1.5, count=1)
        named = key()
        assert re.fullmatch(unknown(named), error(await market.first.trade(who, named=named, left_s=0.6)))
        outcome = await settled(market.first, named)
        assert await executed(market.rig, who) == [(named, outcome.order_id)]
        assert outcome.state == "placed"
    finally:
        await market.rig.control("DELETE", "/faults?kind=clock-skew")


async def test_look_ups_that_are_refused_prove_nothing(market: Market, who: Account) -> None:
    """30 s ahead, the exchange says that the expiry is long over, and refuses every signature."""
    named = key()
    await market.rig.arm("drop", path=FULL, key=who.access_key, count=1)
    asking = asyncio.create_task(market.first.trade(who, named=named, left_s=0.8))
    await until(lambda: received(market.rig, named))
    await market.rig.arm("clock-skew", seconds=30)
    try:
        assert re.fullmatch(unknown(named), error(await asking))
        await asyncio.sleep(1.7)  # past the expiry, the margin, and some look-ups
        assert await market.first.outcome(named) is None
    finally:
        await market.rig.control("DELETE", "/faults?kind=clock-skew")
    assert (await settled(market.first, named)).state == "absent"


async def test_look_ups_that_fail_are_made_again(market: Market, who: Account) -> None:
    await market.rig.arm("execute-then-drop", path=FULL, key=who.access_key, count=1)
    for kind in ("drop", "http-503", "html-200"):
        await market.rig.arm(kind, path=LOOKS, key=who.access_key, count=1)
    named = key()
    order_id = placed(await market.first.trade(who, named=named))
    assert (await settled(market.first, named)).looked == 4
    assert await executed(market.rig, who) == [(named, order_id)]


async def test_an_order_that_arrives_after_it_was_called_absent_is_refused_by_its_expiry(market: Market, who: Account) -> None:
    await market.rig.arm("latency", path=FULL, key=who.access_key, seconds=2.5, count=1)
    named = key()
    assert re.fullmatch(unknown(named), error(await market.first.trade(who, named=named, left_s=0.6)))
    assert (await settled(market.first, named)).state == "absent"
    assert await received(market.rig, named) == []

    async def arrived() -> bool:
        return bool(await received(market.rig, named))

    await until(arrived)
    (row,) = await received(market.rig, named)
    assert (row["executed"], row["code"]) == (False, 1004)


async def test_a_venue_without_look_ups_leaves_the_order_to_a_person(market: Market, who: Account) -> None:
    market.scripted.will(exchanges.DROPPED)
    named = key()
    assert re.fullmatch(unknown(named), error(await market.first.trade(who, named=named, exchange="mute", left_s=0.6)))
    again = error(await market.second.trade(who, exchange="mute"))
    assert again.startswith("fenced: ")
    await asyncio.sleep(2.5)  # past expiry and margin, and several rounds of both settlers
    assert await market.first.outcome(named, "mute") is None
    assert named in await market.second.unsettled()
    assert error(await market.second.trade(who, exchange="mute")).startswith("fenced: ")
    assert len(market.scripted.requests) == 1


# ---------------------------------------------------------------- raw writes


async def test_a_raw_write_goes_out_once_and_its_repetition_is_not_executed(market: Market, who: Account) -> None:
    named = key()
    body = {"symbol": "BTC_USDT", "side": "buy", "type": "limit", "price": "1000", "amount": "0.01"}
    assert isinstance(await market.first.raw(who, "/api/v1/orders", body, named=named), Success)
    again = error(await market.second.raw(who, "/api/v1/orders", body, named=named))
    assert again == f"this very request came before and was executed; its answer is not kept, look it up: {named}"
    assert len(await executed(market.rig, who)) == 1
    intent = await market.first.intent(named)
    assert (intent.method, intent.resource, intent.asked_for) == ("__api", "POST /api/v1/orders", "POST /api/v1/orders")
    assert (await settled(market.first, named)).state == "done"


async def test_an_unclear_raw_write_waits_for_a_person_and_is_never_called_absent(market: Market, who: Account) -> None:
    named = key()
    await market.rig.arm("execute-then-drop", path=FULL, key=who.access_key, count=1)
    body = {"symbol": "BTC_USDT", "side": "buy", "type": "limit", "price": "1000", "amount": "0.01"}
    assert error(await market.first.raw(who, "/api/v1/orders", body, named=named, left_s=0.8)).startswith("outcome unknown: ")
    assert error(await market.second.raw(who, "/api/v1/orders", body, named=named, left_s=0.5)).startswith("outcome unknown: ")
    await asyncio.sleep(2.5)  # past expiry and margin, and several rounds of both settlers
    assert await market.first.outcome(named) is None
    assert named in await market.first.unsettled()
    assert len(await executed(market.rig, who)) == 1


# ---------------------------------------------------------------- cancels


async def test_a_cancel_is_journaled_and_answered(market: Market, who: Account) -> None:
    order_id = placed(await market.first.trade(who))
    named = key()
    assert isinstance(await market.first.cancel(who, order_id, named=named), Success)
    again = key()
    assert error(await market.first.cancel(who, order_id, named=again)).startswith("paper 2012 ")
    await until(lambda: market.first.outcome(again))
    states = [getattr(await market.first.outcome(one), "state", None) for one in (named, again)]
    assert states == ["done", "refused"]
    assert (await market.first.intent(named)).asked_for == f"cancel {order_id} BTC_USDT"
    assert await market.first.unsettled() & {named, again} == set()


async def test_an_unclear_cancel_is_unknown_and_may_be_repeated(market: Market, who: Account) -> None:
    order_id = placed(await market.first.trade(who))
    await market.rig.arm("drop", path="DELETE /api/v1/orders/*", key=who.access_key, count=1)
    named = key()
    assert error(await market.first.cancel(who, order_id, named=named)).startswith("outcome unknown: ")
    assert isinstance(await market.first.cancel(who, order_id, named=named), Success)
