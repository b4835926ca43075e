"""No stale quote and no wrong book while things break: the cases of tests/freshness, a line each."""

import asyncio

import pytest

from tests.freshness import cases
from tests.freshness.acts import CASES

pytestmark = pytest.mark.slow

ALL_S = 420.0
"""What all cases may take on a machine that does much else; usually it is a third of that."""
ENOUGH_HITS = 0.5
"""Part of all answers that must come from the feed, however much breaks."""


@pytest.mark.timeout(ALL_S + 60)
async def test_no_answer_is_stale_or_wrong_whatever_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        with capsys.disabled():
            print(line, flush=True)  # noqa: T201 - for the person who waits

    say("")
    async with asyncio.timeout(ALL_S):
        total = await cases.run_beside(list(CASES), clusters=cases.CLUSTERS, say=say)
    say(total.line)
    assert (total.cases, total.failed, total.stale, total.wrong) == (len(CASES), 0, 0, 0), "\n".join(said)
    assert total.hits >= ENOUGH_HITS * total.answers, total.line
