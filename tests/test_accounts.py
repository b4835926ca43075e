"""Futures state per robot, and accounts that never see each other: all through the whole system and the paper exchange."""

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests import servers
from tests.host import Host, hosting

pytestmark = pytest.mark.slow

LEVERAGE, DIRECTION, CONTRACT, POSITIONS = 0, 1, 2, 3
TRUE = {"data": True}
NO_ORDER = "paper 2011 no order with this id"
_numbers = itertools.count(1)


@pytest_asyncio.fixture
async def robot(host: Host) -> Host:
    """A robot with keys that no other test uses."""
    return fresh(host)


def fresh(host: Host) -> Host:
    number = next(_numbers)
    return host.other(f"accounts-key-{number}", f"accounts-secret-{number}")


async def trade(robot: Host, path: str, side: str, amount: str = "0.01", symbol: str = "BTC_USDT", price: str = "-1") -> dict[str, Any]:
    return await robot(path, "trade", symbol=symbol, type=side, price=price, amount=amount)


async def positions(robot: Host, path: str, *args: str) -> Any:
    rows = (await robot.io(path, POSITIONS, *args))["data"]
    return [(row["Symbol"], row["Type"], row["Amount"], row["MarginLevel"], row["ContractType"]) for row in rows]


async def become(robot: Host, path: str, contract: str = "swap", direction: str = "buy") -> None:
    assert (await robot.io(path, CONTRACT, contract))["data"]["InstrumentID"] == contract
    assert await robot.io(path, DIRECTION, direction) == TRUE


async def resting(robot: Host, path: str = "paper") -> str:
    """The id of a new order that no market will fill."""
    placed: str = (await trade(robot, path, "buy", "0.01", price="1000"))["data"]["id"]
    return placed


async def balance(robot: Host, path: str, currency: str) -> Any:
    rows = (await robot(path, "accounts"))["data"]
    return next((row["free"], row["frozen"]) for row in rows if row["currency"] == currency)


# ---------------------------------------------------------------- accounts apart


async def test_orders_of_another_key_are_not_there(robot: Host, host: Host) -> None:
    stranger = fresh(host)
    order = await resting(robot)
    assert [row["id"] for row in (await robot("paper", "orders", symbol="BTC_USDT"))["data"]] == [order]
    for symbol in ("BTC_USDT", ""):
        assert await stranger("paper", "orders", symbol=symbol) == {"data": [], "raw": []}
    assert (await stranger("paper", "order", symbol="BTC_USDT", id=order))["error"] == NO_ORDER
    assert (await stranger("paper", "cancel", symbol="BTC_USDT", id=order))["error"] == NO_ORDER
    raw = await stranger("paper", f"__api_/api/v1/orders/{order}", headers={"Http-Method": "GET"})
    assert raw["error"] == NO_ORDER
    assert (await robot("paper", "order", symbol="BTC_USDT", id=order))["data"]["status"] == "open"
    assert (await robot("paper", "cancel", symbol="BTC_USDT", id=order))["data"] is True


async def test_balances_of_another_key_do_not_change(robot: Host, host: Host) -> None:
    stranger = fresh(host)
    before = await balance(stranger, "paper", "USDT")
    assert "data" in await trade(robot, "paper", "buy", "1000")
    await resting(robot)
    assert (await balance(robot, "paper", "USDT"))[0] < before[0]
    assert await balance(stranger, "paper", "USDT") == before


async def test_positions_of_another_key_are_not_there(robot: Host, host: Host) -> None:
    stranger = fresh(host)
    for one in (robot, stranger):
        await become(one, "paper")
    assert "data" in await trade(robot, "paper", "buy")
    assert [row[0] for row in await positions(robot, "paper")] == ["BTC_USDT.swap"]
    assert await positions(stranger, "paper") == []


async def test_the_same_key_with_another_secret_is_nobody(robot: Host, host: Host) -> None:
    order = await resting(robot)
    thief = host.other(robot.access_key, "guessed")
    for call in (
        thief("paper", "accounts"),
        thief("paper", "orders", symbol="BTC_USDT"),
        thief("paper", "order", symbol="BTC_USDT", id=order),
        thief("paper", "cancel", symbol="BTC_USDT", id=order),
        trade(thief, "paper", "buy", "100"),
        thief("paper", "accounts", access_key=robot.access_key),
    ):
        reply = await call
        assert reply["error"].startswith("paper 1002 ")
    assert (await robot("paper", "order", symbol="BTC_USDT", id=order))["data"]["status"] == "open"


async def test_the_same_key_with_another_secret_has_no_futures_state_of_ours(robot: Host, host: Host) -> None:
    await become(robot, "paper", direction="sell")
    thief = host.other(robot.access_key, "guessed")
    assert await thief.io("paper", DIRECTION, "closebuy") == TRUE
    assert "data" in await trade(robot, "paper", "sell"), "the direction is still the robot's own"


async def test_keys_in_params_are_another_account(robot: Host, host: Host) -> None:
    other = fresh(host)
    order = await resting(other)
    mine: dict[str, Any] = {"access_key": other.access_key, "secret_key": other.secret_key}
    assert [row["id"] for row in (await robot("paper", "orders", symbol="BTC_USDT", **mine))["data"]] == [order]
    assert (await robot("paper", "orders", symbol="BTC_USDT"))["data"] == []


async def test_many_accounts_at_once_each_get_their_own(host: Host) -> None:
    robots = [fresh(host) for _ in range(20)]
    orders = await asyncio.gather(*(resting(robot) for robot in robots))
    assert len(set(orders)) == len(robots)
    answers = await asyncio.gather(*(robot("paper", "orders", symbol="BTC_USDT") for robot in robots for _ in range(3)))
    assert [[row["id"] for row in answer["data"]] for answer in answers] == [[order] for order in orders for _ in range(3)]


# ---------------------------------------------------------------- futures state


async def test_a_robot_trades_a_swap_as_the_protocol_says(robot: Host) -> None:
    assert await robot.io("paper", CONTRACT, "swap") == {"data": {"InstrumentID": "swap", "instrument": "swap"}}
    assert await robot.io("paper", LEVERAGE, 12) == TRUE
    assert await robot.io("paper", DIRECTION, "buy") == TRUE
    assert await positions(robot, "paper") == []
    order = (await trade(robot, "paper", "buy", "0.02"))["data"]["id"]
    row = (await robot("paper", "order", symbol="BTC_USDT", id=order))["data"]
    assert (row["symbol"], row["status"], row["deal_amount"], row["contract_type"], row["offset"]) == (
        "BTC_USDT.swap",
        "closed",
        0.02,
        "swap",
        0,
    )
    long = ("BTC_USDT.swap", 0, 0.02, 12, "swap")
    for args in ((), ("swap",), ("BTC_USDT.swap",), ("USDT.swap",), ("",)):
        assert await positions(robot, "paper", *args) == [long]
    for args in (("quarter",), ("ETH_USDT.swap",), ("USD.swap",)):
        assert await positions(robot, "paper", *args) == []
    assert await robot.io("paper", DIRECTION, "closebuy") == TRUE
    closing = (await trade(robot, "paper", "sell", "0.02"))["data"]["id"]
    assert (await robot("paper", "order", symbol="BTC_USDT", id=closing))["data"]["offset"] == 1
    assert await positions(robot, "paper") == []


@pytest.mark.parametrize(("direction", "side", "kind"), [("buy", "buy", 0), ("sell", "sell", 1)], ids=["open long", "open short"])
async def test_each_direction_goes_with_its_side(robot: Host, direction: str, side: str, kind: int) -> None:
    await become(robot, "paper", direction=direction)
    assert "data" in await trade(robot, "paper", side)
    assert [row[:3] for row in await positions(robot, "paper")] == [("BTC_USDT.swap", kind, 0.01)]
    closing = {"buy": ("closebuy", "sell"), "sell": ("closesell", "buy")}[direction]
    assert await robot.io("paper", DIRECTION, closing[0]) == TRUE
    assert "data" in await trade(robot, "paper", closing[1])
    assert await positions(robot, "paper") == []


@pytest.mark.parametrize(
    ("direction", "side", "text"),
    [
        ("sell", "buy", "direction is sell, invalid order type Buy"),
        ("closebuy", "buy", "direction is closebuy, invalid order type Buy"),
        ("buy", "sell", "direction is buy, invalid order type Sell"),
        ("closesell", "sell", "direction is closesell, invalid order type Sell"),
    ],
)
async def test_a_side_against_the_direction_is_refused(robot: Host, direction: str, side: str, text: str) -> None:
    await become(robot, "paper", direction=direction)
    assert await trade(robot, "paper", side) == {"error": text}
    assert await positions(robot, "paper") == []
    assert (await robot("paper", "orders", symbol="BTC_USDT"))["data"] == []


async def test_a_contract_without_a_direction_is_not_guessed(robot: Host) -> None:
    await robot.io("paper", CONTRACT, "swap")
    assert await trade(robot, "paper", "buy") == {"error": "direction not set: call SetDirection first"}


async def test_a_newer_robot_says_all_in_one_call(robot: Host) -> None:
    assert await robot.io("paper", LEVERAGE, "BTC_USDT.swap", 15) == TRUE
    assert "data" in await trade(robot, "paper", "sell", symbol="BTC_USDT.swap")
    assert await positions(robot, "paper") == [("BTC_USDT.swap", 1, 0.01, 15, "swap")]
    assert "data" in await trade(robot, "paper", "closesell", symbol="BTC_USDT.swap")
    assert await positions(robot, "paper") == []
    refused = await trade(robot, "paper", "closebuy")
    assert refused == {"error": "type: closebuy needs a contract: call SetContractType first, or write the symbol as BTC_USDT.swap"}


async def test_an_explicit_contract_wins_over_the_state(robot: Host) -> None:
    await become(robot, "paper")
    spot = await robot.io("paper", CONTRACT, "spot")
    assert spot["data"]["InstrumentID"] == "spot"
    swap = (await robot("paper", "ticker", symbol="BTC_USDT.swap"))["data"]
    bare = (await robot("paper", "ticker", symbol="BTC_USDT"))["data"]
    assert (swap["symbol"], bare["symbol"]) == ("BTC_USDT.swap", "BTC_USDT")


async def test_market_data_follows_the_contract_of_its_robot(robot: Host, host: Host) -> None:
    """A swap's depth is not the spot's: the same bare symbol means another market after SetContractType."""
    await become(robot, "paper/swap")
    candles = [
        await one(path, "records", symbol=symbol, period="1440", limit="5")
        for one, path, symbol in (
            (robot, "paper/swap", "BTC_USDT"),
            (robot, "paper/swap", "BTC_USDT.swap"),
            (robot, "paper", "BTC_USDT"),
            (fresh(host), "paper/swap", "BTC_USDT"),
        )
    ]
    opens = [[row[1] for row in candle["data"][:-1]] for candle in candles]
    assert opens[0] == opens[1]
    assert opens[2] == opens[3]
    assert opens[0] != opens[2]


async def test_two_sessions_of_one_key_have_states_of_their_own(robot: Host) -> None:
    await become(robot, "paper/r1", direction="buy")
    await become(robot, "paper/r2", direction="sell")
    assert "data" in await trade(robot, "paper/r1", "buy")
    assert "data" in await trade(robot, "paper/r2", "sell")
    assert await trade(robot, "paper/r1", "sell") == {"error": "direction is buy, invalid order type Sell"}
    assert await trade(robot, "paper/r2", "buy") == {"error": "direction is sell, invalid order type Buy"}
    plain = (await trade(robot, "paper", "buy", "100"))["data"]["id"]
    assert (await robot("paper", "order", symbol="BTC_USDT", id=plain))["data"]["symbol"] == "BTC_USDT", "without a session it is spot"
    kinds = {(row[0], row[1]) for row in await positions(robot, "paper/r1")}
    assert kinds == {("BTC_USDT.swap", 0), ("BTC_USDT.swap", 1)}, "the account is one, only the state is two"


@pytest.mark.parametrize("session", ["机" * 64, "x" * 64, "网格 机器人".replace(" ", "/"), "a.b*c>d"])
async def test_a_session_of_any_name_keeps_its_state(robot: Host, session: str) -> None:
    path = f"paper/{session}"
    await become(robot, path, direction="sell")
    assert await trade(robot, path, "buy") == {"error": "direction is sell, invalid order type Buy"}
    assert "data" in await trade(robot, path, "sell")
    other = f"{path[:-1]}y"
    assert await trade(robot, other, "closesell") == {
        "error": "type: closesell needs a contract: call SetContractType first, or write the symbol as BTC_USDT.swap"
    }


async def test_changes_at_the_same_time_all_count(robot: Host) -> None:
    """A strategy's exchange.Go sends them at once; two workers and one key in the bucket."""
    for level in range(2, 8):
        path = f"paper/at-once-{level}"
        replies = await asyncio.gather(
            robot.io(path, CONTRACT, "swap"), robot.io(path, DIRECTION, "buy"), robot.io(path, LEVERAGE, level), robot(path, "accounts")
        )
        assert all("data" in reply for reply in replies)
        assert "data" in await trade(robot, path, "buy")
        assert [row[3] for row in await positions(robot, path)] == [level]


async def test_the_last_of_many_changes_stays(robot: Host) -> None:
    for direction in ("buy", "sell", "closebuy", "closesell", "sell"):
        await become(robot, "paper", direction=direction)
    assert await trade(robot, "paper", "buy") == {"error": "direction is sell, invalid order type Buy"}


# ---------------------------------------------------------------- after a restart


@pytest.mark.slow
async def test_the_state_of_a_robot_survives_a_restart_of_everything(state: Path) -> None:
    async with servers.system(state) as system, hosting(system.address) as host:
        robot = fresh(host)
        await become(robot, "paper/r1", direction="sell")
        assert await robot.io("paper/r1", LEVERAGE, 7) == TRUE
        order = await resting(robot)
    async with servers.system(state) as system, hosting(system.address) as host:
        robot = host.other(robot.access_key, robot.secret_key)
        assert await trade(robot, "paper/r1", "buy") == {"error": "direction is sell, invalid order type Buy"}
        assert "data" in await trade(robot, "paper/r1", "sell")
        assert await positions(robot, "paper/r1") == [("BTC_USDT.swap", 1, 0.01, 7, "swap")]
        assert (await robot("paper", "order", symbol="BTC_USDT", id=order))["data"]["status"] == "open"
