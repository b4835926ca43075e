"""JetStream's part of a backup: streams out of a server and into one, whole and with their sequence numbers.

The server's own snapshots (checked on nats-server 2.15.1): chunks arrive on a subject of ours, each answered so that the next ones come;
an empty one ends them, with a status header where the server gave up. Two facts shape this file. A snapshot is not frozen: a key that
is overwritten while it runs is in it neither old nor new (measured: 9 of 30 snapshots of a bucket under writes lacked one), so a
snapshot during which something was overwritten is taken again, and if that happens every time, what was written since is kept beside
it. And a restore that fails leaves part of a stream behind.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import nats.errors
from msgspec import Raw, Struct, structs

from bus import server
from bus.child import Child
from bus.config import environment
from bus.connection import Bus, connected, without_password
from bus.lifecycle import reason

CHUNK = 128 * 1024
PIECE = 16 * 1024
"""Of a restore: the server gives up when it needs 5 s to write one (measured, on a slow disk that it syncs for every message)."""
CONNECT_S = 3.0
ANSWER_S = 10.0
LAST_ANSWER_S = 300.0
"""For the answer to the last chunk, which comes when the whole stream is on disk."""
TRIES = 5
"""How often a stream is copied before what was written since is kept beside the copy."""
TAIL_S = 60.0
NO_MESSAGE = 10037


class BackupError(Exception):
    """Why it was not done, in words for the person who asked; nothing was changed."""


class State(Struct, frozen=True):
    """As the server tells it."""

    messages: int
    bytes: int
    first_seq: int
    last_seq: int

    @property
    def removed(self) -> int:
        """How many of its messages were ever overwritten, purged or expired."""
        return self.last_seq - self.messages


class Message(Struct, frozen=True):
    """As the server tells it. hdrs: encoded, as they were sent."""

    subject: str
    seq: int
    data: bytes = b""
    hdrs: bytes = b""


class Stream(Struct, frozen=True):
    """What a server needs to know of a stream beside its snapshot: config and state, both the server's own JSON.

    tail: what was written after the snapshot, of a stream in which much is overwritten; restored in this order, with new numbers.
    """

    config: Raw
    state: Raw
    tail: list[Message] = []

    @property
    def now(self) -> State:
        return msgspec.json.decode(self.state, type=State)

    def limited_per_subject(self) -> bool:
        """Whether a new message takes the place of an older one, as in a bucket."""
        return msgspec.json.decode(self.config, type=_Config).max_msgs_per_subject > 0


class _Config(Struct):
    name: str
    storage: str = "file"
    max_msgs_per_subject: int = -1


class _Info(Struct):
    config: _Config
    state: State


class _Error(Struct):
    description: str = ""
    err_code: int = 0


class _Answer(Struct):
    error: _Error | None = None
    streams: list[_Info] | None = None
    missing: list[str] | None = None
    total: int = 0
    config: Raw = Raw(b"null")
    state: Raw = Raw(b"null")
    deliver_subject: str = ""
    message: Message | None = None


async def _ask(bus: Bus, subject: str, body: bytes = b"", timeout_s: float = ANSWER_S, headers: dict[str, str] | None = None) -> _Answer:
    """One request to JetStream. Raises BackupError."""
    what = subject.removeprefix("$JS.API.")
    try:
        reply = await bus.nc.request(subject, body, timeout=timeout_s, headers=headers)
        answer = msgspec.json.decode(reply.data, type=_Answer) if reply.data else _Answer()
    except nats.errors.NoRespondersError:
        raise BackupError("the bus has no JetStream, or this user may not ask it") from None
    except (nats.errors.Error, TimeoutError, msgspec.MsgspecError) as e:
        raise BackupError(f"JetStream gave no answer to {what} ({type(e).__name__})") from e
    if answer.error is not None and answer.error.err_code != NO_MESSAGE:
        raise BackupError(f"JetStream refused {what}: {answer.error.description}")
    return answer


async def streams(bus: Bus) -> dict[str, str]:
    """Every stream there is: name -> "file" or "memory"."""
    found: list[_Info] = []
    while True:
        page = await _ask(bus, "$JS.API.STREAM.LIST", msgspec.json.encode({"offset": len(found)}))
        if page.missing:
            raise BackupError(f"the cluster cannot reach all of its streams: {', '.join(page.missing)}")
        found += page.streams or []
        if not page.streams or len(found) >= page.total:
            break
    return {one.config.name: one.config.storage for one in sorted(found, key=lambda one: one.config.name)}


async def save(bus: Bus, name: str, path: Path) -> Stream:
    """Write one stream's snapshot to a file. Raises BackupError, OSError."""
    for _ in range(TRIES):
        stream = await _receive(bus, name, path)
        if not stream.limited_per_subject():
            return stream  # what was removed there is gone, and nothing took its place
        after = await _ask(bus, f"$JS.API.STREAM.INFO.{name}")
        if Stream(after.config, after.state).now.removed == stream.now.removed:
            return stream
    return structs.replace(stream, tail=await _since(bus, name, stream.now.last_seq))


async def _since(bus: Bus, name: str, sequence: int) -> list[Message]:
    """What was written after that message, up to a moment at which there is no more: whatever took another's place until then is in it."""
    found: list[Message] = []
    until = time.monotonic() + TAIL_S
    while message := (await _ask(bus, f"$JS.API.STREAM.MSG.GET.{name}", b'{"seq":%d,"next_by_subj":">"}' % (sequence + 1))).message:
        found.append(message)
        sequence = message.seq
        if time.monotonic() > until:
            raise BackupError(
                f"stream {name} changes too fast to be copied whole: back up when less is going on, or with the system stopped"
            )
    return found


async def _receive(bus: Bus, name: str, path: Path) -> Stream:
    inbox = bus.nc.new_inbox()
    chunks = await bus.nc.subscribe(inbox)
    try:
        answer = await _ask(bus, f"$JS.API.STREAM.SNAPSHOT.{name}", msgspec.json.encode({"deliver_subject": inbox, "chunk_size": CHUNK}))
        with path.open("wb") as file:
            count = 0
            while (chunk := await chunks.next_msg(ANSWER_S)).data:
                count += 1
                file.write(chunk.data)
                if chunk.reply:  # the last chunk has none; the others' ends with their number
                    if not chunk.reply.endswith(f".{count}"):
                        raise BackupError(f"stream {name}: chunk {count} was lost on the way")
                    await bus.nc.publish(chunk.reply)
    except (nats.errors.Error, TimeoutError) as e:
        raise BackupError(f"stream {name}: the bus was lost during the copy ({type(e).__name__})") from e
    finally:
        with contextlib.suppress(nats.errors.Error):
            await chunks.unsubscribe()
    headers = chunk.headers or {}
    if headers.get("Status", "204") != "204":  # a short snapshot ends without a header
        raise BackupError(f"stream {name}: the server gave up: {headers.get('Description', headers['Status'])}")
    return Stream(answer.config, answer.state)


async def load(bus: Bus, name: str, stream: Stream, path: Path, replicas: int) -> State:
    """Make a stream of a snapshot, where none of that name is; -> what it holds now. Raises BackupError; then remove() what there is."""
    config: dict[str, Any] = msgspec.json.decode(stream.config)
    wanted = msgspec.json.encode({"config": config | {"num_replicas": replicas}, "state": stream.state})
    target = (await _ask(bus, f"$JS.API.STREAM.RESTORE.{name}", wanted)).deliver_subject
    with path.open("rb") as file:
        while chunk := file.read(PIECE):
            await _ask(bus, target, chunk)
    answer = await _ask(bus, target, b"", LAST_ANSWER_S)
    restored = msgspec.json.decode(answer.state, type=State)
    if restored.last_seq != stream.now.last_seq:
        raise BackupError(f"stream {name} ends with message {restored.last_seq} instead of {stream.now.last_seq}")
    for message in stream.tail:
        await _ask(bus, message.subject, message.data, headers=_headers(message.hdrs))
    if stream.tail:
        restored = msgspec.json.decode((await _ask(bus, f"$JS.API.STREAM.INFO.{name}")).state, type=State)
    return restored


def _headers(encoded: bytes) -> dict[str, str] | None:
    """Those of a stored message, without the conditions under which it was first taken."""
    pairs = (line.partition(":") for line in encoded.decode().split("\r\n")[1:] if line)
    return {name: value.strip() for name, _, value in pairs if not name.startswith("Nats-Expected-") and name != "Nats-Msg-Id"} or None


async def remove(bus: Bus, name: str) -> None:
    """Delete a stream, if it is there."""
    with contextlib.suppress(BackupError):
        await _ask(bus, f"$JS.API.STREAM.DELETE.{name}")


@asynccontextmanager
async def reached(url: str) -> AsyncIterator[Bus]:
    """Connect as an operator. Raises BackupError where nobody answers, and what the body raises."""
    try:
        async with asyncio.timeout(CONNECT_S) as limit, connected(url, "operator", closed=lambda: None) as bus:
            limit.reschedule(None)
            yield bus
    except TimeoutError:
        raise BackupError(f"the bus {without_password(url)} does not answer; is it starting, or is another backup at work?") from None
    except BaseExceptionGroup as e:  # of the task group inside connected()
        raise reason(e) from None


async def answers(state: Path) -> bool:
    """Whether the embedded server of this state folder runs, with or without its supervisor."""
    if not server.was_set_up(state) or server.is_free(server.settings(state).port):
        return False
    with contextlib.suppress(BackupError):
        async with reached(server.url(state, "operator")):
            return True
    return False


@asynccontextmanager
async def embedded(store: Path) -> AsyncIterator[Bus]:
    """Run a nats-server on the streams of this folder, an absolute path. Raises BackupError when it does not start.

    Its port and passwords nobody else knows: no worker on another machine finds it and begins to work. It does not sync each message,
    which would take 20 times as long: whoever had it write syncs the folder afterwards.
    """
    with TemporaryDirectory(prefix="fmzbus-") as folder:
        private = Path(folder)
        (private / "nats").mkdir()
        (private / "nats" / "store").symlink_to(store)
        command = server.command(private)
        settled = private / "nats" / "nats.conf"
        settled.write_text(settled.read_text().replace('"sync_interval": "always"', '"sync_interval": "1h"'))
        nats_server = Child("nats", command, environment(), private / "logs" / "nats.out")
        process = await nats_server.start()
        try:
            try:
                await server.wait_ready(private)
            except TimeoutError:
                log = private / "logs" / "nats.log"
                said = log.read_text(errors="replace") if log.exists() else nats_server.last_words()
                raise BackupError(f"nats-server does not start on {store}:\n" + "\n".join(said.splitlines()[-5:])) from None
            async with reached(server.url(private, "operator")) as bus:
                yield bus
        finally:
            nats_server.signal(signal.SIGTERM)
            await process.wait()
