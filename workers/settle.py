"""Orders whose outcome nobody knows: looked up by client order id until they are found, or proven absent.

Absent is proven by a look-up that was made after the order's signed expiry and a margin, by the exchange's own clock; without such an
expiry an order can only be found. Every worker takes part: an order is its own worker's while that lives, else the one's whom all
workers choose alike. Nothing has to be handed over: what lies under `unsettled.` is what there is to do.
"""

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from hashlib import blake2b
from typing import cast

from msgspec import Struct
from nats.aio.msg import Msg

from bus import subjects
from bus.config import Orders as Settings
from bus.connection import Bus
from bus.errors import BadRequest, BusDown, BusError
from bus.fleet import BEAT_S, Fleet, Presence
from bus.journal import NEARLY_FULL, Held, Intent, Journal, Outcome
from bus.lifecycle import running
from bus.metrics import Metrics
from bus.seal import Credentials, Opener
from bus.streams import Duplicate
from workers.http import Call, Http
from workers.venues import Lookup, Venue

log = logging.getLogger(__name__)

EVERY_S = 1.0
SWEEP_S = 60.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 30.0
"""Between two look-ups of one order."""
LOOK_S = 5.0
TOLD_S = 1.0
"""So long after its deadline a host of which no bridge says that it has its answer is taken for not having it."""
AT_ONCE = 16
MOST_OWED = 10_000
NEEDS_A_PERSON = "needs a person: this cannot be looked up; look at the exchange, then tell it with `fmzbus settle`"
START_S = 30.0
"""What a start may spend on the orders it finds; the others stay unknown, fenced and listed."""


class _Answered(Struct):
    """An order whose host is being told that it was placed. until_ms: when nobody will say any more whether it was. written: its outcome
    is in the journal. told: whether the host has the answer. repeated: it asked again, after it may have been left in the dark."""

    held: Held
    outcome: Outcome
    until_ms: int
    written: bool
    repeated: bool
    told: bool | None = None


class Settler:
    """busy: keys that this process is sending right now."""

    def __init__(
        self,
        bus: Bus,
        journal: Journal,
        opener: Opener,
        venues: Mapping[str, Venue],
        http: Http,
        fleet: Fleet,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self._bus = bus
        self._journal = journal
        self._opener = opener
        self._venues = venues
        self._http = http
        self._fleet = fleet
        self._settings = settings
        self._metrics = metrics
        self._waits: dict[str, tuple[float, float, int]] = {}
        """By place: when to look next, monotonic; the wait after that; which look it is."""
        self._owed: dict[str, tuple[Held, Outcome, bool]] = {}
        self._answered: dict[str, _Answered] = {}
        self._swept = 0.0
        self.busy: set[str] = set()

    # ---------------------------------------------------------------- one look-up

    def can_look(self, exchange: str) -> bool:
        venue = self._venues.get(exchange)
        return venue is not None and "client_order_id" in venue.lookups

    async def look(self, intent: Intent, credentials: Credentials, looked: int = 1) -> Outcome | None:
        """Ask the exchange once; None while nothing is certain. Raises BusError where it could not be asked."""
        venue = self._venues[intent.exchange]
        call = Call(
            self._http,
            exchange=intent.exchange,
            path=intent.path,
            credentials=credentials,
            account=intent.account,
            client_order_id="",
            expires_at_ms=self._bus.now_ms() + int(LOOK_S * 1000),
            now_ms=self._bus.now_ms,
            write=False,
        )
        try:
            is_late = await self._is_expired(venue, call, intent)
            order = await cast("Lookup", venue).find_order(call, intent.key, intent.symbol)
        except BusError:
            raise
        except Exception as e:  # a venue's own may quote the keys
            fields = {"exchange": intent.exchange, "traceback": call.redacted(traceback.format_exc())}
            log.error("unreadable look-up", extra={"fields": fields})
            raise call.unclear("a look-up in another format than its venue expects") from e
        if order is not None:
            return Outcome(state="placed", by="settler", process=self._bus.process, order_id=order.id, looked=looked)
        if is_late:
            told = "looked for by its client order id after its expiry, and the exchange has no such order"
            return Outcome(state="absent", by="settler", process=self._bus.process, looked=looked, message=told)
        return None

    async def _is_expired(self, venue: Venue, call: Call, intent: Intent) -> bool:
        """Whether a look-up made from here on proves the absence. The exchange is asked for the time only once ours says so."""
        time_ms = getattr(venue, "time_ms", None)
        proven_ms = intent.expires_at_ms + self._margin_ms
        return time_ms is not None and self._bus.now_ms() > proven_ms and await time_ms(call) > proven_ms

    # ---------------------------------------------------------------- the work behind

    def owe(self, held: Held, outcome: Outcome, *, began: bool = True) -> None:
        """Write an outcome that is certain and could not be written, as soon as the journal takes it. began: it has the intent."""
        if began or (len(self._owed) < MOST_OWED and held.intent.key not in self._owed):  # a repetition says nothing about the first
            self._owed[held.intent.key] = (held, outcome, began)

    def answered(self, held: Held, outcome: Outcome, *, written: bool, repeated: bool = False) -> None:
        """A host is about to be told that its order was placed. Until its bridge says that it was, the order counts as unknown to it."""
        until_ms = max(held.intent.expires_at_ms, self._bus.now_ms()) + int(TOLD_S * 1000)
        self._answered[held.intent.key] = _Answered(held, outcome, until_ms, written, repeated)

    async def hear(self, message: Msg) -> None:
        """A bridge says whether a host has its answer; the payload is the order's key."""
        one = self._answered.get(message.data.decode(errors="replace"))
        if one is not None:
            one.told = message.subject.endswith(".yes")
            with contextlib.suppress(BusError):  # then in the next round
                await self._let_go(one)

    async def heard(self) -> None:
        """Wait until all outcomes are written and every host that was answered has its answer, a while at most."""
        deadline_s = time.monotonic() + TOLD_S + EVERY_S
        while (self._owed or any(one.told is None for one in self._answered.values())) and time.monotonic() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def _let_go(self, one: _Answered) -> None:
        """It is not held any longer, once its outcome is on disk."""
        # Until its deadline is over no host was told that it is unknown; from then on an order that lies here counts as that.
        if not one.written or (one.told is None and self._bus.now_ms() <= one.until_ms):
            return
        if one.told:
            await self._journal.told(one.held)
            if one.repeated:
                await self._journal.lift(one.held.intent)
        else:
            await self._journal.untold(one.held, one.outcome)
        if self._answered.get(one.held.intent.key) is one:
            del self._answered[one.held.intent.key]

    async def run(self) -> None:
        """Settle as long as the worker lives. A bus or an exchange that fails is tried again."""
        async with running(*(self._again(part) for part in (self._sweep, self._pay, self._let_all_go, self.settle))):
            await asyncio.Event().wait()

    async def _again(self, part: Callable[[], Awaitable[object]]) -> None:
        while True:  # each by itself: an exchange that hangs keeps no outcome from the journal
            try:
                await part()
            except BusError as e:
                log.warning("settling waits for the journal", extra={"fields": {"error": str(e)}})
                with contextlib.suppress(BusDown):  # a nats-server that came back without its disk has no streams
                    await self._journal.open()
            except Exception:  # it would end the worker, and each that takes over in turn
                log.exception("unhandled error")
            await asyncio.sleep(EVERY_S)

    async def _let_all_go(self) -> None:
        for one in list(self._answered.values()):
            await self._let_go(one)

    async def before_serving(self) -> None:
        """The first worker up settles what it finds; one that comes to others leaves it to them."""
        try:
            if not await self._journal.unsettled():
                return
            await asyncio.sleep(BEAT_S)  # whoever is there says so once in a beat
            if any(one.ready and self._venues.keys() <= set(one.serves) for one in self._workers()):
                return
            log.info("settling before serving")
            async with asyncio.timeout(START_S):
                while await self.settle():  # noqa: ASYNC110 - the exchange brings it about
                    await asyncio.sleep(FIRST_WAIT_S)
        except TimeoutError:
            log.warning("serving with orders unsettled: `fmzbus orders --unsettled` lists them")
        except BusError as e:
            log.warning("the journal does not answer: orders are refused until it does", extra={"fields": {"error": str(e)}})

    async def settle(self) -> int:
        """One round over everything that has no outcome; -> how many are this worker's and may still be settled by look-ups."""
        served = {subjects.token(exchange) for exchange in self._venues}
        places = [place for place in await self._journal.unsettled() if place.split(".")[1] in served]
        self._metrics.unsettled.set(len(places))
        self._waits = {place: self._waits[place] for place in places if place in self._waits}
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(place: str) -> bool:
            async with slots:
                try:
                    return await self._settle(place)
                except BusError:
                    raise
                except Exception:  # one order that cannot be read keeps no other waiting
                    log.exception("unhandled error")
                    return False

        ours = self.busy | self._answered.keys() | self._owed.keys()
        return sum(await asyncio.gather(*(one(place) for place in places if place.split(".")[2] not in ours)))

    async def _settle(self, place: str) -> bool:
        """One order; whether it is ours and another look-up may settle it."""
        due_s, wait_s, looked = self._waits.get(place, (0.0, FIRST_WAIT_S, 1))
        if time.monotonic() < due_s:
            return True
        held = await self._journal.hold(place)
        if held is None or self._owner(held.intent) != self._bus.process:
            return False
        intent = held.intent
        is_over = self._is_over(intent)
        if intent.worker == self._bus.process and held.entry.unknown is None and not is_over:
            return False  # it is being sent, or just answered
        known = held.entry if held.entry.outcome is not None else await self._journal.settled(intent.exchange, intent.key)
        if known is not None and known.outcome is not None:
            if is_over:  # else it may just be on its way out
                if known is held.entry:  # it had found no room
                    await self._journal.move(held)
                await self._let_be(held, known.outcome)
            return False
        if not held.entry.frame or not self.can_look(intent.exchange):
            await self._needs_a_person(held)
            return False
        proven_s = (intent.expires_at_ms + self._margin_ms - self._bus.now_ms()) / 1000
        next_s = min(wait_s, proven_s + FIRST_WAIT_S) if proven_s > 0 else wait_s  # one look comes as soon as it can prove something
        self._waits[place] = (time.monotonic() + next_s, min(wait_s * 2, LONGEST_WAIT_S), looked + 1)
        return await self._look_up(held, looked)

    def _is_over(self, intent: Intent) -> bool:
        """Whether nobody can be waiting for its answer any more."""
        return self._bus.now_ms() > intent.expires_at_ms + int(TOLD_S * 1000)

    async def _look_up(self, held: Held, looked: int) -> bool:
        intent = held.intent
        fields = {"exchange": intent.exchange, "idempotency_key": intent.key, "account": intent.account}
        try:
            _, opened = self._opener.open(held.entry.frame)
        except BadRequest as e:  # sealed to a key that was rotated away
            log.warning("sealed to a key that is gone", extra={"fields": fields | {"error": str(e)}})
            await self._needs_a_person(held)
            return False
        try:
            outcome = await self.look(intent, opened.credentials, looked)
        except BusError as e:
            log.warning("look-up failed", extra={"fields": fields | {"error": e.code}})
            return True
        if outcome is None:
            return True
        outcome = await self._journal.finish(held, outcome)
        if self._is_over(intent):  # else its own worker may be answering right now, though nobody hears that it lives
            await self._let_be(held, outcome)
        self._metrics.settled.labels(outcome.state).inc()
        log.info("settled", extra={"fields": fields | {"state": outcome.state, "order_id": outcome.order_id}})
        return False

    async def _let_be(self, held: Held, outcome: Outcome) -> None:
        """Nobody waits for the answer any more: an order that was placed is one that its host may not know of."""
        if outcome.state == "placed":
            await self._journal.untold(held, outcome)
        else:
            await self._journal.told(held)

    async def _needs_a_person(self, held: Held) -> None:
        if held.entry.unknown is None and self._bus.now_ms() > held.intent.expires_at_ms:
            await self._journal.mark_unknown(held, Outcome(state="unknown", by="settler", message=NEEDS_A_PERSON))

    @property
    def _margin_ms(self) -> int:
        return int(self._settings.settle_after_s * 1000)

    def _owner(self, intent: Intent) -> str:
        """The worker that sent it; where that is gone, the one of the living that all of them choose alike."""
        workers = {one.process for one in self._workers() if intent.exchange in one.serves} | {self._bus.process}
        if intent.worker in workers:
            return intent.worker
        return max(workers, key=lambda process: blake2b(f"{process} {intent.key}".encode()).digest())

    def _workers(self) -> list[Presence]:
        return [one for one in self._fleet.alive() if one.role == "worker"]

    async def _pay(self) -> None:
        for key, owed in list(self._owed.items()):
            held, outcome, began = owed
            ours = held if began else await self._began(held)
            if ours is not None:
                outcome = await self._journal.finish(ours, outcome)
                one = self._answered.get(key)
                if one is None:
                    await self._let_be(ours, outcome)
                else:
                    one.written = True
            if self._owed.get(key) is owed:
                del self._owed[key]

    async def _began(self, held: Held) -> Held | None:
        """The record of this very intent, which is written where it got lost: its host was told that nothing was sent, so a repetition
        that comes now is told the same. None where one came meanwhile, and found nothing: that is an order of its own."""
        intent = held.intent
        with contextlib.suppress(Duplicate):
            return await self._journal.begin(intent, b"")
        there = await self._journal.held(intent.exchange, intent.key)
        return there if there is not None and there.intent == intent else None

    async def _sweep(self) -> None:
        if not self._journal.is_full and time.monotonic() - self._swept <= SWEEP_S:
            return
        await self._journal.sweep()
        self._swept = time.monotonic()
        self._metrics.journal_used.set(self._journal.used)
        if self._journal.used >= NEARLY_FULL:
            log.warning("the journal is nearly full", extra={"fields": {"used": round(self._journal.used, 2)}})
