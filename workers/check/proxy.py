"""What stands between a venue and its exchange: passes on, writes down, and fails on demand in the ways exchanges do."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from workers.check.wire import Message, Seen, read

SILENCE_S = 30.0
UPSTREAM_S = 20.0
BROKEN = (OSError, EOFError, ValueError, TimeoutError, asyncio.LimitOverrunError)


class Fault(Struct, frozen=True):
    """One way to fail.

    executed: the exchange gets the request before, wait_s late. how: "drop" ends the connection, "silence" says nothing until the venue
    leaves, "cut" ends it in the middle of the body, "answer" says status, headers and body instead of the exchange's, "edit" changes its
    body.
    """

    name: str
    executed: bool
    how: Literal["drop", "silence", "cut", "answer", "edit"]
    status: int = 200
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)
    body: bytes = b""
    edit: Callable[[bytes], bytes] = bytes
    wait_s: float = 0.0


NOT_PASSED_ON = Fault("a 503 in the exchange's place", executed=False, how="answer", status=503)


def every(_seen: Seen) -> bool:
    return True


class _Over(Exception):
    """The connection is to end."""


class Proxy:
    """seen: every request, in order. url: what the venue gets for base_url."""

    def __init__(self, upstream: str) -> None:
        self.seen: list[Seen] = []
        self.url = ""
        self.arrived = asyncio.Condition()
        self._upstream = urlsplit(upstream)
        self._fault: tuple[Fault, Callable[[Seen], bool], int] | None = None
        self._connections: set[asyncio.Task[None] | None] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @contextmanager
    def failing(self, fault: Fault, when: Callable[[Seen], bool] = every, *, times: int = 1_000_000) -> Iterator[None]:
        """Fail so, inside the body, for the requests that `when` picks; the first `times` of them."""
        self._fault = (fault, when, times)
        try:
            yield
        finally:
            self._fault = None

    async def until(self, condition: Callable[[], bool], within_s: float) -> bool:
        """Wait for something that a request, or the end of one, brings about; whether it came."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s), self.arrived:
                await self.arrived.wait_for(condition)
        return condition()

    def cut_all(self) -> None:
        """End every connection, for a venue that would wait for ever."""
        for writer in self._writers:
            writer.transport.abort()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of the venue's to its end."""
        task = asyncio.current_task()
        self._connections.add(task)
        self._writers.add(writer)
        number = id(writer)
        try:
            while request := await read(reader, answer=False):
                await self._serve(request, number, reader, writer)
        except (*BROKEN, _Over, asyncio.CancelledError):  # cancelled only by serving(), which waits for this very end
            pass
        finally:
            writer.transport.abort()
            self._connections.discard(task)
            self._writers.discard(writer)

    async def _serve(self, request: Message, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        verb, _, rest = request.start.partition(" ")
        seen = Seen(verb, rest.rpartition(" ")[0], request.headers, request.body, number)
        fault = self._due(seen)
        self.seen.append(seen)
        await self._tell()
        if fault is not None:
            await asyncio.sleep(fault.wait_s)
        if fault is None or fault.executed:
            answer = await self._ask(request, seen)
        else:
            answer = Message(f"HTTP/1.1 {fault.status} .", list(fault.headers), fault.body)
        if fault is not None:
            answer = await self._fail(fault, answer, seen, reader, writer)
        writer.write(answer.encode(connection="keep-alive"))
        await writer.drain()

    def _due(self, seen: Seen) -> Fault | None:
        if self._fault is None:
            return None
        fault, when, times = self._fault
        if times <= 0 or not when(seen):
            return None
        self._fault = (fault, when, times - 1)
        return fault

    async def _fail(self, fault: Fault, answer: Message, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Message:
        match fault.how:
            case "answer":
                return Message(f"HTTP/1.1 {fault.status} .", list(fault.headers), fault.body)
            case "edit":
                try:
                    return Message(answer.start, answer.headers, fault.edit(answer.body))
                except (LookupError, TypeError, ValueError, AttributeError, msgspec.MsgspecError):
                    return answer  # a refusal, say, has nothing of what is to be changed
            case "cut":
                whole = answer.encode()
                writer.write(whole[: len(whole) - len(answer.body) // 2 - 1])
                with contextlib.suppress(*BROKEN):
                    await writer.drain()
            case "silence":
                with contextlib.suppress(*BROKEN):
                    async with asyncio.timeout(SILENCE_S):
                        await reader.read(1)
                seen.left = True
                await self._tell()
        raise _Over

    async def _tell(self) -> None:
        async with self.arrived:
            self.arrived.notify_all()

    async def _ask(self, request: Message, seen: Seen) -> Message:
        """The exchange's answer, or a 502 of our own where there is none."""
        host, secure = self._upstream.hostname or "", self._upstream.scheme == "https"
        try:
            async with asyncio.timeout(UPSTREAM_S):
                context = ssl.create_default_context() if secure else None
                reader, writer = await asyncio.open_connection(host, self._upstream.port or (443 if secure else 80), ssl=context)
                try:
                    writer.write(request.encode(host=self._upstream.netloc.rpartition("@")[2], connection="close"))
                    answer = await read(reader, answer=True)
                finally:
                    writer.transport.abort()
                if answer is None:
                    raise EOFError("no answer")
        except BROKEN as e:
            text = f"the exchange at {self._upstream.netloc.rpartition('@')[2]} cannot be reached: {e or type(e).__name__}"
            seen.answer = text.encode()
            return Message("HTTP/1.1 502 .", [], seen.answer)
        seen.status, seen.answer = int(answer.start.split()[1]), answer.body
        await self._tell()
        return answer


@asynccontextmanager
async def serving(upstream: str) -> AsyncIterator[Proxy]:
    """A proxy on a free port of loopback, in front of the exchange whose base_url is given."""
    proxy = Proxy(upstream)
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0, limit=1024 * 1024)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{urlsplit(upstream).path.rstrip('/')}"
    try:
        yield proxy
    finally:
        server.close()
        tasks = [task for task in proxy._connections if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
