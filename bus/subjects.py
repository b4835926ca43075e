"""Every subject, queue group, bucket and key. Nothing else in the project spells one."""

import functools
import re
from hashlib import blake2b

from bus.errors import BadRequest

WORKERS = "workers"
"""Queue group of all worker pools: one delivery over `rpc.okx.*` however many pools listen."""

FLEET = "fleet"
"""Presence: each process says on fleet.<role>.<id> that it lives, plain and un-acked."""

ROLL_CALL = "fleet.roll"
"""Who hears this says at once that it lives."""

SESSIONS = "sessions"
"""Bucket of futures state, key = session_key()."""

JOURNAL = "ORDERS"
"""Stream of all that is known of orders; every subject is <state>.<exchange>.<key>..., so that one filter finds all of one order."""

HALT = "halt"
HALT_KEY = "record"
"""Bucket of the kill switch, and its only key."""

RATE = "RATE"
"""Stream that counts orders per second, rate.<scope>.<second>."""

MARKET = "MARKET"
"""Stream, in memory, of the newest value of each feed subject."""

WISH_CALL = "call.wishes"
"""A feeder that hears nothing yet asks every follower for what it wishes."""

CHANGED = "sessions.changed"
"""A worker says which futures state has changed (sessions.Changed); bridges answer on forgot()."""

SERVER_TIME = "$SYS.REQ.USER.INFO"
"""Any user may ask this; the reply carries the server's clock. It needs no JetStream."""

MAX_TOKEN = 200
MAX_NAME = 64
_UNSAFE = re.compile(rb"[^A-Za-z0-9_-]")


def _escape(text: str) -> str:
    if text.isascii() and text.isalnum():  # most of them: keys, hashes, names of exchanges
        return text
    return _UNSAFE.sub(lambda match: b"=%02X" % ord(match[0]), text.encode(errors="replace")).decode()


def token(text: str) -> str:
    """Escape text into one token, legal in a subject and in a KV key: "BTC_USDT.swap" -> "BTC_USDT=2Eswap".

    Raises BadRequest for empty text and for a result over 200 characters: nats-server closes a connection for good over a subject
    that is too long.
    """
    escaped = _escape(text)
    if not escaped or len(escaped) > MAX_TOKEN:
        raise BadRequest(f"a name must have 1 to {MAX_TOKEN} signs, escaped; this one has {len(escaped)}")
    return escaped


def untoken(escaped: str) -> str:
    """What token() made of a text, turned back. Raises ValueError."""
    return re.sub(rb"=([0-9A-F]{2})", lambda match: bytes([int(match[1], 16)]), escaped.encode()).decode()


def name(text: str, what: str) -> str:
    """An exchange, a symbol or a session as a host may write it: 1 to 64 printable characters without blanks. Raises BadRequest."""
    if not 0 < len(text) <= MAX_NAME or not text.isprintable() or " " in text:
        raise BadRequest(f"{what}: expected 1 to {MAX_NAME} printable signs without blanks, got {shown(text)}")
    return text


def shown(text: str) -> str:
    """A text for an error message: quoted, one line, cut at 40 characters."""
    quoted = repr(text)
    return quoted if len(quoted) <= 42 else f"{quoted[:40]}... ({len(text)} long)"


@functools.lru_cache(maxsize=1024)
def rpc(exchange: str, method: str) -> str:
    """The subject of one call: "rpc.okx.ticker". Neither account nor symbol is ever part of it: it becomes a metric's label."""
    return f"rpc.{token(exchange)}.{token(method)}"


def rpc_of(exchange: str) -> str:
    """What a pool that serves the exchange listens to: "rpc.okx.*"."""
    return f"rpc.{token(exchange)}.*"


def presence(role: str, process: str) -> str:
    return f"{FLEET}.{token(role)}.{token(process)}"


def session_key(path: str, account: str) -> str:
    """Where the futures state of one robot lies. path: the whole path, "okx/robot-7"; account: its keyed hash.

    A path that escaping makes too long goes by its hash: a Chinese name takes nine signs a letter.
    """
    escaped = _escape(path)
    where = escaped if len(escaped) <= MAX_TOKEN else blake2b(path.encode(errors="replace"), digest_size=16).hexdigest()
    return f"{where}.{token(account)}"


def settled(exchange: str, key: str, method: str) -> str:
    """Where an order lies with its outcome: "orders.okx.1f2e3d.trade". key: its idempotency key; exchange, key and method may be "*"."""
    return f"orders.{_part(exchange)}.{_part(key)}.{_part(method)}"


def unsettled(exchange: str, key: str, account: str, fence: str) -> str:
    """Where an order lies until its outcome is known. fence: the same for equal orders of an account. Each may be "*"."""
    return f"unsettled.{_part(exchange)}.{_part(key)}.{_part(account)}.{_part(fence)}.sent"


def fenced(exchange: str, key: str, account: str, fence: str) -> str:
    """Where an order lies besides that was placed without its host being told."""
    return f"unsettled.{_part(exchange)}.{_part(key)}.{_part(account)}.{_part(fence)}.placed"


def anywhere(exchange: str, key: str) -> str:
    """Finds whatever there is of one order."""
    return f"*.{token(exchange)}.{token(key)}.>"


def equal(exchange: str, account: str, fence: str) -> str:
    """Finds all equal orders, unsettled or fenced. It begins with a word of its own, for nats-server goes through all that might match:
    the few that are open, and not the many that are settled (measured on 12,000 of them: 0.2 ms of its time and not 1.6)."""
    return f"unsettled.{token(exchange)}.*.{token(account)}.{token(fence)}.*"


def _part(text: str) -> str:
    return text if text == "*" else token(text)


def told(worker: str, *, arrived: bool | None = None) -> str:
    """Where a bridge says whether a host has the answer to an order: the payload is its key. worker: the process that gave the answer.
    arrived: None for either."""
    return f"told.{token(worker)}.{'*' if arrived is None else 'yes' if arrived else 'no'}"


def rate(scope: str, second: int) -> str:
    """Where orders of one second are counted. scope: whom a limit is for, "account 1f2e..."; second: since the epoch, bus time."""
    return f"rate.{token(scope)}.{second}"


# ---------------------------------------------------------------- market data


@functools.lru_cache(maxsize=1 << 14)
def feed(exchange: str, kind: str, symbol: str) -> str:
    """Where the values of one market are told: "feed.paper.ticker.BTC_USDT"."""
    return f"feed.{token(exchange)}.{token(kind)}.{token(symbol)}"


def beat(exchange: str, shard: int | str) -> str:
    """Where the feeder of a shard proves what it told. shard: "*" for all of them."""
    return f"beat.{token(exchange)}.{shard}"


EVERY_BEAT = "beat.*.*"


def tick(process: str) -> str:
    """Where a follower says what its clock shows; process may be "*"."""
    return f"tick.{_part(process)}"


def wish(exchange: str) -> str:
    """Where followers say what they want to be fed with."""
    return f"wish.{token(exchange)}"


def shared(exchange: str, method: str, digest: str) -> str:
    """Where a bridge passes on the answer to a public read. digest: of its params."""
    return f"shared.{token(exchange)}.{token(method)}.{token(digest)}"


def forgot(worker: str) -> str:
    """Where bridges say that they forgot a futures state (sessions.Forgot)."""
    return f"forgot.{token(worker)}"
