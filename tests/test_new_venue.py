"""`fmzbus new-venue` and `fmzbus check-venue` as a person types them, up to an order on the new exchange's own path."""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from bus import server
from bus.config import environment
from tests.host import hosting
from tests.servers import COMMAND, running
from workers.template.__main__ import HERE, Refused, class_name, write

pytestmark = pytest.mark.slow


async def typed(folder: Path, *command: str, **env: str) -> tuple[int, str]:
    """Run it in the folder -> (exit status, what it printed)."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, env=os.environ | env, stdout=PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode()


@pytest_asyncio.fixture(scope="module")
async def folder(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """Where somebody has typed `fmzbus new-venue demo`."""
    folder = tmp_path_factory.mktemp("mine")
    status, out = await typed(folder, COMMAND, "new-venue", "demo")
    assert (status, out.splitlines()[0]) == (
        0,
        "wrote demo.py and test_demo.py; they speak the paper exchange's API until you change them. Next:",
    )
    assert 'class = "demo:Demo"' in out
    yield folder


async def test_what_was_written_is_short_and_passes_its_checks_and_its_test(folder: Path) -> None:
    assert len((folder / "demo.py").read_text().splitlines()) < 120
    async with asyncio.TaskGroup() as group:
        checked = group.create_task(typed(folder, COMMAND, "check-venue", "demo"))
        tested = group.create_task(typed(folder, sys.executable, "-m", "pytest", "-q", "-p", "no:asyncio", "-W", "error", "test_demo.py"))
    status, out = checked.result()
    assert status == 0, out
    assert out.splitlines()[0] == "demo:Demo, against a paper exchange of its own"
    assert " s: 33 ok, 3 n/a" in out
    status, out = tested.result()
    assert status == 0, out
    assert "2 passed" in out


async def test_a_mistake_is_an_exit_status_and_json_for_programs(folder: Path) -> None:
    text = (folder / "demo.py").read_text()
    (folder / "broken.py").write_text(text.replace("sorted(bids, reverse=True)", "sorted(bids)"))
    status, out = await typed(folder, COMMAND, "check-venue", "broken.py", "--only", "ticker,depth", "--json")
    assert status == 1
    ticker, depth = msgspec.json.decode(out)["findings"]
    assert (ticker["verdict"], depth["verdict"], depth["look_at"].partition(" ")[2]) == ("ok", "fail", "Demo.depth")
    assert depth["seen"].startswith("bids do not descend: ")


async def test_a_stand_in_can_be_named_and_keys_come_from_the_environment(folder: Path) -> None:
    root = str(Path(__file__).parents[1])
    options = ("--exchange", "tests.test_check_venue:bitgo", "--symbol", "BTC_CNY", "--only", "ticker,accounts,refusals-keys")
    names = ("--access-key-env", "MY_ACCESS", "--secret-key-env", "MY_SECRET")
    env = {"PYTHONPATH": root, "MY_ACCESS": "bitgo-access", "MY_SECRET": "bitgo secret, with + and &"}
    status, out = await typed(folder, COMMAND, "check-venue", "bitgo", *options, *names, **env)
    assert status == 0, out
    assert "3 ok" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("check-venue",), "which venue? FILE or NAME is missing"),
        (("check-venue", "nobody"), "no venue of that name"),
        (("check-venue", "demo", "--only", "tickr"), "no check named tickr"),
        (("check-venue", "demo", "--access-key-env", "NOT_SET"), "NOT_SET: not set"),
        (("check-venue", "demo", "--base-url", "https://x", "--trade"), "--trade needs --amount"),
        (("check-venue", "demo", "--exempt", "ticker"), "expected NAME=REASON, got 'ticker'"),
        (("check-venue", "demo", "--amount", "nan"), "expected a number above 0"),
        (("check-venue", "demo", "--price", "-1"), "expected a number above 0"),
        (("check-venue", "demo", "--base-url", "example.com"), "expected http://host or https://host, got 'example.com'"),
        (("check-venue", "demo", "--base-url", "http://127.0.0.1:1"), "--base-url http://127.0.0.1:1 cannot be reached"),
        (("check-venue", "demo", "--exchange", "json:loads"), "--exchange json:loads: loads() raised TypeError"),
        (("check-venue", "demo", "--exchange", "json"), "--exchange json: AttributeError"),
        (("new-venue", "demo"), "demo.py is there already; nothing was written"),
        (("new-venue", "Not-A-Name"), "expected a lower-case Python identifier"),
        (("new-venue", "other", "--dir", "nowhere"), "nowhere: no such folder"),
    ],
)
async def test_a_mistake_on_the_command_line_is_said(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    status, out = await typed(folder, COMMAND, *arguments)
    assert status != 0
    assert said in out
    assert "Traceback" not in out


async def test_from_the_file_to_a_running_path(folder: Path) -> None:
    """The README's chapter, with ports of its own: [venues.demo] class = "demo:Demo" in fmzbus.toml, `fmzbus up`, an order."""
    port = server.free_port()
    text = f'[paper]\nport = {port}\n\n[venues.demo]\nclass = "demo:Demo"\nbase_url = "http://127.0.0.1:{port}"\n'
    await asyncio.to_thread((folder / "fmzbus.toml").write_text, text)
    command = f"cd '{folder}' && exec '{COMMAND}' up --port 0 --admin-port 0 --workers 1"
    async with running("sh", "-c", command, env=environment(state="s")) as up:
        address = (await up.said(r"(?m)^ready (http://\S+:\d+)/"))[1]
        async with hosting(address) as host:
            assert (await host("demo", "ticker", symbol="btc_usdt"))["data"]["buy"] > 0
            placed = (await host("demo", "trade", symbol="BTC_USDT", type="buy", price="1000", amount="0.01"))["data"]["id"]
            assert [row["id"] for row in (await host("demo", "orders", symbol="BTC_USDT"))["data"]] == [placed]
            assert await host("demo", "cancel", symbol="BTC_USDT", id=placed) == {"data": True}
            assert await host("demo", "cancel", symbol="BTC_USDT", id=placed) == {"error": "demo 2012 the order is cancelled"}


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["", "1st", "Demo", "my-exchange", "a b", "class", "match", "../x", "x" * 64, "键"])
def test_a_name_has_to_be_an_identifier(name: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="expected a lower-case Python identifier"):
        write(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "said"),
    [("paper", "there is a venue"), ("json", "Python has a module"), ("sys", "Python has a module"), ("bus", "Python has")],
)
def test_a_name_that_would_hide_something_is_refused(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=said):
        write(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", ["mine.py", "test_mine.py"])
def test_nothing_is_overwritten(there: str, tmp_path: Path) -> None:
    (tmp_path / there).write_text("precious")
    with pytest.raises(Refused, match=f"{there} is there already; nothing was written"):
        write("mine", tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(there, "precious")]


def test_the_files_carry_the_new_names(tmp_path: Path) -> None:
    venue, test = write("my_exchange", tmp_path)
    assert class_name("my_exchange") == "MyExchange"
    assert venue.read_text() == (HERE / "venue.py").read_text()
    assert "from my_exchange import MyExchange, sign\n" in test.read_text()
    assert "workers.template" not in venue.read_text() + test.read_text()
