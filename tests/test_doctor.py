"""`fmzbus doctor`: healthy on a healthy system, and each thing that is wrong is named with what to do about it."""

import asyncio
import os
from asyncio.subprocess import PIPE
from pathlib import Path

import msgspec
import pytest

from bus import doctor, seal
from bus.config import Config
from bus.doctor import Finding
from bus.fleet import Presence
from tests.servers import COMMAND, System


async def run_doctor(state: Path, *options: str) -> tuple[int, str]:
    env = os.environ | {"FMZBUS__STATE": str(state)}
    process = await asyncio.create_subprocess_exec(COMMAND, "doctor", *options, env=env, stdout=PIPE, stderr=PIPE)
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    return process.returncode, out.decode()


async def test_a_healthy_system_has_no_failure_and_times_every_hop(shared_system: System) -> None:
    status, out = await run_doctor(shared_system.state, "--json")
    findings = {finding.what.strip(): finding for finding in msgspec.json.decode(out, type=list[Finding])}
    assert status == 0, out
    assert {finding.what for finding in findings.values() if finding.level == "FAIL"} == set()
    for what in ("NATS", "JetStream", "bus time", "disk sync", "key files", "bridges", "workers", "one request", "in venue"):
        assert findings[what].level == "ok", findings[what]
    assert shared_system.address in findings["one request"].seen
    assert "@" not in findings["NATS"].seen


async def test_without_a_system_it_says_what_to_start(tmp_path: Path) -> None:
    status, out = await run_doctor(tmp_path / "nobody")
    assert status == 1
    assert "`fmzbus up` makes it" in out
    assert "NATS: does not answer" in out
    assert "-> start `fmzbus up`, or set [nats] url" in out


def test_a_key_that_others_can_read_is_named(tmp_path: Path) -> None:
    seal.new_keys(tmp_path / "keys")
    (secret,) = (tmp_path / "keys").glob("*.secret")
    assert doctor.worst(list(doctor.modes(tmp_path, tmp_path / "keys"))) == 0
    secret.chmod(0o644)
    (modes, _) = doctor.modes(tmp_path, tmp_path / "keys")
    assert (modes.level, modes.do) == ("FAIL", f"chmod 600 {secret}")


def test_a_missing_sealing_key_and_state_folder_are_warnings(tmp_path: Path) -> None:
    _, keys = doctor.modes(tmp_path, tmp_path / "keys")
    assert (keys.level, keys.do) == ("warn", "`fmzbus keys new` makes the first")
    last = list(doctor.machine(Config(state=str(tmp_path / "nowhere"))))[-1]
    assert (last.what, last.level) == ("state folder", "warn")


def test_a_disk_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = list(doctor.disk(tmp_path))
    assert [finding.what for finding in readings] == ["free disk", "disk sync"]
    monkeypatch.setattr(doctor, "SLOW_SYNC_MS", 0.0)
    assert list(doctor.disk(tmp_path))[1].level == "warn"
    assert list(doctor.disk(Path("/proc/self")))[-1].level == "FAIL"


def test_a_fleet_without_workers_fails_and_mixed_versions_warn() -> None:
    def one(role: str, version: str = "1", *, ready: bool = True) -> Presence:
        return Presence(process=f"{role}-x", role=role, host="h", pid=1, admin="a:1", version=version, ready=ready)

    levels = {finding.what: finding.level for finding in doctor.fleet_health([one("bridge"), one("worker", "2")])}
    assert levels == {"bridges": "ok", "workers": "ok", "versions alive": "warn"}
    levels = {finding.what: finding.level for finding in doctor.fleet_health([one("bridge"), one("worker", ready=False)])}
    assert levels == {"bridges": "ok", "workers": "FAIL", "versions alive": "ok"}
