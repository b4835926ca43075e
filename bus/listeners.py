"""Who listens to market data by himself: the servers' own lists of subscriptions, NATS and MQTT clients alike.

A strategy that subscribes to feed.okx.ticker.BTC_USDT says to nobody that it wants to be fed with it; its server knows. A listener with
a wildcard wishes nothing by itself. Our own followers are in the lists too, for as long as they follow.
"""

import asyncio
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from bus import subjects
from bus.errors import BadRequest
from bus.follow import Key

ANSWER_S = 1.0
MOST = 100_000
"""Subscriptions that are read of one server, all in one page: it gives each page in another order, so that pages leave some out
(measured: a third of 3,000)."""


class _Subscription(Struct):
    subject: str


class _Page(Struct):
    """Of /subsz?subs=1. total: of all there are."""

    total: int = 0
    subscriptions_list: list[_Subscription] = []


_decode = msgspec.json.Decoder(_Page).decode


async def listened(monitors: Sequence[str]) -> set[Key]:
    """What somebody listens to through the servers of these monitoring addresses ("http://127.0.0.1:8222").

    Raises OSError, naming the monitor, when one does not answer within 1 s, or not with such a list: where the listeners of the others
    matter all the same, ask each by itself.
    """
    found: set[Key] = set()
    for monitor in monitors:
        try:
            async with asyncio.timeout(ANSWER_S):  # of the whole answer: one that only trickles in counts as none
                names = await asyncio.to_thread(_read, monitor)
        except TimeoutError as e:
            raise TimeoutError(f"{monitor}: no list of subscriptions within {ANSWER_S:g} s") from e
        except (OSError, ValueError, HTTPException, msgspec.MsgspecError, RecursionError) as e:
            raise OSError(f"{monitor}: no list of subscriptions: {e}") from e
        found.update(key for name in names if (key := parse(name)) is not None)
    return found


def _read(monitor: str) -> list[str]:
    """The subjects that one server knows of."""
    where = urlsplit(monitor)
    kind = HTTPSConnection if where.scheme == "https" else HTTPConnection
    connection = kind(where.netloc, timeout=ANSWER_S)
    try:
        connection.request("GET", f"{where.path.rstrip('/')}/subsz?subs=1&limit={MOST}")
        reply = connection.getresponse()
        content = reply.read()
        if reply.status != 200:
            raise OSError(f"HTTP {reply.status}")
    finally:
        connection.close()
    page = _decode(content)
    if page.total > len(page.subscriptions_list):
        raise OSError(f"{page.total} subscriptions, more than {MOST}")
    return [one.subject for one in page.subscriptions_list]


def parse(subject: str) -> Key | None:
    """A subject as it is listed -> what it is the feed of; None for any other, for a wildcard, and for a name that no feeder would tell
    values on."""
    match subject.split("."):
        case ["feed", exchange, kind, symbol]:
            pass
        case _:
            return None
    try:
        key = (subjects.untoken(exchange), subjects.untoken(kind), subjects.untoken(symbol))
        return key if subjects.feed(*key) == subject else None
    except (ValueError, BadRequest):
        return None
