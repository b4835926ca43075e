"""What the paper exchange's channels tell, over a real WebSocket on loopback with a bare client, and what armed faults make of it."""

import asyncio
import random
import zlib
from pathlib import Path

from tests.paper import NOW_S, README, Client, Clock, exchange
from tests.reader import BTC, Book, arm, connected, depth
from workers.venues.paper import market as model
from workers.venues.paper.markets import MARKETS

# The book


async def test_snapshot_and_deltas_give_the_book_that_rest_shows_while_users_trade(client: Client, clock: Clock) -> None:
    dice, other = random.Random(5), client.other("key-2", "secret-2")
    market, middle = MARKETS["BTC_USDT"], model.second(7, "BTC_USDT", NOW_S).close
    async with connected(client) as whole, connected(client, "gzip") as top:
        books = {whole: Book(200), top: Book(30)}
        for reader, book in books.items():
            book.apply(await reader.subscribe(**BTC, levels=book.levels))
        mine: list[tuple[Client, str]] = []
        for turn in range(60):
            trader = dice.choice((client, other))
            match dice.randrange(5):
                case 0:
                    clock.now_s += dice.choice((1, 1, 7))
                case 1 if mine:
                    owner, number = mine.pop(dice.randrange(len(mine)))
                    await owner("DELETE", f"/api/v1/orders/{number}")
                case 2:
                    await trader.order("BTC_USDT", dice.choice(("buy", "sell")), type="market", amount="0.7")
                case _:
                    price = market.price_text(middle + dice.randrange(-60, 60))
                    placed = await trader.order("BTC_USDT", dice.choice(("buy", "sell")), type="limit", price=price, amount="0.3")
                    mine.append((trader, placed["id"]))
            shown = await depth(client)
            for reader, book in books.items():
                while book.sequence < shown["sequence"]:
                    book.apply(await reader.next())
                assert book.sequence == shown["sequence"], turn
                assert book.rows("asks") == shown["asks"][: book.levels], turn
                assert book.rows("bids") == shown["bids"][: book.levels], turn


async def test_the_readmes_checksum_is_right() -> None:
    text = README.read_text()
    example = "52559.53:0.034343:52559.55:0.198268:52559.52:0.205898:52559.56:0.323809:52559.58:1.5"
    book = Book(5, sides={"bids": {"52559.53": "0.034343", "52559.52": "0.205898"}})
    book.sides["asks"] = {"52559.55": "0.198268", "52559.56": "0.323809", "52559.58": "1.5"}
    assert zlib.crc32(example.encode()) == book.checksum()
    assert f"    {example}\n" in text
    assert f"is {zlib.crc32(example.encode())}" in text


async def test_all_readers_see_the_same_messages_and_a_late_one_joins_them(client: Client, clock: Clock) -> None:
    async with connected(client) as first, connected(client) as second:
        await first.subscribe(**BTC, levels=10)
        clock.now_s += 1
        one = await first.next()
        snapshot = await second.subscribe(**BTC, levels=10)
        assert snapshot["sequence"] == one["sequence"] == (NOW_S + 1) * 1_000_000
        await client.order("BTC_USDT", "buy", type="limit", price="40000", amount="1")
        # Far below the ten levels: nothing to show but the sequence, so that both streams stay one.
        quiet = await first.next()
        assert (quiet["asks"], quiet["bids"], quiet["previous"], quiet["sequence"]) == ([], [], one["sequence"], one["sequence"] + 1)
        assert await second.next() == quiet
        clock.now_s += 1
        assert await first.next() == await second.next()


async def test_subscribing_again_begins_anew_and_unsubscribing_ends(client: Client, clock: Clock) -> None:
    async with connected(client) as reader:
        assert len((await reader.subscribe(**BTC))["asks"]) == 100
        again = await reader.subscribe(**BTC, levels=3)
        assert (again["type"], len(again["asks"]), len(again["bids"])) == ("snapshot", 3, 3)
        clock.now_s += 1
        assert (await reader.next())["levels"] == 3
        assert await reader.ask("unsubscribe", BTC) == {"id": 3, "op": "unsubscribe", "code": 0, "args": [BTC | {"levels": 100}]}
        clock.now_s += 1
        await depth(client)
        assert (await reader.ask("ping"))["op"] == "pong"
        assert not reader.data
        assert (await reader.ask("unsubscribe", BTC))["code"] == 2002
        assert (await reader.subscribe(**BTC))["sequence"] == (NOW_S + 2) * 1_000_000


# The other channels


async def test_the_ticker_comes_when_it_changes(client: Client, clock: Clock) -> None:
    async with connected(client) as reader:
        first = await reader.subscribe(channel="ticker", symbol="ETH_USDT")
        assert first == {"channel": "ticker"} | await client.get("/api/v1/ticker?symbol=ETH_USDT", signed=False)
        await client.order("ETH_USDT", "buy", type="limit", price="100", amount="1")
        inside = MARKETS["ETH_USDT"].price_text(model.depth(7, "ETH_USDT", NOW_S + 1).asks[0][0])
        clock.now_s += 1
        second = await reader.next()
        assert second["ask"] == inside
        assert second == {"channel": "ticker"} | await client.get("/api/v1/ticker?symbol=ETH_USDT", signed=False)


async def test_trades_come_once_each_users_and_the_markets(client: Client, clock: Clock) -> None:
    async with connected(client) as reader:
        first = await reader.subscribe(channel="trades", symbol="ETH_BTC")
        rows = first["trades"]
        assert (first["type"], len(rows)) == ("snapshot", 50)
        await client.order("ETH_BTC", "sell", type="market", amount="0.01")
        clock.now_s += 3
        while rows[-1]["time"] != (NOW_S + 3) * 1000:
            update = await reader.next()
            assert (update["type"], update["channel"], update["symbol"]) == ("update", "trades", "ETH_BTC")
            rows += update["trades"]
        shown = await client.get(f"/api/v1/trades?symbol=ETH_BTC&limit={len(rows)}", signed=False)
        assert rows == shown
        assert [row["amount"] for row in rows if row["id"].startswith("u")] == ["0.01"]


async def test_candles_update_and_each_bar_closes(client: Client, clock: Clock) -> None:
    start_s = NOW_S // 60 * 60
    async with connected(client) as reader:
        first = await reader.subscribe(channel="candles", symbol="BTC_USDT", interval=1)
        assert (first["interval"], first["closed"], first["candle"][0]) == (1, False, start_s * 1000)
        clock.now_s += 1
        second = await reader.next()
        assert (second["closed"], second["candle"][:2]) == (False, first["candle"][:2])
        clock.now_s = start_s + 121
        seen = [await reader.next() for _ in range(3)]
        assert [(m["closed"], m["candle"][0]) for m in seen] == [
            (True, start_s * 1000),
            (True, (start_s + 60) * 1000),
            (False, (start_s + 120) * 1000),
        ]
        shown = await client.get("/api/v1/candles?symbol=BTC_USDT&interval=1&limit=3", signed=False)
        assert [m["candle"] for m in seen] == shown


# Private updates


async def test_orders_tells_every_change_in_order_and_only_to_its_account(client: Client, clock: Clock) -> None:
    other = client.other("key-2", "secret-2")
    market, ask = MARKETS["BTC_USDT"], model.depth(7, "BTC_USDT", NOW_S).asks[0][0]
    before = await client.order("ETH_USDT", "buy", type="limit", price="100", amount="1")
    async with connected(client) as reader, connected(client) as stranger:
        assert (await reader.login(client))["code"] == 0
        assert (await stranger.login(other))["code"] == 0
        first = await reader.subscribe(channel="orders")
        assert (first["type"], first["sequence"], first["orders"]) == ("snapshot", 1, [before])
        assert (await stranger.subscribe(channel="orders"))["orders"] == []
        resting = await client.order("BTC_USDT", "buy", type="limit", price=market.price_text(ask - 1), amount="0.5")
        taken = await other.order("BTC_USDT", "sell", type="limit", price=market.price_text(ask - 1), amount="0.2")
        await client("DELETE", f"/api/v1/orders/{resting['id']}")
        done = await client.order("ETH_BTC", "sell", type="market", amount="0.01")
        seen = [await reader.next() for _ in range(6)]
        assert [m["sequence"] for m in seen] == [2, 3, 4, 5, 6, 7]
        assert [m["type"] for m in seen] == ["order", "fill", "order", "order", "fill", "order"]
        assert seen[0]["order"] == resting
        fills = await client.get("/api/v1/fills")
        assert [seen[1]["fill"], seen[4]["fill"]] == fills
        assert [m["order"]["filled"] for m in (seen[0], seen[2], seen[3])] == ["0", "0.2", "0.2"]
        assert [m["order"]["status"] for m in (seen[0], seen[2], seen[3])] == ["open", "open", "cancelled"]
        assert (seen[5]["order"], seen[5]["symbol"]) == (done, "ETH_BTC")
        theirs = [await stranger.next() for _ in range(2)]
        assert [(m["type"], m["sequence"]) for m in theirs] == [("fill", 1), ("order", 2)]
        assert theirs[1]["order"] == taken
        assert (await stranger.ask("ping"))["op"] == "pong"
        assert not stranger.data


async def test_orders_tells_what_happens_by_itself(client: Client, clock: Clock) -> None:
    market = MARKETS["BTC_USDT"]
    bid = model.depth(7, "BTC_USDT", NOW_S).bids[0][0]
    seconds = range(NOW_S + 1, NOW_S + 500)
    falls = next(s for s in seconds if model.second(7, "BTC_USDT", s).low < bid - 50)
    async with connected(client) as reader:
        await reader.login(client)
        await reader.subscribe(channel="orders")
        placed = await client.order("BTC_USDT", "buy", type="limit", price=market.price_text(bid - 20), amount="0.001")
        assert (await reader.next())["order"] == placed
        clock.now_s = falls
        fill, order = await reader.next(), await reader.next()
        assert (fill["fill"]["order_id"], order["order"]["status"]) == (placed["id"], "closed")
        assert order["order"] == await client.get(f"/api/v1/orders/{placed['id']}")


# Faults


async def test_a_gap_shows_in_the_sequence_and_nowhere_else(client: Client, clock: Clock, tmp_path: Path) -> None:
    await arm(client, tmp_path / "paper", "book-gap", count=1, amount=2, symbol="BTC_USDT")
    async with connected(client) as reader:
        first = await reader.subscribe(**BTC)
        for _ in range(3):
            clock.now_s += 1
            await depth(client)
        delta = await reader.next()
        assert (delta["previous"], delta["sequence"]) == (first["sequence"] + 2_000_000, first["sequence"] + 3_000_000)
        book = Book(100)
        book.apply(await reader.subscribe(**BTC))
        clock.now_s += 1
        book.apply(await reader.next())


async def test_a_bad_checksum_shows_in_one_delta(client: Client, clock: Clock, tmp_path: Path) -> None:
    await arm(client, tmp_path / "paper", "bad-checksum", count=1)
    async with connected(client) as reader:
        book = Book(100)
        book.apply(await reader.subscribe(**BTC))
        clock.now_s += 1
        delta = await reader.next()
        book.apply(delta | {"checksum": delta["checksum"] ^ 1})
        clock.now_s += 1
        book.apply(await reader.next())


async def test_a_crossed_book_is_sent_and_heals_with_the_next_delta(client: Client, clock: Clock, tmp_path: Path) -> None:
    await arm(client, tmp_path / "paper", "crossed-book", count=1, amount=5)
    async with connected(client) as reader:
        book = Book(100)
        book.apply(await reader.subscribe(**BTC))
        clock.now_s += 1
        book.apply(await reader.next())
        best = model.depth(7, "BTC_USDT", NOW_S + 1).asks[0][0]
        assert (book.rows("bids")[0][0], book.rows("asks")[0][0]) == tuple(map(MARKETS["BTC_USDT"].price_text, (best + 5, best)))
        clock.now_s += 1
        book.apply(await reader.next())
        shown = await depth(client, limit=100)
        assert (book.rows("bids"), book.rows("asks")) == (shown["bids"], shown["asks"])


async def test_a_stalled_connection_answers_but_tells_nothing(client: Client, clock: Clock, tmp_path: Path) -> None:
    async with connected(client) as reader:
        first = await reader.subscribe(**BTC)
        await arm(client, tmp_path / "paper", "stall", count=1, seconds=10, path="/ws/v1")
        for _ in range(9):
            clock.now_s += 1
            await depth(client)
        assert (await reader.ask("ping"))["op"] == "pong"
        assert not reader.data
        async with connected(client) as other:
            assert (await other.subscribe(**BTC))["sequence"] == first["sequence"] + 9_000_000
        clock.now_s += 2
        delta = await reader.next()
        assert (delta["previous"], delta["sequence"]) == (first["sequence"] + 9_000_000, first["sequence"] + 11_000_000)


async def test_a_slow_socket_tells_late_but_in_order(client: Client, clock: Clock, tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with connected(client) as reader:
        book = Book(100)
        book.apply(await reader.subscribe(**BTC))
        await arm(client, tmp_path / "paper", "slow-socket", seconds=0.3)
        clock.now_s += 1
        await depth(client)
        begun_s = loop.time()
        clock.now_s += 1
        book.apply(await reader.next())
        book.apply(await reader.next())
        assert 0.25 < loop.time() - begun_s < 2


async def test_a_cut_socket_ends_without_a_close_frame(client: Client, clock: Clock, tmp_path: Path) -> None:
    async with connected(client) as reader, connected(client) as other:
        await reader.subscribe(**BTC)
        await other.subscribe(channel="ticker", symbol="BTC_USDT")
        await arm(client, tmp_path / "paper", "socket-cut", count=1, path="depth")
        clock.now_s += 1
        assert await reader.read() == 1006
        assert (await other.next())["channel"] == "ticker"


async def test_a_stale_snapshot_is_the_book_of_then(client: Client, clock: Clock, tmp_path: Path) -> None:
    then = await depth(client, limit=100)
    clock.now_s += 5
    await depth(client)
    await arm(client, tmp_path / "paper", "stale-snapshot", count=1, seconds=5)
    async with connected(client) as reader:
        book = Book(100)
        snapshot = await reader.subscribe(**BTC)
        book.apply(snapshot)
        assert {name: snapshot[name] for name in then} == then
        clock.now_s += 1
        assert (await reader.next())["previous"] == then["sequence"] + 5_000_000


# Many updates a second


async def test_a_restless_book_changes_within_the_second_and_rest_agrees(tmp_path: Path, clock: Clock) -> None:
    async with exchange(tmp_path, clock, book_interval_s=0.1) as client, connected(client) as reader:
        book = Book(200)
        book.apply(await reader.subscribe(**BTC, levels=200))
        prices = [[row[0] for row in book.rows(side)] for side in ("asks", "bids")]
        for step in range(1, 10):
            clock.now_s = NOW_S + step / 10 + 0.01
            book.apply(await reader.next())
            own = model.depth(7, "BTC_USDT", NOW_S, step * 100)
            assert [row[1] for row in book.rows("asks")] == [MARKETS["BTC_USDT"].amount_text(lots) for _, lots in own.asks]
            assert [[row[0] for row in book.rows(side)] for side in ("asks", "bids")] == prices
            assert book.sequence == NOW_S * 1_000_000 + step * 100
        shown = await depth(client)
        assert (book.rows("asks"), book.rows("bids")) == (shown["asks"], shown["bids"])
        then = await client.get(f"/api/v1/history/depth?symbol=BTC_USDT&time={NOW_S * 1000 + 499}&limit=50", signed=False)
        own = model.depth(7, "BTC_USDT", NOW_S, 400)
        assert [row[1] for row in then["bids"]] == [MARKETS["BTC_USDT"].amount_text(lots) for _, lots in own.bids[:50]]
        assert (then["since"], then["until"], then["sequence"]) == (NOW_S * 1000 + 400, NOW_S * 1000 + 500, NOW_S * 1_000_000 + 400)


async def test_what_was_taken_whole_stays_away_for_its_second(tmp_path: Path, clock: Clock) -> None:
    def grows(second: int) -> bool:
        first, *later = (model.depth(7, "BTC_USDT", second, step * 100).asks[0][1] for step in range(9))
        return max(later) > first + 7

    clock.now_s = second = next(second for second in range(NOW_S, NOW_S + 100) if grows(second))
    async with exchange(tmp_path, clock, book_interval_s=0.1) as client:
        market, (price, lots) = MARKETS["BTC_USDT"], model.depth(7, "BTC_USDT", second).asks[0]
        await client.order("BTC_USDT", "buy", type="limit", price=market.price_text(price), amount=market.amount_text(lots + 7))
        for step in range(1, 10):
            clock.now_s = second + step / 10 + 0.01
            shown = await depth(client)
            assert shown["bids"][0] == [market.price_text(price), market.amount_text(7)]
            assert float(shown["asks"][0][0]) > float(shown["bids"][0][0])
