"""`fmzbus status`: who is alive, what each serves, and what is fed of which exchange."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
import typer

from bus import fleet
from bus.connection import Bus, without_password
from bus.fleet import Presence
from bus.start import bus_url
from bus.terminal import NO_BUS, ConfigFile, StateDir, configured, err, failed, on_the_bus, out, table

app = typer.Typer()

MISSED = {"bridge": "", "worker": "", "feeder": ": every request for market data asks the exchange"}
"""Roles that should be there, and what it means when one is not."""


@app.command("status")
def status_command(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,  # noqa: FBT002 - typer's own way
    config: ConfigFile = None,
    state: StateDir = None,
) -> None:
    """Who is alive, what it serves, where its admin listener is; and what is fed of each exchange.

    \b
    The second table counts pairs of a kind and a symbol:
    pairs fed  told and proven to whoever follows them
    waiting    wished, and without a first value yet
    refused    beyond [market] max_symbols; workers answer those
    provable   so many quiet ones [market] audits_per_s can prove in time
    """
    settings = configured(config, state)

    async def look(bus: Bus) -> list[Presence]:
        async with fleet.followed(bus) as heard:
            await asyncio.sleep(fleet.BEAT_S * 1.2)  # everybody speaks at least once in a beat
            return heard.alive()

    try:
        alive = on_the_bus(settings, look)
    except TimeoutError:
        raise failed(NO_BUS) from None
    where = without_password(bus_url(settings, "operator"))
    if as_json:
        out.print(msgspec.json.encode({"bus": where, "alive": alive}).decode())
        return
    rows = table("process", "ready", "up", "host", "pid", "serves", "admin", "version")
    for one in alive:
        rows.add_row(
            one.process, "yes" if one.ready else "NO", f"{one.up_s:.0f} s", one.host, str(one.pid), serves(one), one.admin, one.version
        )
    out.print(f"bus {where}")
    out.print(rows)
    fed = table("exchange", "kinds", "feeders", "pairs fed", "waiting", "refused", "provable")
    for row in feeds(alive):
        fed.add_row(*row)
    if fed.row_count:
        out.print()
        out.print(fed)
    roles = {one.role for one in alive}
    for role, meaning in MISSED.items():
        if role not in roles:
            err.print(f"no {role} is alive{meaning}")


def serves(one: Presence) -> str:
    """An address, for a bridge; exchanges, for a worker; exchanges with the shards that it feeds, for a feeder: "okx 0 2, paper 1"."""
    fed = (" ".join([name, *(map(str, feed.shards) if feed.shards else ["stands by"])]) for name, feed in sorted(one.feeds.items()))
    return one.address or ", ".join([*one.serves, *fed])


def feeds(alive: Sequence[Presence]) -> Iterator[tuple[str, ...]]:
    """A row an exchange: what all its feeders together feed."""
    for exchange in sorted({name for one in alive for name in one.feeds}):
        offers = {one.process: one.feeds[exchange] for one in alive if exchange in one.feeds}
        feeding = {process: feed for process, feed in offers.items() if feed.shards}
        kinds = " ".join(sorted({kind for feed in offers.values() for kind in feed.kinds}))
        sums = [sum(getattr(feed, name) for feed in feeding.values()) for name in ("symbols", "waiting", "refused", "provable")]
        yield exchange, kinds, ", ".join(feeding) or "nobody yet", *map(str, sums[:3]), f"{sums[3]} quiet ones"
