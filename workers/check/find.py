"""From what a person types to a venue's class."""

import contextlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from bus.config import ConfigError, load
from workers.venues import VENUES


class NotFound(Exception):
    """There is no such venue; the text says what was looked for."""


def venue_class(target: str) -> type[Any]:
    """The class behind demo.py, demo.py:Class, module:Class, demo (demo.py here, [venues.demo] of fmzbus.toml, or a name fmzbus knows).

    Raises NotFound, also for a file that cannot be imported.
    """
    file, _, name = target.partition(":")
    if file.endswith(".py") or (not name and Path(f"{file}.py").is_file()):
        path = Path(file if file.endswith(".py") else f"{file}.py")
        if not path.is_file():
            raise NotFound(f"{path}: no such file")
        return _chosen(_module(path), name, target)
    if not name:
        named = {point.name: point.value for point in metadata.entry_points(group="fmzbus.venues")} | VENUES | _configured()
        if file not in named:
            raise NotFound(f"{target}: no file {file}.py here, and no venue of that name; there are {', '.join(sorted(named))}")
        file, _, name = named[file].partition(":")
    try:
        if importlib.util.find_spec(file) is None:
            raise NotFound(f"{target}: there is no module {file}")
    except (ImportError, ValueError) as e:
        raise NotFound(f"{target}: {e}") from e
    with _said(file):
        module = importlib.import_module(file)
    return _chosen(module, name, target)


def _configured() -> dict[str, str]:
    """Classes of [venues.NAME] in the fmzbus.toml of this folder."""
    path = Path("fmzbus.toml")
    try:
        venues = load(path, {}).venues if path.is_file() else {}
    except ConfigError as e:
        raise NotFound(str(e)) from e
    return {
        name: settings.cls or VENUES.get(settings.exchange, "") for name, settings in venues.items() if settings.cls or settings.exchange
    }


def _module(path: Path) -> ModuleType:
    """The file as a module; what lies beside it can be imported by it."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None or spec.loader is None:
        raise NotFound(f"{path}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    with _said(path.stem):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _said(name: str) -> Iterator[None]:
    """Make one line of whatever a file does at import. Raises NotFound."""
    try:
        yield
    except SyntaxError as e:
        raise NotFound(f"{Path(e.filename or name).name}:{e.lineno}: {type(e).__name__}: {e.msg}") from e
    except (Exception, SystemExit) as e:
        frames = [frame for frame in traceback.extract_tb(e.__traceback__) if not frame.filename.startswith("<frozen ")][1:]
        own = [frame for frame in frames if Path(frame.filename).stem == name.rpartition(".")[2]] or frames
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}: " if own else ""
        raise NotFound(f"{where}{type(e).__name__}: {' '.join(str(e).split())}") from e


def _chosen(module: ModuleType, name: str, target: str) -> type[Any]:
    if name:
        found = getattr(module, name, None)
        if not inspect.isclass(found):
            raise NotFound(f"{target}: there is no class {name} in {module.__name__}")
        return found
    candidates: list[type[Any]] = [
        one for one in vars(module).values() if inspect.isclass(one) and one.__module__ == module.__name__ and hasattr(one, "ticker")
    ]
    if len(candidates) != 1:
        names = ", ".join(one.__name__ for one in candidates) or "none"
        raise NotFound(f"{target}: expected one class with a ticker(), found {names}; say {target}:Class")
    return candidates[0]
