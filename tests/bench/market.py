"""Market data: cached answers while updates flow, how long an update takes to a host, what an overload costs, and the memory of it."""

import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from bus import server
from tests import servers
from tests.bench.exchange import Channel
from tests.bench.figures import Figure, compare
from tests.bench.measure import (
    LOADS,
    Failed,
    Plan,
    Progress,
    Round,
    Side,
    ask,
    counted,
    cpu_share,
    neighbours,
    output_of,
    resident_mb,
)
from tests.bench.rig import NAME, Rig, rigged, symbols
from tests.bench.watch import Delays, question, sent_ns

KINDS = ("ticker", "depth")
FLOW = 1000.0
"""Updates a second."""
SYMBOLS, MANY_SYMBOLS = 100, 1000
CACHED_RATE_TARGET, CACHED_P50_TARGET, CACHED_CPU_TARGET = 0.85, 1.15, 1.35
DELAY_P50_TARGET_MS, DELAY_P99_TARGET_MS = 3.0, 10.0
NEWEST_TARGET_S = 1.0
FOLLOWING_TARGET_MB = 150.0
HITS_TARGET = 0.999
IDLE_S = 4.0
TIMES = 3
"""An overload is so many times what the feeder takes."""
FIRST_RATE, MOST_RATE = 2000.0, 64_000.0
TRY_S = 1.0
AT_ONCE_S = 0.1
"""What a feeder takes, it has told so long after it was sent."""
TRIES = 2
"""Of a rate: somebody else on the machine may have had a moment."""
GIVE_UP_S = 15.0
GROWTH_TARGET_MB = 20.0
"""What a burst may add to a process that queues nothing."""


class Cached(Struct, frozen=True):
    """Rounds of one kind. hits: the part of ours that came from the cache."""

    kind: str
    rounds: list[Round]
    hits: float


class Taken(Struct, frozen=True, kw_only=True):
    """What became of a burst. sent: updates; rate: a second; told: on the bus; conflated: replaced before they were told; settled_s: after
    the end, until the feeder had read everything; memory_mb: of the feeder, the most."""

    sent: int
    rate: float
    read: int
    told: int
    conflated: int
    settled_s: float
    memory_mb: float


class Overload(Struct, frozen=True, kw_only=True):
    """tries: ever faster. takes: the fastest that was taken whole, updates a second. burst: TIMES as many. newest_s: after its end, until
    the cache answered for every channel with what was sent last. before_mb: memory of the feeder."""

    tries: list[Taken]
    takes: float
    burst: Taken
    newest_s: float
    before_mb: float


class Found(Struct, frozen=True, kw_only=True):
    """idle: CPU seconds a second by process, while updates flow and nobody asks. heard: by a NATS subscriber; polled: through a bridge.
    following_mb: the bridge's memory with MANY_SYMBOLS."""

    cached: list[Cached]
    idle: dict[str, float]
    heard: Delays
    polled: Delays
    overload: Overload
    following_mb: float | None


# ---------------------------------------------------------------- cached answers


async def with_market(state: Path, plan: Plan, progress: Progress) -> Found:
    progress.step("starting the stand-in exchange, one bridge, one worker, one feeder")
    async with rigged(state) as rig:
        channels = [(kind, symbol) for symbol in symbols(SYMBOLS) for kind in KINDS]
        await rig.flow(FLOW)
        await rig.cached(channels)
        cached = [await cached_rounds(rig, kind, plan, progress) for kind in KINDS]
        progress.step(f"{FLOW:,.0f} updates a second and nobody asks")
        idle = await cpu_share(rig.pids, IDLE_S)
        progress.step("how long an update takes")
        order = msgspec.json.encode((await rig.told()).order).decode()
        seconds = ("--seconds", str(plan.watch_s))
        part = "tests.bench.watch"
        bus, subject = server.url(state, "reader"), f"feed.{NAME}.>"
        heard = msgspec.json.decode(await output_of(part, "listen", bus, subject, *seconds), type=Delays)
        polled = msgspec.json.decode(await output_of(part, "poll", rig.address, order, *seconds), type=Delays)
        overload = await overloaded(rig, channels, plan.overload_s, progress)
        progress.step(f"following {MANY_SYMBOLS:,} symbols")
        await rig.flow(FLOW)
        await rig.cached([("ticker", symbol) for symbol in symbols(MANY_SYMBOLS)])
        following_mb = resident_mb(rig.pids["bridge"])
    return Found(cached=cached, idle=idle, heard=heard, polled=polled, overload=overload, following_mb=following_mb)


async def cached_rounds(rig: Rig, kind: str, plan: Plan, progress: Progress) -> Cached:
    body = question(kind, symbols(1)[0])
    content = await ask(rig.address, body)
    part = (sys.executable, "-m", "tests.bench.reference", "constant", "--reply", content.decode())
    async with servers.running(*part) as bare:
        bare_url = (await bare.said(r"(?m)^ready (\S+)"))[1]
        if await ask(bare_url, body) != content:
            raise Failed("the reference answers other bytes than ours")
        ours = Side("ours", rig.address, {"http": rig.pids["bridge"]}, body)
        reference = Side("reference", bare_url, {"http": bare.process.pid}, body)
        sides = [msgspec.json.encode(side).decode() for side in (ours, reference)]
        rounds: list[Round] = []
        before = await answered(rig, kind)
        for connections in LOADS:
            progress.step(f"cached {kind} at {counted(connections)}, and the reference")
            options = ("--connections", str(connections), "--rounds", str(plan.cached_rounds), "--seconds", str(plan.cached_s))
            rounds += msgspec.json.decode(await output_of("tests.bench.pairs", *sides, *options), type=list[Round])
        hits, others = (now - then for now, then in zip(await answered(rig, kind), before, strict=True))
    return Cached(kind, rounds, hits / (hits + others))


async def answered(rig: Rig, kind: str) -> tuple[float, float]:
    """How many reads so far came from the cache, and how many from elsewhere."""
    name = "fmzbus_cache_total"
    hits = await rig.counted("bridge", name, exchange=NAME, method=kind, result="hit")
    return hits, await rig.counted("bridge", name, exchange=NAME, method=kind) - hits


# ---------------------------------------------------------------- overload


async def overloaded(rig: Rig, channels: Sequence[Channel], seconds: float, progress: Progress) -> Overload:
    """Double the rate until the feeder does not take it whole, then send TIMES what it took."""
    tries: list[Taken] = []
    rate, takes, failed = FIRST_RATE, FLOW, 0
    progress.step("ever more updates a second, until the feeder does not take them all")
    while rate <= MOST_RATE and failed < TRIES:
        tries.append(one := await burst(rig, rate, TRY_S))
        if one.rate < 0.9 * rate or one.conflated > 0.01 * one.sent or one.settled_s > AT_ONCE_S:
            failed += 1
        else:
            takes, rate, failed = one.rate, rate * 2, 0
    progress.step(f"{TIMES * takes:,.0f} updates a second, {TIMES} times what the feeder takes")
    before_mb = resident_mb(rig.pids["feeder"]) or 0.0
    ended = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        newest = group.create_task(newest_after(rig, channels, ended))
        most = await burst(rig, TIMES * takes, seconds, ended)
    return Overload(tries=tries, takes=takes, burst=most, newest_s=newest.result(), before_mb=before_mb)


async def burst(rig: Rig, rate: float, seconds: float, ended: asyncio.Event | None = None) -> Taken:
    """Send for a while, then nothing, until the feeder has read it all. Raises Failed."""
    await rig.flow(0)
    await settled(rig)
    first_read, first_told, first_conflated = await counters(rig)
    first = (await rig.told()).sent
    began_s = time.monotonic()
    await rig.flow(rate)
    memory_mb = [0.0]
    while (left_s := began_s + seconds - time.monotonic()) > 0:
        await asyncio.sleep(min(left_s, 0.1))
        memory_mb.append(resident_mb(rig.pids["feeder"]) or 0.0)
    await rig.flow(0)
    ended_s = time.monotonic()
    if ended is not None:
        ended.set()
    last = (await rig.told()).sent
    read, told, conflated = await settled(rig, first_read + last - first)
    settled_s = time.monotonic() - ended_s
    memory_mb.append(resident_mb(rig.pids["feeder"]) or 0.0)
    return Taken(
        sent=last - first,
        rate=(last - first) / (ended_s - began_s),
        read=int(read - first_read),
        told=int(told - first_told),
        conflated=int(conflated - first_conflated),
        settled_s=settled_s,
        memory_mb=max(memory_mb),
    )


async def counters(rig: Rig) -> tuple[float, float, float]:
    """Frames that the feeder read, values that it told, values that it conflated."""
    frames = await rig.counted("feeder", "fmzbus_feed_frames_total")
    return frames, await rig.counted("feeder", "fmzbus_feed_values_total"), await rig.counted("feeder", "fmzbus_feed_conflated_total")


async def settled(rig: Rig, frames: float = 0) -> tuple[float, float, float]:
    """Wait until the feeder has read that many frames, and reads no more."""
    until_s = time.monotonic() + GIVE_UP_S
    now = await counters(rig)
    while True:
        before, now = now, await counters(rig)
        if now == before and now[0] >= frames:
            return now
        if time.monotonic() > until_s:
            raise Failed(f"the feeder has read {now[0]:,.0f} of {frames:,.0f} frames, {GIVE_UP_S:g} s after the last was sent")


async def newest_after(rig: Rig, channels: Sequence[Channel], ended: asyncio.Event) -> float:
    """Seconds from the end of a burst until the cache has answered for each channel with what was sent last. Raises Failed."""
    await ended.wait()
    began_s = time.monotonic()
    last = (await rig.told()).last
    waiting = list(channels)
    while waiting:
        if time.monotonic() - began_s > GIVE_UP_S:
            raise Failed(f"the cache has something older for {len(waiting)} channels, {GIVE_UP_S:g} s after the last was sent")
        for channel, answer in (await rig.ask_all(waiting)).items():
            if answer.result == "hit" and sent_ns(answer.content) == last[".".join(channel)]:
                waiting.remove(channel)
    return time.monotonic() - began_s


# ---------------------------------------------------------------- figures


def market_figures(found: Found) -> list[Figure]:
    figures = [figure for one in found.cached for figure in cached_figures(one)]
    figures += [
        Figure(name=f"{FLOW:,.0f} updates/s: CPU {name}", ours=share * 1000, unit="ms/s") for name, share in sorted(found.idle.items())
    ]
    for delays, name in ((found.heard, "a NATS subscriber"), (found.polled, "a host")):
        p50_target, p99_target = (DELAY_P50_TARGET_MS, DELAY_P99_TARGET_MS) if delays is found.polled else (None, None)
        figures += [
            Figure(name=f"update to {name}: p50", ours=delays.p50_ms, unit="ms", target=p50_target),
            Figure(name=f"update to {name}: p99", ours=delays.p99_ms, unit="ms", target=p99_target),
        ]
    figures += overload_figures(found.overload)
    if found.following_mb is not None:
        name = f"resident, following {MANY_SYMBOLS:,} symbols: bridge"
        figures.append(Figure(name=name, ours=found.following_mb, unit="MB", target=FOLLOWING_TARGET_MB))
    return figures


def cached_figures(found: Cached) -> list[Figure]:
    figures = []
    for connections in LOADS:
        pairs = neighbours([one for one in found.rounds if one.report.connections == connections])
        at = f"cached {found.kind}, {counted(connections)}"
        rates, halves = ([(getattr(a.report, of), getattr(b.report, of)) for a, b in pairs] for of in ("rate", "p50_ms"))
        figures += [
            compare(f"{at}: rate", "/s", rates, CACHED_RATE_TARGET, at_least=True),
            compare(f"{at}: p50", "ms", halves, CACHED_P50_TARGET),
            compare(f"{at}: p99", "ms", [(a.report.p99_ms, b.report.p99_ms) for a, b in pairs]),
        ]
        spent = [(a.cpu_s["http"], b.cpu_s["http"]) for a, b in pairs if "http" in a.cpu_s and b.cpu_s.get("http")]
        if spent:
            figures.append(compare(f"{at}: CPU bridge, with the updates", "s/10k", spent, CACHED_CPU_TARGET))
    figures.append(Figure(name=f"cached {found.kind}: part from the cache", ours=found.hits, unit="", target=HITS_TARGET, at_least=True))
    return figures


def overload_figures(found: Overload) -> list[Figure]:
    at = f"{TIMES} times that"
    one = found.burst
    lost = one.sent - one.told - one.conflated
    return [
        Figure(name="the feeder takes", ours=found.takes, unit="/s"),
        Figure(name=f"{at}: sent", ours=one.rate, unit="/s"),
        Figure(name=f"{at}: told", ours=one.told, unit=""),
        Figure(name=f"{at}: dropped for a newer one, and counted", ours=one.conflated, unit=""),
        Figure(name=f"{at}: lost without a trace", ours=abs(lost), unit="", target=0),
        Figure(name=f"{at}: after its end, the newest in the cache", ours=found.newest_s, unit="s", target=NEWEST_TARGET_S),
        Figure(name=f"{at}: growth of the feeder", ours=one.memory_mb - found.before_mb, unit="MB", target=GROWTH_TARGET_MB),
    ]


def market_steps() -> int:
    """How many lines of progress with_market() has."""
    return 6 + len(KINDS) * len(LOADS)
