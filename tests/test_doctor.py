"""`fmzbus doctor`: healthy on a healthy system, and each thing that is wrong is named with what to do about it."""

import asyncio
import os
import threading
import time
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from bus import doctor, seal, server
from bus.config import Bridge, Config, Paper
from bus.doctor import Finding
from bus.fleet import Presence
from tests.servers import COMMAND, System

pytestmark = pytest.mark.slow


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
    assert not (tmp_path / "nobody").exists()


def test_a_key_that_others_can_read_is_named(tmp_path: Path) -> None:
    seal.new_keys(tmp_path / "keys")
    (secret,) = (tmp_path / "keys").glob("*.secret")
    assert doctor.worst(list(doctor.modes(tmp_path, tmp_path / "keys"))) == 0
    secret.chmod(0o644)
    (modes, _) = doctor.modes(tmp_path, tmp_path / "keys")
    assert (modes.level, modes.do) == ("FAIL", f"chmod 600 {secret}")
    secret.chmod(0o600)
    token = tmp_path / "paper" / "control.json"
    token.parent.mkdir()
    token.touch(0o644)
    (modes, _) = doctor.modes(tmp_path, tmp_path / "keys")
    assert (modes.level, modes.do) == ("FAIL", f"chmod 600 {token}")


def test_a_missing_sealing_key_and_state_folder_are_warnings(tmp_path: Path) -> None:
    _, keys = doctor.modes(tmp_path, tmp_path / "keys")
    assert (keys.level, keys.do) == ("warn", "`fmzbus keys new` makes the first")
    findings = {finding.what: finding.level for finding in doctor.machine(Config(state=str(tmp_path / "nowhere")))}
    assert findings["state folder"] == "warn"
    assert not (tmp_path / "nowhere").exists()


def test_a_disk_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = list(doctor.disk(tmp_path))
    assert [finding.what for finding in readings] == ["free disk", "disk sync"]
    monkeypatch.setattr(doctor, "SLOW_SYNC_MS", 0.0)
    assert list(doctor.disk(tmp_path))[1].level == "warn"
    assert list(doctor.disk(Path("/proc/self")))[-1].level == "FAIL"


def test_a_fleet_without_workers_fails_and_mixed_versions_warn() -> None:
    def one(role: str, version: str = "1", *, ready: bool = True) -> Presence:
        return Presence(process=f"{role}-x", role=role, host="h", pid=1, admin="a:1", version=version, ready=ready)

    levels = {finding.what: finding.level for finding in doctor.fleet_health([one("bridge"), one("worker", "2")], {})}
    assert levels == {"bridges": "ok", "workers": "ok", "versions alive": "warn"}
    levels = {finding.what: finding.level for finding in doctor.fleet_health([one("bridge"), one("worker", ready=False)], {})}
    assert levels == {"bridges": "ok", "workers": "FAIL", "versions alive": "ok"}
    findings = {finding.what: finding for finding in doctor.fleet_health([one("bridge"), one("worker")], {"bridge": 1, "worker": 2})}
    assert (findings["bridges"].level, findings["workers"].level) == ("ok", "FAIL")
    assert findings["workers"].seen == "worker-x; 1 of 2 missing"
    assert "start a worker" in findings["workers"].do


@contextmanager
def answering(*replies: tuple[int, bytes, float]) -> Iterator[int]:
    """An HTTP server that gives these answers (status, body, seconds it takes) in turn; its port."""
    left = list(replies)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body, takes_s = left.pop(0)
            time.sleep(takes_s)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever).start()
        try:
            yield http.server_port
        finally:
            http.shutdown()


GOOD = (200, b'{"data":1}', 0.0)


@pytest.mark.parametrize(
    ("replies", "level", "seen"),
    [
        ([GOOD] * 5, "ok", "slowest"),
        ([GOOD, GOOD, (200, b'{"data":1}', 0.3), GOOD, GOOD], "warn", "slowest 3"),
        ([GOOD, (200, b'{"error":"network: one"}', 0.0)], "FAIL", "network: one"),  # a third request would have no answer
    ],
)
def test_one_bad_answer_of_five_is_not_hidden_by_the_last(
    monkeypatch: pytest.MonkeyPatch, replies: list[tuple[int, bytes, float]], level: str, seen: str
) -> None:
    monkeypatch.setattr(doctor, "SLOW_REQUEST_S", 0.25)
    worker = Presence(process="w", role="worker", host="h", pid=1, admin="127.0.0.1:1", version="1", serves=["paper"])
    with answering(*replies) as port:
        findings = {finding.what: finding for finding in doctor.hops(Config(), f"http://127.0.0.1:{port}", [worker])}
    assert findings["one request"].level == level
    assert seen in findings["one request"].seen


def test_a_taken_port_is_named_before_the_start(tmp_path: Path) -> None:
    # Below the ports that the system gives to outgoing connections, where another process could have one the next moment.
    free = (port for port in range(21_000, 32_000) if server.is_free(port))
    kept = server.Settings(next(free), next(free), {})
    (tmp_path / "nats").mkdir()
    (tmp_path / "nats" / "settings.json").write_bytes(msgspec.json.encode(kept))
    with answering() as port:
        config = Config(state=str(tmp_path), bridge=Bridge(port=port), paper=Paper(port=port))
        findings = {finding.what: finding for finding in doctor.ports(config)}
    assert (findings["bridge port"].level, findings["paper port"].level) == ("warn", "warn")
    assert findings["bridge port"].seen == f"{port} is taken"
    assert "--port N" in findings["bridge port"].do
    assert findings["nats-server port"] == doctor.ok("nats-server port", f"{kept.monitor_port} is free")


def test_a_nats_server_that_is_not_well_fails(tmp_path: Path) -> None:
    with answering((503, b'{"status":"unavailable","error":"JetStream is not current"}', 0.0)) as port:
        config = Config(state=str(tmp_path), paper=Paper(enabled=False))
        (tmp_path / "nats").mkdir()
        (tmp_path / "nats" / "settings.json").write_bytes(msgspec.json.encode(server.Settings(1, port, {})))
        (finding,) = doctor.parts(config)
        assert (finding.level, finding.seen) == ("FAIL", "JetStream is not current")
    (finding,) = doctor.parts(config)
    assert finding.level == "FAIL"
    assert "does not answer" in finding.seen
