"""One case: hosts poll, something breaks and is repaired, every answer is compared with what was true. And many of them, one after the
other on one cluster, or in parts on several, each with a process of its own."""

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from tests.freshness.acts import CASES, Case, Unmet
from tests.freshness.cluster import BRIDGES, MAX_AGE_S, Cluster, clustered
from tests.freshness.verdict import Verdict, judge

FOR_S = 2.0
"""How long most faults last."""
SEED = 1
CLUSTERS = 2
"""Side by side: most of a case is waiting."""
FIRST_S = 20.0
"""By when every host is served from the cache at the start of a case."""
CALM_S = 0.2
"""How long hosts poll before and after."""
TOLD_ERRORS = 3

Say = Callable[[str], None]

_TOTAL = re.compile(
    r"freshness: cases (?P<cases>\d+), answers (?P<answers>\d+), from the feed (?P<hits>\d+), stale (?P<stale>\d+), wrong (?P<wrong>\d+)"
    r"(, FAILED (?P<failed>\d+))?"
)


class Played(Struct):
    """struck: how often the fault did, None where that cannot be counted; again_s: when all hosts were served from the cache again, None
    for never."""

    name: str
    verdict: Verdict
    struck: int | None
    again_s: float | None
    seconds: float
    unmet: str = ""

    @property
    def trouble(self) -> str:
        """Why the case proves nothing, or shows that the product does not come back; "" where all is well."""
        if self.unmet:
            return self.unmet
        if self.again_s is None:
            return "never served again"
        if self.struck == 0:
            return "the fault never struck"
        return "" if self.verdict.hits else "nothing came from the feed"

    @property
    def failed(self) -> bool:
        return bool(self.verdict.stale or self.verdict.wrong or self.trouble)

    @property
    def total(self) -> "Total":
        one = self.verdict
        return Total(cases=1, failed=int(self.failed), answers=one.answers, hits=one.hits, stale=one.stale, wrong=one.wrong)

    @property
    def line(self) -> str:
        one = self.verdict
        counts = f"answers {one.answers}, from the feed {one.hits}, stale {one.stale}, wrong {one.wrong}, errors {one.errors}"
        again = "NEVER served again" if self.again_s is None else f"served again after {self.again_s:.1f} s"
        struck = "" if self.struck is None else f", struck {self.struck}"
        return f"{self.name}: {counts}, {again}, oldest {one.oldest_s:.2f} s{struck}"

    @property
    def details(self) -> Iterator[str]:
        for finding in self.verdict.findings:
            yield f"  {finding.kind.upper()} {finding.why}"
        if self.trouble:
            yield f"  {self.trouble.upper()}"

    @property
    def errors(self) -> Iterator[str]:
        said = sorted(self.verdict.said.items(), key=lambda pair: -pair[1])
        for text, count in said[:TOLD_ERRORS]:
            yield f"  {count} x {text[:160]}"


class Total(Struct):
    cases: int = 0
    failed: int = 0
    answers: int = 0
    hits: int = 0
    stale: int = 0
    wrong: int = 0

    def add(self, other: "Total") -> None:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @classmethod
    def read(cls, line: str) -> "Total | None":
        """What `line` said."""
        found = _TOTAL.fullmatch(line)
        return cls(**{name: int(count or 0) for name, count in found.groupdict().items()}) if found else None

    @property
    def line(self) -> str:
        counts = f"answers {self.answers}, from the feed {self.hits}, stale {self.stale}, wrong {self.wrong}"
        return f"freshness: cases {self.cases}, {counts}" + (f", FAILED {self.failed}" if self.failed else "")


async def play(cluster: Cluster, name: str, case: Case, for_s: float) -> Played:
    """Let it happen, wait until all hosts are served from the cache again, and judge.

    Raises RuntimeError where they were not even at the beginning.
    """
    await cluster.feeders(case.feeders)
    if await cluster.served(time.monotonic(), FIRST_S) is None:
        _complain(cluster)
    began_s = time.monotonic()
    cluster.seen.clear()
    cluster.market.truth.forget(began_s - 60)
    await asyncio.sleep(CALM_S)
    struck, unmet = None, ""
    try:
        struck = await case.act(cluster, for_s)
    except Unmet as e:
        unmet = str(e)
    over_s = time.monotonic()
    again_s = await cluster.served(over_s, case.again_s)
    await asyncio.sleep(CALM_S)
    verdict = judge(list(cluster.seen), cluster.market.truth.spans, max_age_s=MAX_AGE_S, began_s=began_s)
    return Played(name, verdict, struck, again_s, time.monotonic() - began_s, unmet)


async def run(folder: Path, names: Sequence[str], *, seed: int = SEED, for_s: float = FOR_S, say: Say, verbose: bool = False) -> Total:
    """Play these cases and say how each went, and at once what was found. Raises RuntimeError where the cluster does not come up."""
    total = Total()
    async with contextlib.AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(clustered(folder, seed))
        for name in names:
            one = await play(cluster, name, CASES[name], for_s)
            total.add(one.total)
            say(one.line + (f" ({one.seconds:.1f} s)" if verbose else ""))
            for line in (*one.details, *(one.errors if verbose else ())):
                say(line)
    return total


async def run_beside(names: Sequence[str], *options: str, clusters: int, say: Say) -> Total:
    """Play these cases on so many clusters side by side. options: further ones of `python -m tests.freshness`.

    Raises RuntimeError where one of them did not come up.
    """
    total = Total()

    async def part(part: Sequence[str]) -> None:
        command = [sys.executable, "-W", "error", "-m", "tests.freshness", "--clusters", "1", *options, "--fault", *part]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
        ended = None
        assert process.stdout is not None
        try:
            async for data in process.stdout:
                line = data.decode(errors="replace").rstrip("\n")
                if ended := Total.read(line):
                    total.add(ended)
                else:
                    say(line)
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()  # what it has started dies with it
            await process.wait()
        if ended is None:
            raise RuntimeError(f"the cases {', '.join(part)} did not end; see above")

    async with asyncio.TaskGroup() as group:
        for number in range(min(clusters, len(names))):
            group.create_task(part(names[number::clusters]))
    return total


def _complain(cluster: Cluster) -> None:
    """Raises RuntimeError with what hosts and processes say, where the cache does not serve them."""
    verdict = judge(cluster.seen, cluster.market.truth.spans, max_age_s=MAX_AGE_S)
    sources = sorted({(one.bridge, one.kind, one.symbol, one.source) for one in cluster.seen[-200:] if one.bridge in BRIDGES})
    raise RuntimeError(f"the cache serves nobody within {FIRST_S:g} s: {verdict.said} {sources}\n{cluster.logs()}")
