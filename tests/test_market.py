"""bus/market.py: what may be told as fresh, and what beats, values and withdrawals do to it. All pure: clocks are numbers."""

from dataclasses import dataclass, replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import market, subjects
from bus.errors import BadRequest
from bus.market import BEAT_OLD_S, NEVER, SILENT_S, WITHDRAWN, Beat, Entry, Listed, Proof, Shard, fresh

NOW_S = 1000.0
MAX_AGE_S = 5.0
KEY = "ticker.BTC_USDT"
VALUE = market.reply(b"1")


# ---------------------------------------------------------------- the freshness rule


@dataclass(frozen=True)
class Case:
    """What decides. Ages are s before now; None where nothing is known: no listing in the beats, no proof by the value itself."""

    withdrawn: bool = False
    entry_epoch: int = 7
    entry_n: int = 3
    entry_age_s: float | None = None
    shard: bool = True
    shard_epoch: int = 7
    complete: bool = True
    beat_age_s: float = 0.3
    listed_n: int | None = 3
    listed_age_s: float = 0.5

    def verdict(self) -> bool:
        entry = Entry("paper", "ticker", "BTC_USDT", NOW_S, MAX_AGE_S)
        entry.content, entry.epoch, entry.n, entry.withdrawn = VALUE, self.entry_epoch, self.entry_n, self.withdrawn
        entry.proven_s = NEVER if self.entry_age_s is None else NOW_S - self.entry_age_s
        if self.shard:
            shard = entry.shard = Shard()
            shard.epoch, shard.complete, shard.beat_s = self.shard_epoch, self.complete, NOW_S - self.beat_age_s
            if self.listed_n is not None:
                shard.listed[KEY] = Listed(self.listed_n, NOW_S - self.listed_age_s)
        return fresh(entry, NOW_S)


GOOD = Case()
NO_LISTING = replace(GOOD, listed_n=None)


@pytest.mark.parametrize(
    ("case", "verdict"),
    [
        pytest.param(GOOD, True, id="all is well"),
        pytest.param(replace(GOOD, shard=False), False, id="nothing was ever told"),
        pytest.param(replace(GOOD, withdrawn=True), False, id="withdrawn"),
        pytest.param(replace(GOOD, entry_epoch=6), False, id="of a feeder that was replaced"),
        pytest.param(replace(GOOD, shard_epoch=6), False, id="of a feeder whose beats have not come"),
        pytest.param(replace(GOOD, complete=False), False, id="a beat was missed"),
        pytest.param(replace(GOOD, beat_age_s=BEAT_OLD_S - 0.001), True, id="the newest beat is almost too old"),
        pytest.param(replace(GOOD, beat_age_s=BEAT_OLD_S), False, id="the newest beat is too old"),
        pytest.param(replace(GOOD, beat_age_s=float("inf")), False, id="no beat has answered a tick"),
        pytest.param(replace(GOOD, entry_n=2), False, id="older than the beats say"),
        pytest.param(replace(GOOD, entry_n=2, entry_age_s=0.1), False, id="older than the beats say, whatever its own age"),
        pytest.param(replace(GOOD, entry_n=4, entry_age_s=1.0), True, id="newer than the beats say, proven by itself"),
        pytest.param(replace(GOOD, entry_n=4, entry_age_s=None), False, id="newer than the beats say, not proven"),
        pytest.param(replace(GOOD, entry_n=4, entry_age_s=None, listed_age_s=0.0), False, id="another value's proof is not its own"),
        pytest.param(replace(GOOD, listed_age_s=MAX_AGE_S), True, id="proven as long ago as may be"),
        pytest.param(replace(GOOD, listed_age_s=MAX_AGE_S + 0.001), False, id="proven too long ago"),
        pytest.param(replace(GOOD, listed_age_s=9.0, entry_age_s=1.0), True, id="the value's own proof is the newer one"),
        pytest.param(replace(GOOD, listed_age_s=1.0, entry_age_s=9.0), True, id="the beats' proof is the newer one"),
        pytest.param(replace(GOOD, listed_age_s=float("inf")), False, id="listed, and never proven"),
        pytest.param(NO_LISTING, False, id="not listed, not proven"),
        pytest.param(replace(NO_LISTING, entry_age_s=1.0), True, id="not listed yet, proven by itself"),
        pytest.param(replace(NO_LISTING, entry_age_s=MAX_AGE_S + 0.001), False, id="not listed, proven too long ago"),
    ],
)
def test_a_value_is_told_only_with_proof(case: Case, verdict: bool) -> None:  # noqa: FBT001 - a column of the table
    assert case.verdict() is verdict


# ---------------------------------------------------------------- what beats do


def beat(number: int, *, epoch: int = 1, feeder: str = "f", top: int = 0, whole: bool = False, leaving: bool = False, **keys: int) -> Beat:
    """keys: n by the last part of the key, each proven 100 ms ago."""
    listed = {f"ticker.{name}": (n, 100) for name, n in keys.items()}
    return Beat(feeder=feeder, epoch=epoch, number=number, top=top, whole=whole, leaving=leaving, keys=listed)


def heard(*beats: Beat) -> Shard:
    """A shard that heard these, each answering a tick of its own number in s."""
    shard = Shard()
    for one in beats:
        shard.hear(one, float(one.number))
    return shard


def test_what_is_known_is_complete_from_a_whole_beat_on() -> None:
    assert not heard(beat(1, A=1)).complete
    assert heard(beat(1, whole=True), beat(2), beat(3)).complete
    assert not heard(beat(1, whole=True), beat(3)).complete
    assert heard(beat(1, whole=True), beat(3), beat(4, whole=True)).complete


def test_a_beat_counts_from_the_tick_that_it_answers() -> None:
    shard = heard(beat(1, whole=True, A=1))
    assert (shard.beat_s, shard.listed["ticker.A"]) == (1.0, Listed(1, 0.9))
    assert shard.hear(beat(2, A=2), None)
    assert (shard.beat_s, shard.listed["ticker.A"]) == (1.0, Listed(2, NEVER)), "who answers no tick proves nothing"
    assert shard.complete


def test_an_older_proof_of_the_same_value_takes_nothing_back() -> None:
    shard = heard(beat(1, whole=True, A=1))
    shard.hear(Beat(feeder="f", epoch=1, number=2, top=1, keys={"ticker.A": (1, 5000)}), 2.0)
    assert shard.listed["ticker.A"] == Listed(1, 0.9)
    shard.hear(Beat(feeder="f", epoch=1, number=3, top=1, keys={"ticker.A": (1, WITHDRAWN)}), 3.0)
    assert shard.listed["ticker.A"] == Listed(1, NEVER)


def test_a_beat_that_comes_late_or_twice_is_no_news() -> None:
    shard = heard(beat(1, whole=True, A=1), beat(2, A=2))
    assert not shard.hear(beat(2, A=9), 9.0)
    assert not shard.hear(beat(1, A=9), 9.0)
    assert (shard.beat_s, shard.listed["ticker.A"].n, shard.complete) == (2.0, 2, True)


def test_the_feeder_of_the_higher_epoch_is_believed() -> None:
    shard = heard(beat(5, whole=True, A=5))
    assert shard.hear(beat(1, epoch=2, feeder="g"), 6.0)
    assert (shard.epoch, shard.feeder, shard.listed, shard.complete) == (2, "g", {}, False)
    assert not shard.hear(beat(6, epoch=1, whole=True, A=6), 7.0)
    assert (shard.epoch, shard.listed) == (2, {})


def test_a_lower_epoch_counts_once_the_higher_one_was_silent_for_long() -> None:
    """The clock of the bus was set back, and whoever had the higher epoch has gone: nobody else would be believed for hours."""
    shard = heard(beat(1, epoch=7, whole=True), beat(2, epoch=7, A=2))
    last_s = 2.0
    for number, asked_s in ((8, last_s + 1), (9, last_s + SILENT_S), (10, None)):  # None: which answers no tick, and shows no time
        assert not shard.hear(beat(number, epoch=3, feeder="g", whole=True, A=1), asked_s)
    assert (shard.epoch, shard.feeder, shard.number, shard.listed["ticker.A"].n) == (7, "f", 2, 2)
    assert shard.hear(beat(1, epoch=3, feeder="g", whole=True, A=1), last_s + SILENT_S + 0.25)
    assert (shard.epoch, shard.feeder, shard.number, shard.complete, shard.listed) == (3, "g", 1, True, {"ticker.A": Listed(1, 12.15)})
    assert not shard.hear(beat(1, epoch=2, feeder="h", whole=True), last_s + SILENT_S + 1), "the lower one is the one that is heard now"
    assert shard.hear(beat(3, epoch=7), last_s + SILENT_S + 1), "and a higher one is believed at once, as ever"
    assert (shard.epoch, shard.complete) == (7, False)


def test_a_higher_epoch_that_is_heard_and_answers_no_tick_is_silent_all_the_same() -> None:
    shard = heard(beat(1, epoch=7, whole=True))
    for number in range(2, 9):
        assert shard.hear(beat(number, epoch=7), None)
    assert shard.hear(beat(1, epoch=3, feeder="g", whole=True), 1.0 + SILENT_S + 0.001)
    assert (shard.epoch, shard.feeder) == (3, "g")


def test_of_two_feeders_with_one_epoch_one_is_believed() -> None:
    shard = heard(beat(1, feeder="f", whole=True, A=1))
    assert not shard.hear(beat(9, feeder="e", whole=True, A=9), 2.0)
    assert shard.hear(beat(1, feeder="g", whole=True), 2.0)
    assert (shard.feeder, shard.listed) == ("g", {})
    assert not shard.hear(beat(2, feeder="f", whole=True, A=2), 3.0)


def test_a_feeder_that_leaves_proves_nothing_any_more() -> None:
    for asked_s in (2.0, None):
        shard = heard(beat(1, whole=True, A=1))
        shard.hear(beat(2, leaving=True), asked_s)
        assert shard.beat_s == NEVER


def test_a_whole_beat_drops_what_it_does_not_name() -> None:
    shard = heard(beat(1, whole=True, A=1, B=2), beat(2, whole=True, B=2))
    assert set(shard.listed) == {"ticker.B"}


def test_a_value_of_a_higher_epoch_ends_what_was_proven_before() -> None:
    shard = heard(beat(1, whole=True, A=1))
    assert shard.tells_of(1)
    assert not shard.tells_of(0)
    assert shard.tells_of(2)
    assert (shard.epoch, shard.listed, shard.complete, shard.beat_s) == (2, {}, False, NEVER)
    assert shard.hear(beat(1, epoch=2, feeder="g", whole=True, A=1), 2.0), "its beats begin to count"


# ---------------------------------------------------------------- what values do


def entry() -> Entry:
    return Entry("paper", "ticker", "A", 0.0, MAX_AGE_S)


def test_a_value_above_the_newest_beat_is_proven_by_its_own_age() -> None:
    shard, one = heard(beat(1, whole=True, top=3)), entry()
    assert one.take(VALUE, Proof(1, 4, 250, 0), shard)
    assert (one.content, one.n, one.proven_s, one.withdrawn) == (VALUE, 4, 0.75, False)
    assert fresh(one, 1.5)


def test_a_value_that_the_newest_beat_may_have_known_needs_its_word() -> None:
    shard, one = heard(beat(1, whole=True, top=4)), entry()
    assert one.take(VALUE, Proof(1, 4, 0, 0), shard)
    assert one.proven_s == NEVER
    assert not fresh(one, 1.1)
    shard.hear(beat(2, top=4, A=4), 2.0)
    assert fresh(one, 2.1)


def test_a_value_that_is_not_newer_is_no_news() -> None:
    shard, one = heard(beat(1, whole=True)), entry()
    one.take(VALUE, Proof(1, 4, 0, 0), shard)
    for n in (4, 3):
        assert not one.take(market.reply(b"2"), Proof(1, n, 0, 0), shard)
    assert not one.take(market.reply(b"2"), Proof(0, 9, 0, 0), shard), "of a feeder that was replaced"
    assert (one.content, one.epoch, one.n) == (VALUE, 1, 4)


def test_a_new_feeder_counts_anew() -> None:
    shard, one = heard(beat(1, whole=True)), entry()
    one.take(VALUE, Proof(1, 400, 0, 0), shard)
    assert one.take(market.reply(b"2"), Proof(2, 1, 0, 0), shard)
    assert (one.content, one.epoch, one.n) == (market.reply(b"2"), 2, 1)
    assert not fresh(one, 1.0), "nobody has heard a beat of it"


def test_a_withdrawn_value_is_not_fresh_until_the_next_one() -> None:
    shard, one = heard(beat(1, whole=True)), entry()
    one.take(VALUE, Proof(1, 1, 0, 0), shard)
    assert fresh(one, 1.1)
    assert one.take(market.withdrawal("gap"), Proof(1, 2, WITHDRAWN, 0), shard)
    assert (one.content, fresh(one, 1.1)) == (b'{"error":"stale: gap"}', False)
    shard.hear(beat(2, top=2, A=2), 2.0)
    assert not fresh(one, 2.1), "a beat does not make it true again"
    assert one.take(VALUE, Proof(1, 3, 0, 0), shard)
    assert fresh(one, 2.1)


# ---------------------------------------------------------------- what travels


def test_a_value_carries_its_proof_in_a_header() -> None:
    proof = Proof(1_795_168_693_123_456, 42, 17, 3)
    assert proof.header() == "1795168693123456 42 17 3"
    assert Proof.read(proof.header()) == proof


def test_ticks_say_the_time_and_whether_a_whole_beat_is_wanted() -> None:
    assert market.tick(12.3456) == b"12345"
    assert market.read_tick(market.tick(12.3456, whole=True)) == (12345, True)
    assert market.read_tick(b"12345") == (12345, False)


@pytest.mark.parametrize(
    ("kind", "meant"),
    [
        ("ticker", ("ticker", 0)),
        ("depth", ("depth", 0)),
        ("trades", ("trades", 0)),
        ("candles", ("candles", 1)),
        ("candles-15", ("candles", 15)),
    ],
)
def test_a_kind_has_a_name_and_candles_a_period(kind: str, meant: tuple[str, int]) -> None:
    assert market.base(kind) == meant


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "tickers",
        "ticker-5",
        *(f"candles-{period}" for period in ("", "0", "x", "43201", "1-2", "²", "015", "٣", "1٥", "5\n", "9" * 5000)),
    ],
)
def test_what_is_no_kind_is_refused(kind: str) -> None:
    with pytest.raises(BadRequest, match="kind: expected one of"):
        market.base(kind)


@given(st.text())
def test_any_kind_is_read_or_refused(kind: str) -> None:
    try:
        name, minutes = market.base(kind)
    except BadRequest:
        return
    assert name in market.KINDS
    assert (minutes > 0) == (name == "candles")


@given(st.binary())
def test_a_strangers_bytes_raise_what_is_documented(data: bytes) -> None:
    readers = (market.decode_beat, market.decode_wish, market.read_tick, lambda data: Proof.read(data.decode()))
    for read in readers:
        try:
            read(data)
        except market.UNREADABLE:
            continue


def test_market_keeps_one_message_of_each_subject_in_memory() -> None:
    made = market.stream(3, 60.0)
    assert (made.name, made.subjects, made.max_msgs_per_subject, made.num_replicas, made.allow_direct) == (
        subjects.MARKET,
        ["feed.>"],
        1,
        3,
        True,
    )
    assert msgspec.json.decode(market.withdrawal('a "gap"')) == {"error": 'stale: a "gap"'}
