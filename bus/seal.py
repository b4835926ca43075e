"""Credentials sealed for the workers, requests bound to them.

The bridge seals a host's keys together with a random MAC key to the workers' public key. A frame on the bus is a keyed blake2b over
every byte of the encoded request, then the request, which carries the sealed box: a box cut out of one frame and put into another is
refused, because the MAC key is inside it. What seals and what opens are files in one folder:

    <id>.public     a bridge seals to the newest
    <id>.secret     0600; a worker opens with any it has, so that a rotation loses no request
    account.key     0600; workers only: keys the hash by which an account is shown and stored
"""

import hmac
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, PublicKey, SealedBox

from bus.errors import BadRequest, Internal
from bus.messages import Request, decode_request

MAC_SIZE = 32
CACHE = 10_000
RELOAD_S = 1.0
GRACE_S = 60
"""A key that was replaced longer ago goes with the next rotation; until then requests sealed to it may be on their way."""

BLANK = "***"
"""What stands where a key was."""
LEAST_SECRET = 8

K = TypeVar("K")
V = TypeVar("V")


class Credentials(Struct, frozen=True):
    """Both keys as the host sent them. Its repr shows neither."""

    access_key: str
    secret_key: str

    def __repr__(self) -> str:
        return f"Credentials({BLANK})"

    def blanked(self, text: str) -> str:
        """The text without these keys. A key under 8 signs is a word, not a secret."""
        for key in (self.secret_key, *self.secret_key.replace(",", "\n").splitlines(), self.access_key):
            text = text.replace(key, BLANK) if len(key) >= LEAST_SECRET else text
        return text


class _Box(Struct, frozen=True, array_like=True):
    access_key: str
    secret_key: str
    mac_key: bytes


class Opened(Struct, frozen=True):
    """What a sealed box held. account: 16 characters, stable over restarts and rotations, says nothing about the keys."""

    credentials: Credentials
    mac_key: bytes
    account: str

    def __repr__(self) -> str:
        return f"Opened(account={self.account!r})"


class _Recent(OrderedDict[K, V]):
    """A dictionary that forgets what was used longest ago."""

    def find(self, key: K, make: Callable[[], V]) -> V:
        if key in self:
            self.move_to_end(key)
            return self[key]
        self[key] = value = make()
        if len(self) > CACHE:
            self.popitem(last=False)
        return value


def new_keys(folder: Path) -> str:
    """Write a new pair, keep those in use a minute ago, remove older ones. Returns the new key's id. A worker finds it by itself."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    account_key = folder / "account.key"
    if not account_key.exists():
        _write(account_key, secrets.token_bytes(32))
    newest_ms = max(map(_made_ms, folder.glob("*.secret")), default=0)
    made_ms = max(time.time_ns() // 1_000_000, newest_ms + 1)  # a clock set back must not make the new key an old one
    key_id = f"{made_ms:013d}-{secrets.token_hex(4)}"
    pair = PrivateKey.generate()
    _write(folder / f"{key_id}.secret", bytes(pair))  # first the secret: a bridge must not seal to what no worker can open
    _write(folder / f"{key_id}.public", bytes(pair.public_key), mode=0o644)
    for old, successor in pairwise(sorted(folder.glob("*.secret"))):
        if made_ms - _made_ms(successor) >= GRACE_S * 1000:
            old.unlink()
            old.with_suffix(".public").unlink(missing_ok=True)
    return key_id


def _made_ms(key: Path) -> int:
    return int(key.stem.partition("-")[0])


def _write(path: Path, content: bytes, mode: int = 0o600) -> None:
    temporary = path.with_suffix(".new")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:  # a full disk: half a key is none
        temporary.unlink(missing_ok=True)
        raise


class Sealer:
    """The bridge's half. A rotation is noticed within RELOAD_S of the next request."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._boxes: _Recent[tuple[str, str], tuple[bytes, bytes]] = _Recent()
        self._key_id = ""
        self._looked = -RELOAD_S
        self._load()

    def _load(self) -> None:
        now = self._clock()
        if now - self._looked < RELOAD_S:
            return
        self._looked = now
        newest = max(self._folder.glob("*.public"), default=None)
        if newest is None:
            raise Internal(f"no sealing key in {self._folder}: run `fmzbus keys new`")
        if newest.stem != self._key_id:
            self._seal = SealedBox(PublicKey(newest.read_bytes())).encrypt
            self._key_id = newest.stem
            self._boxes.clear()

    def box(self, access_key: str, secret_key: str) -> tuple[str, bytes, bytes]:
        """-> (key id, sealed box, MAC key) for these credentials; the same ones until the key rotates."""
        self._load()
        sealed, mac_key = self._boxes.find((access_key, secret_key), lambda: self._make(access_key, secret_key))
        return self._key_id, sealed, mac_key

    def _make(self, access_key: str, secret_key: str) -> tuple[bytes, bytes]:
        mac_key = secrets.token_bytes(32)
        return self._seal(msgspec.msgpack.encode(_Box(access_key, secret_key, mac_key))), mac_key


def frame(body: bytes, mac_key: bytes) -> bytes:
    """The bytes on the bus: MAC, then the encoded request."""
    return blake2b(body, digest_size=MAC_SIZE, key=mac_key).digest() + body


class Opener:
    """The workers' half: accepts every key of its folder, and looks for new ones when it meets an id it does not know."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._opened: _Recent[tuple[str, bytes], Opened] = _Recent()
        self._looked = -RELOAD_S
        self._load()
        if not self._boxes:
            raise Internal(f"no sealing key in {folder}: run `fmzbus keys new`")

    def _load(self) -> None:
        self._looked = self._clock()
        self._opened.clear()  # what a retired key opened goes with it
        self._boxes = {path.stem: SealedBox(PrivateKey(path.read_bytes())) for path in self._folder.glob("*.secret")}
        account_key = self._folder / "account.key"
        self._account_key = account_key.read_bytes() if account_key.exists() else b""

    def open(self, data: bytes) -> tuple[Request, Opened]:
        """Decode and check one frame. Raises BadRequest for anything that a bridge of ours did not send in this very form."""
        try:
            request = decode_request(memoryview(data)[MAC_SIZE:])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            raise BadRequest("malformed request on the bus") from e
        opened = self._opened.find((request.key_id, request.sealed), lambda: self._unseal(request))
        mac = blake2b(memoryview(data)[MAC_SIZE:], digest_size=MAC_SIZE, key=opened.mac_key).digest()
        if not hmac.compare_digest(mac, data[:MAC_SIZE]):
            raise BadRequest("the request is not bound to its credentials; nothing was sent")
        return request, opened

    def _unseal(self, request: Request) -> Opened:
        if request.key_id not in self._boxes and self._clock() - self._looked >= RELOAD_S:
            self._load()
        box = self._boxes.get(request.key_id)
        if box is None:
            raise BadRequest("the credentials are sealed to a key that this worker does not have")
        try:
            content = msgspec.msgpack.decode(box.decrypt(request.sealed), type=_Box)
        except (CryptoError, msgspec.MsgspecError, ValueError) as e:
            raise BadRequest("the credentials cannot be opened") from e
        return Opened(Credentials(content.access_key, content.secret_key), content.mac_key, self.account(content))

    def account(self, content: Any) -> str:
        """The short keyed hash of a key pair. Both keys count: whoever knows an access key alone is not that account."""
        text = msgspec.msgpack.encode((content.access_key, content.secret_key))
        return blake2b(text, digest_size=8, key=self._account_key).hexdigest()
