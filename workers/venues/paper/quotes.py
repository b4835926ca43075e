"""What the public sees of a market: the documents of ticker, depth, trades and candles. Pure."""

from typing import NamedTuple

from workers.venues.paper import market as price_model
from workers.venues.paper.engine import Engine
from workers.venues.paper.markets import MARKETS

DAY_S = 86_400


def ticker(engine: Engine, symbol: str, now_ms: int) -> dict[str, object]:
    """Best prices of users and market together; last, open, high, low and volume are the market's own, over the 24 hours until now."""
    market, book, depth = MARKETS[symbol], engine.books[symbol], engine.depth(symbol)
    day = price_model.span(engine.seed, symbol, book.second + 1 - DAY_S, book.second + 1)
    ask, bid = (book.best(side, depth) for side in ("sell", "buy"))
    return {
        "symbol": symbol,
        "time": now_ms,
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
    market, second = MARKETS[symbol], engine.books[symbol].second
    tape = price_model.tape(engine.seed, symbol, limit, second)
    own = [_Row(p.second * 1000, str(p.second * 10 + p.number), p.price, p.lots, p.side) for p in tape]
    users = [_Row(t.time_ms, f"u{t.number}", t.price, t.lots, t.side) for t in engine.tapes[symbol] if t.time_ms >= own[0].time_ms]
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
