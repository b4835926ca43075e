"""What the processes' main functions share: their arguments, and where the bus is."""

import argparse
import ipaddress
import os
import sys
from importlib import metadata
from pathlib import Path

from msgspec import Struct

from bus import server
from bus.config import Bridge, Config, ConfigError, load

VERSION = metadata.version("fmzbus")

EXCHANGES = {"worker": "workers", "feeder": "market"}
"""The section whose `exchanges` a role's --exchanges narrows."""


class ProcessArgs(Struct, frozen=True):
    """admin_port: 0 for a free one."""

    admin_port: int


def read_config(path: str | None) -> Config:
    """Load the named file, or fmzbus.toml where there is one; print what is wrong and exit otherwise."""
    chosen = Path(path) if path else Path("fmzbus.toml")
    try:
        return load(chosen if path or chosen.exists() else None, os.environ)
    except ConfigError as e:
        sys.exit(f"configuration: {e}")


def process_args(role: str) -> tuple[Config, ProcessArgs]:
    """Parse the command line of one process."""
    parser = argparse.ArgumentParser(prog=f"fmzbus {role}", description=f"Run one {role} against the bus that [nats] url names.")
    parser.add_argument("--config", help="TOML file; default fmzbus.toml where there is one")
    parser.add_argument("--admin-port", type=int, default=0, help="port of /healthz, /readyz and /metrics; 0 takes a free one")
    if role == "bridge":
        parser.add_argument("--expose-without-access-control", action="store_true", help="allow a [bridge] host beyond this machine")
    if role in EXCHANGES:
        parser.add_argument("--exchanges", help="comma-separated names; default all it knows")
    args = parser.parse_args()
    if getattr(args, "exchanges", None):
        os.environ[f"FMZBUS__{EXCHANGES[role].upper()}__EXCHANGES"] = '["' + '","'.join(args.exchanges.lower().split(",")) + '"]'
    if getattr(args, "expose_without_access_control", False):
        os.environ["FMZBUS__BRIDGE__EXPOSE_WITHOUT_ACCESS_CONTROL"] = "true"
    return read_config(args.config), ProcessArgs(args.admin_port)


def bus_url(config: Config, role: str) -> str:
    """[nats] url, or the embedded server of this state folder."""
    return config.nats.url or server.url(config.state_path, role)


def exposure(bridge: Bridge) -> str:
    """Why this bridge must not start, or "". A host's secrets travel in clear text: nothing listens beyond this machine by accident."""
    try:
        local = bridge.host == "localhost" or ipaddress.ip_address(bridge.host).is_loopback
    except ValueError:
        local = False
    if local or bridge.expose_without_access_control:
        return ""
    return (
        f"[bridge] host = {bridge.host!r} would listen beyond this machine, and both keys of a host travel in clear text: "
        "set expose_without_access_control = true beside it, or give --expose-without-access-control, to allow that"
    )
