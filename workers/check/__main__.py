"""`fmzbus check-venue FILE|NAME`."""

import argparse
import asyncio
import importlib
import os
import sys
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec

from workers.check.find import NotFound, venue_class
from workers.check.suite import OWN, Exchange, examine, in_order


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fmzbus check-venue",
        description="Check a venue: shapes, units, ids, numbers, errors, and what it does when an exchange fails. Status 1: it is not fit.",
        epilog="Without --base-url and --exchange a paper exchange runs beside the checks, for venues that speak its API.",
    )
    add = parser.add_argument
    add("venue", metavar="FILE|NAME", nargs="?", help="demo.py, demo.py:Class, module:Class, demo, or a venue that fmzbus knows: bitgo")
    add("--base-url", default="", help="of an exchange, best its test network; requests reach it through a proxy on this machine")
    add("--exchange", help="module:factory of a stand-in: an async context manager that yields its base_url")
    add("--access-key-env", metavar="VAR", help="environment variable with the access key; a key is never an argument")
    add("--secret-key-env", metavar="VAR", help="environment variable with the secret key")
    add("--symbol", default="BTC_USDT", help="a market, as hosts write it; default BTC_USDT")
    add("--price", type=_decimal, help="of orders that must rest; default half the best bid")
    add("--amount", type=_decimal, help="of orders; default about 30 of the quote currency")
    add("--trade", action="store_true", help="also place and cancel small orders where --base-url is not on this machine")
    add("--only", metavar="NAME,...", default="", help="these checks only")
    add("--exempt", metavar="NAME=REASON", action="append", default=[], help="a check that may fail, and why; may be repeated")
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
        return Decimal(text)
    except InvalidOperation:
        raise argparse.ArgumentTypeError("expected a number") from None


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
    module, _, name = target.partition(":")
    found: Exchange = getattr(importlib.import_module(module), name)
    return found


def main() -> None:
    args = arguments()
    if args.list:
        sys.stdout.writelines(f"{one.name}\n    {one.expects}\n" for one in in_order())
        return
    options: dict[str, Any] = {name: getattr(args, name) for name in ("base_url", "symbol", "price", "amount", "trade")}
    try:
        if args.exchange:
            options |= {"exchange": factory(args.exchange), "against": args.exchange}
        exempt = dict(text.partition("=")[::2] for text in args.exempt)
        only = [name for name in args.only.split(",") if name]
        report = asyncio.run(examine(venue_class(args.venue), keys=keys(args), only=only, exempt=exempt, **options))
    except (NotFound, ValueError, OSError, ImportError, AttributeError) as e:
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
