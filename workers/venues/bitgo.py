"""bitgo: the worked example of FMZ's general-protocol document (topic 1052), the pattern for a venue of one's own.

Every call is a POST to <base_url>/appApi.html with all in the query, a private one with `sign`: upper-case MD5 of the sorted, unescaped
parameters and the secret. Hosts get the same values as of the document's Go program, but for its faults (fmz-protocol).
"""

from decimal import Decimal
from hashlib import md5
from typing import Any
from urllib.parse import quote, urlencode

from bus import config
from bus import messages as m
from bus.errors import BadRequest, VenueRejected
from bus.messages import host_id, number, plain
from workers.http import Call
from workers.venues import PUBLIC

BASE_URL = "https://www.bitgo.cn"
SYMBOLS = {"btc": "1", "ltc": "2", "etp": "3", "eth": "4", "etc": "5", "doge": "6", "bec": "7"}
STATUS = {1: "open", 2: "open", 3: "closed", 4: "cancelled"}


def instrument(symbol: str) -> str:
    """The exchange's number of a market: "BTC_CNY" -> "1"; what the table does not know passes unchanged."""
    return SYMBOLS.get(symbol.lower().replace("_cny", ""), symbol)


def signed(params: dict[str, str], access_key: str, secret_key: str, action: str) -> dict[str, str]:
    """The parameters of a private call. Keys lose a leading "!", a quirk of the sample's sorter."""
    fields = {key.removeprefix("!"): value for key, value in params.items()} | {"api_key": access_key}
    text = "&".join(f"{key}={fields[key]}" for key in sorted(fields)) + f"&secret_key={secret_key}"
    return fields | {"sign": md5(text.encode()).hexdigest().upper(), "action": action}  # noqa: S324 - the exchange's own choice


def whole(value: object) -> int:
    return int(number(value))


def in_ms(value: object) -> int:
    """A time that the exchange tells in seconds, in some places in ms."""
    return time if (time := whole(value)) > 10**11 else time * 1000


class Bitgo:
    public = PUBLIC
    contracts = False
    lookups = frozenset[str]()

    def __init__(self, name: str, settings: config.Venue) -> None:
        self._url = f"{(settings.base_url or BASE_URL).rstrip('/')}/appApi.html"

    async def _post(self, call: Call, params: dict[str, str]) -> Any:
        url = f"{self._url}?{urlencode(sorted(params.items()), quote_via=quote, safe='')}"
        return (await call.send("POST", url, headers={"Content-Type": "application/x-www-form-urlencoded"})).json()

    async def _public(self, call: Call, *, otherwise: Any = None, **params: str) -> tuple[Any, int]:
        """-> (data, otherwise what stands for none of it; time in ms, now where the exchange gave none)."""
        reply = await self._post(call, params)
        data = (reply.get("data") if isinstance(reply, dict) else None) or otherwise
        if data is None:
            raise call.unclear("without data")
        return data, whole(reply.get("time")) or call.now_ms()

    async def _private(self, call: Call, action: str, params: dict[str, str]) -> dict[str, Any]:
        reply = await self._post(call, signed(params, call.credentials.access_key, call.credentials.secret_key, action))
        if not isinstance(reply, dict) or "code" not in reply:
            raise call.unclear("without a code")
        if whole(reply["code"]) != 200:
            raise VenueRejected(str(reply.get("msg") or f"bitgo refused with code {reply['code']}"))
        return reply

    async def ticker(self, call: Call, params: m.Market) -> m.Ticker:
        data, time_ms = await self._public(call, action="market", symbol=instrument(params.symbol))
        buy, sell, last, high, low, vol = (number(data.get(key)) for key in ("buy", "sell", "last", "high", "low", "vol"))
        return m.Ticker(time_ms=time_ms, buy=buy, sell=sell, last=last, high=high, low=low, vol=vol)

    async def depth(self, call: Call, params: m.Market) -> m.Depth:
        data, time_ms = await self._public(call, action="depth", symbol=instrument(params.symbol))
        asks, bids = ([(number(row[0]), number(row[1])) for row in data.get(side) or []] for side in ("asks", "bids"))
        return m.Depth(time_ms=time_ms, asks=sorted(asks), bids=sorted(bids, reverse=True))

    async def trades(self, call: Call, params: m.Market) -> list[m.TradeRow]:
        data, now_ms = await self._public(call, otherwise=[], action="trades", symbol=instrument(params.symbol))
        return [
            m.TradeRow(
                id=host_id(whole(row.get("id"))),
                time_ms=in_ms(row.get("time")) or now_ms,
                price=number(row.get("price")),
                amount=number(row.get("amount")),
                type="buy" if row.get("en_type") == "bid" else "sell",
            )
            for row in sorted(data, key=lambda row: in_ms(row.get("time")))
        ]

    async def records(self, call: Call, params: m.Records) -> list[m.Candle]:
        data, _ = await self._public(call, otherwise=[], action="kline", symbol=instrument(params.symbol), step=str(params.period_m * 60))
        rows = {in_ms(row[0]) // 1000: row[1:6] for row in data}
        return [m.Candle(time_s, *map(number, rows[time_s])) for time_s in sorted(rows)][-(params.limit or 0) :]

    async def accounts(self, call: Call, _params: m.Empty) -> list[m.Balance]:
        data = (await self._private(call, "userinfo", {})).get("data") or {}
        free, frozen = (data.get(key) or {} for key in ("free", "frozen"))
        return [m.Balance(name, number(free.get(name)), number(frozen.get(name))) for name in sorted(free.keys() | frozen.keys())]

    async def trade(self, call: Call, params: m.Trade) -> m.Placed:
        fields = {"symbol": instrument(params.symbol), "price": plain(params.price), "amount": plain(params.amount)}
        reply = await self._private(call, "trade", fields | {"type": "0" if params.side == "buy" else "1"})
        if not (order_id := whole(reply.get("orderId"))):
            raise call.unclear("without an order id")
        return m.Placed(host_id(order_id))

    async def orders(self, call: Call, params: m.OrderList) -> list[m.Order]:
        data = (await self._private(call, "entrust", {"symbol": instrument(params.symbol)})).get("data") or []
        return [order(row | {"status": 1}) for row in data]

    async def order(self, call: Call, params: m.OrderRef) -> m.Order:
        data = (await self._private(call, "order", {"id": str(id_of(params))})).get("data") or []
        found = [order(row) for row in data if whole(row["id"]) == id_of(params)]
        if not found:
            raise VenueRejected("order not found")
        return found[0]

    async def cancel(self, call: Call, params: m.OrderRef) -> bool:
        await self._private(call, "cancel_entrust", {"id": str(id_of(params))})
        return True

    async def api(self, call: Call, params: m.Api) -> Any:
        if params.verb == "GET":  # it would go out unjournaled, and here everything is a POST
            raise BadRequest("method: expected POST, every raw call of this exchange is a write")
        return await self._private(call, params.resource, params.query)


def order(row: dict[str, Any]) -> m.Order:
    return m.Order(
        id=host_id(whole(row["id"])),
        amount=number(row.get("count")),
        price=number(row["prize"] if "prize" in row else row.get("price")),
        status=STATUS[whole(row.get("status"))],  # type: ignore[arg-type]
        deal_amount=number(row.get("success_count")),
        type="buy" if whole(row.get("type")) == 0 else "sell",
        avg_price=Decimal(0),
    )


def id_of(params: m.OrderRef) -> int:
    if not (params.id.isascii() and params.id.strip().isdecimal()):
        raise BadRequest(f"id: expected the whole number that trade answered, got {params.id[:40]!r}")
    return int(params.id)
