"""`fmzbus watch`: what is fresh is shown with its source, and else why there is nothing. Most tests speak for the feeder, word by word."""

import asyncio
import contextlib
import os
import pty
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import nats
import pytest
from nats.aio.msg import Msg

from bus import fleet, market, server, subjects, watch
from bus.config import Config, Nats, environment
from bus.connection import Bus, connected
from bus.lifecycle import running
from bus.market import HEADER, WITHDRAWN, Beat, Proof
from tests import servers
from tests.servers import COMMAND, Running, eventually

pytestmark = pytest.mark.slow

NOBODY = "http://127.0.0.1:1"
EPOCH = 1_795_168_986_314_000
TICKER = b'{"time":1795168986314,"buy":62378.470,"sell":62378.49,"last":62378.48,"high":63013.31,"low":61840.31,"vol":32516.644835}'
DEPTH = b'{"time":1795168986314,"asks":[[62378.49,0.10],[62378.5,2],[62379,7]],"bids":[[62378.470,0.034343],[62378.4,1],[62370,9]]}'


class Feeder:
    """Says what a test lets it say, and vouches for all of it while it beats. wished: (kind, symbol) pairs."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._heard: dict[str, int] = {}
        self._keys: dict[str, tuple[int, int]] = {}
        self._number = self._n = 0
        self.beats = True
        self.wished: set[tuple[str, str]] = set()

    async def hear_tick(self, message: Msg) -> None:
        self._heard[message.subject.partition(".")[2]] = market.read_tick(message.data)[0]

    async def hear_wish(self, message: Msg) -> None:
        self.wished.update(market.decode_wish(message.data).keys)

    async def keep_beating(self) -> None:
        while True:
            if self.beats:
                self._number += 1
                beat = Beat(
                    feeder=self._bus.process,
                    epoch=EPOCH,
                    number=self._number,
                    top=self._n,
                    whole=True,
                    keys=dict(self._keys),
                    heard=dict(self._heard),
                )
                await self._bus.nc.publish(subjects.beat("paper", 0), market.encode(beat))
            await asyncio.sleep(0.1)

    async def tell(self, kind: str, content: bytes, age_ms: int = 0) -> None:
        """To whoever has wished it, at last."""
        await eventually(lambda: (kind, "BTC_USDT") in self.wished)
        self._n += 1
        self._keys[market.key(kind, "BTC_USDT")] = (self._n, age_ms)
        headers = {HEADER: Proof(EPOCH, self._n, age_ms, 0).header()}
        await self._bus.nc.publish(subjects.feed("paper", kind, "BTC_USDT"), content, headers=headers)


@asynccontextmanager
async def feeding(state: Path) -> AsyncIterator[Feeder]:
    """A feeder of paper's shard 0."""
    async with connected(server.url(state, "feeder"), "feeder", closed=lambda: None) as bus:
        feeder = Feeder(bus)
        await bus.nc.subscribe(subjects.tick("*"), cb=feeder.hear_tick)
        await bus.nc.subscribe(subjects.wish("paper"), cb=feeder.hear_wish)
        await bus.nc.publish(subjects.WISH_CALL)
        feeds = {"paper": fleet.Feed(kinds=["depth", "ticker"], shards=[0])}
        announced = fleet.announced(bus, admin="", version="0", feeds=lambda: feeds, ready=lambda: True)
        async with announced, running(feeder.keep_beating()):
            yield feeder


@asynccontextmanager
async def watching(state: Path, *options: str) -> AsyncIterator[Running]:
    """The command on a pipe, without a bridge to ask."""
    command = (COMMAND, "watch", "paper", "BTC_USDT", "--state", str(state), "--url", NOBODY)
    async with servers.running(*command, *options) as one:
        yield one


def views(one: Running) -> list[dict[str, Any]]:
    """The lines of --json."""
    return [msgspec.json.decode(line) for line in one.output.splitlines(keepends=True) if line.startswith("{") and line.endswith("\n")]


async def test_a_value_is_shown_as_it_was_told_with_its_age_rate_and_source(state: Path) -> None:
    async with servers.nats(state), feeding(state) as feeder, watching(state, "--levels", "2", "--count", "2") as shown:
        await feeder.tell("ticker", market.reply(TICKER))
        await shown.said("ticker last")
        await feeder.tell("depth", market.reply(DEPTH))
        assert await asyncio.wait_for(shown.process.wait(), 10) == 0
        await shown.stop()
    warning, ticker, depth = shown.output.splitlines()
    assert warning.startswith(f"no bridge answers at {NOBODY} (")
    at, source = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", rf"\(\d+ ms old, [\d.]+/s, feeder-[0-9a-f]{{8}} epoch {EPOCH} n"
    values = "last 62378.48 buy 62378.470 sell 62378.49 high 63013.31 low 61840.31 vol 32516.644835"
    assert re.fullmatch(rf"{at} ticker {re.escape(values)}  {source} 1\)", ticker), ticker
    levels = "bids 62378.470x0.034343 62378.4x1 asks 62378.49x0.10 62378.5x2"
    assert re.fullmatch(rf"{at} depth {re.escape(levels)}  {source} 2\)", depth), depth


async def test_programs_get_an_object_a_line_and_no_value_that_is_not_fresh(state: Path) -> None:
    async with servers.nats(state), watching(state, "--json", "--levels", "1") as shown:
        async with feeding(state) as feeder:
            await feeder.tell("depth", market.reply(DEPTH))
            await eventually(lambda: any(view["fresh"] for view in views(shown)))
            feeder.beats = False
            await eventually(lambda: [view for view in views(shown) if view["kind"] == "depth"][-1].get("why") == "stale")
            feeder.beats = True
            await eventually(lambda: [view for view in views(shown) if view["kind"] == "depth"][-1]["fresh"])
            await feeder.tell("depth", market.withdrawal("its socket is gone"), WITHDRAWN)
            await eventually(lambda: views(shown)[-1].get("why") == "stale: its socket is gone")
        await eventually(lambda: {view.get("why") for view in views(shown)[-2:]} == {"no feeder"})
        assert await shown.stop(signal.SIGINT) == 0
    depths = [view for view in views(shown) if view["kind"] == "depth"]
    assert [view["fresh"] for view in depths] == [True, False, True, False, False]
    one = {"exchange": "paper", "symbol": "BTC_USDT", "epoch": EPOCH, "n": 1}
    assert one.items() <= depths[0].items()
    assert depths[0]["data"] == {"time": 1795168986314, "asks": [[62378.49, 0.1]], "bids": [[62378.47, 0.034343]]}
    assert (0 <= depths[0]["age_ms"] < 5000, depths[0]["rate"] > 0) == (True, True)
    assert not [view for view in views(shown) if "data" in view and not view["fresh"]]
    assert "Traceback" not in shown.output


async def test_where_nothing_is_fed_it_says_why_and_goes_on_trying(state: Path) -> None:
    async with servers.nats(state), watching(state, "--count", "1") as shown:
        for kind in ("ticker", "depth"):
            await shown.said(f"Z {kind} no feeder: start one: `fmzbus feeder`, or `fmzbus up --feeders 1`; still trying\n")
        async with feeding(state) as feeder:
            await shown.said("Z ticker nothing told yet: see `fmzbus status`")
            await feeder.tell("ticker", market.reply(TICKER))
            assert await asyncio.wait_for(shown.process.wait(), 10) == 0


async def test_a_terminal_shows_book_and_ticker_and_ctrl_c_ends_it_quietly(state: Path) -> None:
    async with servers.nats(state), feeding(state) as feeder:
        master, terminal = pty.openpty()
        command = (COMMAND, "watch", "paper", "BTC_USDT", "--state", str(state), "--url", NOBODY, "--levels", "3")
        env = environment() | {"COLUMNS": "120", "LINES": "40", "TERM": "xterm"}
        process = await asyncio.create_subprocess_exec(
            *command, env=env, start_new_session=True, stdin=terminal, stdout=terminal, stderr=terminal
        )
        os.close(terminal)
        os.set_blocking(master, False)
        shown = ""

        def read() -> None:
            nonlocal shown
            with contextlib.suppress(OSError):
                shown += re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", os.read(master, 65536).decode(errors="replace"))

        asyncio.get_running_loop().add_reader(master, read)
        try:
            await eventually(lambda: "nothing told yet" in shown)
            await feeder.tell("ticker", market.reply(TICKER))
            await feeder.tell("depth", market.reply(DEPTH))
            await eventually(lambda: re.search(r"0\.034343 +62378\.470 +62378\.49 +0\.10", shown))
            assert re.search(r"paper BTC_USDT +last 62378\.48 buy 62378\.470", shown)
            await eventually(lambda: re.search(rf"depth +\d+ ms old, [\d.]+/s, feeder-[0-9a-f]{{8}} epoch {EPOCH} n 2", shown))
            feeder.beats = False
            await eventually(lambda: re.search(r"depth +stale: not proven within 5 s", shown))
            shown = ""
            await eventually(lambda: shown.count("ticker  stale") >= 2)  # the whole screen, drawn anew
            assert "62378" not in shown.partition("ticker  stale")[2]
            process.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(process.wait(), 10) == 0
        finally:
            asyncio.get_running_loop().remove_reader(master)
            os.close(master)
        assert "Traceback" not in shown


async def test_a_market_that_nobody_knows_is_told_and_never_wished(shared_system: servers.System) -> None:
    command = (COMMAND, "watch", "paper", "NO_SUCH", "--state", str(shared_system.state))
    wished: list[bytes] = []

    async def hear(message: Msg) -> None:
        wished.append(message.data)

    async with connected(server.url(shared_system.state, "operator"), "operator", closed=lambda: None) as bus:
        await bus.nc.subscribe(subjects.wish("paper"), cb=hear)
        async with servers.running(*command) as shown:
            await shown.said(r"(?m)^paper NO_SUCH: .*\nit is asked again every 3 s; Ctrl-C ends this$")
            assert await shown.stop(signal.SIGINT) == 0
        await bus.nc.flush()
    assert not [wish for wish in wished if b"NO_SUCH" in wish]


async def test_a_name_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    async with servers.running(COMMAND, "watch", "paper", "BTC USDT", "--state", str(tmp_path)) as shown:
        assert await asyncio.wait_for(shown.process.wait(), 10) == 1
        await shown.stop()
    assert shown.output == "fmzbus: symbol: expected 1 to 64 printable signs without blanks, got 'BTC USDT'\n"


async def test_the_system_itself_is_watched(shared_system: servers.System) -> None:
    async with servers.running(
        COMMAND, "watch", "PAPER", "BTC_USDT", "--state", str(shared_system.state), "--count", "5", "--json"
    ) as shown:
        assert await asyncio.wait_for(shown.process.wait(), 30) == 0
        await shown.stop()
    fresh = [view for view in views(shown) if view["fresh"]]
    assert len(fresh) == 5
    assert {view["exchange"] for view in fresh} == {"paper"}
    assert all(view["age_ms"] < 5000 for view in fresh)
    (feeder,) = {view["feeder"] for view in fresh if view["feeder"]}
    async with servers.watching(shared_system.state) as heard:
        await eventually(lambda: feeder in {one.process for one in heard.alive()})
    for view in fresh:
        if view["kind"] == "depth":
            assert view["data"]["bids"][0][0] < view["data"]["asks"][0][0]


# ---------------------------------------------------------------- --dial


async def dialled(state: Path, *options: str, **config: object) -> list[str]:
    """What --dial prints, error output with it."""
    command = (COMMAND, "watch", "paper", "BTC_USDT.swap", "--dial", "--state", str(state), *options)
    async with servers.running(*command, env=environment(**config)) as shown:
        assert await asyncio.wait_for(shown.process.wait(), 10) == 0, shown.output
        await shown.stop()
    return shown.output.splitlines()


async def test_dial_prints_addresses_that_a_strategy_can_use(state: Path) -> None:
    async with servers.nats(state), feeding(state) as feeder:
        ws, bus, mqtt, *words = await dialled(state, "--url", "http://127.0.0.1:6666", nats__mqtt_port=1883)
        assert ws == "ws://127.0.0.1:6666/stream/paper/ticker/BTC_USDT.swap"
        url, _, topic = bus.partition("?topic=")
        assert topic == "feed.paper.ticker.BTC_USDT=2Eswap"
        user = re.escape(url.removeprefix("nats://").rpartition("@")[0])
        assert re.fullmatch(rf"mqtt://{user}@127\.0\.0\.1:1883\?topic=feed/paper/ticker/BTC_USDT=2Eswap", mqtt)
        assert words == [
            "Each message is a finished reply, {data} or {error}. In place of ticker: depth, trades, candles (of 1 minute), candles-15."
        ]
        reader = await nats.connect(url)
        try:
            subscription = await reader.subscribe("feed.paper.ticker.BTC_USDT")
            await reader.flush()
            feeder.wished.add(("ticker", "BTC_USDT"))
            await feeder.tell("ticker", market.reply(TICKER))
            assert (await subscription.next_msg(timeout=5)).data == market.reply(TICKER)
        finally:
            await reader.close()


async def test_dial_names_what_is_off_and_what_only_the_operator_knows(state: Path) -> None:
    server.settings(state)
    ws, bus, *words = await dialled(state)
    assert bus.startswith(f"nats://reader:{server.settings(state).passwords['reader']}@127.0.0.1:")
    assert words[-1] == "MQTT is off: [nats] mqtt_port turns it on."
    found = await dialled(state, nats__url="nats://worker:secret@bus.example:4333,nats://two:4222")
    assert found[:2] == [ws, "nats://reader:<password>@bus.example:4333?topic=feed.paper.ticker.BTC_USDT=2Eswap"]
    assert any(line.startswith("[nats] url is a server of your own: give it a user `reader`") for line in found)
    assert "secret" not in "\n".join(found)


def test_the_addresses_of_a_server_of_ones_own_have_its_host() -> None:
    config = Config(nats=Nats(url="nats://10.0.0.5", mqtt_port=1884))
    assert watch.dials(config, "http://h:1", "okx", "btc/usdt") == {
        "ws": "ws://h:1/stream/okx/ticker/btc%2Fusdt",
        "nats": "nats://reader:<password>@10.0.0.5:4222?topic=feed.okx.ticker.btc=2Fusdt",
        "mqtt": "mqtt://reader:<password>@10.0.0.5:1884?topic=feed/okx/ticker/btc=2Fusdt",
    }


async def test_dial_without_a_bus_says_so_and_creates_nothing(tmp_path: Path) -> None:
    async with servers.running(COMMAND, "watch", "paper", "BTC_USDT", "--dial", "--state", str(tmp_path / "nobody")) as shown:
        assert await asyncio.wait_for(shown.process.wait(), 10) == 1
        await shown.stop()
    assert "is `fmzbus up` running" in shown.output
    assert not (tmp_path / "nobody").exists()
