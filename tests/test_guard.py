"""workers/guard.py against a real nats-server and the paper exchange: who is stopped, by which rule, and what is refused as unknown."""

import asyncio
import re
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from msgspec import Struct

from bus import config, server
from bus.config import Config, Limits
from bus.connection import Bus, connected
from bus.errors import SILENCED, BadRequest, BusDown, BusError, Expired, GuardRefused
from bus.halt import Halt, Halts, Record
from bus.messages import OrderRef, Trade
from bus.metrics import Metrics
from bus.seal import Credentials
from tests import paper, servers
from tests.rig import Rig
from workers import http
from workers.guard import UNREAD_S, Guard, guarding
from workers.http import Call, Http
from workers.venues.bitgo import Bitgo
from workers.venues.paper.client import Paper

pytestmark = pytest.mark.slow

ACCOUNT = "0123456789abcdef"
OTHER = "fedcba9876543210"
BUY = Trade("BTC_USDT", "buy", Decimal(20000), Decimal("0.01"))
"""It rests: the market stays within a factor of two of its usual 60,000."""
SPEND = Trade("BTC_USDT", "buy", Decimal(-1), Decimal(600))


def calling(bus: Bus, session: Http, path: str = "paper/r1", account: str = ACCOUNT, left_ms: int = 8000) -> Call:
    """A write as it reaches a worker."""
    return Call(
        session,
        exchange="paper",
        path=path,
        credentials=Credentials(account, "secret-1"),
        account=account,
        client_order_id=secrets.token_hex(16),
        expires_at_ms=bus.now_ms() + left_ms,
        now_ms=bus.now_ms,
        write=True,
    )


class World(Struct):
    """A bus as a worker sees it, and the paper exchange as a venue. operator: who halts. nats: its process."""

    state: Path
    bus: Bus
    operator: Bus
    nats: servers.Running
    http: Http
    metrics: Metrics
    venue: Any
    rig: Rig

    def call(self, path: str = "paper/r1", account: str = ACCOUNT, left_ms: int = 8000) -> Call:
        return calling(self.bus, self.http, path, account, left_ms)

    async def halt(self, account: str = "", path: str = "") -> None:
        halt = Halt("me@here", self.operator.now_ms(), "a test")
        await Halts(self.operator).change(lambda record: record.halted(halt, account, path))

    async def resume(self) -> None:
        await Halts(self.operator).change(lambda _: Record())

    def asked(self) -> float:
        """How often the exchange was asked anything that it answered."""
        return self.metrics.registry.get_sample_value("fmzbus_venue_seconds_count", {"exchange": "paper", "outcome": "200"}) or 0


@asynccontextmanager
async def world(state: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        nats = await enter(servers.nats(state))
        bus = await enter(connected(server.url(state, "worker"), "worker", closed=lambda: None))
        operator = await enter(connected(server.url(state, "operator"), "operator", closed=lambda: None))
        metrics = Metrics()
        session = await enter(http.opened({}, 5.0, metrics))
        client = await enter(paper.exchange(state / "paper", time.time))
        venue = Paper("paper", config.Venue(base_url=client.base))
        rig = Rig(client, paper.Clock(), state / "paper")
        yield World(state, bus, operator, nats, session, metrics, venue, rig)


@pytest_asyncio.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("w") / "s") as made:
        yield made


@pytest_asyncio.fixture
async def here(shared: World) -> AsyncIterator[World]:
    """The shared world, with nothing halted and no fault armed."""
    yield shared
    await shared.resume()
    await shared.rig.control("DELETE", "/faults")


def limited(**limits: Any) -> Config:
    return Config(guard=config.Guard(**limits))


def refusal(check: Callable[[], None]) -> str:
    """What the check says, "" where it lets pass."""
    try:
        check()
    except (GuardRefused, BusDown) as e:
        return e.text
    return ""


async def admitted(guard: Guard, here: World, call: Call, trade: Trade) -> str:
    """What the guard says of an order, "" where it lets pass; a refusal is never one that strategies silence."""
    text = ""
    try:
        await guard.admit(here.venue, call, trade)
    except (GuardRefused, BadRequest) as e:
        text = e.text
    assert not SILENCED.search(text)
    assert not call.sent
    return text


# ---------------------------------------------------------------- the kill switch


async def test_a_halt_is_honoured_within_a_second_and_so_is_its_end(here: World) -> None:
    async with guarding(here.bus, Config()) as guard:
        call = here.call()
        assert await admitted(guard, here, call, BUY) == ""
        await here.halt()
        await servers.eventually(lambda: refusal(lambda: guard.check(call)), within_s=1)
        text = await admitted(guard, here, call, BUY)
        assert text.startswith("guard: everything is halted since 20")
        assert text.endswith(" UTC by me@here: a test; order not sent")
        await here.resume()
        await servers.eventually(lambda: not refusal(lambda: guard.check(call)), within_s=1)
        assert await admitted(guard, here, call, BUY) == ""


async def test_a_halt_of_one_account_or_path_stops_no_other(here: World) -> None:
    await here.halt(account=ACCOUNT)
    await here.halt(path="paper/r2")
    async with guarding(here.bus, Config()) as guard:
        assert f"account {ACCOUNT} is halted" in refusal(lambda: guard.check(here.call("paper/r1")))
        assert "path paper/r2 is halted" in refusal(lambda: guard.check(here.call("paper/R2", OTHER)))
        guard.check(here.call("paper/r1", OTHER))


async def test_a_raw_write_is_halted_as_orders_are_and_a_cancel_goes_on(here: World) -> None:
    async with guarding(here.bus, Config()) as guard:
        call = here.call()
        await guard.admit_raw(call)
        placed = await here.venue.trade(here.call(), await guard.admit(here.venue, here.call(), BUY))
        await here.halt()
        await servers.eventually(lambda: refusal(lambda: guard.check(call)), within_s=1)
        with pytest.raises(GuardRefused, match="a raw write cannot be told from an order; not sent; `cancel` goes on"):
            await guard.admit_raw(call)
        cancelled = await here.venue.cancel(here.call(), OrderRef(placed.data.id, "BTC_USDT"))
        assert cancelled.data is True


async def test_a_halt_is_kept_over_a_restart_and_unread_means_refused(state: Path) -> None:
    async with world(state) as here, guarding(here.bus, Config()) as guard:
        call = here.call(left_ms=60_000)
        guard.check(call)
        here.nats.send(signal.SIGSTOP)
        stopped = time.monotonic()
        await servers.eventually(lambda: refusal(lambda: guard.check(call)), within_s=UNREAD_S + 0.5)
        assert time.monotonic() - stopped > UNREAD_S - 0.6  # it was true when it was read last
        assert refusal(lambda: guard.check(call)) == "network: the halt record cannot be read; order not sent"
        with pytest.raises(BusDown, match="cannot be read; a raw write"):
            await guard.admit_raw(call)
        here.nats.send(signal.SIGCONT)
        await servers.eventually(lambda: not refusal(lambda: guard.check(call)), within_s=10)
        await servers.eventually(lambda: here.operator.nc.is_connected)
        await here.halt(path="paper/r1")
        await servers.eventually(lambda: "is halted" in refusal(lambda: guard.check(call)), within_s=1)
        await here.nats.stop(9)
        await servers.eventually(lambda: "cannot be read" in refusal(lambda: guard.check(call)), within_s=3)
        async with servers.nats(state):
            await servers.eventually(lambda: "is halted" in refusal(lambda: guard.check(call)), within_s=10)
            async with guarding(here.bus, Config()) as another:
                assert "path paper/r1 is halted" in refusal(lambda: another.check(call))


def without_jetstream(state: Path) -> list[str]:
    """The command of an embedded server that keeps nothing, until the next one writes its configuration again."""
    command = server.command(state)
    written = Path(command[-1])
    settings = msgspec.json.decode(written.read_bytes().partition(b"\n")[2])
    del settings["jetstream"]
    written.write_bytes(msgspec.json.encode(settings))
    return command


async def test_a_worker_that_starts_without_jetstream_refuses_until_it_answers(state: Path) -> None:
    """The same server, first without JetStream, then with it."""
    command = without_jetstream(state)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        async with servers.running(*command):
            await server.wait_ready(state)
            bus = await enter(connected(server.url(state, "worker"), "worker", closed=lambda: None))
            guard = await enter(guarding(bus, Config()))
            call = calling(bus, await enter(http.opened({}, 5.0, Metrics())))
            assert "cannot be read" in refusal(lambda: guard.check(call))
        async with servers.nats(state):
            await servers.eventually(lambda: not refusal(lambda: guard.check(call)), within_s=10)


async def test_a_record_that_is_lost_ends_no_halt_and_resume_does(here: World) -> None:
    await here.halt()
    guard, call = Guard(here.bus, Config()), here.call()
    assert await guard.read()
    await here.operator.nc.jetstream().delete_stream("KV_halt")
    assert [await guard.read() for _ in range(2)] == [False, True]
    assert "everything is halted" in refusal(lambda: guard.check(call))
    await here.resume()
    assert await guard.read()
    guard.check(call)


# ---------------------------------------------------------------- limits

SCOPES: list[tuple[str, Callable[[dict[str, Any]], Config]]] = [
    ("all", lambda limits: limited(**limits)),
    (f"account {ACCOUNT}", lambda limits: limited(accounts={ACCOUNT: Limits(**limits)})),
    ("path paper/r1", lambda limits: limited(paths={"/Paper/R1": Limits(**limits)})),
    ("path paper", lambda limits: limited(paths={"paper": Limits(**limits)})),
]


@pytest.mark.parametrize(("name", "settings"), SCOPES)
async def test_each_limit_holds_in_each_scope_and_names_itself(
    here: World, name: str, settings: Callable[[dict[str, Any]], Config]
) -> None:
    async with guarding(here.bus, settings({"symbols": ["eth_usdt", "BTC_USDT.swap"]})) as guard:
        assert (await admitted(guard, here, here.call(), BUY)) == (
            f"guard: symbols of {name}: BTC_USDT is not among eth_usdt, BTC_USDT.swap; order not sent"
        )
        swap = Trade("btc_usdt.SWAP", "buy", Decimal(50000), Decimal("0.01"), "open")
        assert await admitted(guard, here, here.call(), swap) == ""
    async with guarding(here.bus, settings({"max_order_value": Decimal(100_000)})) as guard:
        over = Trade("BTC_USDT", "sell", Decimal(1_200_000), Decimal("0.1"))
        assert await admitted(guard, here, here.call(), BUY) == ""
        assert await admitted(guard, here, here.call(), over) == (
            f"guard: max_order_value of {name}: 120,000 is above 100,000; order not sent"
        )
    async with guarding(here.bus, settings({"max_open_orders": 1})) as guard:
        assert await admitted(guard, here, here.call(), BUY) == ""
        text = await admitted(guard, here, here.call(), SPEND)
        assert text == f"guard: max_open_orders of {name}: 1 are open, 1 is the most; order not sent"
    async with guarding(here.bus, settings({"max_orders_per_s": 1})) as guard:
        texts = [await admitted(guard, here, here.call(), BUY) for _ in range(3)]
        assert any(
            re.fullmatch(rf"guard: max_orders_per_s of {name}: \d+ in this second is above 1; order not sent", text) for text in texts
        )


@pytest.mark.parametrize(("name", "settings"), SCOPES[1:])
async def test_a_limit_is_nobody_elses(here: World, name: str, settings: Callable[[dict[str, Any]], Config]) -> None:
    limits = {"symbols": ["ETH_USDT"], "max_order_value": Decimal(1), "max_open_orders": 1, "max_orders_per_s": 1}
    async with guarding(here.bus, settings(limits)) as guard:
        call = here.call("paper2/r1", OTHER)
        call.exchange = "paper2"
        for _ in range(3):
            assert await admitted(guard, here, call, BUY) == "", name
            await guard.admit_raw(call)


async def test_the_strictest_of_all_limits_wins(here: World) -> None:
    settings = limited(
        max_order_value=Decimal(1000),
        accounts={ACCOUNT: Limits(max_order_value=Decimal(700))},
        paths={"paper": Limits(max_order_value=Decimal(800))},
    )
    async with guarding(here.bus, settings) as guard:
        spend = Trade("BTC_USDT", "buy", Decimal(-1), Decimal(750))
        assert f"of account {ACCOUNT}: 750 is above 700" in await admitted(guard, here, here.call(), spend)
        assert await admitted(guard, here, here.call(account=OTHER), spend) == ""
        more = Trade("BTC_USDT", "buy", Decimal(-1), Decimal(850))
        assert "of path paper: 850 is above 800" in await admitted(guard, here, here.call(account=OTHER), more)


async def test_an_orders_value_is_at_the_higher_of_last_and_limit_price(here: World) -> None:
    """A limit far below the market does not make an order small."""
    async with guarding(here.bus, limited(max_order_value=Decimal(20_000))) as guard:
        low_price = Trade("BTC_USDT", "buy", Decimal(100), Decimal(1))
        assert "is above 20,000" in await admitted(guard, here, here.call(), low_price)
        assert "is above 20,000" in await admitted(guard, here, here.call(), Trade("BTC_USDT", "sell", Decimal(-1), Decimal(1)))
        assert await admitted(guard, here, here.call(), Trade("BTC_USDT", "sell", Decimal(-1), Decimal("0.1"))) == ""
        contract = Trade("BTC_USDT.swap", "buy", Decimal(-1), Decimal(1), "open")
        assert "is above 20,000" in await admitted(guard, here, here.call(), contract)


async def test_a_price_is_asked_for_once_a_second_and_leaves_the_order_unsent(here: World) -> None:
    async with guarding(here.bus, limited(max_order_value=Decimal(100_000))) as guard:
        await admitted(guard, here, here.call(), BUY)
        before, calls = here.asked(), [here.call() for _ in range(20)]
        started = time.monotonic()
        assert [await admitted(guard, here, call, BUY) for call in calls] == [""] * 20
        assert here.asked() - before <= 1 + (time.monotonic() - started)
        assert not any(call.sent or call.sent_ms for call in calls)


@pytest.mark.parametrize("kind", ["http-503", "html-200", "drop"])
async def test_without_a_price_nothing_of_limited_value_is_sent(here: World, kind: str) -> None:
    async with guarding(here.bus, limited(max_order_value=Decimal(100_000))) as guard:
        await here.rig.arm(kind, path="GET /api/v1/ticker")
        text = await admitted(guard, here, here.call(), BUY)
        assert text.startswith("guard: max_order_value of all: the last price of BTC_USDT is not known (paper ")
        assert text.endswith("; order not sent")
        assert await admitted(guard, here, here.call(), SPEND) == ""  # it is money already
        await here.rig.control("DELETE", "/faults")
        assert await admitted(guard, here, here.call(), BUY) == ""


async def test_a_contract_of_unknown_size_is_refused_where_its_value_counts(here: World) -> None:
    async with guarding(here.bus, limited(max_order_value=Decimal(100_000))) as guard:
        await here.rig.arm("http-503", path="GET /api/v1/markets")
        contract = Trade("BTC_USDT.swap", "buy", Decimal(50000), Decimal("0.01"), "open")
        assert await admitted(guard, here, here.call(), contract) == (
            "guard: max_order_value of all: the contract size of BTC_USDT.swap is not known; order not sent"
        )


async def test_too_little_time_for_a_look_up_is_told_as_such(here: World) -> None:
    async with guarding(here.bus, limited(max_order_value=Decimal(100_000))) as guard:
        call = here.call()
        call.expires_at_ms = call.now_ms() + 200
        with pytest.raises(Expired, match="nothing was sent"):
            await guard.admit(here.venue, call, BUY)


async def test_two_workers_share_one_rate(here: World) -> None:
    settings = limited(max_orders_per_s=20)
    async with (
        connected(server.url(here.state, "worker"), "worker", closed=lambda: None) as second,
        guarding(here.bus, settings) as one,
        guarding(second, settings) as other,
    ):
        await asyncio.gather(*(admitted(guard, here, here.call(), BUY) for guard in (one, other)))  # the rules are known from here on
        begun = here.bus.now_ms() // 1000
        texts = await asyncio.gather(*(admitted(guard, here, here.call(), BUY) for guard in (one, other) * 60))
        seconds = here.bus.now_ms() // 1000 - begun + 1
        assert 0 < texts.count("") <= 20 * seconds
        assert {text.partition(" in this")[2] for text in texts if text} == {" second is above 20; order not sent"}


async def test_raw_writes_count_and_what_cannot_be_seen_in_them_refuses_them(here: World) -> None:
    async with guarding(here.bus, limited(paths={"paper/raw": Limits(max_orders_per_s=1)})) as guard:
        results = await asyncio.gather(*(guard.admit_raw(here.call("paper/raw")) for _ in range(3)), return_exceptions=True)
        assert "guard: max_orders_per_s of path paper/raw: 2 in this second is above 1; order not sent" in [
            str(result) for result in results
        ]
    for limits in ({"symbols": ["BTC_USDT"]}, {"max_order_value": Decimal(1)}, {"max_open_orders": 1}):
        async with guarding(here.bus, limited(paths={"paper/r1": Limits(**limits)})) as guard:
            with pytest.raises(GuardRefused, match=f"^guard: {next(iter(limits))} of path paper/r1: a raw write cannot be told"):
                await guard.admit_raw(here.call())
            await guard.admit_raw(here.call("paper/r2"))


async def test_the_count_survives_its_stream_and_refuses_without_jetstream(state: Path) -> None:
    async with world(state) as here:
        guard = Guard(here.bus, limited(max_orders_per_s=1000))
        await guard.read()
        await guard.admit(here.venue, here.call(), BUY)
        await here.operator.nc.jetstream().delete_stream("RATE")
        await guard.read()
        await guard.admit(here.venue, here.call(), BUY)
        await here.nats.stop(9)
        await servers.eventually(lambda: not here.bus.nc.is_connected)
        with pytest.raises((GuardRefused, BusDown), match=r"orders cannot be counted|the halt record cannot be read"):
            await guard.admit(here.venue, here.call(), BUY)
        async with servers.nats(state):
            await servers.eventually(lambda: here.bus.nc.is_connected)
            assert await guard.read()
            await guard.admit(here.venue, here.call(), BUY)


async def test_open_orders_are_counted_at_the_exchange_with_those_on_their_way(here: World) -> None:
    account = "00000000000000aa"
    async with guarding(here.bus, limited(max_open_orders=3)) as guard:
        ids = []
        for _ in range(3):
            call = here.call(account=account)
            ids.append((await here.venue.trade(call, await guard.admit(here.venue, call, BUY))).data.id)
        before = here.asked()
        assert "3 are open, 3 is the most" in await admitted(guard, here, here.call(account=account), SPEND)
        assert here.asked() == before  # counted two seconds ago at most
    async with guarding(here.bus, limited(max_open_orders=3)) as guard:  # another worker
        assert "3 are open, 3 is the most" in await admitted(guard, here, here.call(account=account), BUY)
        assert await admitted(guard, here, here.call(account=OTHER), BUY) == ""
    await here.venue.cancel(here.call(account=account), OrderRef(ids[0], "BTC_USDT"))
    async with guarding(here.bus, limited(max_open_orders=3)) as guard:
        texts = await asyncio.gather(*(admitted(guard, here, here.call(account=account), BUY) for _ in range(5)))
        assert texts.count("") == 1


async def test_an_order_on_its_way_is_counted_until_a_look_that_must_have_seen_it(here: World) -> None:
    clock, account = paper.Clock(0.0), "00000000000000bb"
    guard = Guard(here.bus, limited(max_open_orders=2), monotonic=clock)
    await guard.read()

    async def text(call: Call) -> str:
        await guard.read()
        return await admitted(guard, here, call, BUY)

    waiting = here.call(account=account)
    assert await text(waiting) == ""
    clock.now_s += 2.5  # counted again: the exchange has none, this one is still on its way
    dropped, placed = here.call(account=account), here.call(account=account)
    assert await text(dropped) == ""
    assert "2 are open" in await text(here.call(account=account))
    guard.withdraw(dropped)
    assert await text(placed) == ""
    await here.venue.trade(placed, BUY)
    guard.withdraw(placed)  # too late: it was sent
    assert "2 are open" in await text(here.call(account=account))
    clock.now_s += 2.5  # counted again: the one that was placed is among those at the exchange, and not counted twice
    assert "2 are open" in await text(here.call(account=account))
    guard.withdraw(waiting)
    assert await text(here.call(account=account)) == ""


async def test_what_cannot_be_counted_at_the_exchange_is_refused(here: World) -> None:
    async with guarding(here.bus, limited(max_open_orders=5)) as guard:
        await here.rig.arm("http-503", path="GET /api/v1/orders")
        text = await admitted(guard, here, here.call(account="00000000000000cc"), BUY)
        assert text.startswith("guard: max_open_orders of all: open orders cannot be counted (paper answered 5")


# ---------------------------------------------------------------- rules


async def test_an_order_is_fitted_to_the_exchanges_own_steps(here: World) -> None:
    off = Trade("BTC_USDT", "sell", Decimal("200000.123"), Decimal("0.0123456789"))
    async with guarding(here.bus, Config()) as guard:
        with pytest.raises(BadRequest, match=r"^price: 200000\.123 does not fit the tick 0\.01: 200000\.12 or 200000\.13$"):
            await guard.admit(here.venue, here.call(), off)
        asked = here.asked()
        assert asked >= 1
    async with guarding(here.bus, Config(orders=config.Orders(rounding="down"))) as guard:
        fitted = await guard.admit(here.venue, here.call(), off)
        assert (str(fitted.price), str(fitted.amount)) == ("200000.13", "0.012345")
        placed = await here.venue.trade(here.call(), fitted)
        assert placed.raw["amount"] == "0.012345"
        with pytest.raises(BadRequest, match="below the smallest"):
            await guard.admit(here.venue, here.call(), Trade("BTC_USDT", "buy", Decimal(50000), Decimal("0.000000001")))


async def test_rules_cost_one_trip_in_ten_minutes_and_none_is_no_obstacle(here: World) -> None:
    clock = paper.Clock(0.0)
    guard = Guard(here.bus, Config(), monotonic=clock)
    await guard.read()
    before = here.asked()
    await asyncio.gather(*(guard.admit(here.venue, here.call(), BUY) for _ in range(20)))
    clock.now_s = 599
    await guard.read()
    await guard.admit(here.venue, here.call(), BUY)
    assert here.asked() - before == 1
    clock.now_s = 601
    await guard.read()
    await here.rig.arm("http-503", path="GET /api/v1/markets")
    odd = Trade("BTC_USDT", "buy", Decimal("20000.001"), Decimal("0.01"))
    with pytest.raises(BadRequest):  # what was read before still counts
        await guard.admit(here.venue, here.call(), odd)
    new = Guard(here.bus, Config())
    await new.read()
    assert await new.admit(here.venue, here.call(), odd) is odd  # nothing is known: the exchange judges it


async def test_a_market_the_exchange_does_not_list_is_left_to_it(here: World) -> None:
    async with guarding(here.bus, Config()) as guard:
        trade = Trade("NO_SUCH", "buy", Decimal("1.23456"), Decimal(1))
        assert await guard.admit(here.venue, here.call(), trade) is trade


async def test_a_venue_without_rules_and_limits_costs_no_trip(here: World) -> None:
    async with guarding(here.bus, Config()) as guard:
        venue: Any = Bitgo("bitgo", config.Venue(base_url="http://127.0.0.1:1"))
        assert await guard.admit(venue, here.call(), BUY) is BUY
        await guard.admit(here.venue, here.call(), BUY)
        before, call = here.asked(), here.call()
        started = time.perf_counter()
        for _ in range(2000):
            await guard.admit(here.venue, call, BUY)
            guard.check(call)
        assert here.asked() == before
        assert (time.perf_counter() - started) / 2000 < 0.001


def test_a_guard_refusal_is_a_bus_error_of_its_own() -> None:
    assert issubclass(GuardRefused, BusError)
    assert GuardRefused("x").code == "guard_refused"
