"""The worker's process: `fmzbus worker`."""

import contextlib
import logging
import os
import sys
from contextlib import AsyncExitStack

from bus import fleet, lifecycle, logs, subjects
from bus.admin import admin
from bus.config import Config, ConfigError
from bus.connection import connected
from bus.errors import BusDown
from bus.journal import Journal
from bus.lifecycle import Stopping, notify, running
from bus.metrics import Metrics
from bus.seal import Opener
from bus.sessions import Sessions
from bus.start import VERSION, ProcessArgs, bus_url, process_args
from workers import http, pool
from workers.calls import Calls, timeouts
from workers.guard import guarding
from workers.orders import Orders
from workers.settle import Settler
from workers.venues import Venue, available

log = logging.getLogger(__name__)


async def serve(config: Config, args: ProcessArgs, venues: dict[str, Venue], stopping: Stopping) -> None:
    settings = config.workers
    metrics = Metrics()
    taking = False
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        bus = await enter(connected(bus_url(config, "worker"), "worker", closed=stopping.fail))
        heard = await enter(fleet.followed(bus))
        sessions = Sessions(bus, config.nats.replicas, lambda: [one.process for one in heard.alive() if one.role == "bridge"])
        journal = Journal(bus, config.orders, config.nats.replicas, disk=config.state_path / "nats" / "store")
        with contextlib.suppress(BusDown):  # without JetStream reads and cancels go on; whoever needs it is told
            await sessions.open()
            await journal.open()
        exchanges = await enter(http.opened(timeouts(config.venues), settings.call_timeout_s, metrics))
        guard = await enter(guarding(bus, config))
        opener = Opener(config.keys_path)
        settler = Settler(bus, journal, opener, venues, exchanges, heard, config.orders, metrics)
        calls = Calls(bus, opener, sessions, venues, exchanges, metrics, Orders(bus, journal, settler, guard, config.orders))
        ready = lambda: bus.ready and taking and not stopping.is_set  # noqa: E731
        where = await enter(admin(metrics, ready, port=args.admin_port))
        metrics.connected.set_function(lambda: bus.nc.is_connected)
        offered = {name: fleet.Venue(public=sorted(venue.public), contracts=venue.contracts) for name, venue in venues.items()}
        leave = await enter(fleet.announced(bus, admin=where, version=VERSION, serves=sorted(venues), venues=offered, ready=ready))
        await settler.before_serving()
        await enter(running(settler.run()))
        await bus.nc.subscribe(subjects.told(bus.process), cb=settler.hear)
        await bus.nc.subscribe(subjects.forgot(bus.process), cb=sessions.hear)
        serving = await enter(
            pool.serving(
                bus,
                venues,
                calls.answer,
                max_in_flight=settings.max_in_flight,
                drain_s=settings.drain_s,
                answered=settler.heard,
            )
        )
        stack.push_async_callback(leave)  # before the pool drains and closes the connection
        metrics.in_flight.set_function(lambda: serving.in_flight)
        taking = True
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
