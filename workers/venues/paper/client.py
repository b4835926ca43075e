"""The paper exchange as a venue: play money, real HTTP. Its API is documented in README.md beside this file."""

import hmac
import ipaddress
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, ClassVar, Literal
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from bus import config
from bus.errors import BadRequest, BusError, Expired, VenueRejected
from bus.messages import (
    Api,
    Balance,
    Candle,
    Depth,
    Empty,
    Level,
    MarginLevel,
    Market,
    Order,
    OrderList,
    OrderRef,
    Placed,
    Position,
    Positions,
    Records,
    Ticker,
    Trade,
    TradeRow,
    WithRaw,
    number,
    plain,
)
from workers.http import Answer, Call
from workers.rules import Rules
from workers.updates import Channel, Update
from workers.venues import PUBLIC
from workers.venues.paper import feed

V1 = "/api/v1"
ORDER_NOT_FOUND = 2011
MAX_CANDLES = 1000
IN_A_TARGET = "!$%&'()*+,-./:;=?@_~"
"""What may stand in a request line as it is (RFC 3986); a percent sign is the host's own encoding."""
STATUS: dict[str, Literal["open", "closed", "cancelled"]] = {"open": "open", "closed": "closed", "cancelled": "cancelled"}
"""A status that is not in the table is an unreadable answer, never a guess."""
POSITION_TYPES = {"long": 0, "short": 1}


def instrument(symbol: str) -> str:
    """The exchange's symbol: "btc", "btc_cny" and "BTC_USDT" -> "BTC_USDT"; "BTC-PERP" and "btc_usdt.swap" -> "BTC_USDT.swap"."""
    pair, _, contract = symbol.upper().partition(".")
    if pair.endswith("-PERP"):
        pair, contract = pair.removesuffix("-PERP"), contract or "SWAP"
    pair = pair.removesuffix("_CNY")
    if pair.isalpha():
        pair += "_USDT"
    return f"{pair}.{contract.lower()}" if contract else pair


class Paper:
    public = PUBLIC
    contracts = True
    lookups = frozenset({"client_order_id"})
    feeds: ClassVar[frozenset[str]] = feed.KINDS
    per_socket: ClassVar[int] = 100
    requests_per_s: ClassVar[float] = 12.0
    """Of the 20 that it allows in a second of its clock: frames that were held up on the way arrive together."""
    keepalive: ClassVar[str] = ""

    def __init__(self, name: str, settings: config.Venue) -> None:
        self._base = settings.base_url.rstrip("/")
        self._socket_url = feed.socket_url(settings.ws_url or settings.base_url)
        host = urlsplit(self._base).hostname or ""
        # The exchange has no sign-up form: the first secret that comes with a key binds it. It is shown to this machine only.
        self._shows_secret = host == "localhost" or (host[:1].isdigit() and ipaddress.ip_address(host).is_loopback)

    async def _get(self, call: Call, path: str, **params: str) -> Any:
        """A public read."""
        return _checked(await call.send("GET", f"{self._base}{V1}{path}?{urlencode(params)}")).json()

    async def _signed(
        self, call: Call, verb: str, path: str, params: dict[str, str] | None = None, body: Any = None, *, write: bool | None = None
    ) -> Any:
        target = f"{path}{'&' if '?' in path else '?'}{urlencode(params)}" if params else path
        content = b"" if body is None else msgspec.json.encode(body)
        answer = await call.send(
            verb, self._base + target, headers=self._headers(call, verb, target, content), body=content or None, write=write
        )
        return _checked(answer).json()

    def _headers(self, call: Call, verb: str, target: str, body: bytes) -> dict[str, str]:
        keys = call.credentials
        # What follows a comma is an extra field, a trade password where an exchange wants one (fmz-protocol C.4); this one does not.
        secret = _header(keys.secret_key.partition(",")[0])
        timestamp = str(call.now_ms())
        text = "\n".join((timestamp, "", verb, target, "")).encode() + body
        headers = {
            "Content-Type": "application/json",
            "Paper-Key": _header(keys.access_key),
            "Paper-Timestamp": timestamp,
            "Paper-Sign": hmac.new(secret.encode(), text, "sha256").hexdigest(),
        }
        if self._shows_secret:
            headers["Paper-Secret"] = secret
        return headers

    async def ticker(self, call: Call, params: Market) -> Ticker:
        row = await self._get(call, "/ticker", symbol=instrument(params.symbol))
        return Ticker(
            time_ms=row["time"],
            buy=number(row["bid"]),
            sell=number(row["ask"]),
            last=number(row["last"]),
            high=number(row["high"]),
            low=number(row["low"]),
            vol=number(row["volume"]),
            open=number(row["open"]),
        )

    async def depth(self, call: Call, params: Market) -> Depth:
        book = await self._get(call, "/depth", symbol=instrument(params.symbol))
        asks, bids = ([(number(price), number(amount)) for price, amount in book[side]] for side in ("asks", "bids"))
        return Depth(time_ms=book["time"], asks=asks, bids=bids)

    async def trades(self, call: Call, params: Market) -> list[TradeRow]:
        rows = await self._get(call, "/trades", symbol=instrument(params.symbol))
        return [
            TradeRow(id=row["id"], time_ms=row["time"], price=number(row["price"]), amount=number(row["amount"]), type=row["side"])
            for row in rows
        ]

    async def records(self, call: Call, params: Records) -> list[Candle]:
        limit = min(params.limit or 500, MAX_CANDLES)
        rows = await self._get(call, "/candles", symbol=instrument(params.symbol), interval=str(params.period_m), limit=str(limit))
        return [Candle(row[0] // 1000, *(number(value) for value in row[1:])) for row in rows]

    async def rules(self, call: Call, symbol: str) -> Rules:
        wanted = instrument(symbol)
        for row in await self._get(call, "/markets"):
            if row["symbol"] == wanted:
                return Rules(
                    tick=number(row["tick_size"]),
                    lot=number(row["lot_size"]),
                    min_amount=number(row["min_amount"]),
                    min_value=number(row["min_notional"]),
                    contract_size=number(row["contract_size"]),
                )
        raise VenueRejected(f"paper lists no market {wanted}")

    def socket_url(self) -> str:
        return self._socket_url

    def channel(self, kind: str, symbol: str, period_m: int) -> Channel:
        return feed.channel(kind, instrument(symbol), period_m)

    def subscribe(self, channels: Sequence[Channel], levels: int) -> list[str]:
        return feed.subscribe(channels, levels)

    def unsubscribe(self, channels: Sequence[Channel], levels: int) -> list[str]:
        return feed.unsubscribe(channels, levels)

    def parse(self, frame: bytes) -> Sequence[Update]:
        return feed.parse(frame)

    def checksum(self, bids: Sequence[Level], asks: Sequence[Level]) -> int | None:
        return feed.checksum(bids, asks)

    async def accounts(self, call: Call, _params: Empty) -> WithRaw:
        raw = await self._signed(call, "GET", f"{V1}/account")
        return WithRaw([Balance(row["currency"], number(row["free"]), number(row["frozen"])) for row in raw["balances"]], raw)

    async def trade(self, call: Call, params: Trade) -> WithRaw:
        order = {
            "symbol": instrument(params.symbol),
            "side": params.side,
            "client_order_id": call.client_order_id,
            "expires_at": call.expires_at_ms,
        }
        if params.offset:
            order["offset"] = params.offset
            if call.session.level is not None and params.offset == "open":
                await self._set_leverage(call, instrument(params.symbol), call.session.level)
        if params.is_market:
            spends = params.side == "buy" and not params.offset  # fmz-protocol C.2: a spot market buy is money in quote
            order |= {"type": "market", ("quote_amount" if spends else "amount"): plain(params.amount)}
        else:
            order |= {"type": "limit", "price": plain(params.price), "amount": plain(params.amount)}
        try:
            row = await self._signed(call, "POST", f"{V1}/orders", body=order)
        except _Duplicate:
            # The very same request was here before: its order is this request's order.
            row = await self._by_client_id(call, call.client_order_id)
        if not isinstance(row, dict) or not row.get("id"):
            raise call.unclear("without an order id")
        return WithRaw(Placed(str(row["id"])), row)

    async def _set_leverage(self, call: Call, symbol: str, level: Decimal) -> None:
        if level != int(level):
            raise BadRequest(f"leverage: expected a whole number, got {plain(level)}")
        await self._signed(call, "POST", f"{V1}/leverage", body={"symbol": symbol, "leverage": int(level)}, write=False)

    async def margin_level(self, call: Call, params: MarginLevel) -> None:
        await self._set_leverage(call, instrument(params.symbol), params.level)

    async def order(self, call: Call, params: OrderRef) -> WithRaw:
        row = await self._signed(call, "GET", f"{V1}/orders/{_id(params)}")
        return WithRaw(_order(row), row)

    async def _by_client_id(self, call: Call, client_order_id: str) -> Any:
        """The order, or None where the exchange has none."""
        try:
            return await self._signed(call, "GET", f"{V1}/orders/by-client-id/{client_order_id}", write=False)
        except _NotFound:
            return None

    async def time_ms(self, call: Call) -> int:
        return int((await self._get(call, "/time"))["time"])

    async def find_order(self, call: Call, client_order_id: str, symbol: str) -> Order | None:
        row = await self._by_client_id(call, client_order_id)
        return None if row is None else _order(row)

    async def orders(self, call: Call, params: OrderList) -> WithRaw:
        rows = await self._signed(call, "GET", f"{V1}/orders", {"symbol": instrument(params.symbol)} if params.symbol else None)
        return WithRaw([_order(row) for row in rows], rows)

    async def cancel(self, call: Call, params: OrderRef) -> WithRaw:
        return WithRaw(data=True, raw=await self._signed(call, "DELETE", f"{V1}/orders/{_id(params)}"))

    async def positions(self, call: Call, params: Positions) -> WithRaw:
        wanted = params.symbol.upper()
        rows = [row for row in await self._signed(call, "GET", f"{V1}/positions") if _matches(row["symbol"].upper(), wanted)]
        return WithRaw([_position(row) for row in rows], rows)

    async def api(self, call: Call, params: Api) -> Any:
        resource = params.resource.removeprefix(self._base)
        if "://" in resource:
            raise BadRequest("method: a raw call reaches the paper exchange only")
        path = "/" + quote(resource.lstrip("/"), safe=IN_A_TARGET)
        if params.verb in ("GET", "DELETE"):
            return await self._signed(call, params.verb, path, params.query)
        return await self._signed(call, params.verb, path, body=params.query)


class _Duplicate(VenueRejected):
    """The client order id was used before."""


class _NotFound(VenueRejected):
    """No such order."""


CODES: dict[int, type[BusError]] = {1004: Expired, ORDER_NOT_FOUND: _NotFound, 2013: _Duplicate}


def _checked(answer: Answer) -> Answer:
    """Raise what the exchange's own error code means."""
    if answer.status < 400:
        return answer
    refusal = answer.json()
    if not isinstance(refusal, dict) or not isinstance(refusal.get("code"), int):
        raise answer.call.unclear(str(answer.status))
    raise CODES.get(refusal["code"], VenueRejected)(f"paper {refusal['code']} {refusal.get('message', '')}")


def _header(text: str) -> str:
    """A key as a header may carry it: what is not printable ASCII is percent-encoded, a PEM's newlines and blanks included."""
    return quote(text, safe="!#$&'()*+,/:;=?@[]~")


def _id(params: OrderRef) -> str:
    if not (params.id.isascii() and params.id.isalnum()):
        raise VenueRejected(f"paper {ORDER_NOT_FOUND} order not found")
    return params.id


def _order(row: dict[str, Any]) -> Order:
    contract = row["symbol"].partition(".")[2]
    return Order(
        id=str(row["id"]),
        amount=number(row["amount"] or row["filled"]),
        price=number(row["price"]),
        status=STATUS[row["status"]],
        deal_amount=number(row["filled"]),
        type=row["side"],
        avg_price=number(row["average_price"]),
        symbol=row["symbol"],
        time_ms=row["time"],
        contract_type=contract or None,
        offset={"open": 0, "close": 1}.get(row.get("offset") or ""),
    )


def _matches(symbol: str, wanted: str) -> bool:
    """wanted: "" for all, a contract code (SWAP), a symbol, or a range such as USDT.SWAP (fmz-protocol B.1, io code 3)."""
    pair, _, contract = symbol.partition(".")
    return wanted in ("", symbol, pair, contract, f"{pair.partition('_')[2]}.{contract}")


def _position(row: dict[str, Any]) -> Position:
    return Position(
        symbol=row["symbol"],
        margin_level=number(row["leverage"]),
        amount=number(row["amount"]),
        frozen_amount=number(row["frozen"]),
        price=number(row["entry_price"]),
        profit=number(row["unrealized_pnl"]),
        type=POSITION_TYPES[row["side"]],  # type: ignore[arg-type]
        contract_type=row["symbol"].partition(".")[2],
        margin=number(row["margin"]),
    )
