"""The feeder's process: `fmzbus feeder`. It keeps depth, ticker, trades and candles of the exchanges that offer a socket in the bus."""

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack

import msgspec
from nats.js.api import StreamConfig
from nats.js.client import JetStreamContext
from nats.js.errors import BadRequestError

from bus import fleet, lifecycle, listeners, logs, market, server
from bus.admin import admin
from bus.config import Config, ConfigError
from bus.connection import Bus, connected
from bus.follow import Key
from bus.lifecycle import Stopping, notify, running
from bus.metrics import FeedMetrics, Metrics
from bus.start import VERSION, ProcessArgs, bus_url, process_args
from bus.streams import LOST
from workers import http, lines
from workers.audits import Audits
from workers.calls import timeouts
from workers.desk import Desk
from workers.venues import Feed, Venue, available

log = logging.getLogger(__name__)

LISTENERS_S = 2.0
AGAIN_S = 1.0
STREAM_S = 1.0
CHECK_S = 0.05
FORGET_S = 60.0
"""MARKET forgets what was not told for so long."""


async def keep_stream(bus: Bus, replicas: int, desks: Sequence[Desk]) -> None:
    """Make MARKET at the start and after each time the bus was away, and then tell everything once more. Data flow without it."""
    nc, js, seen, made = bus.nc, bus.nc.jetstream(timeout=STREAM_S), -1, False
    while True:
        if nc.is_connected and (not made or seen != nc.stats["reconnects"]):
            back, seen = seen != nc.stats["reconnects"], nc.stats["reconnects"]
            try:
                await make_stream(js, market.stream(replicas, FORGET_S))
                made = True
            except LOST as e:
                if made or back:
                    log.warning("MARKET cannot be made: who comes late waits for news", extra={"fields": {"error": repr(e)}})
                made = False
            if back or made:
                for desk in desks:
                    desk.tell_all()
        await asyncio.sleep(CHECK_S if made else AGAIN_S)


async def make_stream(js: JetStreamContext, wanted: StreamConfig) -> None:
    try:
        await js.add_stream(wanted)
    except BadRequestError:  # there, of another version
        await js.update_stream(wanted)


async def keep_listening(monitors: Sequence[str], desks: Sequence[Desk]) -> None:
    """Feed what plain NATS and MQTT clients listen to, by the servers' own lists."""
    heard: dict[str, tuple[float, set[Key]]] = {}
    while monitors:
        for monitor in monitors:
            try:
                heard[monitor] = market.clock(), await listeners.listened([monitor])
            except OSError as e:  # it may only be busy: what it said last counts for a while
                since_s, _ = heard.get(monitor, (market.NEVER, set()))
                if market.clock() - since_s > market.WISHES_GONE_S:
                    if monitor not in heard or heard[monitor][1]:
                        log.warning("who listens is not known", extra={"fields": {"error": str(e)}})
                    heard[monitor] = since_s, set()
        pairs = {key for _, keys in heard.values() for key in keys}
        for desk in desks:
            desk.listened({(kind, symbol) for exchange, kind, symbol in pairs if exchange == desk.exchange})
        await asyncio.sleep(LISTENERS_S)


async def serve(config: Config, args: ProcessArgs, venues: dict[str, Venue], stopping: Stopping) -> None:
    metrics = Metrics()
    counted = FeedMetrics(metrics.registry)
    timeout_s, ages = config.workers.call_timeout_s, msgspec.structs.asdict(config.market.max_age_s)
    monitors = config.nats.monitors or ([] if config.nats.url else [server.monitor(config.state_path)])
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        bus = await enter(connected(bus_url(config, "feeder"), "feeder", closed=stopping.fail))
        calls = await enter(http.opened(timeouts(config.venues), timeout_s, metrics))
        session = await enter(lines.session())
        desks, audits = [], []
        for exchange, venue in venues.items():
            desk = Desk(bus, exchange, venue, config.market, session=session, metrics=counted)  # type: ignore[arg-type]
            desks.append(desk)
            audits.append(
                Audits(
                    bus,
                    desk,
                    venue,
                    calls,
                    per_s=config.market.audits_per_s,
                    max_age_s=ages,
                    timeout_s=timeout_s,
                    metrics=counted,
                )
            )
        feeding = False
        ready = lambda: bus.ready and feeding and not stopping.is_set  # noqa: E731
        where = await enter(admin(metrics, ready, port=args.admin_port))
        metrics.connected.set_function(lambda: bus.nc.is_connected)
        await enter(
            fleet.announced(bus, admin=where, version=VERSION, feeds=lambda: {desk.exchange: desk.presence for desk in desks}, ready=ready)
        )
        for desk in desks:
            await enter(desk.open())
        await enter(
            running(
                keep_stream(bus, config.nats.replicas, desks),
                keep_listening(monitors, desks),
                *(audit.run() for audit in audits),
            )
        )
        await bus.flush()
        feeding = True
        log.info("ready", extra={"fields": {"exchanges": sorted(venues), "admin": where}})
        notify(READY="1", STATUS=", ".join(sorted(venues)), FMZBUS_ADMIN=where)
        await stopping.wait()
        notify(STOPPING="1")


def feeds(config: Config) -> dict[str, Venue]:
    """The exchanges to feed: those named that offer a socket, or all that do. Raises ConfigError."""
    named = msgspec.structs.replace(config.workers, exchanges=config.market.exchanges)
    try:
        found = available(msgspec.structs.replace(config, workers=named))
    except ConfigError as e:
        raise ConfigError(str(e).replace("[workers]", "[market]")) from None
    silent = [name for name, venue in found.items() if not isinstance(venue, Feed) or not venue.socket_url()]
    if config.market.exchanges and silent:
        raise ConfigError(f"[market] exchanges: {', '.join(silent)} offers no socket")
    return {name: venue for name, venue in found.items() if name not in silent}


def main() -> None:
    config, args = process_args("feeder")
    logs.setup(config.logs, f"feeder-{os.getpid()}")
    try:
        venues = feeds(config)
    except ConfigError as e:
        sys.exit(f"configuration: {e}")
    lifecycle.run(lambda stopping: serve(config, args, venues, stopping))


if __name__ == "__main__":
    main()
