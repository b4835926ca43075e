"""How late a frame is: the exchange's clock shows OFFSET_S less than ours, and every delay is known to the test."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.lag import CALIBRATED_S, GENERATION_S, Lag

BASE_S = 1_000.0
OFFSET_S = -1_795_000_000.0
CLOSE = pytest.approx(0, abs=2e-6)
"""Of dates of whole ms and this size a float keeps microseconds."""


def frame(lag: Lag, true_s: float, delay_s: float, *, offset_s: float = OFFSET_S) -> float:
    """A frame that was dated at true_s of our clock. -> how much earlier it is said to be proven."""
    return true_s - lag.proven_s(round((true_s - offset_s) * 1000), true_s + delay_s)


def answer(lag: Lag, sent_s: float, there_s: float, back_s: float, *, offset_s: float = OFFSET_S) -> None:
    """A REST answer: so long underway to the exchange, and so long back."""
    lag.calibrate(round((sent_s + there_s - offset_s) * 1000), sent_s, sent_s + there_s + back_s)


def test_without_calibration_the_quickest_frame_counts_as_without_delay() -> None:
    lag = Lag()
    for i, (delay_s, late_s) in enumerate([(0.02, 0.0), (0.5, 0.48), (0.02, 0.0), (3.0, 2.98), (0.01, 0.0), (0.02, 0.01)]):
        least_s = 0.01 if i >= 4 else 0.02
        assert frame(lag, BASE_S + i, delay_s) == pytest.approx(-least_s, abs=2e-6)
        assert lag.late_s == pytest.approx(late_s, abs=2e-6)


def test_a_socket_that_is_late_from_its_first_frame_is_noticed_by_a_rest_answer_alone() -> None:
    lag = Lag()
    assert frame(lag, BASE_S, 3.0) == pytest.approx(-3.0, abs=2e-6)  # nobody can know
    answer(lag, BASE_S + 1, 0.01, 0.02)
    for i in range(2, 500):
        assert frame(lag, BASE_S + i, 3.0) == pytest.approx(0.011, abs=2e-6)  # the way there, and 1 ms of what a date leaves open
        assert lag.late_s == pytest.approx(3.011, abs=2e-6)


def test_a_calibration_before_the_first_frame_counts_too() -> None:
    lag = Lag()
    answer(lag, BASE_S, 0.01, 0.01)
    assert frame(lag, BASE_S + 1, 7.0) == pytest.approx(0.011, abs=2e-6)


def test_of_several_rest_answers_the_quickest_tells_most() -> None:
    lag = Lag()
    for i, there_s in enumerate((2.0, 0.005, 1.0)):
        answer(lag, BASE_S + i, there_s, 0.5)
    assert frame(lag, BASE_S + 10, 1.0) == pytest.approx(0.006, abs=2e-6)


def test_a_calibration_is_forgotten_in_the_end() -> None:
    lag = Lag()
    answer(lag, BASE_S, 0.01, 0.01)
    assert frame(lag, BASE_S + CALIBRATED_S - 5, 3.0) == pytest.approx(0.011, abs=2e-6)
    assert frame(lag, BASE_S + CALIBRATED_S + 5, 3.0) == pytest.approx(-3.0, abs=2e-6)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_clock_of_the_exchange_that_is_set_forward_is_noticed_by_the_first_frame(calibrated: bool) -> None:  # noqa: FBT001
    lag = Lag()
    if calibrated:
        answer(lag, BASE_S - 1, 0.001, 0.001)
    frame(lag, BASE_S, 0.02)
    for i in range(1, 4):
        assert frame(lag, BASE_S + i, 0.02, offset_s=OFFSET_S - 10) == pytest.approx(-0.02, abs=2e-6)
        assert lag.late_s == CLOSE
    answer(lag, BASE_S + 5, 0.001, 0.001, offset_s=OFFSET_S - 10)
    assert frame(lag, BASE_S + 6, 0.02, offset_s=OFFSET_S - 10) == pytest.approx(0.002, abs=2e-6)


def test_a_clock_that_is_set_back_looks_like_a_delay_until_a_rest_answer_or_time_tells() -> None:
    back_s = OFFSET_S + 10
    told, untold = Lag(), Lag()
    for lag in (told, untold):
        answer(lag, BASE_S - 1, 0.001, 0.001)
        frame(lag, BASE_S, 0.02)
        assert frame(lag, BASE_S + 1, 0.02, offset_s=back_s) == pytest.approx(10.002, abs=2e-6)
    answer(told, BASE_S + 2, 0.001, 0.001, offset_s=back_s)
    assert frame(told, BASE_S + 3, 0.02, offset_s=back_s) == pytest.approx(0.002, abs=2e-6)
    assert frame(untold, BASE_S + 3, 0.02, offset_s=back_s) == pytest.approx(10.002, abs=2e-6)
    assert frame(untold, BASE_S + CALIBRATED_S, 0.02, offset_s=back_s) == pytest.approx(-0.02, abs=2e-6)


def test_without_calibration_a_clock_that_is_set_back_heals_within_two_generations() -> None:
    lag = Lag()
    told = {}
    for i in range(int(3 * GENERATION_S)):
        told[i] = frame(lag, BASE_S + i, 0.02, offset_s=OFFSET_S + (10 if i >= 30 else 0))
    assert told[29] == pytest.approx(-0.02, abs=2e-6)
    assert told[31] == pytest.approx(9.98, abs=2e-6)
    assert told[int(2 * GENERATION_S) + 1] == pytest.approx(-0.02, abs=2e-6)


@pytest.mark.parametrize("drift", [100e-6, -100e-6])
def test_a_drift_of_100_ppm_stays_a_matter_of_milliseconds(drift: float) -> None:
    lag = Lag()
    for i in range(3600):
        offset_s = OFFSET_S + i * drift
        if i % 30 == 0:
            answer(lag, BASE_S + i, 0.001, 0.001, offset_s=offset_s)
        early_s = frame(lag, BASE_S + i + 0.5, 0.03, offset_s=offset_s)
        assert -0.012 <= early_s <= 0.012


def test_after_a_pause_the_frames_before_it_mean_nothing() -> None:
    lag = Lag()
    frame(lag, BASE_S, 0.01)
    assert frame(lag, BASE_S + 2 * GENERATION_S, 0.5) == pytest.approx(-0.5, abs=2e-6)


Delay = st.floats(0, 30)
Event = st.tuples(st.sampled_from(["frame", "answer"]), st.floats(0, 100), Delay, Delay)


@given(st.lists(Event, max_size=40))
def test_nothing_is_proven_later_than_it_was_true_nor_than_it_was_read(events: list[tuple[str, float, float, float]]) -> None:
    lag, now_s, calibrated_s = Lag(), BASE_S, float("-inf")
    for kind, pause_s, delay_s, back_s in events:
        now_s += pause_s
        if kind == "answer":
            answer(lag, now_s, delay_s, back_s)
            now_s = calibrated_s = now_s + delay_s + back_s
        else:
            true_ms = round((now_s - delay_s - OFFSET_S) * 1000)
            proven_s = lag.proven_s(true_ms, now_s)
            assert proven_s <= now_s
            if now_s - calibrated_s < CALIBRATED_S:
                assert proven_s <= true_ms / 1000 + OFFSET_S + 2e-6
