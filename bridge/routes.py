"""From a service path to an exchange: /okx, /okx/robot-7, and the names that users chose before ([routes])."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import unquote

from msgspec import Struct

from bus import subjects
from bus.errors import BadRequest, NoWorker


class Route(Struct, frozen=True):
    """exchange: of the subject. path: the whole path as the host wrote it, the exchange part in lower case; names the futures state."""

    exchange: str
    path: str


class Routes:
    """configured: exchanges of [venues]; heard: what workers say they serve. A name is known when either knows it."""

    def __init__(self, routes: Mapping[str, str], configured: Iterable[str], heard: Callable[[], set[str]]) -> None:
        self._routes = {name.lower(): exchange.lower() for name, exchange in routes.items()}
        self._configured = set(configured) | set(self._routes.values())
        self._heard = heard

    def find(self, raw_path: str) -> Route:
        """Raises BadRequest for a name nobody knows, with the nearest; NoWorker while no worker was ever heard."""
        first, _, session = unquote(raw_path).strip("/").partition("/")
        name = first.lower()
        if name:
            subjects.name(name, "exchange")
        if session:
            subjects.name(session, "session")
        exchange = self._routes.get(name, name)
        heard = self._heard()
        if exchange not in heard and exchange not in self._configured:
            known = heard | self._configured | set(self._routes)
            if not heard:
                raise NoWorker("no worker is running yet")
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(known - {''})[:20])}"
            raise BadRequest(f"no exchange named {name!r} here; {hint}" if name else f"the address lacks the name of an exchange; {hint}")
        return Route(exchange, f"{name or exchange}/{session}" if session else name or exchange)
