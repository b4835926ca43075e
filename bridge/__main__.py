"""The bridge's process: `fmzbus bridge`."""

import logging
import os
import sys
from contextlib import AsyncExitStack

import msgspec
from aiohttp import http_parser

from bridge.app import Bridge, listening
from bridge.cache import Cache
from bridge.caller import calling
from bridge.push import pushing
from bridge.resolve import resolving
from bridge.routes import Routes
from bridge.shared import sharing
from bus import fleet, lifecycle, logs
from bus.admin import admin
from bus.config import Config
from bus.connection import connected
from bus.follow import following
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
        ages_s = msgspec.structs.asdict(config.market.max_age_s)
        follower = await enter(
            following(bus, ages_s, unused_s=config.market.unused_s, most=config.market.max_symbols, told=lambda entry: push.told(entry))
        )
        push = await enter(pushing(follower, routes, heard, metrics))
        shared = await enter(sharing(bus, msgspec.structs.asdict(config.market.share_s)))
        cache = Cache(
            follower,
            shared,
            await enter(resolving(bus, heard.venues)),
            venues=heard.venues,
            alive=heard.alive,
            metrics=metrics,
        )
        bridge = Bridge(
            settings,
            config.orders,
            bus=bus,
            caller=caller,
            routes=routes,
            sealer=Sealer(config.keys_path),
            metrics=metrics,
            cache=cache,
            push=push,
        )
        metrics.in_flight.set_function(lambda: bridge.in_flight)
        metrics.not_read.set_function(lambda: follower.dropped)
        metrics.connected.set_function(lambda: bus.nc.is_connected)
        await bus.flush()  # ready only once the server has our subscriptions
        address = await enter(listening(bridge, settings.host, settings.port, lifecycle.inherited_socket()))
        stack.push_async_callback(push.close_all)  # before the drain, which closes what stays open
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
