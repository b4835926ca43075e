"""`fmzbus check-venue FILE|NAME`."""

import argparse
import asyncio
import importlib
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal, InvalidOperation
from typing import Any
from urllib.parse import urlsplit

import msgspec

from workers.check.find import NotFound, venue_class
from workers.check.report import Report
from workers.check.suite import OWN, Exchange, examine, in_order

FACTORY = "expected a function without arguments that makes an async context manager, which yields an address"
REACHED_S = 10.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fmzbus check-venue",
        description="Check a venue: shapes, units, ids, numbers, errors, and what it does when an exchange fails. Status 1: it is not fit.",
        epilog="Without --base-url and --exchange a paper exchange runs beside the checks, for venues that speak its API.",
    )
    add = parser.add_argument
    add("venue", metavar="FILE|NAME", nargs="?", help="demo.py, demo.py:Class, module:Class, demo, or a venue that fmzbus knows: bitgo")
    add(
        "--base-url",
        type=_base_url,
        help="of an exchange, best its test network; requests reach it through a proxy on this machine",
    )
    add("--exchange", help="module:factory of a stand-in: an async context manager that yields its base_url")
    add("--access-key-env", metavar="VAR", help="environment variable with the access key; a key is never an argument")
    add("--secret-key-env", metavar="VAR", help="environment variable with the secret key")
    add("--symbol", default="BTC_USDT", help="a market, as hosts write it; default BTC_USDT")
    add("--price", type=_decimal, help="of orders that must rest; default half the best bid")
    add("--amount", type=_decimal, help="of orders; default about 30 of the quote currency")
    add("--trade", action="store_true", help="also place and cancel small orders where --base-url is not on this machine")
    add("--only", metavar="NAME,...", default="", help="these checks only")
    add(
        "--exempt", type=_exempt, metavar="NAME=REASON", action="append", default=[], help="a check that may fail, and why; may be repeated"
    )
    add("--list", action="store_true", help="name the checks and what they expect, and end")
    add("--json", action="store_true", help="the report for programs")
    args = parser.parse_args()
    if not args.venue and not args.list:
        parser.error("which venue? FILE or NAME is missing")
    if args.base_url and args.exchange:
        parser.error("either --base-url or --exchange")
    if args.trade and args.base_url and args.amount is None:
        parser.error("--trade needs --amount: small enough to lose, large enough for the exchange to take")
    return args


def _decimal(text: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise argparse.ArgumentTypeError("expected a number") from None
    if not value.is_finite() or value <= 0:
        raise argparse.ArgumentTypeError("expected a number above 0")
    return value


def _base_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"expected http://host or https://host, got {text!r}")
    return text


def _exempt(text: str) -> tuple[str, str]:
    name, _, reason = (part.strip() for part in text.partition("="))
    if not name or not reason:
        raise argparse.ArgumentTypeError(f"expected NAME=REASON, got {text!r}")
    return name, reason


def keys(args: argparse.Namespace) -> tuple[str, str] | None:
    """From the environment; None for made-up ones."""
    names = (args.access_key_env, args.secret_key_env)
    if names == (None, None):
        return None
    for name in names:
        if not name or name not in os.environ:
            sys.exit(f"fmzbus: {name or 'both --access-key-env and --secret-key-env'}: not set")
    return os.environ[names[0]], os.environ[names[1]]


def factory(target: str) -> Exchange:
    """What --exchange names. Raises ValueError for anything but an async context manager that yields an address."""
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as e:
        raise ValueError(f"--exchange {target}: {type(e).__name__}: {e}") from e

    @asynccontextmanager
    async def exchange() -> AsyncIterator[str]:
        try:
            manager = found()
        except (Exception, SystemExit) as e:
            raise ValueError(f"--exchange {target}: {name}() raised {type(e).__name__}: {e}; {FACTORY}") from e
        if not (hasattr(manager, "__aenter__") and hasattr(manager, "__aexit__")):
            raise ValueError(f"--exchange {target}: {name}() made {manager!r:.60}; {FACTORY}")
        async with manager as base_url:
            if not isinstance(base_url, str) or not base_url.startswith(("http://", "https://")):
                raise ValueError(f"--exchange {target}: it yielded {base_url!r:.60}; {FACTORY}")
            yield base_url

    return exchange


async def _examine(venue: type[Any], **options: Any) -> Report:
    """examine(), once it is clear that the address is not the venue's fault. Raises OSError."""
    if base_url := options["base_url"]:
        parts = urlsplit(base_url)
        try:
            async with asyncio.timeout(REACHED_S):
                _, writer = await asyncio.open_connection(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
            writer.transport.abort()
        except OSError as e:  # a TimeoutError is one
            raise OSError(
                f"--base-url {parts.scheme}://{parts.netloc.rpartition('@')[2]} cannot be reached: {e or type(e).__name__}"
            ) from e
    return await examine(venue, **options)


def main() -> None:
    args = arguments()
    if args.list:
        sys.stdout.writelines(f"{one.name}\n    {one.expects}\n" for one in in_order())
        return
    options: dict[str, Any] = {name: getattr(args, name) for name in ("symbol", "price", "amount", "trade")}
    options["base_url"] = args.base_url or ""
    try:
        if args.exchange:
            options |= {"exchange": factory(args.exchange), "against": args.exchange}
        venue = venue_class(args.venue)
        only = [name for name in args.only.split(",") if name]
        report = asyncio.run(_examine(venue, keys=keys(args), only=only, exempt=dict(args.exempt), **options))
    except (NotFound, ValueError, OSError) as e:
        sys.exit(f"fmzbus: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
    text = msgspec.json.format(msgspec.json.encode(report)).decode() if args.json else str(report)
    sys.stdout.write(f"{text}\n")
    if report.against == OWN and any(finding.name == "ticker" for finding in report.failed):
        sys.stderr.write("It was checked against a paper exchange: for a venue that speaks another API say --base-url or --exchange.\n")
    sys.exit(0 if report.ok else 1)


if __name__ == "__main__":
    main()
