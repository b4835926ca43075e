"""A copy of the tree with one text replaced, to show that a harness finds the mistake: no switch in the product does this."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = ("bus", "bridge", "workers", "tests")
WHERE = "import bus, bridge, workers, tests; print(*(one.__file__ for one in (bus, bridge, workers, tests)), sep='\\n')"


class Mutated(NamedTuple):
    """folder: where to run a command with the environment, so that it and its children import the copy."""

    folder: Path
    env: dict[str, str]


def mutated(tree: Path, file: str, text: str, other: str) -> Mutated:
    """Copy the tree to a new folder, where the text, which must be in the file exactly once, becomes the other one."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    changed = tree / file
    before = changed.read_text()
    assert before.count(text) == 1, f"{file} has changed: what is broken here must be said anew"
    changed.write_text(before.replace(text, other))
    env = os.environ | {"PYTHONPATH": str(tree)}
    imported = subprocess.run([sys.executable, "-c", WHERE], cwd=tree, env=env, capture_output=True, text=True, check=True).stdout
    assert imported.splitlines() == [str(tree / package / "__init__.py") for package in PACKAGES]
    return Mutated(tree, env)
