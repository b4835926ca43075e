"""The control API: faults are armed and the ledger is read here, on a loopback port of its own, with a token of its own.

Port and token change with each start and lie in `control.json` in the exchange's state folder, readable by its owner only.
"""

import hmac
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from workers.venues.paper import faults as kinds
from workers.venues.paper.faults import FaultError, Faults
from workers.venues.paper.ledger import Entry, Query

HOST = "127.0.0.1"
FILE = "control.json"
LARGEST_BODY = 1024 * 1024

Span = Annotated[float, Meta(ge=0, le=10**10)]
Entries = Callable[[Query], Awaitable[list[Entry]]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Where(Struct, frozen=True):
    """control.json: how to reach the control API of the exchange that runs on this folder."""

    port: int
    token: str
    pid: int

    def __repr__(self) -> str:
        return f"Where(port={self.port}, pid={self.pid})"


class Control:
    """The endpoints. entries: reads the ledger, up to date with all that was replied."""

    def __init__(self, faults: Faults, entries: Entries, clock: Callable[[], float]) -> None:
        self._faults = faults
        self._entries = entries
        self._clock = clock

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/kinds", self.kinds),
            web.get("/faults", self.armed),
            web.post("/faults", self.arm),
            web.delete("/faults", self.clear),
            web.post("/schedule", self.schedule),
            web.get("/ledger", self.ledger),
        ]

    async def kinds(self, _request: web.Request) -> web.Response:
        table = [
            {"kind": name, "does": kind.does, "takes": kind.takes, "path": kind.path, "socket": kind.socket}
            for name, kind in kinds.KINDS.items()
        ]
        return _json(table)

    async def armed(self, _request: web.Request) -> web.Response:
        return _json(self._faults.armed())

    async def arm(self, request: web.Request) -> web.Response:
        return _json(self._faults.arm(kinds.wanted(await request.read())))

    async def clear(self, request: web.Request) -> web.Response:
        return _json({"cleared": self._faults.clear(request.query.get("kind", ""))})

    async def schedule(self, request: web.Request) -> web.Response:
        try:
            text = (await request.read()).decode()
        except UnicodeDecodeError:
            raise FaultError("not TOML: expected UTF-8") from None
        return _json(self._faults.schedule(kinds.scheduled(text)))

    async def ledger(self, request: web.Request) -> web.Response:
        given: dict[str, Any] = dict(request.query)
        if (last := given.pop("last_s", None)) is not None:
            # By the exchange's clock, which need not be the caller's.
            given["since_ms"] = max(0, int((self._clock() - msgspec.convert(last, Span, strict=False)) * 1000))
        return _json(await self._entries(msgspec.convert(given, Query, strict=False)))


@asynccontextmanager
async def serving(state: Path, faults: Faults, entries: Entries, clock: Callable[[], float]) -> AsyncIterator[Where]:
    """Serve beside the body, which runs while control.json is there. state: the exchange's folder, which it holds alone."""
    token = secrets.token_urlsafe(32)
    application = web.Application(middlewares=[_guarded(token)], client_max_size=LARGEST_BODY)
    application.add_routes(Control(faults, entries, clock).routes())
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
    await runner.setup()
    file = state / FILE
    try:
        await web.TCPSite(runner, HOST, 0).start()
        where = Where(runner.addresses[0][1], token, os.getpid())
        _write(file, msgspec.json.encode(where))
        yield where
    finally:
        file.unlink(missing_ok=True)
        await runner.cleanup()


def _guarded(token: str) -> Any:
    expected = f"Bearer {token}".encode()

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, expected):
            return _json({"error": "the token is missing or wrong; it is in control.json"}, 401)
        try:
            return await handler(request)
        except (FaultError, msgspec.ValidationError) as e:
            return _json({"error": str(e)}, 400)
        except web.HTTPException as e:
            return _json({"error": e.reason}, e.status)

    return guard


def _json(content: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), status=status, content_type="application/json")


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, and never readable by others."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(content)
    new.rename(path)
