"""A constant without I/O, for benchmarks: what the path costs when the exchange costs nothing. Exists only with `fmzbus up --bench`."""

from decimal import Decimal

from msgspec import Raw

from bus import config
from bus.messages import Empty, Market, OrderRef, Placed, Ticker, Trade, encode
from workers.http import Call

TICKER = Raw(
    encode(
        Ticker(
            time_ms=1_500_793_319_499,
            buy=Decimal(1000),
            sell=Decimal(1001),
            last=Decimal(1000),
            high=Decimal(1010),
            low=Decimal(990),
            vol=Decimal(100),
        )
    )
)


class Null:
    public = frozenset[str]()  # nothing of it is cached or shared: every request goes the whole path
    contracts = False
    lookups = frozenset[str]()

    def __init__(self, name: str, settings: config.Venue) -> None:
        pass

    async def ticker(self, _call: Call, _params: Market) -> Raw:
        return TICKER

    async def accounts(self, _call: Call, _params: Empty) -> list[object]:
        return []

    async def trade(self, call: Call, _params: Trade) -> Placed:
        return Placed(call.client_order_id)

    async def cancel(self, _call: Call, _params: OrderRef) -> bool:
        return True
