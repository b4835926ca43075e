"""Place once: the intent is on disk before an order is sent, its outcome before the host is told, and a repetition is never sent again.

What the exchange answers decides between three: placed, refused (nothing was placed), or unknown (it may be alive). An unknown order is
looked up while its host still waits, then by the settler behind; until its fate is known an equal order is refused, because a
strategy's retry loop sends a new nonce.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from bus.config import Orders as Settings
from bus.connection import Bus
from bus.errors import (
    BadRequest,
    BusError,
    Expired,
    Fenced,
    JournalFull,
    OutcomeUnknown,
    VenueRejected,
    from_wire,
    outcome_unknown,
)
from bus.journal import Entry, Held, Intent, Journal, Outcome
from bus.messages import Api, OrderRef, Placed, Trade, WithRaw, plain
from bus.streams import Duplicate
from workers.guard import Guard
from workers.http import Call
from workers.settle import Settler
from workers.venues import Venue

log = logging.getLogger(__name__)

REPLY_S = 0.05
"""Kept for the reply on its way back."""
LEAST_S = 0.02
"""For one record, however little is left."""
LOOK_S = 2.0
"""How long a host waits for look-ups of an unclear order; then it is told that nobody knows, and the look-ups go on behind."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.02, 0.5
LONGEST_TURN_S = 0.1
"""Between two looks at whether an equal order has its answer."""

Send = Callable[[Any], Awaitable[Any]]
"""Sends the params, as the venue of the call does; raises BusError only, OutcomeUnknown where they may have been executed."""


class Orders:
    def __init__(self, bus: Bus, journal: Journal, settler: Settler, guard: Guard, settings: Settings) -> None:
        self._bus = bus
        self._fence_s = settings.fence_s
        self._journal = journal
        self._settler = settler
        self._guard = guard

    async def place(self, venue: Venue, call: Call, trade: Trade, send: Send) -> Any:
        """Send an order, at most once under its key. -> what the venue answered, or the first outcome for a repetition. Raises BusError."""
        try:
            trade = await self._guard.admit(venue, call, trade)
        except BusError:
            if not await self._came_before(call):
                raise
            return await self._first(call)  # a rule that came later says nothing about what was sent before
        try:
            return await self._journaled(call, trade, send)
        finally:
            self._guard.withdraw(call)

    async def _journaled(self, call: Call, trade: Trade, send: Send) -> Any:
        price = "market" if trade.is_market else plain(trade.price)
        intent = self._intent(
            call, "trade", symbol=trade.symbol, side=trade.side, offset=trade.offset, price=price, amount=plain(trade.amount)
        )
        frame = call.frame if self._settler.can_look(call.exchange) else b""
        within_s = call.left_s() - call.margin_s
        held, equal = await asyncio.gather(
            self._journal.begin(intent, frame, within_s), self._journal.equal(intent, within_s), return_exceptions=True
        )
        if isinstance(held, Duplicate):
            return await self._first(call)
        if isinstance(held, BaseException):
            raise self._not_sent(intent, held)
        if isinstance(equal, BaseException):
            raise self._not_sent(intent, equal, held)
        if equal is not None and (refusal := await self._after(call, held, equal)):
            raise refusal
        return await self._sent(call, held, trade, send)

    async def _after(self, call: Call, held: Held, equal: Entry | None) -> BaseException | None:
        """Let equal orders that were begun before this one have their answers: the host of one may have hung up, or lost its bridge, and
        this is its repetition. Why this one must not be sent, None where it may."""
        wait_s = FIRST_WAIT_S / 2
        while equal is not None and not self._journal.may_be_unknown(equal):
            if call.left_s() <= call.margin_s + wait_s:
                break
            try:
                equal = await self._journal.equal(held.intent, call.left_s() - call.margin_s, before=held.sequence)
            except BusError as e:
                return self._not_sent(held.intent, e, held)
            if equal is not None:
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 1.5, LONGEST_TURN_S)
        return None if equal is None else await self._refused(call, held, await self._fenced(equal))

    async def _fenced(self, equal: Entry) -> Fenced:
        """What a host is told that may be trying again; the fence of an order that was placed stands as long as somebody does."""
        if equal.outcome is None:
            return Fenced(f"an equal order of this account has no known outcome yet, client order id {equal.intent.key}; nothing was sent")
        with contextlib.suppress(BusError):  # then it stands as long as it did
            await self._journal.fence(equal)
        told = f"an equal order was placed, order id {equal.outcome.order_id}, and its answer may not have reached you; nothing was sent"
        return Fenced(f"{told}; to place another one, wait {self._fence_s:g} s")

    async def once(self, call: Call, params: Api, send: Send) -> Any:
        """Send a raw write, at most once under its key. Nobody can look it up: an unclear one waits for a person."""
        try:
            await self._guard.admit_raw(call)
        except BusError:
            if not await self._came_before(call):
                raise
            return await self._first(call)
        intent = self._intent(call, "__api", resource=f"{params.verb} {params.resource.partition('?')[0]}")
        try:
            held = await self._journal.begin(intent, b"", call.left_s() - call.margin_s)
        except Duplicate:
            return await self._first(call)
        except BusError as e:
            raise self._not_sent(intent, e) from e
        return await self._sent(call, held, params, send)

    async def cancel(self, call: Call, params: OrderRef, send: Send) -> Any:
        """Send a cancel, whatever the journal does; what it notes is for people."""
        intent = self._intent(call, "cancel", symbol=params.symbol, order_id=params.id)
        await self._journal.note(intent)
        try:
            result = await send(params)
        except BusError as e:
            state = "unknown" if isinstance(e, OutcomeUnknown) else "refused"
            await self._journal.note(intent, self._outcome(call, state, code=e.code, message=str(e)))
            raise
        await self._journal.note(intent, self._outcome(call, "done"))
        return result

    # ---------------------------------------------------------------- the send, and what came of it

    async def _sent(self, call: Call, held: Held, params: Any, send: Send) -> Any:
        key = held.intent.key
        self._settler.busy.add(key)
        try:
            if call.left_s() <= call.margin_s:
                raise Expired("the journal took too long; nothing was sent")
            self._guard.check(call)
            result = await send(params)
        except OutcomeUnknown as e:
            return await self._unclear(call, held, e)
        except BusError as e:
            raise await self._refused(call, held, e) from None
        else:
            data = result.data if isinstance(result, WithRaw) else result
            if isinstance(data, Placed):
                await self._placed(call, held, self._outcome(call, "placed", order_id=data.id))
            else:
                await self._finish(call, held, self._outcome(call, "done"))
            return result
        finally:
            self._settler.busy.discard(key)

    async def _unclear(self, call: Call, held: Held, error: OutcomeUnknown) -> Any:
        """It was sent, and the answer says nothing: from here on it is fenced, and looked up as long as its host waits."""
        unknown = self._outcome(call, "unknown", code=error.code, message=str(error))

        async def mark() -> Held | None:
            try:
                return await self._journal.mark_unknown(held, unknown, self._left_s(call))
            except BusError as e:
                log.warning("unknown, and not marked so", extra={"fields": {"idempotency_key": held.intent.key, "error": e.code}})
                return None

        marked = await mark()
        held = marked or held
        wait_s, until_ms = FIRST_WAIT_S, min(self._bus.now_ms() + int(LOOK_S * 1000), call.expires_at_ms - int(REPLY_S * 1000))
        looked = 0
        while held.entry.frame and self._bus.now_ms() < until_ms:
            looked += 1
            try:
                async with asyncio.timeout((until_ms - self._bus.now_ms()) / 1000):
                    outcome = await self._settler.look(held.intent, call.credentials, looked)
            except (BusError, TimeoutError):
                outcome = None
            if outcome is not None:
                outcome = msgspec.structs.replace(outcome, sent_ms=call.sent_ms, answered_ms=call.answered_ms)
                await (self._placed if outcome.state == "placed" else self._finish)(call, held, outcome)
                return self._told(held.intent, outcome)
            await asyncio.sleep(min(wait_s, max(0.0, (until_ms - self._bus.now_ms()) / 1000)))
            wait_s = min(wait_s * 2, LONGEST_WAIT_S)
        while marked is None:  # it counts as unknown without a mark from its deadline on; told before, an equal order would pass
            await asyncio.sleep(LONGEST_WAIT_S)
            marked = await mark()
        # A raw write has no client order id: a person finds it in the journal.
        raise error if held.intent.method == "trade" else OutcomeUnknown(f"{error}; journal key {held.intent.key}")

    async def _refused(self, call: Call, held: Held, error: BusError) -> BusError:
        """The error, once it is the order's outcome."""
        await self._finish(call, held, self._outcome(call, "refused", code=error.code, message=str(error)))
        return error

    def _not_sent(self, intent: Intent, error: BaseException, held: Held | None = None) -> BaseException:
        """The journal failed: whether it has the intent or not, nothing is sent, and it learns that when it is back."""
        if isinstance(error, BusError) and (held is not None or not isinstance(error, JournalFull)):
            refused = Outcome(state="refused", process=self._bus.process, code=error.code, message=str(error))
            self._settler.owe(held or Held(Entry(intent=intent), 0), refused, began=held is not None)
        return error

    async def _placed(self, call: Call, held: Held, outcome: Outcome) -> None:
        """Write that it was placed; it stays fenced until its host has the answer."""
        written = await self._write(call, held, outcome)
        self._settler.answered(held, outcome, written=written)

    async def _finish(self, call: Call, held: Held, outcome: Outcome) -> None:
        """Write the outcome of what left no order behind."""
        if await self._write(call, held, outcome):
            await self._journal.told(held)

    async def _write(self, call: Call, held: Held, outcome: Outcome) -> bool:
        """Write a certain outcome; where the journal does not take it now, later."""
        fields = {"idempotency_key": held.intent.key, "state": outcome.state}
        try:
            first = await self._journal.finish(held, outcome, self._left_s(call))
        except BusError as e:
            log.warning("outcome not journaled yet", extra={"fields": fields | {"error": e.code}})
            self._settler.owe(held, outcome)
            return False
        if first.state != outcome.state:  # a settler was here before, and must have been right: look into this
            log.error("another outcome is in the journal", extra={"fields": fields | {"journal": first.state}})
        return True

    @staticmethod
    def _left_s(call: Call) -> float:
        """For the journal, so that the reply still arrives."""
        return max(LEAST_S, call.left_s() - REPLY_S)

    # ---------------------------------------------------------------- repetitions

    async def _came_before(self, call: Call) -> bool:
        """Whether it is known that this very request came before."""
        within_s = call.left_s() - call.margin_s
        try:
            settled = await self._journal.settled(call.exchange, call.key, within_s)
            return settled is not None or await self._journal.held(call.exchange, call.key, within_s) is not None
        except BusError:
            return False

    async def _first(self, call: Call) -> Any:
        """The same request came before: wait for its outcome, and tell that. Raises what the first was told."""
        call.sent = True  # by that one: whatever cuts this short leaves the outcome unknown
        wait_s = FIRST_WAIT_S
        while True:
            try:
                held = await self._journal.held(call.exchange, call.key)  # first: it goes after the other has come
                settled = await self._journal.settled(call.exchange, call.key)
            except BusError as e:
                raise outcome_unknown("the same request came before, and the journal does not answer", call.client_order_id) from e
            if settled is None and held is not None and held.entry.outcome is not None:
                settled = held.entry  # it found no room where it belongs
            first = settled or (held.entry if held is not None else None)
            if first is not None and first.intent.account != call.account:
                raise BadRequest("the secret key is not the one that this very request came with before; nothing was sent")
            if settled is not None and settled.outcome is not None:
                if settled.outcome.state == "placed":
                    self._settler.answered(held or Held(settled, 0), settled.outcome, written=True, repeated=True)
                return self._told(settled.intent, settled.outcome)
            if call.left_s() <= wait_s + REPLY_S:
                raise outcome_unknown("the same request came before, and its outcome is not known yet", call.client_order_id)
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, LONGEST_WAIT_S)

    @staticmethod
    def _told(intent: Intent, outcome: Outcome) -> Any:
        match outcome.state:
            case "placed" if outcome.order_id is not None:
                return Placed(outcome.order_id)
            case "refused":
                raise from_wire(outcome.code, outcome.message)
            case "absent":
                raise VenueRejected(f"not placed: {outcome.message or outcome.reason}")
            case "done" | "placed":
                raise BadRequest(f"this very request came before and was executed; its answer is not kept, look it up: {intent.key}")
        raise outcome_unknown("the same request came before, and nobody knows its outcome", intent.key)

    # ---------------------------------------------------------------- records

    def _intent(self, call: Call, method: str, **fields: str) -> Intent:
        return Intent(
            exchange=call.exchange,
            path=call.path,
            account=call.account,
            method=method,
            key=call.key,
            asked_ms=call.asked_ms,
            received_ms=self._bus.now_ms(),
            expires_at_ms=call.expires_at_ms,
            worker=self._bus.process,
            **{name: text if name in ("price", "amount") else call.redacted(text) for name, text in fields.items()},
        )

    def _outcome(self, call: Call, state: Any, **fields: Any) -> Outcome:
        return Outcome(state=state, process=self._bus.process, sent_ms=call.sent_ms, answered_ms=call.answered_ms, **fields)
