"""`fmzbus up`: the whole system on one machine, supervised.

Starts nats-server, then the paper exchange, workers, feeders and bridges at once, each in a process group of its own; restarts what
dies, with back-off; stops in the order bridges, workers, feeders, exchange, NATS. The bridges' listening socket is opened here and
handed down, so that no host is refused while a bridge is replaced.
"""

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from bus import seal, server
from bus.child import Child, ending
from bus.config import Config, Venue, environment
from bus.lifecycle import LISTEN_FD

READY_S = 45.0
"""A worker may settle for 30 s before it serves."""
PATIENCE_S = 20.0
"""How long a child may take to drain before it is killed; its own limit is 15 s."""
FIRST_WAIT_S, LONGEST_WAIT_S, STEADY_S = 0.25, 30.0, 10.0
"""Back-off of restarts: doubles from the first to the longest, and begins anew after a child ran steadily."""
HEALTH_S, HEAL_S = 5.0, 30.0
"""How often nats-server's health is looked at, and the time it has to become well after a restart."""
ORDER = ("bridge", "worker", "feeder", "paper", "nats")
"""How roles stop."""
MODULES = {"worker": "workers", "feeder": "workers.feeder", "bridge": "bridge"}
"""What a role runs, in the order in which they start, after the exchange."""

Say = Callable[[str], None]


class UpError(Exception):
    """Why the system cannot run, in words for the person who started it."""


class Running(Struct):
    """state/up.json: what other commands need to find this system."""

    pid: int
    address: str


class _Written(Running):
    """All of up.json. expected: how many processes of each role there should be."""

    expected: dict[str, int] = {}


class Supervisor:
    """counts: how many of each role, "bridge", "worker", "feeder". say: prints one line for the person at the terminal."""

    def __init__(self, config: Config, *, config_path: Path | None, counts: dict[str, int], admin_port: int, say: Say) -> None:
        self._config = config
        self._state = config.state_path
        self._config_path = config_path
        self._counts = counts
        self._admin_port = admin_port
        self._say = say
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self.children: list[Child] = []

    def stop(self) -> None:
        """Begin to stop; a second call kills."""
        if self._stopping.is_set():
            for child in self.children:
                child.signal(signal.SIGKILL)
        self._stopping.set()
        self._changed.set()  # whoever waits for the children to become ready looks up

    async def run(self, on_ready: Callable[[str, list[Child]], None]) -> None:
        """Run until stop(). on_ready gets the service address once every part is ready. Raises UpError."""
        self._state.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._lock(), self._listener() as listener, self._notified() as notices:
            if not server.is_free(self._admin_port):
                raise UpError(f"the admin port {self._admin_port} is taken; choose another with --admin-port N, 0 for any")
            if not any(self._config.keys_path.glob("*.secret")):
                seal.new_keys(self._config.keys_path)
            address = f"http://{bracketed(*listener.getsockname()[:2])}"
            watching: list[asyncio.Task[None]] = []
            try:
                await self._start(listener, notices, watching)
                if not self._stopping.is_set():
                    _write_json(self._state / "up.json", _Written(os.getpid(), address, self._counts))
                    on_ready(address, self.children)
                await self._stopping.wait()
            finally:
                self._stopping.set()
                listener.close()  # who connects from here on is refused at once, instead of waiting for nobody
                await self._stop_all()
                await asyncio.gather(*watching)
                (self._state / "up.json").unlink(missing_ok=True)

    async def _start(self, listener: socket.socket, notices: str, watching: list[asyncio.Task[None]]) -> None:
        env = {"nats__url": self._config.nats.url}
        if not self._config.nats.url:
            chosen = server.settings(self._state)
            if not (server.is_free(chosen.port) and server.is_free(chosen.monitor_port)):
                self._say("another program has the port of nats-server: choosing a new one")
                server.choose_ports_again(self._state)
            nats = Child(
                "nats", server.command(self._state, self._config.nats.mqtt_port), dict(os.environ), self._state / "logs" / "nats.out"
            )
            await self._watch(nats, watching)
            try:
                await server.wait_ready(self._state)
            except TimeoutError as e:
                raise UpError(f"{e}\n{nats.last_words()}") from e
            nats.status, nats.admin = (
                f"nats://{server.HOST}:{server.settings(self._state).port}",
                f"{server.HOST}:{server.settings(self._state).monitor_port}",
            )
            nats.ready.set()
            watching.append(asyncio.create_task(self._heal(nats)))
        paper_url = ""
        if self._config.paper.enabled:
            port = self._config.paper.port or _kept_port(self._config)
            paper_url = f"http://127.0.0.1:{port}"
            await self._watch(self._child("paper", ["-m", "workers.venues.paper"], notices, env | {"paper__port": str(port)}), watching)
        for role, module in MODULES.items():
            for number in range(1, self._counts.get(role, 0) + 1):
                own = dict(env)
                if not own["nats__url"]:
                    own["nats__url"] = server.url(self._state, role)
                    own["nats__monitors"] = f'["{server.monitor(self._state)}"]'
                if role != "bridge" and paper_url and not self._config.venues.get("paper", Venue()).base_url:
                    own["venues__paper__base_url"] = paper_url
                arguments = ["-m", module]
                if role == "bridge" and number == 1:
                    arguments += ["--admin-port", str(self._admin_port)]
                await self._watch(
                    self._child(f"{role}-{number}", arguments, notices, own, listener if role == "bridge" else None), watching
                )
        await self._all_ready()

    def _child(
        self, name: str, arguments: list[str], notices: str, settings: dict[str, str], listener: socket.socket | None = None
    ) -> Child:
        if self._config_path:
            arguments = [*arguments, "--config", str(self._config_path.resolve())]
        logs = (self._state / "logs").resolve()
        env = environment(
            **settings, state=str(self._state.resolve()), logs__file=str(logs / f"{name}.jsonl"), bench=str(self._config.bench).lower()
        )
        env["NOTIFY_SOCKET"] = f"{notices}"
        env["FMZBUS_NAME"] = name
        if listener is not None:
            env[LISTEN_FD] = str(listener.fileno())
        return Child(name, [sys.executable, *arguments], env, logs / f"{name}.out", (listener.fileno(),) if listener else ())

    async def _watch(self, child: Child, watching: list[asyncio.Task[None]]) -> None:
        self.children.append(child)
        process = await child.start()
        watching.append(asyncio.create_task(self._keep(child, process)))

    async def _keep(self, child: Child, process: asyncio.subprocess.Process) -> None:
        """Restart the child whenever it ends, until we stop."""
        wait_s = FIRST_WAIT_S
        while True:
            started = time.monotonic()
            status = await process.wait()
            self._changed.set()
            if self._stopping.is_set():
                return
            if time.monotonic() - started > STEADY_S:
                wait_s = FIRST_WAIT_S
            what = f"ended ({ending(status)})"
            while True:
                self._say(f"{child.name} {what}; restarting in {wait_s:g} s; see {child.log}")
                if await self._stopped_within(wait_s):
                    return
                wait_s = min(wait_s * 2, LONGEST_WAIT_S)
                try:
                    process = await child.start()
                    break
                except OSError as e:
                    what = f"cannot be started ({e})"
            if self._stopping.is_set():  # while it started: the stop has seen the process before it
                child.signal(signal.SIGTERM)

    async def _heal(self, nats: Child) -> None:
        """Restart a nats-server that is not well although its disk takes data: a full one turns JetStream off for good."""
        wait_s = HEALTH_S
        while not await self._stopped_within(wait_s):
            wait_s = HEALTH_S
            try:
                wrong = await asyncio.to_thread(server.ailment, self._state)
                if wrong:
                    await asyncio.to_thread(server.check_disk, self._state)
            except OSError:  # it does not answer, which _keep sees to, or the disk is full still
                continue
            if wrong:
                self._say(f"nats-server is not well ({wrong}), and its disk takes data: restarting it; see {nats.log}")
                nats.signal(signal.SIGTERM)
                wait_s = HEAL_S

    async def _stopped_within(self, span_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), span_s)
        return self._stopping.is_set()

    async def _all_ready(self) -> None:
        """Wait for every child; one that ends before it was ever ready stops the start, with its last words."""
        deadline = time.monotonic() + READY_S
        while not self._stopping.is_set():
            self._changed.clear()
            waiting = [child for child in self.children if not child.ready.is_set()]
            dead = [child for child in waiting if child.pid is None]
            if dead:
                raise UpError(f"{dead[0].name} ended before it was ready:\n{dead[0].last_words()}")
            if not waiting:
                return
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise UpError(f"not ready within {READY_S:g} s: {', '.join(child.name for child in waiting)}; see {self._state / 'logs'}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left_s)

    async def _stop_all(self) -> None:
        for role in ORDER:
            children = [child for child in self.children if child.role == role]
            for child in children:
                child.signal(signal.SIGTERM)
            for child in children:
                if child.process is not None:
                    try:
                        await asyncio.wait_for(child.process.wait(), PATIENCE_S)
                    except TimeoutError:
                        self._say(f"{child.name} did not stop within {PATIENCE_S:g} s: killed")
                        child.signal(signal.SIGKILL)
                        await child.process.wait()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One system per state folder."""
        with (self._state / "up.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UpError(
                    f"another `fmzbus up` runs on the state folder {self._state}; give this one --state DIR and --port N"
                ) from None
            yield

    @contextmanager
    def _listener(self) -> Iterator[socket.socket]:
        host, port = self._config.bridge.host, self._config.bridge.port
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        with listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
            except OSError as e:
                raise UpError(f"cannot listen on {bracketed(host, port)} ({e.strerror}); choose another port with --port N") from None
            listener.listen(1024)
            yield listener

    @contextmanager
    def _notified(self) -> Iterator[str]:
        """Listen to what children say of themselves (see lifecycle.notify); yields the address they send to."""
        loop = asyncio.get_running_loop()
        path = self._state.resolve() / "notify.sock"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            try:
                receiver.bind(str(path))
            except OSError as e:
                raise UpError(f"cannot make {path} ({e}); a state folder needs a path of under 90 characters") from None
            receiver.setblocking(False)  # noqa: FBT003 - the socket module's own signature
            loop.add_reader(receiver, self._hear, receiver)
            try:
                yield str(path)
            finally:
                loop.remove_reader(receiver)
                path.unlink(missing_ok=True)

    def _hear(self, receiver: socket.socket) -> None:
        fields = dict(line.partition("=")[::2] for line in receiver.recv(4096).decode(errors="replace").splitlines())
        for child in self.children:
            if child.name == fields.get("FMZBUS_NAME") and fields.get("READY") == "1":
                child.status, child.admin = fields.get("STATUS", ""), fields.get("FMZBUS_ADMIN", "")
                child.ready.set()
                self._changed.set()


def running(state: Path) -> Running | None:
    """The system that runs on this state folder, if one does."""
    written = _written(state)
    return Running(written.pid, written.address) if written else None


def expected(state: Path) -> dict[str, int]:
    """How many processes of each role the system that runs on this state folder has."""
    written = _written(state)
    return written.expected if written else {}


def _written(state: Path) -> _Written | None:
    try:
        written = msgspec.json.decode((state / "up.json").read_bytes(), type=_Written)
        with contextlib.suppress(PermissionError):  # another user's process: it lives
            os.kill(written.pid, 0)
    except (OSError, msgspec.MsgspecError):
        return None  # never written, or left behind by a process that was killed
    return written


def paper_port(config: Config) -> int:
    """Where the paper exchange listens: as configured, else the port that was kept, 0 where none was yet."""
    kept = _paper_port_file(config.state_path)
    return config.paper.port or (int(kept.read_text()) if kept.exists() else 0)


def _paper_port_file(state: Path) -> Path:
    return state / "paper" / "port"


def bracketed(host: str, port: int) -> str:
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _kept_port(config: Config) -> int:
    """The paper exchange's port, chosen once and kept; chosen again when a stranger has it."""
    port, path = paper_port(config), _paper_port_file(config.state_path)
    if not port or not server.is_free(port):
        path.parent.mkdir(parents=True, exist_ok=True)
        port = server.free_port()
        path.write_text(str(port))
    return port


def _write_json(path: Path, content: Struct) -> None:
    path.write_bytes(msgspec.json.encode(content))
