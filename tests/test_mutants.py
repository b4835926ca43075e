"""The crash harness finds what it is there for: in a copy of the tree, one promise is broken by hand, and a case tells."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import Struct

from tests.mutated import mutated

pytestmark = pytest.mark.slow

CASES = 50


class Mutant(Struct, frozen=True):
    """text in file becomes other. kind: of what must be found first of all; tells: how its line says that it is this very mistake."""

    name: str
    file: str
    text: str
    other: str
    kind: str
    tells: str


MUTANTS = (
    Mutant(
        "dedup removed",
        "bus/journal.py",
        "after=FIRST, among=among, within_s=within_s",
        "within_s=within_s",
        "double",
        "orders for one: .*under one key",
    ),
    Mutant(
        "unknown told as failed",
        "bus/errors.py",
        'code, prefix = "outcome_unknown", "outcome unknown: "',
        'code, prefix = "outcome_unknown", "network: "',
        "lie",
        "the host was told 'network: .*look before you repeat it",
    ),
    Mutant(
        "settling off",
        "workers/__main__.py",
        "        await settler.before_serving()\n        await enter(running(settler.run()))\n",
        "",
        "unsettled",
        "an intent without an outcome",
    ),
)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_broken_promise_is_found(mutant: Mutant, tmp_path: Path) -> None:
    tree, env = mutated(tmp_path / "tree", mutant.file, mutant.text, mutant.other)
    command = [sys.executable, "-m", "tests.crashes", "--cases", str(CASES), "--stop-at-first", mutant.kind, "--clusters", "4"]
    run = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=170)
    ended = re.search(r"^cases (\d+), doubles \d+, lost \d+, lies \d+, unsettled \d+$", run.stdout, re.M)
    assert ended, run.stdout + run.stderr
    assert 0 < int(ended[1]) <= CASES
    assert re.search(f"^{mutant.kind.upper()} case .*{mutant.tells}", run.stdout, re.M), run.stdout
    assert run.returncode == 1
