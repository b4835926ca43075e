"""A relay between hosts and bridges that spoils answers on purpose, and counts how many: what the checker must find."""

import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

OLD_S = 5.0

Asked = tuple[str, str, str, str]
"""(path, access key, method, symbol)"""
Forward = Callable[[str], Awaitable[bytes]]
"""Asks the bridge the same by another path."""
Spoil = Callable[["Relay", Asked, bytes, Forward], Awaitable[bytes]]


class Relay:
    """spoil: what becomes of answers from now on; spoilt: how many are not what the bridge had said."""

    def __init__(self) -> None:
        self.spoil: Spoil | None = None
        self.spoilt = 0
        self.said: defaultdict[Asked, deque[tuple[float, bytes]]] = defaultdict(lambda: deque(maxlen=2000))


async def from_long_ago(relay: Relay, asked: Asked, content: bytes, _forward: Forward) -> bytes:
    """What the bridge had said OLD_S ago to the same."""
    old = [said for at_s, said in relay.said[asked] if at_s <= time.monotonic() - OLD_S]
    return old[-1] if old else content


async def one_level_off(_relay: Relay, asked: Asked, content: bytes, _forward: Forward) -> bytes:
    """The deepest bid's amount is a little more."""
    if asked[2] != "depth":
        return content
    answer: dict[str, Any] = msgspec.json.decode(content)
    if "data" in answer:
        answer["data"]["bids"][-1][1] += 0.001
    return msgspec.json.encode(answer)


async def spot_for_all(_relay: Relay, asked: Asked, content: bytes, forward: Forward) -> bytes:
    """A robot's contract is forgotten: it is told what the bare symbol means to a robot that never set one."""
    return await forward("paper/robot-without") if asked[0] != "/paper" and asked[2] != "io" else content


@asynccontextmanager
async def relayed(relay: Relay, addresses: dict[str, str]) -> AsyncIterator[dict[str, str]]:
    """-> where hosts ask instead, by bridge."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        runners, found = [], {}
        for name, address in addresses.items():
            runner = web.ServerRunner(web.Server(_handler(relay, session, address), access_log=None), shutdown_timeout=1)
            await runner.setup()
            runners.append(runner)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            found[name] = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield found
        finally:
            for runner in runners:
                await runner.cleanup()


def _handler(relay: Relay, session: aiohttp.ClientSession, address: str) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        question = msgspec.json.decode(body)
        asked = request.path, question["access_key"], question["method"], str(question["params"].get("symbol"))

        async def forward(path: str) -> bytes:
            async with session.post(f"{address}/{path}", data=body) as response:
                return await response.read()

        async with session.post(f"{address}{request.path}", data=body, headers={"Fmzbus-Trace": "1"}) as response:
            content, source = await response.read(), response.headers.get("Fmzbus-Cache", "unknown")
        relay.said[asked].append((time.monotonic(), content))
        if relay.spoil is not None:
            spoilt = await relay.spoil(relay, asked, content, forward)
            relay.spoilt += spoilt != content
            content = spoilt
        return web.Response(body=content, content_type="application/json", headers={"Fmzbus-Cache": source})

    return handle
