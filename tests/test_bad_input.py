"""What no robot should send, through the whole system: one clear line, HTTP 200, the connection kept, nothing sent to an exchange."""

import asyncio
import re
import string
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec import Struct

from tests import exchanges, servers
from tests.exchanges import Exchange

pytestmark = pytest.mark.slow

ACCESS, SECRET = "AKIAdistinctive", "topsecretdistinctive"
NOT_JSON = "body: not the JSON of an FMZ request"
MALFORMED = "body: not a well-formed POST (a bad head, length or chunk, or a header over 8190 bytes)"
DEADLINE_S = 3.0


class Got(Struct, frozen=True):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        """The text of a refusal, after a look at all that a refusal must be."""
        assert (self.status, self.headers["content-type"]) == (200, "application/json")
        envelope = msgspec.json.decode(self.body)
        assert envelope.keys() == {"error"}
        text: str = envelope["error"]
        assert len(text.splitlines()) == 1
        assert len(text) < 600
        for secret in (ACCESS, SECRET, "Traceback", ".py"):
            assert secret not in text
        return text


class Wire:
    """One TCP connection to the bridge, spoken by hand, so that a test sees whether it is kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, body: bytes, path: str = "/bitgo", verb: str = "POST", headers: bytes = b"") -> None:
        self.writer.write(f"{verb} {path} HTTP/1.1\r\nHost: b\r\nContent-Length: {len(body)}\r\n".encode() + headers + b"\r\n" + body)
        await self.writer.drain()

    async def receive(self, verb: str = "POST") -> Got:
        async with asyncio.timeout(20):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            fields = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            length = 0 if verb == "HEAD" else int(fields["content-length"])
            return Got(int(head[0].split()[1]), fields, await self.reader.readexactly(length))

    async def post(self, body: bytes, path: str = "/bitgo", verb: str = "POST", headers: bytes = b"") -> Got:
        await self.send(body, path, verb, headers)
        return await self.receive(verb)

    async def is_kept(self) -> bool:
        """Whether the same connection serves the next request."""
        return b'"last"' in (await self.post(call("ticker", {"symbol": "BTC"}), "/null")).body


def call(method: object, params: object = None, **fields: object) -> bytes:
    keys = {"access_key": ACCESS, "secret_key": SECRET, "nonce": 1_730_275_031_047_002_001}
    return msgspec.json.encode(keys | {"method": method, "params": params} | fields)


@asynccontextmanager
async def connection(address: str) -> AsyncIterator[Wire]:
    host, _, port = address.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()


@pytest_asyncio.fixture(scope="module")
async def exchange() -> AsyncIterator[Exchange]:
    async with exchanges.serving() as exchange:
        yield exchange


@pytest_asyncio.fixture(scope="module")
async def system(exchange: Exchange, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[servers.System]:
    config: dict[str, object] = {
        "paper__enabled": "false",
        "bridge__deadline_s": DEADLINE_S,
        "venues__bitgo__base_url": exchange.url,
        "venues__paper__base_url": exchange.url,
    }
    async with servers.system(tmp_path_factory.mktemp("s"), "--bench", "--workers", "1", "--feeders", "0", **config) as system:
        yield system


@pytest.fixture(scope="module")
def address(system: servers.System) -> str:
    return system.address


@pytest_asyncio.fixture
async def wire(address: str, exchange: Exchange) -> AsyncIterator[Wire]:
    exchange.will()
    async with connection(address) as wire:
        yield wire


TRADE = {"symbol": "BTC_CNY", "type": "buy", "price": "1000", "amount": "1"}
LONG = "x" * 5000
CUT = f"'{'x' * 39}... (5000 long)"
PRICE = "price: expected a decimal number, -1 for a market order, got "
AMOUNT = "amount: expected a decimal number above 0, got "
SYMBOL = "symbol: expected 1 to 64 printable signs without blanks, got "

BAD_BODIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", f"{NOT_JSON} (Input data was truncated)"),
    "no JSON": (b"method=ticker&symbol=BTC", f"{NOT_JSON} (JSON is malformed: invalid char-acter (byte 0))"),
    "single quotes": (b"{'method':'ticker'}", f"{NOT_JSON} (JSON is malformed: object keys must be strings (byte 1))"),
    "a cut": (call("ticker", {"symbol": "BTC"})[:-9], f"{NOT_JSON} (Input data was truncated)"),
    "two bodies": (call("accounts") * 2, f"{NOT_JSON} (JSON is malformed: trailing char-acters (byte 131))"),
    "a list": (b"[]", "body: Expected `object`, got `array`"),
    "null": (b"null", "body: Expected `object`, got `null`"),
    "a text": (b'"ticker"', "body: Expected `object`, got `str`"),
    "no method": (b"{}", "method: expected a name such as ticker, got nothing"),
    "method null": (call(None), "body: Expected `str`, got `null` - at `$.method`"),
    "method number": (call(7), "body: Expected `str`, got `int` - at `$.method`"),
    "params list": (call("ticker", ["BTC"]), "body: Expected `object | null`, got `array` - at `$.params`"),
    "params text": (call("ticker", "symbol=BTC"), "body: Expected `object | null`, got `str` - at `$.params`"),
    "key list": (call("accounts", access_key=[ACCESS]), "body: Expected `int | str | null`, got `array` - at `$.access_key`"),
    "key in params": (call("accounts", {"secret_key": {SECRET: 1}}), "params: access_key and secret_key: expected strings"),
    "unknown method": (call("no_such_method"), "no_such_method not support"),
    "5,000 letters of method": (call(LONG), f"{CUT} not support"),
    "5,000 letters of resource": (
        call(f"__api_{LONG}"),
        f"method: expected __api_ and a resource of 1 to 200 printable signs, got {CUT}",
    ),
    "no symbol": (call("ticker", {}), "symbol is empty! expected a symbol such as BTC_USDT"),
    "null symbol": (call("depth", {"symbol": None}), "symbol is empty! expected a symbol such as BTC_USDT"),
    "blank symbol": (call("trade", TRADE | {"symbol": " "}), "symbol is empty! expected a symbol such as BTC_USDT"),
    "symbol with a blank": (call("ticker", {"symbol": "BTC USDT"}), f"{SYMBOL}'BTC USDT'"),
    "symbol with a line end": (call("ticker", {"symbol": "BTC\r\nX: y"}), f"{SYMBOL}'BTC\\r\\nX: y'"),
    "symbol list": (call("ticker", {"symbol": ["BTC"]}), """symbol: expected a string or a number, got '["BTC"]'"""),
    "symbol true": (call("ticker", {"symbol": True}), "symbol: expected a string or a number, got 'true'"),
    "5,000 letters of symbol": (call("trade", TRADE | {"symbol": LONG}), f"{SYMBOL}{CUT}"),
    "price text": (call("trade", TRADE | {"price": "cheap"}), f"""{PRICE}'"cheap"'"""),
    "price missing": (call("trade", {"symbol": "BTC", "type": "buy", "amount": 1}), f"{PRICE}nothing"),
    "price NaN": (call("trade", TRADE | {"price": "NaN"}), f"""{PRICE}'"NaN"'"""),
    "price Infinity": (call("trade", TRADE | {"price": "Infinity"}), f"""{PRICE}'"Infinity"'"""),
    "price endless": (call("trade", TRADE | {"price": "1" * 5000}), f"{PRICE}'\"{'1' * 38}... (5002 long)"),
    "price in another alphabet": (call("trade", TRADE | {"price": "١٠"}), f"""{PRICE}'"١٠"'"""),
    "amount null": (call("trade", TRADE | {"amount": None}), f"{AMOUNT}nothing"),
    "amount zero": (call("trade", TRADE | {"amount": 0}), f"{AMOUNT}'0'"),
    "amount negative": (call("trade", TRADE | {"amount": "-1"}), f"""{AMOUNT}'"-1"'"""),
    "amount NaN": (call("trade", TRADE | {"amount": "nan"}), f"""{AMOUNT}'"nan"'"""),
    "amount too large": (call("trade", TRADE | {"amount": "1e31"}), f"""{AMOUNT}'"1e31"'"""),
    "amount too small": (call("trade", TRADE | {"amount": "1e-31"}), f"""{AMOUNT}'"1e-31"'"""),
    "amount object": (
        call("trade", TRADE | {"amount": {"a": 1}}),
        f"""{AMOUNT.replace("a decimal number above 0", "a string or a number")}'{{"a":1}}'""",
    ),
    "type missing": (call("trade", TRADE | {"type": None}), "type: expected buy, sell, closebuy or closesell, got nothing"),
    "type wrong": (call("trade", TRADE | {"type": "hold"}), """type: expected buy, sell, closebuy or closesell, got '"hold"'"""),
    "close without contracts": (
        call("trade", TRADE | {"type": "closebuy"}),
        "type: expected buy or sell, got closebuy: bitgo trades no contracts",
    ),
    "period missing": (call("records", {"symbol": "BTC"}), "period: expected whole minutes from 1 to 525600, got nothing"),
    "period zero": (call("records", {"symbol": "BTC", "period": 0}), "period: expected whole minutes from 1 to 525600, got '0'"),
    "limit text": (
        call("records", {"symbol": "B", "period": 1, "limit": "x"}),
        """limit: expected a number of bars from 0 to 5000, got '"x"'""",
    ),
    "id missing": (call("cancel", {"symbol": "BTC"}), "id: expected an order id of 1 to 200 printable signs, got nothing"),
    "id wrong": (call("order", {"symbol": "BTC", "id": "abc"}), "id: expected the whole number that trade answered, got 'abc'"),
    "code missing": (call("io"), "code: expected the number of a futures call, 0 to 3"),
    "code unknown": (call("io", {"code": 9, "args": []}), "io code 9 not support"),
    "args no list": (call("io", {"code": 2, "args": "swap"}), "args: expected a list of strings and numbers"),
    "NaN": (b'{"method":"trade","params":{"price":NaN}}', f"{NOT_JSON} (JSON is malformed: invalid char-acter (byte 36))"),
    "Infinity": (b'{"method":"accounts","nonce":-Infinity}', f"{NOT_JSON} (JSON is malformed: invalid char-acter (byte 30))"),
    "bad UTF-8 in a key": (b'{"method":"ticker","params":{"symbol":"BTC","\xff":1}}', f"{NOT_JSON} (bad UTF-8, or nested too deep)"),
    "bad UTF-8 in a value": (b'{"method":"__api_x","params":{"symbol":"\xc3("}}', f"{NOT_JSON} (bad UTF-8, or nested too deep)"),
    "bad UTF-8 beside": (b'{"method":"__api_x","z":["\xff"]}', f"{NOT_JSON} (bad UTF-8, or nested too deep)"),
    "UTF-16": ('{"method":"accounts"}'.encode("utf-16"), f"{NOT_JSON} (bad UTF-8, or nested too deep)"),
    "a lone surrogate in bytes": (b'{"method":"ticker","params":{"symbol":"\xed\xa0\x80"}}', f"{NOT_JSON} (bad UTF-8, or nested too deep)"),
    "10,000 lists": (b'{"method":"ticker","more":' + b"[" * 10_000 + b"]" * 10_000 + b"}", f"{NOT_JSON} (bad UTF-8, or nested too deep)"),
    "10,000 objects": (
        b'{"method":"ticker","params":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001,
        f"{NOT_JSON} (bad UTF-8, or nested too deep)",
    ),
    "300 kB": (call("ticker", {"symbol": "B"}, more="x" * 300_000), "body: expected at most 256 KiB"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_bad_input_is_named_and_goes_nowhere(name: str, wire: Wire, exchange: Exchange) -> None:
    body, text = BAD_BODIES[name]
    assert (await wire.post(body)).error == text
    assert exchange.requests == []
    assert await wire.is_kept()


@pytest.mark.parametrize("escape", [r"\ud800", r"\udc00x", r"\ud800\ud800", r"\q", r"\u12"])
async def test_broken_escapes_are_no_json(escape: str, wire: Wire, exchange: Exchange) -> None:
    for body in (
        b'{"method":"ticker","params":{"symbol":"%b"}}' % escape.encode(),
        b'{"method":"accounts","secret_key":"topsecretdistinctive%b"}' % escape.encode(),
        b'{"method":"%b"}' % escape.encode(),
    ):
        assert (await wire.post(body)).error.startswith(NOT_JSON)
    assert exchange.requests == []
    assert await wire.is_kept()


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/bitgoo", "no exchange named 'bitgoo' here; did you mean bitgo?"),
        ("/", "the address lacks the name of an exchange; there are: bitgo, null, paper"),
        (f"/{LONG}", f"exchange: expected 1 to 64 printable signs without blanks, got {CUT}"),
        (f"/bitgo/{LONG}", f"session: expected 1 to 64 printable signs without blanks, got {CUT}"),
        ("/bitgo/a%20b", "session: expected 1 to 64 printable signs without blanks, got 'a b'"),
        ("/%ff%00", "exchange: expected 1 to 64 printable signs without blanks, got '\ufffd\\x00'"),
    ],
    ids=["misspelt", "bare", "long", "long session", "blank", "binary"],
)
async def test_an_address_that_leads_nowhere_says_what_would(path: str, text: str, wire: Wire, exchange: Exchange) -> None:
    async with asyncio.timeout(10):
        while (got := (await wire.post(call("ticker", {"symbol": "BTC"}), path)).error).startswith("network: no worker serves"):  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # a bridge that was just started has not heard of everybody yet
    assert got == text
    assert exchange.requests == []
    assert await wire.is_kept()


async def test_a_verb_that_is_none(wire: Wire, exchange: Exchange) -> None:
    for header, shown in (
        (b"Http-Method: STEAL\r\n", "'STEAL'"),
        (b"Http-Method: \xff\xfe\r\n", r"'\udcff\udcfe'"),
        (b"Http-Method: a: b\r\n", "'A: B'"),
    ):
        text = (await wire.post(call("__api_x"), headers=header)).error
        assert text == f"verb: expected one of GET, POST, PUT, DELETE, PATCH, got {shown}"
    assert exchange.requests == []
    assert await wire.is_kept()


@pytest.mark.parametrize("verb", ["GET", "PUT", "HEAD", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("body", [b"", call("ticker", {"symbol": "BTC"})], ids=["empty", "body"])
async def test_another_verb_than_post_is_405_in_json(verb: str, body: bytes, wire: Wire, exchange: Exchange) -> None:
    got = await wire.post(body, verb=verb)
    assert (got.status, got.headers["content-type"], got.headers["allow"]) == (405, "application/json", "post")
    if verb != "HEAD":
        assert msgspec.json.decode(got.body)["error"].startswith("POST an FMZ request here")
    assert exchange.requests == []
    assert await wire.is_kept()


# ---------------------------------------------------------------- how a body arrives


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


async def post_chunked(wire: Wire, chunks: bytes) -> Got:
    wire.writer.write(b"POST /null HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    await wire.writer.drain()
    return await wire.receive()


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_a_chunked_body_is_read(size: int, wire: Wire) -> None:
    assert b'{"data":{' in (await post_chunked(wire, chunked(call("ticker", {"symbol": "BTC"}), size))).body
    assert await wire.is_kept()


async def test_a_chunked_body_may_be_too_long_or_broken_json(wire: Wire) -> None:
    assert (await post_chunked(wire, chunked(b"x" * 300_000, 8192))).error == "body: expected at most 256 KiB"
    assert await wire.is_kept()
    assert (await post_chunked(wire, chunked(b"{", 1))).error.startswith(NOT_JSON)
    assert await wire.is_kept()


async def test_a_body_in_pieces_is_waited_for(wire: Wire) -> None:
    body = call("ticker", {"symbol": "BTC"})
    wire.writer.write(b"POST /null HTTP/1.1\r\nHost: b\r\nContent-Length: %d\r\n\r\n" % len(body))
    for piece in (body[:5], body[5:40], body[40:]):
        await wire.writer.drain()
        await asyncio.sleep(0.05)
        wire.writer.write(piece)
    assert b'{"data":{' in (await wire.receive()).body
    assert await wire.is_kept()


@pytest.mark.slow
async def test_a_body_that_never_arrives_is_answered_before_the_deadline(wire: Wire, exchange: Exchange) -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    wire.writer.write(b"POST /bitgo HTTP/1.1\r\nHost: b\r\nContent-Length: 500\r\n\r\n" + call("accounts")[:50])
    assert (await wire.receive()).error == "timeout: the body did not arrive"
    assert loop.time() - started < DEADLINE_S
    assert exchange.requests == []


async def test_a_body_of_another_type_and_with_a_bom_is_read(wire: Wire) -> None:
    for header in (b"Content-Type: text/plain; charset=latin1\r\n", b"Content-Type: \xff/;;\r\n", b"Content-Type: multipart/form-data\r\n"):
        got = await wire.post(b"\xef\xbb\xbf" + call("ticker", {"symbol": "BTC"}), "/null", headers=header)
        assert b'{"data":{' in got.body


async def test_a_client_that_asks_before_it_sends_is_told_to_go_on(wire: Wire) -> None:
    body = call("ticker", {"symbol": "BTC"})
    wire.writer.write(b"POST /null HTTP/1.1\r\nHost: b\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
    assert await wire.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.writer.write(body)
    assert b'{"data":{' in (await wire.receive()).body
    assert await wire.is_kept()


@pytest.mark.parametrize(
    "malformed",
    [
        b"POST /null HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde" + SECRET.encode() + b"\r\n\r\n",
        SECRET.encode() + b"\r\n\r\n",
        b"POST /" + SECRET.encode() + b"\xff HTTP/1.1\r\n\r\n",
        b"POST /null HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}" + SECRET.encode() + b"\r\n\r\n",
        b"POST /null HTTP/1.1\r\nHost: b\r\n\r\n" + call("accounts"),
        b"POST /null HTTP/1.1\r\nX-Key: " + SECRET.encode() * 500 + b"\r\n\r\n",
        b"POST /null HTTP/1.1\r\nContent-Length: " + SECRET.encode() + b"\r\n\r\n",
    ],
    ids=["chunk", "verb", "path", "too much", "no length", "a long header", "length"],
)
async def test_what_is_not_http_is_answered_in_json_and_quoted_nowhere(malformed: bytes, wire: Wire, system: servers.System) -> None:
    wire.writer.write(malformed)
    got = await wire.receive()
    assert got.error == MALFORMED
    assert got.headers["connection"] == "close"
    async with asyncio.timeout(10):
        assert await wire.reader.read() == b""
    for log in system.state.glob("logs/bridge-*"):
        assert SECRET not in log.read_text()


async def test_a_body_that_breaks_in_a_later_packet_is_answered_at_once(wire: Wire, exchange: Exchange) -> None:
    body = call("trade", TRADE)
    wire.writer.write(b"POST /bitgo HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(body), body))
    await wire.writer.drain()
    await asyncio.sleep(0.1)
    wire.writer.write(b"no length\r\n")
    async with asyncio.timeout(DEADLINE_S / 2):
        assert (await wire.receive()).error == "body: broken off or badly chunked"
        assert await wire.reader.read() == b""
    assert exchange.requests == []


@pytest.mark.parametrize("framing", [b"Content-Length: 500", b"Transfer-Encoding: chunked"], ids=["length", "chunked"])
async def test_a_host_that_hangs_up_in_the_middle_of_a_body_is_no_surprise(
    framing: bytes, address: str, system: servers.System, exchange: Exchange
) -> None:
    exchange.will()
    for abort in (True, False):
        async with connection(address) as wire:
            wire.writer.write(b"POST /bitgo HTTP/1.1\r\nHost: b\r\n" + framing + b"\r\n\r\n5\r\n{")
            await wire.writer.drain()
            await asyncio.sleep(0.1)
            if abort:
                wire.writer.transport.abort()
    async with connection(address) as wire:
        assert await wire.is_kept()
    for log in system.state.glob("logs/bridge-*"):
        assert "unhandled error" not in log.read_text()
    assert exchange.requests == []


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("/bitgo", call(SECRET), "*** not support"),
        ("/bitgo", call(SECRET * 10, secret_key=SECRET * 10), "'***... (200 long) not support"),
        ("/bitgo", call("trade", TRADE | {"price": SECRET * 10}, secret_key=SECRET * 10), f"{PRICE}'\"***... (202 long)"),
        ("/bitgo", call("ticker", {"symbol": f"{ACCESS} {SECRET}"}), f"{SYMBOL}'*** ***'"),
        (f"/{SECRET}", call("ticker", {"symbol": "BTC"}), "no exchange named '***' here; there are: bitgo, null, paper"),
    ],
    ids=["method", "long method", "long price", "symbol", "path"],
)
async def test_a_key_in_a_wrong_place_is_not_told_again(path: str, body: bytes, text: str, wire: Wire, exchange: Exchange) -> None:
    assert (await wire.post(body, path)).error == text
    assert exchange.requests == []


async def test_a_compressed_body_is_not_inflated(wire: Wire) -> None:
    assert (await wire.post(b"\x1f\x8b\x08junk", headers=b"Content-Encoding: gzip\r\n")).error.startswith(NOT_JSON)
    assert await wire.is_kept()


async def test_requests_in_one_packet_are_answered_in_turn(wire: Wire) -> None:
    bodies = [b"{", call("ticker", {"symbol": "BTC"}), call("nope")]
    head = "POST /null HTTP/1.1\r\nHost: b\r\nContent-Length: {}\r\n\r\n"
    wire.writer.write(b"".join(head.format(len(body)).encode() + body for body in bodies))
    answers = [(await wire.receive()).body for _ in bodies]
    assert [re.sub(rb'":.*', b"", answer) for answer in answers] == [b'{"error', b'{"data', b'{"error']


# ---------------------------------------------------------------- anything at all

texts = st.text(max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
methods = st.sampled_from(["ticker", "records", "accounts", "trade", "order", "orders", "cancel", "io", "__api_", "__api_x"])
names = st.sampled_from(["symbol", "type", "price", "amount", "period", "limit", "id", "args", "code", "access_key", "secret_key"]) | texts
requests = st.builds(call, methods | values, st.dictionaries(names, values, max_size=6) | values)
headers = st.dictionaries(
    st.sampled_from(["Http-Method", "Content-Type", "Fmzbus-Trace", "User-Agent", "Accept-Encoding", "X-Any", "Cookie", "Authorization"]),
    st.binary(max_size=30).map(lambda value: bytes(byte for byte in value if byte >= 32 and byte != 127).strip()),
    max_size=3,
)
paths = st.one_of(
    st.sampled_from(["/bitgo", "/null", "/paper", "/paper/r1"]),
    st.text(max_size=12).map(lambda text: "/" + quote(text, errors="replace")),
    st.text(string.ascii_letters + "/%.~;=?&", max_size=12).map("/".__add__),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=st.binary(max_size=300) | requests, given_headers=headers, path=paths)
@example(body=call("trade", TRADE), given_headers={"Http-Method": b"\xff"}, path="/%")
@example(body=call("accounts", {"access_key": ACCESS + "\x00"}), given_headers={}, path="/paper")
@example(body=call("accounts", secret_key=SECRET + "\n\u2028"), given_headers={}, path="/paper")
async def test_any_request_gets_an_envelope(address: str, body: bytes, given_headers: dict[str, bytes], path: str) -> None:
    async with connection(address) as wire:
        lines = b"".join(b"%b: %b\r\n" % (name.encode(), value) for name, value in given_headers.items())
        got = await wire.post(body, path, headers=lines)
        assert (got.status, got.headers["content-type"]) == (200, "application/json")
        envelope: dict[str, Any] = msgspec.json.decode(got.body)
        assert ("data" in envelope) != ("error" in envelope)
        for secret in (ACCESS, SECRET):
            assert secret not in got.body.decode()
        assert "Traceback" not in got.body.decode()
        assert "internal error" not in envelope.get("error", "")
        assert await wire.is_kept()


async def test_nothing_of_all_that_surprised_the_bridge(system: servers.System) -> None:
    """Runs last: whatever came above, no exception reached the bridge's outermost net."""
    for log in system.state.glob("logs/bridge-*"):
        assert "raceback" not in log.read_text()
