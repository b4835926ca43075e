"""Who may import whom, and what a module may look like (design.md 1 and 2 of the style guide), read from the source with `ast`."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("bus", "bridge", "workers")
FILES = sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = {name: ast.parse((ROOT / name).read_text(), name) for name in FILES}
MOST_LINES = 400

WEB = {"bridge/app.py", "bridge/push.py", "bus/admin.py"}
"""Besides these, bus/console/ and the paper exchange may serve HTTP."""
PAPER = "workers/venues/paper/"


def imported(tree: ast.Module) -> Iterator[str]:
    """Every module that is imported anywhere in the file, also inside functions: "aiohttp.web" for `from aiohttp import web`."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                assert level == 0, "imports are absolute here"
                yield str(module)
                yield from (f"{module}.{name.name}" for name in names)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield name


def imports(name: str, *modules: str) -> set[str]:
    """Which of these a file imports, or parts of them."""
    return {module for module in modules for found in imported(TREES[name]) if found == module or found.startswith(f"{module}.")}


@pytest.mark.parametrize("name", FILES)
def test_packages_keep_their_distance(name: str) -> None:
    forbidden = {"bus": ("bridge", "workers"), "bridge": ("workers",), "workers": ("bridge",)}
    assert not imports(name, *forbidden[name.partition("/")[0]], "tests")


def test_only_the_pool_knows_faststream() -> None:
    assert {name for name in FILES if imports(name, "faststream")} == {"workers/pool.py"}


def test_only_the_named_places_serve_http() -> None:
    serving = {name for name in FILES if imports(name, "aiohttp.web") and not name.startswith((PAPER, "bus/console/"))}
    assert serving <= WEB


def test_only_the_http_module_and_the_sockets_call_exchanges() -> None:
    calling = {name for name in FILES if imports(name, "aiohttp") and name.startswith("workers/") and not name.startswith(PAPER)}
    assert calling == {"workers/http.py", "workers/lines.py"}
    assert not imports("workers/venues/paper/client.py", "aiohttp", "http", "urllib.request")


def test_ccxt_is_not_there_yet() -> None:
    assert not [name for name in FILES if imports(name, "ccxt")]


def test_the_exchange_that_we_run_shares_no_code_with_its_client() -> None:
    server = [name for name in FILES if name.startswith(PAPER) and not name.endswith(("client.py", "feed.py", "__init__.py"))]
    assert server
    client = ("workers.venues.paper.client", "workers.venues.paper.feed", "workers.http", "workers.calls")
    assert not [name for name in server if imports(name, *client)]


def test_only_process_mains_and_configuration_read_the_environment() -> None:
    """lifecycle speaks systemd's protocol, up and terminal hand an environment on; none of them reads a setting."""
    reading = {
        name
        for name, tree in TREES.items()
        if any(isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") for node in ast.walk(tree))
    }
    assert {name for name in reading if not name.endswith("__main__.py")} <= {
        "bus/config.py",
        "bus/start.py",
        "bus/terminal.py",
        "bus/lifecycle.py",
        "bus/up.py",
    }


HOST_WORDS = {"secret_key", "__api_", "nonce"}
"""Words of the host's JSON that mean nothing elsewhere as a key of a mapping."""


def test_only_fmz_reads_the_hosts_json() -> None:
    """No other file of the request path takes a host's field out of a mapping; `fmzbus call`, which plays a host, writes them."""
    reading = set()
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            match node:
                case ast.Subscript(slice=ast.Constant(value=str(key)), ctx=ast.Load()):
                    pass
                case ast.Call(func=ast.Attribute(attr="get" | "pop"), args=[ast.Constant(value=str(key)), *_]):
                    pass
                case _:
                    continue
            if key in HOST_WORDS:
                reading.add(name)
    assert reading == {"bridge/fmz.py"}


def test_the_envelope_is_written_in_two_places() -> None:
    """b'{"data":' is the host's envelope: the bridge's, and that of the values that feeders tell; all others pass bytes on."""
    writing = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, bytes) and node.value.startswith(b'{"data"')
    }
    assert writing == {"bridge/fmz.py", "bus/market.py"}


@pytest.mark.parametrize("name", FILES)
def test_a_module_is_short_and_says_what_it_is(name: str) -> None:
    tree = TREES[name]
    assert len((ROOT / name).read_text().splitlines()) <= MOST_LINES
    assert ast.get_docstring(tree)
    assert Path(name).stem not in ("utils", "util", "helpers", "common", "misc")
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert not [node.name for node in classes if node.name.endswith(("Manager", "Helper", "Util", "Utils"))]


@pytest.mark.parametrize("name", FILES)
def test_no_background_work_without_an_owner(name: str) -> None:
    """A bare create_task as a statement is a task that nobody awaits."""
    bare = [
        node.lineno
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr in ("create_task", "ensure_future")
    ]
    assert not bare


ALONE = """
import subprocess, sys
for name in sys.argv[1:]:
    done = subprocess.run([sys.executable, "-W", "error", "-c", f"import {name}"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr}")
"""


@pytest.mark.slow
def test_every_module_imports_alone() -> None:
    """In a fresh interpreter each, two at a time: no module leans on another having been imported before it."""
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in FILES]
    running = [
        subprocess.Popen([sys.executable, "-c", ALONE, *half], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for half in (modules[::2], modules[1::2])
    ]
    complaints = [process.communicate(timeout=100)[1] for process in running]
    assert complaints == ["", ""]
