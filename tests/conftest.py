"""Fixtures: a whole system once per test module, and hosts that call it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests import paper, servers
from tests.host import Host, hosting


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=200, help="how many cases the crash harness plays (tests/test_crashes.py)")


@pytest_asyncio.fixture(scope="module")
async def shared_system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[servers.System]:
    """One system for all tests of a module: each uses keys of its own, and leaves no futures state that another would meet."""
    state = tmp_path_factory.mktemp("state")
    routes = {"digitalasset": "paper", "exchange": "paper", "okx": "paper", "ftx": "paper", "": "paper"}
    config = "\n".join(["[routes]", *(f'"{name}" = "{exchange}"' for name, exchange in routes.items())])
    (state / "fmzbus.toml").write_text(config)
    async with servers.system(state, "--bench", "--config", str(state / "fmzbus.toml")) as system:
        yield system


@pytest_asyncio.fixture
async def host(shared_system: servers.System) -> AsyncIterator[Host]:
    async with hosting(shared_system.address) as host:
        yield host


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder with a short path: a unix socket's may have 107 characters."""
    return tmp_path / "s"


@pytest.fixture
def clock() -> paper.Clock:
    """The paper exchange's time: stands still until a test moves it."""
    return paper.Clock()


@pytest_asyncio.fixture
async def client(tmp_path: Path, clock: paper.Clock) -> AsyncIterator[paper.Client]:
    """A paper exchange of the test's own, and a bare client of it."""
    async with paper.exchange(tmp_path / "paper", clock) as made:
        yield made
