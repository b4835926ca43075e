"""The path of a request that a worker answers, and how long the whole system takes to start."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests import servers
from tests.bench.figures import Figure, compare
from tests.bench.measure import (
    LOADS,
    MANY,
    Failed,
    Plan,
    Progress,
    Round,
    Side,
    ask,
    counted,
    measured,
    neighbours,
    resident_mb,
    turns,
)

RATE_TARGET, P50_TARGET = 0.60, 1.40


async def start_seconds(state: Path) -> float:
    """From the command to the line `ready`, with everything that `fmzbus up` starts by itself, on a new state folder."""
    started = time.perf_counter()
    async with servers.system(state):
        return time.perf_counter() - started


async def against_reference(state: Path, plan: Plan, progress: Progress) -> tuple[list[Round], dict[str, float]]:
    """-> (every round, resident MB after them by process)."""
    progress.step("starting one bridge, one worker and the references")
    options = ("--bench", "--bridges", "1", "--workers", "1")
    part = (sys.executable, "-m", "tests.bench.reference")
    async with servers.system(state, *options, paper__enabled="false") as system:
        pids = system.pids
        url = f"{system.address}/null"
        expect = await ask(url)
        where = ("--state", str(state))
        async with (
            servers.running(*part, "respond", *where, "--reply", expect.decode()) as responder,
            servers.running(*part, "forward", *where) as forwarder,
        ):
            await responder.said("(?m)^ready")
            bare_url = (await forwarder.said(r"(?m)^ready (\S+)"))[1]
            if await ask(bare_url) != expect:
                raise Failed("the reference answers other bytes than ours")
            own_pids = {"http": pids["bridge-1"], "worker": pids["worker-1"], "nats": pids["nats"]}
            ours = Side("ours", url, own_pids, expect=expect)
            bare_pids = {"http": forwarder.process.pid, "worker": responder.process.pid, "nats": pids["nats"]}
            reference = Side("reference", bare_url, bare_pids, expect=expect)
            rounds = []
            for connections in LOADS:
                for side in turns(ours, reference, plan.rounds):
                    progress.step(f"{counted(connections)}, {side.name}")
                    rounds.append(await measured(side, connections, plan.seconds, plan.warm_up_s))
            memory = {name: resident_mb(pids[f"{name}-1"]) for name in ("bridge", "worker")}
    return rounds, {name: mb for name, mb in memory.items() if mb is not None}


def path_figures(rounds: Sequence[Round]) -> list[Figure]:
    """Rate, p50, p99 and CPU at each number of connections."""
    figures = []
    for connections in LOADS:
        pairs = neighbours([one for one in rounds if one.report.connections == connections])
        at = counted(connections)
        rate_target, p50_target = (RATE_TARGET, None) if connections == MANY else (None, P50_TARGET)
        figures += [
            compare(f"{at}: rate", "/s", [(a.report.rate, b.report.rate) for a, b in pairs], rate_target, at_least=True),
            compare(f"{at}: p50", "ms", [(a.report.p50_ms, b.report.p50_ms) for a, b in pairs], p50_target),
            compare(f"{at}: p99", "ms", [(a.report.p99_ms, b.report.p99_ms) for a, b in pairs]),
        ]
        for process, title in (("http", "bridge"), ("worker", "worker"), ("nats", "nats-server")):
            spent = [(a.cpu_s[process], b.cpu_s[process]) for a, b in pairs if a.cpu_s.get(process) and b.cpu_s.get(process)]
            if spent:
                figures.append(compare(f"{at}: CPU {title}", "s/10k", spent))
    return figures
