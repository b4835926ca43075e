"""What is done to a cluster in each case: every fault of the exchange that can touch public reads, and what happens to processes, the bus
and single messages.

An act ends when everything is repaired, and says how often its fault struck, None where that cannot be counted. It raises Unmet where
something else was not as it must be.
"""

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine
from typing import Any

from msgspec import Struct

from tests.freshness import hosts
from tests.freshness.cluster import BRIDGES, FEEDERS, MAX_AGE_S, WIRED, Cluster
from tests.freshness.verdict import HIT
from tests.freshness.wire import FINE, Treat, Treated
from workers.venues.paper.faults import KINDS

TIMED = ("rate-limit", "ban", "maintenance")
"""Faults that tell when they end."""
READS = "GET *"
"""Every public read, the audits and the handshake of the sockets among them."""
EVERY_SOCKET = "/ws/v1"
NOT_OF_READS = ("no-id", "duplicate-client-id", "stale-read")
"""Faults that change nothing but what is asked about orders."""
SOCKETS = tuple(kind for kind, one in KINDS.items() if one.socket)
REQUESTS = tuple(kind for kind, one in KINDS.items() if not one.socket and kind not in NOT_OF_READS)

MOST_PAUSE_S = 6.0
"""More than a feeder pauses before it opens a socket anew."""
REPLACED_S = 3.0
"""A feeder that is dead or hangs is replaced by then."""
STOPPED_S = 4.0
GONE_S = 10.0
APART_S = 3.0
LATE_S = 2.0
BURST = 100
"""More copies than may wait in a subscription."""
NOT_READ = "fmzbus_feed_not_read"
ONE_KEY = "feed.paper.depth.BTC_USDT"
ROBOTS = 6

Act = Callable[[Cluster, float], Coroutine[None, None, int | None]]
"""(cluster, for how many seconds) -> how often it struck."""


class Unmet(Exception):
    """The text says what."""


class Case(Struct, frozen=True):
    """feeders: how many run. again_s: all hosts must have been served from the cache again so long after the act; most of it is the
    pause of a feeder whose sockets ended again and again."""

    act: Act
    feeders: int = 1
    again_s: float = 7.0


# ---------------------------------------------------------------- the exchange misbehaves

SPOILT: dict[str, dict[str, Any]] = {
    # Sound messages between the spoilt ones: what is built from both is the danger.
    "book-gap": {"probability": 0.3},
    "bad-checksum": {"probability": 0.3},
    "crossed-book": {"probability": 0.3},
    "stall": {"seconds": MAX_AGE_S + 1.5},
    "slow-socket": {"seconds": MAX_AGE_S + 0.5, "jitter": 0.5},
    "socket-cut": {"probability": 0.1},
    "stale-snapshot": {"seconds": MAX_AGE_S + 1.5},
    "latency": {"seconds": 0.5, "jitter": 0.4},
    "late-reply": {"seconds": 1.5, "jitter": 1.4},
    "execute-then-drop": {"probability": 0.7},
    "drop": {"probability": 0.7},
    "http-503": {"probability": 0.7},
    "http-502-html": {"probability": 0.7},
    "html-200": {"probability": 0.7},
    "truncated-json": {"probability": 0.7},
    "rate-limit": {"probability": 0.7},
    "clock-skew": {"seconds": 30.0},
}


async def spoil(kind: str, cluster: Cluster, for_s: float) -> int:
    """A fault of the exchange; the sockets break down besides, so that all has to begin anew while it lasts."""
    market = cluster.market
    socket = KINDS[kind].socket
    if kind in ("stall", "slow-socket"):
        for_s = max(for_s, MAX_AGE_S + 1)
    market.arm(kind=kind, path=EVERY_SOCKET if socket else READS, for_s=for_s if kind in TIMED else None, **SPOILT.get(kind, {}))
    struck = 0
    ends_s = time.monotonic() + for_s
    cut = kind == "stale-snapshot" or not socket
    while (left_s := ends_s - time.monotonic()) > 0 or (not struck and left_s > -MOST_PAUSE_S):
        if cut and left_s < for_s * 0.8:
            market.arm(kind="socket-cut", path=EVERY_SOCKET, count=1)
            cut = False
        struck = max(struck, market.struck(kind))
        await asyncio.sleep(0.05)
    market.faults.clear()
    return struck


async def set_clock(by_s: float, cluster: Cluster, for_s: float) -> None:
    """The exchange's own clock is set while its sockets are open."""
    cluster.market.ahead_s += by_s
    await asyncio.sleep(for_s)


async def other_clock(by_s: float, cluster: Cluster, for_s: float) -> None:
    """An exchange whose clock was never ours: nothing in the feeder remembers another."""
    await cluster.parts["feeder-1"].kill()
    cluster.market.ahead_s += by_s
    await cluster.start("feeder-1")
    await cluster.served(time.monotonic(), 5)
    await asyncio.sleep(for_s)


# ---------------------------------------------------------------- processes


async def kill_feeder(cluster: Cluster, for_s: float) -> None:
    """The one that tells; where it is the only one, it is started again."""
    name = await cluster.feeding()
    await cluster.parts[name].kill()
    if any(cluster.parts[one].alive for one in FEEDERS):
        await replaced(cluster, name)
    else:
        await asyncio.sleep(for_s)
        await cluster.start(name)


async def stop_feeder(cluster: Cluster, _for_s: float) -> None:
    """It stands still, and goes on as if nothing had been: alone, or while another one has taken over."""
    name, ends_s = await cluster.feeding(), time.monotonic() + STOPPED_S
    cluster.parts[name].stop()
    if sum(cluster.parts[one].alive for one in FEEDERS) > 1:
        await replaced(cluster, name)
    await asyncio.sleep(ends_s - time.monotonic())
    cluster.parts[name].resume()


async def replaced(cluster: Cluster, name: str) -> None:
    """Wait until another feeder tells what that one told. Raises Unmet."""
    try:
        async with asyncio.timeout(REPLACED_S):
            while await cluster.feeding() == name:
                pass
    except TimeoutError:
        raise Unmet(f"{name} was not replaced within {REPLACED_S:g} s") from None


async def start_feeders_at_once(cluster: Cluster, for_s: float) -> None:
    """Both claim everything in the same moment."""
    for name in FEEDERS:
        await cluster.parts[name].kill()
    await asyncio.gather(*(cluster.start(name) for name in FEEDERS))
    await asyncio.sleep(for_s)


async def stop_bridge(cluster: Cluster, _for_s: float) -> None:
    part = cluster.parts["bridge-1"]
    part.stop()
    await asyncio.sleep(STOPPED_S)
    part.resume()


async def unfed(cluster: Cluster, for_s: float) -> int:
    """No feeder at all: what bridges pass on to each other arrives late at one; then it lies in the socket of the other, which stands
    still."""
    await cluster.parts["feeder-1"].kill()
    late_ones = await on_the_wire(late, cluster, for_s)
    cluster.parts["bridge-1"].stop()
    await asyncio.sleep(MAX_AGE_S + 1)
    cluster.parts["bridge-1"].resume()
    await asyncio.sleep(for_s / 4)
    await cluster.start("feeder-1")
    return late_ones


async def late_bridge(cluster: Cluster, for_s: float) -> None:
    """A bridge that begins when all others have been at it for long."""
    await cluster.parts["bridge-1"].kill()
    await asyncio.sleep(for_s)
    await cluster.start("bridge-1")


async def apart(cluster: Cluster, for_s: float) -> int:
    """A bridge ahead, a feeder behind: no two clocks agree. -> how often that bridge answered from the cache meanwhile."""
    await asyncio.gather(cluster.restart("bridge-1", ahead_s=APART_S), cluster.restart("feeder-1", ahead_s=-APART_S))
    since_s = time.monotonic()
    await cluster.served(since_s, 5)
    await asyncio.sleep(for_s)
    hits = sum(one.source == HIT and one.bridge == "bridge-1" and one.asked_s > since_s for one in cluster.seen)
    await asyncio.gather(cluster.restart("bridge-1"), cluster.restart("feeder-1"))
    return hits


# ---------------------------------------------------------------- the bus


async def restart_bus(down_s: float, cluster: Cluster, _for_s: float) -> None:
    await cluster.parts["nats"].kill()
    await asyncio.sleep(down_s)
    await cluster.start("nats")


async def stop_bus(cluster: Cluster, _for_s: float) -> None:
    cluster.parts["nats"].stop()
    await asyncio.sleep(STOPPED_S)
    cluster.parts["nats"].resume()


async def on_the_wire(treat: Treat, cluster: Cluster, for_s: float) -> int:
    """Something becomes of messages on their way to bridge-2."""
    wire = cluster.wire
    wire.lost = wire.repeated = wire.late = 0
    wire.treat = treat
    # So long that what began before is too old; and of what is late, some must arrive while all else is late, too.
    await asyncio.sleep(max(for_s, MAX_AGE_S + 1.5) + (LATE_S if treat is late else 0))
    wire.treat = None
    return wire.lost + wire.repeated + wire.late


def every(nth: int, *words: str) -> Treat:
    """Lose each nth message of subjects that begin so."""
    count = 0

    def treat(subject: str) -> Treated:
        nonlocal count
        if not subject.startswith(words):
            return FINE
        count += 1
        return Treated(copies=0) if count % nth == 0 else FINE

    return treat


def all_of(word: str) -> Treat:
    return lambda subject: Treated(copies=0) if subject.startswith(word) else FINE


def late(subject: str) -> Treated:
    """As over a connection whose buffers are full: all of it arrives, long after it was true."""
    return Treated(delay_s=LATE_S) if subject.startswith(("feed.", "beat.", "shared.")) else FINE


def floods(subject: str) -> Treated:
    return Treated(copies=BURST) if subject.startswith("feed.") else FINE


async def flood(cluster: Cluster, for_s: float) -> int:
    """More than a subscription holds, while the bridge stands still: nats-py drops the newest. -> how many, as the bridge counts them."""
    before = await cluster.metric(NOT_READ, WIRED)
    cluster.wire.treat = floods
    for _ in range(3):
        cluster.parts[WIRED].stop()
        await asyncio.sleep(for_s / 4)
        cluster.parts[WIRED].resume()
        await asyncio.sleep(for_s / 4)
    cluster.wire.treat = None
    return int(await cluster.metric(NOT_READ, WIRED) - before)


async def stall_wire(cluster: Cluster, for_s: float) -> None:
    """Nothing comes through to bridge-2 for a while, then all of it at once, in order: a network, not a process, that stood still."""
    for part in (2, 6, 6):
        cluster.wire.flows.clear()
        await asyncio.sleep(MAX_AGE_S * part / 3)
        cluster.wire.flows.set()
        await asyncio.sleep(for_s / 10)


# ---------------------------------------------------------------- robots


async def swap_sessions(trouble: Act | None, cluster: Cluster, for_s: float) -> int:
    """Robots set their contract, and ask for the bare symbol right behind it, while there is trouble."""
    addresses = {name: cluster.addresses[name] for name in BRIDGES}
    until_s = time.monotonic() + for_s + 1
    async with asyncio.TaskGroup() as group:
        if trouble is not None:
            until_s += for_s
            group.create_task(trouble(cluster, for_s))
        robots = [group.create_task(hosts.flip(addresses, robot, cluster.seen.append, until_s)) for robot in range(ROBOTS)]
    return sum(robot.result() for robot in robots)


async def stop_briefly(cluster: Cluster, for_s: float) -> None:
    """A bridge stands still for a little less and a little more than a change of contract waits for it."""
    part = cluster.parts["bridge-1"]
    for seconds in (MAX_AGE_S * 2 / 3, MAX_AGE_S * 4 / 3):
        part.stop()
        await asyncio.sleep(seconds)
        part.resume()
        await asyncio.sleep(for_s / 4)


CASES: dict[str, Case] = {
    **{kind: Case(functools.partial(spoil, kind)) for kind in (*SOCKETS, *REQUESTS)},
    "clock-ahead": Case(functools.partial(other_clock, APART_S)),
    "clock-behind": Case(functools.partial(other_clock, -2 * APART_S)),
    "clock-set": Case(functools.partial(set_clock, APART_S)),
    "clock-set-back": Case(functools.partial(set_clock, -APART_S)),
    "lost-values": Case(functools.partial(on_the_wire, every(3, "feed."))),
    "lost-key": Case(functools.partial(on_the_wire, all_of(ONE_KEY))),
    "lost-beats": Case(functools.partial(on_the_wire, every(2, "beat."))),
    "no-beats": Case(functools.partial(on_the_wire, all_of("beat."))),
    "late-feed": Case(functools.partial(on_the_wire, late)),
    "full-subscription": Case(flood),
    "wire-stalled": Case(stall_wire),
    "swap-session": Case(functools.partial(swap_sessions, None)),
    "swap-session-loss": Case(functools.partial(swap_sessions, functools.partial(on_the_wire, every(3, "feed.", "beat.", "sessions.")))),
    "swap-session-stalled": Case(functools.partial(swap_sessions, stall_wire)),
    "swap-session-stopped": Case(functools.partial(swap_sessions, stop_briefly)),
    "bridge-stopped": Case(stop_bridge),
    "bridge-late": Case(late_bridge),
    "unfed": Case(unfed),
    "feeder-killed-alone": Case(kill_feeder, again_s=6),
    "feeder-stopped-alone": Case(stop_feeder),
    "nats-restart": Case(functools.partial(restart_bus, 0.0), again_s=6),
    "nats-stopped": Case(stop_bus, again_s=6),
    "nats-gone": Case(functools.partial(restart_bus, GONE_S), again_s=6),
    "clocks-apart": Case(apart, again_s=6),
    "feeder-killed": Case(kill_feeder, feeders=2, again_s=5),
    "feeder-stopped": Case(stop_feeder, feeders=2),
    "two-feeders": Case(start_feeders_at_once, feeders=2),
}
