"""Hosts that poll: one connection and one question each, many times a second, every answer kept with its moments."""

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

import aiohttp
import msgspec

from tests.freshness.verdict import Seen

POLLS_A_S = 50
PATIENCE_S = 15.0
"""Above the bridge's deadline: what takes longer was never answered."""
AFTER_ERROR_S = 0.05

MARKETS = {"BTC_USDT": "BTC_USDT", "ETH_USDT": "ETH_USDT", "BTC_USDT.swap": "BTC_USDT.swap", "eth_usdt": "ETH_USDT"}
"""What hosts write -> the exchange's own symbol."""
KINDS = ("ticker", "depth")

Told = Callable[[Seen], None]


class Question(NamedTuple):
    """What one host asks for, again and again. path: with a session of its own where it has one."""

    bridge: str
    kind: str
    symbol: str
    market: str
    path: str = "paper"
    access_key: str = "reader"


async def ask(session: aiohttp.ClientSession, address: str, question: Question) -> Seen:
    """One request; whatever becomes of it."""
    body = msgspec.json.encode(
        {
            "access_key": question.access_key,
            "secret_key": "a-secret-for-play-money",
            "nonce": time.time_ns(),
            "method": question.kind,
            "params": {"symbol": question.symbol},
        }
    )
    asked_s = time.monotonic()
    try:
        async with session.post(f"{address}/{question.path}", data=body, headers={"Fmzbus-Trace": "1"}) as response:
            content = await response.read()
            source = response.headers.get("Fmzbus-Cache", "unknown")
            if response.status != 200:
                content = b"HTTP %d: %b" % (response.status, content)
    except (aiohttp.ClientError, TimeoutError) as e:
        source, content = "", f"no answer: {type(e).__name__}".encode()
    where = question.bridge, question.kind, question.symbol, question.market
    return Seen(*where, asked_s=asked_s, answered_s=time.monotonic(), source=source, content=content)


async def poll(address: str, question: Question, told: Told) -> None:
    """Ask for ever."""
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1), timeout=timeout) as session:
        while True:
            seen = await ask(session, address, question)
            told(seen)
            left_s = 1 / POLLS_A_S - (time.monotonic() - seen.asked_s)
            await asyncio.sleep(max(0.0, left_s) if seen.source else AFTER_ERROR_S)


def questions(bridges: tuple[str, ...]) -> list[Question]:
    """Each kind of each symbol, over each bridge."""
    return [Question(bridge, kind, symbol, market) for bridge in bridges for kind in KINDS for symbol, market in MARKETS.items()]


# ---------------------------------------------------------------- robots that change their contract

FLIPS = ("swap", "spot")
STEADY = 4
ASKS = 2
"""Of each kind, over each bridge, behind every change."""


async def flip(addresses: dict[str, str], robot: int, told: Told, until_s: float) -> int:
    """A robot that sets its contract and asks the bare symbol over all bridges. -> how often it did.

    Each of the first STEADY robots sets it over one and the same bridge, the others over one after the other.
    """
    path, key = f"paper/robot-{robot}", f"flipping-{robot}"
    flips = 0
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while time.monotonic() < until_s:
            contract = FLIPS[flips % 2]
            market = "BTC_USDT.swap" if contract == "swap" else "BTC_USDT"
            bridges = list(addresses)
            turn = robot if robot < STEADY else flips // 2
            if not await _set_contract(session, addresses[bridges[turn % len(bridges)]], path, key, contract):
                await asyncio.sleep(AFTER_ERROR_S)  # whether it was set is not known: set the same again
                continue
            flips += 1
            for _ in range(ASKS):
                asked = [Question(bridge, kind, "BTC_USDT", market, path, key) for bridge in bridges for kind in KINDS]
                for seen in await asyncio.gather(*(ask(session, addresses[one.bridge], one) for one in asked)):
                    told(seen)
    return flips


async def _set_contract(session: aiohttp.ClientSession, address: str, path: str, key: str, contract: str) -> bool:
    request = {"access_key": key, "secret_key": "a-secret-for-play-money", "nonce": time.time_ns()}
    request |= {"method": "io", "params": {"code": 2, "args": [contract]}}
    try:
        async with session.post(f"{address}/{path}", data=msgspec.json.encode(request)) as response:
            return b'"data"' in await response.read()
    except (aiohttp.ClientError, TimeoutError):
        return False
