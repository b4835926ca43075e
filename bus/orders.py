"""`fmzbus orders`, `order` and `settle`: what the journal knows about orders, and the word of a person who looked at the exchange."""

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import typer
from msgspec import Struct

from bus import fleet, history
from bus.config import Config
from bus.connection import Bus
from bus.errors import BusError
from bus.history import Entry, NotOne
from bus.journal import Intent, Journal, Outcome
from bus.paper import PaperError, span_s
from bus.terminal import NO_BUS, ConfigFile, StateDir, configured, err, failed, on_the_bus, out, table, who

T = TypeVar("T")

app = typer.Typer()
WITHIN_S = 120.0
"""For a whole journal of half a million orders."""
MOST_REASON = 200

Key = Annotated[str, typer.Argument(help="Of the order, which is its client order id at the exchange; its first 6 characters will do.")]
Json = Annotated[bool, typer.Option("--json", help="For programs: every field.")]


@app.command("orders")
def orders_command(
    exchange: Annotated[str, typer.Option(help="Only there, by the name in subject and service address: okx.")] = "",
    account: Annotated[str, typer.Option(help="Only of this account, by its hash or the beginning of it.")] = "",
    symbol: Annotated[str, typer.Option(help="Only of this symbol: BTC_USDT, BTC_USDT.swap.")] = "",
    since: Annotated[str | None, typer.Option(help="Asked for in the last 30s, 10m, 2h, 7d; default 1h, and all with --unsettled.")] = None,
    unsettled: Annotated[bool, typer.Option("--unsettled", help="Only those whose outcome is not known, and what will happen.")] = False,  # noqa: FBT002 - typer's own way
    cancels: Annotated[bool, typer.Option("--cancels", help="Cancels too.")] = False,  # noqa: FBT002 - as above
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1_000_000, help="The newest so many.")] = 100,
    as_json: Json = False,  # noqa: FBT002 - as above
    config: ConfigFile = None,
    state: StateDir = None,
) -> None:
    """List orders and raw writes as the journal knows them, newest last.

    \b
    Of the last hour; of one robot's account in the last day:
      fmzbus orders
      fmzbus orders --account 1f2e3d4c --since 1d --limit 500
    What is open, and whether somebody has to look at it:
      fmzbus orders --unsettled
    For a program:
      fmzbus orders --since 7d -n 1000000 --json

    \b
    placed     the exchange has it, under that order id
    refused    the exchange said no, or nothing was sent
    absent     looked for after its expiry: the exchange does not have it
    done       a cancel or a raw write that was executed
    UNKNOWN    sent, and nobody knows: equal orders are refused meanwhile
    in flight  its deadline is not over

    The key is also the client order id at the exchange. Times are bus time: the clock of the NATS server, in UTC.
    """
    settings = configured(config, state)
    try:
        span = span_s(since) if since is not None else 0.0 if unsettled else 3600.0
    except PaperError as e:
        raise failed(f"--since: {e}") from None

    def wanted(intent: Intent) -> bool:
        return (
            exchange.lower() in ("", intent.exchange)
            and intent.account.startswith(account.lower())
            and (not symbol or intent.symbol.upper() == symbol.upper())
            and (cancels or intent.method != "cancel")
        )

    async def look(bus: Bus, journal: Journal) -> tuple[int, int, list[Entry], set[str]]:
        since_ms = bus.now_ms() - int(span * 1000) if span else 0
        if unsettled:
            async with fleet.followed(bus) as heard:
                entries = [entry for entry in await history.waiting(bus) if wanted(entry.intent) and entry.intent.asked_ms >= since_ms]
                if entries:
                    await asyncio.sleep(fleet.BEAT_S * 1.2)  # everybody speaks at least once in a beat
                serving = {name for one in heard.alive() if one.role == "worker" for name in one.serves}
        else:
            entries, serving = (
                [one for one in await history.written(bus, journal, exchange=exchange.lower(), since_ms=since_ms) if wanted(one.intent)],
                set(),
            )
        newest = entries[-limit:]
        if unsettled:  # a few have an outcome by now; the others' reasons are in the journal
            told = await history.several(journal, [entry.intent.key for entry in newest])
            newest = [entry for entry in told.values() if entry.outcome is None]
        return bus.now_ms(), max(0, len(entries) - limit), newest, serving

    now_ms, left_out, found, serving = _do(settings, look)
    if as_json:
        rows = [entry.fields(now_ms) | ({"next": _next(entry, now_ms, serving)} if unsettled else {}) for entry in found]
        out.print(msgspec.json.encode({"at_ms": now_ms, "left_out": left_out, "orders": rows}).decode())
        return
    if not found:
        where = "" if not (exchange or account or symbol) else " that fits"
        err.print(f"nothing is unsettled{where}" if unsettled else f"the journal has no order{where} of the last {since or '1h'}")
        return
    rest = ("for", "what happens next", "key") if unsettled else ("order id", "key")
    shown = table("asked for (UTC)", "exchange", "account", "what", "state", *rest)
    for entry in found:
        intent = entry.intent
        last = (_span(now_ms - intent.asked_ms), _next(entry, now_ms, serving)) if unsettled else (entry.order_id or "-",)
        shown.add_row(_utc(intent.asked_ms), intent.exchange, intent.account, intent.asked_for, _state(entry, now_ms), *last, intent.key)
    out.print(shown)
    if left_out:
        err.print(f"{left_out} older ones left out; --limit shows more")


@app.command("order")
def order_command(
    key: Key,
    as_json: Json = False,  # noqa: FBT002 - typer's own way
    config: ConfigFile = None,
    state: StateDir = None,
) -> None:
    """Show the life of one order, hop by hop, from its host's request to its settlement, and its cancels.

    \b
    The key is in `outcome unknown: ... client order id KEY`, in `fmzbus
    orders`, and at the exchange; its first 6 characters are enough:
      fmzbus order 1f2e3d
      fmzbus order 1f2e3d4c5b6a79880f1e2d3c4b5a6978 --json

    \b
    asked      the host's request reached the bridge
    received   a worker took it
    journaled  the intent is on disk; nothing is sent before that
    sent       the worker began its call to the exchange
    answered   the exchange's answer was there
    unknown    the answer said nothing; the text is what the host gets unless
               a look-up finds the order in time
    outcome    written by the worker that sent it, by a settler that looked it
               up, or by a person

    Every time is bus time (the clock of the NATS server, in UTC), measured by whoever wrote it: a hop may seem a few ms early. The ms are
    those since the hop before.
    """
    settings = configured(config, state)

    async def look(bus: Bus, journal: Journal) -> tuple[int, Entry, list[Entry]]:
        entry = await history.find(bus, journal, key)
        return bus.now_ms(), entry, await history.cancels(bus, journal, entry)

    now_ms, entry, cancels = _do(settings, look)
    hops = [*_hops(entry), *(hop for cancel in cancels for hop in _cancel_hops(cancel))]
    since = [0, *(after.at_ms - before.at_ms for before, after in itertools.pairwise(hops))]
    if as_json:
        document = entry.fields(now_ms) | {"at_ms": now_ms, "is_fenced": _is_fenced(entry, now_ms)}
        document["hops"] = [msgspec.structs.asdict(hop) | {"since_ms": ms} for hop, ms in zip(hops, since, strict=True)]
        out.print(msgspec.json.encode(document | {"cancels": [cancel.fields(now_ms) for cancel in cancels]}).decode())
        return
    _print_order(entry)
    shown = table("time (UTC)", "ms", "hop", "")
    for hop, ms in zip(hops, since, strict=True):
        shown.add_row(_utc(hop.at_ms), f"{ms:+d}" if hop is not hops[0] else "", hop.what, hop.detail)
    out.print(shown)
    out.print(f"now: {_open(entry, now_ms)}")


@app.command("settle")
def settle_command(
    key: Key,
    outcome: Annotated[str, typer.Option("--as", help="placed or absent; for a raw write done or absent.")],
    reason: Annotated[str, typer.Option(help="How you know, for the journal: what you looked at.")],
    order_id: Annotated[str, typer.Option(help="With placed: the exchange's id of it, told to a host that repeats the request.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,  # noqa: FBT002 - typer's own way
    config: ConfigFile = None,
    state: StateDir = None,
) -> None:
    """Say what became of an order whose outcome nobody knows, after you looked at the exchange. Your word is final.

    \b
    Look at the exchange for the client order id, which is the key. Then:
      fmzbus settle 1f2e3d --as placed --order-id 77 --reason "in its list"
      fmzbus settle 1f2e3d --as absent --reason "asked their support"
    A raw write (__api_...) was executed, or was not:
      fmzbus settle 1f2e3d --as done --reason "the transfer is booked"

    It opens the fence: equal orders go out again. Called absent, an order that is alive after all will be there twice. The journal keeps
    your name, the reason and the time; the order's sealed credentials are removed. `fmzbus orders --unsettled` lists what waits.
    """
    settings = configured(config, state)
    reason = " ".join(reason.split())[:MOST_REASON]
    if not reason:
        raise failed("--reason: say how you know")

    async def look(bus: Bus, journal: Journal) -> tuple[int, Entry]:
        return bus.now_ms(), await history.find(bus, journal, key)

    now_ms, entry = _do(settings, look)
    intent = entry.intent
    known: Literal["placed", "done"] = "placed" if intent.method == "trade" else "done"
    if entry.fenced and outcome == "placed":
        _lift(settings, entry, now_ms, yes=yes)
        return
    if why_not := _why_not(entry, now_ms, settings.orders.settle_after_s):
        raise failed(f"{intent.key} {why_not}")
    if outcome not in (known, "absent"):
        raise failed(f"--as: expected {known} or absent for {intent.asked_for!r}, got {outcome!r}")
    if order_id and outcome != "placed":
        raise failed("--order-id goes with --as placed")
    _print_order(entry)
    out.print(f"now: {_open(entry, now_ms)}")
    out.print(_meaning(intent, outcome))
    if not yes:
        typer.confirm(f"settle it as {outcome}?", abort=True)
    state_of_it = "absent" if outcome == "absent" else known
    word = Outcome(state=state_of_it, by="person", process=who(), order_id=order_id or None, reason=reason)

    async def write(_bus: Bus, journal: Journal) -> Outcome:
        held = await journal.held("*", intent.key)
        if held is None:
            settled = await journal.settled("*", intent.key)
            return settled.outcome if settled is not None and settled.outcome is not None else word
        first = await journal.finish(held, word)
        await (journal.untold(held, first) if first.state == "placed" else journal.told(held))
        return first

    first = _do(settings, write, "NOT settled: ")
    if first != word:
        raise failed(f"settled meanwhile, and that stays: {_became(first)}")
    out.print(f"settled: {_became(first)}")
    if first.state == "placed":
        told = f"an equal order is refused until nobody has tried for {settings.orders.fence_s:g} s: its robot may still be repeating it"
        out.print(f"{told}; the same command again opens the fence at once")
    else:
        out.print("its fence is open")


def _lift(settings: Config, entry: Entry, now_ms: int, *, yes: bool) -> None:
    """The person knows that it was placed: an equal order is no repetition of it."""
    _print_order(entry)
    out.print(f"now: {_open(entry, now_ms)}")
    if not yes:
        typer.confirm("open its fence? An equal order of this account will be a second one", abort=True)

    async def lift(_bus: Bus, journal: Journal) -> None:
        await journal.lift(entry.intent)

    _do(settings, lift, "NOT opened: ")
    out.print("its fence is open")


def _why_not(entry: Entry, now_ms: int, settle_after_s: float) -> str:
    """Why nobody has to settle it, "" where somebody has to."""
    left_s = (entry.intent.expires_at_ms - now_ms) / 1000 + settle_after_s
    if entry.intent.method == "cancel":
        return "is a cancel: it keeps nothing waiting; look at the order it names"
    if entry.outcome is not None:
        return f"is settled: {_became(entry.outcome)}"
    if left_s > 0:
        return f"is in flight: what was sent may be executed until its expiry; wait {left_s:.0f} s, then look at the exchange again"
    return ""


def _meaning(intent: Intent, outcome: str) -> str:
    equal = f"an equal order ({intent.asked_for}) of this account" if intent.method == "trade" else "the same raw write"
    if outcome == "absent":
        return f"as absent: it is not at the exchange and never will be. If it is there after all, {equal} will be a second one."
    return f"as {outcome}: it was executed. From now on {equal} is sent again, as another one on purpose."


# ---------------------------------------------------------------- in words


class Hop(Struct, frozen=True):
    """What happened to an order, and when, bus time."""

    what: str
    at_ms: int
    detail: str = ""


def _hops(entry: Entry) -> list[Hop]:
    intent, last = entry.intent, entry.unknown or entry.outcome
    hops = [
        Hop("asked", intent.asked_ms, f"the request reached the bridge for {intent.path}"),
        Hop("received", intent.received_ms, f"by {intent.worker}"),
        Hop("journaled", entry.intent_ms, "the intent is on disk" if intent.method != "cancel" else "noted: a cancel waits for nothing"),
        Hop("sent", last.sent_ms if last else 0, f"to {intent.exchange}"),
        Hop("answered", last.answered_ms if last else 0),
        Hop("unknown", entry.unknown_ms, _unknown(entry)),
        Hop("outcome", entry.outcome_ms, _became(entry.outcome) if entry.outcome else ""),
    ]
    return [hop for hop in hops if hop.at_ms]


def _unknown(entry: Entry) -> str:
    if entry.unknown is None:
        return ""
    return entry.unknown.message if not entry.unknown.code else history.told(entry.unknown)


def _cancel_hops(cancel: Entry) -> list[Hop]:
    hops = [Hop("cancel asked", cancel.intent.asked_ms, f"key {cancel.intent.key}")]
    if cancel.outcome is not None:
        hops.append(Hop("cancel", cancel.outcome_ms, _became(cancel.outcome)))
    return hops


def _became(outcome: Outcome) -> str:
    """ "placed, order id 77, by worker-1f2e3d4c after 2 look-ups"."""
    parts = [outcome.state.replace("unknown", "UNKNOWN")]
    if outcome.order_id is not None:
        parts.append(f"order id {outcome.order_id}")
    if outcome.state == "refused" and not outcome.sent_ms:
        parts.append("nothing was sent")
    looked = f" after {outcome.looked} look-up{'s' if outcome.looked > 1 else ''}" if outcome.looked else ""
    parts.append({"worker": "by ", "settler": "by a settler in ", "person": "by the word of "}[outcome.by] + outcome.process + looked)
    why = outcome.reason or (history.told(outcome) if outcome.code else outcome.message)
    return ", ".join(parts) + (f": {why}" if why else "")


def _next(entry: Entry, now_ms: int, serving: set[str]) -> str:
    if entry.state(now_ms) == "in flight":
        return f"on its way, {(entry.intent.expires_at_ms - now_ms) / 1000:.0f} s left"
    if entry.needs_a_person:
        return "needs a person: look, then `fmzbus settle`"
    return "being looked up" if entry.intent.exchange in serving else f"waits for a worker that serves {entry.intent.exchange}"


def _is_fenced(entry: Entry, now_ms: int) -> bool:
    """Whether an equal order is refused because of it."""
    return entry.fenced or (entry.intent.method == "trade" and entry.waiting and entry.state(now_ms) == "unknown")


def _open(entry: Entry, now_ms: int) -> str:
    state = entry.state(now_ms)
    if state == "in flight":
        return f"in flight for at most {(entry.intent.expires_at_ms - now_ms) / 1000:.1f} s more"
    if entry.fenced:
        return f"settled ({state}); fenced: its host may not know, an equal order is refused until nobody has tried for a while"
    if state != "unknown":
        return f"settled ({state}); nothing waits for it"
    if entry.intent.method == "cancel":
        return "UNKNOWN; nobody looks a cancel up, look at the order it names"
    parts = [f"UNKNOWN for {_span(now_ms - entry.intent.asked_ms)}"]
    if entry.unknown is None:
        parts.append("its worker wrote nothing after the intent, so it may have been sent")
    if _is_fenced(entry, now_ms):
        parts.append("fenced: an equal order of this account is refused until it is settled")
    parts.append("it needs a person: look, then `fmzbus settle`" if entry.needs_a_person else "workers look it up")
    return "; ".join(parts)


def _state(entry: Entry, now_ms: int) -> str:
    return entry.state(now_ms).replace("unknown", "UNKNOWN")


def _print_order(entry: Entry) -> None:
    intent = entry.intent
    out.print(f"{intent.key}  {intent.asked_for}")
    out.print(f"at {intent.exchange}, path {intent.path}, account {intent.account}")


def _utc(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(at_ms // 1000, UTC):%Y-%m-%d %H:%M:%S}.{at_ms % 1000:03d}"


def _span(ms: int) -> str:
    """ "42 s", "5 min", "3.0 h", "2.1 d"."""
    seconds = max(0, ms) / 1000
    for unit, length in (("d", 86_400), ("h", 3600)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds // 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _do(settings: Config, job: Callable[[Bus, Journal], Coroutine[Any, Any, T]], otherwise: str = "") -> T:
    async def run(bus: Bus) -> T:
        return await job(bus, Journal(bus, settings.orders, settings.nats.replicas))

    try:
        return on_the_bus(settings, run, WITHIN_S)
    except (BusError, NotOne) as e:
        raise failed(f"{otherwise}{e}") from None
    except TimeoutError:
        raise failed(f"{otherwise}{NO_BUS}") from None
