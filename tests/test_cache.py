"""Cached and shared answers through real bridges, a worker and the paper exchange; the feeder is driven by hand."""

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bus import market
from tests import feeding, paper, servers
from tests.feeding import Feeder, depth, ticker
from tests.host import Host, hosting
from tests.rig import Rig
from tests.servers import Running

pytestmark = pytest.mark.slow

CONTRACT = 2


@dataclass
class System:
    """hosts: one for each bridge, with the same keys."""

    state: Path
    rig: Rig
    bridges: list[Running]
    hosts: list[Host]
    worker: Running

    @property
    def host(self) -> Host:
        return self.hosts[0]

    async def counted(self, metric: str = "fmzbus_cache_total", bridge: int = 0) -> dict[str, float]:
        """A metric of a bridge, by its labels: {'method="ticker",result="hit"': 3}."""
        where = await self.bridges[bridge].said(r'"admin":"([^"]+)"')
        rows = re.findall(rf'^{metric}{{exchange="paper",?(.*)}} (\S+)$', await servers.get(f"http://{where[1]}/metrics"), re.M)
        return {labels: float(value) for labels, value in rows}


@asynccontextmanager
async def system(state: Path, *, bridges: int = 1, **config: object) -> AsyncIterator[System]:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        client = await enter(paper.exchange(state / "paper", time.time))
        await enter(servers.nats(state))
        worker = await enter(servers.worker(state, venues__paper__base_url=client.base, workers__exchanges='["paper"]'))
        running = [await enter(servers.bridge(state, **config)) for _ in range(bridges)]
        hosts = [await enter(hosting(address)) for _, address in running]
        rig = Rig(client, paper.Clock(), state / "paper")
        yield System(state, rig, [bridge for bridge, _ in running], hosts, worker)


async def asked(host: Host, path: str, method: str, **params: Any) -> tuple[bytes, str]:
    """-> (data, where it came from)."""
    body = msgspec.json.encode({"access_key": host.access_key, "secret_key": host.secret_key, "method": method, "params": params})
    async with host.session.post(f"{host.address}/{path}", data=body, headers={"Fmzbus-Trace": "1"}) as response:
        content = await response.read()
        assert content.startswith(b'{"data":'), content
        return content.removeprefix(b'{"data":').removesuffix(b"}"), response.headers["Fmzbus-Cache"]


async def until_hit(host: Host, path: str, method: str, within_s: float = 10, **params: Any) -> bytes:
    async with asyncio.timeout(within_s):
        while True:
            data, source = await asked(host, path, method, **params)
            if source == "hit":
                return data
            await asyncio.sleep(0.02)


async def feeds(feeder: Feeder, host: Host, kind: str, symbol: str, data: bytes) -> None:
    """Have a symbol fed: somebody asks for it, the feeder hears the wish and tells a value."""
    await asked(host, "paper", kind, symbol=symbol)
    await feeder.wish(kind, symbol)
    await feeder.value(kind, symbol, data)


# ---------------------------------------------------------------- where answers come from


async def test_after_the_first_answer_all_are_at_hand(state: Path) -> None:
    async with system(state) as one, feeding.feeder(state) as feeder, feeding.alive(feeder):
        sources = [(await asked(one.host, "paper", "ticker", symbol="BTC_USDT"))[1]]
        await feeder.wish("ticker", "BTC_USDT", within_s=2)
        await feeder.value("ticker", "BTC_USDT", ticker("123.5"))
        while sources[-1] != "hit":
            sources.append((await asked(one.host, "paper", "ticker", symbol="BTC_USDT"))[1])
        sources += [(await asked(one.host, "paper", "ticker", symbol="BTC_USDT"))[1] for _ in range(1000)]
        counts = Counter(sources)
        assert sources[:2] == ["miss", "shared"]
        assert counts["hit"] >= 1000
        assert counts["miss"] <= 2, "a shared answer lives half a second, and a beat proves the value within one"
        assert await one.counted() == {f'method="ticker",result="{source}"': count for source, count in counts.items()}


@pytest.mark.parametrize(("kind", "data"), [("ticker", ticker("123.5")), ("depth", depth(50_000))])
async def test_a_fed_value_reaches_the_host_byte_for_byte(state: Path, kind: str, data: bytes) -> None:
    async with system(state) as one, feeding.feeder(state) as feeder, feeding.alive(feeder):
        await feeds(feeder, one.host, kind, "BTC_USDT", data)
        assert await until_hit(one.host, "paper", kind, symbol="BTC_USDT") == data
        stranger = one.host.other("k2", "s2")
        assert (await asked(stranger, "paper", kind, symbol="BTC_USDT.swap"))[1] == "miss"


async def test_what_is_not_fresh_is_asked_of_the_exchange(state: Path) -> None:
    async with system(state, market__share_s__ticker=0) as one, feeding.feeder(state) as feeder:
        real = (await asked(one.host, "paper", "ticker", symbol="BTC_USDT.swap"))[0]
        async with feeding.alive(feeder):
            await feeds(feeder, one.host, "ticker", "BTC_USDT.swap", ticker("123.5", "BTC_USDT.swap"))
            assert b"123.5" in await until_hit(one.host, "paper", "ticker", symbol="BTC_USDT.swap")
            await feeder.withdraw("ticker", "BTC_USDT.swap")
            await one_that_is(one.host, "miss")
            await feeder.value("ticker", "BTC_USDT.swap", ticker("124.5", "BTC_USDT.swap"))
            assert b"124.5" in await until_hit(one.host, "paper", "ticker", symbol="BTC_USDT.swap")
        data = await one_that_is(one.host, "miss", within_s=market.BEAT_OLD_S + 0.5)  # it beats no more
        assert b"124.5" not in data
        assert msgspec.json.decode(data).keys() == msgspec.json.decode(real).keys()


async def one_that_is(host: Host, wanted: str, within_s: float = 2) -> bytes:
    async with asyncio.timeout(within_s):
        while True:
            data, source = await asked(host, "paper", "ticker", symbol="BTC_USDT.swap")
            if source == wanted:
                return data


async def test_nothing_is_followed_that_nobody_feeds(state: Path) -> None:
    async with system(state) as one:
        await asked(one.host, "paper", "ticker", symbol="BTC_USDT.swap")
        async with feeding.feeder(state, "okx") as other, feeding.feeder(state, kinds=["depth"]) as feeder:
            await feeder.ticked()
            await asked(one.host, "paper", "depth", symbol="BTC_USDT.swap")
            await feeder.wish("depth", "BTC_USDT.swap")
            await asked(one.host, "paper", "ticker", symbol="BTC_USDT.swap")
            await asked(one.host, "paper", "depth", symbol="ETH_USDT.swap")
            await feeder.wish("depth", "ETH_USDT.swap")
            (wished,) = feeder.wished.values()
            assert wished == {("depth", "BTC_USDT.swap"), ("depth", "ETH_USDT.swap")}
            assert other.wished == {}


async def test_a_symbol_that_does_not_exist_is_not_followed(state: Path) -> None:
    async with system(state) as one, feeding.feeder(state) as feeder:
        await feeder.ticked()
        assert "error" in await one.host("paper", "ticker", symbol="NO_SUCH.swap")
        await feeds(feeder, one.host, "ticker", "BTC_USDT.swap", ticker("1"))
        (wished,) = feeder.wished.values()
        assert wished == {("ticker", "BTC_USDT.swap")}


async def test_beyond_the_limit_workers_answer_and_it_is_counted(state: Path) -> None:
    async with system(state, market__max_symbols=1) as one, feeding.feeder(state) as feeder, feeding.alive(feeder):
        await feeds(feeder, one.host, "ticker", "BTC_USDT", ticker("123.5"))
        assert (await asked(one.host, "paper", "ticker", symbol="ETH_USDT"))[1] == "miss"
        assert await one.counted("fmzbus_not_followed_total") == {"": 1}
        assert feeder.wished.popitem()[1] == {("ticker", "BTC_USDT")}


# ---------------------------------------------------------------- shared answers


@pytest.mark.parametrize("method", ["ticker", "depth", "trades", "records"])
async def test_equal_public_reads_at_once_are_one_call(state: Path, method: str) -> None:
    params = {"symbol": "BTC_USDT.swap"} | ({"period": "5"} if method == "records" else {})
    async with system(state) as one:
        await one.rig.arm("latency", seconds=0.3, path="GET *")
        answers = await asyncio.gather(*(asked(one.host.other(f"k{n}", "s"), "paper", method, **params) for n in range(20)))
        assert Counter(source for _, source in answers) == {"miss": 1, "joined": 19}
        assert len({data for data, _ in answers}) == 1
        (fault,) = await one.rig.armed()
        assert fault["struck"] == 1


async def test_a_leader_that_hangs_up_takes_nobody_along(state: Path) -> None:
    async with system(state) as one:
        await one.rig.arm("latency", seconds=0.5, path="GET *")
        body = msgspec.json.encode({"access_key": "a", "secret_key": "s", "method": "ticker", "params": {"symbol": "BTC_USDT.swap"}})
        port = int(one.host.address.rpartition(":")[2])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /paper HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

        async def struck() -> int:
            return int((await one.rig.armed())[0]["struck"])

        async with asyncio.timeout(5):
            while not await struck():  # noqa: ASYNC110 - only asking tells
                await asyncio.sleep(0.02)
        others = [asyncio.create_task(asked(one.host, "paper", "ticker", symbol="BTC_USDT.swap")) for _ in range(3)]
        writer.transport.abort()
        assert {source for _, source in await asyncio.gather(*others)} <= {"joined", "shared"}
        assert await struck() == 1


async def test_a_bridge_passes_on_what_it_was_answered(state: Path) -> None:
    async with system(state, bridges=2, market__share_s__records=30) as one:
        left, right = one.hosts
        params = {"symbol": "BTC_USDT.swap", "period": "5"}
        await one.rig.arm("latency", seconds=0.0, path="GET *")

        async def passed_on() -> bool:
            """Whether what one bridge was answered now serves at the other, which was asked the same before."""
            await asked(left, "paper", "records", **params)
            return (await asked(right, "paper", "records", **params))[1] == "shared"

        async with asyncio.timeout(10):
            while not await passed_on():
                params["limit"] = str(int(params.get("limit", 0)) + 1)
                await asked(right, "paper", "records", **params)  # it listens from now on
                await asyncio.sleep(0.5)


# ---------------------------------------------------------------- what is nobody else's


async def test_equal_private_reads_of_many_accounts_at_once_stay_apart(state: Path) -> None:
    async with system(state) as one, feeding.feeder(state) as feeder, feeding.alive(feeder):
        robots = [one.host.other(f"private-key-{n}", f"private-secret-{n}") for n in range(50)]
        order: dict[str, Any] = {"symbol": "BTC_USDT", "type": "buy", "price": "1000", "amount": "0.01"}
        placed = await asyncio.gather(*(robot("paper", "trade", **order) for robot in robots))
        ids = [answer["data"]["id"] for answer in placed]
        assert len(set(ids)) == 50
        for _ in range(2):
            answers = await asyncio.gather(*(robot("paper", "orders", symbol="BTC_USDT") for robot in robots))
            assert [[row["id"] for row in answer["data"]] for answer in answers] == [[one_id] for one_id in ids]
        for method in ("accounts", "trade", "orders"):
            assert not [labels for labels in await one.counted() if f'"{method}"' in labels]


async def test_a_private_read_is_made_each_time(state: Path) -> None:
    async with system(state) as one:
        await one.rig.arm("latency", seconds=0.0, path="GET *")
        assert {(await asked(one.host, "paper", "accounts"))[1] for _ in range(5)} == {"miss"}
        await asyncio.gather(*(one.host("paper", "accounts") for _ in range(5)))
        (fault,) = await one.rig.armed()
        assert fault["struck"] == 10


async def test_a_robots_symbol_means_its_own_contract(state: Path) -> None:
    """Over two bridges, with spot and swap fed side by side: what a bare symbol means follows SetContractType at once."""
    async with system(state, bridges=2) as one, feeding.feeder(state) as feeder, feeding.alive(feeder):
        for host in one.hosts:
            for symbol, price in (("BTC_USDT", "1.5"), ("BTC_USDT.swap", "2.5")):
                await asked(host, "paper", "ticker", symbol=symbol)
                await feeder.wish("ticker", symbol)
                await feeder.value("ticker", symbol, ticker(price, symbol))
                await until_hit(host, "paper", "ticker", symbol=symbol)
        robots = [host.other("robot", "secret") for host in one.hosts]
        spots = [host.other("spot", "secret") for host in one.hosts]
        expected = {"swap": "2.5", "spot": "1.5"}
        day = {"period": "1440", "limit": "5"}
        opens = {
            contract: opening((await asked(one.host, "paper", "records", symbol=symbol, **day))[0])
            for contract, symbol in (("spot", "BTC_USDT"), ("swap", "BTC_USDT.swap"))
        }
        assert opens["spot"] != opens["swap"]
        sources: list[str] = []
        for turn, contract in enumerate(["swap", "spot", "swap", "swap", "spot", "spot", "swap"] * 5):
            teller = robots[turn % 2]
            assert (await teller.io("paper/r1", CONTRACT, contract))["data"]["InstrumentID"] == contract
            for _ in range(3):
                for robot, spot in zip(robots, spots, strict=True):
                    data, source = await asked(robot, "paper/r1", "ticker", symbol="BTC_USDT")
                    sources.append(source)
                    assert msgspec.json.decode(data)["symbol"] == "BTC_USDT", "as the robot wrote it"
                    if source == "hit":
                        assert data == ticker(expected[contract])
                    data, _ = await asked(robot, "paper/r1", "records", symbol="BTC_USDT", **day)
                    assert opening(data) == opens[contract]
                    data, source = await asked(spot, "paper/r1", "ticker", symbol="BTC_USDT")
                    assert source != "hit" or data == ticker("1.5")
        assert sources.count("hit") > len(sources) / 3, "the bridges answer by themselves all the same"


def opening(candles: bytes) -> list[float]:
    """The opening prices of all candles but the last, which do not change while a test runs."""
    return [row[1] for row in msgspec.json.decode(candles)[:-1]]
