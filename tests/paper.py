"""The paper exchange for tests of its own: in this process, on an injected clock, with a bare client."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from workers.venues.paper.auth import sign
from workers.venues.paper.server import serving

NOW_S = 1_795_168_693
GOOD = {"symbol": "BTC_USDT", "side": "buy", "type": "limit", "price": "50000", "amount": "0.01"}
README = Path(__file__).parents[1] / "workers/venues/paper/README.md"


@dataclass
class Clock:
    now_s: float = NOW_S

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Client:
    """A bare client: knows how to sign, nothing else."""

    session: aiohttp.ClientSession
    base: str
    clock: Callable[[], float]
    key: str = "key-1"
    secret: str = "secret-1"
    weights: list[int] = field(default_factory=list)

    async def __call__(
        self, verb: str, target: str, body: Any = None, *, signed: bool = True, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        sent = (self.signed(verb, target, data) if signed else {}) | (headers or {})
        async with self.session.request(verb, self.base + target, data=data, headers=sent) as reply:
            self.weights.append(int(reply.headers["Paper-Used-Weight"]))
            return reply.status, await reply.json()

    def signed(self, verb: str, target: str, data: bytes, *, time_ms: int | None = None, window: str = "") -> dict[str, str]:
        timestamp = str(time_ms if time_ms is not None else int(self.clock() * 1000))
        signature = sign(self.secret.encode(), timestamp=timestamp, window=window, verb=verb, target=target, body=data)
        headers = {"Paper-Key": self.key, "Paper-Timestamp": timestamp, "Paper-Secret": self.secret, "Paper-Sign": signature}
        return headers | ({"Paper-Window": window} if window else {})

    def other(self, key: str, secret: str) -> "Client":
        return Client(self.session, self.base, self.clock, key, secret)

    async def get(self, target: str, *, signed: bool = True) -> Any:
        status, document = await self("GET", target, signed=signed)
        assert status == 200, document
        return document

    async def order(self, symbol: str, side: str, **fields: object) -> Any:
        status, document = await self("POST", "/api/v1/orders", {"symbol": symbol, "side": side} | fields)
        assert status == 200, document
        return document


@asynccontextmanager
async def exchange(state: Path, clock: Callable[[], float], **options: Any) -> AsyncIterator[Client]:
    """The exchange on this state folder, seed 7, and its first client."""
    async with serving(state=state, host="127.0.0.1", port=0, seed=7, clock=clock, **options) as port, aiohttp.ClientSession() as session:
        yield Client(session, f"http://127.0.0.1:{port}", clock)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that another task brings about, at most 5 s."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  the condition is in another process's or thread's hands
            await asyncio.sleep(0.01)
