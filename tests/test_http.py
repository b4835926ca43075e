"""One call to an exchange that fails in every way a real one does, seen from the host: a write is sent once and never called failed."""

import asyncio
import hmac
import itertools
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytest_asyncio
from msgspec import Raw

from bus import logs, seal, server
from bus.config import Venue
from bus.connection import Bus
from bus.errors import SILENCED, Expired, OutcomeUnknown, RateLimited
from bus.messages import Balance, Empty, Failure, Reply, Request, decode_reply, encode_exact
from bus.metrics import Metrics
from bus.seal import Credentials
from bus.sessions import Sessions
from tests import exchanges, servers
from tests.exchanges import DROPPED, SILENT, Answer, Exchange, json
from tests.host import Host, hosting
from workers.calls import Calls
from workers.http import Call, opened
from workers.venues.bitgo import Bitgo

pytestmark = pytest.mark.slow

UNREADABLE = "bitgo answered in another format than its venue expects, see the worker's log"
HTML = b"<html><body>Bad Gateway</body></html>"


@pytest_asyncio.fixture(scope="module")
async def exchange() -> AsyncIterator[Exchange]:
    async with exchanges.serving() as exchange:
        # The paper venue reads the markets before it trades, and looks an unclear order up: nobody knows of either here.
        exchange.aside = {"/markets": Answer(b"{}", 503), "/by-client-id/": json({"code": 2011}, 404), "/time": json({"time": 0})}
        yield exchange


@pytest_asyncio.fixture(scope="module")
async def system(exchange: Exchange, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[servers.System]:
    """One worker, so that its kept-alive connections are the ones the next request uses. `dead` is an address where nobody listens."""
    settings: dict[str, object] = {
        "paper__enabled": "false",
        "venues__bitgo__base_url": exchange.url,
        "venues__bitgo__timeout_s": 1.5,
        "venues__paper__base_url": exchange.url,
        "venues__dead__exchange": "bitgo",
        "venues__dead__base_url": f"http://127.0.0.1:{server.free_port()}",
    }
    async with servers.system(tmp_path_factory.mktemp("s"), "--workers", "1", **settings) as system:
        yield system


@pytest_asyncio.fixture
async def host(system: servers.System) -> AsyncIterator[Host]:
    async with hosting(system.address) as host:
        yield host


AMOUNTS = itertools.count(1)


async def buy(host: Host, path: str = "bitgo") -> dict[str, Any]:
    """An order unlike those before: an equal one would be refused while one of them is unknown."""
    return await host(path, "trade", symbol="BTC_CNY", type="buy", price="1000", amount=str(next(AMOUNTS)))


FAULTS: dict[str, tuple[Answer, str]] = {
    "no answer": (SILENT, r"no answer from bitgo within 1\.5 s"),
    "a connection dropped after reading": (DROPPED, "bitgo broke off before it had answered"),
    "a connection dropped in the middle of the answer": (Answer(b'{"code":200,', cut=True), "bitgo broke off before it had answered"),
    "503 with JSON": (json({"code": 200, "orderId": 7}, 503), "bitgo answered 503"),
    "500 without anything": (Answer(b"", 500), "bitgo answered 500"),
    "502 with HTML": (Answer(HTML, 502, {"Content-Type": "text/html"}), "bitgo answered 502"),
    "200 with HTML": (Answer(HTML, 200, {"Content-Type": "text/html"}), "bitgo answered something that is not JSON"),
    "200 with half a JSON": (Answer(b'{"code":200,"orderId":'), "bitgo answered something that is not JSON"),
    "200 with nothing": (Answer(b""), "bitgo answered something that is not JSON"),
    "200 with another JSON": (json([1, 2]), "bitgo answered without a code"),
    "200 with bad UTF-8": (Answer(b'{"code":"\xff"}'), "bitgo answered something that is not JSON"),
    "200 with endless nesting": (Answer(b"[" * 100_000), "bitgo answered something that is not JSON"),
    "a redirect": (Answer(b"", 307, {"Location": "/appApi.html?action=trade"}), "bitgo answered 307"),
    "a permanent redirect": (Answer(b"", 301, {"Location": "/elsewhere"}), "bitgo answered 301"),
}
TRADE_FAULTS = FAULTS | {
    "200 without an order id": (json({"code": 200}), "bitgo answered without an order id"),
    "200 with null for an order id": (json({"code": 200, "orderId": None}), "bitgo answered without an order id"),
    "200 with an order id that is none": (json({"code": 200, "orderId": {}}), UNREADABLE),
    "200 with a code that is none": (json({"code": "fine", "orderId": 7}), UNREADABLE),
    "a refusal that is no JSON": (Answer(HTML, 403), "bitgo answered something that is not JSON"),
}


@pytest.mark.parametrize("fault", TRADE_FAULTS)
async def test_an_order_with_an_unclear_answer_is_unknown_and_was_sent_once(host: Host, exchange: Exchange, fault: str) -> None:
    answer, what = TRADE_FAULTS[fault]
    exchange.will(answer)
    text = (await buy(host))["error"]
    assert re.fullmatch(
        rf"outcome unknown: {what}; the order may be alive, look before you repeat it; client order id [0-9a-f]{{32}}", text
    )
    assert not SILENCED.search(text)
    assert len(exchange.requests) == 1


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_cancel_with_an_unclear_answer_is_unknown_and_was_sent_once(host: Host, exchange: Exchange, fault: str) -> None:
    answer, what = FAULTS[fault]
    exchange.will(answer)
    text = (await host("bitgo", "cancel", symbol="BTC_CNY", id="7"))["error"]
    assert re.fullmatch(f"outcome unknown: {what}; the order may be alive, look before you repeat it", text)  # it placed none: no id
    assert len(exchange.requests) == 1


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_read_with_an_unclear_answer_is_a_silenced_transport_error(host: Host, exchange: Exchange, fault: str) -> None:
    answer, what = FAULTS[fault]
    exchange.will(answer)
    text = (await host("bitgo", "accounts"))["error"]
    assert re.fullmatch(f"(network|timeout): {what}", text)
    assert SILENCED.search(text)
    assert len(exchange.requests) == 1


@pytest.mark.parametrize("verb", ["PUT", "DELETE", "POST", "PATCH"])
@pytest.mark.parametrize("fault", [DROPPED, Answer(b"{", cut=True)], ids=["dropped", "cut"])
async def test_a_raw_write_on_a_connection_that_turns_out_dead_is_sent_once(
    host: Host, exchange: Exchange, verb: str, fault: Answer
) -> None:
    """aiohttp would repeat PUT and DELETE by itself on a connection that it had used before."""
    exchange.will(json({"fine": 1}), fault)
    headers = {"Http-Method": verb}
    assert await host("paper", "__api_/raw", headers=headers, n="1") == {"data": {"fine": 1}}
    text = (await host("paper", "__api_/raw", headers=headers, n="2"))["error"]
    assert text.startswith("outcome unknown: paper broke off before it had answered; ")
    assert [seen.verb for seen in exchange.requests] == [verb, verb]
    assert exchange.requests[0].connection == exchange.requests[1].connection


async def test_a_cancel_by_delete_on_a_connection_that_turns_out_dead_is_sent_once(host: Host, exchange: Exchange) -> None:
    exchange.will(json({"id": "1"}), DROPPED)
    assert "data" in await host("paper", "cancel", symbol="BTC_USDT", id="1")
    assert (await host("paper", "cancel", symbol="BTC_USDT", id="1"))["error"].startswith("outcome unknown: ")
    assert [(seen.verb, seen.path) for seen in exchange.requests] == [("DELETE", "/api/v1/orders/1")] * 2


@pytest.mark.parametrize("fault", [Answer(HTML, 502), DROPPED, json({"status": "open"})], ids=["502", "dropped", "no id"])
async def test_an_unclear_order_names_the_id_that_the_exchange_got(host: Host, exchange: Exchange, fault: Answer) -> None:
    exchange.will(fault)
    text = (await buy(host, "paper"))["error"]
    assert text.startswith("outcome unknown: paper ")
    sent = re.search(rb'"client_order_id":"([0-9a-f]{32})"', exchange.requests[0].body)
    assert sent
    assert text.endswith(f"client order id {sent[1].decode()}")


async def test_where_nobody_listens_nothing_was_sent(host: Host, exchange: Exchange) -> None:
    exchange.will()
    assert await buy(host, "dead") == {"error": "network: no connection to dead"}
    assert await host("dead", "cancel", symbol="BTC", id="7") == {"error": "network: no connection to dead"}
    assert await host("dead", "ticker", symbol="BTC") == {"error": "network: no connection to dead"}
    assert exchange.requests == []


@pytest.mark.parametrize("status", [418, 429])
@pytest.mark.parametrize(("wait", "when"), [("7", "in 7 s"), ("Wed, 21 Oct 2037 07:28:00 GMT", "later"), (None, "later")])
async def test_a_limit_says_how_long_to_wait_and_that_nothing_was_placed(
    host: Host, exchange: Exchange, status: int, wait: str | None, when: str
) -> None:
    limited = Answer(b"{}", status, {"Retry-After": wait} if wait else {})
    exchange.will(limited, limited)
    text = f"network busy: bitgo answered {status}, try again {when}; nothing was placed"
    assert await buy(host) == {"error": text}
    assert await host("bitgo", "ticker", symbol="BTC_CNY") == {"error": text}
    assert len(exchange.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422])
async def test_a_refusal_is_a_refusal(host: Host, exchange: Exchange, status: int) -> None:
    exchange.will(json({"code": 2002, "message": "insufficient USDT"}, status), json({"code": 500, "msg": "not enough"}, status))
    assert await buy(host, "paper") == {"error": "paper 2002 insufficient USDT"}
    assert await buy(host) == {"error": "not enough"}
    assert len(exchange.requests) == 2


async def test_a_slow_exchange_is_left_in_time_to_answer(system: servers.System, exchange: Exchange) -> None:
    """A host that waits 2 s is answered before: of its time a tenth is the bridge's, a fifth of the rest the worker's."""
    exchange.will(SILENT, SILENT)
    async with servers.bridge(system.state, bridge__deadline_s=2) as (_, address), hosting(address) as host:
        assert re.fullmatch(r"timeout: no answer from paper within 1\.4 s", (await host("paper", "ticker", symbol="BTC"))["error"])
        assert re.match(r"outcome unknown: no answer from paper within 1\.4 s; ", (await buy(host, "paper"))["error"])


async def test_an_exchange_that_recovers_is_used_again(host: Host, exchange: Exchange) -> None:
    exchange.will(DROPPED, Answer(HTML, 502), json({"code": 200, "orderId": 7}))
    assert [list(await buy(host)) for _ in range(3)] == [["error"], ["error"], ["data"]]
    assert len(exchange.requests) == 3


async def test_reads_and_writes_use_connections_of_their_own(host: Host, exchange: Exchange) -> None:
    exchange.will(*[json({"code": 200, "orderId": 7, "data": {}})] * 4)
    for _ in range(2):
        await buy(host)
        await host("bitgo", "accounts")
    write, read, write_again, read_again = [seen.connection for seen in exchange.requests]
    assert {write, write_again}.isdisjoint({read, read_again})


@pytest.mark.parametrize(
    ("resource", "target"),
    [
        ("/api/v1/x", "/api/v1/x"),
        ("api/v1/x", "/api/v1/x"),
        ("//elsewhere.example/x", "/elsewhere.example/x"),
        ("@elsewhere.example/x", "/@elsewhere.example/x"),
        ("/a b", "/a%20b"),
        ("/转账", "/%E8%BD%AC%E8%B4%A6"),
        ("/a%20b%2Fc", "/a%20b%2Fc"),
        ("/a?b=c d&e", "/a?b=c%20d&e"),
        ("/a#b", "/a%23b"),
        ('/"<>\\^`{|}', "/%22%3C%3E%5C%5E%60%7B%7C%7D"),
        ("/50%", "/50%"),
    ],
)
async def test_a_raw_call_reaches_its_own_exchange_and_is_signed_as_it_travels(
    host: Host, exchange: Exchange, resource: str, target: str
) -> None:
    exchange.will()
    secret = "raw-secret"
    assert "data" in await host.other("raw-key", secret)("paper", f"__api_{resource}")
    (seen,) = exchange.requests
    assert seen.target == target
    text = "\n".join((seen.headers["Paper-Timestamp"], "", "POST", target, "")).encode() + seen.body
    assert seen.headers["Paper-Sign"] == hmac.new(secret.encode(), text, "sha256").hexdigest()


@pytest.mark.parametrize("resource", ["https://elsewhere.example/x", "http://127.0.0.1:1/x", "ftp://x", "//x@http://y"])
async def test_a_raw_call_to_another_address_is_refused(host: Host, exchange: Exchange, resource: str) -> None:
    exchange.will()
    assert await host("paper", f"__api_{resource}") == {"error": "method: a raw call reaches the paper exchange only"}
    assert exchange.requests == []


# ---------------------------------------------------------------- a venue that fails


ACCESS, SECRET, PEM = "AKdistinctive", "SKdistinctive", "MIIEdistinctivePemLine"


class Rude(Bitgo):
    """Raises what it is told to, with the keys in it."""

    error: type[BaseException] = Exception

    async def accounts(self, call: Call, _params: Empty) -> list[Balance]:
        raise self.error(call.credentials.access_key, call.credentials.secret_key)


async def answered(error: type[BaseException], folder: Path) -> Reply:
    """What a worker replies when its venue raises the error."""
    venue = Rude("rude", Venue())
    venue.error = error
    seal.new_keys(folder)
    key_id, sealed, mac_key = seal.Sealer(folder).box(ACCESS, f"{SECRET},{PEM}\n{PEM}2\n")
    request = Request(
        exchange="rude",
        path="rude",
        method="accounts",
        params=Raw(b"{}"),
        expires_at_ms=10_000,
        idempotency_key="",
        key_id=key_id,
        sealed=sealed,
    )
    bus = cast("Bus", SimpleNamespace(now_ms=Clock()))
    async with opened({}, 10.0, metrics := Metrics()) as http:
        calls = Calls(bus, seal.Opener(folder), cast("Sessions", None), {"rude": cast("Any", venue)}, http, metrics)
        return decode_reply(await calls.answer(seal.frame(encode_exact(request), mac_key)))


@pytest.mark.parametrize("error", [Exception, KeyError, ValueError, asyncio.CancelledError, SystemExit], ids=lambda error: error.__name__)
async def test_whatever_a_venue_raises_is_answered_and_logged_without_keys(
    error: type[BaseException], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reply = await answered(error, tmp_path / "keys")
    assert isinstance(reply, Failure)
    assert "see the worker's log" in reply.message
    (record,) = [record for record in caplog.records if record.name == "workers.calls"]
    line = logs.JsonLines("worker").format(record)
    assert error.__name__ in line
    assert "in accounts" in line
    for secret in (ACCESS, SECRET, PEM):
        assert secret not in line


async def test_a_worker_that_is_stopped_stops(tmp_path: Path) -> None:
    class Stopped(asyncio.CancelledError):
        def __init__(self, *_keys: str) -> None:
            task = asyncio.current_task()
            assert task
            task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(answered(Stopped, tmp_path / "keys"))


# ---------------------------------------------------------------- side calls of a write


class Clock:
    def __init__(self) -> None:
        self.ms = 0

    def __call__(self) -> int:
        return self.ms


@asynccontextmanager
async def calling(clock: Clock) -> AsyncIterator[Call]:
    """An order on its way through a venue, with 10 s until its deadline."""
    async with opened({}, 10.0, Metrics()) as http:
        yield Call(
            http,
            exchange="x",
            path="x",
            credentials=Credentials("", ""),
            account="",
            client_order_id="id7",
            expires_at_ms=10_000,
            now_ms=clock,
            write=True,
        )


async def test_what_fails_beside_an_order_that_was_sent_does_not_call_it_unplaced(exchange: Exchange) -> None:
    clock = Clock()
    async with calling(clock) as call:
        exchange.will(json({}), Answer(b"{}", 429))
        await call.send("POST", exchange.url)
        with pytest.raises(OutcomeUnknown) as limited:
            await call.send("GET", exchange.url, write=False)
        clock.ms = 9_500
        with pytest.raises(OutcomeUnknown) as late:
            await call.send("GET", exchange.url, write=False)
    rest = "; the order may be alive, look before you repeat it; client order id id7"
    assert str(limited.value) == "x answered 429, try again later" + rest
    assert str(late.value) == "too little time is left to call the exchange" + rest


async def test_what_fails_before_an_order_was_sent_says_that_nothing_was(exchange: Exchange) -> None:
    clock = Clock()
    async with calling(clock) as call:
        exchange.will(Answer(b"{}", 429), Answer(b"{}", 429))
        for write in (False, True):
            with pytest.raises(RateLimited, match="; nothing was placed"):
                await call.send("POST", exchange.url, write=write)
        clock.ms = 9_500
        with pytest.raises(Expired, match="; nothing was sent"):
            await call.send("POST", exchange.url)


async def test_an_order_that_was_here_before_and_cannot_be_looked_up_is_unknown(host: Host, exchange: Exchange) -> None:
    exchange.will(json({"code": 2013, "message": "used before"}, 409))
    found, exchange.aside["/by-client-id/"] = exchange.aside["/by-client-id/"], Answer(b"{}", 429)
    text = (await buy(host, "paper"))["error"]
    exchange.aside["/by-client-id/"] = found
    assert text.startswith("outcome unknown: paper answered 429, try again later; the order may be alive, ")
    assert [seen.verb for seen in exchange.requests] == ["POST"]


async def test_a_raw_call_to_bitgo_is_a_write_and_no_other_verb_hides_that(host: Host, exchange: Exchange) -> None:
    exchange.will(DROPPED)
    text = (await host("bitgo", "__api_cancel_borrow"))["error"]
    told = "outcome unknown: bitgo broke off before it had answered; the order may be alive, look before you repeat it"
    assert re.fullmatch(f"{told}; journal key [0-9a-f]{{32}}", text)
    text = (await host("bitgo", "__api_cancel_borrow", headers={"Http-Method": "GET"}))["error"]
    assert text == "method: expected POST, every raw call of this exchange is a write"
    assert len(exchange.requests) == 1
