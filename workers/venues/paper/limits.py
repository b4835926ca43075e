"""How much a caller may ask for in a minute: weights counted per caller, then 429, then a ban. Pure; the time comes in as an argument."""

from dataclasses import dataclass, field

from workers.venues.paper.errors import Code, Refused

WINDOW_S = 60
BAN_S = 60
PATIENCE = 10
"""Requests a caller may go on with after its first 429 before it is banned."""


@dataclass(slots=True)
class Usage:
    weight: int = 0
    refused: int = 0


@dataclass(slots=True)
class Limiter:
    """Counts the weight of each caller in the current minute of the clock. Memory is bounded by the callers of one minute."""

    limit: int
    _minute: int = -1
    _usage: dict[str, Usage] = field(default_factory=dict)
    _banned_until: dict[str, float] = field(default_factory=dict)

    def used(self, caller: str) -> int:
        """The caller's weight in this minute, for the header Paper-Used-Weight."""
        usage = self._usage.get(caller)
        return usage.weight if usage else 0

    def charge(self, caller: str, weight: int, now_s: float) -> None:
        """Count a request. Raises Refused(TOO_MANY_REQUESTS | BANNED) with the seconds to wait; what is refused is not counted."""
        minute = int(now_s // WINDOW_S)
        if minute != self._minute:
            self._minute, self._usage = minute, {}
            self._banned_until = {who: until for who, until in self._banned_until.items() if until > now_s}
        if (until := self._banned_until.get(caller, 0)) > now_s:
            raise Refused(Code.BANNED, "banned for going on after too many requests", retry_after_s=int(until - now_s) + 1)
        usage = self._usage.setdefault(caller, Usage())
        if usage.weight + weight <= self.limit:
            usage.weight += weight
            return
        usage.refused += 1
        if usage.refused > PATIENCE:
            self._banned_until[caller] = now_s + BAN_S
            usage.refused = 0
            raise Refused(Code.BANNED, "banned for going on after too many requests", retry_after_s=BAN_S)
        wait_s = int((minute + 1) * WINDOW_S - now_s) + 1
        raise Refused(Code.TOO_MANY_REQUESTS, f"more than {self.limit} weight in a minute", retry_after_s=wait_s)
