"""A small cluster under the checker's control: nats-server, a worker, two bridges and up to two feeders, each by its pid; the exchange
is in this process, and hosts poll all the time.

bridge-2 reaches the bus over a wire that can lose messages. Nobody supervises the processes but the checker.
"""

import asyncio
import contextlib
import itertools
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from bus import seal, server
from bus.config import environment
from bus.lifecycle import running
from tests.crashes.cluster import PORTS, READY_S, Part
from tests.freshness import hosts
from tests.freshness.truth import Market, exchange
from tests.freshness.verdict import HIT, Seen
from tests.freshness.wire import Wire, wire
from tests.servers import get

MAX_AGE_S = 1.5
DEADLINE_S = 3.0
AUDITS_A_S = 4.0
BRIDGES = ("bridge-1", "bridge-2")
FEEDERS = ("feeder-1", "feeder-2")
PARTS = ("nats", "worker-1", *BRIDGES, *FEEDERS)
WIRED = "bridge-2"
MODULES = {"worker": "workers", "bridge": "bridge", "feeder": "workers.feeder"}

Host = tuple[str, str, str]
"""(bridge, kind, symbol)"""


class Cluster:
    """market: the exchange. seen: what hosts were answered since somebody last emptied it. addresses: where hosts POST, by bridge; a test
    may put something between."""

    def __init__(self, state: Path, market: Market) -> None:
        self.state = state
        self.market = market
        self.parts: dict[str, Part] = {}
        self.addresses: dict[str, str] = {}
        self.seen: list[Seen] = []
        self.wire: Wire
        self._commands: dict[str, tuple[list[str], dict[str, str]]] = {}
        self._pids: dict[str, int] = {}
        self._told_by = ""
        self._told_s = 0.0
        self._port = 0
        self._ports = _ports()

    # ---------------------------------------------------------------- processes

    def prepare(self) -> None:
        """Folders, keys, ports; what each part is started with. wire must be there."""
        (self.state / "logs").mkdir(parents=True, exist_ok=True)
        common: dict[str, object] = {
            "state": self.state,
            "venues__paper__base_url": self.market.base,
            "bridge__deadline_s": DEADLINE_S,
            "workers__exchanges": '["paper"]',
            "market__exchanges": '["paper"]',
            "market__max_age_s__ticker": MAX_AGE_S,
            "market__max_age_s__depth": MAX_AGE_S,
            "market__audits_per_s": AUDITS_A_S,
        }
        self._add("nats", server.command(self.state), dict(os.environ))
        for name in PARTS[1:]:
            role = name.partition("-")[0]
            url = server.url(self.state, role)
            own = common | {"nats__url": url.replace(f":{self._port}", f":{self.wire.port}") if name == WIRED else url}
            if role == "bridge":
                own["bridge__port"] = next(self._ports)
                self.addresses[name] = f"http://127.0.0.1:{own['bridge__port']}"
            self._add(name, [sys.executable, "-W", "error", "-m", MODULES[role]], environment(**own))

    def choose_ports(self) -> int:
        """Of nats-server, kept while it is down. -> where it listens to clients."""
        (self.state / "nats").mkdir(parents=True, mode=0o700)
        seal.new_keys(self.state / "keys")
        chosen = server.Settings(next(self._ports), next(self._ports), {})
        (self.state / "nats" / "settings.json").write_bytes(msgspec.json.encode(chosen))
        self._port = chosen.port
        return chosen.port

    def _add(self, name: str, command: list[str], env: dict[str, str]) -> None:
        self._commands[name] = command, env
        self.parts[name] = Part(name, command, env, self.state / "logs" / f"{name}.out")

    async def start(self, name: str, *, ahead_s: float = 0.0) -> None:
        """Start it, if it does not run, and wait until it is ready. ahead_s: by how much its clocks are to differ from this machine's."""
        part = self.parts[name]
        if not part.alive:
            command, env = self._commands[name]
            if ahead_s:
                command = [*command[:-1], "tests.freshness.shifted", str(ahead_s), command[-1]]
            part = self.parts[name] = Part(name, command, env, part.output)
            await part.start()
        if name == "nats":
            await server.wait_ready(self.state)
        else:
            await part.ready()

    async def restart(self, name: str, *, ahead_s: float = 0.0) -> None:
        await self.parts[name].kill()
        await self.start(name, ahead_s=ahead_s)

    async def feeders(self, count: int) -> None:
        """So many of them run, and no more."""
        for name in FEEDERS[count:]:
            await self.parts[name].kill()
        await asyncio.gather(*(self.start(name) for name in FEEDERS[:count]))

    async def feeding(self) -> str:
        """Which of the feeders tells now, "feeder-1"; where there is one only, that one."""
        asked_s = time.monotonic()
        async with asyncio.timeout(READY_S):
            while True:
                alive = [name for name in FEEDERS if self.parts[name].alive]
                pid = self._pids.get(self._told_by) if self._told_s > asked_s else None
                if found := [name for name in alive if self.parts[name].pid == pid]:
                    return found[0]
                await asyncio.sleep(0.02)

    async def metric(self, name: str, of: str) -> float:
        """What a part counts by itself."""
        admins = re.findall(r'"admin":"([^"]+)"', self.parts[of].output.read_text(errors="replace"))
        found = re.search(rf"^{name} (\S+)$", await get(f"http://{admins[-1]}/metrics"), re.M)
        assert found, f"{of} has no metric {name}"
        return float(found[1])

    async def end(self) -> None:
        for part in self.parts.values():
            await part.kill()

    # ---------------------------------------------------------------- who tells

    async def _heard_presence(self, message: Msg) -> None:
        presence = msgspec.json.decode(message.data)
        self._pids[presence["process"]] = presence["pid"]

    async def _heard_beat(self, message: Msg) -> None:
        self._told_by, self._told_s = msgspec.json.decode(message.data)["feeder"], time.monotonic()

    async def listen(self, nc: Client) -> None:
        await nc.subscribe("fleet.feeder.*", cb=self._heard_presence)
        await nc.subscribe("beat.paper.*", cb=self._heard_beat)
        await nc.flush()

    # ---------------------------------------------------------------- hosts

    async def served(self, after_s: float, within_s: float, bridges: tuple[str, ...] = BRIDGES) -> float | None:
        """Wait until each host of these bridges has had a hit for something asked after that moment. -> how long after it the last one
        did, None where not all of them did in time."""
        waiting = {(one.bridge, one.kind, one.symbol) for one in hosts.questions(bridges)}
        read = 0
        last_s = after_s
        while waiting and time.monotonic() < after_s + within_s:
            for one in itertools.islice(self.seen, read, None):
                read += 1
                host: Host = one.bridge, one.kind, one.symbol
                if one.source == HIT and one.asked_s >= after_s and host in waiting and b'{"data"' in one.content[:8]:
                    waiting.discard(host)
                    last_s = one.answered_s
            await asyncio.sleep(0.02)
        return None if waiting else last_s - after_s

    def logs(self) -> str:
        """The last words of each part, for whoever has to understand why the cluster did not come up."""
        return "\n".join(f"{name}: {part.output.read_text(errors='replace')[-1500:]}" for name, part in self.parts.items())


def _ports() -> Iterator[int]:
    """Free ports below those that the kernel gives to outgoing connections: one of those could take a port while its owner is down."""
    begin = PORTS[0] + (os.getpid() * 31 + 7) % (PORTS[1] - PORTS[0])
    return (port for port in itertools.chain(range(begin, PORTS[1]), range(PORTS[0], begin)) if server.is_free(port))


Between = Callable[[dict[str, str]], contextlib.AbstractAsyncContextManager[dict[str, str]]]
"""Addresses of the bridges -> addresses that hosts are to ask instead."""


@asynccontextmanager
async def _as_they_are(addresses: dict[str, str]) -> AsyncIterator[dict[str, str]]:
    yield addresses


@asynccontextmanager
async def clustered(folder: Path, seed: int, *, feeders: int = 2, between: Between = _as_they_are) -> AsyncIterator[Cluster]:
    """A cluster for the life of many cases, with hosts that poll."""

    async def quiet(_error: Exception) -> None:
        """The bus goes away many times here."""

    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        cluster = Cluster(folder / "c", await enter(exchange(folder / "exchange", seed)))
        stack.push_async_callback(cluster.end)
        cluster.wire = await enter(wire(cluster.choose_ports()))
        cluster.prepare()
        await cluster.start("nats")
        await asyncio.gather(*(cluster.start(name) for name in PARTS[1 : 4 + feeders]))
        url = server.url(cluster.state, "operator")
        nc = await nats.connect(url, max_reconnect_attempts=-1, reconnect_time_wait=0.05, connect_timeout=1, error_cb=quiet)
        stack.push_async_callback(nc.close)
        await cluster.listen(nc)
        cluster.addresses = await enter(between(cluster.addresses))
        questions = hosts.questions(BRIDGES)
        await enter(running(*(hosts.poll(cluster.addresses[one.bridge], one, cluster.seen.append) for one in questions)))
        yield cluster
