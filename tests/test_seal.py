"""Credentials sealed for the workers, requests bound to them: what was taken off the bus is worth nothing anywhere else."""

import stat
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec import Raw

from bus import seal
from bus.errors import BadRequest, Internal
from bus.messages import Request, encode_exact
from bus.seal import MAC_SIZE, Opener, Sealer, frame, new_keys

keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


class Clock:
    """Monotonic seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealing") / "keys"
    new_keys(folder)
    return folder


@pytest.fixture(scope="module")
def sealer(folder: Path) -> Sealer:
    return Sealer(folder)


@pytest.fixture(scope="module")
def opener(folder: Path) -> Opener:
    return Opener(folder)


def request(sealer: Sealer, access_key: str = "access", secret_key: str = "secret", **changes: Any) -> tuple[Request, bytes]:
    """-> (request, its MAC key)."""
    key_id, sealed, mac_key = sealer.box(access_key, secret_key)
    fields: dict[str, Any] = {
        "exchange": "okx",
        "path": "okx/r1",
        "method": "cancel",
        "params": Raw(b'{"id":"1"}'),
        "expires_at_ms": 1_800_000_000_000,
        "idempotency_key": "0" * 32,
        "key_id": key_id,
        "sealed": sealed,
    }
    return Request(**fields | changes), mac_key


def framed(sealer: Sealer, access_key: str = "access", secret_key: str = "secret", **changes: Any) -> bytes:
    sent, mac_key = request(sealer, access_key, secret_key, **changes)
    return frame(encode_exact(sent), mac_key)


@given(access_key=keys, secret_key=keys)
def test_keys_come_out_as_they_went_in(sealer: Sealer, opener: Opener, access_key: str, secret_key: str) -> None:
    sent, mac_key = request(sealer, access_key, secret_key)
    received, opened = opener.open(frame(encode_exact(sent), mac_key))
    assert (opened.credentials.access_key, opened.credentials.secret_key) == (access_key, secret_key)
    assert encode_exact(received) == encode_exact(sent)


# ---------------------------------------------------------------- a blob from the bus


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "okx/r2"},
        {"exchange": "paper"},
        {"method": "trade"},
        {"params": Raw(b'{"id":"2"}')},
        {"params": Raw(b'{"id": "1"}')},
        {"expires_at_ms": 1_800_000_000_001},
        {"idempotency_key": "1" * 32},
        {"trace": True},
    ],
    ids=str,
)
def test_a_box_attached_to_another_request_is_refused(sealer: Sealer, opener: Opener, changes: dict[str, Any]) -> None:
    seen, _ = request(sealer)
    opener.open(framed(sealer))  # the worker has opened this very box before
    forged = encode_exact(msgspec.structs.replace(seen, **changes))
    for mac in (framed(sealer)[:MAC_SIZE], b"\0" * MAC_SIZE, frame(forged, b"guess")[:MAC_SIZE]):
        with pytest.raises(BadRequest, match="not bound to its credentials; nothing was sent"):
            opener.open(mac + forged)


def test_a_request_of_another_account_gets_no_box_of_ours(sealer: Sealer, opener: Opener) -> None:
    mine, mac_key = request(sealer, "me", "my secret")
    theirs, _ = request(sealer, "them", "their secret")
    forged = encode_exact(msgspec.structs.replace(mine, sealed=theirs.sealed))
    with pytest.raises(BadRequest, match="not bound to its credentials"):
        opener.open(frame(forged, mac_key))


def test_a_box_of_a_strangers_making_opens_to_the_strangers_keys_only(folder: Path, sealer: Sealer, opener: Opener) -> None:
    """Who has the public key can seal keys of his own: that is what a bridge does, and it gives him nobody else's."""
    _, opened = opener.open(framed(Sealer(folder), "stranger", "strange"))
    assert opened.credentials.access_key == "stranger"
    assert opened.account != opener.open(framed(sealer, "access", "secret"))[1].account


@given(data=st.data())
def test_a_frame_with_any_byte_changed_is_refused(sealer: Sealer, opener: Opener, data: st.DataObject) -> None:
    good = framed(sealer)
    place = data.draw(st.integers(0, len(good) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != good[place]))
    with pytest.raises(BadRequest):
        opener.open(good[:place] + bytes([other]) + good[place + 1 :])


@given(data=st.data())
def test_a_truncated_or_longer_frame_is_refused(sealer: Sealer, opener: Opener, data: st.DataObject) -> None:
    good = framed(sealer)
    for bad in (good[: data.draw(st.integers(0, len(good) - 1))], good + data.draw(st.binary(min_size=1, max_size=9)), good[1:]):
        with pytest.raises(BadRequest):
            opener.open(bad)


@given(data=st.binary(max_size=300))
@example(b"\0" * MAC_SIZE + b"[" * 100_000)
@example(b"\0" * MAC_SIZE + b'{"exchange":"\xff"}')
def test_any_bytes_are_refused(opener: Opener, data: bytes) -> None:
    with pytest.raises(BadRequest):
        opener.open(data)


@given(sealed=st.binary(max_size=200), key_id=keys)
def test_any_box_is_refused(sealer: Sealer, opener: Opener, sealed: bytes, key_id: str) -> None:
    for known in (request(sealer)[0].key_id, key_id):
        with pytest.raises(BadRequest, match="credentials"):
            opener.open(framed(sealer, sealed=sealed, key_id=known))


# ---------------------------------------------------------------- rotation


def test_a_rotation_loses_no_request_and_is_noticed_by_both_ends(tmp_path: Path) -> None:
    clock = Clock()
    first = new_keys(tmp_path)
    sealer, opener = Sealer(tmp_path, clock), Opener(tmp_path, clock)
    before = framed(sealer)
    second = new_keys(tmp_path)
    assert second > first
    clock.now += seal.RELOAD_S
    after, _ = request(sealer)
    assert after.key_id == second
    assert opener.open(framed(sealer))[1].credentials.access_key == "access"
    assert opener.open(before)[0].key_id == first
    assert Opener(tmp_path).open(before)[0].key_id == first


def test_many_rotations_in_a_minute_lose_no_request(tmp_path: Path) -> None:
    new_keys(tmp_path)
    before = framed(Sealer(tmp_path))
    for _ in range(4):
        new_keys(tmp_path)
    assert Opener(tmp_path).open(before)


def test_a_rotation_on_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_keys(tmp_path)
    before = sorted(tmp_path.iterdir())

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        new_keys(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_second_rotation_retires_the_first_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    first = new_keys(tmp_path)
    sealer, opener = Sealer(tmp_path, clock), Opener(tmp_path, clock)
    before = framed(sealer)
    assert opener.open(before)
    new_keys(tmp_path)
    later = time.time_ns() + 61 * 10**9
    monkeypatch.setattr("time.time_ns", lambda: later)
    new_keys(tmp_path)
    assert not list(tmp_path.glob(f"{first}.*"))
    with pytest.raises(BadRequest, match="sealed to a key that this worker does not have"):
        Opener(tmp_path).open(before)
    clock.now += seal.RELOAD_S
    opener.open(framed(sealer))  # the running worker meets the new key
    with pytest.raises(BadRequest, match="sealed to a key that this worker does not have"):
        opener.open(before)


def test_unknown_keys_make_a_worker_look_at_its_folder_once_a_second(tmp_path: Path) -> None:
    clock = Clock()
    new_keys(tmp_path)
    sealer, opener = Sealer(tmp_path, clock), Opener(tmp_path, clock)
    new_keys(tmp_path)
    clock.now += seal.RELOAD_S - 0.01
    late = framed(Sealer(tmp_path))
    with pytest.raises(BadRequest, match="does not have"):
        opener.open(late)
    clock.now += 0.01
    assert opener.open(late)
    assert opener.open(framed(sealer))


def test_without_keys_both_ends_say_what_to_do(tmp_path: Path) -> None:
    for make in (Sealer, Opener):
        with pytest.raises(Internal, match="run `fmzbus keys new`"):
            make(tmp_path)


def test_secrets_are_for_their_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    key_id = new_keys(folder)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {f"{key_id}.secret": 0o600, f"{key_id}.public": 0o644, "account.key": 0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_bridge_needs_the_public_key_alone(tmp_path: Path, folder: Path, opener: Opener) -> None:
    for public in folder.glob("*.public"):
        (tmp_path / public.name).write_bytes(public.read_bytes())
    assert opener.open(framed(Sealer(tmp_path)))


# ---------------------------------------------------------------- what is shown


def test_nothing_that_holds_a_key_shows_it(sealer: Sealer, opener: Opener) -> None:
    access_key, secret_key = "distinctive-access", "distinctive-secret"
    sent, mac_key = request(sealer, access_key, secret_key)
    _, opened = opener.open(frame(encode_exact(sent), mac_key))
    shown = "".join(f"{thing!r} {thing!s}" for thing in (opened, opened.credentials, sent, sealer, opener))
    for secret in (access_key, secret_key, b64encode(access_key.encode()).decode()[:-3], repr(mac_key)[2:-1], mac_key.hex()):
        assert secret not in shown


def test_a_request_holds_no_key_in_the_clear(sealer: Sealer) -> None:
    data = framed(sealer, "distinctive-access", "distinctive-secret")
    assert b"distinctive" not in data
    assert b64encode(b"distinctive")[:12] not in data


@given(access_key=keys, secret_key=keys, other=keys)
def test_an_account_is_told_by_both_keys(opener: Opener, access_key: str, secret_key: str, other: str) -> None:
    account: Callable[[str, str], str] = lambda access, secret: opener.account(seal.Credentials(access, secret))  # noqa: E731
    assert account(access_key, secret_key) == account(access_key, secret_key)
    assert len(account(access_key, secret_key)) == 16
    if other != secret_key:
        assert account(access_key, secret_key) != account(access_key, other)
    if other != access_key:
        assert account(access_key, secret_key) != account(other, secret_key)
    if secret_key:
        assert account(access_key, secret_key) != account(access_key + secret_key, "")


def test_an_account_stays_the_same_over_rotations_and_restarts(tmp_path: Path) -> None:
    new_keys(tmp_path)
    before = Opener(tmp_path).open(framed(Sealer(tmp_path)))[1].account
    for _ in range(3):
        new_keys(tmp_path)
    assert Opener(tmp_path).open(framed(Sealer(tmp_path)))[1].account == before


def test_an_account_means_nothing_elsewhere(tmp_path: Path, opener: Opener) -> None:
    new_keys(tmp_path)
    credentials = seal.Credentials("access", "secret")
    assert Opener(tmp_path).account(credentials) != opener.account(credentials)


# ---------------------------------------------------------------- caches


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(used=st.lists(st.integers(0, 9), max_size=60))
def test_the_cache_forgets_what_was_used_longest_ago(monkeypatch: pytest.MonkeyPatch, used: list[int]) -> None:
    monkeypatch.setattr(seal, "CACHE", 4)
    recent: seal._Recent[int, int] = seal._Recent()
    order: list[int] = []
    for key in used:
        assert recent.find(key, lambda key=key: key * 2) == key * 2  # type: ignore[misc]
        order = [old for old in order if old != key] + [key]
        assert list(recent) == order[-4:]


def test_a_thousand_accounts_leave_a_bounded_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "CACHE", 50)
    sealer, opener = Sealer(folder), Opener(folder)
    for number in range(1000):
        opener.open(framed(sealer, f"key-{number}", "secret"))
    assert (len(sealer._boxes), len(opener._opened)) == (50, 50)


def test_a_refused_box_is_not_remembered(sealer: Sealer, folder: Path) -> None:
    opener = Opener(folder)
    for number in range(20):
        with pytest.raises(BadRequest):
            opener.open(framed(sealer, sealed=b"%d" % number))
    assert not opener._opened


def test_a_box_is_made_once_per_key_pair(sealer: Sealer) -> None:
    assert sealer.box("access", "secret") == sealer.box("access", "secret")
    assert sealer.box("access", "secret")[1] != sealer.box("access", "secret2")[1]


def test_a_key_made_after_the_clock_was_set_back_is_the_newest_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = new_keys(tmp_path)
    monkeypatch.setattr("time.time_ns", lambda: 1)
    second = new_keys(tmp_path)
    assert second > first
    assert Sealer(tmp_path).box("a", "b")[0] == second
