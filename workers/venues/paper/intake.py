"""What a request may say: bodies and query parameters checked field by field. Pure; every fault is a Refused that names the field."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

import msgspec
from msgspec import Meta, Struct

from workers.venues.paper.engine import Ticket
from workers.venues.paper.errors import Code, Refused
from workers.venues.paper.markets import find
from workers.venues.paper.money import positive

CLIENT_ORDER_ID = r"\A[A-Za-z0-9_-]{1,64}\Z"

_WHOLE = re.compile(r"[0-9]{1,15}")


class NewOrder(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /api/v1/orders; prices and amounts are decimal strings. Unknown fields are refused: a typo could cost money."""

    symbol: str
    side: Literal["buy", "sell"]
    type: Literal["limit", "market"]
    price: str | None = None
    amount: str | None = None
    quote_amount: str | None = None
    offset: Literal["open", "close"] | None = None
    client_order_id: Annotated[str, Meta(pattern=CLIENT_ORDER_ID)] | None = None
    expires_at: int | None = None


class NewLeverage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /api/v1/leverage."""

    symbol: str
    leverage: int


class _ClientOrderId(Struct, frozen=True):
    client_order_id: Annotated[str, Meta(pattern=CLIENT_ORDER_ID)] | None = None


class _Symbol(Struct, frozen=True):
    symbol: str = ""


_new_order = msgspec.json.Decoder(NewOrder)
_new_leverage = msgspec.json.Decoder(NewLeverage)
_client_order_id = msgspec.json.Decoder(_ClientOrderId)
_symbol = msgspec.json.Decoder(_Symbol)
_anything = msgspec.json.Decoder()


def client_order_id(body: bytes) -> str | None:
    """The client order id of an order's body, for the ledger: whatever else is wrong with it, None when there is no valid one."""
    try:
        return _client_order_id.decode(body).client_order_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def names_symbol(query: Mapping[str, str], body: bytes) -> str:
    """The symbol that a request names, listed or not, for the faults; "" when it names none."""
    try:
        return query.get("symbol") or _symbol.decode(body).symbol
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


def order(body: bytes, *, now_ms: int) -> Ticket:
    """The order that a body asks for. Raises Refused."""
    new: NewOrder = _decode(_new_order, body)
    if new.expires_at is not None and now_ms > new.expires_at:
        raise Refused(Code.EXPIRED, f"expires_at: arrived at {now_ms}, {now_ms - new.expires_at} ms too late")
    market = find(new.symbol)
    if not market.is_swap and new.offset is not None:
        raise Refused(Code.BAD_PARAMETER, "offset: only swaps have it")
    if new.type == "limit":
        _only(new, "limit", needed=("price", "amount"))
    elif new.quote_amount is not None and not market.is_swap and new.side == "buy":
        _only(new, "market", needed=("quote_amount",))
    else:
        _only(new, "market", needed=("amount",))
    return Ticket(
        market=market,
        side=new.side,
        kind=new.type,
        offset=(new.offset or "open") if market.is_swap else None,
        price=market.parse_price(new.price) if new.price is not None else 0,
        lots=market.parse_amount(new.amount) if new.amount is not None else 0,
        quote_amount=positive("quote_amount", new.quote_amount) if new.quote_amount is not None else 0,
        client_order_id=new.client_order_id,
    )


def leverage(body: bytes) -> NewLeverage:
    """Body of POST /api/v1/leverage. Raises Refused."""
    new: NewLeverage = _decode(_new_leverage, body)
    return new


def symbol(query: Mapping[str, str]) -> str:
    """The required parameter `symbol`, listed. Raises Refused(BAD_PARAMETER | UNKNOWN_SYMBOL)."""
    if (value := query.get("symbol")) is None:
        raise Refused(Code.BAD_PARAMETER, "symbol: the parameter is missing")
    return find(value).symbol


def optional_symbol(query: Mapping[str, str]) -> str | None:
    return symbol(query) if "symbol" in query else None


def number(query: Mapping[str, str], name: str, default: int, *, low: int, high: int) -> int:
    """A whole number within bounds. Raises Refused(BAD_PARAMETER)."""
    text = query.get(name)
    if text is None:
        return default
    if not _WHOLE.fullmatch(text) or not low <= int(text) <= high:
        raise Refused(Code.BAD_PARAMETER, f"{name}: expected a whole number from {low} to {high}")
    return int(text)


def parameters(query: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """Query and body (a JSON object or a form) of a call we know nothing about, merged; the body wins. Raises Refused(BAD_BODY)."""
    merged: dict[str, Any] = dict(query)
    text = body.strip()
    if text[:1] in (b"{", b"["):
        document = _decode(_anything, text)
        if not isinstance(document, dict):
            raise Refused(Code.BAD_BODY, "body: expected a JSON object")
        return merged | document
    try:
        return merged | dict(parse_qsl(text.decode(), keep_blank_values=True, errors="strict", max_num_fields=1_000))
    except ValueError:
        raise Refused(Code.BAD_BODY, "body: expected a JSON object or a form, in UTF-8") from None


def _decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as e:
        raise Refused(Code.BAD_PARAMETER, str(e)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        reason = "nested too deep" if isinstance(e, RecursionError) else "expected JSON in UTF-8"
        raise Refused(Code.BAD_BODY, f"body: {reason}") from None


def _only(new: NewOrder, kind: str, *, needed: tuple[str, ...]) -> None:
    for name in ("price", "amount", "quote_amount"):
        if (getattr(new, name) is None) == (name in needed):
            raise Refused(Code.BAD_PARAMETER, f"{name}: {'required for' if name in needed else 'not allowed in'} this {kind} order")
