"""The suite: an exchange, a proxy before it, a worker with the venue, and one check after the other."""

import asyncio
import contextlib
import inspect
import ipaddress
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bus import config, server
from workers.check import boundary, conduct, faults, orders, proxy, refusals, shapes
from workers.check.bench import CHECKS, Bench, Check, NotApplicable, Settings, Wrong, where
from workers.check.report import Finding, NotConforming, Report
from workers.venues.paper import server as paper

MODULES = [module.__name__ for module in (shapes, orders, refusals, faults, conduct)]
"""In this order; keys-kept, which looks back on all the others, is the last."""
LONGEST_S = 60.0
CLEANING_S = 10.0

OWN = "a paper exchange of its own"

Exchange = Callable[[], AbstractAsyncContextManager[str]]
"""What starts an exchange to check against, and yields its base_url."""


@asynccontextmanager
async def paper_exchange() -> AsyncIterator[str]:
    """A paper exchange of its own, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="fmzbus-check-") as folder:
        async with paper.serving(state=Path(folder), host="127.0.0.1", port=0, seed=1) as port:
            yield f"http://127.0.0.1:{port}"


def in_order() -> list[Check]:
    """Every check, in the order in which they are made."""
    return sorted(CHECKS.values(), key=lambda one: MODULES.index(one.run.__module__))


async def check(venue: type[Any], **options: Any) -> Report:
    """Check a venue in a test of its own: `await check(MyVenue)`. Options as of examine(). Raises NotConforming with the report as text."""
    report = await examine(venue, **options)
    if not report.ok:
        raise NotConforming(f"\n{report}")
    return report


async def examine(
    venue: type[Any],
    *,
    base_url: str = "",
    exchange: Exchange | None = None,
    keys: tuple[str, str] | None = None,
    symbol: str = "BTC_USDT",
    price: Decimal | None = None,
    amount: Decimal | None = None,
    trade: bool = False,
    only: Iterable[str] = (),
    exempt: Mapping[str, str] | None = None,
    against: str = "",
    paper: bool = False,
) -> Report:
    """Check a venue.

    base_url: of the exchange to check against; exchange: starts one instead; neither: a paper exchange of its own.
    keys: of an account there; made up where none are given, which the paper exchange takes.
    trade: also place small orders where base_url is not on this machine. amount, price: of them.
    only: names of checks. exempt: names of checks that may fail, each with the reason.
    against: how the report names the exchange. paper: what is at base_url is a paper exchange, of which more is asked.
    Raises ValueError for names that are none, OSError where no exchange comes about.
    """
    exempt = exempt or {}
    only = set(only)
    if unknown := (only | exempt.keys()) - CHECKS.keys():
        raise ValueError(f"no check named {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    chosen = [one for one in in_order() if not only or one.name in only]
    started, title = time.monotonic(), f"{venue.__module__}:{venue.__qualname__}"
    against = against or (base_url or ("an exchange of the caller's" if exchange else OWN))
    async with AsyncExitStack() as stack:
        url = base_url or await stack.enter_async_context((exchange or paper_exchange)())
        play = not base_url or _is_local(base_url)
        settings = Settings(
            symbol=symbol,
            price=price,
            amount=amount,
            keys=keys or (f"check{secrets.token_hex(6)}", secrets.token_hex(16)),
            play=play,
            paper=paper or not (base_url or exchange),
        )
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fmzbus-check-")))
        between = await stack.enter_async_context(proxy.serving(url))
        name = venue.__name__.lower()
        dead = f"http://127.0.0.1:{server.free_port()}"

        def made() -> dict[str, Any]:
            one = venue(name, config.Venue(base_url=between.url))
            return {name: one, f"{name}-hasty": one, f"{name}-dead": venue(f"{name}-dead", config.Venue(base_url=dead))}

        try:
            source = inspect.getsourcefile(venue) or ""
        except (OSError, TypeError):
            source = ""
        try:
            worker = await stack.enter_async_context(boundary.started(name, made, folder, source, between.seen))
        except boundary.Unmade as e:
            said = f"{venue.__name__}(name, settings) {e}"
            return Report(title, against, [_finding(CHECKS["base-url"], venue, "fail", said)], time.monotonic() - started)
        bench = Bench(venue, settings, worker, between)
        try:
            findings = await _all(chosen, bench, trades=play or trade, exempt=exempt)
        finally:  # also where a person has pressed Ctrl-C
            await _clean(bench)
    return Report(title, against, findings, time.monotonic() - started)


async def _all(chosen: list[Check], bench: Bench, *, trades: bool, exempt: Mapping[str, str]) -> list[Finding]:
    """Make one check after the other, up to one after which none can be judged."""
    findings: list[Finding] = []
    for number, one in enumerate(chosen):
        findings.append(await _run(one, bench, trades=trades, exempt=exempt))
        if bench.stuck or (one.name == "base-url" and findings[-1].verdict == "fail"):
            for rest in chosen[number + 1 :]:
                outlived = bench.stuck and rest.name == "deadline"  # whatever check met it first, this is what is wrong
                verdict = ("fail", findings[number].seen) if outlived else ("na", f"see {one.name}")
                findings.append(_finding(rest, bench.venue_class, *verdict))
            break
    return findings


async def _clean(bench: Bench) -> None:
    """Cancel what is left open, however the checks ended, and say what could not be cancelled."""
    left = ["perhaps orders of the checks: the venue stopped answering"] if bench.stuck and bench.placed_any else []
    if not bench.stuck:
        cleaning = asyncio.ensure_future(bench.clean())
        try:
            async with asyncio.timeout(CLEANING_S):
                left = await asyncio.shield(cleaning)
        except TimeoutError:
            cleaning.cancel()
            left = [f"perhaps orders of the checks: they could not be cancelled within {CLEANING_S:.0f} s"]
    if left:
        sys.stderr.write(f"left open: {', '.join(left)}\n")


async def _run(one: Check, bench: Bench, *, trades: bool, exempt: Mapping[str, str]) -> Finding:
    """Make one check. Never raises, whatever a venue answers."""
    verdict: Any = "ok"
    try:
        if one.trades and not trades:
            raise NotApplicable("it places orders, and the exchange is not on this machine: allow it with --trade")
        async with asyncio.timeout(LONGEST_S):
            seen = await one.run(bench) or ""
    except NotApplicable as e:
        verdict, seen = "na", str(e)
    except Wrong as e:
        verdict, seen = "fail", str(e)
    except TimeoutError:
        bench.proxy.cut_all()
        verdict, seen = "fail", f"the check did not end within {LONGEST_S:.0f} s"
    except Exception as e:  # noqa: BLE001 - an answer in a shape that no check expects is a finding, too
        verdict, seen = "fail", f"an answer in an unexpected shape: {type(e).__name__}: {e}"
    if verdict == "fail" and one.name in exempt:
        verdict, seen = "exempt", f"{exempt[one.name]} ({seen})"
    return _finding(one, bench.venue_class, verdict, seen)


def _finding(one: Check, venue: type[Any], verdict: Any, seen: str) -> Finding:
    return Finding(one.name, verdict, one.expects, seen, where(venue, one.where), f"FMZ general protocol: {one.section}")


def _is_local(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
