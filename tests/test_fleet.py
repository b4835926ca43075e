"""bus/fleet.py: whoever listens knows the fleet after one beat, and forgets who fell silent."""

from pathlib import Path

import msgspec
from nats.aio.msg import Msg

from bus import server
from bus.connection import connected
from bus.fleet import GONE_S, MANY, Fleet, Presence, announced, followed
from tests import servers


def beat(**fields: object) -> Msg:
    presence = {"process": "w-1", "role": "worker", "host": "h", "pid": 1, "admin": "", "version": "0", "serves": ["paper"]}
    return Msg(_client=None, data=msgspec.json.encode(presence | fields))  # type: ignore[arg-type]


async def test_a_silent_process_is_gone_but_its_exchange_keeps_its_name() -> None:
    now = 100.0
    fleet = Fleet(clock=lambda: now)
    await fleet.hear(beat())
    assert [one.process for one in fleet.alive()] == ["w-1"]
    now += GONE_S + 0.1
    assert fleet.alive() == []
    assert fleet.exchanges == {"paper"}


async def test_processes_that_were_killed_do_not_add_up() -> None:
    now = 0.0
    fleet = Fleet(clock=lambda: now)
    for number in range(2 * MANY):
        now += GONE_S / 4
        await fleet.hear(beat(process=f"w-{number}"))
    assert len(fleet._heard) <= MANY
    assert {one.process for one in fleet.alive()} == {f"w-{2 * MANY - 1 - ago}" for ago in range(5)}


async def test_a_good_bye_counts_at_once() -> None:
    fleet = Fleet()
    await fleet.hear(beat())
    await fleet.hear(beat(leaving=True))
    assert fleet.alive() == []


async def test_noise_is_nobody() -> None:
    fleet = Fleet()
    await fleet.hear(Msg(_client=None, data=b"\xff{"))  # type: ignore[arg-type]
    assert fleet.alive() == []


async def test_a_newcomer_hears_everybody_at_once(state: Path) -> None:
    async with (
        servers.nats(state),
        connected(server.url(state, "worker"), "worker", closed=lambda: None) as worker,
        connected(server.url(state, "bridge"), "bridge", closed=lambda: None) as bridge,
        announced(worker, admin="127.0.0.1:1", version="0", serves=["paper", "okx"], ready=lambda: True),
        followed(bridge) as fleet,
    ):
        await servers.eventually(fleet.alive)
        (one,) = fleet.alive()
        assert isinstance(one, Presence)
        assert (one.process, one.serves, one.admin) == (worker.process, ["paper", "okx"], "127.0.0.1:1")
