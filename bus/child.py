"""A process that `fmzbus up` supervises: in a group of its own, its output in a file, with what it said of itself."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

from bus.lifecycle import die_with_parent


class Child:
    """One supervised process. status and admin are what it said of itself when it became ready."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], output: Path, fds: tuple[int, ...] = ()) -> None:
        self.name = name
        self.role = name.partition("-")[0]
        self.output = output
        self.log = output.with_suffix(".log" if name == "nats" else ".jsonl")
        self.status = ""
        self.admin = ""
        self.ready = asyncio.Event()
        self.process: asyncio.subprocess.Process | None = None
        self._command = command
        self._env = env
        self._fds = fds
        self._began = 0
        """Where the output of the present run begins."""

    async def start(self) -> asyncio.subprocess.Process:
        self.ready.clear()
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with self.output.open("ab") as output:
            self._began = output.tell()
            self.process = await asyncio.create_subprocess_exec(
                *self._command,
                env=self._env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=self._fds,
                process_group=0,  # Ctrl-C reaches the supervisor alone, which stops the children in order
                preexec_fn=die_with_parent,
            )
        return self.process

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process and self.process.returncode is None else None

    def signal(self, number: int) -> None:
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def last_words(self) -> str:
        said = self.output.read_bytes()[self._began :] if self.output.exists() else b""
        return "\n".join(said.decode(errors="replace").strip().splitlines()[-5:])


def ending(status: int) -> str:
    """How a process ended, for a person: "SIGKILL", "status 1"."""
    return signal.Signals(-status).name if status < 0 else f"status {status}"
