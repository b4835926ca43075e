"""The checker's own parts: what it calls right, stale and wrong, and the wire that loses messages. No process, no socket."""

import json
from collections.abc import Mapping
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.freshness.acts import CASES, NOT_OF_READS, every
from tests.freshness.verdict import Seen, Spans, Value, Verdict, judge, value
from tests.freshness.wire import Frames
from workers.venues.paper.faults import KINDS

MAX_AGE_S = 2.0


def ticker(buy: str) -> bytes:
    row = {"time": 5, "symbol": "btc_usdt", "buy": 0, "sell": 2.5, "last": 2, "high": 3, "low": 1, "vol": 7.25, "open": 2}
    return json.dumps({"data": row}).replace('"buy": 0', f'"buy": {buy}').encode()


def depth(*amounts: float) -> bytes:
    return json.dumps({"data": {"time": 5, "asks": [[11 + i, a] for i, a in enumerate(amounts)], "bids": [[10.5, 1]]}}).encode()


FIRST, SECOND = value("ticker", ticker("1.10"))[0], value("ticker", ticker("1.20"))[0]


def seen(content: bytes, asked_s: float, *, kind: str = "ticker", source: str = "hit") -> Seen:
    return Seen("bridge-1", kind, "btc_usdt", "BTC_USDT", asked_s, asked_s + 0.1, source, content)


def judged(*answers: Seen) -> Verdict:
    """Where the first ticker was true from 10 to 20 and again from 30 to 31, the second between; the first since 31.5."""
    spans: Mapping[Value, Spans] = {FIRST: [(10, 20), (30, 31)], SECOND: [(20, 30), (31.5, float("inf"))]}

    def true(kind: str, market: str) -> Mapping[Value, Spans]:
        assert (kind, market) == ("ticker", "BTC_USDT")
        return spans

    return judge(answers, true, max_age_s=MAX_AGE_S)


@pytest.mark.parametrize(("asked_s", "oldest_s"), [(15, 0.0), (20, 0.0), (21.5, 1.5), (22, 2.0), (9.95, 0.0), (32.9, 1.9)])
def test_what_was_true_within_max_age_is_right(asked_s: float, oldest_s: float) -> None:
    found = judged(seen(ticker("1.1"), asked_s))
    assert (found.answers, found.hits, found.stale, found.wrong, found.errors) == (1, 1, 0, 0, 0)
    assert found.oldest_s == pytest.approx(oldest_s)


@pytest.mark.parametrize("asked_s", [22.01, 29.8, 33.01, 1000])
def test_what_was_true_longer_ago_is_stale(asked_s: float) -> None:
    found = judged(seen(ticker("1.1"), asked_s))
    assert (found.stale, found.wrong, [finding.kind for finding in found.findings]) == (1, 0, ["stale"])


@pytest.mark.parametrize("asked_s", [0, 9.89])
def test_what_becomes_true_later_is_wrong(asked_s: float) -> None:
    assert judged(seen(ticker("1.1"), asked_s)).wrong == 1


@pytest.mark.parametrize(
    "content",
    [ticker("1.3"), ticker("1.1").replace(b"7.25", b"7.26"), b"", b"[]", b"{}", b'{"data":{}}', b"<html>", b"HTTP 500: oh", depth(1)],
)
def test_what_was_never_true_or_is_no_answer_is_wrong(content: bytes) -> None:
    found = judged(seen(content, 15))
    assert (found.stale, found.wrong, found.errors) == (0, 1, 0)


def test_a_clear_error_is_an_error_but_never_from_the_cache() -> None:
    error = b'{"error":"network: paper answered 503"}'
    found = judged(seen(error, 15, source="miss"), seen(b"no answer: TimeoutError", 15, source=""), seen(error, 15))
    assert (found.answers, found.hits, found.errors, found.wrong) == (3, 1, 2, 1)
    assert found.said == {"network: paper answered 503": 1, "no answer: TimeoutError": 1}


def test_time_and_spelling_are_not_compared_and_digits_by_their_value() -> None:
    assert value("ticker", ticker("1.1").replace(b'"time": 5', b'"time": 6').replace(b"btc_usdt", b"BTC_USDT")) == (FIRST, "")
    assert value("depth", depth(1.5)) == (
        (((Decimal(11), Decimal("1.50")),), ((Decimal("10.5"), Decimal(1)),)),
        "",
    )
    assert value("depth", depth(1.5, 2)) != value("depth", depth(1.5))


# ---------------------------------------------------------------- the wire

STREAM = (
    b'INFO {"a":1}\r\n'
    b"MSG feed.paper.depth.BTC_USDT 7 5\r\nhe\r\no\r\n"
    b"PING\r\n"
    b"HMSG beat.paper.0 3 _INBOX.x 12 15\r\nNATS/1.0\r\n\r\nabc\r\n"
    b"MSG rpc.x 1 0\r\n\r\n+OK\r\n"
)
SUBJECTS = ["", "feed.paper.depth.BTC_USDT", "", "beat.paper.0", "rpc.x", ""]


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_frames_are_the_same_however_the_bytes_arrive(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    frames = Frames()
    found = [frame for start, end in pairwise(places) for frame in frames.feed(STREAM[start:end])]
    assert [subject for subject, _ in found] == SUBJECTS
    assert b"".join(content for _, content in found) == STREAM


def test_every_third_message_of_a_word_is_lost() -> None:
    treat = every(3, "feed.", "beat.")
    assert [treat(subject).copies for subject in ("feed.a", "rpc.a", "beat.a", "feed.a", "feed.a")] == [1, 1, 1, 0, 1]


def test_every_fault_of_the_exchange_that_reads_can_meet_is_a_case() -> None:
    assert set(KINDS) - set(NOT_OF_READS) <= set(CASES)
