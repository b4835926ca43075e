"""Orders while things break: the cases of tests/crashes, on clusters side by side. `--cases N` plays more of them."""

import asyncio
from pathlib import Path

import pytest

from tests.crashes import cases
from tests.crashes.__main__ import CLUSTERS, SEED

pytestmark = pytest.mark.slow

ENOUGH = 200
"""So many cases must put this much at stake."""
ORDERS, AMBIGUOUS, KILLS = 2000, 300, 100
CASE_S = 3.0
"""What a case may take, of all that run side by side; usually it is a third of that."""


@pytest.mark.timeout(0)  # as long as the cases take
async def test_no_order_is_doubled_lost_lied_about_or_left_unsettled(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = request.config.getoption("--cases")

    def say(line: str) -> None:
        with capsys.disabled():
            print(line, flush=True)  # noqa: T201 - for the person who waits

    say("")
    async with asyncio.timeout(60 + count * CASE_S):
        total = await cases.run(tmp_path, SEED, list(range(1, count + 1)), clusters=CLUSTERS, say=say)
    for line in total.lines:
        say(line)
    assert total.lines[0] == f"cases {count}, doubles 0, lost 0, lies 0, unsettled 0"
    if count >= ENOUGH:
        assert (total.orders >= ORDERS, total.ambiguous >= AMBIGUOUS, total.kills >= KILLS) == (True, True, True), total.lines[1]
