"""The whole system with market data that flow: the stand-in exchange, one bridge, one worker, one feeder."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

from tests import servers
from tests.bench.exchange import Channel, Told
from tests.bench.measure import Failed
from tests.bench.watch import question

NAME = "stand"
FRESH_S = 30.0
"""Within so long everything that is asked for is to be answered from the cache."""
AT_ONCE = 16
TRACE = {"Fmzbus-Trace": "1"}


def symbols(count: int) -> list[str]:
    return [f"S{number:04}_USDT" for number in range(count)]


class Answer(Struct, frozen=True):
    """result: where it came from, as the bridge says: "hit" is the cache."""

    content: bytes
    result: str


class Rig:
    """address: where hosts POST; exchange: where the stand-in exchange is."""

    def __init__(self, system: servers.System, exchange: servers.Running, url: str, session: aiohttp.ClientSession) -> None:
        self.system = system
        self.address = f"{system.address}/{NAME}"
        self.pids = {"exchange": exchange.process.pid} | {name.partition("-")[0]: pid for name, pid in system.pids.items()}
        self._exchange = url
        self._session = session

    async def _get(self, url: str) -> bytes:
        async with self._session.get(url) as response:
            return await response.read()

    async def flow(self, rate: float) -> None:
        """So many updates a second from now on."""
        await self._get(f"{self._exchange}/flow?rate={rate}")

    async def told(self) -> Told:
        return msgspec.json.decode(await self._get(f"{self._exchange}/told"), type=Told)

    async def ask(self, channel: Channel) -> Answer:
        async with self._session.post(self.address, data=question(*channel), headers=TRACE) as response:
            return Answer(await response.read(), response.headers.get("Fmzbus-Cache", ""))

    async def ask_all(self, channels: Sequence[Channel]) -> dict[Channel, Answer]:
        answers: list[Answer] = []
        for begin in range(0, len(channels), AT_ONCE):
            answers += await asyncio.gather(*map(self.ask, channels[begin : begin + AT_ONCE]))
        return dict(zip(channels, answers, strict=True))

    async def counted(self, process: str, name: str, **labels: str) -> float:
        """A metric of a process, the sum over its children that have these labels: counted("feeder", "fmzbus_feed_frames_total")."""
        text = (await self._get(f"{self.system.admin(f'{process}-1')}/metrics")).decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    async def cached(self, channels: Iterable[Channel]) -> None:
        """Ask for each until its answer comes from the cache, so that all of them are fed and followed. Raises Failed."""
        waiting, until_s = list(channels), time.monotonic() + FRESH_S
        while waiting:
            if time.monotonic() > until_s:
                raise Failed(f"{len(waiting)} channels are not answered from the cache after {FRESH_S:g} s, among them {waiting[0]}")
            for channel, answer in (await self.ask_all(waiting)).items():
                if not answer.content.startswith(b'{"data"'):
                    raise Failed(f"{channel} is answered with {answer.content[:200].decode(errors='replace')}")
                if answer.result == "hit":
                    waiting.remove(channel)


@asynccontextmanager
async def rigged(state: Path) -> AsyncIterator[Rig]:
    async with servers.running(sys.executable, "-m", "tests.bench.exchange") as exchange:
        url = (await exchange.said(r"(?m)^ready (\S+)"))[1]
        venue = {f"venues__{NAME}__class": "tests.bench.stand:Stand", f"venues__{NAME}__base_url": url}
        one_each = ("--bridges", "1", "--workers", "1", "--feeders", "1")
        settings = venue | {"paper__enabled": "false", "market__unused_s": "3600"}
        async with servers.system(state, *one_each, **settings) as system, aiohttp.ClientSession() as session:
            yield Rig(system, exchange, url, session)
