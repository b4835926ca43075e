"""A bare WebSocket client of the paper exchange, and a book kept by the documented rules; they share no code with the exchange."""

import asyncio
import gzip
import json
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import WSMsgType

from tests.paper import Client
from workers.venues.paper.auth import sign

UNPACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "deflate_raw": lambda data: zlib.decompress(data, -15)}
BTC = {"channel": "depth", "symbol": "BTC_USDT"}


@dataclass(eq=False)
class Socket:
    """A bare WebSocket client: sends requests, sorts answers from data."""

    ws: aiohttp.ClientWebSocketResponse
    packing: str = ""
    data: deque[Any] = field(default_factory=deque)
    asked: int = 0

    async def read(self) -> Any:
        """The next message, or the close code as an int."""
        async with asyncio.timeout(5):
            frame = await self.ws.receive()
        if frame.type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.CLOSING, WSMsgType.ERROR):
            return self.ws.close_code
        if self.packing:
            assert frame.type is WSMsgType.BINARY
            return json.loads(UNPACK[self.packing](frame.data))
        assert frame.type is WSMsgType.TEXT
        return json.loads(frame.data)

    async def ask(self, op: str, *args: object) -> Any:
        """Send a request, return its answer; data that came before it is kept for next()."""
        self.asked += 1
        await self.ws.send_str(json.dumps({"id": self.asked, "op": op} | ({"args": args} if args else {})))
        return await self.answer()

    async def answer(self) -> Any:
        while "channel" in (message := await self.read()):
            self.data.append(message)
        return message

    async def next(self) -> Any:
        """The next message that is data."""
        return self.data.popleft() if self.data else await self.read()

    async def subscribe(self, **arg: object) -> Any:
        """Subscribe, return the first message."""
        assert (await self.ask("subscribe", arg))["code"] == 0
        return await self.next()

    async def login(self, client: Client, **changed: str) -> Any:
        timestamp = str(int(client.clock() * 1000))
        signature = sign(client.secret.encode(), timestamp=timestamp, window="", verb="LOGIN", target="/ws/v1", body=b"")
        return await self.ask("login", {"key": client.key, "timestamp": timestamp, "sign": signature, "secret": client.secret} | changed)


@asynccontextmanager
async def connected(client: Client, packing: str = "", **options: Any) -> AsyncIterator[Socket]:
    query = f"?compress={packing}" if packing else ""
    async with client.session.ws_connect(f"{client.base}/ws/v1{query}", **options) as ws:
        yield Socket(ws, packing)


@dataclass
class Book:
    """A book kept by the documented rules. Every sequence and every checksum is checked."""

    levels: int
    sequence: int = 0
    sides: dict[str, dict[str, str]] = field(default_factory=lambda: {"asks": {}, "bids": {}})

    def apply(self, message: Any) -> None:
        if message["type"] == "snapshot":
            self.sides = {side: dict(message[side]) for side in ("asks", "bids")}
        else:
            assert message["previous"] == self.sequence
            for side in ("asks", "bids"):
                self.sides[side] |= dict(message[side])
                self.sides[side] = {price: amount for price, amount in self.sides[side].items() if amount != "0"}
        self.sequence = message["sequence"]
        assert message["checksum"] == self.checksum()

    def rows(self, side: str) -> list[list[str]]:
        return sorted(([price, amount] for price, amount in self.sides[side].items()), key=_price, reverse=side == "bids")

    def checksum(self) -> int:
        """As the README says it, written from there."""
        asks, bids = self.rows("asks")[:25], self.rows("bids")[:25]
        text: list[str] = []
        for place in range(25):
            for side in (bids, asks):
                text += [price + ":" + amount for price, amount in side[place : place + 1]]
        return zlib.crc32(":".join(text).encode("ascii"))


def _price(row: list[str]) -> Decimal:
    return Decimal(row[0])


async def arm(client: Client, state: Path, kind: str, **fields: object) -> None:
    where = json.loads((state / "control.json").read_bytes())
    headers = {"Authorization": f"Bearer {where['token']}"}
    async with client.session.post(f"http://127.0.0.1:{where['port']}/faults", json={"kind": kind} | fields, headers=headers) as reply:
        assert reply.status == 200, await reply.text()


async def depth(client: Client, symbol: str = "BTC_USDT", limit: int = 200) -> Any:
    return await client.get(f"/api/v1/depth?symbol={symbol}&limit={limit}", signed=False)
