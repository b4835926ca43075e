"""What an exchange's socket tells, in our words: what Feed.parse() makes of a frame. Pure data."""

from msgspec import Struct

from bus.messages import Candle, Level, Ticker, TradeRow


class Channel(Struct, frozen=True):
    """What can be subscribed to. kind: "ticker", "depth", "trades" or "candles"; instrument: in the exchange's spelling; period_m: of
    candles, in minutes."""

    kind: str
    instrument: str
    period_m: int = 0


class Update(Struct, frozen=True, kw_only=True):
    """time_ms: when the exchange sent it, by the exchange's clock; None where it does not say."""

    channel: Channel
    time_ms: int | None = None


class Quote(Update, frozen=True):
    ticker: Ticker


class BookSnapshot(Update, frozen=True):
    """A whole book. Levels: (price in quote, amount in base). sequence, checksum: None where the exchange has none."""

    bids: list[Level]
    asks: list[Level]
    sequence: int | None = None
    checksum: int | None = None


class BookDelta(Update, frozen=True):
    """The levels of a book that changed; amount 0 removes one. previous: the sequence that it goes on from."""

    bids: list[Level]
    asks: list[Level]
    previous: int | None = None
    sequence: int | None = None
    checksum: int | None = None


class Tape(Update, frozen=True):
    """Public trades, ascending by time. whole: the newest there are, in place of what was told before; else what is new."""

    rows: list[TradeRow]
    whole: bool = False


class Bars(Update, frozen=True):
    """Candles, ascending by time; the last one may be unfinished, and one with the time of an earlier one replaces it."""

    candles: list[Candle]


class Refused(Update, frozen=True):
    """The exchange does not accept the subscription, in its own words."""

    why: str
