"""MyExchange as a venue: a REST API with HMAC-SHA256, in one file.

It speaks the API of fmzbus's paper exchange (workers/venues/paper/README.md), so that it works at once. For an exchange of your own go
from top to bottom: each CHANGE says what to change and where in the exchange's API page to find it. Check after each step.
"""

import hmac
from typing import Any, Literal
from urllib.parse import quote, urlencode

from bus import config
from bus import messages as m
from bus.errors import BusError, Expired, VenueRejected
from workers.http import Call


class NotFound(VenueRejected):
    """No such order."""


BASE_URL = "http://127.0.0.1:8000"  # CHANGE: scheme and host of the API ("Base URL"); base_url in [venues.NAME] wins over it
SYMBOLS = {"BTC": "BTC_USDT", "ETH": "ETH_USDT"}  # CHANGE: host's name -> exchange's ("Markets"); what is not listed passes on
# CHANGE: "Error codes". What is not listed is VenueRejected: final, told in the exchange's words. Never list "internal error" as such.
CODES: dict[int, type[BusError]] = {1004: Expired, 2011: NotFound}
# CHANGE: "Order status". Every value there is: resting and partly filled are open; rejected and expired are cancelled.
STATUS: dict[str, Literal["open", "closed", "cancelled"]] = {"open": "open", "closed": "closed", "cancelled": "cancelled"}


def instrument(symbol: str) -> str:
    """BTC_USDT, btc_usdt and btc are one market."""
    return SYMBOLS.get(symbol.upper(), symbol.upper())


def sign(secret: str, *, timestamp: str, window: str, verb: str, target: str, body: bytes) -> str:
    """CHANGE: "Authentication". Tested with the page's worked example; target and body are the exact bytes that are sent."""
    return hmac.new(secret.encode(), "\n".join((timestamp, window, verb, target, "")).encode() + body, "sha256").hexdigest()


def order(row: dict[str, Any]) -> m.Order:
    """CHANGE: "Query order". number() takes text and JSON numbers, exactly; ids stay the text or the number that they are."""
    side, status = row["side"], STATUS[row["status"]]  # a status that is not in the table is an error, never a guess
    price, amount, done, average = (m.number(row[name]) for name in ("price", "amount", "filled", "average_price"))  # null is 0
    return m.Order(id=str(row["id"]), type=side, status=status, price=price, amount=amount or done, deal_amount=done, avg_price=average)


class MyExchange:
    public = frozenset({"ticker", "depth", "trades", "records"})  # reads that need no key and tell everybody the same
    contracts = False  # True needs positions() and margin_level(), see workers/venues/__init__.py
    lookups = frozenset({"client_order_id"})  # frozenset() where an order cannot be asked for by your own id: delete find_order()

    def __init__(self, name: str, settings: config.Venue) -> None:
        self._base = (settings.base_url or BASE_URL).rstrip("/")

    async def _send(self, call: Call, verb: str, path: str, query: Any = None, *, body: Any = None, signed: bool = True) -> Any:
        target = f"/api/v1{path}" + (f"?{urlencode(query)}" if query else "")
        content = m.encode(body) if body else b""
        headers = {"Content-Type": "application/json"}
        if signed:
            secret, timestamp = call.credentials.secret_key, str(call.now_ms())
            headers |= {"Paper-Key": call.credentials.access_key, "Paper-Timestamp": timestamp, "Paper-Window": "5000"}
            headers |= {"Paper-Sign": sign(secret, timestamp=timestamp, window="5000", verb=verb, target=target, body=content)}
            headers |= {"Paper-Secret": secret}  # CHANGE: delete; only the paper exchange, which has no sign-up form, is shown it
        answer = await call.send(verb, self._base + target, headers=headers, body=content or None)  # once, and within the deadline
        reply = answer.json()
        if answer.status >= 400:  # CHANGE: "Errors". Where errors come as HTTP 200 look at the code in the body instead
            raise CODES.get(reply["code"], VenueRejected)(f"{call.exchange} {reply['code']} {reply['message']}")
        return reply

    async def ticker(self, call: Call, params: m.Market) -> m.Ticker:
        row = await self._send(call, "GET", "/ticker", {"symbol": instrument(params.symbol)}, signed=False)
        buy, sell, last, high, low, vol = (m.number(row[name]) for name in ("bid", "ask", "last", "high", "low", "volume"))
        return m.Ticker(time_ms=row["time"], buy=buy, sell=sell, last=last, high=high, low=low, vol=vol)  # ms; vol in base currency

    async def depth(self, call: Call, params: m.Market) -> m.Depth:
        book = await self._send(call, "GET", "/depth", {"symbol": instrument(params.symbol)}, signed=False)
        asks, bids = ([(m.number(row[0]), m.number(row[1])) for row in book[side]] for side in ("asks", "bids"))
        return m.Depth(time_ms=book["time"], asks=sorted(asks), bids=sorted(bids, reverse=True))  # best first

    async def trades(self, call: Call, params: m.Market) -> list[m.TradeRow]:
        rows = await self._send(call, "GET", "/trades", {"symbol": instrument(params.symbol)}, signed=False)
        tape = [(row["time"], row["id"], m.number(row["price"]), m.number(row["amount"]), row["side"]) for row in rows]
        return [m.TradeRow(time_ms=ms, id=i, price=price, amount=amount, type=side) for ms, i, price, amount, side in sorted(tape)]

    async def records(self, call: Call, params: m.Records) -> list[m.Candle]:
        query = {"symbol": instrument(params.symbol), "interval": params.period_m, "limit": min(params.limit or 500, 1000)}
        rows = await self._send(call, "GET", "/candles", query, signed=False)
        return [m.Candle(row[0] // 1000, *map(m.number, row[1:6])) for row in sorted(rows)]  # seconds, oldest first

    async def accounts(self, call: Call, params: m.Empty) -> list[m.Balance]:
        rows = (await self._send(call, "GET", "/account"))["balances"]
        return [m.Balance(row["currency"], m.number(row["free"]), m.number(row["frozen"])) for row in rows]

    async def trade(self, call: Call, params: m.Trade) -> m.Placed:
        body = {"symbol": instrument(params.symbol), "side": params.side, "client_order_id": call.client_order_id}
        if params.is_market:  # CHANGE: a buy's amount is money in the quote currency; refuse it where the exchange has no such order
            body |= {"type": "market", ("quote_amount" if params.side == "buy" else "amount"): m.plain(params.amount)}
        else:  # plain() writes 1e-8 as 0.00000001; never float()
            body |= {"type": "limit", "price": m.plain(params.price), "amount": m.plain(params.amount)}
        row = await self._send(call, "POST", "/orders", body=body)
        if not row.get("id"):
            raise call.unclear("without an order id")  # the host reads "outcome unknown": the order may be alive
        return m.Placed(str(row["id"]))

    async def order(self, call: Call, params: m.OrderRef) -> m.Order:
        return order(await self._send(call, "GET", f"/orders/{quote(params.id, safe='')}"))

    async def orders(self, call: Call, params: m.OrderList) -> list[m.Order]:
        rows = await self._send(call, "GET", "/orders", {"symbol": instrument(params.symbol)} if params.symbol else None)
        return [order(row) for row in rows]  # open ones only

    async def cancel(self, call: Call, params: m.OrderRef) -> bool:
        await self._send(call, "DELETE", f"/orders/{quote(params.id, safe='')}")
        return True  # a refusal was raised above

    async def find_order(self, call: Call, client_order_id: str, symbol: str) -> m.Order | None:
        try:
            return order(await self._send(call, "GET", f"/orders/by-client-id/{client_order_id}"))
        except NotFound:  # nothing else is proof that there is no order
            return None
