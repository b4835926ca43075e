"""What a feeder is wished to feed: by followers, who say so every few seconds, and by plain NATS or MQTT listeners. Pure."""

from collections import OrderedDict
from collections.abc import Iterable

from bus.market import WISHES_GONE_S, Wish

Pair = tuple[str, str]
"""(kind, symbol), in the host's spelling."""
REFUSED_S = 60.0
"""What cannot be fed is not tried again for so long."""


class Wishes:
    """Of one exchange. most: pairs that are fed at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._pairs: dict[Pair, dict[str, float]] = {}
        self._barred: dict[Pair, float] = {}
        self._refused: dict[Pair, float] = {}
        self._doubtful: dict[Pair, dict[str, float]] = {}
        self._found: OrderedDict[Pair, None] = OrderedDict()

    def hear(self, wish: Wish, now_s: float) -> int:
        """Take a wish; one that is whole ends what its follower wished before. -> how many pairs were refused that were not before."""
        before = self.refused(now_s)
        if wish.whole:
            kept = {*wish.keys, *wish.unproven}
            for pair, followers in list(self._pairs.items()):
                if pair not in kept:
                    self._end(pair, followers, wish.follower)
            self._doubtful = {
                pair: {one: heard_s for one, heard_s in ones.items() if one != wish.follower and heard_s >= now_s - WISHES_GONE_S}
                for pair, ones in self._doubtful.items()
            }
            self._doubtful = {pair: ones for pair, ones in self._doubtful.items() if ones}
        for pair in wish.unproven:
            if not self.exists(pair) and (pair in self._doubtful or len(self._doubtful) < self._most):
                self._doubtful.setdefault(pair, {})[wish.follower] = now_s
        for pair in (*wish.keys, *filter(self.exists, wish.unproven)):
            if pair in self._pairs:
                self._pairs[pair][wish.follower] = now_s
            elif self.barred(pair, now_s):
                continue
            elif len(self._pairs) < self._most:
                self._pairs[pair] = {wish.follower: now_s}
                self._refused.pop(pair, None)
            elif len(self._refused) < self._most or pair in self._refused:
                self._refused[pair] = now_s
        return max(0, len(self._refused) - before)

    def refused(self, now_s: float) -> int:
        """How many pairs are wished beyond the limit; no more are counted than are fed."""
        self._refused = {pair: heard_s for pair, heard_s in self._refused.items() if heard_s >= now_s - WISHES_GONE_S}
        return len(self._refused)

    def exists(self, pair: Pair) -> bool:
        """Whether its market is known to exist."""
        return pair in self._pairs or pair in self._found

    @property
    def doubtful(self) -> list[Pair]:
        """What is wished of markets of which nobody knows whether they exist."""
        return list(self._doubtful)

    def unknown(self, pairs: Iterable[Pair], now_s: float) -> list[Pair]:
        """Those of which nobody knows yet whether their market exists."""
        return [pair for pair in pairs if not self.exists(pair) and not self.barred(pair, now_s)]

    def found(self, pair: Pair, now_s: float) -> None:
        """The market of a pair exists: whoever wishes it is heard."""
        self._found[pair] = None
        while len(self._found) > self._most:
            self._found.popitem(last=False)
        for follower in self._doubtful.pop(pair, ()):
            self.hear(Wish(follower=follower, keys=[pair]), now_s)

    def bar(self, pair: Pair, now_s: float) -> None:
        """End a pair that cannot be fed, for a while."""
        for known in (self._pairs, self._found, self._doubtful):
            known.pop(pair, None)
        if len(self._barred) >= self._most:  # anybody who may listen can name what does not exist
            self._barred.clear()
        self._barred[pair] = now_s + REFUSED_S

    def barred(self, pair: Pair, now_s: float) -> bool:
        if self._barred.get(pair, now_s) <= now_s:
            self._barred.pop(pair, None)
            return False
        return True

    def wanted(self, now_s: float) -> set[Pair]:
        """All that is wished, without what only dead followers wished."""
        for pair, followers in list(self._pairs.items()):
            for follower, heard_s in list(followers.items()):
                if heard_s < now_s - WISHES_GONE_S:
                    self._end(pair, followers, follower)
        return set(self._pairs)

    def _end(self, pair: Pair, followers: dict[str, float], follower: str) -> None:
        followers.pop(follower, None)
        if not followers:
            del self._pairs[pair]
