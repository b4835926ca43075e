"""The conformance suite: our venues pass it, and each planted mistake makes it red, with a reason that names the right check."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests import exchanges
from tests.exchanges import Bitgo
from workers.check import Report, examine, suite
from workers.check.bench import CHECKS
from workers.check.find import venue_class
from workers.template import venue as template
from workers.template.venue import MyExchange
from workers.venues.bitgo import Bitgo as BitgoVenue
from workers.venues.paper.client import Paper

KEYS = ("bitgo-access", "bitgo secret, with + and &")
TEMPLATE = Path(template.__file__)


@asynccontextmanager
async def bitgo() -> AsyncIterator[str]:
    """The stand-in of the other tests, as --exchange tests.test_check_venue:bitgo names it."""
    async with exchanges.serving(Bitgo({KEYS[0]: KEYS[1]}).answer) as exchange:
        yield exchange.url


# ---------------------------------------------------------------- planted mistakes

Edits = list[tuple[str, str]]

SEND = (
    "        answer = await call.send(verb, self._base + target, headers=headers, body=content or None)  # once, and within the deadline\n"
)
BLOCKING = """\
        connection = http.client.HTTPConnection(self._base.removeprefix("http://"), timeout=1)
        with contextlib.closing(connection):
            connection.request(verb, target, content, headers)
            response = connection.getresponse()
            answer = Answer(response.status, response.headers, response.read(), call)
"""
TRIED = "        try:\n    " + SEND

MISTAKES: dict[str, tuple[Edits, str, str]] = {
    # mistake: (edits of the template, the check that must name it, what it must have seen)
    "records in ms": ([("m.Candle(row[0] // 1000,", "m.Candle(row[0],")], "records", r"is ms; expected whole SECONDS"),
    "depth reversed": ([("sorted(bids, reverse=True)", "sorted(bids)")], "depth", r"bids do not descend"),
    "trades descending": ([("in sorted(tape)]", "in sorted(tape, reverse=True)]")], "trades", r"times do not ascend"),
    "float amounts": (
        [('"amount": m.plain(params.amount)}', '"amount": str(float(params.amount))}')],
        "numbers-exact",
        r"amount 0\.00000001 was sent as .*1e-08",
    ),
    "retry on a failure": (
        [(SEND, TRIED + "        except BusError:\n    " + SEND)],
        "writes-sent-once",
        r"no answer in time.*the exchange got it 2 times",
    ),
    "timeout told as refusal": (
        [(SEND, TRIED + "        except BusError as e:\n            raise VenueRejected(str(e)) from e\n")],
        "orders-unclear",
        r"no answer in time.*venue_rejected: .*expected outcome unknown",
    ),
    "id through float": (
        [('return m.Placed(str(row["id"]))', 'return m.Placed(str(int(float(row["id"]))))')],
        "ids-large",
        r"the exchange said 9007199254740993123, the host is told '900719925474099\d+'",
    ),
    "swallowed error code": (
        [("if answer.status >= 400:", "if answer.status >= 500:")],
        "cancel-refused",
        r'the exchange said {"code":2012',
    ),
    "error told without the exchange's words": (
        [("(f\"{call.exchange} {reply['code']} {reply['message']}\")", '("refused")')],
        "refusals",
        r"the exchange said 'amount: 9000000000 .*the host reads 'refused'",
    ),
    "None for an unknown order": (
        [
            (
                '        return order(await self._send(call, "GET", f"/orders/{quote(params.id, safe=\'\')}"))\n',
                '        try:\n            return order(await self._send(call, "GET", f"/orders/{quote(params.id, safe=\'\')}"))\n'
                "        except NotFound:\n            return None\n",
            )
        ],
        "order-unknown",
        r"order answered null for the unknown id",
    ),
    "cancel not looked at": (
        [
            (
                '        await self._send(call, "DELETE", f"/orders/{quote(params.id, safe=\'\')}")\n',
                '        try:\n            await self._send(call, "DELETE", f"/orders/{quote(params.id, safe=\'\')}")\n'
                "        except VenueRejected:\n            pass\n",
            )
        ],
        "cancel-refused",
        r"cancel answered true",
    ),
    "key in error text": (
        [("{reply['message']}\")", "{reply['message']} {headers}\")")],
        "keys-kept",
        r"the worker had to blank a key in the error text",
    ),
    "public call signed": (
        [
            (
                '"GET", "/ticker", {"symbol": instrument(params.symbol)}, signed=False',
                '"GET", "/ticker", {"symbol": instrument(params.symbol)}',
            )
        ],
        "public-honest",
        r"ticker is public, and sends a key: header paper-key",
    ),
    "market buy in base": (
        [('("quote_amount" if params.side == "buy" else "amount")', '"amount"')],
        "market-orders",
        r"was amount taken as base\?|not enough|insufficient",
    ),
    "symbols with regard to case": (
        [("SYMBOLS.get(symbol.upper(), symbol.upper())", "SYMBOLS.get(symbol, symbol)")],
        "symbols-any-case",
        r"btc_usdt: ticker answered venue_rejected",
    ),
    "an order id that may be missing": (
        [('        if not row.get("id"):\n            raise call.unclear("without an order id")', "        if False:\n            pass")],
        "orders-without-id",
        r"null for the id trade answered",
    ),
    "a client order id that is not sent": (
        [(', "client_order_id": call.client_order_id}', "}")],
        "lookups-honest",
        r"was not sent with the order",
    ),
    "a cancellation swallowed": (
        [(SEND, TRIED + '        except BaseException as e:\n            raise call.unclear("nothing") from e\n')],
        "cancellation",
        r"the cancelled call went on and answered",
    ),
    "a lock held while waiting": (
        [
            (SEND, "        async with self._lock:\n    " + SEND),
            ("        self._base = (", "        self._lock = asyncio.Lock()\n        self._base = ("),
            ("import hmac\n", "import asyncio\nimport hmac\n"),
        ],
        "slow-calls-apart",
        r"while ticker waited for the exchange depth answered timed_out",
    ),
    "keys remembered": (
        [
            (
                "secret, timestamp = call.credentials.secret_key",
                "self._keys = getattr(self, '_keys', None) or call.credentials\n            secret, timestamp = self._keys.secret_key",
            ),
            ('"Paper-Key": call.credentials.access_key', '"Paper-Key": self._keys.access_key'),
        ],
        "keys-per-call",
        r"shows the first account's: header paper-key",
    ),
    "an address of its own": (
        [("(settings.base_url or BASE_URL)", "BASE_URL")],
        "base-url",
        r"no request came to",
    ),
    "an HTTP client of its own that blocks": (
        [
            (SEND, BLOCKING),
            ("import hmac\n", "import contextlib\nimport hmac\nimport http.client\n"),
            ("from workers.http import Call\n", "from workers.http import Answer, Call\n"),
        ],
        "slow-calls-apart",
        r"ticker blocked the event loop",
    ),
}


def planted(folder: Path, number: int, edits: Edits) -> type[Any]:
    text = TEMPLATE.read_text()
    for old, new in edits:
        assert text.count(old) == 1, f"the template has {text.count(old)} times {old!r}"
        text = text.replace(old, new)
    path = folder / f"planted{number}.py"
    path.write_text(text)
    return venue_class(str(path))


@pytest_asyncio.fixture(scope="module")
async def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """All reports, several at a time: most of a report's time is waiting for an exchange that says nothing."""
    folder = tmp_path_factory.mktemp("planted")
    some = asyncio.Semaphore(12)
    found: dict[str, Report] = {}

    async def report(name: str, venue: type[Any], **options: Any) -> None:
        async with some:
            found[name] = await examine(venue, **options)

    async with suite.paper_exchange() as base_url, asyncio.TaskGroup() as group:
        for number, (mistake, (edits, _, _)) in enumerate(MISTAKES.items()):
            group.create_task(report(mistake, planted(folder, number, edits), base_url=base_url))
        group.create_task(report("paper", Paper))
        group.create_task(report("template", MyExchange))
        group.create_task(report("bitgo", BitgoVenue, exchange=bitgo, keys=KEYS, symbol="BTC_CNY"))
    return found


# ---------------------------------------------------------------- our own venues


def not_judged(report: Report) -> set[str]:
    """The checks that did not apply. Fails with the report where the venue does not conform."""
    assert report.ok, str(report)
    return {finding.name for finding in report.findings if finding.verdict == "na"}


async def test_paper_conforms(reports: dict[str, Report]) -> None:
    assert not_judged(reports["paper"]) == set()


async def test_bitgo_conforms(reports: dict[str, Report]) -> None:
    assert not_judged(reports["bitgo"]) == {
        "positions",  # it trades no contracts
        "symbols-unknown",  # the stand-in answers any market
        "market-orders",  # the stand-in fills nothing
        "lookups-honest",  # it declares none
    }


async def test_the_template_conforms(reports: dict[str, Report]) -> None:
    assert not_judged(reports["template"]) == {"positions", "raw-calls-confined"}
    assert len(reports["template"].findings) == len(CHECKS) == 34


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_a_planted_mistake_is_named(mistake: str, reports: dict[str, Report]) -> None:
    _, name, seen = MISTAKES[mistake]
    failed = {finding.name: finding for finding in reports[mistake].failed}
    assert name in failed, str(reports[mistake])
    assert re.search(seen, failed[name].seen, re.S | re.I), failed[name].seen
    assert re.match(r"planted\d+\.py:\d+ MyExchange", failed[name].look_at), failed[name].look_at


async def test_a_venue_that_cannot_be_seen_is_not_judged_further(reports: dict[str, Report]) -> None:
    report = reports["an address of its own"]
    assert [finding.name for finding in report.failed] == ["base-url"]
    assert {finding.verdict for finding in report.findings[1:]} == {"na"}


@pytest.mark.parametrize(
    "mistake", ["records in ms", "depth reversed", "trades descending", "float amounts", "id through float", "key in error text"]
)
async def test_nothing_else_is_blamed(mistake: str, reports: dict[str, Report]) -> None:
    assert [finding.name for finding in reports[mistake].failed] == [MISTAKES[mistake][1]]
