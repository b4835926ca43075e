"""The conformance suite's parts: its report, how a venue is found, what the proxy reads and passes on."""

import asyncio
import re
import time
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import server
from bus.config import Venue
from bus.messages import Market, OrderRef, Placed, Ticker, Trade
from tests import exchanges
from tests.check_mistakes import MISTAKES
from tests.test_check_venue import TEMPLATE, planted
from workers.check import Finding, NotConforming, Report, boundary, check, examine, proxy, suite
from workers.check.bench import CHECKS
from workers.check.find import NotFound, venue_class
from workers.check.wire import Message, Seen, digits, numbers, read
from workers.http import Call
from workers.template.venue import MyExchange
from workers.venues.bitgo import Bitgo as BitgoVenue
from workers.venues.paper.client import Paper

pytestmark = pytest.mark.slow


async def test_a_failed_check_reads_well_in_a_test(tmp_path: Path) -> None:
    venue = planted(tmp_path, 99, MISTAKES["records in ms"][0])
    with pytest.raises(NotConforming) as raised:
        await check(venue, only=["ticker", "records"])
    lines = str(raised.value).splitlines()
    assert lines[1] == "planted99:MyExchange, against a paper exchange of its own"
    assert re.fullmatch(r"ok     ticker   buy [\d.]+, sell [\d.]+", lines[3])
    assert lines[4:8] == ["FAIL   records  see below", "", "FAIL records", f"  expected  {CHECKS['records'].expects}"]
    assert re.fullmatch(r"  seen      time of a bar: \d{13} is ms; expected whole SECONDS", lines[8])
    assert re.fullmatch(r"  look at   planted99\.py:\d+ MyExchange\.records", lines[9])
    assert lines[10] == "  protocol  FMZ general protocol: records"


async def test_an_exempt_check_may_fail_and_says_why(tmp_path: Path) -> None:
    venue = planted(tmp_path, 98, MISTAKES["records in ms"][0])
    (finding,) = (await check(venue, only=["records"], exempt={"records": "known"})).findings
    assert (finding.verdict, finding.seen[:12]) == ("exempt", "known (time ")


async def test_names_that_are_no_checks_are_refused() -> None:
    with pytest.raises(ValueError, match="no check named tickr; there are "):
        await examine(MyExchange, only=["tickr"])


async def test_orders_go_to_a_far_exchange_only_when_allowed() -> None:
    """The address is one that is kept for documentation: nothing is there, and nothing is placed."""
    report = await examine(MyExchange, base_url="http://192.0.2.1", only=["market-orders", "writes-sent-once", "refusals"])
    assert {finding.verdict for finding in report.findings} == {"na"}
    assert "allow it with --trade" in report.findings[0].seen


class Few:
    """A venue that tells prices only."""

    public = frozenset({"ticker"})
    contracts = False
    lookups = frozenset[str]()

    def __init__(self, name: str, settings: Venue) -> None:
        self._whole = MyExchange(name, settings)

    async def ticker(self, call: Call, params: Market) -> Ticker:
        return await self._whole.ticker(call, params)


async def test_what_a_venue_does_not_offer_is_not_judged() -> None:
    report = await check(Few)
    judged = {finding.name for finding in report.findings if finding.verdict == "ok"}
    assert judged == {
        *("base-url", "ticker", "symbols-any-case", "symbols-unknown", "reads-fail-as-transport"),
        *("rate-limits", "deadline", "cancellation", "public-honest", "keys-kept"),
    }
    assert "hosts read `depth not support`" in str(report)


class Unmade(Few):
    def __init__(self) -> None:
        raise AssertionError("never gets here")


async def test_a_venue_that_cannot_be_made_is_a_finding() -> None:
    (finding,) = (await examine(Unmade)).findings
    assert finding.seen.startswith("Unmade(name, settings) raised TypeError: ")
    assert re.fullmatch(r"test_check_parts\.py:\d+ Unmade\.__init__", finding.look_at)


async def test_an_exchange_that_cannot_be_reached_is_said_once() -> None:
    report = await examine(MyExchange, base_url=f"http://127.0.0.1:{server.free_port()}")
    (failed,) = report.failed
    assert failed.name == "base-url"
    assert re.match(r"the exchange at 127\.0\.0\.1:\d+ cannot be reached: ", failed.seen)


def test_every_check_says_what_it_expects_and_where_to_look() -> None:
    first, *_, last = suite.in_order()
    assert (first.name, last.name) == ("base-url", "keys-kept")
    for one in CHECKS.values():
        assert len(one.expects) > 20, one.name
        assert len(one.section) > 3, one.name


def test_a_venue_is_found_by_file_class_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "found.py").write_text(TEMPLATE.read_text().replace("class MyExchange:", "class Found:"))
    for target in ("found.py", "found", "found.py:Found", "found:Found", str(tmp_path / "found.py")):
        assert venue_class(target).__name__ == "Found", target
    assert venue_class("paper") is Paper
    (tmp_path / "fmzbus.toml").write_text('[venues.mine]\nclass = "found:Found"\n[venues.tokyo]\nexchange = "bitgo"\n')
    assert venue_class("mine").__name__ == "Found"
    assert venue_class("tokyo") is BitgoVenue


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nobody", "no file nobody.py here, and no venue of that name; there are bitgo, null, paper"),
        ("nobody.py", "nobody.py: no such file"),
        ("no.such:Class", "No module named 'no'"),
        ("two.py", "expected one class with a ticker(), found One, Two; say two.py:Class"),
        ("two.py:Three", "there is no class Three in two"),
    ],
)
def test_a_venue_that_is_not_there(target: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.py").write_text("class One:\n    ticker = 1\n\nclass Two(One):\n    pass\n")
    with pytest.raises(NotFound, match=re.escape(said)):
        venue_class(target)


# ---------------------------------------------------------------- the wire


async def fed(content: bytes, *, answer: bool) -> Message | None:
    reader = asyncio.StreamReader()
    reader.feed_data(content)
    reader.feed_eof()
    return await read(reader, answer=answer)


@pytest.mark.parametrize(
    ("content", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcd", b"abc"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\nT: 1\r\n\r\n", b"abc"),
        (b"HTTP/1.1 200 OK\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 204 No Content\r\n\r\nabc", b""),
    ],
    ids=["length", "chunked", "to the end", "none"],
)
async def test_an_answer_is_read_whole(content: bytes, body: bytes) -> None:
    message = await fed(content, answer=True)
    assert message is not None
    assert message.body == body
    again = await fed(message.encode(connection="close"), answer=True)
    assert again is not None
    assert (again.body, again.header("connection"), again.header("transfer-encoding")) == (body, "close", "")


@given(st.binary(), st.booleans())
def test_any_bytes_are_a_message_or_an_error_that_the_proxy_knows(content: bytes, answer: bool) -> None:  # noqa: FBT001 - hypothesis gives it
    with suppress(EOFError, ValueError, asyncio.LimitOverrunError):
        asyncio.run(fed(b"GET / HTTP/1.1\r\n" + content, answer=answer))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"amount":"0.0110","x":1e-8}', ["0.0110", "1e-8"]),
        ("a=1&b=-2.5", ["1", "-2.5"]),
        ("sign=a1b2c3", []),
        ("1.2.3", []),
    ],
)
def test_numbers_of_a_request(text: str, found: list[str]) -> None:
    assert list(numbers(text)) == found


def test_digits_say_whether_two_numbers_are_one() -> None:
    assert digits("0.0110") == digits("11") == digits("0.011") == "11"
    assert digits("0.0101") == "101"
    assert digits("1e-08") == ""


def test_a_key_is_found_in_whatever_form_it_was_sent() -> None:
    seen = Seen("GET", "/a?key=pass%2Bw+d%26", [("X-Key", "plain-key")], b"body=abcdefgh", 1)
    assert (seen.shows("pass+w d&"), seen.shows("plain-key"), seen.shows("abcdefgh"), seen.shows("nowhere-in-it")) == (
        "the path or query",
        "header X-Key",
        "the body",
        "",
    )
    assert seen.shows("a") == "", "what is too short stands everywhere by chance"


async def test_the_proxy_passes_on_what_it_gets() -> None:
    """Target, headers and body byte for byte; an exchange that is not there is a 502."""
    async with (
        exchanges.serving(lambda seen: exchanges.json({"path": seen.path, "query": seen.query})) as exchange,
        proxy.serving(f"{exchange.url}/prefix") as between,
    ):
        assert between.url.endswith("/prefix")
        answer = await asked(between, b"POST /prefix/a%20b?c=%2B HTTP/1.1\r\nHost: x\r\nX-One: 1\r\nContent-Length: 2\r\n\r\nhi")
        assert msgspec.json.decode(answer.body) == {"path": "/prefix/a b", "query": {"c": "+"}}
        (seen,) = exchange.requests
        assert (seen.verb, seen.headers["X-One"], seen.body) == ("POST", "1", b"hi")
        assert f"http://{seen.headers['Host']}" == exchange.url
        (noted,) = between.seen
        assert (noted.target, noted.status, noted.answer) == ("/prefix/a%20b?c=%2B", 200, answer.body)
    async with proxy.serving(exchange.url) as between:
        assert (await asked(between, b"GET / HTTP/1.1\r\n\r\n")).start.startswith("HTTP/1.1 502 ")


async def asked(between: proxy.Proxy, request: bytes) -> Message:
    """One request by a bare client."""
    host, _, port = between.url.removeprefix("http://").partition("/")[0].partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request)
        answer = await read(reader, answer=True)
        assert answer is not None
        return answer
    finally:
        writer.transport.abort()


def test_a_report_counts_by_verdict() -> None:
    findings = [Finding("a", "ok", "", "", "", ""), Finding("b", "na", "", "why", "", "")]
    assert str(Report("v", "e", findings, 1.0)).endswith("2 checks in 1.0 s: 1 ok, 1 n/a")


# ---------------------------------------------------------------- files that break


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("x = 1\ndef broken(:\n", r"bad0\.py:2: SyntaxError: .+"),
        ("import sys\n\nsys.exit(0)\n", r"bad1\.py:3: SystemExit: 0"),
        ("import json\njson.loads('{')\n", r"bad2\.py:2: JSONDecodeError: .+"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / f"{said[:4]}.py"
    path.write_text(content)
    with pytest.raises(NotFound) as raised:
        venue_class(str(path))
    assert re.fullmatch(said, str(raised.value)), str(raised.value)


class Slow(Few):
    def __init__(self, name: str, settings: Venue) -> None:
        time.sleep(1)
        super().__init__(name, settings)


class Leaving(Few):
    def __init__(self, name: str, settings: Venue) -> None:
        raise SystemExit(0)


@pytest.mark.parametrize(("venue", "said"), [(Slow, "did not return within 0 s"), (Leaving, "raised SystemExit: 0")])
async def test_a_constructor_that_blocks_or_ends_the_process_is_a_finding(
    venue: type[Few], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boundary, "MAKING_S", 0.3)
    (finding,) = (await examine(venue)).findings
    assert finding.seen == f"{venue.__name__}(name, settings) {said}"


async def test_no_order_stays_open_when_a_person_ends_the_checks() -> None:
    """Cancelled, as by Ctrl-C, when the first order has been placed: the last request of all cancels it."""
    placed = asyncio.Event()
    told: list[str] = []

    class Watched(MyExchange):
        async def trade(self, call: Call, params: Trade) -> Placed:
            answer = await super().trade(call, params)
            told.append(str(answer.id))
            loop.call_soon_threadsafe(placed.set)
            return answer

        async def cancel(self, call: Call, params: OrderRef) -> bool:
            done = await super().cancel(call, params)
            told.remove(params.id)
            return done

    loop = asyncio.get_running_loop()
    running = asyncio.create_task(examine(Watched, only=["orders"]))
    await placed.wait()
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert told == []
