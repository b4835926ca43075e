"""What the public sees of a market: the documents of markets, ticker, depth, trades, candles, mark price and funding. Pure."""

from functools import cached_property
from itertools import takewhile
from typing import NamedTuple

from workers.venues.paper import funding
from workers.venues.paper import market as price_model
from workers.venues.paper.engine import Engine, Trade
from workers.venues.paper.markets import MARKETS

DAY_S = 86_400

MOST_DEPTH = 200


class View:
    """One market at one moment, looked at once for all channels."""

    def __init__(self, engine: Engine, symbol: str, now_ms: int) -> None:
        self.engine, self.symbol, self.now_ms = engine, symbol, now_ms
        self.book = engine.books[symbol]
        self.own = engine.depth(symbol)

    @cached_property
    def asks(self) -> list[tuple[int, int]]:
        return self.book.visible("sell", self.own, MOST_DEPTH)

    @cached_property
    def bids(self) -> list[tuple[int, int]]:
        return self.book.visible("buy", self.own, MOST_DEPTH)

    @cached_property
    def best(self) -> tuple[int, int]:
        """Ask and bid, in ticks, as the ticker has them."""
        return self.book.best("sell", self.own), self.book.best("buy", self.own)


def markets(engine: Engine) -> list[dict[str, object]]:
    return [market.listing() | engine.rates[market.kind].listing() for market in MARKETS.values()]


def ticker(engine: Engine, symbol: str, now_ms: int) -> dict[str, object]:
    """Best prices of users and market together; last, open, high, low and volume are the market's own, over the 24 hours until now."""
    book, depth = engine.books[symbol], engine.depth(symbol)
    ask, bid = (book.best(side, depth) for side in ("sell", "buy"))
    return ticker_of(engine.seed, symbol, book.second, ask=ask, bid=bid, time_ms=now_ms)


def ticker_of(seed: int, symbol: str, second: int, *, ask: int, bid: int, time_ms: int) -> dict[str, object]:
    """The ticker of any second, given what were the best prices."""
    market, day = MARKETS[symbol], price_model.span(seed, symbol, second + 1 - DAY_S, second + 1)
    return {
        "symbol": symbol,
        "time": time_ms,
        "bid": market.price_text(bid),
        "ask": market.price_text(ask),
        "last": market.price_text(day.close),
        "open": market.price_text(day.open),
        "high": market.price_text(day.high),
        "low": market.price_text(day.low),
        "volume": market.amount_text(day.volume),
    }


def depth(engine: Engine, symbol: str, limit: int, now_ms: int) -> dict[str, object]:
    market, book, own = MARKETS[symbol], engine.books[symbol], engine.depth(symbol)
    asks, bids = (
        [[market.price_text(price), market.amount_text(lots)] for price, lots in book.visible(side, own, limit)] for side in ("sell", "buy")
    )
    return {"symbol": symbol, "time": now_ms, "sequence": book.sequence, "asks": asks, "bids": bids}


class _Row(NamedTuple):
    time_ms: int
    name: str
    price: int
    lots: int
    side: str


def trades(engine: Engine, symbol: str, limit: int) -> list[dict[str, object]]:
    """The newest trades of the market's tape and of users, ascending by time."""
    tape = price_model.tape(engine.seed, symbol, limit, engine.books[symbol].second)
    return _trades(symbol, tape, [t for t in engine.tapes[symbol] if t.time_ms >= tape[0].second * 1000], limit)


def trades_after(engine: Engine, symbol: str, second: int, number: int) -> list[dict[str, object]]:
    """The trades of the market's tape after `second` and of users after their trade `number`, ascending by time."""
    tape = [p for at in range(second + 1, engine.books[symbol].second + 1) for p in price_model.prints(engine.seed, symbol, at)]
    of_users = list(takewhile(lambda t: t.number > number, reversed(engine.tapes[symbol])))[::-1]
    return _trades(symbol, tape, of_users, len(tape) + len(of_users))


def _trades(symbol: str, tape: list[price_model.Print], of_users: list[Trade], limit: int) -> list[dict[str, object]]:
    market = MARKETS[symbol]
    own = [_Row(p.second * 1000, str(p.second * 10 + p.number), p.price, p.lots, p.side) for p in tape]
    users = [_Row(t.time_ms, f"u{t.number}", t.price, t.lots, t.side) for t in of_users]
    return [
        {
            "id": row.name,
            "time": row.time_ms,
            "price": market.price_text(row.price),
            "amount": market.amount_text(row.lots),
            "side": row.side,
        }
        for row in sorted(own + users, key=_time)[-limit:]
    ]


def _time(row: _Row) -> int:
    return row.time_ms


def candles(seed: int, symbol: str, *, interval: int, limit: int, end_ms: int, now_ms: int) -> list[list[object]]:
    """[start in ms, open, high, low, close, volume], ascending; interval in minutes."""
    market = MARKETS[symbol]
    found = price_model.candles(seed, symbol, interval_s=interval * 60, limit=limit, end_ms=end_ms, now_s=now_ms // 1000)
    return [[start_ms, *map(market.price_text, bar[:4]), market.amount_text(bar.volume)] for start_ms, bar in found]


def mark(engine: Engine, symbol: str, now_ms: int) -> dict[str, object]:
    """Of a swap: what positions are valued at, and the price it is made from."""
    market = MARKETS[symbol]
    index = funding.index(engine.seed, market, engine.books[symbol].second)
    return {
        "symbol": symbol,
        "time": now_ms,
        "mark_price": market.price_text(engine.mark(symbol)),
        "index_price": market.price_text(index),
    }


def funding_rates(engine: Engine, symbol: str, limit: int, now_ms: int) -> dict[str, object]:
    """Of a swap: the rate of the interval that runs, and the last `limit` that were settled, ascending by when."""
    second = engine.books[symbol].second
    next_s = funding.next_end(second)
    ends = range(next_s - limit * funding.INTERVAL_S, next_s, funding.INTERVAL_S)

    def rate(end_s: int) -> str:
        return funding.rate_text(funding.rate(engine.seed, symbol, end_s // funding.INTERVAL_S - 1))

    return {
        "symbol": symbol,
        "time": now_ms,
        "rate": rate(next_s),
        "next_time": next_s * 1000,
        "history": [{"time": end_s * 1000, "rate": rate(end_s)} for end_s in ends if end_s > 0],
    }
