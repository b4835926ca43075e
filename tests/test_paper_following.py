"""The paper exchange followed over a real WebSocket on loopback, as a feeder would: what its socket tells is what its REST calls answer."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from bus.messages import Candle, Market, Records, Ticker, TradeRow
from bus.metrics import Metrics
from bus.seal import Credentials
from tests.paper import Client, Clock
from tests.reader import Socket, arm
from tests.test_paper_feed import levels, venue
from workers.book import BadChecksum, Book, BookError, CrossedBook, SequenceGap
from workers.http import Call, opened
from workers.updates import Bars, BookDelta, BookSnapshot, Channel, Quote, Refused, Tape, Update
from workers.venues.paper.client import Paper


class Followed:
    """What a socket of the real exchange told, kept as a feeder would keep it."""

    def __init__(self, venue: Paper, socket: Socket) -> None:
        self.venue, self.socket = venue, socket
        self.book = Book()
        self.ticker: Ticker | None = None
        self.rows: list[TradeRow] = []
        self.bars: dict[int, Candle] = {}
        self.refused: list[Refused] = []
        self.deltas = 0

    async def ask(self, *channels: Channel, levels: int = 200) -> None:
        for text in self.venue.subscribe(channels, levels):
            await self.socket.ws.send_str(text)

    async def catch_up(self) -> None:
        """Read all that was told before the answer to a ping."""
        await self.socket.ws.send_str('{"op": "ping"}')
        async with asyncio.timeout(5):
            while b'"pong"' not in (frame := (await self.socket.ws.receive_str()).encode()):
                for update in self.venue.parse(frame):
                    self.take(update)

    def take(self, update: Update) -> None:
        match update:
            case Quote(ticker=ticker):
                self.ticker = ticker
            case BookSnapshot():
                self.book.snapshot(update.bids, update.asks, update.sequence)
            case BookDelta():
                self.book.apply(update.bids, update.asks, update.previous, update.sequence)
                self.deltas += 1
            case Tape(rows=rows, whole=whole):
                self.rows = rows if whole else self.rows + rows
            case Bars(candles=candles):
                self.bars |= {candle.time_s: candle for candle in candles}
            case Refused():
                self.refused.append(update)
        if isinstance(update, BookSnapshot | BookDelta):
            assert update.checksum is not None
            self.book.check(self.venue.checksum, update.checksum)


@pytest_asyncio.fixture
async def followed(client: Client) -> AsyncIterator[Followed]:
    made = venue(client.base)
    async with client.session.ws_connect(made.socket_url()) as ws:
        yield Followed(made, Socket(ws))


@asynccontextmanager
async def calling() -> AsyncIterator[Call]:
    """A public read on its way through a venue."""
    async with opened({}, 10.0, Metrics()) as http:
        yield Call(
            http,
            exchange="paper",
            path="paper",
            credentials=Credentials("", ""),
            account="",
            client_order_id="",
            expires_at_ms=10_000,
            now_ms=lambda: 0,
            write=False,
        )


async def test_all_kinds_show_what_rest_shows_while_users_trade(client: Client, clock: Clock, followed: Followed) -> None:
    dice, symbol = random.Random(11), "BTC_USDT"
    made = followed.venue
    await followed.ask(*(made.channel(kind, "btc", 1) for kind in sorted(made.feeds)))
    await followed.catch_up()
    mine: list[str] = []
    async with calling() as call:
        for step in range(60):
            match dice.randrange(4):
                case 0 if mine:
                    await client("DELETE", f"/api/v1/orders/{mine.pop()}")
                case 1:
                    await client.order(symbol, dice.choice(("buy", "sell")), type="market", amount="0.7")
                case 2:
                    price = str(followed.book.top(1)[1][0][0] - dice.randrange(9))
                    mine.append((await client.order(symbol, "buy", type="limit", price=price, amount="0.3"))["id"])
                case _:
                    clock.now_s += dice.choice((1, 1, 7, 61))
            shown = await client.get(f"/api/v1/depth?symbol={symbol}&limit=200", signed=False)
            await followed.catch_up()
            asks, bids = followed.book.top(200)
            assert [[str(price), str(amount)] for price, amount in asks] == shown["asks"], step
            assert [[str(price), str(amount)] for price, amount in bids] == shown["bids"], step
            assert followed.book.sequence == shown["sequence"]
            market = Market(symbol)
            depth = await made.depth(call, market)
            assert followed.book.top(20) == (depth.asks, depth.bids)
            ticker = await made.ticker(call, market)
            assert followed.ticker is not None
            assert msgspec.structs.replace(followed.ticker, time_ms=ticker.time_ms) == ticker
            assert followed.ticker.time_ms // 1000 == ticker.time_ms // 1000
            assert followed.rows[-50:] == (await made.trades(call, market))[-50:]
            newest = await made.records(call, Records(symbol, 1, 2))
            assert [bar for bar in newest if followed.bars.get(bar.time_s) != bar and bar.time_s >= min(followed.bars)] == []
            assert max(followed.bars) == newest[-1].time_s
    assert followed.deltas > 40


@pytest.mark.parametrize(("kind", "error"), [("book-gap", SequenceGap), ("bad-checksum", BadChecksum), ("crossed-book", CrossedBook)])
async def test_a_wrong_book_is_noticed_and_heals_by_subscribing_again(
    kind: str, error: type[BookError], client: Client, clock: Clock, followed: Followed, tmp_path: Path
) -> None:
    depth = followed.venue.channel("depth", "BTC_USDT", 0)
    await followed.ask(depth, levels=20)
    await followed.catch_up()
    await arm(client, tmp_path / "paper", kind, count=1)
    clock.now_s += 1
    await client.get("/api/v1/depth?symbol=BTC_USDT", signed=False)
    clock.now_s += 1  # what is left out is noticed by what comes next
    await client.get("/api/v1/depth?symbol=BTC_USDT", signed=False)
    with pytest.raises(error):
        await followed.catch_up()
    with pytest.raises(SequenceGap):
        followed.book.top(20)
    await followed.socket.answer()  # to the ping: none of it is read again
    await followed.ask(depth, levels=20)
    await followed.catch_up()
    clock.now_s += 1
    shown = await client.get("/api/v1/depth?symbol=BTC_USDT&limit=20", signed=False)
    await followed.catch_up()
    assert followed.book.sequence == shown["sequence"]
    assert followed.book.top(20) == (levels(shown["asks"]), levels(shown["bids"]))


async def test_a_refused_market_leaves_the_others_alone(client: Client, clock: Clock, followed: Followed) -> None:
    made = followed.venue
    wrong = [made.channel(kind, "NO_SUCH", 5) for kind in ("depth", "candles")]
    good = [made.channel(kind, "ETH_BTC", 0) for kind in ("depth", "ticker")]
    await followed.ask(good[0], wrong[0], good[1], wrong[1])
    await followed.catch_up()
    assert [one.channel for one in followed.refused] == wrong
    assert {one.why for one in followed.refused} == {"paper 2001 unknown symbol 'NO_SUCH'; GET /api/v1/markets lists them"}
    assert followed.ticker is not None
    asks, bids = followed.book.top(1)
    assert (followed.ticker.sell, followed.ticker.buy) == (asks[0][0], bids[0][0])


async def test_what_is_unsubscribed_is_told_no_more(client: Client, clock: Clock, followed: Followed) -> None:
    made = followed.venue
    channels = [made.channel(kind, "ETH_BTC", 3) for kind in sorted(made.feeds)]
    await followed.ask(*channels)
    await followed.catch_up()
    for text in made.unsubscribe(channels, 200):
        await followed.socket.ws.send_str(text)
    await followed.catch_up()
    before = (followed.book.sequence, followed.ticker, followed.rows, dict(followed.bars))
    clock.now_s += 200
    await client.get("/api/v1/depth?symbol=ETH_BTC", signed=False)
    await followed.catch_up()
    assert (followed.book.sequence, followed.ticker, followed.rows, followed.bars) == before
