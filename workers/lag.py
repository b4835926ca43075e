"""How late a frame of an exchange is, told by its date and by nothing but durations on this process's clock. Pure.

The offset is how much this clock shows more than the exchange's at one moment; it is never known, but bounded. A frame that was dated
t and read at r was on its way for at least nothing: offset <= r - t. A REST answer that was asked for at s and dated t was dated after
that: offset >= s - t. What was dated t is then proven for t + the lower bound, and where nobody has asked by REST yet for t + the
least upper bound of the last minutes, which takes the quickest frame for one without any delay.
"""

from bus.market import NEVER

GENERATION_S = 60.0
"""Bounds hold for one to two of these: clocks drift, and are set."""
CALIBRATED_S = 600.0
"""So long after the last REST answer what such answers told still counts: a socket that is late must stay known as late."""
TICK_S = 0.001
"""The least difference of two dates: a REST answer may have been made this much later than it is dated."""
NONE = float("inf")


class Least:
    """The least of the values noted lately, infinite where there is none: of this generation and of the one before."""

    __slots__ = ("_before", "_began_s", "_now", "value")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.value = self._now = self._before = NONE
        self._began_s = NEVER

    def note(self, value: float, now_s: float) -> None:
        age_s = now_s - self._began_s
        if age_s >= GENERATION_S:
            self._before = self._now if age_s < 2 * GENERATION_S else NONE
            self._now, self._began_s = NONE, now_s
        self._now = min(self._now, value)
        self.value = min(self._now, self._before)


class Lag:
    """Of one exchange, all its sockets together. late_s: how late the newest frame was.

    time_ms is always the exchange's clock, the other times are monotonic ones of this process.
    """

    def __init__(self) -> None:
        self.late_s = 0.0
        self._most = Least()
        self._least = Least()
        """Of lower bounds with their sign turned: the least of those is the greatest bound."""
        self._calibrated_s = NEVER

    def proven_s(self, time_ms: int, received_s: float) -> float:
        """When that was true which a frame tells: not later than it really was, nor than received_s.

        Before the first calibrate() that holds but for the delay that even the quickest frame had.
        """
        behind_s = received_s - time_ms / 1000
        self._most.note(behind_s, received_s)
        offset_s = self._most.value
        if self.calibrated(received_s):
            offset_s = min(offset_s, -self._least.value)
        self.late_s = behind_s - offset_s
        return received_s - self.late_s

    def calibrated(self, now_s: float) -> bool:
        """Whether the exchange's clock is known: else even the quickest frame may have been late by any time."""
        return now_s - self._calibrated_s < CALIBRATED_S

    def calibrate(self, time_ms: int, sent_s: float, received_s: float) -> None:
        """Take a REST answer that carries the exchange's clock as it was when it answered: not that of what it tells, nor of a cache."""
        least_s, most_s = sent_s - time_ms / 1000 - TICK_S, received_s - time_ms / 1000
        if least_s > self._most.value:
            self._most.clear()  # the exchange's clock was set back: the frames before are of another clock
        if most_s < -self._least.value:
            self._least.clear()  # it was set forward
        self._most.note(most_s, received_s)
        self._least.note(-least_s, received_s)
        self._calibrated_s = received_s
