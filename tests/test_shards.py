"""workers/shards.py: who feeds a shard, on a clock that the test moves."""

from bus.market import BEAT_OLD_S, Beat
from tests.paper import Clock
from workers.shards import CALM_S, LISTEN_S, SPREAD, SPREAD_S, Shards

NOW_MS = 1_795_168_693_000


def shards(clock: Clock, name: str = "feeder-b", count: int = 1) -> Shards:
    return Shards(name, count, lambda: NOW_MS, clock)


def beat(feeder: str, epoch: int, *, leaving: bool = False) -> Beat:
    return Beat(feeder=feeder, epoch=epoch, number=1, top=0, leaving=leaving)


def test_a_feeder_that_is_alone_takes_every_shard_once_it_has_listened(clock: Clock) -> None:
    alone = shards(clock, count=3)
    assert alone.claims() == []
    clock.now_s += LISTEN_S + SPREAD_S
    assert alone.claims() == [0, 1, 2]
    assert alone.claims() == []
    assert all(NOW_MS * SPREAD <= epoch < (NOW_MS + 1) * SPREAD for epoch in alone.epochs.values())


def test_a_shard_that_is_fed_is_left_alone_until_its_feeder_falls_silent(clock: Clock) -> None:
    second = shards(clock)
    for _ in range(20):
        clock.now_s += 0.5
        assert not second.hear(0, beat("feeder-a", 7))
        assert second.claims() == []
    clock.now_s += BEAT_OLD_S - 0.01
    assert second.claims() == []
    clock.now_s += SPREAD_S + 0.01
    assert second.claims() == [0]


def test_a_claim_has_an_epoch_above_any_that_was_heard(clock: Clock) -> None:
    second = shards(clock)
    second.hear(0, beat("feeder-a", NOW_MS * 10 * SPREAD))
    clock.now_s += BEAT_OLD_S + SPREAD_S
    assert second.claims() == [0]
    assert second.epochs == {0: NOW_MS * 10 * SPREAD + 1}


def test_a_shard_whose_feeder_leaves_is_taken_at_once(clock: Clock) -> None:
    second = shards(clock)
    second.hear(0, beat("feeder-a", 7))
    second.hear(0, beat("feeder-a", 7, leaving=True))
    clock.now_s += SPREAD_S
    assert second.claims() == [0]


def test_a_feeder_that_hears_a_higher_epoch_has_lost_its_shard(clock: Clock) -> None:
    first = shards(clock)
    clock.now_s += LISTEN_S + SPREAD_S
    first.claims()
    mine = first.epochs[0]
    assert not first.hear(0, beat("feeder-z", mine - 1))
    assert first.epochs == {0: mine}
    assert first.hear(0, beat("feeder-a", mine + 1))
    assert first.epochs == {}
    assert first.claims() == []


def test_of_two_with_one_epoch_exactly_one_goes_on(clock: Clock) -> None:
    b = shards(clock, "feeder-b")
    clock.now_s += LISTEN_S + SPREAD_S
    b.claims()
    epoch = b.epochs[0]
    assert not b.hear(0, beat("feeder-a", epoch))
    assert b.epochs == {0: epoch}
    assert b.hear(0, beat("feeder-c", epoch))
    assert b.epochs == {}


def test_its_own_beats_and_shards_that_it_does_not_know_mean_nothing(clock: Clock) -> None:
    one = shards(clock)
    assert not one.hear(0, beat("feeder-b", NOW_MS * 10 * SPREAD))
    assert not one.hear(5, beat("feeder-a", 7))
    clock.now_s += LISTEN_S + SPREAD_S
    assert one.claims() == [0]


def test_a_new_feeder_takes_from_one_that_has_two_more_and_stops_when_they_are_even(clock: Clock) -> None:
    new = shards(clock, count=4)
    for _ in range(40):
        clock.now_s += CALM_S / 4
        for shard in range(4):
            if shard not in new.epochs:
                new.hear(shard, beat("feeder-a", 7))
        new.claims()
    assert sorted(new.epochs) == [2, 3]
