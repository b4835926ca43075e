"""How a process starts, says that it is ready, and stops.

config -> connect -> ready only after a real round trip -> serve -> on a signal to stop: take no more, finish, drain, close. Readiness
and inherited sockets use systemd's own conventions (NOTIFY_SOCKET, LISTEN_FDS), so that `fmzbus up` and systemd start the same process.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager

log = logging.getLogger(__name__)

LISTEN_FD = "FMZBUS_LISTEN_FD"
"""Number of the listening socket that `fmzbus up` hands to a bridge."""
SYSTEMD_FD = 3  # sd_listen_fds(3): inherited sockets begin here
_PR_SET_PDEATHSIG = 1
CANCEL_AGAIN_S = 0.5


class Stopping:
    """Set once, by a signal or by what cannot go on; the process then drains. failed: it ends with status 1."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.failed = False
        self.awaited = False
        """Whether the process has started: it serves, and waits for this."""

    def set(self) -> None:
        self._event.set()

    def fail(self) -> None:
        self.failed = True
        self._event.set()

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    async def wait(self) -> None:
        self.awaited = True
        await self._event.wait()


@asynccontextmanager
async def running(*jobs: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run jobs beside the body: a failing job ends the body, leaving the body cancels the jobs."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(job) for job in jobs]
        try:
            yield
        finally:
            # Again and again: before Python 3.12 wait_for() swallows a cancel that comes together with what it waited for.
            while waiting := [task for task in tasks if not task.done()]:
                for task in waiting:
                    task.cancel()
                await asyncio.wait(waiting, timeout=CANCEL_AGAIN_S)


def stop_signals() -> list[signal.Signals]:
    """Those at which a process drains and ends; not SIGHUP where whoever started it had that ignored (nohup)."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hangup]


def reason(error: BaseException) -> BaseException:
    """What went wrong, out of the groups that tasks wrap it in."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def run(serve: Callable[[Stopping], Awaitable[None]]) -> None:
    """Run one process until it is told to stop; the exit status says whether it stopped well."""
    import uvloop

    async def main() -> int:
        stopping = Stopping()
        loop = asyncio.get_running_loop()
        serving = asyncio.ensure_future(serve(stopping))

        def stop() -> None:
            if not (stopping.awaited or stopping.is_set):  # it has nothing to finish yet, and may wait for a bus that never comes
                serving.cancel()
            stopping.set()

        for number in stop_signals():
            loop.add_signal_handler(number, stop)
        try:
            await serving
        except asyncio.CancelledError:
            if not stopping.is_set:
                raise
        return 1 if stopping.failed else 0

    try:
        sys.exit(uvloop.run(main()))
    except Exception as e:
        log.exception("the process ends")
        why = reason(e)
        sys.exit(f"{type(why).__name__}: {why}")  # to stderr as well: whoever started us may not read the log


def notify(**fields: str) -> None:
    """Tell whoever started us: notify(READY="1", STATUS="..."). Without NOTIFY_SOCKET nobody asked."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
        sender.connect("\0" + address[1:] if address.startswith("@") else address)
        fields["FMZBUS_NAME"] = os.environ.get("FMZBUS_NAME", "")
        sender.send("\n".join(f"{key}={value}" for key, value in fields.items()).encode())


def inherited_socket() -> socket.socket | None:
    """The listening socket that systemd or `fmzbus up` opened for us: nobody is refused while a bridge is replaced."""
    if LISTEN_FD in os.environ:
        listener = socket.socket(fileno=int(os.environ[LISTEN_FD]))
    elif os.environ.get("LISTEN_FDS") == "1" and os.environ.get("LISTEN_PID") == str(os.getpid()):
        listener = socket.socket(fileno=SYSTEMD_FD)
    else:
        return None
    listener.setblocking(False)  # noqa: FBT003 - the socket module's own signature
    return listener


def die_with_parent() -> None:
    """For a child, before exec: SIGTERM when the parent is gone, however it went. Linux only; elsewhere the bus's end stops it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
