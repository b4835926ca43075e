"""From a service path to an exchange: any path is a route, or a refusal that says what would be one."""

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bridge.routes import Route, Routes
from bus import subjects
from bus.errors import BadRequest, NoWorker

HEARD = {"okx", "paper", "okx_tokyo"}
ROUTES = Routes({"DigitalAsset": "paper", "": "paper", "FTX": "OKX"}, ["bitgo"], lambda: HEARD)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/okx", Route("okx", "okx")),
        ("/OKX", Route("okx", "okx")),
        ("okx", Route("okx", "okx")),
        ("/okx/", Route("okx", "okx")),
        ("//okx", Route("okx", "okx")),
        ("/okx_tokyo", Route("okx_tokyo", "okx_tokyo")),
        ("/okx/robot-7", Route("okx", "okx/robot-7")),
        ("/Okx/Robot-7", Route("okx", "okx/Robot-7")),
        ("/okx/a/b", Route("okx", "okx/a/b")),
        ("/okx/%E6%9C%BA%E5%99%A8", Route("okx", "okx/机器")),
        ("/%6fkx", Route("okx", "okx")),
        ("/bitgo", Route("bitgo", "bitgo")),
        ("/digitalasset", Route("paper", "digitalasset")),
        ("/DigitalAsset/r1", Route("paper", "digitalasset/r1")),
        ("/ftx", Route("okx", "ftx")),
        ("/", Route("paper", "paper")),
        ("", Route("paper", "paper")),
    ],
)
def test_paths(path: str, expected: Route) -> None:
    assert ROUTES.find(path) == expected


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/okxx", "no exchange named 'okxx' here; did you mean okx?"),
        ("/Papper/r1", "no exchange named 'papper' here; did you mean paper?"),
        ("/zzzz", "no exchange named 'zzzz' here; there are: bitgo, digitalasset, ftx, okx, okx_tokyo, paper"),
        ("/a b", "exchange: expected 1 to 64 printable signs without blanks, got 'a b'"),
        ("/okx/a%0ab", "session: expected 1 to 64 printable signs without blanks, got 'a\\nb'"),
        (f"/okx/{'x' * 65}", f"session: expected 1 to 64 printable signs without blanks, got '{'x' * 39}... (65 long)"),
    ],
)
def test_a_path_that_leads_nowhere_says_what_would(path: str, text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        ROUTES.find(path)
    assert str(caught.value) == text


def test_the_bare_address_needs_a_route_of_its_own() -> None:
    with pytest.raises(BadRequest, match=r"^the address lacks the name of an exchange; there are: okx$"):
        Routes({}, [], lambda: {"okx"}).find("/")


def test_before_a_worker_was_ever_heard_a_name_may_still_come_true() -> None:
    heard: set[str] = set()
    routes = Routes({}, [], lambda: heard)
    with pytest.raises(NoWorker):
        routes.find("/okx")
    heard.add("okx")
    assert routes.find("/okx").exchange == "okx"


def test_while_not_all_are_heard_an_unknown_name_is_left_to_the_bus() -> None:
    routes = Routes({}, ["bitgo"], lambda: HEARD, lambda: False)
    assert routes.find("/okex/r1") == Route("okex", "okex/r1", known=False)
    assert routes.find("/okx").known
    with pytest.raises(BadRequest, match="the address lacks the name"):
        routes.find("/")


@given(st.text(max_size=100) | st.text("/okx%ABC0 \n", max_size=30))
@example("/okx/\ud800")
@example("/okx/%ff%fe")
@example("%")
@example("/" * 5000)
def test_any_path_is_a_route_or_refused_in_one_short_line(path: str) -> None:
    try:
        route = ROUTES.find(path)
    except BadRequest as refused:
        text = refused.text
    else:
        text = ""
        assert route.exchange in HEARD | {"bitgo"}
        assert subjects.rpc(route.exchange, "ticker")
    assert len(text) < 300
    assert "\n" not in text


# ---------------------------------------------------------------- names on the bus


LEGAL = {*string.ascii_letters, *string.digits, "-", "_", "="}


@pytest.mark.parametrize(
    ("text", "escaped"), [("okx", "okx"), ("BTC_USDT.swap", "BTC_USDT=2Eswap"), ("a b*>", "a=20b=2A=3E"), ("=", "=3D"), ("é", "=C3=A9")]
)
def test_tokens(text: str, escaped: str) -> None:
    assert subjects.token(text) == escaped


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_a_token_is_legal_and_tells_texts_apart_or_is_refused(one: str, other: str) -> None:
    tokens = []
    for text in (one, other):
        try:
            tokens.append(subjects.token(text))
        except BadRequest:
            assert not text or len(text.encode()) > subjects.MAX_TOKEN // 3
            return
    assert all(set(token) <= LEGAL for token in tokens)
    assert (tokens[0] == tokens[1]) == (one == other)


sessions = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=64)


@given(sessions, sessions)
@example("机" * 64, "机" * 63 + "器")
def test_every_session_has_a_place_of_its_own_for_its_state(one: str, other: str) -> None:
    keys = [subjects.session_key(f"okx_tokyo/{session}", "0123456789abcdef") for session in (one, other)]
    assert all(len(key) <= subjects.MAX_TOKEN + 17 and set(key) <= LEGAL | {"."} for key in keys)
    assert (keys[0] == keys[1]) == (one == other)


@given(st.text())
def test_a_name_is_returned_unchanged_or_refused(text: str) -> None:
    try:
        assert subjects.name(text, "symbol") is text
    except BadRequest as refused:
        shown = str(refused)
    else:
        shown = "symbol: expected"
        assert 1 <= len(text) <= 64
        assert not set(text) & set(" \t\r\n\0")
    assert shown.startswith("symbol: expected")


@given(st.text(max_size=5000))
def test_a_value_is_shown_in_one_short_line(text: str) -> None:
    shown = subjects.shown(text)
    assert len(shown) < 70
    assert len(shown.splitlines()) == 1
    shown.encode()  # no lone surrogate gets out
