"""The crash harness finds what it is there for: in a copy of the tree, one promise is broken by hand, and a case tells.

No switch in the product does this; the copy's files are changed, and the text that is replaced must be there exactly once.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import Struct

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = ("bus", "bridge", "workers", "tests")
CASES = 50
WHERE = "import bus, bridge, workers, tests; print(*(one.__file__ for one in (bus, bridge, workers, tests)), sep='\\n')"


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
    tree = tmp_path / "tree"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    changed = tree / mutant.file
    before = changed.read_text()
    assert before.count(mutant.text) == 1, f"{mutant.file} has changed: what is broken here must be said anew"
    changed.write_text(before.replace(mutant.text, mutant.other))
    env = os.environ | {"PYTHONPATH": str(tree)}
    imported = subprocess.run([sys.executable, "-c", WHERE], cwd=tree, env=env, capture_output=True, text=True, check=True).stdout
    assert imported.splitlines() == [str(tree / package / "__init__.py") for package in PACKAGES]
    command = [sys.executable, "-m", "tests.crashes", "--cases", str(CASES), "--stop-at-first", mutant.kind, "--clusters", "4"]
    run = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=170)
    ended = re.search(r"^cases (\d+), doubles \d+, lost \d+, lies \d+, unsettled \d+$", run.stdout, re.M)
    assert ended, run.stdout + run.stderr
    assert 0 < int(ended[1]) <= CASES
    assert re.search(f"^{mutant.kind.upper()} case .*{mutant.tells}", run.stdout, re.M), run.stdout
    assert run.returncode == 1
