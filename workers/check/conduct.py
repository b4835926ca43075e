"""Checks of what a venue declares, and of how it treats keys. Keys are looked for in everything that the checks before have seen."""

import asyncio
import contextlib
import secrets
import time
from typing import Any

from bus import messages as m
from bus.seal import BLANK
from workers.check.bench import Bench, NotApplicable, check, expect, wrong
from workers.check.boundary import Stuck, explain
from workers.check.faults import LIMITED, READ_FAULTS
from workers.check.proxy import NOT_PASSED_ON, Fault
from workers.check.wire import SHORTEST_KEY, Seen

LATE = Fault("an order that comes late", executed=True, how="drop", wait_s=3.0)
MOST_OFF_S = 3600
READS = {"ticker": m.Market, "depth": m.Market, "trades": m.Market, "records": m.Records}


@check(
    "public-honest",
    expects="what `public` names is a read that sends no key, works without one, and tells everybody the same",
    where="public",
    section="several accounts through one program; only public reads are shared",
)
async def public(bench: Bench) -> str:
    declared = bench.boundary.venue.public
    writes = sorted(name for name in declared if name not in READS)
    expect(not writes, f"public names {', '.join(writes)}; only {', '.join(READS)} can be the same for everybody")
    for method in sorted(declared):
        params = m.Records(bench.symbol, 1) if method == "records" else bench.market
        answered = await bench.call(method, params)
        for seen in answered.sent:
            where = next(filter(None, map(seen.shows, bench.settings.keys)), "")
            expect(not where, f"{method} is public, and sends a key: {where}")
        without = await bench.call(method, params, keys=("", ""), during="no keys")
        expect(not without.failed, f"{method} is public, and without keys {without}")
    short = any(len(key) < SHORTEST_KEY for key in bench.settings.keys)
    return (", ".join(sorted(declared)) or "nothing is public") + (" (a key is too short to be looked for)" if short else "")


@check(
    "lookups-honest",
    expects='with "client_order_id" in `lookups` orders carry the id; find_order() finds it, says None for another, raises on failure',
    where="find_order",
    section="promises about orders: looked up by client order id",
    trades=True,
)
async def lookups(bench: Bench) -> str:
    venue = bench.boundary.venue
    unknown = venue.lookups - {"client_order_id"}
    expect(not unknown, f'lookups: {", ".join(sorted(unknown))}; there is "client_order_id" only')
    find = getattr(venue, "find_order", None)
    if "client_order_id" not in venue.lookups:
        expect(find is None, 'there is a find_order(), and lookups lacks "client_order_id": it would never be used')
        raise NotApplicable("lookups is empty: an unclear order can only be looked for by a person")
    if find is None:
        wrong('lookups has "client_order_id", and there is no find_order()')
    told, answered, _ = await bench.place()
    expect(any(answered.client_order_id in seen.text for seen in answered.sent), f"{answered.client_order_id} was not sent with the order")
    try:
        found = await bench.boundary.direct(find, bench.settings.keys, answered.client_order_id, bench.settings.symbol)
        absent = await bench.boundary.direct(find, bench.settings.keys, secrets.token_hex(16), bench.settings.symbol)
    except Stuck as e:
        wrong(str(e))
    except Exception as e:  # noqa: BLE001 - whatever a venue raises here is the finding
        wrong(f"find_order() raised {explain(e)}")
    else:
        await _not_guessed(bench, find, answered.client_order_id)
    finally:
        await bench.call("cancel", bench.reference(told))
    expect(getattr(found, "id", None) == told, f"find_order() found {found!r:.120} and not order {told!r}")
    expect(absent is None, f"find_order() of an id that was never used answered {absent!r:.120}")
    return f"found {told!r}"


@check(
    "expiry-honest",
    expects="with time_ms() an order carries call.expires_at_ms: one that comes later is refused, so that its absence can be proven",
    where="trade",
    section="promises about orders: proven absent after the signed expiry",
    trades=True,
)
async def expiry(bench: Bench) -> str:
    venue = bench.boundary.venue
    time_ms, find = getattr(venue, "time_ms", None), getattr(venue, "find_order", None)
    if time_ms is None or find is None:
        raise NotApplicable("there is no time_ms(), or no find_order(): an unclear order is never told to be absent")
    keys = bench.settings.keys
    off_s = (await _asked(bench, time_ms) - time.time() * 1000) / 1000
    expect(abs(off_s) < MOST_OFF_S, f"time_ms() is {off_s:.0f} s off; expected the exchange's clock, UTC in ms")
    order = await bench.order()
    answered = await bench.failing(LATE, "trade", order, when=lambda seen: seen.carries(order.amount), left_s=LATE.wait_s / 2)
    sent = next((seen for seen in answered.sent if seen.carries(order.amount)), None)
    expect(sent is not None and await bench.proxy.until(lambda: bool(sent.status), LATE.wait_s + 5), f"the order was not sent: {answered}")
    found = await bench.boundary.direct(find, keys, answered.client_order_id, bench.symbol)
    expect(found is None, f"an order that came {LATE.wait_s / 2:.1f} s after its expiry was executed as {getattr(found, 'id', found)!r}")
    return f"an order that came late was refused; the exchange's clock is {off_s:+.1f} s off"


async def _asked(bench: Bench, time_ms: Any) -> int:
    told = await bench.boundary.direct(time_ms, bench.settings.keys)
    expect(isinstance(told, int), f"time_ms() answered {told!r:.80}; expected UTC in ms")
    return int(told)


async def _not_guessed(bench: Bench, find: Any, client_order_id: str) -> None:
    """None is proof that there is no such order; who cannot know has to raise."""
    access_key, secret_key = bench.settings.keys
    for fault in (*READ_FAULTS[1:], LIMITED, None):
        keys = bench.settings.keys if fault else (access_key, f"{secret_key[::-1]}x")
        name = fault.name if fault else "a wrong secret"
        with bench.proxy.failing(fault) if fault else contextlib.nullcontext():
            try:
                found = await bench.boundary.direct(find, keys, client_order_id, bench.settings.symbol)
            except Stuck as e:
                wrong(str(e))
            except Exception:  # noqa: BLE001, S112 - any error will do
                continue
        wrong(f"on {name} find_order() answered {found!r:.120}: only the exchange's word that there is no such order is None; else raise")


@check(
    "keys-per-call",
    expects="every call is signed with the keys that came with it, never with those of a call before",
    where="accounts",
    section="several accounts through one program",
)
async def keys_per_call(bench: Bench) -> str:
    own = bench.settings.keys
    await bench.call("accounts", m.Empty())
    other = (f"other{secrets.token_hex(6)}", secrets.token_hex(16))
    answered = await bench.failing(NOT_PASSED_ON, "accounts", m.Empty(), keys=other)
    expect(answered.sent, f"accounts sent nothing: {answered}")
    for seen in answered.sent:
        mixed = next(filter(None, map(seen.shows, own)), "")
        expect(not mixed, f"a call with other keys shows the first account's: {mixed}")
    if not any(seen.shows(other[0]) for seen in answered.sent):
        raise NotApplicable("the access key cannot be read in requests")
    return "each its own"


@check(
    "raw-calls-confined",
    expects="a raw call reaches the venue's own address only, whatever resource a strategy names",
    where="api",
    section="__api_: never fetch a URL taken from a method blindly",
)
async def confined(bench: Bench) -> str:
    bench.offers("__api")
    visitors: list[str] = []

    def visit(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visitors.append("somebody")
        writer.transport.abort()

    decoy = await asyncio.start_server(visit, "127.0.0.1", 0)
    try:
        host = f"127.0.0.1:{decoy.sockets[0].getsockname()[1]}"
        for resource in (f"http://{host}/steal", f"//{host}/steal", f"@{host}/steal", f"/../@{host}/steal"):
            await bench.failing(NOT_PASSED_ON, "__api", m.Api(resource, "GET"))
            expect(not visitors, f"the resource {resource.replace(host, 'elsewhere')} was fetched from elsewhere, with a signature")
    finally:
        decoy.close()
    return "four ways out, none taken"


@check(
    "keys-kept",
    expects="no error text, no log line, nothing printed and no request line holds a secret, and none of them but the last an access key",
    where="_send",
    section="redact keys",
)
async def keys_kept(bench: Bench) -> str:
    access_key, secret_key = bench.settings.keys
    if len(secret_key) < SHORTEST_KEY:
        raise NotApplicable("the keys are too short to be looked for")
    for during, answered in bench.answers:
        what = _named(answered.text, access_key, secret_key)
        where = f"{answered.method}{f' on {during}' if during else ''}"
        expect(not what, f"{where}: the error text holds the {what}")
        expect(BLANK not in answered.text, f"{where}: the worker had to blank a key in the error text")
    for line in bench.boundary.ear.lines:
        what = _named(line, access_key, secret_key)
        expect(not what, f"a log line holds the {what}")
    what = _named("".join(bench.boundary.ear.printed), access_key, secret_key)
    expect(not what, f"what the venue prints holds the {what}")
    for seen in bench.proxy.seen:
        place = seen.shows(secret_key)
        expect(place != "the path or query", f"{seen.verb} {seen.target.partition('?')[0]}: the secret is in the request line")
    return f"{len(bench.answers)} answers, {len(bench.proxy.seen)} requests"


def _named(text: str, access_key: str, secret_key: str) -> str:
    """Which of the two a text holds, in any of the forms that a request has."""
    probe = Seen("", text, [], b"", 0)
    if probe.shows(secret_key):
        return "secret key"
    return "access key" if probe.shows(access_key) else ""
