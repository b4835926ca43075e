"""From a service path to an exchange: /okx, /okx/robot-7, and the names that users chose before ([routes])."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import unquote

from msgspec import Struct

from bus import subjects
from bus.errors import BadRequest, BusError, NoWorker

MOST, LONG = 10_000, 256
"""So many paths are remembered, each of at most so many signs."""


class Route(Struct, frozen=True):
    """exchange: of the subject. path: the whole path as the host wrote it, the exchange part in lower case; names the futures state.

    known: whether a worker or the configuration names the exchange; only then may it become a metric's label.
    """

    exchange: str
    path: str
    known: bool = True


class Routes:
    """configured: exchanges of [venues]; heard: what workers say they serve. A name is known when either knows it.

    settled: whether all workers had time to be heard. Until then a name that is not known is let through, and the bus tells whether
    somebody serves it: a bridge that was just started would refuse what it has not heard of yet.
    """

    def __init__(
        self,
        routes: Mapping[str, str],
        configured: Iterable[str],
        heard: Callable[[], set[str]],
        settled: Callable[[], bool] = lambda: True,
    ) -> None:
        self._routes = {name.lower(): exchange.lower() for name, exchange in routes.items()}
        self._configured = set(configured) | set(self._routes.values())
        self._heard = heard
        self._settled = settled
        self._found: dict[str, Route] = {}

    def find(self, raw_path: str) -> Route:
        """Raises BadRequest for a name nobody knows, with the nearest; NoWorker while no worker was ever heard."""
        found = self._found.get(raw_path)
        if found is None:
            found = self._find(raw_path)
            if found.known and len(raw_path) <= LONG:  # a name keeps its meaning from then on
                if len(self._found) >= MOST:
                    del self._found[next(iter(self._found))]
                self._found[raw_path] = found
        return found

    def _find(self, raw_path: str) -> Route:
        first, _, session = unquote(raw_path).strip("/").partition("/")
        name = first.lower()
        if name:
            subjects.name(name, "exchange")
        if session:
            subjects.name(session, "session")
        exchange = self._routes.get(name, name)
        known = exchange in self._heard() or exchange in self._configured
        if not known and (self._settled() or not exchange):
            raise self.unknown(name)
        return Route(exchange, f"{name or exchange}/{session}" if session else name or exchange, known)

    def unknown(self, name: str) -> BusError:
        """What to say about a name that nobody serves, the first part of a path."""
        heard = self._heard()
        if not heard:
            return NoWorker("no worker is running yet")
        names = heard | self._configured | set(self._routes)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(names - {''})[:20])}"
        return BadRequest(f"no exchange named {name!r} here; {hint}" if name else f"the address lacks the name of an exchange; {hint}")
