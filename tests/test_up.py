"""`fmzbus up`, `fmzbus bridge` and `fmzbus worker` as they are started: one of each, on which port, and never a process left behind."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bus import seal, server
from bus.config import environment
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
        assert len(children) == 6
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


@pytest.mark.parametrize("role", ["bridge", "worker"])
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
        logs = [state / "logs" / f"{name}.jsonl" for name in ("worker-1", "worker-2", "bridge-1")]
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
