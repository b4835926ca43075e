"""One small cluster under the harness' own control: every process by its pid, killed, stopped, continued and started again at will.

nats-server, the paper exchange, two workers and two bridges on ports that are kept. Nobody supervises them but the harness.
"""

import asyncio
import base64
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from bus import seal, server
from bus.config import environment
from tests.crashes.verdict import Killed, Received, Written
from workers.venues.paper import ledger

DEADLINE_S = 1.0
SETTLE_AFTER_S = 0.5
READY_S = 60.0
"""For a machine that does much else; usually it takes one."""
PORTS = (12_000, 30_000)
"""Below those that the kernel gives to outgoing connections: one of those must not take a port while its owner is down."""
PORTS_EACH = 50
PARTS = ("nats", "paper", "worker-1", "worker-2", "bridge-1", "bridge-2")
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Part:
    """One process. output: of all its runs. stopped: SIGSTOP, and not continued yet."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], output: Path) -> None:
        self.name = name
        self.output = output
        self.stopped = False
        self._command = command
        self._env = env
        self._process: asyncio.subprocess.Process | None = None
        self._began = 0

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        with self.output.open("ab") as output:
            self._began = output.tell()
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                env=self._env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
                preexec_fn=_die_with_parent,
            )
        self.stopped = False

    async def ready(self) -> None:
        """Wait until it said so. Raises RuntimeError with its last words."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_S):
                while self.alive and b'"event":"ready"' not in self._said():  # noqa: ASYNC110 - another process writes it
                    await asyncio.sleep(0.02)
        if b'"event":"ready"' not in self._said():
            raise RuntimeError(f"{self.name} did not become ready: {self._said()[-2000:].decode(errors='replace')}")

    def _said(self) -> bytes:
        with self.output.open("rb") as output:
            output.seek(self._began)
            return output.read()

    def stop(self) -> None:
        self.stopped = True
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self.stopped = False
        self._send(signal.SIGCONT)

    async def kill(self) -> None:
        self._send(signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()

    def _send(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


KNOWN_AT = {"intent": "journaled_ms", "unknown": "unknown_ms"}
"""When the earlier records of an order were written, as its last one tells."""


class Cluster:
    """number: among those that run side by side. parts: by name, see PARTS. session: the hosts' connections.

    workers: process names of the bus -> pid. on_record: called with kind and process name of each record that is
    written from now on.
    """

    def __init__(self, state: Path, number: int, session: aiohttp.ClientSession) -> None:
        self.state = state
        self.number = number
        self.session = session
        self.parts: dict[str, Part] = {}
        self.workers: dict[str, int] = {}
        self.on_record: Callable[[str, str], None] | None = None
        self.nc = Client()
        self._listens = False
        self._addresses: dict[str, str] = {}
        self._paper = ""

    def address(self, bridge: str) -> str:
        return self._addresses[bridge]

    def process(self, part: str) -> str:
        """How a worker names itself in the journal, "" for any other part."""
        pid = self.parts[part].pid
        return next((process for process, of in self.workers.items() if of == pid), "")

    async def start(self) -> None:
        (self.state / "logs").mkdir(parents=True)
        seal.new_keys(self.state / "keys")
        ports = _ports(self.number)
        (self.state / "nats").mkdir(mode=0o700)
        chosen = server.Settings(next(ports), next(ports), {})
        (self.state / "nats" / "settings.json").write_bytes(msgspec.json.encode(chosen))
        self._add("nats", server.command(self.state), dict(os.environ))
        await self.start_part("nats")
        paper_port = next(ports)
        self._paper = f"http://127.0.0.1:{paper_port}"
        common: dict[str, object] = {
            "state": self.state,
            "paper__port": paper_port,
            "venues__paper__base_url": self._paper,
            "bridge__deadline_s": DEADLINE_S,
            "orders__settle_after_s": SETTLE_AFTER_S,
            "workers__exchanges": '["paper"]',
        }
        python = [sys.executable, "-W", "error", "-m"]
        self._add("paper", [*python, "workers.venues.paper"], environment(**common))
        for name in PARTS[2:]:
            role = name.partition("-")[0]
            own = common | {"nats__url": server.url(self.state, role)}
            if role == "bridge":
                own["bridge__port"] = next(ports)
                self._addresses[name] = f"http://127.0.0.1:{own['bridge__port']}"
            self._add(name, [*python, "workers" if role == "worker" else "bridge"], environment(**own))
        await asyncio.gather(*(self.start_part(name) for name in PARTS[1:]))
        await self._listen()

    def _add(self, name: str, command: list[str], env: dict[str, str]) -> None:
        self.parts[name] = Part(name, command, env, self.state / "logs" / f"{name}.out")

    async def start_part(self, name: str) -> None:
        """Start it, if it does not run, and wait until it is ready."""
        part = self.parts[name]
        if not part.alive:
            await part.start()
        if name == "nats":
            await server.wait_ready(self.state)
        else:
            await part.ready()

    async def kill(self, name: str) -> Killed:
        """SIGKILL, now."""
        killed = Killed(part=name, at_ms=time.time() * 1000, process=self.process(name))
        await self.parts[name].kill()
        return killed

    async def whole(self) -> None:
        """Continue and start whatever does not run; return when all of it is ready and all workers are known by name."""
        for part in self.parts.values():
            if part.stopped:
                part.resume()
        await self.start_part("nats")
        await asyncio.gather(*(self.start_part(name) for name in PARTS[1:]))
        async with asyncio.timeout(READY_S):
            while not (self.nc.is_connected and self.process("worker-1") and self.process("worker-2")):  # noqa: ASYNC110 - their next beat tells
                await asyncio.sleep(0.02)

    async def end(self) -> None:
        """Kill everything."""
        if not self.nc.is_closed and self._listens:
            await self.nc.close()
        for part in self.parts.values():
            await part.kill()

    # ---------------------------------------------------------------- the exchange

    async def control(self, verb: str, target: str, document: object = None) -> None:
        """Call the exchange's control API."""
        where = msgspec.json.decode((self.state / "paper" / "control.json").read_bytes())
        headers = {"Authorization": f"Bearer {where['token']}"}
        body = None if document is None else msgspec.json.encode(document)
        async with self.session.request(verb, f"http://127.0.0.1:{where['port']}{target}", data=body, headers=headers) as reply:
            assert reply.status == 200, await reply.text()

    async def received(self, keys: set[str]) -> list[Received]:
        """The ledger of these access keys."""
        rows: list[ledger.Entry] = []
        for key in sorted(keys):
            query = ledger.Query(account=ledger.account_hash(key), limit=ledger.MOST_ROWS)
            rows += await asyncio.to_thread(ledger.read, self.state / "paper", query)
        return [_received(row) for row in rows]

    # ---------------------------------------------------------------- the journal, read without any code of the product

    async def _listen(self) -> None:
        async def quiet(_error: Exception) -> None:
            """The bus goes away many times here."""

        self.nc = await nats.connect(
            server.url(self.state, "operator"),
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.05,
            connect_timeout=1,
            allow_reconnect=True,
            error_cb=quiet,
        )
        self._listens = True
        await self.nc.subscribe("unsettled.*.*.*.*.sent", cb=self._heard_record)
        await self.nc.subscribe("fleet.worker.*", cb=self._heard_worker)
        await self.nc.flush()

    async def _heard_record(self, message: Msg) -> None:
        if self.on_record is not None:
            content = msgspec.json.decode(message.data)
            self.on_record("unknown" if "unknown" in content else "intent", content["intent"]["worker"])

    async def _heard_worker(self, message: Msg) -> None:
        beat = msgspec.json.decode(message.data)
        self.workers[beat["process"]] = beat["pid"]

    async def journal_end(self) -> int:
        """Sequence of the journal's last record."""
        info = await self._ask("$JS.API.STREAM.INFO.ORDERS")
        return int(info["state"]["last_seq"]) if "state" in info else 0

    async def journal(self, after: int) -> list[Written]:
        """All records behind that sequence."""
        records = []
        sequence = after
        while message := (await self._ask("$JS.API.STREAM.MSG.GET.ORDERS", {"seq": sequence + 1, "next_by_subj": ">"})).get("message"):
            sequence = int(message["seq"])
            _, _, key, *_, state = message["subject"].split(".")
            if state == "placed":  # besides: its outcome has a record of its own
                continue
            entry = msgspec.json.decode(base64.b64decode(message["data"]))
            written_ms = datetime.fromisoformat(_micros(message["time"])).timestamp() * 1000
            records += [
                Written(
                    key=key,
                    record=record,
                    sequence=sequence,
                    at_ms=written_ms if record == "outcome" else entry.get(KNOWN_AT[record]) or written_ms,
                    state=content.get("state", ""),
                    id=str(content.get("order_id", "") or "") if record != "intent" else "",
                    by=content.get("by", "worker"),
                    process=content.get("worker", "") or content.get("process", ""),
                )
                for record in ("intent", "unknown", "outcome")
                if (content := entry.get(record))
            ]
        return records

    async def left(self) -> set[str]:
        """Keys of the orders whose sealed credentials are on the bus."""
        info = await self._ask("$JS.API.STREAM.INFO.ORDERS", {"subjects_filter": "unsettled.*.*.*.*.sent"})
        return {subject.split(".")[2] for subject in info["state"].get("subjects") or {}} if "state" in info else set()

    async def _ask(self, subject: str, question: object = None) -> dict[str, Any]:
        """Ask JetStream, again while it does not answer."""
        body = b"" if question is None else msgspec.json.encode(question)
        async with asyncio.timeout(READY_S):
            while True:
                with contextlib.suppress(nats.errors.Error, TimeoutError):
                    reply = await self.nc.request(subject, body, timeout=1)
                    content: dict[str, Any] = msgspec.json.decode(reply.data)
                    return content
                await asyncio.sleep(0.05)


def _received(row: ledger.Entry) -> Received:
    return Received(
        verb=row.verb,
        key=row.client_order_id or "",
        at_ms=row.received_ms,
        executed=row.executed,
        id=row.order_id or "",
        now=str(row.order["status"]) if row.order else "",
        code=row.code,
        fault=row.fault or "",
    )


def _micros(time_text: str) -> str:
    """Nanoseconds cut to what datetime reads: "2026-11-20T12:00:00.123456789Z" -> "...123456+00:00"."""
    seconds, _, fraction = time_text.removesuffix("Z").partition(".")
    return f"{seconds}.{fraction[:6]:0<6}+00:00"


def _ports(number: int) -> Iterator[int]:
    """Free ports of its own for each cluster, and most likely for each harness that runs beside this one."""
    slots = (PORTS[1] - PORTS[0]) // PORTS_EACH
    begin = PORTS[0] + (os.getpid() * 7 + number) % slots * PORTS_EACH
    return (port for port in range(begin, begin + PORTS_EACH) if server.is_free(port))


@asynccontextmanager
async def clustered(folder: Path, number: int) -> AsyncIterator[Cluster]:
    """A cluster for the life of many cases."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        cluster = Cluster(folder / f"c{number}", number, session)
        try:
            await cluster.start()
            yield cluster
        finally:
            await cluster.end()
