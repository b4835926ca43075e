"""One JSON object a line; constant event text, values in extra={"fields": {...}}; keys redacted from the finished line."""

import heapq
import logging
import logging.handlers
import re
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bus.config import Logs

SECRET = re.compile(
    r"""(?ix) ( (?:access|secret|api)[_-]?key | passphrase | password | mac[_-]?key | (?:paper-)?sign(?:ature)? | paper-secret )
        ( \\?["']? \s* [:=] \s* \\?["']? ) [^"'\\&,\s}]+"""
)
WORDS = ("access", "secret", "api", "passphrase", "password", "mac", "sign")
"""Each match of the pattern has one of them."""
URL_PASSWORD = re.compile(r"(//[^:@/\s]*:)[^@/\s]+@")


def redact(line: str) -> str:
    """Blank what looks like a key, a signature or a password in a url."""
    lower = line.lower()
    if any(word in lower for word in WORDS):  # most lines have none, and looking for them takes a twentieth of the pattern's time
        line = SECRET.sub(r"\1\2***", line)
    return URL_PASSWORD.sub(r"\1***@", line) if "//" in line else line


def unquoted(record: logging.LogRecord) -> bool:
    """A filter: aiohttp's account of malformed HTTP quotes the bytes that came, which may be a key. The event stays, the quote goes."""
    if record.exc_info and type(record.exc_info[1]).__module__ == "aiohttp.http_exceptions":
        record.exc_info = None
    return True


class JsonLines(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time_ms": int(record.created * 1000),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "event": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return redact(msgspec.json.encode(entry, enc_hook=str).decode())


def setup(settings: Logs, process: str) -> None:
    """Log to the file, rotated, or else to stderr. The libraries' own chatter starts at warning."""
    handler: logging.Handler
    if settings.file:
        path = Path(settings.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(
            path, maxBytes=int(settings.max_mb * 1e6), backupCount=settings.keep, encoding="utf-8"
        )
    else:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process))
    handler.addFilter(unquoted)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in ("bus", "bridge", "workers", "__main__"):  # the last is the process that was started
        logging.getLogger(package).setLevel(settings.level.upper())
    logging.captureWarnings(capture=True)


FOLLOW_S = 0.2


def newest(folder: Path, name: str, count: int) -> list[str]:
    """The last lines of all processes' current files whose name contains `name`, in the order of their times."""
    tails = [path.read_text(errors="replace").splitlines()[-count:] for path in _files(folder, name)]
    return list(heapq.merge(*tails, key=_time_ms))[-count:]


def follow_files(folder: Path, name: str) -> Iterator[str]:
    """Lines as they are written, for ever; a rotated file begins anew."""
    read = {path: path.stat().st_size for path in _files(folder, name)}
    while True:
        for path in _files(folder, name):
            size = path.stat().st_size
            if size != read.get(path, 0):
                with path.open("rb") as file:
                    file.seek(read[path] if path in read and size > read[path] else 0)
                    lines = file.read().decode(errors="replace")
                    read[path] = file.tell()
                yield from lines.splitlines()
        time.sleep(FOLLOW_S)


def pretty(line: str) -> str:
    """One line for a person: time, level, process, event, the rest as k=v."""
    try:
        entry = msgspec.json.decode(line, type=dict)
        moment = datetime.fromtimestamp(entry.pop("time_ms") / 1000, UTC)
        words = [
            f"{moment:%Y-%m-%d %H:%M:%S}.{moment.microsecond // 1000:03d}Z",
            entry.pop("level"),
            entry.pop("process"),
            entry.pop("event"),
        ]
    except (msgspec.MsgspecError, KeyError, TypeError):
        return line
    entry.pop("logger", None)
    traceback = entry.pop("traceback", "")
    return " ".join([*words, *(f"{key}={value}" for key, value in entry.items())]) + (f"\n{traceback}" if traceback else "")


def _files(folder: Path, name: str) -> list[Path]:
    return sorted(path for path in folder.glob("*.jsonl") if name in path.name)


def _time_ms(line: str) -> int:
    found = re.match(r'{"time_ms":(\d+)', line)
    return int(found[1]) if found else 0
