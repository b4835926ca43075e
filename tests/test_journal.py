"""bus/journal.py against a real nats-server: on disk before it counts, written once, forgotten only when it may be."""

import asyncio
import secrets
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from bus import config, server
from bus.connection import Bus, connected
from bus.errors import BusDown
from bus.journal import Entry, Held, Intent, Journal, Outcome
from bus.streams import ACK_S, Duplicate
from tests import servers

pytestmark = pytest.mark.slow

SLACK_S = 0.7
"""What this machine may take beyond a time limit."""
FAR_MS = 60_000


@asynccontextmanager
async def journaling(state: Path, disk: Path | None = None, **settings: float) -> AsyncIterator[tuple[Bus, Journal]]:
    """A worker's connection, and the journal over it."""
    async with connected(server.url(state, "worker"), "worker", closed=lambda: None) as bus:
        journal = Journal(bus, config.Orders(**settings), disk=disk)  # type: ignore[arg-type]
        await journal.open()
        yield bus, journal


@pytest_asyncio.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """A nats-server for tests that leave it alone, each with keys of its own."""
    state = tmp_path_factory.mktemp("journal") / "s"
    async with servers.nats(state):
        yield state


@pytest_asyncio.fixture
async def journal(shared: Path) -> AsyncIterator[Journal]:
    async with journaling(shared) as (_, journal):
        yield journal


def intent(key: str = "", left_ms: int = FAR_MS, **changes: object) -> Intent:
    """A trade of an account that no other test has."""
    now_ms = time.time_ns() // 1_000_000
    made = Intent(
        exchange="paper",
        path="paper/robot-1",
        account=secrets.token_hex(8),
        method="trade",
        key=key or secrets.token_hex(16),
        asked_ms=now_ms,
        received_ms=now_ms,
        expires_at_ms=now_ms + left_ms,
        worker="worker-1",
        symbol="BTC_USDT",
        side="buy",
        price="50000",
        amount="0.01",
    )
    return msgspec.structs.replace(made, **changes)


def like(first: Intent, **changes: object) -> Intent:
    """Another order of the same account."""
    return msgspec.structs.replace(first, **{"key": secrets.token_hex(16)} | changes)


PLACED = Outcome(state="placed", process="worker-1", order_id="17", sent_ms=1, answered_ms=2)
REFUSED = Outcome(state="refused", by="settler", code="venue_rejected", message="no funds")
UNKNOWN = Outcome(state="unknown", code="outcome_unknown")


async def entry(journal: Journal, one: Intent) -> Entry | None:
    """What is known under its key."""
    held = await journal.held("paper", one.key)
    return await journal.settled("paper", one.key) or (held.entry if held else None)


async def written(journal: Journal, one: Intent) -> Intent | None:
    found = await entry(journal, one)
    return found.intent if found else None


async def outcome(journal: Journal, one: Intent) -> Outcome | None:
    found = await entry(journal, one)
    return found.outcome if found else None


async def close(journal: Journal, one: Intent, outcome: Outcome) -> Outcome:
    """It has an outcome, and its host was told."""
    held = await journal.held("paper", one.key) or Held(Entry(intent=one), 0)
    first = await journal.finish(held, outcome)
    await journal.told(held)
    return first


async def mark(journal: Journal, one: Intent) -> Held:
    """Begin it, and say that nobody knows its outcome."""
    return await journal.mark_unknown(await journal.begin(one, b"frame"), UNKNOWN)


async def waiting(journal: Journal, one: Intent) -> list[str]:
    """Where it lies without an outcome."""
    return [place for place in await journal.unsettled() if one.key in place]


async def gone(journal: Journal, one: Intent) -> None:
    """Wait until it is let go, which nobody waits for."""
    async with asyncio.timeout(5):
        while await waiting(journal, one):  # noqa: ASYNC110 - only asking tells
            await asyncio.sleep(0.01)


# ---------------------------------------------------------------- once


async def test_an_intent_is_read_as_it_was_written(journal: Journal) -> None:
    one = intent(offset="open", worker="worker-7")
    begun_ms = time.time() * 1000
    held = await journal.begin(one, b"\x00frame")
    (place,) = await waiting(journal, one)
    for read in (await journal.hold(place), await journal.held("paper", one.key), await journal.held("*", one.key)):
        assert read is not None
        assert (read.intent, read.entry.frame, read.entry.unknown, read.sequence) == (one, b"\x00frame", None, held.sequence)
        assert begun_ms - 50 < read.entry.journaled_ms < time.time() * 1000 + 50
    assert await journal.held("okx", one.key) is None
    assert await journal.settled("*", one.key) is None
    assert one.asked_for == "buy open 0.01 BTC_USDT at 50000"


async def test_of_many_intents_under_one_key_at_once_one_is_taken(shared: Path) -> None:
    async with journaling(shared) as (_, first), journaling(shared) as (_, second):
        for _ in range(10):
            one = intent()
            tries = [msgspec.structs.replace(one, worker=f"worker-{number}") for number in range(6)]
            results = await asyncio.gather(
                *(
                    journal.begin(each, each.worker.encode())
                    for each, journal in zip(tries, (first, second, first, second, first, second), strict=True)
                ),
                return_exceptions=True,
            )
            assert sorted(type(result).__name__ for result in results) == ["Duplicate"] * 5 + ["Held"]
            winner = next(each for each, result in zip(tries, results, strict=True) if isinstance(result, Held))
            assert await written(first, one) == winner
            (place,) = await waiting(first, one)
            read = await first.hold(place)
            assert read is not None
            assert (read.intent, read.entry.frame) == (winner, winner.worker.encode())


async def test_the_first_outcome_is_the_outcome(journal: Journal) -> None:
    one = intent()
    await journal.begin(one, b"frame")
    assert await close(journal, one, PLACED) == PLACED
    assert await close(journal, one, REFUSED) == PLACED
    assert await outcome(journal, one) == PLACED
    await gone(journal, one)
    assert await journal.held("paper", one.key) is None


async def test_outcomes_written_at_once_agree(shared: Path) -> None:
    async with journaling(shared) as (_, first), journaling(shared) as (_, second):
        for _ in range(10):
            one = intent()
            await first.begin(one, b"frame")
            told = await asyncio.gather(close(first, one, PLACED), close(second, one, REFUSED))
            assert told[0] == told[1] == await outcome(first, one)
            await gone(first, one)


async def test_a_duplicate_of_a_settled_order_leaves_nothing_behind(journal: Journal) -> None:
    one = intent()
    await journal.begin(one, b"frame")
    await close(journal, one, PLACED)
    await gone(journal, one)
    for another in (one, msgspec.structs.replace(one, account="0123456789abcdef")):
        with pytest.raises(Duplicate):
            await journal.begin(another, b"frame")
        await gone(journal, one)
    assert await written(journal, one) == one


async def test_an_order_keeps_what_happened_to_it_and_loses_its_keys(journal: Journal) -> None:
    one = intent()
    held = await mark(journal, one)
    assert await journal.finish(held, PLACED) == PLACED
    await journal.told(held)
    await gone(journal, one)
    found = await journal.settled("paper", one.key)
    assert found is not None
    assert (found.intent, found.unknown, found.outcome, found.frame) == (one, UNKNOWN, PLACED, b"")
    assert 0 < found.journaled_ms <= found.unknown_ms <= found.outcome_ms


# ---------------------------------------------------------------- the fence


async def test_only_an_order_that_its_host_may_not_know_of_stands_in_the_way(journal: Journal) -> None:
    one = intent()
    equal = like(one)
    held = await journal.begin(one, b"frame")
    found = await journal.equal(equal)
    assert found is not None
    assert not journal.may_be_unknown(found)  # on its way: this one waits for its turn
    assert await journal.equal(equal, before=held.sequence) is None  # it was begun later than this one
    held = await journal.mark_unknown(held, UNKNOWN)
    found = await journal.equal(equal)
    assert found is not None
    assert (found.intent, found.unknown, found.outcome) == (one, UNKNOWN, None)
    assert await journal.equal(one) is None  # it is not in its own way
    await journal.finish(held, PLACED)
    await journal.untold(held, PLACED)
    await gone(journal, one)
    found = await journal.equal(equal)
    assert found is not None
    assert found.outcome == PLACED
    await journal.lift(one)
    assert await journal.equal(equal) is None  # at once: whoever was told may send the next


async def test_the_fence_of_an_order_that_nobody_was_told_of_falls_by_itself(shared: Path) -> None:
    async with journaling(shared, fence_s=1) as (_, journal):
        one = intent()
        held = await journal.begin(one, b"frame")
        await journal.finish(held, PLACED)
        await journal.untold(held, PLACED)
        assert await journal.equal(like(one)) is not None
        async with asyncio.timeout(5):
            while await journal.equal(like(one)) is not None:  # noqa: ASYNC110 - time brings it about
                await asyncio.sleep(0.05)
        assert await outcome(journal, one) == PLACED


async def test_an_order_past_its_deadline_stands_in_the_way_whoever_sent_it(shared: Path) -> None:
    one = intent(left_ms=100)
    async with journaling(shared) as (_, first), journaling(shared) as (_, second):
        await first.begin(one, b"frame")
        equal = like(one, expires_at_ms=one.expires_at_ms + FAR_MS)
        async with asyncio.timeout(5):
            while (found := await second.equal(equal)) is None or not second.may_be_unknown(found):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert time.time() * 1000 >= one.expires_at_ms


SAME: list[dict[str, str]] = [
    {"price": "50000.00"},
    {"price": "5E+4"},
    {"amount": "0.0100"},
    {"symbol": "btc_usdt"},
    {"path": "paper/robot-2"},
]
OTHER: list[dict[str, str]] = [
    {"price": "50000.01"},
    {"price": "market"},
    {"amount": "0.1"},
    {"side": "sell"},
    {"symbol": "BTC_USDT.swap"},
    {"offset": "close"},
    {"account": "0123456789abcdef"},
    {"exchange": "okx"},
]


@pytest.mark.parametrize("changes", SAME, ids=str)
async def test_the_same_order_written_differently_is_equal(changes: dict[str, str], journal: Journal) -> None:
    one = intent()
    await mark(journal, one)
    assert await journal.equal(like(one, **changes)) is not None


@pytest.mark.parametrize("changes", OTHER, ids=str)
async def test_another_order_is_not_equal(changes: dict[str, str], journal: Journal) -> None:
    one = intent()
    await mark(journal, one)
    assert await journal.equal(like(one, **changes)) is None


async def test_raw_writes_are_equal_to_nothing(journal: Journal) -> None:
    one = intent(method="__api", resource="POST /orders", symbol="", side="", price="", amount="")
    await mark(journal, one)
    assert await journal.equal(like(one)) is None


# ---------------------------------------------------------------- NATS that dies, is silent, or has no JetStream


async def test_both_records_are_on_disk_when_the_server_is_killed_the_moment_after(state: Path) -> None:
    orders = [intent() for _ in range(20)]
    async with servers.nats(state) as nats, journaling(state) as (_, journal):
        for one in orders:
            await journal.begin(one, b"frame of " + one.key.encode())
        nats.send(signal.SIGKILL)
        await nats.process.wait()
    async with servers.nats(state), journaling(state) as (_, journal):
        for one in orders:
            assert await written(journal, one) == one
            (place,) = await waiting(journal, one)
            read = await journal.hold(place)
            assert read is not None
            assert read.entry.frame == b"frame of " + one.key.encode()
            with pytest.raises(Duplicate):
                await journal.begin(msgspec.structs.replace(one, worker="worker-2"), b"another")
        await close(journal, orders[0], PLACED)
        with pytest.raises(Duplicate):
            await journal.begin(orders[0], b"frame")


async def test_a_silent_server_costs_a_second_and_what_it_took_is_there_later(state: Path) -> None:
    one = intent()
    async with servers.nats(state) as nats, journaling(state) as (_, journal):
        nats.send(signal.SIGSTOP)
        try:
            asked = time.monotonic()
            with pytest.raises(BusDown, match="the journal does not answer; order not sent"):
                await journal.begin(one, b"frame")
            assert time.monotonic() - asked < ACK_S + SLACK_S
            asked = time.monotonic()
            with pytest.raises(BusDown):
                await journal.equal(one)
            assert time.monotonic() - asked < ACK_S + SLACK_S
        finally:
            nats.send(signal.SIGCONT)
        with pytest.raises(Duplicate):  # that it was late does not make it undone
            await journal.begin(like(one, key=one.key), b"frame")


async def test_without_a_server_and_without_jetstream_the_answer_comes_at_once(state: Path) -> None:
    async with servers.nats(state) as nats, journaling(state) as (bus, journal):
        nats.send(signal.SIGKILL)
        await nats.process.wait()
        await servers.eventually(lambda: not bus.nc.is_connected)
        asked = time.monotonic()
        with pytest.raises(BusDown, match="no connection to the bus"):
            await journal.begin(intent(), b"frame")
        assert time.monotonic() - asked < SLACK_S
        async with without_jetstream(state):
            await servers.eventually(lambda: bus.nc.is_connected)
            asked = time.monotonic()
            for call in (journal.begin(intent(), b"frame"), journal.equal(intent()), journal.unsettled(), journal.sweep(), journal.open()):
                with pytest.raises(BusDown, match="the journal does not answer"):
                    await call
            assert time.monotonic() - asked < ACK_S
            await journal.note(intent(method="cancel"))


def without(configuration: Path, section: str) -> None:
    settings = msgspec.json.decode(configuration.read_bytes().partition(b"\n")[2])
    del settings[section]
    configuration.write_bytes(msgspec.json.encode(settings))


@asynccontextmanager
async def without_jetstream(state: Path) -> AsyncIterator[servers.Running]:
    """The same server, its JetStream off."""
    command = server.command(state)
    without(Path(command[-1]), "jetstream")
    async with servers.running(*command) as one:
        await server.wait_ready(state)
        yield one
