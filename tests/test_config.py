"""bus/config.py: TOML, then the environment; unknown keys are refused; ops/fmzbus.toml lists every key with its default."""

import re
import tomllib
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from bus.config import Config, ConfigError, Limits, Venue, load

OPS = Path(__file__).parent.parent / "ops" / "fmzbus.toml"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "fmzbus.toml"
    path.write_text(text)
    return path


def test_without_a_file_everything_has_its_default() -> None:
    assert load(None, {}) == Config()


def test_the_documented_file_is_the_defaults_and_names_every_key() -> None:
    documented = tomllib.loads(OPS.read_text())
    assert load(OPS, {}) == Config()
    defaults = msgspec.to_builtins(Config())
    assert documented.keys() == defaults.keys() - {"venues"}
    for section, keys in defaults.items():
        if isinstance(keys, dict) and keys:
            assert documented[section].keys() == keys.keys(), section
    in_comments = set(re.findall(r"^# (\w+) = ", OPS.read_text(), re.M))
    assert {field.encode_name for field in msgspec.structs.fields(Venue)} <= in_comments


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    config = load(written(tmp_path, '[bridge]\nport = 7000\n[venues.my_okx]\nexchange = "okx"\nclass = "m:C"\n'), {})
    assert config.bridge.port == 7000
    assert config.bridge.deadline_s == 10.0
    assert config.venues == {"my_okx": Venue(exchange="okx", cls="m:C")}


def test_the_environment_wins_at_any_depth(tmp_path: Path) -> None:
    environ = {
        "FMZBUS__BRIDGE__PORT": "7001",
        "FMZBUS__VENUES__OKX_DEMO__BASE_URL": "http://127.0.0.1:1",
        "FMZBUS__WORKERS__EXCHANGES": '["paper"]',
        "FMZBUS__BENCH": "true",
        "FMZBUS_ACCESS_KEY": "not a setting",
    }
    config = load(written(tmp_path, "[bridge]\nport = 7000\n"), environ)
    assert config.bridge.port == 7001
    assert config.venues["okx_demo"].base_url == "http://127.0.0.1:1"
    assert config.workers.exchanges == ["paper"]
    assert config.bench is True


def test_limits_are_off_or_exact_numbers_for_everybody_an_account_or_a_path(tmp_path: Path) -> None:
    text = """
    [guard]
    max_order_value = 10000.1
    [guard.accounts.0123456789abcdef]
    max_open_orders = 3
    [guard.paths."okx/robot-7"]
    symbols = ["BTC_USDT"]
    """
    guard = load(written(tmp_path, text), {"FMZBUS__GUARD__MAX_ORDERS_PER_S": "5"}).guard
    assert (guard.max_order_value, guard.max_orders_per_s, guard.symbols) == (Decimal("10000.1"), 5, [])
    assert guard.accounts == {"0123456789abcdef": Limits(max_open_orders=3)}
    assert guard.paths == {"okx/robot-7": Limits(symbols=["BTC_USDT"])}


@pytest.mark.parametrize(
    ("text", "environ", "said"),
    [
        ("[bridge]\nporrt = 1", {}, "unknown field `porrt` - at `$.bridge`"),
        ("[bridge]\nport = 70000", {}, "`$.bridge.port`"),
        ("[guard]\nmax_order_value = -1", {}, "max_order_value: expected 0, which is off, or more - at `$.guard`"),
        ("[guard.paths.okx]\nmax_order_value = inf", {}, "`$.guard.paths[...]`"),
        ("[guard]\nmax_open_orders = -1", {}, "`$.guard.max_open_orders`"),
        ("[guard.accounts.my-key]\nmax_open_orders = 1", {}, "$.guard.accounts"),
        ("[guard.paths.okx]\nmax_orders = 1", {}, "unknown field `max_orders`"),
        ("[orders]\nrounding = 'up'", {}, "`$.orders.rounding`"),
        ("", {"FMZBUS__BRIDGE__DEADLINE_S": "soon"}, "`$.bridge.deadline_s`"),
        ("[bridge", {}, "fmzbus.toml"),
        ("[venues.'Upper Case']\n", {}, "$.venues"),
        ("bridge = 3", {"FMZBUS__BRIDGE__PORT": "1"}, "fmzbus.toml"),
        ("", {"FMZBUS__WORKERS__EXCHANGES": "[paper"}, "FMZBUS__WORKERS__EXCHANGES: "),
        ("", {"FMZBUS__BRIDGE__PORT": "no"}, "environment: "),
        ("[bridge]\nport = -1", {"FMZBUS__BENCH": "true"}, "fmzbus.toml: "),
        ("[bridge]\nport = -1", {"FMZBUS__BRIDGE__PORT": "1"}, "fmzbus.toml: "),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load(written(tmp_path, text), environ)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "fmzbus.toml").write_bytes(b'state = "\xff"')
    with pytest.raises(ConfigError, match=r"fmzbus\.toml: 'utf-8' codec"):
        load(tmp_path / "fmzbus.toml", {})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load(tmp_path / "nowhere.toml", {})
