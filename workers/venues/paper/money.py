"""Money as whole numbers: every balance, price and amount is an int of UNIT-ths, so that no sum is ever rounded.

A float appears nowhere, and a Decimal only where a text comes in from outside the process.
"""

import re

from workers.venues.paper.errors import Code, Refused

UNIT = 1_000_000_000_000
"""One coin (or one quote per base) in the smallest amounts that the exchange counts."""

DIGITS = 12
"""Decimals of a UNIT-th."""

_PLAIN = re.compile(r"[0-9]{1,18}(?:\.[0-9]{1,18})?", re.ASCII)


def plain(units: int) -> str:
    """The shortest plain notation: 1_500_000_000_000 -> "1.5", never an exponent."""
    sign = "-" if units < 0 else ""
    whole, fraction = divmod(abs(units), UNIT)
    return f"{sign}{whole}.{fraction:0{DIGITS}d}".rstrip("0").rstrip(".")


def units(text: str) -> int:
    """The exact value of a decimal literal of ours: units("0.01") == 10_000_000_000. Raises ValueError where it is not exact."""
    if not _PLAIN.fullmatch(text):
        raise ValueError("expected plain decimal notation")
    whole, _, fraction = text.partition(".")
    if len(fraction := fraction.rstrip("0")) > DIGITS:
        raise ValueError(f"at most {DIGITS} decimals are counted")
    return int(whole) * UNIT + int(fraction.ljust(DIGITS, "0"))


def positive(name: str, text: str) -> int:
    """A request's price or amount in units. Raises Refused(BAD_PARAMETER): signs, exponents, NaN and zero are all no amount."""
    try:
        value = units(text)
    except ValueError as e:
        raise Refused(Code.BAD_PARAMETER, f'{name}: {e}, such as "0.25"') from None
    if value == 0:
        raise Refused(Code.BAD_PARAMETER, f"{name}: expected more than zero")
    return value
