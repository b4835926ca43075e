"""What every check works with: the venue behind its boundary, the proxy before its exchange, and what was learnt on the way."""

import inspect
from collections.abc import Awaitable, Callable, Iterator
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any, NoReturn

from msgspec import Struct

from bus import messages as m
from bus.methods import METHODS
from workers.check.boundary import Answered, Boundary, Ended, Stuck
from workers.check.proxy import Fault, Proxy, every
from workers.check.wire import Seen

MARKET = Decimal(-1)
UNKNOWN = "NOSUCH_ZZZ"
"""A market that no exchange has."""
WORTH = 30
"""What an order of a check is worth, about, in the quote currency."""


class Wrong(Exception):
    """The check failed; the text is what was seen."""


class NotApplicable(Exception):
    """The check cannot be made here; the text is why."""


class Check(Struct, frozen=True):
    """One check.

    expects: what a conforming venue does. where: the function of the venue to look at. section: of the protocol document, in words.
    trades: it places orders.
    """

    name: str
    expects: str
    where: str
    section: str
    run: Callable[["Bench"], Awaitable[str | None]]
    trades: bool = False


CHECKS: dict[str, Check] = {}


def check(
    name: str, *, expects: str, where: str, section: str, trades: bool = False
) -> Callable[[Callable[["Bench"], Awaitable[str | None]]], Callable[["Bench"], Awaitable[str | None]]]:
    """Register a check. It returns what it saw, or None; raises Wrong or NotApplicable."""

    def register(run: Callable[["Bench"], Awaitable[str | None]]) -> Callable[["Bench"], Awaitable[str | None]]:
        CHECKS[name] = Check(name, expects, where, section, run, trades)
        return run

    return register


class Settings(Struct, frozen=True, kw_only=True):
    """symbol: a market of the exchange, as hosts write it. price, amount: of the orders; None: half the best bid, and about 30 in quote.
    keys: of an account. play: money is no object, so that market orders may be filled.
    paper: it is a paper exchange, of which is known how it behaves."""

    symbol: str = "BTC_USDT"
    price: Decimal | None = None
    amount: Decimal | None = None
    keys: tuple[str, str] = ("", "")
    play: bool = True
    paper: bool = False


class Bench:
    """answers: everything that a host was told, with what was going on. stuck: a call never ended, and none after it can be judged."""

    def __init__(self, venue_class: type[Any], settings: Settings, boundary: Boundary, proxy: Proxy) -> None:
        self.venue_class = venue_class
        self.settings = settings
        self.boundary = boundary
        self.proxy = proxy
        self.answers: list[tuple[str, Answered]] = []
        self.facts: dict[str, Any] = {}
        self.stuck = False
        self._placed = 0
        self._amounts: set[Decimal] = set()

    @property
    def name(self) -> str:
        return self.boundary.name

    @property
    def symbol(self) -> str:
        return self.settings.symbol

    @property
    def market(self) -> m.Market:
        return m.Market(self.symbol)

    def has(self, method: str) -> bool:
        return callable(getattr(self.boundary.venue, METHODS[method].function, None))

    def offers(self, method: str) -> None:
        """Raises NotApplicable where the venue lacks the function."""
        if not self.has(method):
            raise NotApplicable(f"the venue has no {METHODS[method].function}(): hosts read `{method} not support`")

    async def call(
        self,
        method: str,
        params: Struct,
        *,
        keys: tuple[str, str] | None = None,
        left_s: float = 10.0,
        exchange: str = "",
        during: str = "",
    ) -> Answered:
        """One request of a host's. exchange: "hasty" or "dead" for the other names of the venue. Raises Wrong where it never ends."""
        self.offers(method)
        name = f"{self.name}-{exchange}" if exchange else self.name
        try:
            answered = await self.boundary.call(method, params, keys or self.settings.keys, left_s=left_s, exchange=name)
        except Stuck as e:
            self.stuck = True
            self.proxy.cut_all()
            raise Wrong(str(e)) from None
        except Ended as e:
            raise Wrong(str(e)) from None
        self.answers.append((during, answered))
        return answered

    async def data(self, method: str, params: Struct) -> Any:
        """What a host gets, of a call that has to succeed."""
        answered = await self.call(method, params)
        if answered.failed:
            raise Wrong(str(answered))
        return answered.data

    async def failing(
        self,
        fault: Fault,
        method: str,
        params: Struct,
        *,
        when: Callable[[Seen], bool] = every,
        left_s: float = 5.0,
        keys: tuple[str, str] | None = None,
    ) -> Answered:
        """One request of a host's while the exchange fails so."""
        exchange = "hasty" if fault.how == "silence" else ""
        with self.proxy.failing(fault, when):
            return await self.call(method, params, left_s=left_s, exchange=exchange, during=fault.name, keys=keys)

    # ---------------------------------------------------------------- orders

    async def price(self) -> Decimal:
        """Of an order that rests: half the best bid, in two digits."""
        if "price" not in self.facts:
            self.facts["price"] = self.settings.price or _digits(Decimal(str((await self.data("ticker", self.market))["buy"])) / 2, 2)
        price: Decimal = self.facts["price"]
        if price <= 0:
            raise NotApplicable("the ticker has no bid to choose a price by; say --price")
        return price

    async def amount(self) -> Decimal:
        """Of the next order: none has the digits of another, so that it can be found in requests."""
        self._placed += 2 if self._placed % 10 == 9 else 1
        step = self.settings.amount / 10 if self.settings.amount else _digits(WORTH / await self.price(), 1) / 10
        amount = step * (10 + self._placed)
        self._amounts.add(amount)
        return amount

    async def contracts(self) -> Decimal:
        """Of a contract order: about ten times as much, in one digit, for contracts come in larger lots."""
        return self.settings.amount * 10 if self.settings.amount else _digits(10 * WORTH / await self.price(), 1)

    async def order(self, side: Any = "buy") -> m.Trade:
        """A limit order that rests."""
        self.offers("trade")
        return m.Trade(self.symbol, side, await self.price(), await self.amount())

    async def place(self) -> tuple[Any, Answered, m.Trade]:
        """Place one that rests -> (its id as a host gets it, the whole answer, the order)."""
        order = await self.order()
        answered = await self.call("trade", order)
        if answered.failed:
            raise Wrong(str(answered))
        return order_id(answered), answered, order

    @property
    def placed_any(self) -> bool:
        return bool(self._amounts)

    def reference(self, told: object) -> m.OrderRef:
        """The id as it travels back: a host sends as text what it was told."""
        return m.OrderRef(str(told), self.symbol)

    async def clean(self) -> list[str]:
        """Cancel what the checks left open, also orders whose fate a host was not told -> ids of what could not be cancelled."""
        if "price" not in self.facts or not self._amounts:
            return []
        left: list[str] = []
        try:
            rows = await self.data("orders", m.OrderList(self.symbol))
            mine = [row for row in rows if row["price"] == self.facts["price"] and Decimal(str(row["amount"])) in self._amounts]
            left = [str(row["id"]) for row in mine]
            for told in list(left):
                if not (await self.call("cancel", self.reference(told))).failed:
                    left.remove(told)
        except NotApplicable:
            return left
        except (Wrong, LookupError, TypeError, ValueError, ArithmeticError):
            return left or ["orders could not be read; look at the account"]
        return left


def where(venue_class: type[Any], name: str) -> str:
    """Where to look: "demo.py:57 Demo.records", of a function or of what the class declares; the class where it has no such thing."""
    target = getattr(venue_class, name, venue_class)
    shown = f"{venue_class.__name__}.{name}" if target is not venue_class else venue_class.__name__
    if not inspect.isfunction(target):
        target = venue_class
    try:
        path, (lines, line) = inspect.getsourcefile(target), inspect.getsourcelines(target)
    except (OSError, TypeError):
        return f"{venue_class.__module__}.{shown}"
    line += next((number for number, text in enumerate(lines) if text.strip().startswith((f"{name} =", f"{name}:"))), 0)
    return f"{Path(path or '').name}:{line} {shown}"


def order_id(answered: Answered) -> Any:
    """The id in trade's answer. Raises Wrong."""
    if not isinstance(answered.data, dict) or not isinstance(answered.data.get("id"), int | str) or answered.data["id"] in ("", 0):
        wrong(f'{answered}; expected {{"id": a number or text}}')
    return answered.data["id"]


def wrong(text: str) -> NoReturn:
    raise Wrong(text)


def expect(condition: object, text: str) -> None:
    if not condition:
        raise Wrong(text)


def is_number(value: object) -> bool:
    return isinstance(value, int | Decimal) and not isinstance(value, bool)


def listed(answered: object, what: str) -> Iterator[Any]:
    """The rows of a list. Raises Wrong for anything else."""
    if not isinstance(answered, list):
        wrong(f"{what}: expected a list, which is [] when there is nothing; got {answered!r:.80}")
    return iter(answered)


def _digits(value: Decimal, count: int) -> Decimal:
    """The first digits of it, rounded down: (31189.24, 2) -> 31000."""
    return value.quantize(Decimal(1).scaleb(value.adjusted() - count + 1), ROUND_FLOOR) if value else value
