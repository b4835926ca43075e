"""The paper exchange's control API: who may order faults, what it says of mistakes, and the tables it shows."""

import json
import math
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from bus.paper import PaperError, _check, span_s
from tests.paper import README
from tests.rig import Rig, rigged, send
from workers.venues.paper.faults import KINDS

pytestmark = pytest.mark.slow


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rigged(tmp_path / "paper") as made:
        yield made


# Who may order it


async def test_the_control_api_wants_its_token(rig: Rig) -> None:
    where = json.loads((rig.state / "control.json").read_bytes())
    assert (rig.state / "control.json").stat().st_mode & 0o777 == 0o600
    assert (where["pid"], len(where["token"]) >= 40) == (os.getpid(), True)
    good = f"Bearer {where['token']}"
    for wrong in (
        {},
        {"Authorization": ""},
        {"Authorization": good[:-1]},
        {"Authorization": where["token"]},
        {"Authorization": "Bearer é"},
    ):
        for verb, target in (("GET", "/faults"), ("POST", "/faults"), ("DELETE", "/faults"), ("GET", "/ledger"), ("GET", "/nowhere")):
            answer = await send(where["port"], verb, target, b'{"kind":"drop"}', wrong)
            assert (answer.status, answer.json) == (401, {"error": "the token is missing or wrong; it is in control.json"})
    assert await rig.armed() == []
    assert (await rig.control("GET", "/nowhere")).status == 404
    assert (await rig.control("PUT", "/faults")).status == 405
    for query in ("since_ms=soon", "since_ms=99999999999999999999", "last_s=inf", "last_s=nan", "last_s=-1", "limit=0", "nonsense=1"):
        assert (await rig.control("GET", "/ledger?" + query)).status == 400, query
    assert (await rig.control("POST", "/schedule", b"\xff")).json == {"error": "not TOML: expected UTF-8"}


async def test_the_exchanges_own_port_has_no_control_api(rig: Rig) -> None:
    where = json.loads((rig.state / "control.json").read_bytes())
    answer = await send(int(rig.client.base.rpartition(":")[2]), "GET", "/faults", b"", {"Authorization": f"Bearer {where['token']}"})
    assert (answer.status, answer.json["code"]) == (401, 1001)


async def test_each_start_has_a_token_of_its_own_and_takes_the_file_away(tmp_path: Path) -> None:
    tokens = set()
    for _ in range(2):
        async with rigged(tmp_path):
            tokens.add(json.loads((tmp_path / "control.json").read_bytes())["token"])
        assert not (tmp_path / "control.json").exists()
    assert len(tokens) == 2


async def test_kinds_are_listed_and_the_readme_has_the_same_table(rig: Rig) -> None:
    listed = (await rig.control("GET", "/kinds")).json
    assert {row["kind"]: row["takes"] for row in listed} == {name: msgspec.to_builtins(kind.takes) for name, kind in KINDS.items()}
    text = README.read_text()
    for name, kind in KINDS.items():
        takes = ", ".join(
            f"`{parameter}` {str(default).lower() if isinstance(default, bool) else f'{default:g}'}"
            for parameter, default in kind.takes.items()
        )
        assert f"| `{name}` | {kind.does} | {takes or '-'} |" in text, name


# Mistakes


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no [[fault]] table in it"),
        ("[[fault]", "not TOML: "),
        ("[[fault]]\nat_s = 1", "fault 1: Object missing required field `kind`"),
        ('[[fault]]\nkind = "drop"\n[[fault]]\nkind = "dorp"', "fault 2: kind: no fault is called 'dorp'; there are: latency, "),
        ('[[fault]]\nkind = "drop"\nat_s = -1', "fault 1: Expected `float` >= 0.0 - at `$.at_s`"),
        ('[[fault]]\nkind = "drop"\nseconds = 1', "fault 1: seconds: drop does not take it; its parameters are: none"),
        ('[[fault]]\nkind = "drop"\nfors = 1', "fault 1: Object contains unknown field `fors`"),
        ('[[fault]]\nkind = "stall"\nseconds = nan', "fault 1: Expected `float` >= -86400.0 - at `$.seconds`"),
        ('[[fault]]\nkind = "drop"\nfor_s = inf', "fault 1: Expected `float` <= 31536000.0 - at `$.for_s`"),
        ("fault = 3", "no [[fault]] table in it"),
        ('[faults]\nkind = "drop"', "faults: a schedule has [[fault]] tables only"),
    ],
)
async def test_a_mistake_in_a_schedule_is_named_and_nothing_is_armed(rig: Rig, text: str, told: str) -> None:
    answer = await rig.control("POST", "/schedule", text.encode())
    assert answer.status == 400
    assert answer.json["error"].startswith(told)
    assert await rig.armed() == []


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"kind": "latency", "seconds": -1}, "seconds: expected 0 or more, got -1"),
        ({"kind": "latency", "count": 0}, "Expected `int` >= 1 - at `$.count`"),
        ({"kind": "drop", "probability": 1.5}, "Expected `float` <= 1.0 - at `$.probability`"),
        ({"kind": "execute-then-drop", "executed": False}, "executed: execute-then-drop does not take it"),
        ({"kind": "drop", "when": 3}, "Object contains unknown field `when`"),
        ([], "Expected `object`, got `array`"),
    ],
)
async def test_a_fault_that_makes_no_sense_is_refused(rig: Rig, asked: object, told: str) -> None:
    answer = await rig.control("POST", "/faults", json.dumps(asked).encode())
    assert answer.status == 400
    assert told in answer.json["error"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_command_takes_finite_numbers_only(value: float) -> None:
    with pytest.raises(PaperError, match=r"--seconds: expected a finite number"):
        _check("latency", {"seconds": value}, clear=False, schedule=None)
    with pytest.raises(PaperError, match="is no span of time"):
        span_s("9" * 400)
