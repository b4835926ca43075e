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
from tests.check_mistakes import LOSSES, MISTAKES, Edits
from tests.exchanges import Bitgo
from workers.check import Report, examine, suite
from workers.check.bench import CHECKS
from workers.check.find import venue_class
from workers.http import Call
from workers.template import venue as template
from workers.template.venue import MyExchange
from workers.venues.bitgo import Bitgo as BitgoVenue
from workers.venues.paper.client import Paper

pytestmark = pytest.mark.slow

KEYS = ("bitgo-access", "bitgo secret, with + and &")
TEMPLATE = Path(template.__file__)


@asynccontextmanager
async def bitgo() -> AsyncIterator[str]:
    """The stand-in of the other tests, as --exchange tests.test_check_venue:bitgo names it."""
    async with exchanges.serving(Bitgo({KEYS[0]: KEYS[1]}).answer) as exchange:
        yield exchange.url


# ---------------------------------------------------------------- planted mistakes


class Endless(Paper):
    """Says that its orders carry an expiry, and sends none."""

    async def _signed(
        self, call: Call, verb: str, path: str, params: dict[str, str] | None = None, body: Any = None, *, write: bool | None = None
    ) -> Any:
        if isinstance(body, dict):
            body.pop("expires_at", None)
        return await super()._signed(call, verb, path, params, body, write=write)


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
            group.create_task(report(mistake, planted(folder, number, edits), base_url=base_url, paper=True))
        for number, (mistake, (edits, name, _)) in enumerate(LOSSES.items(), len(MISTAKES)):
            only = {name, "accounts"}  # a call whose keys can be looked for
            group.create_task(report(mistake, planted(folder, number, edits), base_url=base_url, paper=True, only=only))
        group.create_task(report("paper", Paper))
        group.create_task(report("an expiry that is not sent", Endless, only={"expiry-honest"}))
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
        "balances-frozen",  # its balances stand still
        "lookups-honest",  # it declares none
        "expiry-honest",  # its orders have none
    }


async def test_an_expiry_that_is_told_and_not_sent_is_found(reports: dict[str, Report]) -> None:
    """Such an order may be executed after it was proven absent."""
    (finding,) = reports["an expiry that is not sent"].failed
    assert finding.name == "expiry-honest"
    assert re.match(r"an order that came 1\.5 s after its expiry was executed as '\d+'", finding.seen), finding.seen


async def test_the_template_conforms(reports: dict[str, Report]) -> None:
    assert not_judged(reports["template"]) == {"positions", "raw-calls-confined", "expiry-honest"}
    assert len(reports["template"].findings) == len(CHECKS) == 36


@pytest.mark.parametrize("mistake", [*MISTAKES, *LOSSES])
async def test_a_planted_mistake_is_named(mistake: str, reports: dict[str, Report]) -> None:
    _, name, seen = (MISTAKES | LOSSES)[mistake]
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
