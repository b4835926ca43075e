"""A cluster of three nats-servers with replicas 3: losing one costs nothing, losing the quorum stops orders and never a cancel."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import nats
import pytest

from bus import seal, server, subjects
from bus.config import Orders, environment
from bus.connection import connected
from bus.journal import Held, Journal, Outcome
from bus.streams import Duplicate
from tests import paper, servers
from tests.host import Host, hosting
from tests.servers import Running
from tests.test_journal import intent as one_intent

pytestmark = pytest.mark.slow

NODES = 3
AGAIN_S = 30
"""Within that a cluster has chosen new leaders, on a busy machine too."""


def config(folder: Path, number: int, clients: list[int], routes: list[int]) -> Path:
    users = [
        {"user": role, "password": "p", "permissions": {"publish": {"allow": publish}, "subscribe": {"allow": subscribe}}}
        for role, (publish, subscribe) in server.ROLES.items()
    ]
    settings: dict[str, Any] = {
        "server_name": f"n{number}",
        "listen": f"127.0.0.1:{clients[number]}",
        "max_payload": 8 << 20,
        "jetstream": {"store_dir": str(folder / f"store-{number}"), "sync_interval": "always"},
        "cluster": {"name": "c", "listen": f"127.0.0.1:{routes[number]}", "routes": [f"nats://127.0.0.1:{port}" for port in routes]},
        "authorization": {"users": users},
    }
    path = folder / f"n{number}.conf"
    path.write_bytes(msgspec.json.encode(settings))
    return path


class Cluster:
    def __init__(self, clients: list[int], nodes: list[Running], commands: list[tuple[str, ...]], stack: AsyncExitStack) -> None:
        self._clients = clients
        self._nodes = nodes
        self._commands = commands
        self._stack = stack

    def url(self, role: str) -> str:
        return ",".join(f"nats://{role}:p@127.0.0.1:{port}" for port in self._clients)

    async def leader(self, stream: str) -> int:
        """The number of the node that leads it; waits for one."""
        async with asyncio.timeout(AGAIN_S):
            while True:
                nc = await nats.connect(self.url("operator").split(","))
                try:
                    info = await nc.jetstream(timeout=2).stream_info(stream)
                    if info.cluster and info.cluster.leader:
                        assert info.config.num_replicas == NODES
                        return int(info.cluster.leader[1:])
                except (nats.errors.Error, nats.js.errors.Error, TimeoutError):
                    pass
                finally:
                    await nc.close()

    async def kill(self, number: int) -> None:
        await self._nodes[number].stop(9)

    async def start(self, number: int) -> None:
        self._nodes[number] = await self._stack.enter_async_context(servers.running(*self._commands[number]))


@asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[Cluster]:
    binary = server.binary()
    assert binary
    clients, routes = ([server.free_port() for _ in range(NODES)] for _ in range(2))
    commands: list[tuple[str, ...]] = [(binary, "-c", str(config(folder, number, clients, routes))) for number in range(NODES)]
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(servers.running(*command)) for command in commands]
        for node in nodes:
            await node.said("Server is ready")
        made = Cluster(clients, nodes, commands, stack)
        await nodes[0].said("JetStream cluster (new )?metadata leader", AGAIN_S)
        yield made


async def placed(host: Host, amount: str) -> dict[str, Any]:
    """Trade until the exchange has it; whatever comes before says that nothing was placed."""
    async with asyncio.timeout(AGAIN_S):
        while True:
            reply = await host("paper", "trade", symbol="BTC_USDT", type="buy", price="1000", amount=amount)
            if "data" in reply:
                return reply
            assert reply["error"].startswith(("network", "timeout")), reply


async def one_of_many_begins(nodes: Cluster) -> None:
    """A cluster that is about to write one record says of another only that it cannot tell yet."""
    async with connected(nodes.url("worker"), "worker", closed=lambda: None) as bus:
        journal, intent = Journal(bus, Orders(), NODES), one_intent()
        begun = await asyncio.gather(*(journal.begin(intent, b"") for _ in range(30)), return_exceptions=True)
        (held,) = [one for one in begun if not isinstance(one, Duplicate)]
        assert isinstance(held, Held), held
        outcomes = [Outcome(state="refused", message=str(number)) for number in range(30)]
        assert len({one.message for one in await asyncio.gather(*(journal.finish(held, outcome) for outcome in outcomes))}) == 1
        await journal.told(held)


async def test_a_cluster_that_loses_a_node_trades_on_and_one_without_a_quorum_cancels_on(tmp_path: Path) -> None:
    seal.new_keys(tmp_path / "keys")
    async with AsyncExitStack() as stack:
        exchange = await stack.enter_async_context(paper.exchange(tmp_path / "paper", time.time))
        nodes = await stack.enter_async_context(cluster(tmp_path))
        common: dict[str, object] = {"state": tmp_path, "venues__paper__base_url": exchange.base, "nats__replicas": NODES}
        worker = await stack.enter_async_context(
            servers.running(sys.executable, "-m", "workers", env=environment(nats__url=nodes.url("worker"), **common))
        )
        bridge = await stack.enter_async_context(
            servers.running(sys.executable, "-m", "bridge", env=environment(nats__url=nodes.url("bridge"), bridge__port=0, **common))
        )
        await worker.said('"event":"ready"', AGAIN_S)
        address = (await bridge.said(r'"event":"ready","address":"([^"]+)"', AGAIN_S))[1]
        host = await stack.enter_async_context(hosting(address))

        first = (await placed(host, "0.01"))["data"]["id"]
        await one_of_many_begins(nodes)
        leader = await nodes.leader(subjects.JOURNAL)
        await nodes.kill(leader)
        second = (await placed(host, "0.02"))["data"]["id"]

        await nodes.kill(await nodes.leader(subjects.JOURNAL))
        async with asyncio.timeout(AGAIN_S):  # the bridge and the worker find the node that is left
            while (reply := await host("paper", "cancel", symbol="BTC_USDT", id=first)).get("data") is not True:
                assert reply["error"].startswith(("network", "timeout")), reply
        refused = await host("paper", "trade", symbol="BTC_USDT", type="buy", price="1000", amount="0.03")
        assert refused["error"].startswith("network: ")
        assert (await host("paper", "cancel", symbol="BTC_USDT", id=second))["data"] is True

        await nodes.start(leader)
        third = (await placed(host, "0.03"))["data"]["id"]
        assert [row["id"] for row in (await host("paper", "orders"))["data"]] == [third]
