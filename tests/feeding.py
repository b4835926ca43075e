"""A feeder driven by hand: tells values, beats and withdrawals on a real bus as bus/market.py says, when the test wants it."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from nats.aio.msg import Msg

from bus import fleet, market, server, subjects
from bus.connection import Bus, connected
from bus.lifecycle import running
from bus.market import BEAT_S, HEADER, Beat, Proof, Wish
from tests.servers import eventually

KINDS = ["ticker", "depth", "trades", "candles"]


def ticker(last: str, symbol: str = "BTC_USDT") -> bytes:
    """The data of a ticker as feeders tell it."""
    numbers = ",".join(f'"{name}":{last}' for name in ("buy", "sell", "last", "high", "low", "vol"))
    return f'{{"time":1700000000000,{numbers},"symbol":"{symbol}"}}'.encode()


def depth(price: int, levels: int = 20) -> bytes:
    """The data of a depth: so many levels a side, around a price."""
    asks = [[price + 1 + level, 0.5] for level in range(levels)]
    bids = [[price - 1 - level, 0.5] for level in range(levels)]
    return msgspec.json.encode({"time": 1_700_000_000_000, "asks": asks, "bids": bids})


class Feeder:
    """One shard of one exchange. wished: what followers asked for; lost: what they asked for once more; heard: their newest ticks.

    echoes: False where its beats shall answer no tick.
    """

    def __init__(self, bus: Bus, exchange: str, shard: int, epoch: int) -> None:
        self._bus = bus
        self.exchange = exchange
        self.shard = shard
        self.epoch = epoch
        self.n = self.number = 0
        self.told: dict[str, int] = {}
        self.heard: dict[str, int] = {}
        self.wants_whole = False
        self.wished: dict[str, set[tuple[str, str]]] = {}
        self.lost: list[tuple[str, str]] = []
        self.echoes = True

    async def hear_tick(self, message: Msg) -> None:
        tick_ms, whole = market.read_tick(message.data)
        self.heard[message.subject.rpartition(".")[2]] = tick_ms
        self.wants_whole = self.wants_whole or whole

    async def hear_wish(self, message: Msg) -> None:
        wish: Wish = market.decode_wish(message.data)
        if wish.whole:
            self.wished[wish.follower] = set()
        self.wished.setdefault(wish.follower, set()).update(wish.keys)
        self.lost += wish.lost

    def replaced(self) -> None:
        """Go on as a feeder of the next epoch would: nothing told, nothing listed."""
        self.epoch += 1
        self.n = self.number = 0
        self.told = {}

    async def value(self, kind: str, symbol: str, data: bytes, *, age_ms: int = 0, lost: bool = False) -> int:
        """Tell a value, or lose it on the way. -> its n."""
        return await self._send(kind, symbol, market.reply(data), age_ms, lost=lost)

    async def withdraw(self, kind: str, symbol: str, why: str = "gap") -> int:
        return await self._send(kind, symbol, market.withdrawal(why), market.WITHDRAWN, lost=False)

    async def again(self, kind: str, symbol: str, data: bytes, n: int) -> None:
        """Tell a value a second time, under the number it has."""
        await self._publish(kind, symbol, market.reply(data), Proof(self.epoch, n, 0, self.shard))

    async def _send(self, kind: str, symbol: str, content: bytes, age_ms: int, *, lost: bool) -> int:
        self.n += 1
        self.told[market.key(kind, symbol)] = self.n
        if not lost:
            await self._publish(kind, symbol, content, Proof(self.epoch, self.n, age_ms, self.shard))
        return self.n

    async def _publish(self, kind: str, symbol: str, content: bytes, proof: Proof) -> None:
        await self._bus.nc.publish(subjects.feed(self.exchange, kind, symbol), content, headers={HEADER: proof.header()})

    async def beat(
        self, proven: Iterable[tuple[str, str]] = (), *, age_ms: int = 0, whole: bool = False, lost: bool = False, leaving: bool = False
    ) -> None:
        """Prove (kind, symbol) pairs, all that was told with whole. lost: nobody hears it."""
        self.number += 1
        names = list(self.told) if whole else [market.key(*pair) for pair in proven]
        beat = Beat(
            feeder=self._bus.process,
            epoch=self.epoch,
            number=self.number,
            top=self.n,
            whole=whole,
            leaving=leaving,
            keys={name: (self.told[name], age_ms) for name in names},
            heard=dict(self.heard) if self.echoes else {},
        )
        if not lost:
            await self._bus.nc.publish(subjects.beat(self.exchange, self.shard), market.encode(beat))

    async def wish(self, kind: str, symbol: str, within_s: float = 10) -> None:
        """Wait until somebody wishes it."""
        await eventually(lambda: any((kind, symbol) in keys for keys in self.wished.values()), within_s)

    async def ticked(self) -> None:
        """Wait until each follower has sent one more tick."""
        before = dict(self.heard)
        await eventually(lambda: self.heard and all(self.heard[one] > tick for one, tick in before.items()))

    async def beating(self, every_s: float = BEAT_S) -> None:
        """Prove everything, again and again."""
        while True:
            await self.beat(whole=True)
            await asyncio.sleep(every_s)


@asynccontextmanager
async def feeder(
    state: Path, exchange: str = "paper", *, shard: int = 0, epoch: int = 1, kinds: list[str] = KINDS
) -> AsyncIterator[Feeder]:
    """A feeder on the embedded bus of this state folder, with a feeder's rights; stream MARKET is there."""
    async with connected(server.url(state, "feeder"), "feeder", closed=lambda: None) as bus:
        one = Feeder(bus, exchange, shard, epoch)
        await bus.nc.jetstream().add_stream(market.stream(1, 3600))
        await bus.nc.subscribe(subjects.tick("*"), cb=one.hear_tick)
        await bus.nc.subscribe(subjects.wish(exchange), cb=one.hear_wish)
        await bus.nc.publish(subjects.WISH_CALL)
        offered = {exchange: fleet.Feed(kinds=kinds, shards=[shard])}
        async with fleet.announced(bus, admin="", version="test", feeds=lambda: offered, ready=lambda: True):
            await bus.nc.flush()
            yield one


@asynccontextmanager
async def alive(one: Feeder) -> AsyncIterator[None]:
    """The feeder beats by itself until left."""
    async with running(one.beating()):
        yield
