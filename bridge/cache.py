"""Market data for hosts: what feeders keep fresh in the bus, else what somebody was answered a moment ago, else a worker's answer.

Only methods that the exchange's workers declare public come here, and whatever is kept lies under the symbol with its contract: it is
the same for everybody. Who may call at all is decided before anybody asks here.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping

import msgspec
import nats.errors
from msgspec import Struct

from bridge import fmz
from bridge.resolve import Resolver
from bridge.routes import Route
from bridge.shared import Answer, Key, Shared
from bus import market
from bus.errors import BusError, Busy
from bus.fleet import Presence, Venue
from bus.follow import Follower
from bus.messages import Failure, Reply
from bus.metrics import Metrics
from bus.sessions import in_contract

FED = frozenset({"ticker", "depth"})
"""Methods that a kind of market data answers, under the same name."""
PUBLIC = FED | {"trades", "records"}
"""Methods whose answers may be shared, where the exchange's workers agree."""
HIT, SHARED, JOINED, MISS = "hit", "shared", "joined", "miss"

Send = Callable[[Struct, bool], Awaitable[Reply]]
"""Has a worker answer: (params, whether their symbol is resolved)."""


class Question(Struct):
    """A public read. asked: the symbol as the host wrote it; symbol: with its contract, None where that is not known. result: where the
    answer comes from."""

    route: Route
    call: fmz.HostCall
    method: str
    asked: str
    symbol: str | None
    result: str = MISS

    def params(self, symbol: str) -> Struct:
        return msgspec.structs.replace(self.call.params, symbol=symbol)

    def key(self, symbol: str) -> Key:
        return self.route.exchange, self.method, fmz.encode_params(self.params(symbol))


class Cache:
    """venues: what workers say of their exchanges; alive: who lives, to see whether anybody feeds an exchange."""

    def __init__(
        self,
        follower: Follower,
        shared: Shared,
        resolver: Resolver,
        *,
        venues: Mapping[str, Venue],
        alive: Callable[[], Iterable[Presence]],
        metrics: Metrics,
    ) -> None:
        self._follower = follower
        self._shared = shared
        self._resolver = resolver
        self._venues = venues
        self._alive = alive
        self._metrics = metrics

    def question(self, route: Route, call: fmz.HostCall) -> Question | None:
        """None for what is nobody else's business: writes, private reads, and reads that the exchange's workers do not declare public."""
        method = call.method.name
        if method not in PUBLIC:
            return None
        venue = self._venues.get(route.exchange)
        if venue is None or method not in venue.public:
            return None
        asked: str = call.params.symbol  # type: ignore[attr-defined]
        return Question(route, call, method, asked, self._resolver.resolve(route, call, asked))

    def find(self, question: Question) -> bytes | None:
        """The finished envelope, if there is one that is fresh."""
        symbol = question.symbol
        if symbol is None:
            return None
        content = self._follower.find((question.route.exchange, question.method, symbol)) if question.method in FED else None
        if content is not None:
            question.result = HIT
        else:
            content = self._shared.find(question.key(symbol))
            if content is None:
                return None
            question.result = SHARED
        return content if symbol == question.asked else _for_host(question, content, symbol)

    async def ask(self, question: Question, send: Send, timeout_s: float) -> bytes:
        """Have a worker answer, or share the answer of somebody who has. Raises BusError."""
        symbol = question.symbol
        if symbol is None:
            return await self._ask_unresolved(question, send)
        answer, joined = await self._shared.get(question.key(symbol), lambda: send(question.params(symbol), True), timeout_s)  # noqa: FBT003
        if joined:
            question.result = JOINED
        if isinstance(answer, Failure):
            raise answer.error
        await self._follow(question, symbol)
        return _for_host(question, answer, symbol)

    async def _ask_unresolved(self, question: Question, send: Send) -> bytes:
        """The worker reads the futures state, and says what the symbol means: from then on it is known here."""
        asked, asked_s = self._resolver.asked(), market.clock()
        reply = await send(question.call.params, False)  # noqa: FBT003
        if isinstance(reply, Failure):
            raise reply.error
        content = fmz.answer(reply)
        if reply.robot is not None:
            self._resolver.learn(question.route, question.call, reply.robot, asked)
            symbol = in_contract(question.asked, reply.robot.contract)
            kept = fmz.respelled(content, question.asked, symbol) if question.method == "ticker" else content
            await self._shared.keep(question.key(symbol), Answer(kept, asked_s))
            await self._follow(question, symbol)
        return content

    async def _follow(self, question: Question, symbol: str) -> None:
        """Follow a symbol from now on, if somebody feeds it. A worker has just answered for it: it exists."""
        exchange, method = question.route.exchange, question.method
        key = (exchange, method, symbol)
        entry = self._follower.entries.get(key)
        if method not in FED or (entry is not None and entry.known):
            return
        if not any(method in feed.kinds for feed in (one.feeds.get(exchange) for one in self._alive()) if feed is not None):
            return
        try:
            await self._follower.follow(key)
        except Busy:
            self._metrics.not_followed.labels(exchange).inc()
        except (BusError, nats.errors.Error):
            return  # a symbol no subject can name, or no bus: workers answer as before


def _for_host(question: Question, content: bytes, symbol: str) -> bytes:
    """A ticker names the symbol as the host wrote it."""
    return fmz.respelled(content, symbol, question.asked) if question.method == "ticker" and symbol != question.asked else content
