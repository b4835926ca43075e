"""Every error class against the pattern by which strategies silence errors, and its way over the wire."""

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bus.errors import (
    ERRORS,
    SILENCED,
    BadRequest,
    BusDown,
    BusError,
    Busy,
    Expired,
    Fenced,
    GuardRefused,
    Internal,
    JournalFull,
    NoWorker,
    OutcomeUnknown,
    RateLimited,
    StaleData,
    TimedOut,
    VenueRejected,
    VenueUnavailable,
    from_wire,
    loud,
)
from bus.messages import Failure, decode_reply, encode

SILENT = [Expired, Busy, NoWorker, BusDown, TimedOut, VenueUnavailable, RateLimited, StaleData]
LOUD = [BadRequest, JournalFull, Fenced, GuardRefused, VenueRejected, OutcomeUnknown, Internal]
# The words of the documented filter (fmz-protocol A.4), spelled here once more.
FILTER = "502:|503:|tcp|character|unexpected|network|timeout|WSARecv|Connect|GetAddr|no such|reset|http|received|EOF|reused"
WORDS = FILTER.split("|")


def in_any_case(word: str) -> st.SearchStrategy[str]:
    letters = [st.sampled_from([letter.lower(), letter.upper()]) for letter in word]
    return st.tuples(*letters).map("".join)


pieces = st.one_of(st.sampled_from(WORDS).flatmap(in_any_case), st.text(string.printable, max_size=6), st.text(max_size=3))
messages = st.lists(pieces, max_size=12).map("".join)


def test_the_pattern_is_the_documented_one() -> None:
    assert SILENCED.pattern == FILTER


def test_every_class_says_on_which_side_it_stands() -> None:
    assert {*SILENT, *LOUD} == set(BusError.__subclasses__())
    assert all(error.silenced for error in SILENT)
    assert not any(error.silenced for error in LOUD)


def test_codes_are_unique_and_lower_case() -> None:
    codes = [error.code for error in BusError.__subclasses__()]
    assert len(set(codes)) == len(codes) == len(ERRORS)
    assert all(set(code) <= {*string.ascii_lowercase, "_"} for code in codes)


@pytest.mark.parametrize("error", SILENT)
@given(message=messages)
def test_transport_busy_and_expired_texts_are_always_silenced(error: type[BusError], message: str) -> None:
    assert SILENCED.search(error(message).text)


@pytest.mark.parametrize("error", LOUD)
@given(message=messages)
@example(message="timeoutcp")  # two words that share a letter
@example(message="resetcpReceivedEOFreused")
@example(message="connection re\u017fet by peer")  # the long s is an s where case does not count
def test_refusals_and_unknown_outcomes_are_never_silenced(error: type[BusError], message: str) -> None:
    assert not SILENCED.search(error(message).text)


@given(messages)
def test_breaking_a_word_adds_hyphens_and_nothing_else(message: str) -> None:
    assert loud(message).replace("-", "") == message.replace("-", "")


@pytest.mark.parametrize(
    "message", ["insufficient balance", "OKX 51008 Order failed", "order not found", "direction is sell, invalid order type Buy"]
)
def test_a_refusal_in_other_words_stays_as_the_exchange_wrote_it(message: str) -> None:
    assert VenueRejected(message).text == message
    assert OutcomeUnknown(message).text == f"outcome unknown: {message}"


@pytest.mark.parametrize("error", [*SILENT, *LOUD])
@given(message=st.text(max_size=2000))
def test_a_text_is_one_line_of_bounded_length(error: type[BusError], message: str) -> None:
    text = error(message).text
    assert len(text.splitlines()) <= 1
    assert len(text) <= 1000


@pytest.mark.parametrize("error", [*SILENT, *LOUD])
def test_an_error_survives_the_wire(error: type[BusError]) -> None:
    reply = decode_reply(encode(Failure.of(error("the reason"))))
    assert isinstance(reply, Failure)
    assert type(reply.error) is error
    assert reply.error.text == error("the reason").text


def test_a_subclass_of_a_venue_travels_as_its_parent() -> None:
    class NotFound(VenueRejected):
        pass

    assert type(Failure.of(NotFound("no such order")).error) is VenueRejected


@given(st.text(max_size=20).filter(lambda code: code not in ERRORS), st.text(max_size=50))
def test_a_code_of_a_newer_peer_reads_as_internal(code: str, message: str) -> None:
    error = from_wire(code, message)
    assert type(error) is Internal
    assert str(error) == message
