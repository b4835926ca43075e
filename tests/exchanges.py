"""Small real exchanges on loopback: one that records and answers as scripted, and Bitgo, as FMZ's topic 1052 describes it."""

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from aiohttp import web
from msgspec import Struct, field


class Seen(Struct, frozen=True):
    """One request as it arrived. target: of the request line. query: decoded. connection: which of the client's it came by."""

    verb: str
    target: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    connection: int


class Answer(Struct, frozen=True):
    """What an exchange answers, or how it fails to.

    delay_s: before anything is said. drop: the connection ends instead of an answer. cut: it ends in the middle of the body.
    """

    body: bytes = b"{}"
    status: int = 200
    headers: dict[str, str] = {}
    delay_s: float = 0.0
    drop: bool = False
    cut: bool = False


def json(content: Any, status: int = 200, **headers: str) -> Answer:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(msgspec.json.encode(content), status, {"Content-Type": "application/json"} | names)


DROPPED = Answer(drop=True)
SILENT = Answer(delay_s=60)


class Exchange:
    """requests: everything that arrived. script: what is answered next; when it is used up, `otherwise` answers. aside: what is answered
    by itself, by the path's last parts, and is neither scripted nor kept: the look-ups of a worker."""

    def __init__(self, otherwise: Callable[[Seen], Answer]) -> None:
        self.otherwise = otherwise
        self.requests: list[Seen] = []
        self.script: deque[Answer] = deque()
        self.aside: dict[str, Answer] = {}
        self.url = ""

    def will(self, *answers: Answer) -> None:
        """Forget what was, and answer this next."""
        self.requests.clear()
        self.script = deque(answers)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        seen = Seen(
            request.method,
            request.raw_path,
            request.path,
            dict(parse_qsl(request.rel_url.raw_query_string, keep_blank_values=True)),
            dict(request.headers),
            await request.read(),
            id(request.transport),
        )
        answer = next((answer for part, answer in self.aside.items() if part in seen.path), None)
        if answer is None:
            self.requests.append(seen)
            answer = self.script.popleft() if self.script else self.otherwise(seen)
        await asyncio.sleep(answer.delay_s)
        assert request.transport is not None
        if answer.drop:
            request.transport.abort()
            return web.Response()
        if not answer.cut:
            return web.Response(body=answer.body, status=answer.status, headers=answer.headers)
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        response.content_length = len(answer.body) * 2
        await response.prepare(request)
        await response.write(answer.body)
        request.transport.abort()
        return response


def nothing(_seen: Seen) -> Answer:
    return Answer()


@asynccontextmanager
async def serving(otherwise: Callable[[Seen], Answer] = nothing) -> AsyncIterator[Exchange]:
    """An exchange on a free port of loopback."""
    exchange = Exchange(otherwise)
    server = web.Server(exchange.handle, access_log=None)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    host, port = listener.sockets[0].getsockname()
    exchange.url = f"http://{host}:{port}"
    try:
        yield exchange
    finally:
        listener.close()
        await server.shutdown(0.1)


# ---------------------------------------------------------------- Bitgo

NOW_S = 1_795_000_000


class BitgoOrder(Struct):
    """status: 1 and 2 open, 3 filled, 4 cancelled. type: 0 buy, 1 sell."""

    id: int
    owner: str
    symbol: str
    price: str
    count: str
    type: int
    status: int = 1
    success_count: str = "0"


class Bitgo(Struct):
    """Topic 1052's sample exchange: numbers are text with thousands commas, `entrust` says prize where `order` says price.

    secrets: of the accounts, by api_key. It checks signatures by the documented formula, on its own.
    """

    secrets: dict[str, str]
    orders: dict[int, BitgoOrder] = field(default_factory=dict)
    next_id: int = 1001

    def answer(self, seen: Seen) -> Answer:
        if (seen.verb, seen.path) != ("POST", "/appApi.html"):
            return Answer(b"<html>not here</html>", 404)
        query = dict(seen.query)
        action = query.pop("action", "")
        if "api_key" not in query:
            return json(PUBLIC.get(action, {"code": 404, "msg": "no such action"}))
        if not self._is_signed(query):
            return json({"code": 401, "msg": "sign error"})
        return json(self._private(action, query))

    def _is_signed(self, query: dict[str, str]) -> bool:
        fields = dict(query)
        sign = fields.pop("sign", "")
        secret = self.secrets.get(fields["api_key"])
        text = "&".join("=".join(pair) for pair in sorted(fields.items()))
        return secret is not None and sign == hashlib.md5(f"{text}&secret_key={secret}".encode()).hexdigest().upper()  # noqa: S324

    def _private(self, action: str, query: dict[str, str]) -> dict[str, Any]:
        mine = [order for order in self.orders.values() if order.owner == query["api_key"]]
        match action:
            case "userinfo":
                return {
                    "code": "200",
                    "data": {"free": {"cny": "1,234,567.5", "btc": 2, "doge": None}, "frozen": {"cny": "10", "ltc": "0.5"}},
                }
            case "trade":
                if Decimal(query["amount"]) > 1000:
                    return {"code": 500, "msg": "insufficient balance"}
                order = BitgoOrder(self.next_id, query["api_key"], query["symbol"], query["price"], query["amount"], int(query["type"]))
                self.orders[order.id] = order
                self.next_id += 1
                return {"code": 200, "orderId": f"{order.id:,}"}
            case "entrust":
                rows = [
                    {"id": o.id, "prize": o.price, "count": o.count, "success_count": o.success_count, "type": o.type, "status": o.status}
                    for o in mine
                    if o.status < 3 and o.symbol == query["symbol"]
                ]
                return {"code": 200, "data": rows}
            case "order":
                rows = [
                    {"id": str(o.id), "price": o.price, "count": o.count, "success_count": o.success_count, "type": o.type}
                    | {"status": str(o.status)}
                    for o in mine
                ]
                return {"code": 200, "data": rows}
            case "cancel_entrust":
                found = [order for order in mine if order.id == int(query["id"]) and order.status < 3]
                if not found:
                    return {"code": 404, "msg": "order is gone"}
                found[0].status = 4
                return {"code": 200, "msg": "ok"}
        return {"code": 200, "action": action, "params": {key: query[key] for key in query if key not in ("api_key", "sign")}}


PUBLIC: dict[str, dict[str, Any]] = {
    "market": {
        "time": NOW_S * 1000 + 123,
        "data": {"buy": "1,000.5", "sell": "1,001.25", "last": 1000.75, "high": "1,010", "low": "990", "vol": "12,345.678"},
    },
    "depth": {
        "time": str(NOW_S * 1000),
        "data": {"asks": [["1,002", "0.5"], ["1,001", "1.5"], [1003, 2]], "bids": [["999", "1"], ["1,000", "0.25", "extra"]]},
    },
    "trades": {
        "data": [
            {"id": "12", "price": "1,000.5", "amount": "0.1", "time": NOW_S + 5, "en_type": "bid"},
            {"id": "11", "price": "999", "amount": "2", "time": NOW_S, "en_type": "ask"},
        ]
    },
    "kline": {
        "data": [
            [NOW_S + 60, "1,001", "1,003", "999", "1,002", "7"],
            [NOW_S, "1,000", "1,002", "998", "1,001", "5.5"],
        ]
    },
}
