"""`fmzbus up`, `fmzbus bridge` and `fmzbus worker` as they are started: one of each, on which port, and never a process left behind."""

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bus import lifecycle, seal, server
from bus import up as ups
from bus.child import Child
from bus.config import Config, environment
from tests import servers
from tests.host import hosting
from tests.servers import COMMAND, eventually

pytestmark = pytest.mark.slow

WITH_LISTENER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execv(sys.argv[2], sys.argv[2:])
"""
"""What systemd does for a service with a socket unit (sd_listen_fds)."""


@contextmanager
def stranger(port: int = 0) -> Iterator[int]:
    """Another program that listens on a port; which one."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        yield listener.getsockname()[1]


async def ended(*command: str, **config: object) -> tuple[int, str]:
    """Run a command that ends by itself -> (exit status, all it printed)."""
    async with servers.running(*command, env=environment(**config)) as one:
        await asyncio.wait_for(one.process.wait(), 30)
        await one.stop()
        return one.process.returncode or 0, one.output


def up(state: Path, *options: str) -> tuple[str, ...]:
    return (COMMAND, "up", "--state", str(state), "--admin-port", "0", *options)


@pytest.mark.slow
async def test_a_state_folder_has_one_system_at_a_time(state: Path) -> None:
    async with servers.system(state, paper__enabled="false") as system, hosting(system.address) as host:
        status, said = await ended(*up(state, "--port", "0"))
        assert status == 1
        assert said == f"fmzbus: another `fmzbus up` runs on the state folder {state}; give this one --state DIR and --port N\n"
        assert (await host("bitgo", "order", symbol="BTC_USDT", id="x"))["error"].startswith("id: expected the whole number")
        assert {name for name, pid in system.pids.items() if not servers.alive(pid)} == set()


async def test_a_taken_port_is_named_with_the_way_out(state: Path) -> None:
    with stranger() as port:
        status, said = await ended(*up(state, "--port", str(port)))
    assert status == 1
    assert said == f"fmzbus: cannot listen on 127.0.0.1:{port} (Address already in use); choose another port with --port N\n"


async def test_a_taken_admin_port_is_named_with_the_way_out(state: Path) -> None:
    with stranger() as port:
        status, said = await ended(COMMAND, "up", "--state", str(state), "--port", "0", "--admin-port", str(port), paper__enabled="false")
    assert status == 1
    assert said == f"fmzbus: the admin port {port} is taken; choose another with --admin-port N, 0 for any\n"


@pytest.mark.slow
async def test_the_port_of_nats_is_kept_and_chosen_anew_when_a_stranger_has_it(state: Path) -> None:
    ports = []
    for _ in range(2):
        async with servers.system(state, paper__enabled="false"):
            ports.append(server.settings(state).port)
    assert ports[0] == ports[1]
    with stranger(ports[0]):
        async with servers.system(state, "--bench", paper__enabled="false") as system, hosting(system.address) as host:
            assert server.settings(state).port != ports[0]
            assert "data" in await host("null", "ticker", symbol="BTC_USDT")
            assert "another program has the port of nats-server: choosing a new one" in system.running.output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
async def test_no_child_survives_a_killed_supervisor(state: Path) -> None:
    async with servers.system(state, "--bench", "--bridges", "2") as system:
        children = system.pids
        assert sorted(children) == ["bridge-1", "bridge-2", "feeder-1", "nats", "paper", "worker-1", "worker-2"]
        system.running.send(signal.SIGKILL)
        await system.running.process.wait()
        await eventually(lambda: not any(servers.alive(pid) for pid in children.values()), 10)
    async with servers.system(state, "--bench") as system, hosting(system.address) as host:  # what it left behind is in nobody's way
        assert "data" in await host("null", "ticker", symbol="BTC_USDT")


@pytest.mark.slow
async def test_a_path_with_blanks_is_a_path(tmp_path: Path) -> None:
    state = tmp_path / "my state  folder"
    async with servers.system(state) as system, hosting(system.address) as host:
        assert "data" in await host("paper", "accounts")
        status, said = await ended(COMMAND, "status", "--state", str(state))
        assert status == 0
        assert system.address in said
    assert not (state / "up.json").exists()


@pytest.mark.slow
async def test_bridge_and_worker_run_alone_against_any_nats_server(tmp_path: Path) -> None:
    """As in a cluster: a server that is not ours, its url, and the sealing keys are all they need."""
    port = server.free_port()
    (tmp_path / "fmzbus.toml").write_text(f'[nats]\nurl = "nats://127.0.0.1:{port}"\n')
    config = ("--config", str(tmp_path / "fmzbus.toml"))
    nats = ("nats-server", "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(tmp_path / "store"))
    names = {"state": tmp_path / "s", "bridge__port": 0}
    seal.new_keys(tmp_path / "s" / "keys")
    path = os.environ["PATH"] + os.pathsep + str(Path(sys.executable).parent)
    async with (
        servers.running(*nats, env=os.environ | {"PATH": path}) as bus,
        servers.running(COMMAND, "worker", *config, "--exchanges", "bitgo", env=environment(**names)) as worker,
        servers.running(COMMAND, "bridge", *config, env=environment(**names)) as bridge,
    ):
        await bus.said("Server is ready")
        assert (await worker.said(r'"event":"ready","exchanges":(\[.*?\])'))[1] == '["bitgo"]'
        address = (await bridge.said(r'"event":"ready","address":"([^"]+)"'))[1]
        async with hosting(address) as host:
            reply = await host("bitgo", "order", symbol="BTC_USDT", id="x")
        assert reply == {"error": "id: expected the whole number that trade answered, got 'x'"}  # a worker's own words
        assert await bridge.stop() == 0
        assert await worker.stop() == 0


async def test_a_feeder_runs_alone_for_the_exchanges_it_is_told_to(state: Path) -> None:
    async with servers.system(state, "--feeders", "0", "--workers", "1") as system:
        assert not [name for name in system.pids if name.startswith("feeder")]
        paper = re.search(r"^paper +\d+ +(http://\S+) ", system.running.output, re.M)
        assert paper
        config = {"state": state, "venues__paper__base_url": paper[1]}
        async with servers.running(COMMAND, "feeder", "--exchanges", "Paper", env=environment(**config)) as feeder:
            assert (await feeder.said(r'"event":"ready","exchanges":(\[.*?\])'))[1] == '["paper"]'
            async with servers.watching(state) as heard:
                await eventually(lambda: [one.feeds["paper"].shards for one in heard.alive() if one.role == "feeder"] == [[0]])
            assert await feeder.stop() == 0
        status, said = await ended(COMMAND, "feeder", "--exchanges", "bitgo", **config)
        assert (status, "bitgo offers no socket" in said) == (1, True)


async def test_up_is_ready_without_any_market_data(state: Path) -> None:
    """The feeder's exchange has no socket that answers."""
    async with servers.system(state, venues__paper__ws_url="ws://127.0.0.1:1") as system, hosting(system.address) as host:
        assert re.search(r"^feeder-1 +\d+ +paper +127\.0\.0\.1:\d+ *$", system.running.output, re.M)
        assert "data" in await host("paper", "ticker", symbol="BTC_USDT")


hangup = pytest.mark.skipif(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="the tests run under nohup, which we respect")


@hangup
async def test_a_terminal_that_closes_drains_as_a_signal_to_stop_does(state: Path) -> None:
    async with servers.system(state, paper__enabled="false") as system:
        pids = system.pids
        assert await system.running.stop(signal.SIGHUP, within_s=20) == 0
    assert not any(servers.alive(pid) for pid in pids.values())
    seal.new_keys(state / "own" / "keys")
    async with servers.nats(state / "own"), servers.worker(state / "own") as worker:
        assert await worker.stop(signal.SIGHUP, within_s=10) == 0


async def test_up_goes_on_and_drains_when_nobody_reads_what_it_says(state: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    shown = tmp_path / "shown"
    with shown.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *up(state, "--port", "0", "--workers", "1"), env=environment(paper__enabled="false"), stdout=out, stderr=writer
        )
    os.close(reader)
    os.close(writer)
    try:
        await eventually(lambda: b"ready http" in shown.read_bytes(), 30)
        pids = {name: int(pid) for name, pid in re.findall(r"^(\S+) +(\d+) ", shown.read_text(), re.M)}
        os.kill(pids["worker-1"], signal.SIGKILL)
        async with servers.watching(state) as heard:
            await eventually(lambda: servers.pids_of(heard, "worker") - {pids["worker-1"]}, 20)
        assert process.returncode is None
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 30) == 0
    assert "Traceback" not in shown.read_text()


@pytest.mark.parametrize("role", ["bridge", "worker", "feeder"])
async def test_a_process_that_still_waits_for_the_bus_stops_when_told_to(role: str, state: Path) -> None:
    seal.new_keys(state / "keys")
    config = {"state": state, "nats__url": f"nats://127.0.0.1:{server.free_port()}", "bridge__port": 0}
    async with servers.running(COMMAND, role, env=environment(**config)) as one:
        await one.said("bus error")  # it has tried and goes on trying
        assert await one.stop(signal.SIGTERM, within_s=10) == 0


@pytest.mark.slow
async def test_a_system_that_does_not_get_ready_stops_when_told_to(state: Path) -> None:
    nobody = f"nats://127.0.0.1:{server.free_port()}"
    async with servers.running(*up(state, "--port", "0"), env=environment(nats__url=nobody, paper__enabled="false")) as one:
        logs = [state / "logs" / f"{name}.jsonl" for name in ("worker-1", "worker-2", "feeder-1", "bridge-1")]
        await eventually(lambda: all(path.exists() and "bus error" in path.read_text() for path in logs), 20)
        assert await one.stop(signal.SIGINT, within_s=10) == 0
        assert "did not stop" not in one.output


@pytest.mark.parametrize(
    ("command", "host"),
    [("bridge", "0.0.0.0"), ("bridge", "::"), ("bridge", "192.0.2.1"), ("bridge", "bridge.example"), ("up", "0.0.0.0")],  # noqa: S104
)
async def test_nothing_listens_beyond_this_machine_by_accident(command: str, host: str, state: Path) -> None:
    seal.new_keys(state / "keys")
    status, said = await ended(COMMAND, command, state=state, bridge__host=host, bridge__port=0)
    assert status == 1
    assert f"[bridge] host = {host!r} would listen beyond this machine" in said
    assert "expose_without_access_control = true" in said


@pytest.mark.slow
async def test_a_bridge_listens_beyond_this_machine_when_it_is_told_that_this_is_wanted(state: Path) -> None:
    async with servers.nats(state), servers.worker(state, bench="true"):
        exposed = servers.bridge(state, bridge__host="0.0.0.0", bridge__expose_without_access_control="true")  # noqa: S104
        async with exposed as (_, address), hosting(address.replace("0.0.0.0", "127.0.0.1")) as host:  # noqa: S104
            assert "data" in await host("null", "ticker", symbol="BTC_USDT")


@pytest.mark.slow
async def test_a_bridge_takes_the_socket_that_systemd_opened(state: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        env = servers.process_env(state, "bridge", bridge__port=1)  # not asked: the socket is there already
        command = (sys.executable, "-c", WITH_LISTENER, str(listener.fileno()), COMMAND, "bridge")
        async with servers.nats(state), servers.worker(state, bench="true"):
            for _ in range(2):  # a second one after a restart: whoever calls in between waits
                async with hosting(address) as host:
                    asking = asyncio.create_task(host("null", "ticker", symbol="BTC_USDT"))
                    async with servers.running(*command, env=env, pass_fds=(listener.fileno(),)) as bridge:
                        assert (await bridge.said(r'"event":"ready","address":"([^"]+)"'))[1] == address
                        assert "data" in await asking
                        assert await bridge.stop() == 0


@pytest.mark.slow
async def test_a_bridge_that_was_just_started_refuses_no_exchange_it_has_not_heard_of_yet(state: Path) -> None:
    async with servers.nats(state), servers.worker(state, bench="true") as worker:
        worker.send(signal.SIGSTOP)  # it serves, and is slow to say so
        try:
            async with servers.bridge(state) as (bridge, address), hosting(address) as host:
                admin = (await bridge.said(r'"admin":"([^"]+)"'))[1]
                asking = asyncio.create_task(host("null", "ticker", symbol="BTC_USDT"))
                await servers.shows(f"http://{admin}/metrics", r"^fmzbus_in_flight 1\.0$")
                worker.send(signal.SIGCONT)
                assert "data" in await asking
                nobody = await host("nul", "ticker", symbol="BTC_USDT")
                assert nobody["error"] in ("no exchange named 'nul' here; did you mean null?", "network: no worker is running yet")
        finally:
            worker.send(signal.SIGCONT)


async def test_a_socket_meant_for_another_process_is_left_alone(state: Path) -> None:
    env = {"LISTEN_FDS": "1", "LISTEN_PID": "1"}
    async with (
        servers.nats(state),
        servers.running(COMMAND, "bridge", env=servers.process_env(state, "bridge", bridge__port=0) | env) as bridge,
    ):
        address = (await bridge.said(r'"event":"ready","address":"([^"]+)"'))[1]
        async with hosting(address) as host:
            assert await host("null", "ticker", symbol="BTC_USDT") == {"error": "network: no worker is running yet"}


async def test_the_flag_allows_another_host(state: Path) -> None:
    options = ("--expose-without-access-control", "--workers", "1")
    async with servers.system(state, *options, bridge__host="0.0.0.0") as system:  # noqa: S104
        assert system.address.startswith("http://0.0.0.0:")
        async with hosting(system.address.replace("0.0.0.0", "127.0.0.1")) as host:  # noqa: S104
            assert "data" in await host("paper", "ticker", symbol="BTC_USDT")


# The supervisor by itself


class Supervised:
    """A supervisor without a system, and one child of it that sleeps. said: what it told the terminal."""

    def __init__(self, state: Path, code: str = "import time; time.sleep(60)") -> None:
        state.mkdir()
        self.said: list[str] = []
        config = Config(state=str(state))
        self.supervisor = ups.Supervisor(config, config_path=None, counts={}, admin_port=0, say=self.said.append)
        self.child = Child("nats", [sys.executable, "-c", code], dict(os.environ), state / "nats.out")
        self.supervisor.children.append(self.child)


async def test_a_child_that_cannot_be_started_is_tried_again(state: Path) -> None:
    one = Supervised(state)
    process = await one.child.start()
    good, one.child._command = one.child._command, ["/nowhere/nats-server"]
    keeping = asyncio.create_task(one.supervisor._keep(one.child, process))
    one.child.signal(signal.SIGKILL)
    await eventually(lambda: len(one.said) == 2)
    assert one.said[0] == f"nats ended (SIGKILL); restarting in 0.25 s; see {state / 'nats.log'}"
    assert re.match(r"nats cannot be started \(.*No such file.*\); restarting in 0.5 s", one.said[1])
    one.child._command = good
    await eventually(lambda: one.child.pid is not None)
    one.supervisor.stop()
    one.child.signal(signal.SIGTERM)
    await asyncio.wait_for(keeping, 10)


async def test_a_child_that_is_being_restarted_when_the_stop_comes_is_stopped_too(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Supervised(state)
    start = one.child.start
    process = await start()

    async def late() -> asyncio.subprocess.Process:
        process = await start()
        one.supervisor.stop()
        return process

    monkeypatch.setattr(one.child, "start", late)
    one.child.signal(signal.SIGKILL)
    await asyncio.wait_for(one.supervisor._keep(one.child, process), 10)
    assert one.child.pid is None


async def test_roles_stop_in_order_each_after_the_one_before_has_ended(state: Path) -> None:
    one = Supervised(state)
    one.supervisor.children.clear()
    ended = state / "ended"
    say = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(open(sys.argv[1], 'a').write(sys.argv[2]) * 0))"
    for name in ("nats", "paper", "worker-1", "worker-2", "feeder-1", "bridge-1"):
        code = f"{say}; print('up', flush=True); time.sleep(60)"
        child = Child(name, [sys.executable, "-c", code, str(ended), f"{name}\n"], dict(os.environ), state / f"{name}.out")
        one.supervisor.children.append(child)
        await child.start()
        await eventually(lambda output=child.output: output.exists() and output.read_text() == "up\n")  # type: ignore[misc]
    await one.supervisor._stop_all()
    bridge, *workers, feeder, paper, nats = ended.read_text().split()
    assert (bridge, sorted(workers), feeder, paper, nats) == ("bridge-1", ["worker-1", "worker-2"], "feeder-1", "paper", "nats")


async def test_nats_is_restarted_when_it_is_not_well_although_the_disk_takes_data(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Supervised(state)
    process = await one.child.start()
    full = True
    asked = 0

    def check_disk(_state: Path) -> None:
        nonlocal asked
        asked += 1
        if full:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(ups, "HEALTH_S", 0.02)
    monkeypatch.setattr(server, "ailment", lambda _state: "JetStream is not current")
    monkeypatch.setattr(server, "check_disk", check_disk)
    healing = asyncio.create_task(one.supervisor._heal(one.child))
    await eventually(lambda: asked > 3)
    assert (one.said, one.child.pid) == ([], process.pid)
    full = False
    assert await asyncio.wait_for(process.wait(), 10) == -signal.SIGTERM
    (line,) = one.said
    assert line.startswith("nats-server is not well (JetStream is not current), and its disk takes data: restarting it; see ")
    one.supervisor.stop()
    await asyncio.wait_for(healing, 10)


async def test_nats_server_says_itself_that_it_is_well(state: Path) -> None:
    async with servers.nats(state):
        assert await asyncio.to_thread(server.ailment, state) == ""
        server.check_disk(state)
    with pytest.raises(OSError, match="refused"):
        server.ailment(state)


async def test_last_words_are_those_of_this_run(state: Path) -> None:
    one = Supervised(state, "print('now')")
    one.child.output.write_text("an earlier run\n")
    await (await one.child.start()).wait()
    assert one.child.last_words() == "now"


async def test_what_a_killed_supervisor_left_behind_runs_no_more(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec("true")
    (tmp_path / "up.json").write_text(f'{{"pid":{process.pid},"address":"http://127.0.0.1:1","expected":{{"worker":2}}}}')
    await process.wait()
    assert (ups.running(tmp_path), ups.expected(tmp_path)) == (None, {})
    (tmp_path / "up.json").write_text(f'{{"pid":{os.getpid()},"address":"http://127.0.0.1:1","expected":{{"worker":2}}}}')
    assert ups.running(tmp_path) == ups.Running(os.getpid(), "http://127.0.0.1:1")
    assert ups.expected(tmp_path) == {"worker": 2}


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert ups.bracketed("::1", 6666) == "[::1]:6666"
    assert ups.bracketed("127.0.0.1", 6666) == "127.0.0.1:6666"


def test_a_single_failure_is_shown_without_the_groups_around_it(capsys: pytest.CaptureFixture[str]) -> None:
    async def serve(_stopping: lifecycle.Stopping) -> None:
        raise ExceptionGroup("tasks", [ExceptionGroup("inner", [OSError(98, "Address already in use")])])

    with pytest.raises(SystemExit, match=r"^OSError: \[Errno 98\] Address already in use$"):
        lifecycle.run(serve)
    capsys.readouterr()
