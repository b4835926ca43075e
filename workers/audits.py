"""Quiet markets, proven by asking the exchange: a few REST calls a second, the quietest first.

What a socket tells is proven by that. Of a channel that says nothing nobody knows whether its market is quiet or its socket dead, so what
is known of it is compared with what the exchange answers by REST: equal is a proof; twice different, without a word from the socket in
between, is a dead channel. The budget also pays for the exchange's clock, by which late frames are told, and for the question whether a
market that a plain listener asks for exists.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from bus import market
from bus.connection import Bus
from bus.errors import BadRequest, BusError, RateLimited, VenueRejected, VenueUnavailable
from bus.messages import Market
from bus.metrics import FeedMetrics
from bus.seal import Credentials
from workers.desk import Desk
from workers.http import Call, Http
from workers.source import Source
from workers.venues import Venue
from workers.wishes import Pair

log = logging.getLogger(__name__)

QUIET_PART = 0.4
"""A source that was proven within that part of its age limit needs no audit."""
CLOCK_S, LATE_CLOCK_S = 30.0, 3.0
"""How often the exchange is asked for its clock; and while its frames look late, for it may have been set."""
LATE_S = 1.0
BANNED_S = 30.0
"""No audit for so long after the exchange said that there were too many calls."""
IDLE_S = 0.2
"""How often it is seen whether there is something to spend the budget on."""
AUDITED = ("ticker", "depth")
STRIKES = 2
MOST_QUESTIONS = 1000


class Audits:
    """Of one exchange. Its venue answers `ticker` and `depth` without keys. max_age_s: by kind."""

    def __init__(
        self,
        bus: Bus,
        desk: Desk,
        venue: Venue,
        http: Http,
        *,
        per_s: float,
        max_age_s: Mapping[str, float],
        timeout_s: float,
        metrics: FeedMetrics,
        clock: Callable[[], float] = market.clock,
    ) -> None:
        self._bus = bus
        self._desk = desk
        self._venue = venue
        self._http = http
        self._per_s = per_s
        self._max_age_s = max_age_s
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._clock = clock
        self._questions: deque[Pair] = deque(maxlen=MOST_QUESTIONS)
        self._clock_s = float("-inf")
        self._turn = False
        desk.ask = self.ask

    async def run(self) -> None:
        """Spend the budget until cancelled."""
        while True:
            began_s = self._clock()
            per_s = self._per_s * self._desk.part_of_exchange  # feeders that share an exchange share its budget
            wait_s = 1 / per_s if per_s else IDLE_S
            try:
                if not (per_s and await self._spend()):
                    wait_s = min(wait_s, IDLE_S)
            except RateLimited as e:
                log.warning("no audits for a while", extra={"fields": {"exchange": self._desk.exchange, "why": str(e)}})
                self._count("limited")
                wait_s = BANNED_S
            except BusError:
                self._count("error")
            await asyncio.sleep(max(0.0, began_s + wait_s - self._clock()))

    def ask(self, pairs: Iterable[Pair]) -> None:
        """Pairs that are to be fed once the exchange has answered for their market."""
        self._questions.extend(pair for pair in pairs if pair not in self._questions)

    async def _spend(self) -> bool:
        """Make the most urgent call. -> whether there was one. Raises BusError."""
        asks_time = getattr(self._venue, "time_ms", None)
        if asks_time is not None and self._clock() - self._clock_s >= (LATE_CLOCK_S if self._desk.lag.late_s > LATE_S else CLOCK_S):
            sent_s = self._clock_s = self._clock()
            self._desk.lag.calibrate(await self._answer(asks_time(self._call())), sent_s, self._clock())
            return True
        quiet = self._quietest()
        self._turn = not self._turn
        if self._questions and (self._turn or quiet is None):
            await self._find(self._questions.popleft())
        elif quiet is not None:
            await self._audit(quiet)
        else:
            return False
        return True

    def _quietest(self) -> Source | None:
        """The known ticker or depth that was proven longest ago, if that is long."""
        now_s = self._clock()
        quiet = [
            source
            for channel, source in self._desk.sources.items()
            if channel.kind in AUDITED and source.known and now_s - source.proven_s > QUIET_PART * self._max_age_s[channel.kind]
        ]
        return min(quiet, key=lambda source: source.proven_s, default=None)

    async def _audit(self, source: Source) -> None:
        channel, changes, sent_s = source.channel, source.changes, self._clock()
        answer = await self._ask_exchange(channel.kind, self._desk.spelling(channel))
        if self._desk.sources.get(channel) is not source:
            return  # left meanwhile
        if source.agrees(answer):
            source.strikes = 0
            source.proven_s = max(source.proven_s, sent_s)
            self._desk.prove(source)
            self._count("equal")
        elif source.changes != changes:
            self._count("overtaken")
        else:
            self._count("different")
            source.strikes += 1
            if source.strikes >= STRIKES:
                source.strikes = 0
                self._desk.distrust(channel, "the exchange answers something else by REST", again=True)

    async def _find(self, pair: Pair) -> None:
        """See whether the market of a pair exists."""
        try:
            await self._ask_exchange("ticker", pair[1])
        except (VenueRejected, BadRequest) as e:
            log.warning("an unknown market is wished for", extra={"fields": {"exchange": self._desk.exchange, "why": str(e)}})
            self._desk.wishes.bar(pair, self._clock())
        else:
            self._desk.wishes.found(pair, self._clock())

    async def _ask_exchange(self, method: str, symbol: str) -> Any:
        return await self._answer(getattr(self._venue, method)(self._call(), Market(symbol)))

    async def _answer(self, asking: Awaitable[Any]) -> Any:
        """Raises BusError for whatever a venue makes of an answer that it cannot read."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asking
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, TimeoutError) as e:
            raise VenueUnavailable("an answer that makes no sense, or none") from e

    def _call(self) -> Call:
        """A public read, by nobody."""
        expires_at_ms = self._bus.now_ms() + int(self._timeout_s * 1000)
        return Call(
            self._http,
            exchange=self._desk.exchange,
            path="",
            credentials=Credentials("", ""),
            account="",
            client_order_id="",
            expires_at_ms=expires_at_ms,
            now_ms=self._bus.now_ms,
            write=False,
        )

    def _count(self, result: str) -> None:
        self._metrics.audits.labels(self._desk.exchange, result).inc()
