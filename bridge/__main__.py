"""The bridge's process: `fmzbus bridge`."""

import logging
import os
import sys
from contextlib import AsyncExitStack

from aiohttp import http_parser

from bridge.app import Bridge, listening
from bridge.caller import calling
from bridge.routes import Routes
from bus import fleet, lifecycle, logs
from bus.admin import admin
from bus.config import Config
from bus.connection import connected
from bus.lifecycle import Stopping, notify
from bus.metrics import Metrics
from bus.seal import Sealer
from bus.start import VERSION, ProcessArgs, bus_url, exposure, process_args

log = logging.getLogger(__name__)


async def serve(config: Config, args: ProcessArgs, stopping: Stopping) -> None:
    settings = config.bridge
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        bus = await enter(connected(bus_url(config, "bridge"), "bridge", closed=stopping.fail))
        heard = await enter(fleet.followed(bus))
        caller = await enter(calling(bus, metrics))
        routes = Routes(config.routes, config.venues, lambda: heard.exchanges, lambda: heard.settled)
        bridge = Bridge(settings, config.orders, bus=bus, caller=caller, routes=routes, sealer=Sealer(config.keys_path), metrics=metrics)
        metrics.in_flight.set_function(lambda: bridge.in_flight)
        metrics.connected.set_function(lambda: bus.nc.is_connected)
        await bus.nc.flush()  # ready only once the server has our subscriptions
        address = await enter(listening(bridge, settings.host, settings.port, lifecycle.inherited_socket()))
        ready = lambda: bus.ready and not stopping.is_set  # noqa: E731
        where = await enter(admin(metrics, ready, port=args.admin_port))
        await enter(fleet.announced(bus, admin=where, version=VERSION, address=address, ready=ready))
        log.info("ready", extra={"fields": {"address": address, "admin": where}})
        notify(READY="1", STATUS=address, FMZBUS_ADMIN=where)
        await stopping.wait()
        notify(STOPPING="1")


def main() -> None:
    config, args = process_args("bridge")
    if reason := exposure(config.bridge):
        sys.exit(reason)
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        sys.exit("aiohttp runs without its C parser: reinstall it from a wheel (the Python one is slow and less strict)")
    logs.setup(config.logs, f"bridge-{os.getpid()}")
    lifecycle.run(lambda stopping: serve(config, args, stopping))


if __name__ == "__main__":
    main()
