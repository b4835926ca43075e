"""workers/venues: how a venue is found, and what a venue of one's own needs."""

import re
from decimal import Decimal
from typing import Any

import pytest

from bus.config import Config, ConfigError, Paper, Venue, Workers
from bus.messages import Empty, Market, Ticker
from workers.http import Call
from workers.venues import available


class Own:
    """The smallest venue of a user's own."""

    public = frozenset({"ticker"})
    contracts = False
    lookups = frozenset[str]()

    def __init__(self, name: str, settings: Venue) -> None:
        self.name = name
        self.settings = settings

    async def ticker(self, call: Call, params: Market) -> Ticker:
        one = Decimal(1)
        return Ticker(time_ms=call.now_ms(), buy=one, sell=one, last=one, high=one, low=one, vol=one)

    async def accounts(self, call: Call, params: Empty) -> Any:
        return {}["a bug of the venue's own"]  # type: ignore[index]


def test_paper_needs_an_address_and_null_needs_bench() -> None:
    assert set(available(Config())) == {"bitgo"}
    settings = {"paper": Venue(base_url="http://127.0.0.1:1")}
    assert set(available(Config(venues=settings, bench=True))) == {"bitgo", "paper", "null"}
    assert Paper().enabled


def test_an_exchange_can_have_a_second_name_and_a_worker_can_serve_some_only() -> None:
    venues = {"bitgo_tokyo": Venue(exchange="bitgo", base_url="http://tokyo")}
    assert set(available(Config(venues=venues))) == {"bitgo", "bitgo_tokyo"}
    only = available(Config(venues=venues, workers=Workers(exchanges=["bitgo_tokyo"])))
    assert list(only) == ["bitgo_tokyo"]


def test_a_venue_of_ones_own_is_a_class_in_a_module() -> None:
    venues = available(Config(venues={"mine": Venue(cls="tests.test_venues:Own", base_url="http://mine")}))
    assert isinstance(venues["mine"], Own)
    assert (venues["mine"].name, venues["mine"].settings.base_url) == ("mine", "http://mine")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Config(workers=Workers(exchanges=["okxx"])), "nothing is known of okxx; there are bitgo"),
        (Config(venues={"mine": Venue()}), "[venues.mine]: expected exchange = one of bitgo, null, paper, or class = 'module:Class'"),
        (Config(venues={"mine": Venue(cls="no.such:Class")}), "[venues.mine] no.such:Class: No module named 'no'"),
        (Config(venues={"mine": Venue(cls="tests.test_venues:Nobody")}), "has no attribute 'Nobody'"),
    ],
)
def test_a_mistake_names_the_table(config: Config, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        available(config)
