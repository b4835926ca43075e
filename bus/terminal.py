"""What the commands share: how they print, fail, read the configuration and find the running system."""

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from bus import server, up
from bus.config import Config
from bus.connection import Bus, connected
from bus.start import bus_url, read_config

T = TypeVar("T")

out = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 250)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

ConfigFile = Annotated[str | None, typer.Option("--config", help="TOML file; default fmzbus.toml where there is one.")]
StateDir = Annotated[str | None, typer.Option("--state", help="Folder of everything that survives a restart; default ./state.")]


def configured(path: str | None, state: str | None, **overrides: object) -> Config:
    """The configuration, with what was typed on top: handed on to children as their environment."""
    for key, value in {"state": state, **overrides}.items():
        if value is not None:
            os.environ[f"FMZBUS__{key.upper()}"] = str(value)
    return read_config(path)


def failed(text: str) -> typer.Exit:
    """Say why; raise what this returns."""
    err.print(f"fmzbus: {text}")
    return typer.Exit(1)


def table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title)
    return table


def service_address(settings: Config) -> str:
    """Where hosts POST: the system that runs on this state folder, else what is configured."""
    found = up.running(settings.state_path)
    return found.address if found else f"http://{up.bracketed(settings.bridge.host, settings.bridge.port)}"


def on_the_bus(settings: Config, look: Callable[[Bus], Coroutine[Any, Any, T]]) -> T:
    """Connect as an operator, look, leave. Raises TimeoutError within 3 s when there is no bus."""
    if not settings.nats.url and not server.was_set_up(settings.state_path):
        raise TimeoutError  # whoever only looks creates nothing
    url = bus_url(settings, "operator")

    async def run() -> T:
        async with asyncio.timeout(3) as limit, connected(url, "operator", closed=lambda: None) as bus:
            limit.reschedule(asyncio.get_running_loop().time() + 30)
            return await look(bus)

    return asyncio.run(run())
