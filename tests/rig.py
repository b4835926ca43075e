"""The paper exchange as others see it: raw requests that know nothing but how to sign, and its control API."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.paper import GOOD, Client, Clock, exchange

ORDERS = "/api/v1/orders"


class Answer(NamedTuple):
    """What came back on the wire. status 0: the connection ended without a byte."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def send(port: int, verb: str, target: str, body: bytes, headers: dict[str, str]) -> Answer:
    """One request on a connection of its own, read to the end."""
    lines = [f"{verb} {target} HTTP/1.1", "Host: paper", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        whole = await reader.read()
    except ConnectionError:
        whole = b""
    finally:
        writer.close()
    head, _, content = whole.partition(b"\r\n\r\n")
    status, *rest = head.decode().split("\r\n")
    pairs = (line.split(": ", 1) for line in rest)
    return Answer(int(status.split()[1]) if status else 0, {name.lower(): value for name, value in pairs}, content)


@dataclass
class Rig:
    """An exchange, a bare client of it, and its control API."""

    client: Client
    clock: Clock
    state: Path

    async def __call__(self, verb: str, target: str, document: object = None, **headers: str) -> Answer:
        body = b"" if document is None else json.dumps(document).encode()
        port = int(self.client.base.rpartition(":")[2])
        return await send(port, verb, target, body, self.client.signed(verb, target, body) | headers)

    async def place(self, client_order_id: str, **fields: str) -> Answer:
        return await self("POST", ORDERS, GOOD | {"client_order_id": client_order_id} | fields)

    async def control(self, verb: str, target: str, body: bytes = b"", **headers: str) -> Answer:
        where = json.loads((self.state / "control.json").read_bytes())
        return await send(where["port"], verb, target, body, {"Authorization": f"Bearer {where['token']}"} | headers)

    async def arm(self, kind: str, **fields: object) -> Any:
        answer = await self.control("POST", "/faults", json.dumps({"kind": kind} | fields).encode())
        assert answer.status == 200, answer.body
        return answer.json

    async def armed(self) -> list[Any]:
        rows: list[Any] = (await self.control("GET", "/faults")).json
        return rows

    async def ledger(self, query: str = "") -> list[Any]:
        rows: list[Any] = (await self.control("GET", "/ledger" + query)).json
        return rows

    async def ledger_once(self, condition: Callable[[list[Any]], bool]) -> list[Any]:
        """The ledger as soon as a condition holds for it, at most 5 s from now."""
        async with asyncio.timeout(5):
            while not condition(rows := await self.ledger()):
                pass
        return rows


@asynccontextmanager
async def rigged(state: Path) -> AsyncIterator[Rig]:
    """An exchange for the life of a test. state: its folder; the clock stands still until the test moves it."""
    clock = Clock()
    async with exchange(state, clock) as client:
        yield Rig(client, clock, state)
