"""HTTP/1.1 as far as a proxy needs it: messages read whole, written again with a length. And what is looked for in a request."""

import asyncio
import re
from collections.abc import Iterator
from decimal import Decimal
from urllib.parse import quote, quote_plus, unquote_plus

from msgspec import Struct

HOP_BY_HOP = frozenset({"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "content-length"})
LARGEST = 32 * 1024 * 1024
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.]|\.\d)")


class Message(Struct, frozen=True):
    """One request or answer. start: its first line. headers: in their order, hop-by-hop ones included; the body is plain."""

    start: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")

    def encode(self, **replaced: str) -> bytes:
        """As bytes, with a Content-Length of its own; replaced: headers to set ("connection")."""
        kept = [(name, value) for name, value in self.headers if name.lower() not in HOP_BY_HOP and name.lower() not in replaced]
        lines = [
            self.start,
            *(f"{name}: {value}" for name, value in kept),
            *(f"{name.title()}: {value}" for name, value in replaced.items()),
        ]
        return "\r\n".join([*lines, f"Content-Length: {len(self.body)}", "", ""]).encode("latin-1") + self.body


async def read(reader: asyncio.StreamReader, *, answer: bool) -> Message | None:
    """The next message, None where the peer has ended. Raises IncompleteReadError, LimitOverrunError and ValueError for what is none."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as e:
        if not e.partial:
            return None
        raise
    start, *lines = head.decode("latin-1")[:-4].split("\r\n")
    headers = [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    message = Message(start, headers, b"")
    if "chunked" in message.header("transfer-encoding").lower():
        body = await _chunks(reader)
    elif length := message.header("content-length"):
        body = await reader.readexactly(min(int(length), LARGEST))
    else:
        body = await reader.read(LARGEST) if answer and not re.match(r"\S+ (1..|204|304)", start) else b""
    return Message(start, headers, body)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        body += await reader.readexactly(min(size, LARGEST))
        await reader.readuntil(b"\r\n")
    while (await reader.readuntil(b"\r\n")) != b"\r\n":
        pass  # trailers
    return body


class Seen(Struct):
    """One request of the venue.

    status, answer: the exchange's own; 0 where it was not asked, or cannot be reached, which `answer` then says.
    left: the venue closed the connection while it waited.
    """

    verb: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: int
    status: int = 0
    answer: bytes = b""
    left: bool = False

    @property
    def text(self) -> str:
        """Target and body as a person reads them."""
        return f"{unquote_plus(self.target)}\n{self.body.decode(errors='replace')}"

    def carries(self, amount: Decimal) -> bool:
        """Whether a number of the request has these digits: 0.011, "0.0110", or 11 where an exchange counts in small units."""
        return any(digits(number) == digits(f"{amount:f}") for number in numbers(self.text))

    def names(self, order_id: str) -> bool:
        """Whether the id, or of a composite id the exchange's own part, stands in the request byte for byte."""
        return any(re.search(rf"(?<!\w){re.escape(part)}(?!\w)", self.text) for part in {order_id, order_id.rpartition(",")[2]})

    def shows(self, secret: str) -> str:
        """Where in the request a key can be read: "header Paper-Key", "the path or query", "the body"; "" for nowhere."""
        forms = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret)} if len(secret) >= SHORTEST_KEY else set()
        for where, text in [
            *((f"header {name}", value) for name, value in self.headers),
            ("the path or query", self.target),
            ("the body", self.body.decode(errors="replace")),
        ]:
            if any(form in text for form in forms):
                return where
        return ""


SHORTEST_KEY = 8
"""What is shorter stands in every text by chance."""


def numbers(text: str) -> Iterator[str]:
    return (match[0] for match in _NUMBER.finditer(text))


def digits(number: str) -> str:
    """Without sign, point and the zeros around: "0.0110" -> "11". A number with an exponent has none."""
    return "" if "e" in number.lower() else number.lstrip("+-").replace(".", "").strip("0")
