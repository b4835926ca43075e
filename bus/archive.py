"""The file of a backup: a compressed tar whose first member, manifest.json, names every other with size and SHA-256.

Written from a folder of parts and read into one; what is read is checked before anybody relies on it.
"""

import gzip
import io
import os
import re
import tarfile
import zlib
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import IO, Annotated

import msgspec
from msgspec import Meta, Struct

from bus.snapshot import BackupError, Stream

FORMAT = 1
MANIFEST = "manifest.json"
MOST_MANIFEST = 64 << 20
BLOCK = 1 << 20
PART = re.compile(r"(?:streams|keys)/[A-Za-z0-9_-][A-Za-z0-9_.-]*|paper/(?:paper\.sqlite3|port)|nats/settings\.json")
"""Every name a part may have; so none leaves the folder."""


class Part(Struct, frozen=True):
    """One member of the file. size: bytes. stream: of a stream's snapshot."""

    name: str
    size: int
    sha256: str
    stream: Stream | None = None


class Manifest(Struct, frozen=True):
    """taken_ms: before the first part was copied. version: of the fmzbus that wrote it."""

    format: int
    taken_ms: Annotated[int, Meta(ge=0, lt=253_402_300_800_000)]  # until the year 10000
    version: str
    parts: list[Part]

    @property
    def taken(self) -> str:
        return f"{datetime.fromtimestamp(self.taken_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"

    @property
    def streams(self) -> dict[str, Stream]:
        return {part.name.removeprefix("streams/"): part.stream for part in self.parts if part.stream is not None}


def pack(folder: Path, streams: dict[str, Stream], taken_ms: int, version: str, packed: Path) -> Manifest:
    """Write all files of the folder into one, on disk on return. streams: by name, those whose snapshots lie there.

    Raises BackupError, OSError.
    """
    parts = [_part(folder, path, streams) for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = Manifest(FORMAT, taken_ms, version, parts)
    with os.fdopen(os.open(packed, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        with gzip.GzipFile(fileobj=file, mode="wb", filename="", compresslevel=6) as gz, tarfile.open(fileobj=gz, mode="w") as tar:
            content = msgspec.json.encode(manifest)
            _add(tar, MANIFEST, len(content), io.BytesIO(content), taken_ms)
            for part in parts:
                with (folder / part.name).open("rb") as source:
                    _add(tar, part.name, part.size, source, taken_ms)
        file.flush()
        os.fsync(file.fileno())
    return manifest


def _part(folder: Path, path: Path, streams: dict[str, Stream]) -> Part:
    name = path.relative_to(folder).as_posix()
    if not PART.fullmatch(name):
        raise BackupError(f"{name!r} is no name for a part of a backup: rename it")
    with path.open("rb") as file:
        digest = sha256()
        while block := file.read(BLOCK):
            digest.update(block)
    return Part(name, path.stat().st_size, digest.hexdigest(), streams.get(path.name) if path.parent.name == "streams" else None)


def _add(tar: tarfile.TarFile, name: str, size: int, content: IO[bytes], time_ms: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o600, time_ms // 1000
    tar.addfile(member, content)


def unpack(file: Path, folder: Path) -> Manifest:
    """Write every part into the folder, checked and on disk. Raises BackupError for anything that a backup of ours is not, OSError."""
    seen: set[str] = set()
    try:
        with gzip.open(file) as gz:
            with tarfile.open(fileobj=gz, mode="r|") as tar:
                manifest = _manifest(tar)
                parts = {part.name: part for part in manifest.parts}
                while (member := tar.next()) is not None:
                    part = parts.get(member.name)
                    if part is None or member.name in seen or not member.isreg() or member.size != part.size:
                        raise BackupError(f"{file} is not a whole backup: {member.name!r} is not what its manifest says")
                    seen.add(part.name)
                    _write(tar.extractfile(member), folder / part.name, part)
            while gz.read(BLOCK):  # to the end, where its checksum is
                pass
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, RecursionError, msgspec.MsgspecError) as e:
        raise BackupError(f"{file} is not a whole backup: {e}") from None
    if missing := parts.keys() - seen:
        raise BackupError(f"{file} is not a whole backup: it lacks {', '.join(sorted(missing))}")
    return manifest


def _manifest(tar: tarfile.TarFile) -> Manifest:
    first = tar.next()
    content = tar.extractfile(first) if first and first.name == MANIFEST and first.isreg() and first.size <= MOST_MANIFEST else None
    if content is None:
        raise BackupError("this is no backup of fmzbus: it does not begin with a manifest")
    encoded = content.read()
    written = msgspec.json.decode(encoded, type=dict).get("format")
    if written != FORMAT:
        raise BackupError(f"the backup has format {written}, this fmzbus reads {FORMAT}: use the version that wrote it")
    manifest = msgspec.json.decode(encoded, type=Manifest)
    if strange := [part.name for part in manifest.parts if not PART.fullmatch(part.name)]:
        raise BackupError(f"the backup names a file that is no part of a state: {strange[0]!r}")
    if len({part.name for part in manifest.parts}) < len(manifest.parts):
        raise BackupError("the backup names a part twice")
    return manifest


def _write(source: IO[bytes] | None, path: Path, part: Part) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    digest = sha256()
    mode = 0o644 if path.suffix == ".public" else 0o600
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        while source and (block := source.read(BLOCK)):
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != part.sha256:
        raise BackupError(f"the backup is damaged: {part.name} is not what its manifest says")
