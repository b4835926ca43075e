"""bitgo: the worked example of FMZ's general-protocol document (topic 1052), the pattern for a venue of one's own.

Every call is a POST to <base_url>/appApi.html with everything in the query. Private calls carry `sign`: upper-case MD5 of the sorted,
unescaped parameters and the secret. Given the same answers it gives hosts the same values as the document's Go program, except where
fmz-protocol calls that program's behaviour a fault: trades carry their time, lists ascend, an order without an id is unknown.
"""

from decimal import Decimal
from hashlib import md5
from typing import Any
from urllib.parse import quote

from bus import config
from bus import messages as m
from bus.errors import BadRequest, VenueRejected
from bus.messages import number, plain
from workers.http import Answer, Call
from workers.venues import PUBLIC

BASE_URL = "https://www.bitgo.cn"
SYMBOLS = {"btc": "1", "ltc": "2", "etp": "3", "eth": "4", "etc": "5", "doge": "6", "bec": "7"}
STATUS = {1: "open", 2: "open", 3: "closed", 4: "cancelled"}
MILLISECONDS = 10**11  # a time above it cannot be seconds


def instrument(symbol: str) -> str:
    """The exchange's number of a market: "BTC_CNY" -> "1"; what the table does not know passes unchanged."""
    return SYMBOLS.get(symbol.lower().replace("_cny", ""), symbol)


def signed(params: dict[str, str], access_key: str, secret_key: str, action: str) -> dict[str, str]:
    """The parameters of a private call. Keys lose a leading "!", a quirk of the sample's sorter."""
    fields = {key.replace("!", "") if key.startswith("!") else key: value for key, value in params.items()} | {"api_key": access_key}
    text = "&".join(f"{key}={fields[key]}" for key in sorted(fields)) + f"&secret_key={secret_key}"
    return fields | {"sign": md5(text.encode()).hexdigest().upper(), "action": action}  # noqa: S324 - the exchange's own choice


def whole(value: object) -> int:
    return int(number(value))


class Bitgo:
    public = PUBLIC
    contracts = False
    lookups = frozenset[str]()

    def __init__(self, name: str, settings: config.Venue) -> None:
        self._url = f"{(settings.base_url or BASE_URL).rstrip('/')}/appApi.html"

    async def _post(self, call: Call, params: dict[str, str]) -> Answer:
        query = "&".join(f"{quote(key, safe='')}={quote(params[key], safe='')}" for key in sorted(params))
        return await call.send("POST", f"{self._url}?{query}", headers={"Content-Type": "application/x-www-form-urlencoded"})

    async def _public(self, call: Call, expected: type, **params: str) -> tuple[Any, int]:
        """-> (data, time in ms, now where the exchange gave none)."""
        reply = (await self._post(call, params)).json()
        data = reply.get("data") if isinstance(reply, dict) else None
        if expected is list and data is None:
            data = []
        if not isinstance(data, expected):
            raise call.unclear("without data")
        return data, whole(reply.get("time")) or call.now_ms()

    async def _private(self, call: Call, action: str, params: dict[str, str]) -> dict[str, Any]:
        keys = call.credentials
        reply = (await self._post(call, signed(params, keys.access_key, keys.secret_key, action))).json()
        if not isinstance(reply, dict) or "code" not in reply:
            raise call.unclear("without a code")
        if whole(reply["code"]) != 200:
            raise VenueRejected(str(reply.get("msg") or f"bitgo refused with code {reply['code']}"))
        return reply

    async def ticker(self, call: Call, params: m.Market) -> m.Ticker:
        data, time_ms = await self._public(call, dict, action="market", symbol=instrument(params.symbol))
        buy, sell, last, high, low, vol = (number(data.get(key)) for key in ("buy", "sell", "last", "high", "low", "vol"))
        return m.Ticker(time_ms=time_ms, buy=buy, sell=sell, last=last, high=high, low=low, vol=vol)

    async def depth(self, call: Call, params: m.Market) -> m.Depth:
        data, time_ms = await self._public(call, dict, action="depth", symbol=instrument(params.symbol))

        def side(name: str) -> list[m.Level]:
            return sorted(((number(row[0]), number(row[1])) for row in data.get(name) or []), reverse=name == "bids")

        return m.Depth(time_ms=time_ms, asks=side("asks"), bids=side("bids"))

    async def trades(self, call: Call, params: m.Market) -> list[m.TradeRow]:
        data, now_ms = await self._public(call, list, action="trades", symbol=instrument(params.symbol))

        def trade(row: dict[str, Any]) -> m.TradeRow:
            time = whole(row.get("time"))
            time_ms = (time if time > MILLISECONDS else time * 1000) or now_ms
            return m.TradeRow(
                id=whole(row.get("id")),
                time_ms=time_ms,
                price=number(row.get("price")),
                amount=number(row.get("amount")),
                type="buy" if row.get("en_type") == "bid" else "sell",
            )

        return sorted(map(trade, data), key=lambda row: row.time_ms)

    async def records(self, call: Call, params: m.Records) -> list[m.Candle]:
        data, _ = await self._public(call, list, action="kline", symbol=instrument(params.symbol), step=str(params.period_m * 60))

        def candle(row: list[Any]) -> m.Candle:
            time = whole(row[0])
            return m.Candle(time // 1000 if time > MILLISECONDS else time, *(number(value) for value in row[1:6]))

        candles = {candle.time_s: candle for candle in map(candle, data)}
        return [candles[time] for time in sorted(candles)][-(params.limit or 0) :]

    async def accounts(self, call: Call, _params: m.Empty) -> list[m.Balance]:
        data = (await self._private(call, "userinfo", {})).get("data") or {}
        free, frozen = (data.get(key) or {} for key in ("free", "frozen"))
        return [m.Balance(name, number(free.get(name)), number(frozen.get(name))) for name in sorted(free.keys() | frozen.keys())]

    async def trade(self, call: Call, params: m.Trade) -> m.Placed:
        fields = {"symbol": instrument(params.symbol), "price": plain(params.price), "amount": plain(params.amount)}
        reply = await self._private(call, "trade", fields | {"type": "0" if params.side == "buy" else "1"})
        order_id = whole(reply.get("orderId"))
        if not order_id:
            raise call.unclear("without an order id")
        return m.Placed(order_id)

    async def orders(self, call: Call, params: m.OrderList) -> list[m.Order]:
        data = (await self._private(call, "entrust", {"symbol": instrument(params.symbol)})).get("data") or []
        return [order(row | {"status": 1}) for row in data]

    async def order(self, call: Call, params: m.OrderRef) -> m.Order:
        order_id = id_of(params)
        data = (await self._private(call, "order", {"id": str(order_id)})).get("data") or []
        found = [order(row) for row in data if whole(row["id"]) == order_id]
        if not found:
            raise VenueRejected("order not found")
        return found[0]

    async def cancel(self, call: Call, params: m.OrderRef) -> bool:
        await self._private(call, "cancel_entrust", {"id": str(id_of(params))})
        return True

    async def api(self, call: Call, params: m.Api) -> Any:
        return await self._private(call, params.resource, params.query)


def order(row: dict[str, Any]) -> m.Order:
    return m.Order(
        id=whole(row["id"]),
        amount=number(row.get("count")),
        price=number(row["prize"] if "prize" in row else row.get("price")),
        status=STATUS[whole(row.get("status"))],  # type: ignore[arg-type]
        deal_amount=number(row.get("success_count")),
        type="buy" if whole(row.get("type")) == 0 else "sell",
        avg_price=Decimal(0),
    )


def id_of(params: m.OrderRef) -> int:
    if not params.id.strip().isdecimal():
        raise BadRequest(f"id: expected the whole number that trade answered, got {params.id[:40]!r}")
    return int(params.id)
