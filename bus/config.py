"""The one configuration: TOML, then FMZBUS__SECTION__KEY=... of any depth; unknown keys are refused.

Read once, in a `__main__.py`, and passed down. No other module reads the environment for settings. Every key with its default and
unit is listed in ops/fmzbus.toml.
"""

import functools
import os
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

Port = Annotated[int, Meta(ge=0, le=65535)]
Span = Annotated[float, Meta(gt=0)]
ACCOUNT = r"^[0-9a-f]{16}$"
"""The hash by which an account is shown (seal.py)."""
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Bridge(Section, frozen=True):
    """host, port: where hosts POST. deadline_s: a host has its answer by then. max_in_flight: more are answered as busy at once."""

    host: str = "127.0.0.1"
    port: Port = 6666
    deadline_s: Annotated[float, Meta(ge=1, le=60)] = 10.0
    max_in_flight: Annotated[int, Meta(ge=1)] = 1024
    max_body_kib: Annotated[int, Meta(ge=1, le=8192)] = 256
    max_connections: Annotated[int, Meta(ge=1)] = 4096
    idle_s: Span = 75.0
    expose_without_access_control: bool = False


class Nats(Section, frozen=True):
    """url: of a server or, comma-separated, a cluster, with user and password; "" means the embedded server of this state folder.

    monitors: http addresses of those servers' monitoring, which tells who listens; the embedded one's is known. mqtt_port: where the
    embedded server speaks MQTT, 0 for nowhere.
    """

    url: str = ""
    replicas: Annotated[int, Meta(ge=1, le=5)] = 1
    monitors: list[str] = []
    mqtt_port: Port = 0


class Workers(Section, frozen=True):
    """exchanges: those this worker serves, [] for all it knows. call_timeout_s: one call to an exchange."""

    exchanges: list[str] = []
    max_in_flight: Annotated[int, Meta(ge=1)] = 256
    call_timeout_s: Span = 5.0
    drain_s: Span = 15.0


class Ages(Section, frozen=True):
    """Seconds, by kind of market data: a value that was last proven longer ago is not answered."""

    ticker: Span = 5.0
    depth: Span = 5.0
    trades: Span = 5.0
    candles: Span = 5.0


class Shares(Section, frozen=True):
    """Seconds, by method, from when the exchange was asked: its answer serves every host that asks the same meanwhile. With 0 it
    serves only those who ask while it is on its way."""

    ticker: Annotated[float, Meta(ge=0)] = 0.5
    depth: Annotated[float, Meta(ge=0)] = 0.5
    trades: Annotated[float, Meta(ge=0)] = 1.0
    records: Annotated[float, Meta(ge=0)] = 1.0


class Market(Section, frozen=True):
    """Market data that feeders keep in the bus.

    exchanges: those this feeder feeds, [] for all it knows. depth_levels: of each side of a depth. max_symbols: (kind, symbol) pairs that
    an exchange may be followed for. unused_s: a pair that nobody asks for ends. audits_per_s: REST calls that prove quiet markets, of
    one exchange. shards: parts of an exchange, each fed by one feeder.
    """

    exchanges: list[str] = []
    max_age_s: Ages = Ages()
    share_s: Shares = Shares()
    depth_levels: Annotated[int, Meta(ge=1, le=200)] = 20
    max_symbols: Annotated[int, Meta(ge=1)] = 2000
    unused_s: Span = 60.0
    audits_per_s: Annotated[float, Meta(ge=0)] = 1.0
    shards: Annotated[int, Meta(ge=1, le=64)] = 1


class Orders(Section, frozen=True):
    """What is promised about orders (design: journal, look-ups).

    nonce_identity: whether equal body and nanosecond nonce mean the same order ("auto"), or every request is its own ("off").
    settle_after_s: so long after an order's signed expiry, by the exchange's clock, a look-up proves that it is absent.
    rounding: what becomes of a price or an amount that does not fit the exchange's steps (workers/rules.py).
    fence_s: so long an order like one that was placed without its host being told is refused, counted anew at each try.
    keep_days, keep_orders: what the journal remembers; an order without an outcome is never forgotten.
    """

    nonce_identity: Literal["auto", "off"] = "auto"
    rounding: Literal["refuse", "down"] = "refuse"
    settle_after_s: Span = 5.0
    fence_s: Annotated[float, Meta(ge=1)] = 60.0
    keep_days: Span = 7.0
    keep_orders: Annotated[int, Meta(ge=1)] = 500_000


class Limits(Section, frozen=True):
    """What one scope may do; 0 and [] are off.

    symbols: all that may be traded, in the host's spelling, the contract with it. max_order_value: in the symbol's quote currency.
    max_orders_per_s: in a second of the clock, over all workers. max_open_orders: of the account, at the exchange.
    """

    symbols: list[str] = []
    max_order_value: Decimal = Decimal(0)
    max_orders_per_s: Annotated[int, Meta(ge=0)] = 0
    max_open_orders: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        if not (self.max_order_value.is_finite() and self.max_order_value >= 0):
            raise ValueError("max_order_value: expected 0, which is off, or more")


class Guard(Limits, frozen=True):
    """Limits of everybody, and of single accounts and paths: an order must pass all that apply to it."""

    accounts: dict[Annotated[str, Meta(pattern=ACCOUNT)], Limits] = {}
    paths: dict[str, Limits] = {}


class Venue(Section, frozen=True):
    """One exchange under a name of the user's.

    exchange: the venue behind the name, by default the name itself; cls ("module:Class"): a venue of the user's own instead.
    base_url: scheme and host of its REST API; ws_url: of its sockets, by default as the venue derives them from the former.
    """

    exchange: str = ""
    cls: str = field(name="class", default="")
    base_url: str = ""
    ws_url: str = ""
    timeout_s: Span | None = None


class Paper(Section, frozen=True):
    """The paper exchange of the embedded mode. port 0: chosen once and kept. seed: of its market."""

    enabled: bool = True
    port: Port = 0
    seed: int = 1


class Keys(Section, frozen=True):
    """path: folder of the sealing keys, by default <state>/keys. A bridge needs the public ones only."""

    path: str = ""


class Logs(Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    file: str = ""
    max_mb: Span = 10.0
    keep: Annotated[int, Meta(ge=0)] = 5


class Config(Section, frozen=True):
    """state: folder of everything that must survive a restart; relative to where the command runs."""

    state: str = "state"
    bridge: Bridge = Bridge()
    nats: Nats = Nats()
    workers: Workers = Workers()
    market: Market = Market()
    orders: Orders = Orders()
    guard: Guard = Guard()
    venues: dict[Name, Venue] = {}
    routes: dict[str, str] = {}
    paper: Paper = Paper()
    keys: Keys = Keys()
    logs: Logs = Logs()
    bench: bool = False

    @property
    def state_path(self) -> Path:
        return Path(self.state)

    @property
    def keys_path(self) -> Path:
        return Path(self.keys.path) if self.keys.path else self.state_path / "keys"


class ConfigError(Exception):
    """The configuration is wrong; the text names the file or variable, the key and what was expected."""


def load(path: Path | None, environ: Mapping[str, str]) -> Config:
    """Read TOML, then FMZBUS__BRIDGE__PORT=... Raises ConfigError: "Expected `int` <= 65535 - at `$.bridge.port`"."""
    source = str(path)
    try:
        tree: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8")) if path else {}
        msgspec.convert(tree, Config, strict=False)  # the file by itself: its mistakes are not blamed on a variable, nor the other way
        for variable, value in environ.items():
            if variable.startswith("FMZBUS__"):
                source = variable
                *sections, key = variable.lower().split("__")[1:]
                node = functools.reduce(lambda node, section: node.setdefault(section, {}), sections, tree)
                node[key] = msgspec.json.decode(value) if value[:1] in "[{" and value else value
        source = "environment"
        return msgspec.convert(tree, Config, strict=False)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.MsgspecError, AttributeError, TypeError) as e:
        raise ConfigError(f"{source}: {e}") from e


def environment(**values: object) -> dict[str, str]:
    """Overrides for a child process: environment(bridge__port=7000) -> {"FMZBUS__BRIDGE__PORT": "7000"}, beside our own."""
    return os.environ | {f"FMZBUS__{key.upper()}": str(value) for key, value in values.items()}
