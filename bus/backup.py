"""`fmzbus backup` and `fmzbus restore`: everything that must survive, in one file and out of it.

The file is a compressed tar. Its first member, manifest.json, names every other with size and SHA-256:

    streams/<name>           JetStream's snapshot of each stream that lies on disk
    paper/paper.sqlite3      the paper exchange, copied after the journal: as any exchange it may know more than the journal, never less
    paper/port  nats/settings.json     what was chosen once: the port, the passwords of the embedded server
    keys/<file>              what seals and opens credentials; copied last, so that whatever the streams hold sealed can be opened

A restore builds the whole state folder beside the wanted one, and renames it into place when all is there and checked.
"""

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NoReturn

import msgspec
import typer

from bus import archive, server, snapshot
from bus.archive import Manifest
from bus.config import Config
from bus.connection import Bus
from bus.lifecycle import stop_signals
from bus.snapshot import BackupError, Stream
from bus.start import VERSION
from bus.terminal import ConfigFile, StateDir, configured, failed, out

LOCK = "up.lock"

Say = Callable[[str], None]
app = typer.Typer()


@app.command("backup")
def backup_command(
    file: Annotated[Path, typer.Argument(help="To write; .tar.gz.")],
    *,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    config: ConfigFile = None,
    state: StateDir = None,
) -> None:
    """Copy all state into one file, while the system runs or while it is stopped.

    Sessions, order journal and all else the bus keeps on disk, the paper exchange, the keys that open credentials: keep the file as
    safe as those.
    """
    settings = configured(config, state)
    with _in_one_line(f"{file} was not written"):
        manifest = backup(settings, file, force=force, say=out.print)
        size = _size(file.stat().st_size)
    out.print(f"{file}: {len(manifest.parts)} parts, {size}, taken {manifest.taken}, readable by its owner only")
    out.print("It holds the keys that open credentials: keep it as safe as the keys themselves.")
    if not any(part.name.endswith(".secret") for part in manifest.parts):
        out.print(f"But no .secret key: {settings.keys_path} has none. Nothing that is sealed can be opened with this backup alone.")


@app.command("restore")
def restore_command(
    file: Annotated[Path, typer.Argument(help="As `fmzbus backup` wrote it.")],
    *,
    force: Annotated[bool, typer.Option("--force", help="Move a state that is there aside, to <state>.before-<time>.")] = False,
    config: ConfigFile = None,
    state: StateDir = None,
) -> None:
    """Bring back the state that a backup holds, into a state folder that is empty and whose system does not run.

    With [nats] url set, streams go to that server, where none may have the name of one in the backup. Either all is restored or nothing.
    """
    settings = configured(config, state)
    with _in_one_line("nothing was changed"):
        manifest, aside = restore(settings, file, force=force, say=out.print)
    for path in aside:
        out.print(f"what was there before is now {path}")
    age = _age(time.time() - manifest.taken_ms / 1000)
    out.print(f"restored into {settings.state_path}: the state of {manifest.taken}, {age} ago, written by fmzbus {manifest.version}")
    out.print("Orders sent since then are not in the journal, or without what became of them, and no worker will look for them: before you")
    out.print(
        "trade again look at the exchange. Then start `fmzbus up`; `fmzbus orders --unsettled` lists what is not known of older ones."
    )


@contextmanager
def _in_one_line(consequence: str) -> Iterator[None]:
    """Whatever goes wrong ends the command with one line. SIGTERM and SIGHUP end it as Ctrl-C does: what it made so far is removed."""

    def stop(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    for number in set(stop_signals()) - {signal.SIGINT}:
        signal.signal(number, stop)
    try:
        yield
    except (BackupError, sqlite3.Error, msgspec.MsgspecError) as e:
        raise failed(f"{e}; {consequence}") from None
    except OSError as e:
        raise failed(": ".join(str(part) for part in (e.filename, e.strerror or e) if part) + f"; {consequence}") from None


# ------------------------------------------------------------------ backup


def backup(settings: Config, file: Path, *, force: bool, say: Say) -> Manifest:
    """Write the file. Raises BackupError, OSError, sqlite3.Error; then there is none, or the old one."""
    state = settings.state_path.resolve()
    if not settings.nats.url and not server.was_set_up(state):
        raise BackupError(f"{state} holds no state: name the folder with --state")
    _refuse_existing(file, force=force)
    with TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as folder, _locked(state) as stopped:
        spool = Path(folder) / "parts"
        for name in ("streams", "keys", "paper", "nats"):
            (spool / name).mkdir(parents=True)
        taken_ms, streams = asyncio.run(_save_streams(settings, spool, stopped=stopped, say=say))
        _save_files(settings, spool)
        packed = Path(folder) / "packed"
        manifest = archive.pack(spool, streams, taken_ms, VERSION, packed)
        for part in manifest.parts:
            if part.stream is None:
                say(f"{part.name:30} {_size(part.size)}")
        _refuse_existing(file, force=force)
        packed.rename(file)
    _sync(file.parent)
    return manifest


def _refuse_existing(file: Path, *, force: bool) -> None:
    if file.is_dir():
        raise BackupError(f"{file} is a folder: name a file")
    if file.exists() and not force:
        raise BackupError(f"{file} exists: choose another name, or overwrite it with --force")


async def _save_streams(settings: Config, spool: Path, *, stopped: bool, say: Say) -> tuple[int, dict[str, Stream]]:
    """-> (bus time before the first of them, name -> stream)."""
    state = settings.state_path.resolve()
    if settings.nats.url:
        reached = snapshot.reached(settings.nats.url)
    elif not stopped or await snapshot.answers(state):
        reached = snapshot.reached(server.url(state, "operator"))
    else:
        reached = snapshot.embedded(state / "nats" / "store")
    async with reached as bus:
        taken_ms = bus.now_ms()
        saved = {}
        for name, storage in (await snapshot.streams(bus)).items():
            if storage == "file":
                path = spool / "streams" / name
                saved[name] = await snapshot.save(bus, name, path)
                say(f"{f'streams/{name}':30} {_size(path.stat().st_size)}, {saved[name].now.messages} messages")
    return taken_ms, saved


def _save_files(settings: Config, spool: Path) -> None:
    state = settings.state_path
    database = state / "paper" / "paper.sqlite3"
    if database.exists():
        with (
            contextlib.closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=rw", uri=True)) as source,
            contextlib.closing(sqlite3.connect(spool / "paper" / "paper.sqlite3")) as copy,
        ):
            source.backup(copy)  # in one step: the exchange goes on writing, the copy is of one moment
    for name in ("paper/port", "nats/settings.json"):
        if (state / name).exists():
            shutil.copyfile(state / name, spool / name)
    for key in settings.keys_path.glob("*"):
        if key.suffix in (".secret", ".public", ".key"):
            with contextlib.suppress(FileNotFoundError):  # retired by a rotation just now
                shutil.copyfile(key, spool / "keys" / key.name)


# ------------------------------------------------------------------ restore


def restore(settings: Config, file: Path, *, force: bool, say: Say) -> tuple[Manifest, list[Path]]:
    """Bring a backup back -> (what it was, where that went which was there before).

    Raises BackupError, OSError; then nothing was changed.
    """
    state, keys = settings.state_path.resolve(), settings.keys_path.resolve()
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S}"
    if state.is_mount():
        raise BackupError(f"{state} is a mount, and is replaced as a whole: restore into a folder below it (--state)")
    with ExitStack() as stack:
        if (state / LOCK).exists() and not stack.enter_context(_locked(state)):
            raise BackupError(f"a system runs on the state folder {state}: stop it first")
        if asyncio.run(snapshot.answers(state)):
            raise BackupError(f"a nats-server runs on the state folder {state}: stop it first")
        targets = [state] if keys.is_relative_to(state) else [state, keys]
        for target in targets:
            _refuse_content(target, force=force)
        staged = {target: target.with_name(f"{target.name}.restoring-{stamp}-{os.getpid()}") for target in targets}
        for folder in staged.values():
            folder.mkdir(mode=0o700, parents=True)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        manifest = archive.unpack(file, staged[state])
        say(f"{file} is whole: {len(manifest.parts)} parts, taken {manifest.taken}")
        found = staged[state] / "keys"
        if found.exists():
            home = staged[keys] if keys in staged else staged[state] / keys.relative_to(state)
            home.parent.mkdir(parents=True, exist_ok=True)
            found.replace(home)
        aside: list[Path] = []
        asyncio.run(_load_streams(settings, manifest, staged[state], say, lambda: aside.extend(_put_in_place(staged, stamp, force=force))))
    return manifest, aside


def _refuse_content(target: Path, *, force: bool) -> None:
    if not target.exists():
        return
    if not (names := {path.name for path in target.iterdir()} - {LOCK}):
        return
    if not force:
        raise BackupError(f"{target} is not empty: name another folder, or move it aside with --force")
    if not names & {"nats", "keys", "paper"} and not any(name.endswith(".public") for name in names):
        raise BackupError(f"{target} holds something else than state of fmzbus: it is not moved aside")


async def _load_streams(settings: Config, manifest: Manifest, staged: Path, say: Say, finish: Callable[[], None]) -> None:
    """Make the streams, then finish. The user's own server loses again what it got when anything fails; the embedded one's go anyway."""
    streams = manifest.streams
    if not settings.nats.url:
        async with snapshot.embedded(staged / "nats" / "store") as bus:
            for name in streams:
                await _load_stream(bus, name, streams[name], staged, 1, say)
        shutil.rmtree(staged / "streams", ignore_errors=True)
        _sync_all(staged)
        finish()
        return
    async with snapshot.reached(settings.nats.url) as bus:
        there = await snapshot.streams(bus)
        if taken := sorted(streams.keys() & there.keys()):
            raise BackupError(f"the server has streams of these names already: {', '.join(taken)}")
        begun: list[str] = []
        try:
            for name in streams:
                begun.append(name)
                await _load_stream(bus, name, streams[name], staged, settings.nats.replicas, say)
            shutil.rmtree(staged / "streams", ignore_errors=True)
            finish()
        except BaseException:  # also a Ctrl-C: nothing half done stays on a server of the user's
            for name in begun:
                await snapshot.remove(bus, name)
            raise


async def _load_stream(bus: Bus, name: str, stream: Stream, staged: Path, replicas: int, say: Say) -> None:
    state = await snapshot.load(bus, name, stream, staged / "streams" / name, replicas)
    lost = stream.now.messages - state.messages
    say(f"{f'streams/{name}':30} {state.messages} messages" + (f"; {lost} more have outlived their time" if lost > 0 else ""))


def _put_in_place(staged: dict[Path, Path], stamp: str, *, force: bool) -> list[Path]:
    """Rename each folder to what it is to be -> where those went that were there. All of them, or none."""
    moved = []
    with ExitStack() as undo:
        for target, folder in staged.items():
            _refuse_content(target, force=force)  # once more: it took a while
            if target.exists():
                if {path.name for path in target.iterdir()} <= {LOCK}:
                    (target / LOCK).unlink(missing_ok=True)  # an empty folder can be renamed over
                else:
                    aside = target.with_name(f"{target.name}.before-{stamp}")
                    target.rename(aside)
                    undo.callback(aside.rename, target)
                    moved.append(aside)
            folder.rename(target)
            undo.callback(target.rename, folder)
            _sync(target.parent)
        undo.pop_all()
    return moved


# ------------------------------------------------------------------ both


@contextmanager
def _locked(state: Path) -> Iterator[bool]:
    """Keep `fmzbus up` from starting meanwhile; False where it, or another of these commands, has the folder."""
    if not state.exists():  # nothing of ours is on this machine: a cluster's streams
        yield True
        return
    with (state / LOCK).open("a") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        yield held


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _age(span_s: float) -> str:
    for unit_s, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if span_s >= 2 * unit_s:
            return f"{span_s / unit_s:.0f} {name}"
    return f"{max(0.0, span_s):.0f} seconds"
