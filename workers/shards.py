"""Who feeds a shard: whoever beats. A feeder that hears no beat of a shard claims it with a higher epoch, and one that hears a higher
epoch than its own stops. Two at once do no harm: followers take the newest epoch alone. Pure; workers/desk.py has the beats."""

import random
from collections import Counter
from collections.abc import Callable

from msgspec import Struct

from bus.market import BEAT_OLD_S, BEAT_S, Beat

LISTEN_S = BEAT_S * 1.2
"""A feeder that has just begun listens for so long, before it takes a silent shard for one that nobody feeds."""
SPREAD_S = 0.2
"""Feeders that wait for the same shard do not all claim it at once."""
SPREAD = 10**6
"""Two claims of one millisecond have different epochs."""
CALM_S = 3.0
"""At least so long between claims of shards that another one feeds."""


class _Heard(Struct):
    """The newest beat of a shard. due_s: from when on nobody feeds it, unless another beat comes."""

    due_s: float
    feeder: str = ""
    epoch: int = 0


class Shards:
    """Of one exchange, as one feeder sees them. epochs: the shards that it feeds. now_ms: bus time; clock: monotonic."""

    def __init__(self, feeder: str, count: int, now_ms: Callable[[], int], clock: Callable[[], float]) -> None:
        self._feeder = feeder
        self._now_ms = now_ms
        self._clock = clock
        self._heard = {shard: _Heard(clock() + LISTEN_S + random.uniform(0, SPREAD_S)) for shard in range(count)}
        self._calm_s = clock() + CALM_S
        self.epochs: dict[int, int] = {}

    def hear(self, shard: int, beat: Beat) -> bool:
        """Take note of another feeder's beat. -> whether this one has lost the shard by it."""
        heard = self._heard.get(shard)
        if heard is None or beat.feeder == self._feeder or beat.epoch < max(heard.epoch, self.epochs.get(shard, 0)):
            return False
        silence_s = 0 if beat.leaving else BEAT_OLD_S
        self._heard[shard] = _Heard(self._clock() + silence_s + random.uniform(0, SPREAD_S), beat.feeder, beat.epoch)
        if beat.epoch == self.epochs.get(shard) and beat.feeder < self._feeder:
            return False
        return self.epochs.pop(shard, None) is not None

    def claims(self) -> list[int]:
        """The shards to take now: those that nobody feeds, and one of a feeder that has at least two more than this one."""
        now_s = self._clock()
        due = [shard for shard, heard in self._heard.items() if shard not in self.epochs and now_s >= heard.due_s]
        if not due and now_s >= self._calm_s:
            owners = Counter(heard.feeder for shard, heard in self._heard.items() if shard not in self.epochs and heard.feeder)
            most, count = owners.most_common(1)[0] if owners else ("", 0)
            if count >= len(self.epochs) + 2:
                due = [max(shard for shard, heard in self._heard.items() if heard.feeder == most and shard not in self.epochs)]
        for shard in due:
            self._calm_s = now_s + CALM_S
            self.epochs[shard] = max(self._heard[shard].epoch + 1, self._now_ms() * SPREAD + random.randrange(SPREAD))
        return due
