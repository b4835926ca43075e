"""`fmzbus cancel-all`: cancels what an account has open at an exchange, through the bridge, as its host would."""

import http.client
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Annotated, Any

import msgspec
import typer
from msgspec import Struct

from bus import call as calls
from bus.terminal import ConfigFile, StateDir, configured, err, failed, keys, out, service_address, table

app = typer.Typer()
AT_ONCE = 8
GONE_S, EVERY_S = 3.0, 0.3
"""How long an exchange may still list what it said it cancelled, and how often it is asked."""

_decode = msgspec.json.Decoder(float_hook=Decimal).decode


class CallFailed(Exception):
    """The error a host would read, or that nobody answered."""


class Host(Struct, frozen=True):
    """Whoever cancels. Its repr shows no key."""

    address: str
    path: str
    access_key: str
    secret_key: str

    def __repr__(self) -> str:
        return f"Host({self.address}/{self.path})"

    def ask(self, method: str, **params: str) -> Any:
        """One call, answered. Raises CallFailed."""
        arguments = [f"{name}={value}" for name, value in params.items() if value]
        try:
            replied = calls.post(self.address, self.path, calls.body(method, arguments, self.access_key, self.secret_key))
            reply = _decode(replied.body)
        except (OSError, http.client.HTTPException, msgspec.MsgspecError) as e:
            raise CallFailed(f"no answer from {self.address}: {e}; is `fmzbus up` running?") from None
        if "error" in reply:
            raise CallFailed(str(reply["error"]))
        return reply["data"]

    def open_orders(self, symbol: str) -> dict[str, dict[str, Any]]:
        """By id, as the exchange lists them. Raises CallFailed."""
        return {str(row["id"]): row for row in self.ask("orders", symbol=symbol) if row.get("status", "open") == "open"}

    def cancel(self, order: dict[str, Any], symbol: str) -> str:
        """-> why not, "" once the exchange said yes."""
        try:
            answer = self.ask("cancel", id=str(order["id"]), symbol=symbol or str(order.get("symbol") or ""))
        except CallFailed as e:
            return str(e)
        return "" if answer is True else f"the exchange answered {answer!r}"


@app.command("cancel-all")
def cancel_all_command(
    exchange: Annotated[str, typer.Argument(help="As in the service address: paper, okx/robot-7.")],
    symbol: Annotated[str, typer.Option(help="Only orders of this symbol; some exchanges list open orders for one symbol only.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,  # noqa: FBT002 - typer's own way
    url: Annotated[str | None, typer.Option(help="Of the bridge; default the system that runs on this state folder.")] = None,
    config: ConfigFile = None,
    state: StateDir = None,
) -> None:
    """Cancel all open orders of an account at an exchange: lists them, asks, cancels, and lists again what is left.

    \b
    Stop a robot first, or it goes on placing orders:
      fmzbus halt --path okx/robot-7
      fmzbus cancel-all okx/robot-7
    Only one symbol, and without a question:
      fmzbus cancel-all okx --symbol BTC_USDT --yes

    The account is the one of the keys: FMZBUS_ACCESS_KEY and FMZBUS_SECRET_KEY, else a prompt, as for `fmzbus call`; all its open orders
    count, whichever robot placed them. A path whose robot has set a contract (SetContractType) reads BTC_USDT as that contract.

    An order that is in flight or unknown may come to life later: see `fmzbus orders --unsettled`.

    Exit status 1 when something is left open, or nobody knows.
    """
    settings = configured(config, state)
    host = Host(url or service_address(settings), exchange, *keys(exchange))
    orders = _listed(host, symbol)
    if not orders:
        out.print("nothing is open")
        return
    _show(orders)
    if not yes:
        typer.confirm(f"cancel {_count(orders)} at {exchange}?", abort=True)
    refused: dict[str, str] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number, why in zip(orders, pool.map(lambda order: host.cancel(order, symbol), orders.values()), strict=True):
            out.print(f"{number}: {f'NOT cancelled: {why}' if why else 'cancelled'}")
            if why:
                refused[number] = why
    out.print(f"cancelled {len(orders) - len(refused)} of {len(orders)}")
    left = _left(host, symbol, orders.keys() - refused.keys())
    if not left:
        out.print("nothing is open now")
        return
    new = len(left.keys() - orders.keys())
    err.print(f"still open: {_count(left)}" + (f", {new} of them placed meanwhile: `fmzbus halt` stops that" if new else ""))
    _show(left)
    raise typer.Exit(1)


def _left(host: Host, symbol: str, cancelled: set[str]) -> dict[str, dict[str, Any]]:
    """What is open afterwards, once the exchange has had time to take off its list what it said it cancelled."""
    deadline = time.monotonic() + GONE_S
    while (left := _listed(host, symbol)).keys() & cancelled and time.monotonic() < deadline:
        time.sleep(EVERY_S)
    return left


def _listed(host: Host, symbol: str) -> dict[str, dict[str, Any]]:
    try:
        return host.open_orders(symbol)
    except CallFailed as e:
        hint = "" if symbol else "\nSome exchanges list open orders for one symbol only: try --symbol BTC_USDT"
        raise failed(f"cannot list what is open: {e}{hint}") from None


def _count(orders: dict[str, dict[str, Any]]) -> str:
    return "1 order" if len(orders) == 1 else f"{len(orders)} orders"


def _show(orders: dict[str, dict[str, Any]]) -> None:
    shown = table("id", "symbol", "type", "price", "amount", "filled")
    for number, row in orders.items():
        shown.add_row(number, *(str(row.get(name, "-")) for name in ("symbol", "type", "price", "amount", "deal_amount")))
    out.print(shown)
