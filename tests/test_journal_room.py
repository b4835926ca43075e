"""The journal's room: what it does when there is none left, and what it forgets to make some."""

import asyncio
import errno
from pathlib import Path

import pytest

from bus import server
from bus.errors import JournalFull
from bus.journal import Intent, Journal, Outcome
from bus.streams import Duplicate
from tests import servers
from tests.test_journal import PLACED, UNKNOWN, close, gone, intent, journaling, outcome, waiting, written

pytestmark = pytest.mark.slow


async def fill(journal: Journal, count: int) -> list[Intent]:
    """So many settled orders."""
    orders = [intent() for _ in range(count)]
    for one in orders:
        await journal.begin(one, b"frame")
        await close(journal, one, PLACED)
    await gone(journal, orders[-1])
    return orders


async def test_a_full_journal_refuses_the_order_and_a_sweep_makes_room(state: Path) -> None:
    async with servers.nats(state), journaling(state, keep_orders=4) as (_, journal):
        await fill(journal, 7)
        last = await journal.begin(intent(), b"frame")
        one = intent()
        with pytest.raises(JournalFull, match="order not sent"):
            await journal.begin(one, b"frame")
        assert journal.is_full
        assert await written(journal, one) is None
        marked = await journal.mark_unknown(last, UNKNOWN)  # what is there already can still change
        with pytest.raises(JournalFull):
            await journal.finish(last, PLACED)  # it is not any more what it was read as
        assert await journal.finish(marked, PLACED) == PLACED
        await journal.sweep()
        assert (journal.is_full, journal.used) == (False, 0.5)
        await journal.begin(one, b"frame")


async def test_unsettled_orders_are_kept_though_they_take_all_the_room(state: Path) -> None:
    async with servers.nats(state), journaling(state, keep_orders=3) as (_, journal):
        orders = [intent() for _ in range(6)]
        for one in orders:
            await journal.begin(one, b"frame")
        with pytest.raises(JournalFull, match="order not sent"):
            await journal.begin(intent(), b"frame")
        await journal.sweep()
        assert journal.used == 1.0
        assert [await written(journal, one) for one in orders] == orders


async def test_a_journal_full_of_unsettled_orders_takes_their_outcomes_and_so_has_room_again(state: Path) -> None:
    async with servers.nats(state), journaling(state, keep_orders=2) as (_, journal):
        orders = [intent() for _ in range(4)]
        held = [await journal.begin(one, b"frame") for one in orders]
        with pytest.raises(JournalFull):
            await journal.begin(intent(), b"frame")
        assert await journal.finish(held[0], PLACED) == PLACED
        assert await journal.finish(held[0], Outcome(state="absent")) == PLACED  # the first one wins here too
        there = await journal.held("paper", orders[0].key)
        assert there is not None
        assert (there.entry.outcome, there.entry.frame) == (PLACED, b"")
        for _ in range(2):  # the first one carries the others past it
            await journal.sweep()
        again = await journal.begin(intent(), b"frame")
        assert again.sequence > there.sequence
        for one in orders[1:]:
            assert await journal.held("paper", one.key) is not None


async def test_a_sweep_keeps_the_newest_and_never_forgets_an_unsettled_order(state: Path) -> None:
    async with servers.nats(state), journaling(state, keep_orders=10) as (_, journal):
        unsettled = intent()
        await journal.begin(unsettled, b"frame")
        old = await fill(journal, 5)
        new = await fill(journal, 10)
        await journal.sweep()
        assert [await written(journal, one) for one in old] == [None] * 5
        kept = [one for one in new if await outcome(journal, one) == PLACED]
        assert len(kept) >= 9  # the newest ten, less what the carried intent takes
        assert kept == new[-len(kept) :]
        assert await written(journal, unsettled) == unsettled
        for one in (unsettled, new[-1]):
            with pytest.raises(Duplicate):
                await journal.begin(one, b"frame")
        (place,) = await waiting(journal, unsettled)
        assert (await journal.hold(place)) is not None
        await fill(journal, 7)
        await journal.sweep()
        assert await written(journal, unsettled) == unsettled
        assert await close(journal, unsettled, PLACED) == PLACED


async def test_a_sweep_forgets_what_is_too_old_and_nothing_younger(state: Path) -> None:
    async with servers.nats(state), journaling(state) as (_, many):
        unsettled = intent()
        await many.begin(unsettled, b"frame")
        old = await fill(many, 3)
        await asyncio.sleep(1.0)  # age is what is tested
        new = await fill(many, 3)
        async with journaling(state, keep_days=0.9 / 86_400) as (_, journal):
            await journal.sweep()
            assert [await written(journal, one) for one in old] == [None] * 3
            assert [await written(journal, one) for one in new] == new
            assert await written(journal, unsettled) == unsettled


async def test_two_workers_may_sweep_at_once(state: Path) -> None:
    async with (
        servers.nats(state),
        journaling(state, keep_orders=20) as (_, first),
        journaling(state, keep_orders=20) as (_, second),
    ):
        for _ in range(3):
            unsettled = [intent() for _ in range(5)]
            for one in unsettled:
                await first.begin(one, b"frame")
            for _ in range(4):  # by the last time they are among what is to be forgotten
                await fill(first, 6)
                await asyncio.gather(*(journal.sweep() for journal in (first, second)))
            assert [await written(first, one) for one in unsettled] == unsettled
            for one in unsettled:
                await close(first, one, PLACED)


async def test_a_disk_that_is_full_refuses_the_order_and_says_so(state: Path, tmp_path: Path) -> None:
    """A disk of its own for nats-server, in a mount namespace; from outside it is seen through /proc."""
    folder = state / "nats" / "store"
    folder.mkdir(parents=True)
    mounted = f'mount -t tmpfs -o size=48m none "{folder}" && exec "$@"'
    try:
        command = server.command(state)
        async with servers.running("unshare", "-rm", "sh", "-c", mounted, "sh", *command) as nats:
            await server.wait_ready(state)
            disk = Path(f"/proc/{nats.process.pid}/root{folder}")
            async with journaling(state, disk=disk) as (_, journal):
                before = intent()
                await journal.begin(before, b"frame")
                await asyncio.to_thread(fill_disk, disk)
                await refused_for_room(journal)
    except PermissionError:
        pytest.skip("no namespaces here")


def fill_disk(folder: Path) -> None:
    with (folder / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise


async def refused_for_room(journal: Journal) -> None:
    """Write until what is left of the last block is used up."""
    for _ in range(200):
        try:
            await journal.begin(intent(), b"frame" * 1000)
        except JournalFull:
            return
    pytest.fail("a disk without room took everything")
