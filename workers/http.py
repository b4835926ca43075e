"""One signed call to an exchange, and what it means when it fails.

A write goes out at most once. What failed before a byte was sent is a failure; what failed later may have been executed and is told
as unknown. Reads and writes have sessions of their own, so that a burst of market data never keeps an order waiting for a connection.
"""

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import aiohttp
import msgspec
import yarl
from msgspec import Struct

from bus.errors import BusError, Expired, RateLimited, TimedOut, VenueUnavailable, outcome_unknown
from bus.metrics import Metrics
from bus.seal import Credentials
from bus.sessions import Session

MARGIN_S = 1.0
"""A call to an exchange ends this long before the deadline, so that the outcome is written and the reply still arrives."""
MARGIN_PART = 0.2
"""Of the time that is left when a request arrives: a margin is never more."""
MAX_ANSWER = 16 * 1024 * 1024
LIMITED = (418, 429)
"""The statuses of an exchange that took no notice of the request."""
NOT_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL)

_decode = msgspec.json.Decoder(float_hook=Decimal).decode


class Answer(Struct, frozen=True):
    """What the exchange said, whatever its status below 500."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    call: "Call"

    def json(self) -> Any:
        """The body; numbers with a point are Decimal, integers exact. Raises call.unclear() for anything that is not JSON."""
        try:
            return _decode(self.body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            raise self.call.unclear("something that is not JSON") from e


class Call:
    """One request on its way through a venue.

    exchange: the host's name for it. credentials: of this very request. account: their short hash. client_order_id: of the order
    that this call places, "" for any other. expires_at_ms: its deadline, and the expiry that a venue signs into an order where its
    exchange has one. session: futures state, read once at the start. write: the exchange may change by it. sent: a write may have
    arrived there. sent_ms, answered_ms: the last write's, bus time, 0 while there is none. key, asked_ms, frame: a write's idempotency
    key, when the bridge took it, and the request as it travelled: what the journal keeps.
    """

    __slots__ = (
        "_http",
        "_now_ms",
        "account",
        "answered_ms",
        "asked_ms",
        "client_order_id",
        "credentials",
        "exchange",
        "expires_at_ms",
        "frame",
        "key",
        "margin_s",
        "path",
        "sent",
        "sent_ms",
        "session",
        "venue_s",
        "write",
    )

    def __init__(
        self,
        http: "Http",
        *,
        exchange: str,
        path: str,
        credentials: Credentials,
        account: str,
        client_order_id: str,
        expires_at_ms: int,
        now_ms: Callable[[], int],
        write: bool,
        key: str = "",
        asked_ms: int = 0,
        frame: bytes = b"",
    ) -> None:
        self._http = http
        self._now_ms = now_ms
        self.exchange = exchange
        self.path = path
        self.credentials = credentials
        self.account = account
        self.client_order_id = client_order_id
        self.expires_at_ms = expires_at_ms
        self.write = write
        self.key = key
        self.asked_ms = asked_ms
        self.frame = frame
        self.session = Session()
        self.sent = False
        self.sent_ms = self.answered_ms = 0
        self.venue_s = 0.0
        self.margin_s = min(MARGIN_S, self.left_s() * MARGIN_PART)

    def now_ms(self) -> int:
        """UTC, by the clock of the bus: what timestamps are signed with."""
        return self._now_ms()

    def left_s(self) -> float:
        """Until the deadline."""
        return (self.expires_at_ms - self._now_ms()) / 1000

    async def send(
        self, verb: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None, write: bool | None = None
    ) -> Answer:
        """Send exactly these bytes; url is percent-encoded already. write: for the side calls of a write, False where it is a read.

        Raises Expired, VenueUnavailable, RateLimited, TimedOut, and for a write OutcomeUnknown.
        """
        return await self._http.send(self, verb, url, headers=headers or {}, body=body, write=self.write if write is None else write)

    def redacted(self, text: str) -> str:
        """The text without the keys of this request: some exchanges quote what they refuse, and robots mistake one field for another."""
        return self.credentials.blanked(text)

    def unclear(self, what: str) -> BusError:
        """The error for an answer that makes no sense: unknown once a write was sent, unavailable for a read."""
        return self.failed(f"{self.exchange} answered {what}", VenueUnavailable)

    def failed(self, text: str, otherwise: type[BusError], comfort: str = "") -> BusError:
        """The error for a call that failed: unknown once a write was sent, else `otherwise`, with the comfort that only then is true."""
        if self.write and self.sent:
            return outcome_unknown(text, self.client_order_id)
        return otherwise(f"{text}; {comfort}" if comfort else text)


class Http:
    """The sessions, and the one function that uses them."""

    def __init__(
        self,
        reads: aiohttp.ClientSession,
        writes: aiohttp.ClientSession,
        *,
        timeout_s: Mapping[str, float],
        default_s: float,
        metrics: Metrics,
    ) -> None:
        self._reads = reads
        self._writes = writes
        self._timeout_s = timeout_s
        self._default_s = default_s
        self._metrics = metrics

    async def send(self, call: Call, verb: str, url: str, *, headers: Mapping[str, str], body: bytes | None, write: bool) -> Answer:
        timeout_s = min(self._timeout_s.get(call.exchange, self._default_s), call.left_s() - call.margin_s)
        if timeout_s <= 0:
            raise call.failed("too little time is left to call the exchange", Expired, "nothing was sent")
        session = self._writes if write else self._reads
        started = time.perf_counter()
        outcome = "error"
        sent_before = call.sent
        try:
            call.sent = sent_before or write
            if write:
                call.sent_ms = call.now_ms()
            async with session.request(
                verb,
                yarl.URL(url, encoded=True),
                headers=headers,
                data=body,
                allow_redirects=False,  # a redirected write would be sent twice
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as response:
                content = await _read(response, call)
                outcome = str(response.status)
                call.sent = sent_before if response.status in LIMITED else call.sent
                return _judge(Answer(response.status, response.headers, content, call))
        except NOT_SENT as e:
            call.sent = sent_before
            raise call.failed(f"no connection to {call.exchange}", VenueUnavailable) from e
        except TimeoutError as e:
            outcome = "timeout"
            raise call.failed(f"no answer from {call.exchange} within {timeout_s:.1f} s", TimedOut) from e
        except (aiohttp.ClientError, OSError) as e:
            raise call.failed(f"{call.exchange} broke off before it had answered", VenueUnavailable) from e
        finally:
            elapsed = time.perf_counter() - started
            if write:
                call.answered_ms = call.now_ms()
            call.venue_s += elapsed
            self._metrics.venue_seconds.labels(call.exchange, outcome).observe(elapsed)


async def _read(response: aiohttp.ClientResponse, call: Call) -> bytes:
    content = b""
    async for chunk in response.content.iter_any():
        content = content + chunk if content else chunk
        if len(content) > MAX_ANSWER:
            raise call.unclear(f"more than {MAX_ANSWER >> 20} MiB")
    return content


def _judge(answer: Answer) -> Answer:
    status, exchange = answer.status, answer.call.exchange
    if status in LIMITED:
        wait = answer.headers.get("Retry-After", "")
        told = f"{exchange} answered {status}, try again {f'in {wait} s' if wait.isdigit() else 'later'}"
        raise answer.call.failed(told, RateLimited, "nothing was placed")
    if status >= 500 or 300 <= status < 400:
        raise answer.call.unclear(str(status))
    return answer


@asynccontextmanager
async def opened(timeout_s: Mapping[str, float], default_s: float, metrics: Metrics) -> AsyncIterator[Http]:
    """Sessions for the life of a worker. timeout_s: of single exchanges; default_s: of all others."""

    def session() -> aiohttp.ClientSession:
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60, keepalive_timeout=30),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "fmzbus"},
        )
        # aiohttp repeats GET, PUT and DELETE by itself when a kept-alive connection turns out to be dead; an exchange may have
        # executed the first one. It offers no other switch (3.14).
        session._retry_connection = False
        return session

    async with session() as reads, session() as writes:
        yield Http(reads, writes, timeout_s=timeout_s, default_s=default_s, metrics=metrics)
