"""The kill switch's commands: `fmzbus halt` and `fmzbus resume`."""

import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

import msgspec
import typer

from bus.config import ACCOUNT, Config
from bus.connection import Bus
from bus.errors import BusError
from bus.halt import Halt, Halts, Record, path_name
from bus.terminal import NO_BUS, ConfigFile, StateDir, configured, err, failed, on_the_bus, out, table, who

T = TypeVar("T")

app = typer.Typer()
MOST_REASON = 200

Account = Annotated[
    str | None, typer.Option(help="Only this account, by its hash: as `fmzbus orders` shows it, and the end of a session's key.")
]
At = Annotated[str | None, typer.Option("--path", help="Only this path of a service address: okx/robot-7; okx means all robots there.")]


@app.command("halt")
def halt_command(
    account: Account = None,
    path: At = None,
    reason: Annotated[str, typer.Option(help="Told to whoever is refused.")] = "",
    show: Annotated[bool, typer.Option("--show", help="Change nothing; list what is halted.")] = False,  # noqa: FBT002 - typer's own way
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,  # noqa: FBT002 - as above
    config: ConfigFile = None,
    state: StateDir = None,
) -> None:
    """Stop new orders: of everybody, of one account, of one path. Within a second, on every worker, until `fmzbus resume`.

    Cancels and reads go on. What is open at the exchange stays open. Raw writes (__api_ with POST, ...) stop as orders do.
    """
    settings = configured(config, state)
    if show:
        record, _ = _do(settings, lambda halts, _bus: halts.read(), "the halt record cannot be read")
        _print(record, as_json=as_json)
        return
    scope = _scope(account, path)

    async def stop(halts: Halts, bus: Bus) -> Record:
        halt = Halt(by=who(), since_ms=bus.now_ms(), reason=" ".join(reason.split())[:MOST_REASON])
        return await halts.change(lambda record: record.halted(halt, *scope))

    record = _do(settings, stop, "NOT halted")
    _print(record, as_json=as_json)
    if not as_json:
        out.print("Workers refuse new orders there within 1 s; cancels and reads go on, open orders stay open.")
        out.print("`fmzbus resume`, with the same options, ends it.")


@app.command("resume")
def resume_command(
    account: Account = None,
    path: At = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,  # noqa: FBT002 - typer's own way
    config: ConfigFile = None,
    state: StateDir = None,
) -> None:
    """End a halt: name what `fmzbus halt` named, or nothing for the halt of everything. Other halts stay."""
    scope = _scope(account, path)
    before: list[Record] = []

    async def go_on(halts: Halts, _bus: Bus) -> Record:
        def edit(record: Record) -> Record:
            before.append(record)
            return record.resumed(*scope)

        return await halts.change(edit)

    record = _do(configured(config, state), go_on, "NOT resumed")
    ended = len(before[-1].rows()) - len(record.rows())
    if not as_json:
        out.print(f"ended {ended} halt{'' if ended == 1 else 's'}" if ended else "nothing was halted there")
    _print(record, as_json=as_json)
    if not ended:
        raise typer.Exit(1)


def _scope(account: str | None, path: str | None) -> tuple[str, str]:
    """Checked, as the record spells it: a mistyped name would stop nothing, and an empty one, of a variable that is not set, everything."""
    if account is not None and not re.fullmatch(ACCOUNT, account.lower()):
        raise failed(f"--account: expected the 16 signs [0-9a-f] of an account's hash, got {account!r}; nothing was changed")
    name = path_name(path or "")
    if path is not None and (not name or " " in name or not name.isprintable()):
        raise failed(f"--path: expected a path such as okx/robot-7, got {path!r}; nothing was changed")
    return (account or "").lower(), name


def _do(settings: Config, job: Callable[[Halts, Bus], Coroutine[Any, Any, T]], otherwise: str) -> T:
    async def run(bus: Bus) -> T:
        return await job(Halts(bus, settings.nats.replicas), bus)

    try:
        return on_the_bus(settings, run)
    except BusError as e:
        raise failed(f"{otherwise}: {e}") from None
    except TimeoutError:
        raise failed(f"{otherwise}: {NO_BUS}") from None


def _print(record: Record, *, as_json: bool) -> None:
    if as_json:
        out.print(msgspec.json.encode(record).decode())
        return
    if not record.rows():
        err.print("nothing is halted")
        return
    rows = table("halted", "since", "by", "reason")
    for what, halt in record.rows():
        rows.add_row(what, halt.since, halt.by, halt.reason or "-")
    out.print(rows)
