"""Every subject, queue group, bucket and key. Nothing else in the project spells one."""

import functools
import re

from bus.errors import BadRequest

WORKERS = "workers"
"""Queue group of all worker pools: one delivery over `rpc.okx.*` however many pools listen."""

FLEET = "fleet"
"""Presence: each process says on fleet.<role>.<id> that it lives, plain and un-acked."""

ROLL_CALL = "fleet.roll"
"""Who hears this says at once that it lives."""

SESSIONS = "sessions"
"""Bucket of futures state, key = session_key()."""

SERVER_TIME = "$SYS.REQ.USER.INFO"
"""Any user may ask this; the reply carries the server's clock. It needs no JetStream."""

MAX_TOKEN = 200
MAX_NAME = 64
_UNSAFE = re.compile(rb"[^A-Za-z0-9_-]")
_PRINTABLE = re.compile(r"[^\x00-\x20\x7f]+")


def token(text: str) -> str:
    """Escape text into one token, legal in a subject and in a KV key: "BTC_USDT.swap" -> "BTC_USDT=2Eswap".

    Raises BadRequest for empty text and for a result over 200 characters: nats-server closes a connection for good over a subject
    that is too long.
    """
    escaped = _UNSAFE.sub(lambda match: b"=%02X" % ord(match[0]), text.encode(errors="replace")).decode()
    if not escaped or len(escaped) > MAX_TOKEN:
        raise BadRequest(f"a name must have 1 to {MAX_TOKEN} signs, escaped; this one has {len(escaped)}")
    return escaped


def name(text: str, what: str) -> str:
    """An exchange, a symbol or a session as a host may write it: 1 to 64 printable characters without blanks. Raises BadRequest."""
    if len(text) > MAX_NAME or not _PRINTABLE.fullmatch(text):
        raise BadRequest(f"{what}: expected 1 to {MAX_NAME} printable signs without blanks, got {shown(text)}")
    return text


def shown(value: object) -> str:
    """A value for an error text: one line, cut at 40 characters."""
    text = repr(value)
    return text if len(text) <= 42 else f"{text[:40]}... ({len(text)} long)"


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
    """Where the futures state of one robot lies. path: the whole path, "okx/robot-7"; account: its keyed hash."""
    return f"{token(path)}.{token(account)}"
