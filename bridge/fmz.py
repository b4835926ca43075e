"""The FMZ general protocol, host side: the only file that knows its field names and envelope.

Tolerant in what it accepts (fmz-protocol B.4 and C), strict in what it emits. All functions here are pure.
"""

import functools
import secrets
from collections.abc import Callable
from decimal import Decimal
from hashlib import blake2b
from typing import Any, Literal
from urllib.parse import parse_qsl

import msgspec
from msgspec import NODEFAULT, Raw, Struct

from bus import subjects
from bus.errors import BadRequest, BusError
from bus.messages import Api, MarginLevel, Market, Success, decimal, encode_exact
from bus.methods import BY_IO, METHODS, Method
from bus.subjects import shown

API = "__api_"
VERBS = ("GET", "POST", "PUT", "DELETE", "PATCH")
MAX_ID = 200
MAX_PERIOD_M = 525_600
MAX_LIMIT = 5000
HIGHEST_EXPONENT = 30
UNIQUE_NONCE = 10**18
MILLISECONDS_AS_NS = 10**6
BLANK = "***"
SHOWN = (39, 38)
"""So many signs of a longer key are left where `shown` has cut it, behind one quotation mark or two."""
LEAST_SECRET = 8
"""A key of fewer signs is a word, not a secret."""
BOM = b"\xef\xbb\xbf"


class _Body(Struct):
    access_key: str | int | None = None
    secret_key: str | int | None = None
    nonce: Raw = Raw(b"null")
    method: str = ""
    params: dict[str, Raw] | None = None


class _QuoteParams(Struct, forbid_unknown_fields=True):
    symbol: str


class _Quote(Struct):
    """The plain form of the most frequent requests."""

    access_key: str
    secret_key: str
    method: Literal["ticker", "depth"]
    params: _QuoteParams
    nonce: Raw = Raw(b"null")


QUOTES = (b'"method":"ticker"', b'"method":"depth"')
_decode_quote = msgspec.json.Decoder(_Quote).decode
_decode = msgspec.json.Decoder(_Body).decode
_decode_any = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_args = msgspec.json.Decoder(list[Raw] | None).decode


class HostCall(Struct, frozen=True):
    """One call as a host made it. Its repr shows no key."""

    access_key: str
    secret_key: str
    method: Method
    params: Struct
    nonce_as_sent: Raw

    @property
    def nonce(self) -> int | None:
        """None where it cannot tell requests apart."""
        return _nonce(self.nonce_as_sent)

    def __repr__(self) -> str:
        return f"HostCall({self.method.name})"


def decode(body: bytes, verb: str = "") -> HostCall:
    """Read a request body. verb: header Http-Method, "" where it is absent. Raises BadRequest that names the field."""
    body = body.removeprefix(BOM)
    if QUOTES[0] in body or QUOTES[1] in body:
        quote = _quote(body)
        if quote is not None:
            return quote
    try:
        envelope = _decode(body.decode())  # msgspec leaves the UTF-8 of what it does not open unchecked
    except msgspec.ValidationError as e:
        raise BadRequest(f"body: {e}") from e
    except msgspec.DecodeError as e:
        raise BadRequest(f"body: not the JSON of an FMZ request ({e})") from e
    except (UnicodeDecodeError, RecursionError) as e:
        raise BadRequest("body: not the JSON of an FMZ request (bad UTF-8, or nested too deep)") from e
    params = envelope.params or {}
    try:
        access_key = _text(params.pop("access_key", _NULL)) or _key(envelope.access_key)
        secret_key = _text(params.pop("secret_key", _NULL)) or _key(envelope.secret_key)
    except ValueError as e:  # without the value: it is a key
        raise BadRequest("params: access_key and secret_key: expected strings") from e
    try:
        method, converted = _call(envelope.method, verb, params, body)
    except BadRequest as e:
        raise BadRequest(_blanked(str(e), access_key, secret_key)) from None
    # A key from a file ends with a newline that is not part of it; the ones inside a PEM are (fmz-protocol C.5).
    return HostCall(access_key.rstrip("\r\n"), secret_key.rstrip("\r\n"), method, converted, envelope.nonce)


def _quote(body: bytes) -> HostCall | None:
    """A request for a ticker or a depth, read in a quarter of the time; None for one that is to be looked at more closely."""
    try:
        quote = _decode_quote(body.decode())
        symbol = _symbol(quote.params.symbol.strip())
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, BadRequest):
        return None
    return HostCall(quote.access_key.rstrip("\r\n"), quote.secret_key.rstrip("\r\n"), METHODS[quote.method], Market(symbol), quote.nonce)


def _call(name: str, verb: str, params: dict[str, Raw], body: bytes) -> tuple[Method, Struct]:
    if name.startswith(API):
        return METHODS["__api"], _api(name[len(API) :], verb, params, body)
    if name == "io":
        return _io(params)
    method = METHODS.get(name)
    if method is None or method.io is not None or method.params is Api:
        raise not_supported(name)
    return method, _params(method, params)


def not_supported(method: str) -> BadRequest:
    if not method:
        return BadRequest("method: expected a name such as ticker, got nothing")
    return BadRequest(f"{method if len(method) <= subjects.MAX_NAME else shown(method)} not support")


def answer(reply: Success) -> bytes:
    """The envelope of a success; the worker's bytes are spliced, not encoded again."""
    data, raw = bytes(reply.data), bytes(reply.raw)
    return b'{"data":%b,"raw":%b}' % (data, raw) if raw else b'{"data":%b}' % data


def respelled(content: bytes, symbol: str, asked: str) -> bytes:
    """A ticker's envelope with its symbol in the host's spelling, for it lies under the one with the contract."""
    return content.replace(b'"symbol":' + msgspec.json.encode(symbol), b'"symbol":' + msgspec.json.encode(asked), 1)


def refuse(error: BusError, *keys: str) -> bytes:
    """The envelope of a failure: HTTP 200 all the same, the text is what the robot's log shows, without the keys in it."""
    return msgspec.json.encode({"error": type(error)(_blanked(str(error), *keys)).text})


def _blanked(text: str, *keys: str) -> str:
    """The text without the keys: a robot may have one in another field by mistake, and refusals quote fields."""
    for key in keys:
        for part in (key, *key.replace(",", "\n").splitlines()):
            for form in (part, *(part[:count] for count in SHOWN)):
                text = text.replace(form, BLANK) if len(form) >= LEAST_SECRET else text
    return text


def idempotency_key(path: str, call: HostCall, params: bytes, *, by_nonce: bool) -> str:
    """32 characters of [0-9a-f]: the same for the same request where its nonce can tell requests apart, else random."""
    nonce = call.nonce if by_nonce else None
    if nonce is None:
        return secrets.token_hex(16)
    parts = msgspec.msgpack.encode((path, call.access_key, nonce, call.method.name, params))
    return blake2b(parts, digest_size=16).hexdigest()


def encode_params(params: Struct) -> bytes:
    return encode_exact(params)


# ---------------------------------------------------------------- scalars, as hosts write them

_NULL = Raw(b"null")


def _key(value: str | int | None) -> str:
    return "" if value is None else str(value)


def _text(raw: Raw) -> str:
    """A scalar as text, digits untouched: "1.50" and 1.50 -> "1.50", null -> "". Raises ValueError for anything else."""
    data = bytes(raw)
    if data[:1] == b'"':
        return str(msgspec.json.decode(data, type=str))
    if data == b"null":
        return ""
    if data[:1] in b"-0123456789":
        return data.decode()
    raise ValueError("a string or a number")


def _nonce(raw: Raw) -> int | None:
    """The nonce where it tells requests apart: nanoseconds that are not milliseconds with zeros behind. Never through a float."""
    try:
        value = int(_text(raw))
    except ValueError:
        return None
    return value if value >= UNIQUE_NONCE and value % MILLISECONDS_AS_NS else None


@functools.lru_cache(maxsize=1 << 12)
def _symbol(text: str) -> str:
    if not text:
        raise BadRequest("symbol is empty! expected a symbol such as BTC_USDT")
    return subjects.name(text, "symbol")


def _any_symbol(text: str) -> str:
    return subjects.name(text, "symbol") if text else ""


def _number(text: str) -> Decimal:
    value = decimal(text)
    if not value:
        return Decimal(0)  # "-0" and "0e99" are no more than that
    if abs(value.adjusted()) > HIGHEST_EXPONENT:
        raise ValueError("a number of sensible size")
    return value


def _price(text: str) -> Decimal:
    try:
        return _number(text)
    except ValueError:
        raise ValueError("a decimal number, -1 for a market order") from None


def _amount(text: str) -> Decimal:
    try:
        value = _number(text)
    except ValueError:
        raise ValueError("a decimal number above 0") from None
    if value <= 0:
        raise ValueError("a decimal number above 0")
    return value


def _whole(text: str, least: int, most: int, what: str) -> int:
    try:
        value = decimal(text)
        if value == int(value) and least <= value <= most:
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{what} from {least} to {most}")


def _limit(text: str) -> int | None:
    return _whole(text, 0, MAX_LIMIT, "a number of bars") or None if text else None


def _id(text: str) -> str:
    if not text or len(text) > MAX_ID or not text.isprintable():
        raise ValueError(f"an order id of 1 to {MAX_ID} printable signs")
    return text


def _side(text: str) -> str:
    side = text.partition(";")[0].strip().lower()
    if side not in ("buy", "sell", "closebuy", "closesell"):
        raise ValueError("buy, sell, closebuy or closesell")
    return side


def _options(text: str) -> dict[str, str]:
    """What may follow the side: 'buy;{"k":"v"}' or 'buy;k=v&k2=v2'."""
    tail = text.partition(";")[2].strip()
    if tail.startswith("{"):
        try:
            return {key: _text(value) for key, value in _decode_any(tail).items()}
        except (msgspec.MsgspecError, RecursionError):
            raise ValueError("options as JSON or k=v&k2=v2 behind the semicolon") from None
    return dict(parse_qsl(tail, keep_blank_values=True))


# field of a params Struct -> (the host's name for it, how its text is read). A new field is one row.
FIELDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "symbol": ("symbol", _symbol),
    "period_m": ("period", lambda text: _whole(text, 1, MAX_PERIOD_M, "whole minutes")),
    "limit": ("limit", _limit),
    "side": ("type", _side),
    "options": ("type", _options),
    "price": ("price", _price),
    "amount": ("amount", _amount),
    "id": ("id", _id),
}


def _readers(params: type[Struct]) -> list[tuple[str, str, Callable[[str], Any]]]:
    """(our field, the host's name, how it is read) of each field that a host sends; the others are set later, by the worker."""
    readers = []
    for field in msgspec.structs.fields(params):
        if field.encode_name in FIELDS:
            name, read = FIELDS[field.encode_name]
            readers.append((field.name, name, _any_symbol if read is _symbol and field.default is not NODEFAULT else read))
    return readers


_READERS = {row.params: _readers(row.params) for row in METHODS.values()}  # made once: msgspec reads annotations anew at each call


def _params(method: Method, given: dict[str, Raw]) -> Struct:
    values = {}
    for field, name, read in _READERS[method.params]:
        raw = given.get(name, _NULL)
        try:
            # Ids stay as they are, byte for byte; every other scalar may have blanks around it.
            text = _text(raw) if name == "id" else _text(raw).strip()
            values[field] = read(text)
        except ValueError as e:
            got = "nothing" if bytes(raw) == b"null" else shown(bytes(raw).decode())
            raise BadRequest(f"{name}: expected {e}, got {got}") from None
    return method.params(**values)


def _api(resource: str, verb: str, params: dict[str, Raw], body: bytes) -> Api:
    """The resource is what follows the prefix, unchanged; unknown keys of the body travel with the query (fmz-protocol B.1)."""
    verb = verb.strip().upper() or "POST"
    if verb not in VERBS:
        raise BadRequest(f"verb: expected one of {', '.join(VERBS)}, got {shown(verb)}")
    if not resource or len(resource) > MAX_ID or not resource.isprintable():
        raise BadRequest(f"method: expected {API} and a resource of 1 to {MAX_ID} printable signs, got {shown(resource)}")
    beside = {key: value for key, value in _decode_any(body).items() if key not in _Body.__struct_fields__}
    return Api(resource, verb, {key: _query_value(value) for key, value in (beside | params).items()})  # type: ignore[arg-type]


def _query_value(raw: Raw) -> str:
    try:
        return _text(raw)
    except ValueError:
        return bytes(raw).decode()


def _io(params: dict[str, Raw]) -> tuple[Method, Struct]:
    try:
        code = _whole(_text(params.get("code", _NULL)), 0, 1_000_000, "a code")
    except ValueError:
        raise BadRequest("code: expected the number of a futures call, 0 to 3") from None
    try:
        given = _decode_args(params.get("args", _NULL)) or []
        args = [text for text in (_text(raw).strip() for raw in given) if text]
    except (msgspec.MsgspecError, ValueError):
        raise BadRequest("args: expected a list of strings and numbers") from None
    method = BY_IO.get(code)
    if method is None:
        raise not_supported(f"io {args[0]}" if code == 4 and args else f"io code {code}")
    return method, _IO_PARAMS[code](method, args)


def _io_level(_method: Method, args: list[str]) -> Struct:
    """One number and, from newer strategies, one symbol, in any order."""
    levels, symbols = [], []
    for arg in args:
        try:
            levels.append(_amount(arg))
        except ValueError:
            symbols.append(arg)
    if len(levels) != 1 or len(symbols) > 1:
        raise BadRequest("args: expected a leverage above 0, such as 10, and at most one symbol beside it")
    return MarginLevel(levels[0], _any_symbol(symbols[0] if symbols else ""))


def _io_direction(method: Method, args: list[str]) -> Struct:
    if len(args) != 1:
        raise BadRequest("args: expected one direction: buy, sell, closebuy or closesell")
    try:
        return method.params(_side(args[0]))
    except ValueError as e:
        raise BadRequest(f"args: expected {e}, got {shown(args[0])}") from None


def _io_contract(method: Method, args: list[str]) -> Struct:
    if len(args) != 1:
        raise BadRequest("args: expected one contract, such as swap or quarter")
    return method.params(subjects.name(args[0], "args"))


def _io_positions(method: Method, args: list[str]) -> Struct:
    if len(args) > 1:
        raise BadRequest("args: expected at most one contract or symbol")
    return method.params(_any_symbol(args[0] if args else ""))


_IO_PARAMS: dict[int, Callable[[Method, list[str]], Struct]] = {0: _io_level, 1: _io_direction, 2: _io_contract, 3: _io_positions}
