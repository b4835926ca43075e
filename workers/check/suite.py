"""The suite: an exchange, a proxy before it, a worker with the venue, and one check after the other."""

import asyncio
import contextlib
import inspect
import ipaddress
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bus import config, server
from workers.check import boundary, conduct, faults, orders, proxy, shapes
from workers.check.bench import CHECKS, Bench, Check, NotApplicable, Settings, Wrong, where
from workers.check.report import Finding, NotConforming, Report
from workers.venues.paper import server as paper

MODULES = [module.__name__ for module in (shapes, orders, faults, conduct)]
"""In this order; keys-kept, which looks back on all the others, is the last."""
LONGEST_S = 60.0

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
) -> Report:
    """Check a venue.

    base_url: of the exchange to check against; exchange: starts one instead; neither: a paper exchange of its own.
    keys: of an account there; made up where none are given, which the paper exchange takes.
    trade: also place small orders where base_url is not on this machine. amount, price: of them.
    only: names of checks. exempt: names of checks that may fail, each with the reason.
    against: how the report names the exchange.
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
        )
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fmzbus-check-")))
        between = await stack.enter_async_context(proxy.serving(url))
        name = venue.__name__.lower()
        dead = f"http://127.0.0.1:{server.free_port()}"
        try:
            one = venue(name, config.Venue(base_url=between.url))
            venues = {name: one, f"{name}-hasty": one, f"{name}-dead": venue(f"{name}-dead", config.Venue(base_url=dead))}
        except Exception as e:  # noqa: BLE001 - a venue that cannot be made is a finding, too
            said = f"{venue.__name__}(name, settings) raised {type(e).__name__}: {e}"
            return Report(title, against, [_finding(CHECKS["base-url"], venue, "fail", said)], time.monotonic() - started)
        source = inspect.getsourcefile(venue) or ""
        worker = await stack.enter_async_context(boundary.started(name, venues, folder, source, between.seen))
        bench = Bench(venue, settings, worker, between)
        findings: list[Finding] = []
        for number, one_check in enumerate(chosen):
            findings.append(await _run(one_check, bench, trades=play or trade, exempt=exempt))
            if bench.stuck or (one_check.name == "base-url" and findings[-1].verdict == "fail"):
                for rest in chosen[number + 1 :]:
                    outlived = bench.stuck and rest.name == "deadline"  # whatever check met it first, this is what is wrong
                    findings.append(
                        _finding(rest, venue, *(("fail", findings[number].seen) if outlived else ("na", f"see {one_check.name}")))
                    )
                break
        if not bench.stuck:
            await bench.clean()
    return Report(title, against, findings, time.monotonic() - started)


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
