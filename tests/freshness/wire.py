"""A wire between one process and nats-server that understands NATS enough to lose, repeat or hold back chosen messages."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

CHUNK = 1 << 16


class Treated(NamedTuple):
    """What becomes of a message: so many copies of it arrive, each delay_s later than it would have."""

    copies: int = 1
    delay_s: float = 0.0


FINE = Treated()
Treat = Callable[[str], Treated]
"""Subject of a message -> what becomes of it."""


class Frames:
    """The server's side of the protocol cut into what belongs together. Pure.

    Source: NATS client protocol, `MSG <subject> <sid> [reply] <bytes>` and `HMSG <subject> <sid> [reply] <header bytes> <total bytes>`,
    both with a payload line behind them; all else is one line.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        """-> (subject, whole message) for each that is complete; "" for what is no message."""
        found = []
        buffer = self._rest + data
        at = 0
        while (end := buffer.find(b"\r\n", at)) >= 0:
            words = buffer[at:end].split(b" ")
            size, subject = end + 2 - at, ""
            if words[0] in (b"MSG", b"HMSG"):
                size += int(words[-1]) + 2
                subject = words[1].decode()
            if at + size > len(buffer):
                break
            found.append((subject, buffer[at : at + size]))
            at += size
        self._rest = buffer[at:]
        return found


class Wire:
    """port: where the process connects. treat: what becomes of messages from now on; flows: cleared, everything from the server waits.
    lost, repeated, late: how many messages met that."""

    def __init__(self, upstream: int) -> None:
        self.port = 0
        self.treat: Treat | None = None
        self.flows = asyncio.Event()
        self.flows.set()
        self.lost = self.repeated = self.late = 0
        self._upstream = upstream
        self._ends: set[asyncio.StreamWriter] = set()
        self._open: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of the process, to its end."""
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        ends = {writer}
        self._ends |= ends
        try:
            with contextlib.suppress(OSError):
                above, to_server = await asyncio.open_connection("127.0.0.1", self._upstream, limit=CHUNK)
                ends.add(to_server)
                self._ends |= ends
                done, pending = await asyncio.wait(
                    {asyncio.ensure_future(_copy(reader, to_server)), asyncio.ensure_future(self._down(above, writer))},
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for one in pending:
                    one.cancel()
                await asyncio.gather(*done, *pending, return_exceptions=True)
        finally:
            for end in ends:
                end.transport.abort()
            self._ends -= ends
            self._open.discard(task)

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = Frames()
        held: deque[tuple[float, bytes]] = deque()
        loop = asyncio.get_running_loop()

        def release() -> None:
            while held and held[0][0] <= loop.time():
                writer.write(held.popleft()[1])

        while data := await reader.read(CHUNK):
            await self.flows.wait()
            out = []
            for subject, frame in frames.feed(data):
                treated = self.treat(subject) if self.treat is not None and subject else FINE
                self.lost += treated.copies == 0
                self.repeated += treated.copies > 1
                if treated.delay_s:
                    self.late += 1
                    held.append((loop.time() + treated.delay_s, frame * treated.copies))
                    loop.call_later(treated.delay_s + 0.001, release)
                else:
                    out.append(frame * treated.copies)
            writer.write(b"".join(out))
            await writer.drain()

    async def cut(self) -> None:
        """End every connection."""
        self.flows.set()
        for end in self._ends:
            end.transport.abort()
        while self._open:
            await asyncio.wait(self._open)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()


@asynccontextmanager
async def wire(upstream: int) -> AsyncIterator[Wire]:
    """upstream: port of nats-server, which may come and go."""
    made = Wire(upstream)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, limit=CHUNK)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        await made.cut()
        await server.wait_closed()
