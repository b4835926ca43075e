"""The `fmzbus` command. It starts processes and looks things up; it imports none of the processes it starts."""

import asyncio
import contextlib
import http.client
import logging
import os
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.markup import escape

from bus import backup, cancel_all, doctor, fleet, orders, paper, sdk, seal, status, switch, traffic, up, watch
from bus import call as calls
from bus.child import Child
from bus.config import Config
from bus.connection import Bus
from bus.lifecycle import stop_signals
from bus.logs import follow_files, newest, pretty
from bus.sessions import Session, Sessions
from bus.start import VERSION, bus_url, exposure
from bus.terminal import NO_BUS, ConfigFile, StateDir, configured, err, failed, keys, on_the_bus, out, service_address, table

T = TypeVar("T")

app = typer.Typer(
    help="One cluster that lets any number of FMZ hosts trade on any exchange.\n\nBegin with `fmzbus up`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
sessions_app = typer.Typer(
    help="Futures state per robot: contract, direction, leverage.", invoke_without_command=True, rich_markup_mode=None
)
keys_app = typer.Typer(help="The keys that seal credentials between bridge and workers.", no_args_is_help=True, rich_markup_mode=None)
for name, commands in (("sessions", sessions_app), ("keys", keys_app), ("paper", paper.app)):
    app.add_typer(commands, name=name)
for part in (status, watch, sdk, orders, cancel_all, switch, backup):
    app.add_typer(part.app)


@app.command("up")
def up_command(
    config: ConfigFile = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Where hosts POST; default 6666, 0 takes a free one.")] = None,
    admin_port: Annotated[int, typer.Option(min=0, max=65535, help="/healthz, /readyz and /metrics of the first bridge; 0: any.")] = 6680,
    state: StateDir = None,
    bridges: Annotated[int, typer.Option(min=1, max=64, help="Bridge processes; they share the port.")] = 1,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Worker processes.")] = 2,
    feeders: Annotated[int, typer.Option(min=0, max=64, help="Feeder processes; without one every request asks the exchange.")] = 1,
    bench: Annotated[bool, typer.Option("--bench", help="Also serve /null, an exchange without I/O.")] = False,
    expose: Annotated[bool, typer.Option("--expose-without-access-control", help="Allow a [bridge] host beyond this machine.")] = False,
) -> None:
    """Run the whole system on this machine: nats-server, paper exchange, workers, feeders, bridges. Ctrl-C drains and stops it."""
    flags = {"bench": "true" if bench else None, "bridge__expose_without_access_control": "true" if expose else None}
    settings = configured(config, state, bridge__port=port, **flags)
    if reason := exposure(settings.bridge):
        raise failed(reason)
    started = time.monotonic()

    def on_ready(address: str, children: list[Child]) -> None:
        rows = table("what", "pid", "where", "admin")
        for child in children:
            rows.add_row(child.name, str(child.pid), child.status, child.admin)
        out.print(rows)
        for line in _welcome(address, settings):
            out.print(line)
        out.print(f"ready {address}/paper  (in {time.monotonic() - started:.1f} s)")
        sys.stdout.flush()

    async def run() -> None:
        supervisor = up.Supervisor(
            settings,
            config_path=Path(config) if config else None,
            counts={"worker": workers, "feeder": feeders, "bridge": bridges},
            admin_port=admin_port,
            say=_say,
        )
        for number in stop_signals():
            asyncio.get_running_loop().add_signal_handler(number, supervisor.stop)
        await supervisor.run(on_ready)

    try:
        asyncio.run(run())
    except up.UpError as e:
        raise failed(str(e)) from None


def _say(line: str) -> None:
    """To the terminal, if it is still there: a supervisor goes on without one. (rich ends the program for a broken pipe.)"""
    with contextlib.suppress(OSError, SystemExit):
        err.print(line)


def _welcome(address: str, settings: Config) -> list[str]:
    request = '{"access_key":"a","secret_key":"b","nonce":1500793319499123457,"method":"ticker","params":{"symbol":"BTC_USDT"}}'
    lines = [
        "",
        "In FMZ: add an exchange, choose the general (custom) protocol, and give it the service address below with any two keys.",
        f"Or try it here:  curl -s -d '{request}' {address}/paper",
    ]
    return [*lines, f"Logs: {settings.state_path / 'logs'}   Stop: Ctrl-C", ""]


PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("bridge", context_settings=PASS_ON, add_help_option=False)
def bridge_command(context: typer.Context) -> None:
    """Run one bridge against the bus that [nats] url names; --help tells its options."""
    os.execv(sys.executable, [sys.executable, "-m", "bridge", *context.args])  # noqa: S606 - the same process goes on as the bridge


@app.command("worker", context_settings=PASS_ON, add_help_option=False)
def worker_command(context: typer.Context) -> None:
    """Run one worker against the bus that [nats] url names; --help tells its options."""
    os.execv(sys.executable, [sys.executable, "-m", "workers", *context.args])  # noqa: S606 - the same process goes on as the worker


@app.command("feeder", context_settings=PASS_ON, add_help_option=False)
def feeder_command(context: typer.Context) -> None:
    """Run one feeder against the bus that [nats] url names; --help tells its options."""
    os.execv(sys.executable, [sys.executable, "-m", "workers.feeder", *context.args])  # noqa: S606 - the same process goes on as the feeder


@app.command("call")
def call_command(
    exchange: Annotated[str, typer.Argument(help="As in the service address: paper, okx/robot-7.")],
    method: Annotated[
        str, typer.Argument(help="ticker, trade, __api_/path, io; or SetContractType, SetDirection, SetMarginLevel, GetPosition.")
    ],
    arguments: Annotated[list[str] | None, typer.Argument(help="k=v ...; plain values for the futures calls.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Send it that many times, over one connection, and show percentiles.")] = 1,
    trace: Annotated[bool, typer.Option("--trace", help="Show how long each hop took.")] = False,
    verb: Annotated[str, typer.Option(help="Http-Method of a raw call (__api_...): GET, POST, PUT, DELETE.")] = "",
    url: Annotated[str | None, typer.Option(help="Of the bridge; default the system that runs on this state folder.")] = None,
    config: ConfigFile = None,
    state: StateDir = None,
) -> None:
    """Send one request as an FMZ host would.

    Keys come from FMZBUS_ACCESS_KEY and FMZBUS_SECRET_KEY, else from a prompt; never from an argument. The paper exchange has a demo key.

    fmzbus call paper trade symbol=BTC_USDT type=buy price=-1 amount=100
    """
    settings = configured(config, state)
    address = url or service_address(settings)
    access_key, secret_key = keys(exchange)
    try:
        request = calls.body(method, arguments or [], access_key, secret_key)
        replied = calls.post(address, exchange, request, verb=verb, repeat=repeat, trace=trace)
    except ValueError as e:
        raise failed(str(e)) from None
    except (OSError, http.client.HTTPException) as e:
        raise failed(f"no answer from {address}: {e}; is `fmzbus up` running?") from None
    out.print(replied.body.decode(errors="replace"))
    for name, value in replied.hops.items():
        err.print(f"{name}: {value}")
    if repeat > 1:
        err.print(replied.line())
    if replied.failed:
        raise typer.Exit(1)


def _on_the_bus(settings: Config, look: Callable[[Bus], Coroutine[Any, Any, T]]) -> T:
    try:
        return on_the_bus(settings, look)
    except TimeoutError:
        raise failed(NO_BUS) from None


@sessions_app.callback()
def sessions_command(context: typer.Context, config: ConfigFile = None, state: StateDir = None) -> None:
    """List the futures state of every robot: path and account hash, contract, direction, leverage."""
    context.obj = configured(config, state)
    if context.invoked_subcommand is not None:
        return

    async def look(bus: Bus) -> dict[str, Session]:
        return await Sessions(bus, context.obj.nats.replicas).all()

    rows = table("key", "contract", "direction", "leverage")
    for key, session in _on_the_bus(context.obj, look).items():
        rows.add_row(key, session.contract or "-", session.direction or "-", str(session.level or "-"))
    out.print(rows)


@sessions_app.command("clear")
def sessions_clear(
    context: typer.Context,
    key: Annotated[str | None, typer.Argument(help="As listed; all of them without it.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Forget futures state: the robot has to set contract, direction and leverage again before it trades contracts."""
    if not yes:
        typer.confirm(f"forget {key or 'the futures state of every robot'}?", abort=True)

    async def clear(bus: Bus) -> list[str]:
        sessions = Sessions(bus, context.obj.nats.replicas)
        keys = [known for known in await sessions.all() if key in (None, known)]
        for known in keys:
            await sessions.clear(known)
        return keys

    cleared = _on_the_bus(context.obj, clear)
    if key and not cleared:
        raise failed(f"no session named {key}; `fmzbus sessions` lists them")
    out.print(f"forgot {len(cleared)}")


@keys_app.command("new")
def keys_new(config: ConfigFile = None, state: StateDir = None) -> None:
    """Make the first sealing key (`fmzbus up` does it by itself). Copy the folder to workers, the .public file alone to bridges."""
    folder = configured(config, state).keys_path
    if any(folder.glob("*.public")):
        raise failed(f"{folder} has keys already; `fmzbus keys rotate` replaces them")
    out.print(f"{seal.new_keys(folder)} in {folder}")


@keys_app.command("rotate")
def keys_rotate(config: ConfigFile = None, state: StateDir = None) -> None:
    """Make a new sealing key; the one before is still accepted, older ones go. Running processes notice by themselves."""
    folder = configured(config, state).keys_path
    if not any(folder.glob("*.secret")):
        raise failed(f"{folder} has no key yet; `fmzbus keys new` makes one")
    out.print(f"{seal.new_keys(folder)} in {folder}")


@app.command("logs")
def logs_command(
    name: Annotated[str, typer.Argument(help="Part of a file name: worker, bridge-1; all without it.")] = "",
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the newest.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they come.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As they lie in the files.")] = False,
    config: ConfigFile = None,
    state: StateDir = None,
) -> None:
    """Show the newest log lines of all processes, in the order of their times."""
    folder = configured(config, state).state_path / "logs"
    show = (lambda line: line) if as_json else pretty
    for line in newest(folder, name, lines):
        out.print(show(line))
    if follow:
        try:
            for line in follow_files(folder, name):
                out.print(show(line))
        except KeyboardInterrupt:
            pass


@app.command("doctor")
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False, config: ConfigFile = None, state: StateDir = None
) -> None:
    """Look at everything a running system rests on, and say what to do about what is wrong. Exit status 1 when something fails."""
    settings = configured(config, state)
    findings: list[doctor.Finding] = []

    def show(finding: doctor.Finding) -> None:
        findings.append(finding)
        if not as_json:
            colour = {"ok": "green", "warn": "yellow", "FAIL": "red"}[finding.level]
            advice = f"\n       -> {finding.do}" if finding.do else ""
            out.print(f"[{colour}]{finding.level:4}[/] {escape(f'{finding.what}: {finding.seen}{advice}')}", markup=True)

    async def look(bus: Bus) -> list[fleet.Presence]:
        async for finding in doctor.on_the_bus(bus, bus_url(settings, "operator"), settings):
            show(finding)
        async with fleet.followed(bus) as heard:
            await asyncio.sleep(fleet.BEAT_S * 1.2)
            return heard.alive()

    for finding in doctor.machine(settings):
        show(finding)
    try:
        alive = on_the_bus(settings, look)
    except TimeoutError:
        show(doctor.Finding(level="FAIL", what="NATS", seen="does not answer", do="start `fmzbus up`, or set [nats] url"))
    else:
        expected = up.expected(settings.state_path)
        for finding in (*doctor.fleet_health(alive, expected), *doctor.feeding(alive, expected)):
            show(finding)
        for finding in doctor.hops(settings, service_address(settings), alive):
            show(finding)
    if as_json:
        out.print(doctor.as_json(findings).decode())
    raise typer.Exit(doctor.worst(findings))


@app.command("bench-traffic")
def bench_traffic_command(
    hosts: Annotated[int, typer.Option(min=1, max=100_000, help="Simulated hosts, each with keys and a session of its own.")] = 10,
    rate: Annotated[float, typer.Option(min=0.1, max=100_000, help="Requests a second, of all hosts together.")] = 100,
    seconds: Annotated[float, typer.Option(min=1, help="How long.")] = 10,
    exchange: Annotated[str, typer.Option(help="Where they trade.")] = "paper",
    trade: Annotated[bool, typer.Option("--trade", help="Market orders too; for the paper exchange only.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed sends the same requests.")] = 1,
    url: Annotated[str | None, typer.Option(help="Of the bridge; default the system that runs on this state folder.")] = None,
    config: ConfigFile = None,
    state: StateDir = None,
) -> None:
    """Let simulated hosts call: for demos, and to see what a machine carries. A live line every second, a sum at the end.

    Requests go out on schedule whether or not earlier ones were answered, as those of real robots do; each counts from when it was due.
    """
    if trade and exchange.partition("/")[0] != "paper":
        raise failed("--trade places real orders: it is for the paper exchange only")
    settings = configured(config, state)
    address = url or service_address(settings)

    def show(number: int, second: traffic.Second) -> None:
        out.print(f"{number:4d} s  {second.line()}")
        sys.stdout.flush()

    started = time.monotonic()
    total = asyncio.run(traffic.drive(address, exchange, hosts=hosts, rate=rate, seconds=seconds, trade=trade, seed=seed, show=show))
    ran_s = min(seconds, time.monotonic() - started)
    out.print(f"all     {total.line()}  ({total.sent / ran_s:.0f}/s of {rate:g}/s asked for)")
    for text, count in total.errors.most_common(5):
        out.print(f"        {count} x {text}")
    if total.errors or not total.ok:
        raise typer.Exit(1)


@app.command("version")
def version_command() -> None:
    """Print the version."""
    out.print(VERSION)


def main() -> None:
    logging.getLogger("bus").addHandler(logging.NullHandler())  # a command says in its own words what it could not reach
    try:
        app()
    except OSError as e:  # a folder that is a file, one that cannot be written, a full disk
        sys.exit("fmzbus: " + ": ".join(str(part) for part in (e.filename, e.strerror or e) if part))


if __name__ == "__main__":
    main()
