"""What hosts do: strategies of a few orders each, drawn before they act, and every request written down with what came of it."""

import asyncio
import random
import time
from collections.abc import Callable
from typing import Literal

import aiohttp
import msgspec
from msgspec import Struct

from bridge import fmz
from tests.crashes.verdict import NEVER_SENT, Asked

EXCHANGE = "paper"
BRIDGES = ("bridge-1", "bridge-2")
MOST_REPEATS = 8
MOST_ATTEMPTS = 4
NONCES = 10**18
PATIENCE_S = 1.5
"""How much longer than a bridge's deadline a host waits for it."""
STILL_OPEN_S = 2.0
"""By when, after its deadline, a bridge has let go of a request, even if it was stopped for a time."""

Conduct = Literal["plain", "again", "twice", "impatient", "loop", "cancel"]
CONDUCTS: dict[Conduct, int] = {"plain": 5, "again": 2, "twice": 3, "impatient": 3, "loop": 5, "cancel": 3}
"""How a strategy goes about one order, and how often of all.

plain      once; like all of them it repeats the same nonce, also at the other bridge, when there is no answer
again      the same nonce once more after the answer
twice      the same nonce at both bridges at once
impatient  gives up waiting early, and repeats the same nonce at the other bridge
loop       a new nonce after each error, as FMZ's _C does
cancel     cancels what was placed
"""


class Order(Struct, frozen=True):
    """What a strategy means to place. number: from 1, of its case; no two orders of a case are equal."""

    number: int
    symbol: str
    side: str
    price: str
    amount: str


class Step(Struct, frozen=True):
    """One order and how it is gone about. nonces: of its attempts, and of its cancel at the end. rest_s: before it; pauses_s: between
    its requests. patience_s: of an impatient host. bridge: where it begins."""

    order: Order
    conduct: Conduct
    nonces: tuple[int, ...]
    rest_s: float
    pauses_s: tuple[float, ...]
    patience_s: float
    bridge: int


class Plan(Struct, frozen=True):
    """One host. account: number of its access key in the case; session: of its path."""

    account: int
    session: str
    steps: tuple[Step, ...]


def draw(rng: random.Random) -> tuple[Plan, ...]:
    """Three to five hosts, of one account or two, with two to four orders each."""
    accounts = rng.choice((1, 2))
    number = 0
    plans = []
    for host in range(1, rng.choice((3, 4, 4, 5, 5)) + 1):
        steps = []
        for _ in range(rng.choice((2, 3, 3, 4))):
            number += 1
            steps.append(_step(rng, number))
        plans.append(Plan(rng.randrange(accounts), f"robot-{host}", tuple(steps)))
    return tuple(plans)


def _step(rng: random.Random, number: int) -> Step:
    conduct = rng.choices(tuple(CONDUCTS), tuple(CONDUCTS.values()))[0]
    market = conduct != "cancel" and rng.random() < 0.35
    side = rng.choice(("buy", "sell"))
    if market:  # a buy names its money, a sell its amount
        price, amount = "-1", str(10 + number) if side == "buy" else f"0.{100 + number:04d}"
    else:  # far from the market, so that it rests
        price = str((1000 if side == "buy" else 900_000) + rng.randrange(100))
        amount = f"0.{100 + number:04d}"
    return Step(
        order=Order(number, "BTC_USDT", side, price, amount),
        conduct=conduct,
        nonces=tuple(NONCES + rng.randrange(1, NONCES) // 10 * 10 + 1 for _ in range(MOST_ATTEMPTS + 1)),
        rest_s=rng.choice((0.0, rng.uniform(0, 0.1))),
        pauses_s=tuple(rng.uniform(0.02, 0.25) if rng.random() < 0.8 else rng.uniform(0.6, 1.2) for _ in range(MOST_REPEATS)),
        patience_s=rng.uniform(0.05, 0.5),
        bridge=rng.randrange(len(BRIDGES)),
    )


class Host:
    """One host at work. keys: its access and secret key. address: of a bridge, by name. deadline_s: by when a bridge answers."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        plan: Plan,
        keys: tuple[str, str],
        address: Callable[[str], str],
        deadline_s: float,
        asked: list[Asked],
    ) -> None:
        self._session = session
        self._plan = plan
        self._keys = keys
        self._address = address
        self._deadline_s = deadline_s
        self._asked = asked
        self._path = f"{EXCHANGE}/{plan.session}"

    async def run(self) -> None:
        """Go through all steps, one after the other."""
        for step in self._plan.steps:
            await asyncio.sleep(step.rest_s)
            await self._go(step)

    async def _go(self, step: Step) -> None:
        first, second = BRIDGES[step.bridge], BRIDGES[1 - step.bridge]
        nonce = step.nonces[0]
        made: list[Asked] = []
        match step.conduct:
            case "loop":
                for another, pause_s in zip(step.nonces[:-1], step.pauses_s, strict=False):
                    if not (await self._until_answered(step, another, [])).error:
                        return
                    await asyncio.sleep(pause_s)
            case "twice":
                async with asyncio.TaskGroup() as both:
                    one = both.create_task(self._trade(step, nonce, first))
                    await asyncio.sleep(step.pauses_s[-1] / 4)
                    two = both.create_task(self._trade(step, nonce, second))
                made = [one.result(), two.result()]
                if all(asked.broke for asked in made):
                    await self._until_answered(step, nonce, made)
            case "impatient":
                made = [await self._trade(step, nonce, first, step.patience_s)]
                if made[0].broke:
                    await self._until_answered(step, nonce, made)
            case _:
                answer = await self._until_answered(step, nonce, made)
                if step.conduct == "again":
                    await self._until_answered(step, nonce, made)
                if step.conduct == "cancel" and answer.told_id:
                    await asyncio.sleep(step.pauses_s[-1])
                    await self._cancel(step, answer.told_id)

    async def _until_answered(self, step: Step, nonce: int, made: list[Asked]) -> Asked:
        """Repeat one nonce until there is an answer, at the bridges in turn; the last request. made: all of this nonce, the new ones
        are added."""
        for pause_s in step.pauses_s:
            if made:
                await asyncio.sleep(pause_s)
            bridge = BRIDGES[(step.bridge + len(made)) % len(BRIDGES)]
            await self._let_go(bridge, made)
            made.append(await self._trade(step, nonce, bridge))
            if not made[-1].broke:
                break
        return made[-1]

    async def _let_go(self, bridge: str, made: list[Asked]) -> None:
        """Wait until the bridge has no request of this nonce open any more: two that are open at once there are two orders."""
        for asked in made:
            if asked.bridge == bridge and asked.broke == "patience":
                await asyncio.sleep(asked.sent_ms / 1000 + self._deadline_s + STILL_OPEN_S - time.time())

    async def _trade(self, step: Step, nonce: int, bridge: str, patience_s: float = 0.0) -> Asked:
        order = step.order
        params = {"symbol": order.symbol, "type": order.side, "price": order.price, "amount": order.amount}
        return await self._post(order.number, nonce, "trade", params, bridge, patience_s, "")

    async def _cancel(self, step: Step, order_id: str) -> None:
        for turn, pause_s in enumerate(step.pauses_s[:3]):
            params = {"symbol": step.order.symbol, "id": order_id}
            bridge = BRIDGES[(step.bridge + turn) % len(BRIDGES)]
            if not (await self._post(step.order.number, step.nonces[-1] + turn, "cancel", params, bridge, 0.0, order_id)).broke:
                return
            await asyncio.sleep(pause_s)

    async def _post(
        self, order: int, nonce: int, method: str, params: dict[str, str], bridge: str, patience_s: float, cancels: str
    ) -> Asked:
        access_key, secret_key = self._keys
        body = msgspec.json.encode({"access_key": access_key, "secret_key": secret_key, "nonce": nonce, "method": method, "params": params})
        call = fmz.decode(body)
        key = fmz.idempotency_key(self._path, call, fmz.encode_params(call.params), by_nonce=True)
        asked = Asked(order=order, key=key, bridge=bridge, sent_ms=time.time() * 1000, cancels=cancels)
        self._asked.append(asked)
        try:
            async with asyncio.timeout(patience_s or self._deadline_s + PATIENCE_S):
                async with self._session.post(f"{self._address(bridge)}/{self._path}", data=body) as response:
                    envelope = await response.json()
                asked.data, asked.error = envelope.get("data"), envelope.get("error", "")
        except TimeoutError:
            asked.broke = "patience"
        except aiohttp.ClientConnectorError:
            asked.broke = NEVER_SENT
        except (aiohttp.ClientError, OSError) as e:
            asked.broke = type(e).__name__
        asked.until_ms = time.time() * 1000
        return asked
