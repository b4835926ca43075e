"""The freshness checker finds what it is there for: answers spoilt between bridge and host, each counted; and, in a copy of the tree, one
rule of freshness broken by hand, which a case tells.
"""

import asyncio
import functools
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio
from msgspec import Struct

from tests.freshness import hosts, relay
from tests.freshness.cluster import MAX_AGE_S, Cluster, clustered
from tests.freshness.relay import Relay, Spoil
from tests.freshness.verdict import Verdict, judge
from tests.mutated import mutated
from tests.servers import eventually, grows

pytestmark = pytest.mark.slow

ENOUGH = 100
"""Spoilt answers that each planted fault has to be found in."""


class Planted(NamedTuple):
    cluster: Cluster
    relay: Relay


@pytest_asyncio.fixture(scope="module")
async def planted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Planted]:
    """Hosts that poll bridges over a relay, and all they ask is answered by workers: what is true is known without any feeder."""
    spoiling = Relay()
    async with clustered(tmp_path_factory.mktemp("f"), 1, feeders=0, between=functools.partial(relay.relayed, spoiling)) as cluster:
        await grows(lambda: len(cluster.seen), ENOUGH)
        yield Planted(cluster, spoiling)


async def spoilt(planted: Planted, spoil: Spoil, kind: str) -> Verdict:
    """The verdict on hosts whose answers are spoilt for a while, once every spoilt one was found."""
    planted.cluster.seen.clear()
    planted.relay.spoilt, planted.relay.spoil = 0, spoil
    await grows(lambda: planted.relay.spoilt, ENOUGH)
    planted.relay.spoil = None
    await eventually(lambda: getattr(verdict(planted), kind) == planted.relay.spoilt)
    return verdict(planted)


def verdict(planted: Planted) -> Verdict:
    return judge(list(planted.cluster.seen), planted.cluster.market.truth.spans, max_age_s=MAX_AGE_S)


async def test_sound_answers_are_right_whatever_the_trader_does(planted: Planted) -> None:
    planted.cluster.seen.clear()
    await grows(lambda: len(planted.cluster.seen), 10 * ENOUGH)
    found = verdict(planted)
    assert (found.stale, found.wrong, found.errors) == (0, 0, 0), found


async def test_each_answer_from_five_seconds_ago_is_found(planted: Planted) -> None:
    await asyncio.sleep(relay.OLD_S)  # the relay can tell what was said then only once that time has passed
    found = await spoilt(planted, relay.from_long_ago, "stale")
    assert (found.wrong, found.errors) == (0, 0), found


async def test_each_answer_with_one_level_off_is_found(planted: Planted) -> None:
    found = await spoilt(planted, relay.one_level_off, "wrong")
    assert (found.stale, found.errors) == (0, 0), found


async def test_each_spot_quote_for_a_swap_session_is_found(planted: Planted) -> None:
    async with asyncio.TaskGroup() as group:
        robots = group.create_task(
            hosts.flip(planted.cluster.addresses, 1, planted.cluster.seen.append, time.monotonic() + 3), name="one robot"
        )
        planted.cluster.seen.clear()
        planted.relay.spoil = relay.spot_for_all
    planted.relay.spoil = None
    found = verdict(planted)
    # Of what one robot was told behind each second change: all of it, but not what it was told as spot.
    asked = [one for one in planted.cluster.seen if one.symbol == "BTC_USDT" and one.market == "BTC_USDT.swap"]
    assert robots.result() >= 4
    assert len(asked) >= (robots.result() // 2) * hosts.ASKS * len(hosts.KINDS)
    assert (found.stale, found.wrong, found.errors) == (0, len(asked), 0), found


class Mutant(Struct, frozen=True):
    """text in file becomes other. fault: the case that shows it; kind: of what is found then."""

    name: str
    file: str
    text: str
    other: str
    fault: str
    kind: str


MUTANTS = (
    Mutant(
        "old proof is proof",
        "bus/market.py",
        "    return now_s - proven_s <= entry.max_age_s",
        "    return proven_s > NEVER",
        "stall",
        "stale",
    ),
    Mutant(
        "a beat is as new as its arrival",
        "bus/follow.py",
        "None if tick_ms is None or tick_ms > now_s * 1000 else tick_ms / 1000",
        "now_s",
        "late-feed",
        "stale",
    ),
    Mutant(
        "what is proven is proven for the value one has",
        "bus/market.py",
        "        if entry.n < listed.n:\n            return False\n        if entry.n == listed.n and listed.proven_s > proven_s:",
        "        if listed.proven_s > proven_s:",
        "lost-key",
        "stale",
    ),
    Mutant(
        "a frame is as new as its arrival",
        "workers/lag.py",
        "        return received_s - self.late_s",
        "        return received_s",
        "slow-socket",
        "stale",
    ),
    Mutant(
        "a crossed book is a book",
        "workers/book.py",
        "if bids and asks and bids[-1] >= asks[0]:",
        "if not bids and not asks:",
        "crossed-book",
        "wrong",
    ),
    Mutant(
        "a shared answer is as new as its arrival",
        "bridge/shared.py",
        "Answer(content, (tick_ms - told.age_ms) / 1000)",
        "Answer(content, self._clock())",
        "unfed",
        "stale",
    ),
    Mutant(
        "a changed contract is not heard of",
        "bridge/resolve.py",
        "if self._known[who].contract != changed.contract:",
        "if who == ():",
        "swap-session",
        "wrong",
    ),
    Mutant(
        "a bridge that was cut off knows all",
        "bridge/resolve.py",
        "now_s - self._sure_s >= SURE_S",
        "False",
        "swap-session-stalled",
        "wrong",
    ),
)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_broken_rule_is_found(mutant: Mutant, tmp_path: Path) -> None:
    tree, env = mutated(tmp_path / "tree", mutant.file, mutant.text, mutant.other)
    command = [sys.executable, "-m", "tests.freshness", "--fault", mutant.fault]
    run = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=170)
    line = re.search(rf"^{mutant.fault}: answers \d+, from the feed [1-9]\d*, stale (\d+), wrong (\d+), errors \d+, ", run.stdout, re.M)
    assert line, run.stdout + run.stderr
    assert dict(zip(("stale", "wrong"), map(int, line.groups()), strict=True))[mutant.kind] > 0, run.stdout
    assert re.search(f"^  {mutant.kind.upper()} ", run.stdout, re.M), run.stdout
    assert run.returncode == 1
