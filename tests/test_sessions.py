"""bus/sessions.py against a real nats-server: kept on disk, changed by compare-and-set, never guessed."""

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from bus import server
from bus.connection import Bus, connected
from bus.errors import BusDown
from bus.sessions import Session, Sessions
from tests import servers


@pytest_asyncio.fixture
async def bus(state: Path) -> AsyncIterator[Bus]:
    async with servers.nats(state), connected(server.url(state, "operator"), "operator", closed=lambda: None) as bus:
        yield bus


async def test_a_robot_without_state_has_an_empty_one(bus: Bus) -> None:
    assert await Sessions(bus).read("paper", "account") == Session()


async def test_a_change_keeps_the_other_fields_and_the_other_robots(bus: Bus) -> None:
    sessions = Sessions(bus)
    await sessions.change("paper/r1", "account", contract="swap")
    await sessions.change("paper/r1", "account", level=Decimal("7.5"))
    await sessions.change("paper/r2", "account", contract="quarter")
    assert await sessions.read("paper/r1", "account") == Session(contract="swap", level=Decimal("7.5"))
    assert await sessions.read("paper/r2", "account") == Session(contract="quarter")
    assert await sessions.read("paper/r1", "another") == Session()


async def test_changes_at_once_all_count(bus: Bus) -> None:
    """A strategy's exchange.Go sends SetContractType, SetDirection and SetMarginLevel together, perhaps to three workers."""
    workers = [Sessions(bus) for _ in range(3)]
    changes: list[dict[str, Any]] = [{"contract": "swap"}, {"direction": "buy"}, {"level": Decimal(5)}]
    await asyncio.gather(*(worker.change("paper", "account", **change) for worker, change in zip(workers, changes, strict=True)))
    assert await workers[0].read("paper", "account") == Session(contract="swap", direction="buy", level=Decimal(5))


async def test_what_is_cleared_is_empty_and_can_be_set_again(bus: Bus) -> None:
    sessions = Sessions(bus)
    await sessions.change("paper", "account", contract="swap")
    assert await sessions.all() == {"paper.account": Session(contract="swap")}
    await sessions.clear("paper.account")
    assert await sessions.all() == {}
    assert await sessions.read("paper", "account") == Session()
    await sessions.change("paper", "account", direction="sell")
    assert await sessions.read("paper", "account") == Session(direction="sell")


async def test_state_survives_the_server_and_cannot_be_read_without_it(state: Path) -> None:
    url = server.url(state, "worker")
    async with servers.nats(state) as first, connected(url, "worker", closed=lambda: None) as bus:
        sessions = Sessions(bus)
        await sessions.change("paper", "account", contract="swap")
        await first.stop(9)
        with pytest.raises(BusDown, match="nothing was guessed"):
            await sessions.read("paper", "account")
        async with servers.nats(state):
            await servers.eventually(lambda: bus.nc.is_connected)
            assert await sessions.read("paper", "account") == Session(contract="swap")
