"""One case: drawn from its seed and number alone, played on a cluster, judged; and many of them, on several clusters side by side."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from msgspec import Struct

from tests.crashes import faults, hosts
from tests.crashes.cluster import DEADLINE_S, Cluster, clustered
from tests.crashes.verdict import Asked, Facts, Killed, Verdict, Written, judge, story

SETTLED_S = 15.0
"""By when, after everything was brought back, each order has an outcome."""
KINDS = {"double": "doubles", "lost": "lost", "lie": "lies", "unsettled": "unsettled"}

Say = Callable[[str], None]


class Case(Struct, frozen=True):
    """Everything that will happen, as far as it is in our hands. turn: of the same case played several times."""

    seed: int
    number: int
    turn: int
    plans: tuple[hosts.Plan, ...]
    weather: faults.Weather

    def keys(self, account: int) -> tuple[str, str]:
        """Access and secret key of one of its accounts."""
        return f"case-{self.seed}-{self.number}-{self.turn}-{account}", "a-secret-for-play-money"

    @property
    def access_keys(self) -> set[str]:
        return {self.keys(plan.account)[0] for plan in self.plans}


class Played(Struct):
    """What was seen of a case, and how it was judged last. began: the journal's last record before it."""

    case: Case
    began: int
    asked: list[Asked]
    killed: list[Killed]
    facts: Facts
    verdict: Verdict
    seconds: float


class Total(Struct):
    """Of all cases. The last lines of a run say it."""

    cases: int = 0
    found: Counter[str] = Counter()
    orders: int = 0
    ambiguous: int = 0
    kills: int = 0

    @property
    def lines(self) -> tuple[str, str]:
        counts = ", ".join(f"{name} {self.found[kind]}" for kind, name in KINDS.items())
        stake = f"orders {self.orders}, ambiguous {self.ambiguous}, kills between intent and outcome {self.kills}"
        return f"cases {self.cases}, {counts}", stake


def draw(seed: int, number: int, turn: int = 0) -> Case:
    rng = random.Random(f"{seed}-{number}")
    plans = hosts.draw(rng)
    return Case(seed, number, turn, plans, faults.draw(rng))


async def play(cluster: Cluster, case: Case) -> Played:
    """Let it happen, bring everything back, and judge."""
    started = time.monotonic()
    began = await cluster.journal_end()
    await faults.arm(cluster, case.weather)
    asked: list[Asked] = []
    strike = faults.Strike(cluster, case.weather)
    try:
        async with asyncio.TaskGroup() as group:
            for plan in case.plans:
                host = hosts.Host(cluster.session, plan, case.keys(plan.account), cluster.address, DEADLINE_S, asked)
                group.create_task(host.run())
    finally:
        await strike.over()
    await cluster.whole()
    await faults.clear(cluster)
    written, left = await _settled(cluster, began, {one.key for one in asked if not one.cancels})
    facts = Facts(asked, await cluster.received(case.access_keys), written, strike.killed, left)
    return Played(case, began, asked, strike.killed, facts, judge(facts), time.monotonic() - started)


async def _settled(cluster: Cluster, began: int, keys: set[str]) -> tuple[list[Written], list[str]]:
    """-> (the journal since then, keys that are still listed as unsettled), once every order has its outcome or time is up."""
    written: list[Written] = []
    until = time.monotonic() + SETTLED_S
    while True:
        fresh = await cluster.journal(began)
        written += [record for record in fresh if record.key in keys]
        began = max([began, *(record.sequence for record in fresh)])
        outcomes = {record.key for record in written if record.record == "outcome" and record.state != "unknown"}
        left = sorted(keys & await cluster.left())
        if (not left and {record.key for record in written if record.record == "intent"} <= outcomes) or time.monotonic() > until:
            return written, left
        await asyncio.sleep(0.1)


async def judged_again(cluster: Cluster, played: list[Played]) -> None:
    """With the ledger and the journal of the end: what came late is found too."""
    journal = await cluster.journal(0)
    left = await cluster.left()
    for one in played:
        keys = {asked.key for asked in one.asked if not asked.cancels}
        received = await cluster.received(one.case.access_keys)
        one.facts = Facts(one.asked, received, [record for record in journal if record.key in keys], one.killed, sorted(keys & left))
        one.verdict = judge(one.facts)


async def run(
    folder: Path, seed: int, numbers: list[int], *, clusters: int, say: Say, stop_at: str | None = None, verbose: bool = False
) -> Total:
    """Play these cases and say how it went, each finding with all that is needed to understand and replay it.

    stop_at: begin no further case once something of that kind was found, "any" for whatever.
    """
    total = Total(found=Counter())
    waiting = enumerate(numbers)
    started = time.monotonic()
    starting = asyncio.Semaphore(2)  # the first are at work while the others start

    async def side(number: int) -> None:
        played: list[Played] = []
        async with contextlib.AsyncExitStack() as stack:
            async with starting:
                cluster = await stack.enter_async_context(clustered(folder, number))
            for case in _cases(waiting, seed, lambda: _enough(total, stop_at)):
                one = await play(cluster, case)
                played.append(one)
                total.cases += 1
                _add(total, one.verdict)
                for line in _told(one):
                    say(line)
                if verbose or total.cases % 20 == 0:
                    say(_progress(total, one, time.monotonic() - started))
            before = {(one.case.turn, finding) for one in played for finding in one.verdict.findings}
            await judged_again(cluster, played)
            for one in played:
                one.verdict.findings = [finding for finding in one.verdict.findings if (one.case.turn, finding) not in before]
                total.found.update(finding.kind for finding in one.verdict.findings)
                for line in _told(one):
                    say(f"at the end: {line}")

    async with asyncio.TaskGroup() as group:
        for number in range(min(clusters, len(numbers))):
            group.create_task(side(number))
    return total


def _enough(total: Total, stop_at: str | None) -> bool:
    return bool(stop_at and (total.found.total() if stop_at == "any" else total.found[stop_at]))


def _cases(waiting: Iterator[tuple[int, int]], seed: int, enough: Callable[[], bool]) -> Iterator[Case]:
    for turn, number in waiting:
        yield draw(seed, number, turn)
        if enough():
            return


def _add(total: Total, verdict: Verdict) -> None:
    total.found.update(finding.kind for finding in verdict.findings)
    total.orders += verdict.orders
    total.ambiguous += verdict.ambiguous
    total.kills += verdict.kills


def _progress(total: Total, one: Played, seconds: float) -> str:
    event = one.case.weather.event
    last = f"case {one.case.number}: {one.verdict.orders} orders, {event.action} {event.part}, {one.seconds:.1f} s"
    return f"{seconds:6.1f} s  {total.cases} cases, {total.orders} orders, ambiguous {total.ambiguous}, kills {total.kills}; last {last}"


def _told(one: Played) -> Iterator[str]:
    """What was found: a line each, and all that is known of the order behind it, one line too."""
    case = one.case
    for finding in one.verdict.findings:
        yield (
            f"{finding.kind.upper()} case {case.number} seed {case.seed} order {finding.order} key {finding.key}: {finding.why}"
            f" | replay: python -m tests.crashes --seed {case.seed} --case {case.number}"
            f" | {_weather(case)} | " + " | ".join(story(one.facts, finding.order, finding.key))
        )


def _weather(case: Case) -> str:
    event = case.weather.event
    armed = ", ".join(" ".join(str(value) for value in fault.values()) for fault in case.weather.faults)
    forgiving = "client order ids taken twice; " if case.weather.forgiving else ""
    moment = f"{event.delay_s * 1000:.1f} ms after {event.record} {event.after}"
    return f"{forgiving}{armed}; {event.action} {event.part} {moment} for {event.down_s:.2f} s"
