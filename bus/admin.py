"""The admin listener that every process has: /healthz (it runs), /readyz (it serves), /metrics (Prometheus)."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from bus.metrics import Metrics


@asynccontextmanager
async def admin(metrics: Metrics, ready: Callable[[], bool], *, port: int = 0, host: str = "127.0.0.1") -> AsyncIterator[str]:
    """Serve until left; yields the address, "127.0.0.1:6680". Port 0 takes a free one, which the fleet announces.

    Raises OSError when the port is taken.
    """

    async def healthz(_request: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def readyz(_request: web.Request) -> web.Response:
        return web.json_response({"ready": ready()}, status=200 if ready() else 503)

    async def show(_request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", show)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        yield f"{host}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
