"""What is done to a cluster while hosts are at work: faults of the exchange, and one process killed or stopped at a moment drawn before."""

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any, Literal

from msgspec import Struct

from tests.crashes.cluster import Cluster
from tests.crashes.verdict import Killed

PLACES = "POST /api/v1/orders"
LOOKS = "GET /api/v1/orders/by-client-id/*"
FORGIVING = {"kind": "duplicate-client-id"}
"""Most exchanges know a client order id only while its order is open: whoever sends an order twice has two."""

Spoil = tuple[str, dict[str, Any]]
SPOILS: tuple[Spoil, ...] = (
    ("execute-then-drop", {}),
    ("execute-then-drop", {}),
    ("drop", {"path": PLACES}),
    ("http-503", {"path": PLACES, "executed": True}),
    ("http-503", {"path": PLACES, "executed": False}),
    ("http-502-html", {"path": PLACES, "executed": True}),
    ("http-502-html", {"path": PLACES, "executed": False}),
    ("html-200", {"path": PLACES, "executed": True}),
    ("html-200", {"path": PLACES, "executed": False}),
    ("truncated-json", {"path": PLACES, "executed": True}),
    ("no-id", {}),
)
"""What makes an order's fate unclear at once."""
LOOK_UPS: tuple[Spoil, ...] = (("drop", {"path": LOOKS}), ("http-503", {"path": LOOKS}), ("html-200", {"path": LOOKS}))
"""What a look-up can meet."""

Action = Literal["kill", "stop"]
KILLED = {"nats": 3, "paper": 3, "sender": 4, "bridge-1": 1, "bridge-2": 1}
STOPPED = {"nats": 2, "paper": 2, "sender": 4, "bridge-1": 1, "bridge-2": 1}
"""Which part, and how often of all. sender: the worker that wrote the record."""


class Event(Struct, frozen=True):
    """One process event. after: so many records of this kind were written; delay_s: after that one. down_s: until it is started again,
    or continued."""

    action: Action
    part: str
    record: Literal["intent", "unknown"]
    after: int
    delay_s: float
    down_s: float


class Weather(Struct, frozen=True):
    """faults: of the exchange, as its control API takes them. forgiving: it takes a client order id twice."""

    faults: tuple[dict[str, Any], ...]
    forgiving: bool
    event: Event


def draw(rng: random.Random) -> Weather:
    """One or two faults, and one event; a kill mostly meets an exchange that is slow, so that orders are on their way."""
    action: Action = "kill" if rng.random() < 0.7 else "stop"
    parts = KILLED if action == "kill" else STOPPED
    faults = [_armed(rng.choice(SPOILS), rng.uniform(0.2, 0.5))]
    if rng.random() < 0.8 if action == "kill" else rng.random() < 0.3:
        faults.append(_slow(rng))
    if rng.random() < 0.3:
        faults.append({"kind": "stale-read", "seconds": round(rng.uniform(0.1, 0.35), 2)})
    if rng.random() < 0.25:
        faults.append(_armed(rng.choice(LOOK_UPS), 0.5))
    record: Literal["intent", "unknown"] = "intent" if rng.random() < 0.85 else "unknown"
    return Weather(
        faults=tuple(faults),
        forgiving=rng.random() < 0.8,
        event=Event(
            action=action,
            part=rng.choices(tuple(parts), tuple(parts.values()))[0],
            record=record,
            after=rng.randint(1, 8) if record == "intent" else 1,
            delay_s=rng.choice((0.0, rng.uniform(0, 0.005), rng.uniform(0, 0.005), rng.uniform(0.01, 0.3))),
            down_s=rng.uniform(0.0, 0.3) if action == "kill" else rng.uniform(0.2, 1.5),
        ),
    )


def _armed(spoil: Spoil, probability: float) -> dict[str, Any]:
    kind, fields = spoil
    return {"kind": kind, "probability": round(probability, 2)} | fields


def _slow(rng: random.Random) -> dict[str, Any]:
    seconds = round(rng.uniform(0.2, 0.6), 2)
    if rng.random() < 0.5:
        return {"kind": "latency", "path": PLACES, "seconds": seconds, "jitter": 0.1}
    return {"kind": "late-reply", "path": PLACES, "seconds": seconds, "jitter": 0.1}


async def arm(cluster: Cluster, weather: Weather) -> None:
    """Let the exchange misbehave from here on."""
    for fault in (*([FORGIVING] if weather.forgiving else []), *weather.faults):
        await cluster.control("POST", "/faults", fault)


async def clear(cluster: Cluster) -> None:
    await cluster.control("DELETE", "/faults")


class Strike:
    """The event of one case. killed: what it killed."""

    def __init__(self, cluster: Cluster, weather: Weather) -> None:
        self._cluster = cluster
        self._weather = weather
        self._moment: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run())
        self.killed: list[Killed] = []
        cluster.on_record = _counted(weather.event, self._moment)

    async def over(self) -> None:
        """Let it finish what it has begun; where its moment did not come, it does not happen."""
        self._cluster.on_record = None
        self._moment.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        sender = await self._moment
        event = self._weather.event
        if event.delay_s:
            await asyncio.sleep(event.delay_s)
        part = event.part
        if part == "sender":
            part = next((name for name in ("worker-1", "worker-2") if self._cluster.process(name) == sender), "worker-1")
        if event.action == "stop":
            self._cluster.parts[part].stop()
            await asyncio.sleep(event.down_s)
            self._cluster.parts[part].resume()
            return
        self.killed.append(await self._cluster.kill(part))
        await asyncio.sleep(event.down_s)
        await self._cluster.start_part(part)
        if part == "paper" and self._weather.forgiving:  # a restart disarms everything
            await self._cluster.control("POST", "/faults", FORGIVING)


def _counted(event: Event, moment: asyncio.Future[str]) -> Callable[[str, str], None]:
    left = event.after

    def heard(record: str, sender: str) -> None:
        nonlocal left
        left -= record == event.record
        if left <= 0 and not moment.done():
            moment.set_result(sender)

    return heard
