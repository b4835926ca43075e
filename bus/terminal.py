"""What the commands share: how they print, fail, read the configuration and find the running system."""

import asyncio
import getpass
import os
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from bus import server, up
from bus.config import Config
from bus.connection import Bus, connected
from bus.lifecycle import reason
from bus.start import bus_url, read_config

T = TypeVar("T")

out = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 250)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

ConfigFile = Annotated[str | None, typer.Option("--config", help="TOML file; default fmzbus.toml where there is one.")]
StateDir = Annotated[str | None, typer.Option("--state", help="Folder of everything that survives a restart; default ./state.")]

DEMO = ("demo", "demo-secret")
"""Keys for the paper exchange, where any key opens an account with play money."""
NO_BUS = "no bus answers; is `fmzbus up` running on this state folder, or [nats] url right?"


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


def keys(exchange: str) -> tuple[str, str]:
    """The host's keys for an exchange: of the environment, the demo pair, or what a person types. Never an argument: others see those."""
    access_key, secret_key = os.environ.get("FMZBUS_ACCESS_KEY"), os.environ.get("FMZBUS_SECRET_KEY")
    if access_key is not None and secret_key is not None:
        return access_key, secret_key
    if exchange.partition("/")[0].lower() in ("paper", "null"):
        return DEMO
    if not sys.stdin.isatty():
        raise failed("no keys: set FMZBUS_ACCESS_KEY and FMZBUS_SECRET_KEY")
    return typer.prompt("access key", err=True), typer.prompt("secret key", hide_input=True, err=True)


def who() -> str:
    """Who types, "root@host"."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without a user list
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def on_the_bus(settings: Config, look: Callable[[Bus], Coroutine[Any, Any, T]], within_s: float = 30) -> T:
    """Connect as an operator, look, leave. Raises TimeoutError within 3 s when there is no bus, and what `look` raises."""
    if not settings.nats.url and not server.was_set_up(settings.state_path):
        raise TimeoutError  # whoever only looks creates nothing
    url = bus_url(settings, "operator")

    async def run() -> T:
        async with asyncio.timeout(3) as limit, connected(url, "operator", closed=lambda: None) as bus:
            limit.reschedule(asyncio.get_running_loop().time() + within_s)
            return await look(bus)

    try:
        return asyncio.run(run())
    except BaseExceptionGroup as e:  # the connection's task group wraps what was raised in it
        raise reason(e) from None
