"""What travels: requests and replies on the bus, params of each method, results in the host's own shape.

New fields have defaults and old ones keep their type, so that old and new processes read each other. Prices and amounts are
Decimal. A result is encoded once, by the worker, and spliced by the bridge: its field names on the wire are the FMZ general
protocol's (fmz-protocol B.1).
"""

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

import msgspec
from msgspec import Raw, Struct, field

from bus.errors import BusError, from_wire

# ---------------------------------------------------------------- the envelope


class Request(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One call on the bus; seal.py binds it to the sealed credentials.

    path: the whole service path, "okx/robot-7"; with the account it names the futures state.
    params: JSON of METHODS[method].params.
    expires_at_ms: bus time; a worker refuses later, so that no order is placed for a caller who has gone.
    idempotency_key: 32 characters of [0-9a-f]; becomes the venue's client order id.
    key_id, sealed: which worker key opens the credentials, and the SealedBox.
    trace: the worker says how long it and the exchange took.
    asked_ms: when the bridge took a write from its host, bus time; 0 for a read.
    resolved: the symbol of a public read is meant as it stands, whatever the session's contract is.
    """

    exchange: str
    path: str
    method: str
    params: Raw
    expires_at_ms: int
    idempotency_key: str
    key_id: str
    sealed: bytes
    trace: bool = False
    asked_ms: int = 0
    resolved: bool = False


class Spans(Struct, frozen=True):
    """How long a worker held the request, and how long of that the exchange took, both in ms."""

    worker_ms: float
    venue_ms: float


class Robot(Struct, frozen=True):
    """The futures state that a worker read for a call. session: its key (subjects.session_key); contract: "" for spot."""

    session: str
    contract: str


class Success(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="ok"):
    """data: the result as finished JSON in the host's shape. raw: the exchange's own words, for the host's `Info`; b"" for none.
    tell: the worker that wants to know (subjects.told) once the host has the answer to an order, "" for none. robot: whose futures state
    the answer rests on, None where it rests on none."""

    data: Raw
    raw: Raw = Raw()
    spans: Spans | None = None
    tell: str = ""
    robot: Robot | None = None


class Failure(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="error"):
    """code: of bus/errors.py. message: one line without secrets."""

    code: str
    message: str
    spans: Spans | None = None

    @classmethod
    def of(cls, error: BusError, spans: Spans | None = None) -> "Failure":
        return cls(code=error.code, message=str(error), spans=spans)

    @property
    def error(self) -> BusError:
        return from_wire(self.code, self.message)


Reply = Success | Failure

encode = msgspec.json.Encoder(decimal_format="number").encode
"""For results: a Decimal leaves as a plain JSON number."""
encode_exact = msgspec.json.Encoder().encode
"""For params: a Decimal leaves as a string, and comes back digit for digit."""
decode_reply: Callable[[bytes], Reply] = msgspec.json.Decoder(Reply).decode
decode_request = msgspec.json.Decoder(Request).decode

# ---------------------------------------------------------------- params


class Empty(Struct, frozen=True):
    """No params: accounts."""


class Market(Struct, frozen=True):
    """symbol: as the host wrote it, "BTC_USDT" or "BTC_USDT.swap"."""

    symbol: str


class Records(Struct, frozen=True):
    """period_m: minutes, 1 or more. limit: how many bars, None for what the exchange gives in one call."""

    symbol: str
    period_m: int
    limit: int | None = None


class Trade(Struct, frozen=True):
    """An order to place.

    price: in quote; 0 or less is a market order, whose amount is money in the quote currency for a spot buy.
    amount: base currency, or contracts; above 0.
    side: what the host wrote. closebuy and closesell close a long and a short; calls.py turns them into side and offset.
    offset: "open" or "close" for a contract, "" for spot; set by calls.py.
    options: what followed a ";" in the host's type.
    """

    symbol: str
    side: Literal["buy", "sell", "closebuy", "closesell"]
    price: Decimal
    amount: Decimal
    offset: Literal["", "open", "close"] = ""
    options: dict[str, str] = {}

    @property
    def is_market(self) -> bool:
        return self.price <= 0


class OrderRef(Struct, frozen=True):
    """id: byte for byte what `trade` answered. symbol: "" where the host sent none."""

    id: str
    symbol: str = ""


class OrderList(Struct, frozen=True):
    """symbol: "" for every market."""

    symbol: str = ""


class Api(Struct, frozen=True):
    """A raw call. resource: what followed `__api_`, unchanged. query: the host's values as they came. verb: of header Http-Method."""

    resource: str
    verb: Literal["GET", "POST", "PUT", "DELETE", "PATCH"] = "POST"
    query: dict[str, str] = {}


class MarginLevel(Struct, frozen=True):
    level: Decimal
    symbol: str = ""


class Direction(Struct, frozen=True):
    direction: Literal["buy", "sell", "closebuy", "closesell"]


class ContractType(Struct, frozen=True):
    """contract: "swap", "quarter", ... or an exchange's own code."""

    contract: str


class Positions(Struct, frozen=True):
    """symbol: a contract code, a symbol or a range such as USDT.swap; "" for all."""

    symbol: str = ""


# ---------------------------------------------------------------- results, in the host's shape


class Ticker(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """time: ms. vol: 24 h in base currency, contracts for futures. symbol: the caller's spelling."""

    time_ms: int = field(name="time")
    buy: Decimal
    sell: Decimal
    last: Decimal
    high: Decimal
    low: Decimal
    vol: Decimal
    open: Decimal | None = None
    symbol: str | None = None


Level = tuple[Decimal, Decimal]


class Depth(Struct, frozen=True, kw_only=True):
    """Levels are (price, amount), best first: asks ascending, bids descending."""

    time_ms: int = field(name="time")
    asks: list[Level]
    bids: list[Level]


class TradeRow(Struct, frozen=True, kw_only=True):
    """One trade of the public tape; rows ascend by time."""

    id: int | str
    time_ms: int = field(name="time")
    price: Decimal
    amount: Decimal
    type: Literal["buy", "sell"]


class Candle(Struct, frozen=True, array_like=True):
    """One row of `records`. time_s: start of the bar in SECONDS, the one place of the protocol that is not ms."""

    time_s: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal


class Balance(Struct, frozen=True):
    """free: available, frozen excluded. One row per currency."""

    currency: str
    free: Decimal
    frozen: Decimal


class Placed(Struct, frozen=True):
    """id: accepted unchanged by `order` and `cancel`."""

    id: int | str


class Order(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """price: 0 for a market order. avg_price: 0 if unknown. time: ms."""

    id: int | str
    amount: Decimal
    price: Decimal
    status: Literal["open", "closed", "cancelled"]
    deal_amount: Decimal
    type: Literal["buy", "sell"]
    avg_price: Decimal
    symbol: str | None = None
    time_ms: int | None = field(name="time", default=None)
    contract_type: str | None = None
    offset: int | None = None


class Position(Struct, frozen=True, kw_only=True, rename="pascal"):
    """FMZ's position structure. type: 0 long, 1 short. amount: contracts, positive. profit: in margin currency."""

    symbol: str
    margin_level: Decimal
    amount: Decimal
    frozen_amount: Decimal
    price: Decimal
    profit: Decimal
    type: Literal[0, 1]
    contract_type: str
    margin: Decimal


class WithRaw(Struct, frozen=True):
    """A result together with the exchange's own reply, where that is cheap."""

    data: Any
    raw: Any


# ---------------------------------------------------------------- numbers

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,2})?", re.ASCII)


def decimal(text: str) -> Decimal:
    """A number a host or an exchange wrote: "0.1", "1e-8", with blanks around.

    Raises ValueError, also for NaN, Infinity and what no double can hold: that is how hosts read the JSON numbers that we emit.
    """
    text = text.strip()
    if len(text) > 64 or not _NUMBER.fullmatch(text):
        raise ValueError("not a number")
    try:
        return Decimal(text)
    except InvalidOperation as e:
        raise ValueError("not a number") from e


def number(value: object) -> Decimal:
    """A number in an exchange's answer: JSON number or string, thousands commas allowed, None is 0.

    Raises ValueError, which workers/calls.py turns into what an unreadable answer means: for a write that was sent, not a failure.
    """
    if value is None:
        return Decimal(0)
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise ValueError("something else where a number belongs")
    return decimal(str(value).replace(",", ""))


def plain(value: Decimal) -> str:
    """A Decimal as exchanges read it: no exponent, no trailing zeros, "1E-8" -> "0.00000001"."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def host_id(value: int) -> int | str:
    """An id as it may leave: above 2^53 a host would lose digits of a number, so it leaves as a string (fmz-protocol C.3)."""
    return value if abs(value) <= 2**53 else str(value)
