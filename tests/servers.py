"""The real parts that tests run against: nats-server, bridges, workers, the paper exchange, or all of them under `fmzbus up`."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from bus import fleet, seal, server
from bus.config import environment
from bus.connection import connected

READY_S = 20
COMMAND = str(Path(sys.executable).with_name("fmzbus"))


async def eventually(condition: Callable[[], object], within_s: float = 10) -> None:
    """Wait for a condition with a deadline; the one place where a test polls."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - another process changes it, no event of ours tells
            await asyncio.sleep(0.02)


class Running:
    """One process of ours. output: what it printed so far."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.output = ""
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.output += line.decode(errors="replace")

    async def said(self, pattern: str, within_s: float = READY_S) -> re.Match[str]:
        """Wait until it printed a line that matches; fails with all it printed."""
        with contextlib.suppress(TimeoutError):
            await eventually(lambda: re.search(pattern, self.output) or self.process.returncode is not None, within_s)
        found = re.search(pattern, self.output)
        assert found, f"never said {pattern!r}:\n{self.output}"
        return found

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    async def stop(self, number: int = signal.SIGTERM, within_s: float = 30) -> int:
        """Signal it and wait for its end; its exit status."""
        if self.process.returncode is None:
            self.process.send_signal(number)
            try:
                await asyncio.wait_for(self.process.wait(), within_s)
            except TimeoutError:
                self.process.kill()
        status = await self.process.wait()
        await self._reader
        return status


@asynccontextmanager
async def running(*command: str, env: dict[str, str] | None = None, pass_fds: tuple[int, ...] = ()) -> AsyncIterator[Running]:
    """Start a process whose output we read; stopped at the end, with its children."""
    process = await asyncio.create_subprocess_exec(
        *command, env=env or dict(os.environ), stdout=PIPE, stderr=STDOUT, process_group=0, pass_fds=pass_fds
    )
    one = Running(process)
    try:
        yield one
    finally:
        await one.stop()


@asynccontextmanager
async def nats(state: Path) -> AsyncIterator[Running]:
    """The embedded nats-server on this state folder, with sealing keys beside it."""
    if not (state / "keys").exists():
        seal.new_keys(state / "keys")
    async with running(*server.command(state)) as one:
        await server.wait_ready(state)
        yield one


class System:
    """What `fmzbus up` runs. address: where hosts POST; pids: by name, "worker-1"."""

    def __init__(self, state: Path, one: Running, address: str) -> None:
        self.state = state
        self.running = one
        self.address = address

    @property
    def pids(self) -> dict[str, int]:
        """As the ready table told them; a restarted child has another."""
        return {
            name: int(pid) for name, pid in re.findall(r"^((?:nats|paper|(?:worker|feeder|bridge)-\d+)) +(\d+) ", self.running.output, re.M)
        }

    def admin(self, name: str) -> str:
        found = re.search(rf"^{name} .* (\S+:\d+) *$", self.running.output, re.M)
        assert found
        return f"http://{found[1]}"


@asynccontextmanager
async def system(state: Path, *options: str, **config: object) -> AsyncIterator[System]:
    """The whole system on free ports, as a user starts it: system(tmp, "--bench", routes__okx="paper")."""
    command = (COMMAND, "up", "--state", str(state), "--port", "0", "--admin-port", "0", *options)
    async with running(*command, env=environment(**config)) as one:
        ready = await one.said(r"(?m)^ready (http://\S+:\d+)/")
        yield System(state, one, ready[1])


def process_env(state: Path, role: str, **config: object) -> dict[str, str]:
    """The environment of a bridge, worker or feeder that runs by itself against nats() on this state folder."""
    monitors = f'["{server.monitor(state)}"]'
    return environment(state=state, nats__url=server.url(state, role), nats__monitors=monitors, **config)


@asynccontextmanager
async def worker(state: Path, **config: object) -> AsyncIterator[Running]:
    async with running(sys.executable, "-m", "workers", env=process_env(state, "worker", **config)) as one:
        await one.said('"event":"ready"')
        yield one


@asynccontextmanager
async def feeder(state: Path, **config: object) -> AsyncIterator[Running]:
    async with running(sys.executable, "-m", "workers.feeder", env=process_env(state, "feeder", **config)) as one:
        await one.said('"event":"ready"')
        yield one


@asynccontextmanager
async def bridge(state: Path, **config: object) -> AsyncIterator[tuple[Running, str]]:
    """-> (process, service address)."""
    env = process_env(state, "bridge", **{"bridge__port": 0, **config})
    async with running(sys.executable, "-m", "bridge", env=env) as one:
        ready = await one.said(r'"event":"ready","address":"([^"]+)"')
        yield one, ready[1]


async def readiness(admin: str) -> bool:
    """What /readyz of an admin listener says."""
    async with aiohttp.ClientSession() as session, session.get(f"{admin}/readyz") as response:
        return response.status == 200


@asynccontextmanager
async def watching(state: Path) -> AsyncIterator[fleet.Fleet]:
    """Hear who is alive on the embedded bus of this state folder, as an operator's tools do."""
    async with connected(server.url(state, "operator"), "operator", closed=lambda: None) as bus, fleet.followed(bus) as heard:
        yield heard


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def grows(count: Callable[[], int], by: int, within_s: float = 30) -> None:
    """Wait until a count has grown by that much."""
    goal = count() + by
    await eventually(lambda: count() >= goal, within_s)


def pids_of(heard: fleet.Fleet, role: str) -> set[int]:
    """The processes of a role that are alive and ready."""
    return {one.pid for one in heard.alive() if one.role == role and one.ready}


async def get(url: str) -> str:
    """What an admin listener or the bus's monitor answers."""
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return await response.text()


async def shows(url: str, pattern: str, within_s: float = 10) -> None:
    """Wait until what is read there has a line that matches."""
    async with asyncio.timeout(within_s):
        while not re.search(pattern, await get(url), re.M):  # noqa: ASYNC110 - only asking tells
            await asyncio.sleep(0.02)
