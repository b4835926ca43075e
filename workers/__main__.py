"""The worker's process: `fmzbus worker`."""

import contextlib
import logging
import os
import sys
from contextlib import AsyncExitStack

from bus import fleet, lifecycle, logs
from bus.admin import admin
from bus.config import Config, ConfigError
from bus.connection import connected
from bus.errors import BusDown
from bus.lifecycle import Stopping, notify
from bus.metrics import Metrics
from bus.seal import Opener
from bus.sessions import Sessions
from bus.start import VERSION, ProcessArgs, bus_url, process_args
from workers import http, pool
from workers.calls import Calls, timeouts
from workers.venues import Venue, available

log = logging.getLogger(__name__)


async def serve(config: Config, args: ProcessArgs, venues: dict[str, Venue], stopping: Stopping) -> None:
    settings = config.workers
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        bus = await enter(connected(bus_url(config, "worker"), "worker", closed=stopping.fail))
        session_state = Sessions(bus, config.nats.replicas)
        with contextlib.suppress(BusDown):  # without JetStream spot goes on; whoever needs futures state is told
            await session_state.open()
        exchanges = await enter(http.opened(timeouts(config.venues), settings.call_timeout_s, metrics))
        calls = Calls(bus, Opener(config.keys_path), session_state, venues, exchanges, metrics)
        ready = lambda: bus.ready and not stopping.is_set  # noqa: E731
        where = await enter(admin(metrics, ready, port=args.admin_port))
        serving = await enter(pool.serving(bus, venues, calls.answer, max_in_flight=settings.max_in_flight, drain_s=settings.drain_s))
        metrics.in_flight.set_function(lambda: serving.in_flight)
        metrics.connected.set_function(lambda: bus.nc.is_connected)
        await enter(fleet.announced(bus, admin=where, version=VERSION, serves=sorted(venues), ready=ready))
        log.info("ready", extra={"fields": {"exchanges": sorted(venues), "admin": where}})
        notify(READY="1", STATUS=", ".join(sorted(venues)), FMZBUS_ADMIN=where)
        await stopping.wait()
        notify(STOPPING="1")


def main() -> None:
    config, args = process_args("worker")
    logs.setup(config.logs, f"worker-{os.getpid()}")
    try:
        venues = available(config)
    except ConfigError as e:
        sys.exit(f"configuration: {e}")
    lifecycle.run(lambda stopping: serve(config, args, venues, stopping))


if __name__ == "__main__":
    main()
