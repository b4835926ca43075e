"""Who is calling: the signature over a request, and the secrets that keys are bound to. Pure; see the README for the scheme.

The first secret seen for a key is bound to it. That is no way to run a bank: it is play money without a sign-up form, so that any pair
of keys a user types into a bot's form just works, while two users of one exchange still cannot read or trade for each other.
"""

import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from workers.venues.paper.errors import Code, Refused

DEFAULT_WINDOW_MS = 5_000
LONGEST_WINDOW_MS = 60_000

_KEY = re.compile(r"[!-~]{1,128}")
_SECRET = re.compile(r"[!-~]{1,1024}")
_NUMBER = re.compile(r"[0-9]{1,15}")


@dataclass(frozen=True, slots=True)
class Holder:
    """A known key. Its repr shows neither key nor secret."""

    account: int
    key: str = field(repr=False)
    secret: bytes = field(repr=False)


class Stamp(NamedTuple):
    """When a request says it was signed, and for how long it may travel."""

    time_ms: int
    window_ms: int

    def check(self, now_ms: int) -> None:
        """Raise Refused(TIMESTAMP) when the request is older than its window, or as far in the future."""
        if abs(late_ms := now_ms - self.time_ms) > self.window_ms:
            away = f"{abs(late_ms)} ms {'behind' if late_ms > 0 else 'ahead of'}"
            raise Refused(Code.TIMESTAMP, f"Paper-Timestamp is {away} the exchange's time {now_ms}; the window is {self.window_ms} ms")


def sign(secret: bytes, *, timestamp: str, window: str, verb: str, target: str, body: bytes) -> str:
    """The value of Paper-Sign. window as sent, "" when the header is left out; target is path and query as in the request line."""
    head = "\n".join((timestamp, window, verb, target, ""))
    return hmac.new(secret, head.encode("utf-8", "surrogateescape") + body, "sha256").hexdigest()


def identify(headers: Mapping[str, str], holders: Mapping[str, Holder], *, verb: str, target: str, body: bytes) -> tuple[Holder, Stamp]:
    """Who signed this. A holder with account 0 is new: its key has to be bound to its secret.

    Raises Refused(MISSING_AUTH | BAD_SIGNATURE). Whether the stamp is in time is the caller's next question.
    """
    key, timestamp, given = (_header(headers, name) for name in ("Paper-Key", "Paper-Timestamp", "Paper-Sign"))
    window = headers.get("Paper-Window", "")
    if not _KEY.fullmatch(key):
        raise Refused(Code.MISSING_AUTH, "Paper-Key: expected 1 to 128 printable ASCII characters without blanks")
    if not _NUMBER.fullmatch(timestamp):
        raise Refused(Code.MISSING_AUTH, "Paper-Timestamp: expected the time in ms")
    if window and not (_NUMBER.fullmatch(window) and 1 <= int(window) <= LONGEST_WINDOW_MS):
        raise Refused(Code.MISSING_AUTH, f"Paper-Window: expected 1 to {LONGEST_WINDOW_MS} ms")
    secret = headers.get("Paper-Secret")
    holder = holders.get(key)
    if holder is None:
        if secret is None or not _SECRET.fullmatch(secret):
            raise Refused(Code.MISSING_AUTH, "Paper-Secret: a new key needs it, 1 to 1024 printable ASCII characters without blanks")
        holder = Holder(0, key, secret.encode())
    elif secret is not None and not hmac.compare_digest(secret.encode("utf-8", "surrogateescape"), holder.secret):
        raise Refused(Code.BAD_SIGNATURE, "this key is bound to another secret")
    expected = sign(holder.secret, timestamp=timestamp, window=window, verb=verb, target=target, body=body)
    if not hmac.compare_digest(expected.encode(), given.encode("utf-8", "surrogateescape")):
        raise Refused(Code.BAD_SIGNATURE, "Paper-Sign does not match this request")
    return holder, Stamp(int(timestamp), int(window or DEFAULT_WINDOW_MS))


def _header(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name)
    if value is None:
        raise Refused(Code.MISSING_AUTH, f"{name}: the header is missing")
    return value
