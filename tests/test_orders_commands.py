"""`fmzbus orders`, `order`, `settle` and `cancel-all` as a person types them, against a running system whose exchange misbehaves."""

import asyncio
import getpass
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from bus import config, history, server, subjects
from bus.connection import Bus, connected
from bus.errors import BusDown
from bus.journal import Entry, Intent, Journal, Outcome
from tests import servers
from tests.host import Host, hosting
from tests.servers import System
from tests.test_command import fmzbus as typed

pytestmark = pytest.mark.slow

SETTLE_AFTER_S = 0.3
DOUBT_MS = 250
"""How far two processes' bus times may be apart (bus/connection.py)."""
ORDERS = "POST /api/v1/orders"
BY_CLIENT_ID = "GET /api/v1/orders/by-client-id/*"


@pytest_asyncio.fixture(scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """Short deadlines, so that what is unknown is soon past them."""
    state = tmp_path_factory.mktemp("s")
    async with servers.system(state, "--workers", "1", bridge__deadline_s=2, orders__settle_after_s=SETTLE_AFTER_S) as system:
        yield system


@pytest_asyncio.fixture
async def host(system: System, request: pytest.FixtureRequest) -> AsyncIterator[Host]:
    """A host with an account of its own."""
    async with hosting(system.address) as host:
        yield host.other(request.node.name, "a-secret")


async def fmzbus(system: System, *arguments: str, **env: str) -> tuple[int, str, str]:
    return await typed(system, *arguments, FMZBUS__ORDERS__SETTLE_AFTER_S=str(SETTLE_AFTER_S), **env)


async def as_json(system: System, *arguments: str) -> Any:
    status, out, err = await fmzbus(system, *arguments, "--json")
    assert status == 0, err
    return msgspec.json.decode(out)


async def fault(system: System, *arguments: str) -> None:
    status, _, err = await fmzbus(system, "paper", "fault", *arguments)
    assert status == 0, err


async def buy(host: Host, amount: str, price: str = "1000") -> dict[str, Any]:
    return await host("/paper", "trade", symbol="BTC_USDT", type="buy", price=price, amount=amount)


async def listed(system: System, amount: str, *options: str) -> dict[str, Any]:
    """The one order of that amount, which a test uses once."""
    document = await as_json(system, "orders", "-n", "100000", *options)
    (found,) = [order for order in document["orders"] if order["amount"] == amount]
    assert isinstance(found, dict)
    return found


async def unknown(system: System, host: Host, amount: str, kind: str, *options: str) -> str:
    """Place an order of which nobody learns anything while the look-ups fail; -> its key."""
    await fault(system, "http-503", "--path", BY_CLIENT_ID)
    await fault(system, kind, "--path", ORDERS, "--count", "1", *options)
    error = (await buy(host, amount))["error"]
    assert error.startswith("outcome unknown: ")
    return str(error.rpartition("client order id ")[2])


async def expired(system: System, key: str) -> None:
    """Wait until a look at the exchange would prove something."""
    order = await as_json(system, "order", key)
    await asyncio.sleep((order["expires_at_ms"] - order["at_ms"]) / 1000 + SETTLE_AFTER_S)


# ---------------------------------------------------------------- orders, order


async def test_a_placed_order_is_listed_and_its_life_is_told_hop_by_hop(system: System, host: Host) -> None:
    before_ms = int(time.time() * 1000)
    order_id = (await buy(host, "0.0101"))["data"]["id"]
    order = await listed(system, "0.0101")
    assert (order["state"], order["outcome"]["order_id"], order["exchange"]) == ("placed", order_id, "paper")
    assert order["asked_for"] == "buy 0.0101 BTC_USDT at 1000"
    life = await as_json(system, "order", order["key"])
    assert [hop["what"] for hop in life["hops"]] == ["asked", "received", "journaled", "sent", "answered", "outcome"]
    at = {hop["what"]: hop["at_ms"] for hop in life["hops"]}
    assert before_ms - DOUBT_MS <= at["asked"] <= at["received"] + DOUBT_MS
    assert at["received"] <= at["sent"] <= at["answered"]  # by one clock
    assert at["journaled"] <= at["outcome"]  # by another
    assert at["received"] - DOUBT_MS <= at["journaled"] <= at["sent"] + DOUBT_MS
    (row,) = msgspec.json.decode((await fmzbus(system, "paper", "ledger", order["key"], "--json"))[1])
    assert at["sent"] - DOUBT_MS <= row["received_ms"] <= at["answered"] + DOUBT_MS
    assert [hop["since_ms"] for hop in life["hops"]][1:] == [
        late["at_ms"] - early["at_ms"] for early, late in zip(life["hops"], life["hops"][1:], strict=False)
    ]
    assert not life["is_fenced"]

    _, table, _ = await fmzbus(system, "orders", "--symbol", "btc_usdt", "--account", order["account"][:8], "--exchange", "paper")
    (line,) = [line for line in table.splitlines() if order["key"] in line]
    assert f"buy 0.0101 BTC_USDT at 1000 placed {order_id} {order['key']}" in " ".join(line.split())
    _, told, _ = await fmzbus(system, "order", order["key"][:8].upper())
    assert f"outcome    placed, order id {order_id}, by worker-" in told
    assert told.splitlines()[-1] == "now: settled (placed); nothing waits for it"


async def test_a_refused_order_says_what_its_host_was_told(system: System, host: Host) -> None:
    error = (await buy(host, "900000.01"))["error"]
    order = await listed(system, "900000.01")
    assert (order["state"], order["told"]) == ("refused", error)
    _, told, _ = await fmzbus(system, "order", order["key"])
    assert error in told


async def test_orders_are_told_apart_by_exchange_account_symbol_and_time(system: System, host: Host) -> None:
    await buy(host, "0.0102")
    order = await listed(system, "0.0102")
    for narrow, count in (
        (("--account", order["account"]), 1),
        (("--account", order["account"], "--symbol", "ETH_USDT"), 0),
        (("--account", order["account"], "--exchange", "okx"), 0),
        (("--account", order["account"], "--since", "1ms"), 0),
        (("--account", order["account"], "--since", "1d"), 1),
    ):
        assert len((await as_json(system, "orders", *narrow))["orders"]) == count
    await buy(host, "0.0103")
    document = await as_json(system, "orders", "--account", order["account"], "--limit", "1")
    assert ([order["amount"] for order in document["orders"]], document["left_out"]) == (["0.0103"], 1)
    _, out, err = await fmzbus(system, "orders", "--account", order["account"], "--limit", "1")
    assert "0.0103" in out
    assert "1 older ones left out" in err
    assert (await fmzbus(system, "orders", "--since", "1x"))[0] == 1


async def test_an_order_shows_its_cancels(system: System, host: Host) -> None:
    order_id = (await buy(host, "0.0104"))["data"]["id"]
    assert (await host("/paper", "cancel", symbol="BTC_USDT", id=order_id))["data"] is True
    order = await listed(system, "0.0104")
    life = await as_json(system, "order", order["key"])
    assert [hop["what"] for hop in life["hops"]][-2:] == ["cancel asked", "cancel"]
    (cancel,) = life["cancels"]
    assert (cancel["state"], cancel["order_id"], cancel["account"]) == ("done", order_id, order["account"])
    assert (await as_json(system, "order", cancel["key"]))["asked_for"] == f"cancel {order_id} BTC_USDT"
    account = ("--account", order["account"])
    assert [one["method"] for one in (await as_json(system, "orders", *account))["orders"]] == ["trade"]
    assert [one["method"] for one in (await as_json(system, "orders", "--cancels", *account))["orders"]] == ["trade", "cancel"]
    status, _, err = await fmzbus(system, "settle", cancel["key"], "--as", "done", "--reason", "seen", "--yes")
    assert (status, "is a cancel" in err) == (1, True)


@pytest.mark.parametrize("command", ["orders", "order", "settle", "cancel-all"])
async def test_help_teaches_with_examples(system: System, command: str) -> None:
    status, out, _ = await fmzbus(system, command, "--help")
    assert status == 0
    assert out.count(f"  fmzbus {command} ") >= 2


@pytest.mark.parametrize(
    ("wrong", "why"), [("12345", "is no key"), ("order-1", "is no key"), ("0" * 32, "has no order"), ("0" * 12, "has no order")]
)
async def test_a_key_that_names_nothing_says_so(system: System, wrong: str, why: str) -> None:
    for command in (("order", wrong), ("settle", wrong, "--as", "absent", "--reason", "r", "--yes")):
        status, out, err = await fmzbus(system, *command)
        assert (status, out) == (1, "")
        assert why in err


# ---------------------------------------------------------------- settle


async def test_a_person_settles_an_order_that_nobody_can_look_up_and_its_fence_opens(system: System, host: Host) -> None:
    key = await unknown(system, host, "0.0105", "http-503", "--executed")
    order = await listed(system, "0.0105", "--unsettled")
    assert (order["key"], order["state"], order["next"], order["needs_a_person"]) == (key, "unknown", "being looked up", False)
    settle = ("settle", key[:10], "--reason", " seen in\nits list ")
    early, _, why = await typed(system, *settle, "--as", "placed", "--yes", FMZBUS__ORDERS__SETTLE_AFTER_S="60")
    assert (early, "is in flight" in why) == (1, True)
    await expired(system, key)

    life = await as_json(system, "order", key)
    assert life["is_fenced"]
    assert f"client order id {key}" in life["told"]
    assert next(hop for hop in life["hops"] if hop["what"] == "unknown")["detail"] == life["told"]
    assert (await buy(host, "0.0105"))["error"].startswith("fenced: ")
    _, table, _ = await fmzbus(system, "orders", "--unsettled")
    assert "UNKNOWN" in table
    assert "being looked up" in table

    assert "expected placed or absent" in (await fmzbus(system, *settle, "--as", "done", "--yes"))[2]
    status, out, _ = await fmzbus(system, *settle, "--as", "placed")  # nobody answers the question
    assert (status, "settle it as placed?" in out) == (1, True)
    assert (await as_json(system, "order", key))["state"] == "unknown"
    (row,) = msgspec.json.decode((await fmzbus(system, "paper", "ledger", key, "--json"))[1])
    status, out, err = await fmzbus(system, *settle, "--as", "placed", "--order-id", str(row["order_id"]), "--yes")
    assert status == 0, err
    assert out.splitlines()[-1].endswith("the same command again opens the fence at once")

    life = await as_json(system, "order", key)
    outcome = life["outcome"]
    assert (life["state"], life["is_fenced"], outcome["by"], outcome["order_id"]) == ("placed", True, "person", str(row["order_id"]))
    assert (outcome["reason"], outcome["process"].partition("@")[0]) == ("seen in its list", getpass.getuser())
    assert f"fenced: an equal order was placed, order id {row['order_id']}, " in (await buy(host, "0.0105"))["error"]
    status, out, _ = await fmzbus(system, *settle, "--as", "placed", "--yes")
    assert (status, out.splitlines()[-1]) == (0, "its fence is open")
    assert not (await as_json(system, "order", key))["is_fenced"]
    assert "data" in await buy(host, "0.0105")
    assert not [order for order in (await as_json(system, "orders", "--unsettled"))["orders"] if order["key"] == key]
    status, _, err = await fmzbus(system, *settle, "--as", "absent", "--yes")
    assert (status, f"is settled: placed, order id {row['order_id']}, by the word of" in err) == (1, True)
    await fault(system, "--clear")


async def test_absent_by_the_word_of_a_person_is_told_to_a_repetition(system: System, host: Host) -> None:
    await fault(system, "http-503", "--path", BY_CLIENT_ID)
    await fault(system, "drop", "--path", ORDERS, "--count", "1")
    params = {"symbol": "BTC_USDT", "type": "buy", "price": "1000", "amount": "0.0106"}
    body = {"access_key": host.access_key, "secret_key": host.secret_key, "nonce": time.time_ns(), "method": "trade", "params": params}
    error = (await host.post("/paper", msgspec.json.encode(body)))["error"]
    key = error.rpartition("client order id ")[2]
    await expired(system, key)
    status, _, err = await fmzbus(system, "settle", key, "--as", "absent", "--reason", "not in its books", "--order-id", "7", "--yes")
    assert (status, "goes with --as placed" in err) == (1, True)
    status, _, err = await fmzbus(system, "settle", key, "--as", "absent", "--reason", "not in its books", "--yes")
    assert status == 0, err
    assert await host.post("/paper", msgspec.json.encode(body)) == {"error": "not placed: not in its books"}
    await fault(system, "--clear")


async def test_a_raw_write_needs_a_person_who_says_whether_it_was_done(system: System, host: Host) -> None:
    await fault(system, "http-503", "--path", ORDERS, "--count", "1", "--executed")
    raw = {"symbol": "BTC_USDT", "side": "buy", "type": "limit", "price": "1000", "amount": "0.0107"}
    error = (await host("/paper", "__api_/api/v1/orders", headers={"Http-Method": "POST"}, **raw))["error"]
    assert error.startswith("outcome unknown: ")
    found = await as_json(system, "orders", "--unsettled")
    (order,) = [order for order in found["orders"] if order["resource"] == "POST /api/v1/orders"]
    assert (order["state"], order["needs_a_person"]) == ("unknown", True)
    await expired(system, order["key"])
    settle = ("settle", order["key"], "--reason", "it is there", "--yes")
    assert "expected done or absent" in (await fmzbus(system, *settle, "--as", "placed"))[2]
    assert "needs a person" in (await fmzbus(system, "orders", "--unsettled"))[1]
    assert (await fmzbus(system, *settle, "--as", "done"))[0] == 0
    assert (await as_json(system, "order", order["key"]))["state"] == "done"


async def test_an_unknown_order_is_found_by_the_settlers_and_the_timeline_says_so(system: System, host: Host) -> None:
    key = await unknown(system, host, "0.0108", "execute-then-drop")
    await fault(system, "--clear")
    async with asyncio.timeout(20):
        while (life := await as_json(system, "order", key))["state"] == "unknown":
            pass
    assert (life["state"], life["outcome"]["by"]) == ("placed", "settler")
    assert [hop["what"] for hop in life["hops"]][-2:] == ["unknown", "outcome"]
    _, told, _ = await fmzbus(system, "order", key)
    assert "by a settler in worker-" in told


# ---------------------------------------------------------------- cancel-all


async def test_cancel_all_asks_cancels_and_looks_again(system: System, host: Host) -> None:
    keys = {"FMZBUS_ACCESS_KEY": host.access_key, "FMZBUS_SECRET_KEY": host.secret_key}

    async def cancel_all(*arguments: str) -> tuple[int, str, str]:
        return await fmzbus(system, "cancel-all", "paper/robot-1", *arguments, **keys)

    async def is_open() -> list[str]:
        return [order["id"] for order in (await host("/paper", "orders"))["data"]]

    assert await cancel_all() == (0, "nothing is open\n", "")
    bitcoin = [(await buy(host, f"0.02{number:02}"))["data"]["id"] for number in range(20)]
    ether = (await host("/paper", "trade", symbol="ETH_USDT", type="buy", price="100", amount="0.1"))["data"]["id"]

    status, out, _ = await cancel_all()  # nobody answers the question
    assert (status, "cancel 21 orders at paper/robot-1?" in out, len(await is_open())) == (1, True, 21)
    status, out, _ = await cancel_all("--symbol", "ETH_USDT", "--yes")
    assert (status, out.splitlines()[-3:]) == (0, [f"{ether}: cancelled", "cancelled 1 of 1", "nothing is open now"])
    assert sorted(await is_open()) == sorted(bitcoin)

    await fault(system, "http-503", "--path", f"DELETE /api/v1/orders/{bitcoin[0]}")
    status, out, err = await cancel_all("--yes")
    assert (status, "cancelled 19 of 20" in out) == (1, True)
    assert f"{bitcoin[0]}: NOT cancelled: outcome unknown" in out
    assert "still open: 1 order" in err
    assert await is_open() == [bitcoin[0]]
    await fault(system, "--clear")
    assert (await cancel_all("--yes"))[0] == 0
    assert await is_open() == []


async def test_cancel_all_passes_on_why_it_cannot_list_and_names_the_option(system: System) -> None:
    await fault(system, "http-503", "--path", "GET /api/v1/orders")
    status, _, err = await fmzbus(system, "cancel-all", "paper", "--yes")
    await fault(system, "--clear")
    assert status == 1
    assert "cannot list what is open: network: " in err
    assert "--symbol BTC_USDT" in err
    status, _, err = await fmzbus(system, "cancel-all", "paper", "--yes", "--url", "http://127.0.0.1:1")
    assert (status, "no answer from http://127.0.0.1:1" in err) == (1, True)


# ---------------------------------------------------------------- without a system


async def test_commands_without_a_bus_say_so_and_create_nothing(tmp_path: Path) -> None:
    nobody = System(tmp_path / "s", None, "")  # type: ignore[arg-type]
    for command in (("orders",), ("orders", "--unsettled"), ("order", "123456"), ("settle", "123456", "--as", "absent", "--reason", "r")):
        status, out, err = await typed(nobody, *command)
        assert (status, out) == (1, "")
        assert "no bus answers; is `fmzbus up` running" in err
    assert not (tmp_path / "s").exists()


@pytest_asyncio.fixture
async def bus(state: Path) -> AsyncIterator[Bus]:
    async with servers.nats(state), connected(server.url(state, "operator"), "operator", closed=lambda: None) as bus:
        yield bus


async def test_an_empty_journal_is_no_error_and_one_that_was_never_made_is(bus: Bus, state: Path) -> None:
    nobody = System(state, None, "")  # type: ignore[arg-type]
    for options in ((), ("--unsettled",), ("--json",)):
        status, out, err = await typed(nobody, "orders", *options)
        assert (status, out) == (1, "")
        assert "the journal cannot be read: stream not found" in err
    await Journal(bus, config.Orders()).open()
    assert await typed(nobody, "orders") == (0, "", "the journal has no order of the last 1h\n")
    assert await typed(nobody, "orders", "--unsettled", "--exchange", "okx") == (0, "", "nothing is unsettled that fits\n")
    _, out, _ = await typed(nobody, "orders", "--json")
    assert msgspec.json.decode(out)["orders"] == []
    status, _, err = await typed(nobody, "order", "123456")
    assert (status, "the journal has no order 123456" in err) == (1, True)


def intent(bus: Bus, key: str, **fields: Any) -> Intent:
    now_ms = bus.now_ms()
    plain: dict[str, Any] = {
        "exchange": "paper",
        "path": "paper",
        "account": "a" * 16,
        "method": "trade",
        "key": key,
        "asked_ms": now_ms,
        "worker": "w",
    }
    plain |= {"received_ms": now_ms, "expires_at_ms": now_ms + 60_000, "symbol": "BTC_USDT", "side": "buy", "price": "1", "amount": "1"}
    return Intent(**plain | fields)


async def put(bus: Bus, one: Intent, outcome: Outcome | None = None) -> None:
    where = subjects.settled(one.exchange, one.key, one.method)
    await bus.nc.jetstream().publish(where, msgspec.json.encode(Entry(intent=one, journaled_ms=one.received_ms, outcome=outcome)))


async def test_an_ambiguous_beginning_of_a_key_names_those_it_could_be(bus: Bus, state: Path) -> None:
    nobody = System(state, None, "")  # type: ignore[arg-type]
    await Journal(bus, config.Orders()).open()
    for last in range(7):
        await put(bus, intent(bus, f"abcdef{last:026}"))
    status, _, err = await typed(nobody, "order", "abcdef")
    assert status == 1
    assert f"7 orders begin with abcdef: abcdef{0:026}, abcdef{1:026}, " in err
    assert err.endswith(", ...; give more of it\n")
    assert (await typed(nobody, "order", f"abcdef{5:026}"))[0] == 0


async def test_a_journal_of_many_batches_is_read_whole_and_in_order(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "BATCH", 10)
    journal = Journal(bus, config.Orders())
    await journal.open()
    keys = [f"{number:032x}" for number in range(30)]
    for number, key in enumerate(keys):
        one = intent(bus, key, exchange="okx" if number % 3 else "paper")
        await put(bus, one, Outcome(state="placed", order_id=number))
    assert [record.sequence async for record in history.read(bus, "orders.>")] == list(range(1, 31))
    entries = await history.written(bus, journal, since_ms=1)
    assert [entry.intent.key for entry in entries] == keys
    assert [entry.order_id for entry in entries] == [str(number) for number in range(30)]
    assert [entry.intent.key for entry in await history.written(bus, journal, exchange="paper", since_ms=1)] == keys[::3]
    assert await history.keys(bus, "0" * 31) == keys[:16]
    assert [record async for record in history.read(bus, "orders.>", since_ms=bus.now_ms() + 60_000)] == []


async def test_what_has_no_outcome_is_in_flight_or_unknown(bus: Bus) -> None:
    journal = Journal(bus, config.Orders())
    await journal.open()
    over = {"expires_at_ms": bus.now_ms() - 1}
    await put(bus, intent(bus, "3" * 32, method="cancel", order_id="7", **over))
    await journal.begin(intent(bus, "1" * 32), b"sealed")
    await journal.begin(intent(bus, "2" * 32, amount="2", **over), b"sealed")
    marked = await journal.begin(intent(bus, "4" * 32, amount="3"), b"sealed")
    await journal.mark_unknown(marked, Outcome(state="unknown", by="settler"))
    entries = {entry.intent.key[0]: entry for entry in await history.written(bus, journal, since_ms=1)}
    states = {key: (entry.state(bus.now_ms()), entry.waiting, entry.needs_a_person) for key, entry in entries.items()}
    assert states == {
        "1": ("in flight", True, False),
        "2": ("unknown", True, False),
        "3": ("unknown", False, False),
        "4": ("unknown", True, True),
    }
    assert [entry.intent.key[0] for entry in await history.waiting(bus)] == ["1", "2", "4"]
    found = await history.find(bus, journal, "222222")
    assert (found.state(bus.now_ms()), found.needs_a_person) == ("unknown", False)
    assert found.intent_ms >= found.intent.received_ms


async def test_an_intent_that_was_written_again_keeps_its_place_in_time(bus: Bus) -> None:
    journal = Journal(bus, config.Orders())
    await journal.open()
    now_ms = bus.now_ms()
    await put(bus, intent(bus, "1" * 32, asked_ms=now_ms - 3_600_000))
    await put(bus, intent(bus, "2" * 32, asked_ms=now_ms))
    assert [entry.intent.key[0] for entry in await history.written(bus, journal, since_ms=now_ms - 60_000)] == ["2"]
    assert [entry.intent.key[0] for entry in await history.written(bus, journal, since_ms=now_ms - 7_200_000)] == ["1", "2"]


async def test_a_journal_whose_server_is_gone_is_an_error(state: Path) -> None:
    async with servers.nats(state) as nats, connected(server.url(state, "operator"), "operator", closed=lambda: None) as bus:
        journal = Journal(bus, config.Orders())
        await journal.open()
        await nats.stop()
        await servers.eventually(lambda: not bus.nc.is_connected)
        with pytest.raises(BusDown):
            await history.written(bus, journal, since_ms=1)
        with pytest.raises(BusDown):
            await history.find(bus, journal, "123456")
