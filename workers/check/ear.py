"""What a venue's thread logs and prints, and whether its event loop stands still."""

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from bus.logs import redact

BEAT_S = 0.02
STANDSTILL_S = 0.15
"""How long nothing else may run in a worker's event loop."""


class Ear(logging.Handler):
    """What the venue's thread says.

    lines: of its log. printed: to stdout and stderr. trace: where in the venue's file the last exception came from. standstill: where
    its event loop was held up, "" for nowhere.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.thread: int | None = None
        self.source = source
        self.lines: list[str] = []
        self.printed: list[str] = []
        self.standstill = ""
        self.trace = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread != self.thread:
            return
        self.lines.append(f"{record.getMessage()} {getattr(record, 'fields', '')}")
        if error := sys.exception():  # the worker logs a traceback as text, while the exception is being handled
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.source]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}(): " if frames else ""
            self.trace = redact(f"{where}{type(error).__name__}: {error}"[:300])


class _Overheard:
    """A stream that writes down what a venue's thread prints, and passes it to stderr, so that stdout stays the report's."""

    def __init__(self, stream: TextIO, otherwise: TextIO) -> None:
        self.stream = stream
        self._otherwise = otherwise

    def write(self, text: str) -> int:
        printed = _printed.get(threading.get_ident())
        if printed is None:
            return self.stream.write(text)
        printed.append(text)
        return self._otherwise.write(redact(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


_printed: dict[int, list[str]] = {}
_lock = threading.Lock()


@contextmanager
def overheard(thread: int, printed: list[str]) -> Iterator[None]:
    """Write down what this thread prints. There is one pair of streams for any number of threads, put in again where somebody took it out
    while a venue that hangs kept its thread."""
    with _lock:
        _printed[thread] = printed
        plain = {name: _plain(getattr(sys, name)) for name in ("stdout", "stderr")}
        for name, stream in plain.items():
            setattr(sys, name, _Overheard(stream, plain["stderr"]))
    try:
        yield
    finally:
        with _lock:
            del _printed[thread]
            if not _printed:
                sys.stdout, sys.stderr = _plain(sys.stdout), _plain(sys.stderr)


def _plain(stream: TextIO) -> TextIO:
    return stream.stream if isinstance(stream, _Overheard) else stream


@contextmanager
def heartbeat(ear: Ear) -> Iterator[None]:
    """Watch the running event loop from a thread beside it: standing still counts only while code of the venue's is on the stack."""
    loop, beat, over = asyncio.get_running_loop(), [time.monotonic()], threading.Event()

    def again() -> None:
        beat[0] = time.monotonic()
        if not over.is_set():
            loop.call_later(BEAT_S, again)

    def watch() -> None:
        last, since, samples = 0.0, 0.0, 0
        while not over.wait(BEAT_S):
            where = _at(ear)
            if beat[0] != last or not where:
                last, since, samples = beat[0], time.monotonic(), 0
                continue
            samples += 1  # a machine that is busy takes few
            if not ear.standstill and samples > 4 and time.monotonic() - since > STANDSTILL_S:
                ear.standstill = f"more than {STANDSTILL_S} s at {where}"

    again()
    watcher = threading.Thread(target=watch, name="heartbeat", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()


def _at(ear: Ear) -> str:
    """The line of the venue's file that its thread is at, "" for none."""
    frame = sys._current_frames().get(ear.thread or 0)
    while frame is not None and frame.f_code.co_filename != ear.source:
        frame = frame.f_back
    return f"{Path(ear.source).name}:{frame.f_lineno} {frame.f_code.co_name}()" if frame is not None else ""
