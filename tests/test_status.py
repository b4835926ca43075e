"""bus/status.py, and what the doctor says of feeders: who feeds what, how much of it can be proven, and what a missing feeder means."""

from bus import doctor, status
from bus.fleet import Feed, Presence


def one(role: str, process: str, *, ready: bool = True, feeds: dict[str, Feed] | None = None, **fields: object) -> Presence:
    return Presence(process=process, role=role, host="h", pid=1, admin="a:1", version="1", ready=ready, feeds=feeds or {}, **fields)  # type: ignore[arg-type]


FIRST = one(
    "feeder",
    "feeder-1",
    feeds={
        "paper": Feed(kinds=["depth", "ticker"], shards=[0, 2], symbols=40, waiting=3, refused=0, provable=5),
        "okx": Feed(kinds=["ticker"], shards=[], symbols=9, provable=5),
    },
)
SECOND = one(
    "feeder", "feeder-2", feeds={"paper": Feed(kinds=["depth", "ticker"], shards=[1], symbols=2, waiting=1, refused=7, provable=5)}
)


def test_each_process_says_what_it_serves() -> None:
    assert status.serves(one("bridge", "b", address="http://127.0.0.1:6666")) == "http://127.0.0.1:6666"
    assert status.serves(one("worker", "w", serves=["okx", "paper"])) == "okx, paper"
    assert status.serves(FIRST) == "okx stands by, paper 0 2"
    assert status.serves(one("feeder", "f")) == ""


def test_a_row_an_exchange_adds_up_what_its_feeders_feed() -> None:
    assert list(status.feeds([FIRST, SECOND, one("worker", "w", serves=["paper"])])) == [
        ("okx", "ticker", "nobody yet", "0", "0", "0", "0 quiet ones"),
        ("paper", "depth ticker", "feeder-1, feeder-2", "42", "4", "7", "10 quiet ones"),
    ]
    assert list(status.feeds([one("worker", "w", serves=["paper"])])) == []


def test_a_missing_feeder_is_a_warning_for_workers_answer() -> None:
    worker = one("worker", "w")
    feeders, refused = doctor.feeding([worker], {})
    assert (feeders.level, feeders.seen) == ("warn", "none; 1 of 1 missing")
    assert "start a feeder" in feeders.do
    assert (refused.level, refused.seen) == ("ok", "none")
    feeders, _ = doctor.feeding([worker], {"feeder": 0})
    assert (feeders.level, feeders.seen) == ("ok", "none")
    feeders, _ = doctor.feeding([FIRST, one("feeder", "feeder-3", ready=False)], {"feeder": 2})
    assert (feeders.level, feeders.seen) == ("warn", "feeder-1, feeder-3 (not ready); 1 of 2 missing")
    assert doctor.worst(list(doctor.feeding([worker], {}))) == 0


def test_refused_wishes_are_named_with_the_way_out() -> None:
    feeders, refused = doctor.feeding([FIRST, SECOND], {"feeder": 2})
    assert (feeders.level, feeders.seen) == ("ok", "feeder-1, feeder-2")
    assert (refused.level, refused.seen) == ("warn", "paper by feeder-2: 7")
    assert refused.do == "workers answer those: raise [market] max_symbols"
