"""`fmzbus paper`: what goes wrong at the paper exchange, and what it can prove. Speaks to its control API, found by the state folder."""

import http.client
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import msgspec
import typer
from msgspec import Struct

from bus.terminal import ConfigFile, StateDir, configured, err, failed, out, table

app = typer.Typer(
    help="The paper exchange as sparring partner and judge: faults to order, and a ledger of what really happened.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
TIMEOUT_S = 5.0
_SPAN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")
_UNIT_S = {"ms": 0.001, "s": 1, "": 1, "m": 60, "h": 3600, "d": 86_400}


class PaperError(Exception):
    """Why the paper exchange did not do it, in words for the person who asked."""


class PaperRefused(PaperError):
    """It understood what was asked for, and says what is wrong with it."""


class Where(Struct, frozen=True):
    """<state>/paper/control.json, written by the running exchange."""

    port: int
    token: str

    def __repr__(self) -> str:
        return f"Where(port={self.port})"


class Control:
    """The control API of the paper exchange that runs on a state folder."""

    def __init__(self, state: Path) -> None:
        self._file = state / "paper" / "control.json"
        self._nobody = f"no paper exchange runs on the state folder {state}: start it with `fmzbus up`, or name another with --state"

    def ask(self, verb: str, target: str, body: bytes | None = None) -> Any:
        """Call it once and return its JSON. Raises PaperError."""
        try:
            where = msgspec.json.decode(self._file.read_bytes(), type=Where)
        except (OSError, msgspec.MsgspecError):
            raise PaperError(self._nobody) from None
        connection = http.client.HTTPConnection("127.0.0.1", where.port, timeout=TIMEOUT_S)
        try:
            connection.request(verb, target, body=body, headers={"Authorization": f"Bearer {where.token}"})
            reply = connection.getresponse()
            content = reply.read()
            answer = msgspec.json.decode(content)
        except ConnectionRefusedError:
            raise PaperError(self._nobody) from None
        except (OSError, http.client.HTTPException, msgspec.MsgspecError) as e:
            raise PaperError(f"no answer from the paper exchange's control API: {e}") from None
        finally:
            connection.close()
        if reply.status != 200:
            raise PaperRefused(str(answer.get("error", reply.status)))
        return answer


@app.command("fault")
def fault_command(
    kind: Annotated[str | None, typer.Argument(help="Which fault; all kinds are listed without it.")] = None,
    path: Annotated[
        str | None, typer.Option(help="Only there: 'POST /api/v1/orders', '/api/v1/ticker*', alternatives with |; '*' everywhere.")
    ] = None,
    symbol: Annotated[str | None, typer.Option(help="Only requests that name it: BTC_USDT, BTC_USDT.swap.")] = None,
    key: Annotated[str | None, typer.Option(help="Only requests of this access key.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Strike that often, then never again.")] = None,
    probability: Annotated[float | None, typer.Option(min=0, max=1, help="Of each strike; seeded, so a run can be repeated.")] = None,
    seconds: Annotated[float | None, typer.Option(help="How long, how late, how far off: see the list of kinds.")] = None,
    jitter: Annotated[float | None, typer.Option(min=0, help="Seconds more or less, drawn for each strike.")] = None,
    amount: Annotated[float | None, typer.Option(min=0, help="How much: see the list of kinds.")] = None,
    executed: Annotated[bool | None, typer.Option("--executed/--not-executed", help="Whether the spoilt request was executed.")] = None,
    for_span: Annotated[str | None, typer.Option("--for", help="Over after that long: 30, 30s, 10m, 1h.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Disarm: all faults, or those of KIND.")] = False,
    schedule: Annotated[str | None, typer.Option(help="Arm what a TOML file says: [[fault]] tables with at_s, for_s, kind, ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    config: ConfigFile = None,
    state: StateDir = None,
) -> None:
    """Let the paper exchange misbehave, as real ones do. Alone, it lists every kind of fault and what is armed.

    \b
    The next order is executed, its reply is lost:
      fmzbus paper fault execute-then-drop --count 1
    One order in five is executed and answered with 503:
      fmzbus paper fault http-503 --executed --probability 0.2 \\
        --path "POST /api/v1/orders"
    For ten minutes whatever names BTC_USDT takes 1 to 3 s longer:
      fmzbus paper fault latency --seconds 2 --jitter 1 \\
        --symbol BTC_USDT --for 10m
    Disarm one kind; without a kind, everything:
      fmzbus paper fault --clear latency
    A whole night out of a file:
      fmzbus paper fault --schedule rough-night.toml

    \b
    The file:
      [[fault]]
      at_s = 10        # seconds after loading; default 0
      for_s = 5        # how long; default without end
      kind = "drop"    # and path, symbol, key, count, probability, seconds,
                       # jitter, amount, executed as above

    Without --count and --probability it strikes every time, until --for is over or it is cleared. A restart of the exchange disarms all.
    """
    wanted = {"path": path, "symbol": symbol, "key": key, "count": count, "probability": probability, "seconds": seconds}
    wanted |= {"jitter": jitter, "amount": amount, "executed": executed}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    try:
        if for_span is not None:
            wanted["for_s"] = span_s(for_span)
        _check(kind, wanted, clear=clear, schedule=schedule)
        control = _control(config, state)
        if schedule:
            answer = _load(control, schedule)
        elif clear:
            answer = control.ask("DELETE", "/faults?" + urlencode({"kind": kind or ""}))
        elif kind:
            answer = [control.ask("POST", "/faults", msgspec.json.encode({"kind": kind} | wanted))]
        else:
            answer = {"kinds": control.ask("GET", "/kinds"), "armed": control.ask("GET", "/faults")}
    except PaperError as e:
        raise failed(str(e)) from None
    if as_json:
        out.print(msgspec.json.encode(answer).decode())
    elif clear:
        out.print(f"cleared {answer['cleared']}")
    elif kind or schedule:
        for one in answer:
            out.print(f"armed {_sentence(one)}")
    else:
        _show_faults(answer["kinds"], answer["armed"])


@app.command("ledger")
def ledger_command(
    client_order_id: Annotated[str | None, typer.Argument(help="As `outcome unknown` told it; all orders without it.")] = None,
    since: Annotated[str | None, typer.Option(help="Received in the last 30s, 10m, 2h, 1d.")] = None,
    account: Annotated[str | None, typer.Option(help="Hash of an account, as the ledger shows it.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=100_000, help="The newest so many.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: every field, the request's body too.")] = False,
    config: ConfigFile = None,
    state: StateDir = None,
) -> None:
    """Show what the paper exchange received, when, what it executed, what it replied, and whether the reply was delivered.

    \b
    What really became of one order:
      fmzbus paper ledger 1f2e3d4c5b6a79880f1e2d3c4b5a6978
    All of the last ten minutes, for a program:
      fmzbus paper ledger --since 10m --json -n 100000

    \b
    executed   yes; no: refused, or a fault came first; ?: received, and the
               exchange died before anything came of it
    replied    HTTP status, and the exchange's code where that is not 0; none:
               a fault closed the connection
    delivered  yes: all of it was handed to an open connection; no; ?: not
               known, the exchange died before it could note it
    """
    query: dict[str, object] = {"limit": limit}
    if client_order_id:
        query["client_order_id"] = client_order_id
    if account:
        query["account"] = account
    try:
        if since is not None:
            query["last_s"] = span_s(since)
        rows = _control(config, state).ask("GET", "/ledger?" + urlencode(query))
    except PaperError as e:
        raise failed(str(e)) from None
    if as_json:
        out.print(msgspec.json.encode(rows).decode())
        return
    if not rows:
        err.print("the paper exchange received no such order request")
        return
    shown = table(
        "received (UTC)", "account", "client order id", "request", "order", "executed", "id", "now", "replied", "delivered", "fault"
    )
    for row in rows:
        shown.add_row(*(str(cell) for cell in _ledger_row(row)))
    out.print(shown)


def span_s(text: str) -> float:
    """Seconds of "90", "90s", "10m", "1.5h". Raises PaperError."""
    found = _SPAN.fullmatch(text.strip())
    if not found or not 0 < float(found[1]) < math.inf:
        raise PaperError(f"{text!r} is no span of time; write 30s, 10m, 2h or 1d")
    return float(found[1]) * _UNIT_S[found[2] or ""]


def _check(kind: str | None, wanted: dict[str, Any], *, clear: bool, schedule: str | None) -> None:
    if schedule and (kind or clear):
        raise PaperError("--schedule goes alone: its file says which faults there are")
    if wanted and not kind:
        raise PaperError("which fault? Name a kind first; `fmzbus paper fault` lists them")
    if wanted and clear:
        raise PaperError("--clear takes a kind and nothing else")
    for name, value in wanted.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise PaperError(f"--{name}: expected a finite number, got {value}")
    if "count" in wanted and "probability" in wanted:
        raise PaperError("either --count or --probability")


def _load(control: Control, schedule: str) -> Any:
    try:
        return control.ask("POST", "/schedule", Path(schedule).read_bytes())
    except OSError as e:
        raise PaperError(f"{schedule}: {e.strerror}") from None
    except PaperRefused as e:
        raise PaperError(f"{schedule}: {e}") from None


def _control(config: str | None, state: str | None) -> Control:
    return Control(configured(config, state).state_path)


def _show_faults(kinds: list[dict[str, Any]], armed: list[dict[str, Any]]) -> None:
    for title, socket in (("request", False), ("socket", True)):
        shown = table(f"faults of a {title}", "what happens", "parameters")
        for kind in kinds:
            if kind["socket"] == socket:
                takes = " ".join(f"--{name} {value:g}" for name, value in kind["takes"].items() if not isinstance(value, bool))
                if (default := kind["takes"].get("executed")) is not None:
                    takes = "--executed" if default else "--not-executed"
                shown.add_row(kind["kind"], kind["does"], takes)
        out.print(shown)
        out.print()
    if not armed:
        out.print("nothing is armed")
    for one in armed:
        struck = f"; has struck {one['struck']} times" if one["struck"] else ""
        out.print(f"armed {_sentence(one)}{struck}")


def _sentence(one: dict[str, Any]) -> str:
    """ "#3 latency, 2 times, on POST /api/v1/orders, for BTC_USDT, --seconds 2, over in 60 s"."""
    parts = [f"#{one['number']} {one['kind']}"]
    if one["count"] is not None:
        parts.append("once" if one["count"] == 1 else f"{one['count']} times")
    parts.append(f"with probability {one['probability']:g}" if one["probability"] < 1 else "" if one["count"] is not None else "every time")
    parts.append(f"on {one['path']}" if one["path"] else "everywhere")
    parts += [f"for {one['symbol']}" if one["symbol"] else "", f"of key {one['key']}" if one["key"] else ""]
    parts += [f"--{name} {one[name]:g}" for name in ("seconds", "jitter", "amount") if one[name]]
    parts.append("--executed" if one["executed"] else "")
    parts.append(f"begins in {one['begins_in_s']:g} s" if one["begins_in_s"] else "")
    if one["left_s"] is not None:
        parts.append(f"{'lasts' if one['begins_in_s'] else 'over in'} {one['left_s']:g} s")
    return ", ".join(part for part in parts if part)


def _ledger_row(row: dict[str, Any]) -> tuple[object, ...]:
    known = {True: "yes", False: "no", None: "?"}
    order = row["order"] or {}
    received = datetime.fromtimestamp(row["received_ms"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    asked = [order.get("side"), order.get("amount") or order.get("filled"), order.get("symbol"), order.get("price") or (order and "market")]
    replied = "none" if row["status"] is None and row["answered_ms"] is not None else row["status"] or "?"
    return (
        received,
        row["account"],
        row["client_order_id"] or "-",
        f"{row['verb']} {row['target'].removeprefix('/api/v1')[:48]}",
        " ".join(str(part) for part in asked if part) or "-",
        known[row["executed"]],
        row["order_id"] or "-",
        order.get("status", "-"),
        f"{replied} {row['code']}" if row["code"] else replied,
        known[row["delivered"]],
        row["fault"] or "-",
    )
