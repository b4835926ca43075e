"""`python -m tests.freshness.shifted SECONDS MODULE`: run a process whose clocks, all of them, are that far from this machine's.

As on another machine: nothing in the process reads the true time. A monotonic clock begins anywhere, so a difference of two machines'
means nothing; here it means SECONDS too much.
"""

import runpy
import sys
import time
from collections.abc import Callable


def _shift(clock: Callable[[], float], seconds: float) -> Callable[[], float]:
    return lambda: clock() + seconds


def _shift_ns(clock: Callable[[], int], seconds: float) -> Callable[[], int]:
    return lambda: clock() + int(seconds * 1e9)


def main() -> None:
    seconds, module = float(sys.argv[1]), sys.argv[2]
    for name in ("time", "monotonic", "perf_counter"):
        setattr(time, name, _shift(getattr(time, name), seconds))
        setattr(time, f"{name}_ns", _shift_ns(getattr(time, f"{name}_ns"), seconds))
    true_clock = time.clock_gettime
    time.clock_gettime = lambda number: true_clock(number) + seconds
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
