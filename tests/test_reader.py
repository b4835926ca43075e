"""The user "reader", for strategies that listen by themselves: it hears feeds, over NATS and MQTT, and can do nothing else.

Each refusal is tried against the real server, is told to who tried it, and is seen by nobody; what is tried works for the operator, so
that each of these tests could fail.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiomqtt
import msgspec
import nats
import nats.errors
import pytest
import pytest_asyncio
from nats.aio.client import Client
from nats.aio.msg import Msg

from bus import server
from tests import servers
from tests.servers import eventually
from tests.streams import flushed

pytestmark = pytest.mark.slow

FEED = "feed.paper.ticker.BTC_USDT"
SUBSCRIBE = [FEED, "feed.paper.depth.BTC_USDT=2Eswap", "feed.paper.*.*", "feed.>"]
FORBIDDEN_TO_HEAR = [
    "rpc.>", "rpc.paper.ticker", "_INBOX.>", "_INBOX.bridge.>", "$JS.>", "$JS.API.>", "$KV.>", "$SYS.>", "$MQTT.>", "fleet.>", ">", "*",
    "*.paper.ticker.X", "*.>", "feed", "beat.>", "tick.*", "wish.>", "orders.>", "unsettled.>", "sessions.changed", "shared.>",
]  # fmt: skip
FORBIDDEN_TO_SAY = [
    FEED, "feed.x", "rpc.paper.ticker", "wish.paper", "tick.x", "beat.paper.0", "call.wishes", "fleet.roll", "fleet.worker.x", "_none.x",
    "sessions.changed", "forgot.x", "told.x.yes", "orders.paper.x.trade", "_INBOX.bridge.x", "$JS.API.STREAM.LIST", "$KV.halt.record",
]  # fmt: skip


class Bus:
    """A real server that speaks MQTT too. seen: (subject, payload) of all that an operator hears, without JetStream's own."""

    def __init__(self, state: Path, mqtt_port: int) -> None:
        self.state = state
        self.mqtt_port = mqtt_port
        self.seen: list[tuple[str, bytes]] = []

    @asynccontextmanager
    async def client(self, role: str) -> AsyncIterator[tuple[Client, list[str]]]:
        """-> (a plain NATS client, what the server told it was wrong)."""
        errors: list[str] = []

        async def complain(error: Exception) -> None:
            errors.append(str(error))

        nc = await nats.connect(server.url(self.state, role), error_cb=complain)
        try:
            yield nc, errors
        finally:
            await nc.close()

    def mqtt(self, role: str, will: aiomqtt.Will | None = None) -> aiomqtt.Client:
        password = server.settings(self.state).passwords[role]
        return aiomqtt.Client("127.0.0.1", self.mqtt_port, username=role, password=password, will=will)

    async def saw(self, subject: str, payload: bytes) -> None:
        await eventually(lambda: (subject, payload) in self.seen, 5)


@pytest_asyncio.fixture(scope="module")
async def bus(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bus]:
    state = tmp_path_factory.mktemp("s")
    one = Bus(state, server.free_port())

    async def hear(message: Msg) -> None:
        one.seen.append((message.subject, message.data))

    async with servers.running(*server.command(state, one.mqtt_port)):
        await server.wait_ready(state)
        async with one.client("operator") as (nc, _):
            await nc.subscribe(">", cb=hear)
            await flushed(nc)
            yield one


async def next_message(client: aiomqtt.Client) -> aiomqtt.Message:
    async with asyncio.timeout(5):
        return await anext(aiter(client.messages))


@pytest.mark.parametrize("subject", SUBSCRIBE)
async def test_the_reader_hears_feeds(bus: Bus, subject: str) -> None:
    async with bus.client("feeder") as (feeder, _), bus.client("reader") as (reader, errors):
        heard = await reader.subscribe(subject)
        await flushed(reader)
        told = subject.replace("*", "ticker").replace(">", "paper.ticker.BTC_USDT")
        await feeder.publish(told, b'{"data":1}')
        message = await heard.next_msg(timeout=5)
        assert (message.subject, message.data) == (told, b'{"data":1}')
        assert not errors


@pytest.mark.parametrize("subject", FORBIDDEN_TO_HEAR)
async def test_the_reader_hears_nothing_else(bus: Bus, subject: str) -> None:
    """The value of a feed that it does hear comes last, from the same connection: what it was to hear had come before."""
    said = subject.replace("*", "x").replace(">", "x.y")
    async with bus.client("operator") as (operator, _), bus.client("reader") as (reader, errors):
        forbidden, allowed, operators = [await nc.subscribe(name) for nc, name in ((reader, subject), (reader, FEED), (operator, subject))]
        await flushed(reader)
        await flushed(operator)
        await operator.publish(said, b"secret")
        await operator.publish(FEED, b"open")
        assert (await allowed.next_msg(timeout=5)).data == b"open"
        with pytest.raises(nats.errors.TimeoutError):
            await forbidden.next_msg(timeout=0.05)
        await eventually(lambda: errors)
        assert any(
            "permissions violation for subscription" in error.lower() and f'"{subject.lower()}"' in error.lower() for error in errors
        )
        assert (await operators.next_msg(timeout=5)).data == b"secret"


@pytest.mark.parametrize("subject", FORBIDDEN_TO_SAY)
async def test_the_reader_says_nothing(bus: Bus, subject: str) -> None:
    async with bus.client("reader") as (reader, errors), bus.client("operator") as (operator, _):
        await reader.publish(subject, b"evil")
        await flushed(reader)
        await eventually(lambda: errors)
        assert f'permissions violation for publish to "{subject.lower()}"' in errors[0].lower()
        await operator.publish(subject, b"good")
        await bus.saw(subject, b"good")
        assert (subject, b"evil") not in bus.seen


async def test_the_reader_cannot_ask_even_for_what_it_may_hear(bus: Bus) -> None:
    """A request is a publish and an inbox; neither is granted, and hearing feeds needs neither."""
    async with bus.client("reader") as (reader, errors):
        with pytest.raises(nats.errors.TimeoutError):
            await reader.request("$JS.API.STREAM.LIST", timeout=0.3)
        assert len(errors) == 2
    async with bus.client("operator") as (operator, _):
        assert b"stream_list" in (await operator.request("$JS.API.STREAM.LIST", timeout=5)).data


@pytest.mark.parametrize("who", [{"user": "reader", "pass": "wrong"}, {"user": "nobody", "pass": ""}, {}])
async def test_a_stranger_and_a_wrong_password_hear_nothing(bus: Bus, who: dict[str, str]) -> None:
    greeting, writer = await asyncio.open_connection("127.0.0.1", server.settings(bus.state).port)
    writer.write(b'CONNECT {"verbose":false,%b\r\nSUB %b 1\r\nPING\r\n' % (msgspec.json.encode(who | {"lang": "x"})[1:], FEED.encode()))
    async with asyncio.timeout(5):
        heard = await greeting.read()
    writer.close()
    assert heard.startswith(b"INFO ")
    assert heard.endswith(b"-ERR 'Authorization Violation'\r\n")
    with pytest.raises(aiomqtt.MqttError, match="Not authorized"):
        async with aiomqtt.Client("127.0.0.1", bus.mqtt_port, username=who.get("user"), password=who.get("pass")):
            pass


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("topic", ["feed/paper/ticker/BTC_USDT", "feed/paper/depth/BTC_USDT=2Eswap", "feed/paper/+/+"])
async def test_the_reader_hears_feeds_over_mqtt(bus: Bus, topic: str, qos: int) -> None:
    told = topic.replace("+", "ticker")
    async with bus.client("feeder") as (feeder, _), bus.mqtt("reader") as client:
        assert [code.value for code in await client.subscribe(topic, qos=qos)] == [qos]  # type: ignore[union-attr]
        await feeder.publish(told.replace("/", "."), b'{"data":1}')
        message = await next_message(client)
        assert (str(message.topic), message.payload) == (told, b'{"data":1}')


@pytest.mark.parametrize(
    "topic", ["rpc/#", "rpc/paper/ticker", "_INBOX/#", "$JS/#", "$MQTT/#", "$MQTT/sub/+", "fleet/#", "#", "+/paper/ticker/X", "wish/paper"]
)
async def test_the_reader_hears_nothing_else_over_mqtt(bus: Bus, topic: str) -> None:
    said = topic.replace("/", ".").replace("+", "x").replace("#", "x.y")
    async with bus.client("operator") as (operator, _), bus.mqtt("reader") as client, bus.mqtt("operator") as other:
        assert [code.value for code in await client.subscribe(topic)] == [0x80]  # type: ignore[union-attr]
        await client.subscribe("feed/paper/ticker/BTC_USDT")
        granted = [code.value for code in await other.subscribe(topic)]  # type: ignore[union-attr]
        assert granted == [0x80 if topic.startswith("$MQTT") else 0]  # which nobody may have over MQTT
        await operator.publish(said, b"secret")
        await operator.publish(FEED, b"open")
        message = await next_message(client)
        assert (str(message.topic), message.payload) == ("feed/paper/ticker/BTC_USDT", b"open")
        if not said.startswith("$"):  # a topic with $ is never sent to a wildcard
            assert (await next_message(other)).payload == b"secret"


async def _say_all(client: aiomqtt.Client, topic: str, payload: bytes) -> None:
    """Messages of both qualities, one to be retained, and one of quality 2, at which the server hangs up: the last will goes out."""
    with contextlib.suppress(aiomqtt.MqttError):
        async with client:
            for qos in (0, 1):
                await client.publish(topic, b"%b %d" % (payload, qos), qos=qos)
            await client.publish(topic, payload + b" kept", qos=1, retain=True)
            with contextlib.suppress(aiomqtt.MqttError):
                await client.publish(topic, payload + b" 2", qos=2, timeout=0.1)
            await next_message(client)  # there is none: it raises when the server hangs up, and TimeoutError if it did not


@pytest.mark.parametrize("topic", ["feed/paper/ticker/BTC_USDT", "rpc/paper/ticker", "wish/paper", "tick/x", "beat/paper/0"])
async def test_the_reader_says_nothing_over_mqtt(bus: Bus, topic: str) -> None:
    subject = topic.replace("/", ".")
    await _say_all(bus.mqtt("reader", aiomqtt.Will(topic, b"evil will", qos=1, retain=True)), topic, b"evil")
    await _say_all(bus.mqtt("operator", aiomqtt.Will(topic, b"good will", qos=1, retain=True)), topic, b"good")
    for payload in (b"good 0", b"good 1", b"good kept", b"good will"):
        await bus.saw(subject, payload)
    assert not [payload for seen, payload in bus.seen if payload.startswith(b"evil")]
    async with bus.mqtt("operator") as client:  # what is retained is told first, to whoever comes
        await client.subscribe(topic)
        message = await next_message(client)
        assert (message.payload, message.retain) == (b"good will", True)
        await client.publish(topic, b"", qos=1, retain=True)


async def test_mqtt_is_off_by_default_and_listens_on_this_machine_only(state: Path) -> None:
    def config(path: Path) -> dict[str, object]:
        return msgspec.json.decode(path.read_bytes().partition(b"\n")[2], type=dict)

    assert "mqtt" not in config(server.write_config(state))
    assert config(server.write_config(state, 1883))["mqtt"] == {"listen": "127.0.0.1:1883", "reject_qos2_publish": True}


async def test_a_state_folder_of_before_gets_the_reader_and_keeps_its_other_passwords(state: Path) -> None:
    before = server.settings(state)
    del before.passwords["reader"]
    path = state / "nats" / "settings.json"
    path.write_bytes(msgspec.json.encode(before))
    after = server.settings(state)
    assert len(after.passwords.pop("reader")) == 32
    assert after == before
    assert path.stat().st_mode & 0o777 == 0o600
