"""`fmzbus backup` and `fmzbus restore`: all of the state or none of it, from a system at work, into an empty folder, on real servers."""

import asyncio
import contextlib
import gzip
import io
import os
import signal
import sqlite3
import stat
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.js.api import ConsumerConfig, RetentionPolicy, StorageType
from nats.js.errors import APIError

from bus import backup, seal, server, snapshot
from bus.archive import Manifest
from bus.config import Config, Nats, environment
from bus.connection import Bus, connected
from bus.sessions import Session, Sessions
from bus.snapshot import BackupError
from tests import servers
from tests.host import Host, hosting
from tests.servers import COMMAND, eventually
from tests.test_seal import framed

pytestmark = pytest.mark.slow

Contents = dict[str, dict[int, tuple[Any, ...]]]
"""Stream -> sequence -> (subject, time, headers, data)."""


async def ran(*arguments: str | Path, file_limit: int | None = None, **config: object) -> tuple[int, str]:
    """Run `fmzbus ...` -> (exit status, all it printed). file_limit: blocks of 1 KiB, as a disk that takes no more."""
    command = [COMMAND, *map(str, arguments)]
    if file_limit is not None:
        command = ["bash", "-c", f'ulimit -f {file_limit}; exec "$@"', "bash", *command]
    async with servers.running(*command, env=environment(**config)) as one:
        await asyncio.wait_for(one.process.wait(), 60)
        status = await one.stop()
        return status, one.output


async def restored(file: Path, state: Path, *, force: bool = False, url: str = "") -> None:
    settings = Config(state=str(state), nats=Nats(url=url))
    await asyncio.to_thread(backup.restore, settings, file, force=force, say=lambda _line: None)


@asynccontextmanager
async def operator(state: Path) -> AsyncIterator[Bus]:
    async with connected(server.url(state, "operator"), "operator", closed=lambda: None) as bus:
        yield bus


@asynccontextmanager
async def stopped_state(state: Path) -> AsyncIterator[Bus]:
    """A nats-server on the state folder while the test fills it; afterwards it is stopped."""
    async with servers.nats(state), operator(state) as bus:
        yield bus


async def contents(bus: Bus) -> Contents:
    """Every message of every stream on disk."""
    js = bus.nc.jetstream()
    found: Contents = {}
    for name, storage in (await snapshot.streams(bus)).items():
        if storage == "file":
            last = (await js.stream_info(name)).state.last_seq
            found[name] = {0: (last,)}
            for sequence in range(1, last + 1):
                with contextlib.suppress(APIError):  # overwritten or purged
                    message = await js.get_msg(name, sequence)
                    found[name][sequence] = (message.subject, message.time, message.headers, message.data)
    return found


async def contents_of(state: Path) -> Contents:
    async with servers.nats(state), operator(state) as bus:
        return await contents(bus)


def files(folder: Path) -> dict[str, bytes]:
    """All that lies there, but for the lock and what servers write while they run."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != backup.LOCK and path.suffix != ".log"
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def read(file: Path) -> bytes:
    return file.read_bytes()


def put(file: Path, content: bytes) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return file


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


@pytest.fixture
async def made(tmp_path: Path) -> Path:
    """A backup of a stopped state with two sessions."""
    async with stopped_state(tmp_path / "made") as bus:
        for robot in ("r1", "r2"):
            await Sessions(bus).change(f"okx/{robot}", "account", contract="swap")
    status, said = await ran("backup", tmp_path / "b.tar.gz", "--state", tmp_path / "made")
    assert status == 0, said
    return tmp_path / "b.tar.gz"


# ------------------------------------------------------------------ what comes back


def paper(state: Path) -> list[str]:
    """All that the paper exchange knows."""
    with contextlib.closing(sqlite3.connect(state / "paper" / "paper.sqlite3")) as db:
        return list(db.iterdump())


async def trading(host: Host, stop: asyncio.Event) -> int:
    """Set contracts and trade until told to stop -> how many orders were placed."""
    placed = 0
    while not stop.is_set():
        for contract in ("swap", ""):
            await host.io("paper/busy", 2, contract)
            placed += "data" in await host("paper/spot", "trade", symbol="BTC_USDT", type="buy", price=-1, amount=10)
    return placed


async def seen(host: Host) -> dict[str, Any]:
    """What the account is told of itself."""
    calls: dict[str, dict[str, Any]] = {"accounts": {}, "orders": {"symbol": "BTC_USDT"}}
    return {method: (await host("paper/r1", method, **params))["data"] for method, params in calls.items()}


async def test_a_system_backed_up_at_work_is_the_same_elsewhere(tmp_path: Path) -> None:
    state, other, file = tmp_path / "s", tmp_path / "t", tmp_path / "b.tar.gz"
    async with servers.system(state, "--workers", "1") as system, hosting(system.address) as host:
        assert "data" in await host("paper/r1", "trade", symbol="BTC_USDT", type="buy", price=1000, amount=0.5)
        assert "data" in await host.io("paper/r1", 2, "swap")
        assert "data" in await host.io("paper/r1", 1, "buy")
        assert "data" in await host("paper/r1", "trade", symbol="BTC_USDT", type="buy", price=1000, amount=0.25)
        before = await seen(host)
        assert [order["amount"] for order in before["orders"]] == [0.25]
        stop = asyncio.Event()
        load = asyncio.create_task(trading(host.other("busy", "busy-secret"), stop))
        for _ in range(3):
            status, said = await ran("backup", file, "--force", "--state", state)
            assert status == 0, said
        stop.set()
        assert await load > 0
        assert "KV_sessions" in said
        assert "keep it as safe as the keys themselves" in said
        async with operator(state) as bus:
            original, sessions = await contents(bus), await Sessions(bus).all()
        sent = framed(seal.Sealer(state / "keys"))

        status, said = await ran("restore", file, "--state", other)  # beside the one that runs: in nobody's way
        assert status == 0, said
        assert "seconds ago" in said
        assert "look at the exchange" in said
        assert "fmzbus orders --unsettled" in said
        assert "data" in await host("paper/r1", "accounts")
    copy, saved = await contents_of(other), msgspec.json.decode(members(file)["manifest.json"], type=Manifest).streams
    assert copy.keys() == original.keys() == saved.keys() == {"KV_halt", "KV_sessions", "ORDERS"}
    for name, messages in copy.items():
        last = saved[name].now.last_seq
        assert last <= original[name].pop(0)[0]
        still = {sequence: message for sequence, message in original[name].items() if sequence <= last}
        assert still.items() <= messages.items(), name
        later = {message[0] for sequence, message in messages.items() if sequence > last}
        assert later == {message.subject for message in saved[name].tail}
    assert len(copy["ORDERS"]) > 4
    mine, here = seal.Opener(state / "keys").open(sent), seal.Opener(other / "keys").open(sent)
    assert here[1].credentials.secret_key == "secret"
    assert here[1].account == mine[1].account
    status, said = await ran("backup", tmp_path / "stopped", "--state", state)
    assert status == 0, said
    await restored(tmp_path / "stopped", tmp_path / "u")
    assert paper(tmp_path / "u") == paper(state)
    async with servers.system(other, "--workers", "1") as system, hosting(system.address) as host:
        assert await seen(host) == before
        async with operator(other) as bus:
            again = await Sessions(bus).all()
        assert again.keys() == sessions.keys()
        assert {key: again[key] for key in again if "r1" in key} == {key: sessions[key] for key in sessions if "r1" in key}
        assert Session(contract="swap", direction="buy") in again.values()
        assert "data" in await host("paper/r1", "trade", symbol="BTC_USDT", type="buy", price=1001, amount=0.25)


async def test_a_stopped_state_comes_back_message_by_message(state: Path, tmp_path: Path) -> None:
    async with stopped_state(state) as bus:
        js = bus.nc.jetstream()
        await Sessions(bus).change("okx/r1", "account", contract="swap", level=Decimal("7.5"))
        await js.add_stream(name="LONG", subjects=["long.>"], storage=StorageType.FILE)
        for number in range(110):  # more than the 8 MiB that the server sends before it is answered
            await js.publish(f"long.{number % 7}", os.urandom(100_000), headers={"Number": str(number)})
        for sequence in (1, 2, 50, 109, 110):
            await js.delete_msg("LONG", sequence)
        await js.add_stream(name="QUEUE", subjects=["queue"], storage=StorageType.FILE, retention=RetentionPolicy.WORK_QUEUE)
        await js.add_consumer("QUEUE", ConsumerConfig(durable_name="worker"))
        for number in range(5):
            await js.publish("queue", b"%d" % number)
        pull = await js.pull_subscribe_bind("worker", stream="QUEUE")
        for message in await pull.fetch(2):
            await message.ack_sync()
        await js.add_stream(name="EMPTY", subjects=["empty"], storage=StorageType.FILE)
        await js.add_stream(name="FLEETING", subjects=["fleeting"], storage=StorageType.MEMORY)
        await js.publish("fleeting", b"gone with the server")
        before = await contents(bus)
    lying = files(state)
    status, said = await ran("backup", tmp_path / "b.tar.gz", "--state", state)
    assert status == 0, said
    assert files(state).keys() >= lying.keys()
    assert {name: content for name, content in files(state).items() if not name.startswith("nats/store")} == {
        name: content for name, content in lying.items() if not name.startswith("nats/store")
    }
    await restored(tmp_path / "b.tar.gz", tmp_path / "t")
    async with servers.nats(tmp_path / "t"), operator(tmp_path / "t") as bus:
        after = await contents(bus)
        assert after == before
        assert after.keys() == {"EMPTY", "KV_sessions", "LONG", "QUEUE"}
        assert (len(after["LONG"]), after["LONG"][0], len(after["QUEUE"])) == (106, (110,), 4)
        assert (await Sessions(bus).all()) == {"okx=2Fr1.account": Session(contract="swap", level=Decimal("7.5"))}
        js = bus.nc.jetstream()
        assert (await js.publish("long.1", b"the next")).seq == 111
        pull = await js.pull_subscribe_bind("worker", stream="QUEUE")
        assert [message.data for message in await pull.fetch(3)] == [b"2", b"3", b"4"]
    assert files(tmp_path / "t" / "keys") == files(state / "keys")
    assert server.settings(tmp_path / "t") == server.settings(state)


async def test_a_key_that_is_overwritten_during_the_copy_is_never_lost(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "TRIES", 1)  # at once what is left for a stream that never rests
    async with stopped_state(state) as bus, stopped_state(tmp_path / "t") as other:
        bucket = await bus.nc.jetstream().create_key_value(bucket="sessions", history=1, storage=StorageType.FILE)
        for number in range(20):
            await bucket.put(f"robot-{number}", b"0")

        async def write() -> None:
            number = 0
            while True:
                await bucket.put(f"robot-{number % 20}", b"%d" % number)
                number += 1

        writing = asyncio.create_task(write())
        kept, tails = [], 0
        for _ in range(30):
            least = [int((await bucket.get(f"robot-{number}")).value or b"") for number in range(20)]
            stream = await snapshot.save(bus, "KV_sessions", tmp_path / "part")
            most = [int((await bucket.get(f"robot-{number}")).value or b"") for number in range(20)]
            tails += bool(stream.tail)
            kept.append((await snapshot.load(other, "KV_sessions", stream, tmp_path / "part", 1)).messages)
            copy = await other.nc.jetstream().key_value("sessions")
            values = [int((await copy.get(f"robot-{number}")).value or b"") for number in range(20)]
            assert all(low <= value <= high for low, value, high in zip(least, values, most, strict=True))
            await snapshot.remove(other, "KV_sessions")
        writing.cancel()
        assert kept == [20] * 30
        assert tails > 0


# ------------------------------------------------------------------ the file


async def test_the_file_is_its_owners_and_is_not_overwritten_by_accident(made: Path, tmp_path: Path) -> None:
    assert mode(made) == 0o600
    first = read(made)
    status, said = await ran("backup", made, "--state", tmp_path / "made")
    assert (status, said) == (
        1,
        f"fmzbus: {made} exists: choose another name, or overwrite it with --force; {made} was not written\n",
    )
    assert read(made) == first
    status, said = await ran("backup", made, "--force", "--state", tmp_path / "made")
    assert status == 0, said
    assert read(made) != first
    assert mode(made) == 0o600
    assert names(tmp_path) == {"made", "b.tar.gz"}


async def test_a_folder_without_state_is_not_backed_up(tmp_path: Path) -> None:
    status, said = await ran("backup", tmp_path / "b", "--state", tmp_path / "nothing")
    assert (status, said) == (
        1,
        f"fmzbus: {tmp_path / 'nothing'} holds no state: name the folder with --state; {tmp_path / 'b'} was not written\n",
    )
    assert names(tmp_path) == set()


def members(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as tar:
        return {one.name: content.read() for one in tar if (content := tar.extractfile(one))}


def written(file: Path, parts: dict[str, bytes], *, link: str = "") -> Path:
    with tarfile.open(file, "w:gz") as tar:
        for name, content in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if name == link:
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
            tar.addfile(member, io.BytesIO(content))
    return file


def with_manifest(contents: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    manifest = msgspec.json.decode(contents["manifest.json"]) | changes
    return contents | {"manifest.json": msgspec.json.encode(manifest)}


def with_part(parts: dict[str, bytes], name: str, content: bytes) -> dict[str, bytes]:
    """One more, and in the manifest."""
    listed = msgspec.json.decode(parts["manifest.json"])["parts"]
    listed.append({"name": name, "size": len(content), "sha256": sha256(content).hexdigest()})
    return with_manifest(parts, parts=listed) | {name: content}


async def test_a_file_that_is_not_a_whole_backup_changes_nothing(made: Path, tmp_path: Path) -> None:
    whole, parts, bad = read(made), members(made), tmp_path / "bad"
    secret = next(name for name in parts if name.endswith(".secret"))

    async def refused(file: Path, words: str) -> None:
        with pytest.raises(BackupError, match=words):
            await restored(file, tmp_path / "t")
        assert names(tmp_path) <= {"made", "b.tar.gz", "bad"}

    for size in (0, 1, 11, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 1):  # truncated
        await refused(put(bad, whole[:size]), "is not a whole backup|does not begin with a manifest")
    for place in range(10, len(whole), len(whole) // 40):  # one bit; the ten bytes before are gzip's, and say nothing
        flipped = bytearray(whole)
        flipped[place] ^= 1
        await refused(put(bad, bytes(flipped)), "is not a whole backup|damaged|does not begin with a manifest|names a file")
    await refused(put(bad, os.urandom(1000)), "is not a whole backup")
    await refused(put(bad, gzip.compress(b"something else" * 1000)), "is not a whole backup")

    await refused(written(bad, parts | {secret: b"x" * len(parts[secret])}), f"{secret} is not what its manifest says")
    await refused(written(bad, {name: parts[name] for name in parts if name != secret}), f"it lacks {secret}")
    await refused(written(bad, parts | {"keys/more.secret": b"x"}), "more.secret' is not what its manifest says")
    await refused(written(bad, parts, link=secret), "is not what its manifest says")
    await refused(written(bad, {name: parts[name] for name in parts if name != "manifest.json"}), "does not begin with a manifest")
    await refused(written(bad, with_manifest(parts, format=2)), "format 2, this fmzbus reads 1")
    for name in ("../outside", "/etc/outside", "keys/../../outside", "keys/sub/x", "logs/x", "keys/.."):
        await refused(written(bad, with_part(parts, name, b"x")), "no part of a state")
    with pytest.raises(FileNotFoundError):
        await restored(tmp_path / "nowhere", tmp_path / "t")
    status, said = await ran("restore", bad, "--state", tmp_path / "t")
    assert (status, said.count("\n"), said.endswith("; nothing was changed\n")) == (1, 1, True)
    await restored(written(bad, parts), tmp_path / "t")  # the same parts, unharmed


async def test_a_stream_that_its_server_does_not_take_changes_nothing(made: Path, tmp_path: Path) -> None:
    parts = members(made)
    broken = bytearray(parts["streams/KV_sessions"])
    broken[len(broken) // 2] ^= 1
    listed = msgspec.json.decode(parts["manifest.json"])["parts"]
    for part in listed:
        if part["name"] == "streams/KV_sessions":
            part["sha256"] = sha256(broken).hexdigest()
    bad = written(tmp_path / "bad", with_manifest(parts, parts=listed) | {"streams/KV_sessions": bytes(broken)})
    status, said = await ran("restore", bad, "--state", tmp_path / "t")
    assert status == 1
    assert said.splitlines()[-1].startswith("fmzbus: JetStream refused ")
    assert said.endswith("; nothing was changed\n")
    assert names(tmp_path) == {"made", "b.tar.gz", "bad"}


async def test_a_backup_that_is_broken_off_leaves_no_key_behind(made: Path, tmp_path: Path) -> None:
    nobody = f"nats://127.0.0.1:{server.free_port()}"
    command = (COMMAND, "backup", str(tmp_path / "c"), "--state", str(tmp_path / "made"))
    async with servers.running(*command, env=environment(nats__url=nobody)) as one:
        await eventually(lambda: len(names(tmp_path)) == 3)
        assert await one.stop(signal.SIGTERM) == 128 + signal.SIGTERM
    assert names(tmp_path) == {"made", "b.tar.gz"}


async def test_a_full_disk_leaves_nothing_half_done(made: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    status, said = await ran("backup", tmp_path / "c", "--state", tmp_path / "made", file_limit=0)
    assert (status, said.endswith(f"; {tmp_path / 'c'} was not written\n")) == (1, True), said
    assert "Traceback" not in said
    for blocks in (0, 1):
        status, said = await ran("restore", made, "--state", tmp_path / "t", file_limit=blocks)
        assert (status, said.endswith("; nothing was changed\n")) == (1, True), said
        assert "Traceback" not in said
    assert files(tmp_path) == before


# ------------------------------------------------------------------ where to


async def test_a_state_that_is_there_is_refused_and_with_force_kept_aside(made: Path, tmp_path: Path) -> None:
    state = tmp_path / "made"
    async with stopped_state(state) as bus:
        await Sessions(bus).change("okx/r3", "account", contract="quarter")
    before = files(state)
    status, said = await ran("restore", made, "--state", state)
    assert (status, said) == (
        1,
        f"fmzbus: {state} is not empty: name another folder, or move it aside with --force; nothing was changed\n",
    )
    assert files(state) == before
    status, said = await ran("restore", made, "--state", state, "--force")
    assert status == 0, said
    (aside,) = (tmp_path / name for name in names(tmp_path) if name.startswith("made.before-"))
    assert f"what was there before is now {aside}" in said
    assert files(aside) == before
    async with servers.nats(state), operator(state) as bus:
        assert list(await Sessions(bus).all()) == ["okx=2Fr1.account", "okx=2Fr2.account"]


async def test_a_folder_of_something_else_is_never_moved(made: Path, tmp_path: Path) -> None:
    put(tmp_path / "mine" / "thesis.txt", b"years")
    with pytest.raises(BackupError, match="holds something else than state of fmzbus"):
        await restored(made, tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


async def test_a_running_system_is_refused_with_and_without_its_supervisor(made: Path, tmp_path: Path) -> None:
    state = tmp_path / "s"
    async with servers.system(state, "--workers", "1", "--bench", paper__enabled="false") as system, hosting(system.address) as host:
        for force in ((), ("--force",)):
            status, said = await ran("restore", made, "--state", state, *force)
            assert (status, said) == (1, f"fmzbus: a system runs on the state folder {state}: stop it first; nothing was changed\n")
        assert "data" in await host("null", "ticker", symbol="BTC_USDT")
    async with servers.nats(state):
        with pytest.raises(BackupError, match="a nats-server runs on the state folder"):
            await restored(made, state, force=True)
    assert names(tmp_path) == {"made", "b.tar.gz", "s"}


async def test_keys_that_lie_elsewhere_are_put_back_where_they_lie(made: Path, tmp_path: Path) -> None:
    status, said = await ran("restore", made, "--state", tmp_path / "t", keys__path=tmp_path / "safe")
    assert status == 0, said
    assert files(tmp_path / "safe") == files(tmp_path / "made" / "keys")
    assert not (tmp_path / "t" / "keys").exists()
    status, said = await ran("restore", made, "--state", tmp_path / "u", keys__path=tmp_path / "safe")
    assert (status, f"{tmp_path / 'safe'} is not empty" in said) == (1, True)
    assert not (tmp_path / "u").exists()


# ------------------------------------------------------------------ a server of the user's own


@asynccontextmanager
async def own_server(folder: Path) -> AsyncIterator[str]:
    port = server.free_port()
    binary = str(Path(sys.executable).with_name("nats-server"))
    async with servers.running(binary, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(folder)) as one:
        await one.said("Server is ready")
        yield f"nats://127.0.0.1:{port}"


async def test_streams_of_an_own_server_are_copied_and_none_of_them_overwritten(made: Path, tmp_path: Path) -> None:
    async with own_server(tmp_path / "one") as url, connected(url, "operator", closed=lambda: None) as bus:
        await restored(made, tmp_path / "t", url=url)
        before = await contents(bus)
        assert list(await Sessions(bus).all()) == ["okx=2Fr1.account", "okx=2Fr2.account"]
        status, said = await ran("restore", made, "--state", tmp_path / "u", nats__url=url)
        assert (status, said.splitlines()[-1]) == (
            1,
            "fmzbus: the server has streams of these names already: KV_sessions; nothing was changed",
        )
        assert await contents(bus) == before
        assert not (tmp_path / "u").exists()
        status, said = await ran("backup", tmp_path / "c", "--state", tmp_path / "t", nats__url=url)
        assert status == 0, said
    await restored(tmp_path / "c", tmp_path / "v")
    assert await contents_of(tmp_path / "v") == before


async def test_an_own_server_loses_again_what_it_got_when_the_rest_fails(made: Path, tmp_path: Path) -> None:
    async with own_server(tmp_path / "one") as url, connected(url, "operator", closed=lambda: None) as bus:
        settings, heard = Config(state=str(tmp_path / "t"), nats=Nats(url=url)), []

        def say(line: str) -> None:
            heard.append(line)
            if line.startswith("streams/KV_sessions"):  # it is on the server: now somebody takes the place of the state folder
                put(tmp_path / "t" / "theirs", b"x")

        with pytest.raises(BackupError, match="is not empty"):
            await asyncio.to_thread(backup.restore, settings, made, force=False, say=say)
        assert len(heard) == 2
        assert await snapshot.streams(bus) == {}
    assert names(tmp_path / "t") == {"theirs"}


async def test_a_bus_that_is_not_there_is_said_in_one_line(made: Path, tmp_path: Path) -> None:
    nobody = f"nats://user:password@127.0.0.1:{server.free_port()}"
    status, said = await ran("backup", tmp_path / "c", "--state", tmp_path / "made", nats__url=nobody)
    assert status == 1
    assert said.count("\n") == 1
    assert "does not answer" in said
    assert "password" not in said
    assert names(tmp_path) == {"made", "b.tar.gz"}
