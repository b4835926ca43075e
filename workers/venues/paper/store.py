"""The exchange's memory on disk: one SQLite file, written by one thread, many requests to a commit.

Whatever a reply tells is committed (WAL, synchronous=FULL) before it is sent; a SIGKILL at any moment loses only what nobody was told.
A job that fails to be written breaks the store for good, since memory would be ahead of the disk: the exchange must end and start again.
"""

import asyncio
import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from workers.venues.paper import schema

T = TypeVar("T")
Job = Callable[[sqlite3.Connection], T]

MOST_JOBS = 1_000
"""Jobs in one commit: bounds how long the first of them waits."""


class Store:
    """Runs jobs on the database, in the order in which they are handed in."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[tuple[Job[Any], asyncio.Future[Any]] | None] = SimpleQueue()
        self._newest: asyncio.Future[Any] | None = None
        self._broken: asyncio.Future[None] = self._loop.create_future()
        self._broken.add_done_callback(_seen)
        self._thread = threading.Thread(target=self._work, name="paper-store", daemon=True)
        self._thread.start()

    def submit(self, job: Job[T]) -> asyncio.Future[T]:
        """Hand in a job; the future is done once it is committed, in the order of submission. It need not be awaited: see settled().

        Raises what broke the store, when it is broken.
        """
        if self._broken.done():
            self._broken.result()
        future: asyncio.Future[T] = self._loop.create_future()
        future.add_done_callback(_seen)
        self._newest = future
        self._jobs.put((job, future))
        return future

    @property
    def pending(self) -> asyncio.Future[Any] | None:
        """The newest job while it is not on disk; when it is, all before it are."""
        return self._newest if self._newest is not None and not self._newest.done() else None

    async def settled(self) -> None:
        """Return once everything handed in so far is on disk; at once when it is already."""
        if self._newest is not None and not self._newest.done():
            # Shielded: a caller that gives up waiting must not cancel the job for the others.
            await asyncio.shield(self._newest)
        elif self._broken.done():
            self._broken.result()

    async def broken(self) -> None:
        """Wait until a job could not be written, and raise why."""
        await asyncio.shield(self._broken)

    async def close(self) -> None:
        """Write what is handed in, then end the thread."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)
        self._broken.cancel()

    def _work(self) -> None:
        last = False
        while not last:
            batch = [self._jobs.get()]
            while len(batch) < MOST_JOBS and not self._jobs.empty():
                batch.append(self._jobs.get())
            last = None in batch
            last = not self._commit([entry for entry in batch if entry is not None]) or last
        self._db.close()

    def _commit(self, batch: list[tuple[Job[Any], asyncio.Future[Any]]]) -> bool:
        if not batch:
            return True
        try:
            self._db.execute("BEGIN IMMEDIATE")
            results = [job(self._db) for job, _ in batch]
            self._db.execute("COMMIT")
        except Exception as e:  # noqa: BLE001  handed to everyone who waits, and to broken()
            self._tell(self._fail, [future for _, future in batch], e)
            return False
        self._tell(_resolve, [future for _, future in batch], results)
        return True

    def _fail(self, futures: list[asyncio.Future[Any]], error: Exception) -> None:
        while not self._jobs.empty():
            if (entry := self._jobs.get()) is not None:
                futures.append(entry[1])
        for future in (*futures, self._broken):
            if not future.done():
                future.set_exception(error)

    def _tell(self, call: Callable[..., None], *args: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *args)


def _seen(done: asyncio.Future[Any]) -> None:
    """Look at a future's error, so that one nobody awaited is not reported as forgotten."""
    if not done.cancelled():
        done.exception()


def _resolve(futures: list[asyncio.Future[Any]], results: list[Any]) -> None:
    for future, result in zip(futures, results, strict=True):
        if not future.done():
            future.set_result(result)


@contextmanager
def database(state: Path) -> Iterator[sqlite3.Connection]:
    """Open the state folder's file, creating both, readable by their owner only: it holds the secrets that signatures are checked with.

    Raises OSError when another exchange uses the folder.
    """
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = state / "paper.sqlite3"
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    lock = os.open(state / "paper.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise OSError(e.errno, "another paper exchange uses this state folder") from None
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            schema.create(db)
            yield db
        finally:
            db.close()
    finally:
        os.close(lock)
