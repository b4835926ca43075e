"""One connection to NATS, and the time of the bus.

What nats-py leaves to its user is settled here (measured, nats-py 2.16): pings every 2 s, reconnection for ever with jitter, what was
pending is thrown away on a disconnect instead of being executed late, and a closed connection ends the process.
"""

import asyncio
import contextlib
import logging
import random
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import msgspec
import nats.errors
from nats.aio.client import Client, Server

from bus import subjects
from bus.errors import BusDown, Busy
from bus.lifecycle import running

log = logging.getLogger(__name__)

PING_S = 2
PINGS = 2
MAX_PENDING = 1_000_000
"""Bytes not yet taken by the server, above which new requests are refused as busy."""
MAX_DOUBT_S = 0.25
TIME_EVERY_S = 30.0
DOUBTFUL_EVERY_S = 1.0
SLOW_EVERY_S = 1.0
"""How often it is logged that messages arrive faster than they are read."""


class _Client(Client):
    async def _attempt_reconnect(self) -> None:
        # A request executed after the outage would be one whose caller has gone; and a close that waits for a stalled peer to take
        # its last bytes would keep us from the next server for as long as that peer's machine is silent.
        self._pending, self._pending_data_size = [], 0
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()
        await super()._attempt_reconnect()

    async def _close(self, status: int, do_cbs: bool = True) -> None:  # noqa: FBT001, FBT002 - nats-py's own signature
        if not self.is_connected:  # the last words would be written to a transport that is gone, which raises (measured)
            self._pending, self._pending_data_size = [], 0
        await super()._close(status, do_cbs)


class _ServerClock(msgspec.Struct):
    class Server(msgspec.Struct):
        time: datetime

    server: Server


class Bus:
    """A live connection. role: "bridge", "worker", ...; process: unique while it lives."""

    def __init__(self, nc: Client, role: str, monotonic: Callable[[], float]) -> None:
        self.nc = nc
        self.role = role
        self.process = f"{role}-{secrets.token_hex(4)}"
        self._monotonic = monotonic
        self._offset_s = 0.0
        self.doubt_s = float("inf")
        self.leaving = False
        """Set by whoever closes the connection on purpose."""

    # Bus time is the server's clock carried on by our own monotonic one: no wall clock of any machine takes part, so that a machine
    # whose clock is off, or is set while it runs, neither shortens nor lengthens a deadline.

    def now_ms(self) -> int:
        """Milliseconds since the epoch by the clock of the NATS server."""
        return int((self._monotonic() + self._offset_s) * 1000)

    @property
    def ready(self) -> bool:
        return self.nc.is_connected and self.doubt_s <= MAX_DOUBT_S

    def check(self) -> None:
        """Raises BusDown or Busy when a message published now might be delivered late."""
        if not self.nc.is_connected:
            raise BusDown("no connection to the bus")
        if self.nc.pending_data_size > MAX_PENDING:
            raise Busy("the bus takes no more for now")

    async def flush(self) -> None:
        """Return once the server has read all that was said. Twice, for nats-py's ping overtakes what waits to be written (measured: 3 to 8
        of 1,000 subscriptions came after it). Raises nats.errors.Error."""
        await self.nc.flush()
        await self.nc.flush()

    async def measure_time(self, samples: int = 5) -> None:
        """Ask the server's clock and keep the answer that came back fastest. Doubt is half of its round trip."""
        best, offset_s = float("inf"), 0.0
        for _ in range(samples):
            sent = self._monotonic()
            reply = await self.nc.request(subjects.SERVER_TIME, timeout=1)
            trip = self._monotonic() - sent
            if trip < best:
                best = trip
                server_s = msgspec.json.decode(reply.data, type=_ServerClock).server.time.timestamp()
                offset_s = server_s - sent - trip / 2
        self._offset_s, self.doubt_s = offset_s, best / 2  # together: a measurement that breaks off changes nothing

    async def keep_time(self) -> None:
        """Measure again every 30 s, every second while in doubt; a failure leaves the last measurement, which drifts by microseconds."""
        while True:
            await asyncio.sleep(TIME_EVERY_S if self.doubt_s <= MAX_DOUBT_S else DOUBTFUL_EVERY_S)
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                await self.measure_time()


@asynccontextmanager
async def connected(
    url: str, role: str, *, closed: Callable[[], None], monotonic: Callable[[], float] = time.monotonic
) -> AsyncIterator[Bus]:
    """Connect, measure the time, and keep both. Waits for a server that is not there yet.

    url: one or more, comma-separated. closed: called when the connection is gone for good; the process must end.
    monotonic: the clock that carries bus time, for tests.
    """

    async def on_closed() -> None:
        if not bus.leaving:
            log.error("connection to the bus closed for good", extra={"fields": {"error": str(nc.last_error)}})
            closed()

    told_s = float("-inf")

    async def on_error(error: Exception) -> None:  # runs inside the read loop: fast, and never raises
        nonlocal told_s
        if isinstance(error, nats.errors.SlowConsumerError):  # one for each message that is dropped
            if time.monotonic() - told_s < SLOW_EVERY_S:
                return
            told_s = time.monotonic()
        log.warning("bus error", extra={"fields": {"error": f"{type(error).__name__}: {error}"}})

    async def on_disconnected() -> None:
        if not bus.leaving:
            log.warning("disconnected from the bus")

    async def on_reconnected() -> None:
        log.info("connected to the bus again")

    async def on_lame_duck() -> None:
        log.info("the server is leaving, going to the next one")
        await nc.force_reconnect()

    nc = _Client()
    bus = Bus(nc, role, monotonic)
    await nc.connect(
        [part.strip() for part in url.split(",")],
        name=f"fmzbus {role}",
        inbox_prefix=f"_INBOX.{role}".encode(),
        ping_interval=PING_S,
        max_outstanding_pings=PINGS,
        max_reconnect_attempts=-1,
        reconnect_time_wait=1,
        connect_timeout=2,
        reconnect_to_server_handler=_next_server,
        skip_subject_validation=True,  # every subject comes from subjects.py
        error_cb=on_error,
        closed_cb=on_closed,
        disconnected_cb=on_disconnected,
        reconnected_cb=on_reconnected,
        lame_duck_mode_cb=on_lame_duck,
    )
    try:
        await bus.measure_time()
        async with running(bus.keep_time()):
            yield bus
    finally:
        bus.leaving = True
        if not nc.is_closed:
            await nc.close()


def _next_server(servers: list[Server], _info: dict[str, Any]) -> tuple[Server, float]:
    """The server that failed least, after 0.05 to 1 s: many clients must not come back in step."""
    server = min(servers, key=lambda server: server.reconnects)
    ceiling = min(1.0, 0.1 * 2 ** min(server.reconnects, 10))
    return server, random.uniform(0.05, ceiling)


def without_password(url: str) -> str:
    """A NATS url as it may be shown."""
    return re.sub(r"//[^@/,]*@", "//", url)
