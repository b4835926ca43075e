"""What an order must pass before it is journaled: the kill switch, the exchange's own steps, and the limits of [guard].

What cannot be known is refused: a halt record unread for a second, a price, a count. A cancel is never asked about. Without limits an
order costs no trip: the record lies in memory, and the rules of a market are asked for once in ten minutes.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal

import nats.errors
import nats.js.errors
from msgspec import Struct
from nats.js.api import StorageType, StreamConfig

from bus import subjects
from bus.config import Config, Limits
from bus.connection import Bus
from bus.errors import BusDown, BusError, Expired, GuardRefused
from bus.halt import Halts, Record, path_name, path_names
from bus.lifecycle import running
from bus.messages import Market, OrderList, Trade, WithRaw
from bus.streams import LOST
from workers.http import Call
from workers.rules import EXACT, UNREADABLE, Kept, Markets, Rules, contract_size, fitted, reading, spends_money
from workers.venues import Venue

log = logging.getLogger(__name__)

READ_EVERY_S = 0.5
RETRY_S = 0.1
UNREAD_S = 1.0
"""A halt record that was true longer ago is not known."""
PRICE_S = 1.0
OPEN_S = 2.0
COUNT_TIMEOUT_S = 1.0
COUNTED_S = 3.0
"""How long the count of one second is kept: clocks of two workers differ by less."""

_UNCOUNTED = (*LOST, TypeError, ValueError)
"""Why a count is not known; the last two for an ack without one."""
RAW = "a raw write cannot be told from an order; not sent; `cancel` goes on"


class Scope(Struct, frozen=True):
    """Whom limits are for. name: "all", "account 1f2e...", "path okx/robot-7"."""

    name: str
    limits: Limits


class Open(Struct, frozen=True):
    """orders: open at the exchange. asked_ms: when that was asked, bus time."""

    orders: int
    asked_ms: int


class Guard:
    """Of one worker. monotonic: the clock of all that is kept for a while, for tests."""

    def __init__(self, bus: Bus, config: Config, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._bus = bus
        self._monotonic = monotonic
        self._halts = Halts(bus, config.nats.replicas, timeout_s=READ_EVERY_S)
        self._record = Record()
        self._read_at = float("-inf")
        self._readable = True
        self._js = bus.nc.jetstream(timeout=COUNT_TIMEOUT_S)
        self._replicas = config.nats.replicas
        self._rounding = config.orders.rounding
        limits = config.guard
        self._all = [Scope("all", limits)] if _limits(limits) else []
        self._accounts = {name: Scope(f"account {name}", its) for name, its in limits.accounts.items() if _limits(its)}
        self._paths = {path_name(name): Scope(f"path {path_name(name)}", its) for name, its in limits.paths.items() if _limits(its)}
        self._limited = bool(self._all or self._accounts or self._paths)
        self._markets = Markets(monotonic)
        self._prices: Kept[Decimal] = Kept(monotonic)
        self._open: Kept[Open] = Kept(monotonic)
        self._passed: dict[tuple[str, str], list[Call]] = {}

    # ---------------------------------------------------------------- what is asked of it

    async def admit(self, venue: Venue, call: Call, trade: Trade) -> Trade:
        """Let an order pass, perhaps rounded to the exchange's steps. trade: in plain terms, side buy or sell.

        Raises GuardRefused for a halt or a limit, BusDown where a halt cannot be known, BadRequest for what does not fit, Expired.
        """
        self.check(call)
        scopes = self._scopes(call)
        for scope in scopes:
            if scope.limits.symbols and trade.symbol.upper() not in {symbol.upper() for symbol in scope.limits.symbols}:
                raise _refused("symbols", scope, f"{trade.symbol} is not among {', '.join(scope.limits.symbols)}")
        rules = await self._markets.rules(venue, call, trade.symbol)
        if rules is not None:
            trade = fitted(trade, rules, self._rounding)
        if scopes:
            await self._check_value(venue, call, trade, rules, scopes)
            await self._check_rate(scopes)
            await self._check_open(venue, call, scopes)
        return trade

    def check(self, call: Call) -> None:
        """The kill switch alone, from memory: asked once more just before an order is sent. Raises GuardRefused, BusDown."""
        self._check_halt(call, "order not sent")

    async def admit_raw(self, call: Call) -> None:
        """Let a raw write pass: nobody knows what is in it, so that most limits refuse it. Raises GuardRefused, BusDown."""
        self._check_halt(call, RAW)
        scopes = self._scopes(call)
        for scope in scopes:
            for rule in ("symbols", "max_order_value", "max_open_orders"):
                if getattr(scope.limits, rule):
                    raise GuardRefused(f"guard: {rule} of {scope.name}: {RAW}")
        await self._check_rate(scopes)

    def withdraw(self, call: Call) -> None:
        """An order that was let through is not sent after all: it takes no place among the open ones. May be called for any."""
        passed = self._passed.get((call.exchange, call.account), [])
        if not call.sent and call in passed:
            passed.remove(call)

    # ---------------------------------------------------------------- the kill switch

    def _check_halt(self, call: Call, consequence: str) -> None:
        if self._monotonic() - self._read_at > UNREAD_S:
            raise BusDown(f"the halt record cannot be read; {consequence}")  # no rule of anybody's: the bus is away
        if stop := self._record.stops(call.account, call.exchange, call.path):
            what, halt = stop
            raise GuardRefused(f"guard: {what} is halted {halt}; {consequence}")

    async def read(self) -> bool:
        """Read the halt record once; whether that worked."""
        asked = self._monotonic()
        try:
            record, revision = await self._halts.read()
        except BusError as e:
            if self._readable:
                log.warning("halt record not read", extra={"fields": {"error": str(e)}})
            self._readable = False
            return False
        self._readable = True
        # A record that is gone, with a disk for instance, ends no halt: only one that says so does.
        if revision and record != self._record:
            log.warning("halt record changed", extra={"fields": {"halted": [what for what, _ in record.rows()]}})
            self._record = record
        self._read_at = asked
        return True

    async def follow(self) -> None:
        """Read the halt record for ever."""
        while True:
            asked = self._monotonic()
            pause_s = READ_EVERY_S if await self.read() else RETRY_S
            await asyncio.sleep(max(0.0, asked + pause_s - self._monotonic()))

    # ---------------------------------------------------------------- limits

    def _scopes(self, call: Call) -> Sequence[Scope]:
        if not self._limited:
            return ()
        paths = path_names(call.exchange, call.path) if self._paths else ()
        account = self._accounts.get(call.account)
        return [*self._all, *([account] if account else []), *(self._paths[name] for name in paths if name in self._paths)]

    async def _check_value(self, venue: Venue, call: Call, trade: Trade, rules: Rules | None, scopes: Sequence[Scope]) -> None:
        applying = [scope for scope in scopes if scope.limits.max_order_value]
        if not applying:
            return
        strictest = min(applying, key=lambda scope: scope.limits.max_order_value)
        most = strictest.limits.max_order_value
        if spends_money(trade):
            value = trade.amount
        else:
            size = contract_size(trade, rules)
            if size is None:
                raise _refused("max_order_value", strictest, f"the contract size of {trade.symbol} is not known")
            price = max(await self._price(venue, call, trade.symbol, strictest), trade.price)
            value = EXACT.multiply(EXACT.multiply(trade.amount, size), price)
        if value > most:
            raise _refused("max_order_value", strictest, f"{_shown(value)} is above {_shown(most)}")

    async def _price(self, venue: Venue, call: Call, symbol: str, scope: Scope) -> Decimal:
        async def ask() -> tuple[Decimal, float]:
            last = (await venue.ticker(reading(call), Market(symbol))).last
            if not (last.is_finite() and last > 0):
                raise ValueError(f"{last} for a price")
            return last, PRICE_S

        whose = "" if "ticker" in venue.public else call.account
        try:
            return await self._prices.get((call.exchange, symbol, whose), ask)
        except Expired:
            raise
        except (BusError, *UNREADABLE) as e:
            raise _refused("max_order_value", scope, f"the last price of {symbol} is not known ({_why(e)})") from e

    async def _check_rate(self, scopes: Sequence[Scope]) -> None:
        """Count this order, over all workers, in each scope that limits how many there may be in a second."""
        second = self._bus.now_ms() // 1000
        for scope in scopes:
            if most := scope.limits.max_orders_per_s:
                try:
                    count = await self._count(subjects.rate(scope.name, second))
                except (BusError, *_UNCOUNTED) as e:
                    raise _refused("max_orders_per_s", scope, f"orders cannot be counted ({_why(e)})") from e
                if count > most:
                    raise _refused("max_orders_per_s", scope, f"{count} in this second is above {most}")

    async def _count(self, subject: str) -> int:
        self._bus.check()
        try:
            ack = await self._js.publish(subject, headers={"Nats-Incr": "1"})
        except nats.js.errors.NoStreamResponseError:  # lost with a restart of the server, as all that is in memory, or not made yet
            await self._js.add_stream(
                StreamConfig(
                    name=subjects.RATE,
                    subjects=["rate.>"],
                    storage=StorageType.MEMORY,
                    num_replicas=self._replicas,
                    max_age=COUNTED_S,
                    max_msgs_per_subject=1,
                    allow_msg_counter=True,
                )
            )
            ack = await self._js.publish(subject, headers={"Nats-Incr": "1"})
        if ack.val is None:
            raise ValueError("an ack without a count")
        return int(ack.val)

    async def _check_open(self, venue: Venue, call: Call, scopes: Sequence[Scope]) -> None:
        """Last of all, as nothing is awaited between its look and the note that this order passed."""
        applying = [scope for scope in scopes if scope.limits.max_open_orders]
        if not applying:
            return
        strictest = min(applying, key=lambda scope: scope.limits.max_open_orders)
        most = strictest.limits.max_open_orders

        async def ask() -> tuple[Open, float]:
            asked_ms = call.now_ms()
            found = await venue.orders(reading(call), OrderList())
            return Open(len(found.data if isinstance(found, WithRaw) else found), asked_ms), OPEN_S

        key = (call.exchange, call.account)
        try:
            known = await self._open.get(key, ask)
        except Expired:
            raise
        except (BusError, *UNREADABLE) as e:
            raise _refused("max_open_orders", strictest, f"open orders cannot be counted ({_why(e)})") from e
        passed = [one for one in self._passed.get(key, []) if _on_top(one, known)]
        self._passed[key] = passed
        count = known.orders + len(passed)
        if count >= most:
            raise _refused("max_open_orders", strictest, f"{count} are open, {most} is the most")
        passed.append(call)


def _on_top(call: Call, known: Open) -> bool:
    """Whether an order that was let through may be missing in a count: it was answered since, or may still be on its way."""
    return call.answered_ms >= known.asked_ms if call.answered_ms else call.left_s() > 0


def _limits(limits: Limits) -> bool:
    return bool(limits.symbols or limits.max_order_value or limits.max_orders_per_s or limits.max_open_orders)


def _refused(rule: str, scope: Scope, why: str) -> GuardRefused:
    return GuardRefused(f"guard: {rule} of {scope.name}: {why}; order not sent")


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _shown(value: Decimal) -> str:
    """For people: "12,000" for 12000.00."""
    text = f"{value:,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@asynccontextmanager
async def guarding(bus: Bus, config: Config) -> AsyncIterator[Guard]:
    """A guard whose halt record is read again and again beside the body. Where it cannot be read orders are refused until it can."""
    guard = Guard(bus, config)
    await guard.read()  # follow() begins with a pause
    async with running(guard.follow()):
        yield guard
