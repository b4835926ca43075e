"""Background work: whoever leaves ends it, also a job that misses the first call to stop."""

import asyncio

import pytest

from bus.lifecycle import running


async def test_a_job_that_swallows_a_cancel_is_cancelled_again() -> None:
    """As asyncio.wait_for() does before Python 3.12, when a reply and the cancel come at the same moment."""
    cancels = 0

    async def job() -> None:
        nonlocal cancels
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancels += 1
                if cancels == 2:
                    raise

    async with asyncio.timeout(10), running(job()):
        await asyncio.sleep(0)
    assert cancels == 2


async def test_a_job_that_fails_ends_the_body() -> None:
    async def job() -> None:
        raise ValueError("broken")

    with pytest.raises(ExceptionGroup) as failed:
        async with asyncio.timeout(10), running(job()):
            await asyncio.sleep(60)
    assert [str(error) for error in failed.value.exceptions] == ["broken"]
