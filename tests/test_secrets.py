"""No secret leaves the two ends: keys are searched in all that travels, is written or is shown; what travels is worth nothing alone."""

import asyncio
import os
import re
import time
from base64 import b64encode, urlsafe_b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import nats
import pytest
import pytest_asyncio
from msgspec import Raw
from nats.aio.client import Client
from nats.aio.msg import Msg

from bus import seal, server
from bus.messages import Failure, Request, Success, decode_reply, decode_request, encode_exact
from bus.seal import MAC_SIZE
from tests import exchanges, servers
from tests.exchanges import DROPPED, SILENT, Answer, Bitgo, Exchange, json
from tests.host import Host, hosting
from tests.servers import eventually

pytestmark = pytest.mark.slow

ACCESS, SECRET, PASSWORD = "AKdistinctiveAccess4711", "SKdistinctiveSecret0815", "trade-passphrase-1234"
PEM = "-----BEGIN PRIVATE KEY-----\nMIIEdistinctivePemLine\nAgEAotherPemLine\n-----END PRIVATE KEY-----\n"


def forms(secret: str) -> set[bytes]:
    """The secret, escaped as JSON and percent-encoding have it, and its base64 wherever it may begin inside other text."""
    plain = secret.strip().encode()
    found = {plain, plain[4:], msgspec.json.encode(secret.strip())[1:-1], plain.hex().encode()}
    for offset in range(3):
        padded = b"\0" * offset + plain
        whole = len(padded) // 3 * 3
        for encode in (b64encode, urlsafe_b64encode):
            found.add(encode(padded[:whole])[4 if offset else 0 :])
    return found


NEEDLES = set().union(*(forms(secret) for secret in (ACCESS, SECRET, PASSWORD, *PEM.splitlines()[1:3])))


def test_the_needles_find_what_they_are_meant_for() -> None:
    for prefix in range(4):
        text = b"x" * prefix + SECRET.encode() + b"yz"
        for hay in (text, b64encode(text), urlsafe_b64encode(text), text.hex().encode()):
            assert any(needle in hay for needle in NEEDLES)
    assert not any(needle in b'{"access_key":"***"} ticker paper' for needle in NEEDLES)


class Tap:
    """Everything that travelled, headers included."""

    def __init__(self, nc: Client) -> None:
        self.nc = nc
        self.messages: list[Msg] = []

    async def hear(self, message: Msg) -> None:
        self.messages.append(message)

    def frames(self, subject: str) -> list[Msg]:
        return [message for message in self.messages if message.subject == subject]


@asynccontextmanager
async def connection(state: Path, role: str, complaints: list[str] | None = None) -> AsyncIterator[Client]:
    async def complain(error: Exception) -> None:
        if complaints is not None:
            complaints.append(str(error))

    nc = await nats.connect(server.url(state, role), inbox_prefix=f"_INBOX.{role}", error_cb=complain)
    try:
        yield nc
    finally:
        await nc.close()


@pytest_asyncio.fixture(scope="module")
async def exchange() -> AsyncIterator[Exchange]:
    async with exchanges.serving(Bitgo({ACCESS: f"{SECRET},{PASSWORD}"}).answer) as exchange:
        yield exchange


@pytest_asyncio.fixture(scope="module")
async def system(exchange: Exchange, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[servers.System]:
    config: dict[str, object] = {
        "logs__level": "debug",
        "venues__bitgo__base_url": exchange.url,
        "venues__bitgo__timeout_s": 1.0,
        "venues__dead__exchange": "bitgo",
        "venues__dead__base_url": f"http://127.0.0.1:{server.free_port()}",
    }
    async with servers.system(tmp_path_factory.mktemp("s"), **config) as system:
        yield system


@pytest_asyncio.fixture(scope="module")
async def tap(system: servers.System) -> AsyncIterator[Tap]:
    async with connection(system.state, "operator") as nc:
        tap = Tap(nc)
        await nc.subscribe(">", cb=tap.hear)
        await nc.flush()
        yield tap


async def all_that_a_robot_does(host: Host, exchange: Exchange) -> list[dict[str, Any]]:
    """Trades, reads, futures calls, raw calls, refusals and unclear answers, with keys that are easy to find."""
    answers = []
    swap: dict[str, Any] = {"symbol": "BTC_USDT.swap"}
    spot: dict[str, Any] = {"symbol": "BTC_USDT"}
    for keys in (host.other(ACCESS, f"{SECRET},{PASSWORD}"), host.other(f"{ACCESS}2", PEM)):
        for path in ("paper", "paper/robot-1"):
            answers += [
                await keys(path, "ticker", **spot),
                await keys(path, "records", period="1", **spot),
                await keys(path, "accounts"),
                await keys(path, "trade", type="buy", price="-1", amount="100", **spot),
                await keys(path, "trade", type="buy", price="1e30", amount="1e30", **spot),
                await keys(path, "trade", type="buy", price="cheap", amount="1", **spot),
                await keys(path, "orders", **spot),
                await keys(path, "order", id="0", **spot),
                await keys(path, "cancel", id="nope", **spot),
                await keys.io(path, 2, "swap"),
                await keys.io(path, 1, "buy"),
                await keys.io(path, 0, 10),
                await keys.io(path, 0, 10, "BTC_USDT.swap"),
                await keys.io(path, 3),
                await keys(path, "trade", type="buy", price="-1", amount="0.01", **swap),
                await keys(path, "trade", type="sell", price="-1", amount="0.01", **swap),
                await keys(path, "__api_/api/v1/account", headers={"Http-Method": "GET"}),
                await keys(path, "__api_/echo/this", headers={"Http-Method": "DELETE"}, note="x"),
                await keys(path, "accounts", access_key=f"{ACCESS}3", secret_key=SECRET),
                await keys(path, "no_such_method"),
            ]
        exchange.will()
        answers += [await keys("bitgo", "accounts"), await keys("bitgo", "orders", **spot), await keys("bitgo", "__api_transfer", a="1")]
        faults = (DROPPED, SILENT, Answer(b"<html>", 502), Answer(b"{"), json({"code": "x"}), json({"code": 9, "msg": "no money"}))
        for amount, fault in enumerate(faults, 1):
            exchange.will(fault)
            answers.append(await keys("bitgo", "trade", type="buy", price="1", amount=str(amount), **spot))
        answers.append(await keys("dead", "trade", type="buy", price="1", amount="1", **spot))
    return answers


def found(hay: bytes) -> set[bytes]:
    return {needle for needle in NEEDLES if needle in hay}


@pytest.mark.slow
async def test_no_key_is_in_anything_that_travels_is_written_or_is_shown(system: servers.System, tap: Tap, exchange: Exchange) -> None:
    async with hosting(system.address) as host:
        answers = await all_that_a_robot_does(host, exchange)
        await host.post("paper", b'{"access_key":"%b","method":' % ACCESS.encode())
        await host.post("paper", b'{"secret_key":["%b"],"method":"accounts"}' % SECRET.encode())
    assert sum("data" in answer for answer in answers) > 40
    assert sum("error" in answer for answer in answers) > 30
    assert any(ACCESS in seen.query.get("api_key", "") for seen in exchange.requests), "the exchange itself does get the key"
    for answer in answers:
        assert not found(answer.get("error", "").encode())

    await tap.nc.flush()
    assert len(tap.frames("rpc.paper.trade")) == 16
    for message in tap.messages:
        assert not found(f"{message.subject} {message.headers}".encode() + message.data)

    states = [path for path in system.state.rglob("*") if path.is_file() and not path.is_relative_to(system.state / "paper")]
    assert {"bridge-1.jsonl", "worker-1.jsonl", "nats.log", "nats.conf"} <= {path.name for path in states}
    assert any(path.suffix == ".blk" for path in states), "the streams are on disk"
    for path in states:
        assert not found(path.read_bytes()), path
    for database in (system.state / "paper").rglob("*"):  # the paper exchange has to know the keys, as every exchange does
        assert not database.is_file() or database.stat().st_mode & 0o077 == 0 or not found(database.read_bytes()), database

    async with aiohttp.ClientSession() as session:
        for name in ("bridge-1", "worker-1", "worker-2", "paper"):
            if not re.search(rf"(?m)^{name} .*:\d+ *$", system.running.output):
                continue
            async with session.get(f"{system.admin(name)}/metrics") as response:
                metrics = await response.read()
            assert not found(metrics)
            assert b"robot-1" not in metrics
        for page in ("varz", "connz?subs=1", "subsz?subs=1", "jsz?streams=1&config=1"):
            async with session.get(f"{system.admin('nats')}/{page}") as response:
                assert not found(await response.read())

    for process in (Path("/proc") / str(pid) for pid in (system.running.process.pid, *system.pids.values())):
        for name in ("cmdline", "environ"):
            assert not found((process / name).read_bytes())
    assert not found(system.running.output.encode())


async def test_an_exchange_that_repeats_the_keys_does_not_make_them_public(system: servers.System, tap: Tap, exchange: Exchange) -> None:
    """Some exchanges quote what they refuse; the host reads its own words back without the keys in them."""
    words = json({"code": 401, "msg": f"api key {ACCESS} with {SECRET},{PASSWORD} is not allowed from here"})
    async with hosting(system.address) as host:
        exchange.will(words)
        answer = await host.other(ACCESS, f"{SECRET},{PASSWORD}")("bitgo", "accounts")
        assert answer == {"error": "api key *** with *** is not allowed from here"}
        exchange.will(json({"code": 401, "msg": "a bad day"}))
        assert await host.other("a", "b")("bitgo", "accounts") == {"error": "a bad day"}, "a key of one letter is no secret to look for"
    await tap.nc.flush()
    assert not any(found(message.data) for message in tap.messages)


# ---------------------------------------------------------------- what was taken off the bus


@pytest_asyncio.fixture
async def frame(system: servers.System, tap: Tap) -> bytes:
    """The frame of a real read, as it was seen on the bus."""
    tap.messages.clear()
    async with hosting(system.address) as host:
        assert "data" in await host.other(ACCESS, SECRET)("paper/frames", "orders", symbol="BTC_USDT")
    await eventually(lambda: tap.frames("rpc.paper.orders"))
    return tap.frames("rpc.paper.orders")[0].data


async def ask(tap: Tap, subject: str, frame: bytes) -> Any:
    """Publish it as an operator may, and read the worker's reply."""
    answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    inbox = f"_INBOX.bridge.test{os.urandom(4).hex()}"

    async def hear(message: Msg) -> None:
        answered.set_result(message.data)

    subscription = await tap.nc.subscribe(inbox, cb=hear, max_msgs=1)
    await tap.nc.publish(subject, frame, reply=inbox)
    async with asyncio.timeout(10):
        reply = decode_reply(await answered)
    await subscription.unsubscribe()
    return reply


TRADE = Raw(b'{"symbol":"BTC_USDT","side":"buy","price":"-1","amount":"100"}')


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "trade", "params": TRADE},
        {"method": "cancel", "params": Raw(b'{"id":"1"}')},
        {"params": Raw(b'{"symbol":"ETH_USDT"}')},
        {"path": "paper/other"},
        {"exchange": "bitgo"},
        {"expires_at_ms": 2**50},
    ],
    ids=str,
)
async def test_a_frame_sent_again_for_something_else_is_refused(tap: Tap, frame: bytes, changes: dict[str, Any]) -> None:
    seen = decode_request(frame[MAC_SIZE:])
    forged = encode_exact(msgspec.structs.replace(seen, **changes))
    for mac in (frame[:MAC_SIZE], os.urandom(MAC_SIZE)):
        reply = await ask(tap, f"rpc.{changes.get('exchange', 'paper')}.{changes.get('method', 'orders')}", mac + forged)
        assert reply == Failure(code="bad_request", message="the request is not bound to its credentials; nothing was sent")


async def test_a_frame_means_the_same_on_every_subject(tap: Tap, frame: bytes) -> None:
    """The subject only says who takes it: what is done stands in the frame, and the frame is bound."""
    reply = await ask(tap, "rpc.paper.cancel", frame)
    assert isinstance(reply, Failure) or bytes(reply.data) == b"[]"


async def test_junk_on_the_bus_is_answered_and_harms_nobody(system: servers.System, tap: Tap) -> None:
    for junk in (b"", b"{}", os.urandom(100), b"\0" * MAC_SIZE + b"[" * 100_000):
        reply = await ask(tap, "rpc.paper.trade", junk)
        assert reply == Failure(code="bad_request", message="malformed request on the bus")
    async with hosting(system.address) as host:
        assert "data" in await host("paper", "ticker", symbol="BTC_USDT")


def frame_of(system: servers.System, left_ms: int) -> bytes:
    """An order of our own making, sealed with the system's public key as a bridge does."""
    key_id, sealed, mac_key = seal.Sealer(system.state / "keys").box(ACCESS, SECRET)
    order = Request(
        exchange="paper",
        path="paper",
        method="trade",
        params=TRADE,
        expires_at_ms=time.time_ns() // 1_000_000 + left_ms,
        idempotency_key=os.urandom(16).hex(),
        key_id=key_id,
        sealed=sealed,
    )
    return seal.frame(encode_exact(order), mac_key)


async def test_a_request_that_comes_too_late_is_not_executed(system: servers.System, tap: Tap) -> None:
    reply = await ask(tap, "rpc.paper.trade", frame_of(system, -1000))
    assert reply == Failure(code="expired", message="the request reached a worker too late; nothing was sent")
    assert isinstance(await ask(tap, "rpc.paper.trade", frame_of(system, 5000)), Success)


# ---------------------------------------------------------------- who may do what


@pytest.mark.parametrize(
    ("role", "subject"),
    [
        ("bridge", "rpc.>"),
        ("bridge", "rpc.paper.trade"),
        ("bridge", ">"),
        ("bridge", "_INBOX.>"),
        ("bridge", "$KV.>"),
        ("worker", ">"),
        ("worker", "_INBOX.>"),
        ("worker", "_INBOX.bridge.>"),
    ],
)
async def test_a_role_may_not_listen_to_what_is_not_its_own(system: servers.System, role: str, subject: str) -> None:
    complaints: list[str] = []
    async with connection(system.state, role, complaints) as nc:
        await nc.subscribe(subject)
        await nc.flush()
        await eventually(lambda: complaints)
    assert "permissions violation for subscription" in complaints[0].lower()


@pytest.mark.parametrize(
    ("role", "subject"),
    [
        ("worker", "rpc.paper.trade"),
        ("worker", "fleet.bridge.x"),
        ("worker", "$JS.API.STREAM.DELETE.KV_sessions"),
        ("bridge", "$KV.sessions.x"),
        ("bridge", "$JS.API.STREAM.NAMES"),
        ("bridge", "_INBOX.bridge.x"),
        ("bridge", "fleet.worker.x"),
        ("bridge", "$SYS.REQ.SERVER.PING"),
    ],
)
async def test_a_role_may_not_say_what_is_not_its_own(system: servers.System, tap: Tap, role: str, subject: str) -> None:
    complaints: list[str] = []
    tap.messages.clear()
    async with connection(system.state, role, complaints) as nc:
        await nc.publish(subject, b"not-mine")
        await nc.flush()
        await eventually(lambda: complaints)
    assert "permissions violation for publish" in complaints[0].lower()
    await tap.nc.flush()
    assert not [message for message in tap.messages if message.data == b"not-mine"]


async def test_nobody_gets_in_without_a_password(system: servers.System) -> None:
    address = server.url(system.state, "bridge")
    for url in (re.sub(r"//.*@", "//", address), re.sub(r":[^:@]*@", ":wrong@", address)):
        nc = Client()
        with pytest.raises(nats.errors.Error, match=r"(?i)authorization violation"):
            await nc.connect(url, allow_reconnect=False, connect_timeout=2)
        await nc.close()


def test_the_passwords_are_for_their_owner_alone(system: servers.System) -> None:
    for path in (*(system.state / "nats").glob("*.*"), *(system.state / "keys").glob("*.secret")):
        assert path.stat().st_mode & 0o077 == 0, path
    assert (system.state / "keys").stat().st_mode & 0o077 == 0
