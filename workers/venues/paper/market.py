"""The market's own price, trades and book: a pure function of (seed, symbol, time), the same in every process.

A tree from the top down: a week's open comes from smooth noise over the week's index; each bar is then split into its children
(week -> 7 days -> 24 hours -> 4 quarters -> 15 minutes -> 60 seconds) by a hashed bridge that keeps open, high, low, close and volume
exactly. So any past can be asked for at once, and adding up minutes gives the hour by construction. The market moves once a second.

Prices are whole ticks, volumes whole lots. Randomness is SHAKE-256 of (seed, what for, symbol, place): stable over processes and versions.
"""

from collections.abc import Iterator
from functools import lru_cache
from hashlib import shake_256
from itertools import pairwise
from math import isqrt
from struct import unpack
from typing import NamedTuple

from workers.venues.paper.markets import MARKETS, Market
from workers.venues.paper.money import UNIT

SPANS = (604_800, 86_400, 3_600, 900, 60, 1)
"""Seconds of a bar on each level of the tree. Weeks are counted from 1970-01-01, a Thursday."""

_FAMILY = (1, *(above // below for above, below in pairwise(SPANS)))
"""How many bars of each level one bar of the level above has; a week has none above."""

LEVELS = 200
"""Levels on each side of the market's own book."""

RESTLESS = 8
"""Levels a side whose size is drawn anew at each step within a second, where an exchange takes steps, out of the best RESTLESS_AMONG."""

RESTLESS_AMONG = 40

NEVER = 1 << 62
"""Ticks that no price reaches."""

PRINTS = 4
"""Most trades the market prints in a second; a second's volume is at least as many lots."""

_NOISE = ((128, 200_000), (32, 120_000), (8, 80_000), (2, 50_000))
"""Octaves of a week's open: (period in weeks, amplitude in millionths of the usual price); together they stay within 45 %."""

_WEEK_WICK = 40_000
"""How far a week's high and low may pass its open and close, in millionths."""


class Bar(NamedTuple):
    open: int
    high: int
    low: int
    close: int
    volume: int


class Print(NamedTuple):
    """One trade of the market's own tape; number counts within the second."""

    second: int
    number: int
    price: int
    lots: int
    side: str


class Depth(NamedTuple):
    """The market's own book in one second: (price, lots), best first."""

    asks: tuple[tuple[int, int], ...]
    bids: tuple[tuple[int, int], ...]


def span(seed: int, symbol: str, start_s: int, end_s: int) -> Bar:
    """The bar over [start_s, end_s), which must not be empty."""
    bars = list(_pieces(seed, symbol, 0, start_s, end_s))
    return Bar(bars[0].open, max(b.high for b in bars), min(b.low for b in bars), bars[-1].close, sum(b.volume for b in bars))


def candles(seed: int, symbol: str, *, interval_s: int, limit: int, end_ms: int, now_s: int) -> list[tuple[int, Bar]]:
    """The last `limit` bars that start before end_ms and not after now: (start in ms, bar), ascending.

    The bar of now ends with this second.
    """
    last = min((end_ms - 1) // 1000, now_s) // interval_s * interval_s
    first = max(0, last - (limit - 1) * interval_s)
    return [(at * 1000, span(seed, symbol, at, min(at + interval_s, now_s + 1))) for at in range(first, last + 1, interval_s)]


def second(seed: int, symbol: str, second_s: int) -> Bar:
    """The bar of one second; its close is the price that the second's book stands around."""
    return _node(seed, symbol, len(SPANS) - 1, second_s)


def reaching(seed: int, symbol: str, start_s: int, end_s: int, *, down: int, up: int) -> int | None:
    """The first second of [start_s, end_s) that trades at `down` or lower, or at `up` or higher; None where there is none.

    Looks into no bar that stays between the two, so weeks cost no more than the few seconds that matter.
    """
    return _reaching(seed, symbol, 0, start_s, end_s, down, up)


def prints(seed: int, symbol: str, second_s: int) -> list[Print]:
    """The second's trades: they touch its open, high, low and close, and their amounts add up to its volume."""
    bar = second(seed, symbol, second_s)
    draw = _draw(seed, "print", symbol, second_s, PRINTS + 2)
    turns = (bar.open, bar.high, bar.low, bar.close) if draw[-1] & 1 else (bar.open, bar.low, bar.high, bar.close)
    prices = [price for i, price in enumerate(turns) if i == 0 or price != turns[i - 1]]
    amounts = _share(bar.volume, draw[: len(prices)], 1)
    before = prices[1] if len(prices) > 1 and draw[-2] & 1 else prices[0]
    tape = []
    for number, (price, lots) in enumerate(zip(prices, amounts, strict=True)):
        rising = price > before or (price == before and draw[-2] & 2)
        tape.append(Print(second_s, number, price, lots, "buy" if rising else "sell"))
        before = price
    return tape


def tape(seed: int, symbol: str, limit: int, now_s: int) -> list[Print]:
    """The last `limit` trades until now, ascending."""
    newest: list[Print] = []
    at = now_s
    while len(newest) < limit and at >= 0:
        newest.extend(reversed(prints(seed, symbol, at)))
        at -= 1
    return newest[limit - 1 :: -1] if len(newest) >= limit else newest[::-1]


def depth(seed: int, symbol: str, second_s: int, step_ms: int = 0) -> Depth:
    """The market's own book: gaps and sizes grow with the distance, two to three percent of the price a side.

    step_ms: how far into the second the present step began; above 0 some sizes differ from those on the second, prices never.
    """
    return _stepped(seed, symbol, second_s, step_ms) if step_ms else _depth(seed, symbol, second_s)


@lru_cache(maxsize=64)
def _stepped(seed: int, symbol: str, second_s: int, step_ms: int) -> Depth:
    draw = _draw(seed, "step", symbol, second_s * 1000 + step_ms, 4 * RESTLESS)

    def side(levels: tuple[tuple[int, int], ...], places: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        changed = list(levels)
        for number, size in zip(places, sizes, strict=True):
            price, lots = levels[place := number % min(RESTLESS_AMONG, len(levels))]
            changed[place] = (price, 1 + lots * size // 32768)
        return tuple(changed)

    whole, (a, b, c) = _depth(seed, symbol, second_s), (RESTLESS, 2 * RESTLESS, 3 * RESTLESS)
    return Depth(asks=side(whole.asks, draw[:a], draw[a:b]), bids=side(whole.bids, draw[b:c], draw[c:]))


@lru_cache(maxsize=64)
def _depth(seed: int, symbol: str, second_s: int) -> Depth:
    market, middle = MARKETS[symbol], second(seed, symbol, second_s).close
    draw = _draw(seed, "depth", symbol, second_s, 4 * LEVELS + 2)
    lots_a_second = _weekly_lots(market) // SPANS[0]
    below, above = draw[-2] % 2, 1 + draw[-1] % 2

    def side(price: int, step: int, gaps: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        levels = []
        for i, (gap, size) in enumerate(zip(gaps, sizes, strict=True)):
            levels.append((price, 1 + lots_a_second * size * (i + 20) // (20 << 16)))
            price += step * (1 + middle * i * (32768 + gap) // (800_000 << 16))
        return tuple(level for level in levels if level[0] > 0)

    return Depth(
        asks=side(middle + above, 1, draw[:LEVELS], draw[LEVELS : 2 * LEVELS]),
        bids=side(middle - below, -1, draw[2 * LEVELS : 3 * LEVELS], draw[3 * LEVELS : 4 * LEVELS]),
    )


def noise(seed: int, purpose: str, symbol: str, period: int, place: int) -> int:
    """Value noise in [-32768, 32767]: hashed at multiples of the period, a smooth step (3t^2 - 2t^3) between them."""
    cell, within = divmod(place, period)
    left, right = _lattice(seed, purpose, symbol, period, cell), _lattice(seed, purpose, symbol, period, cell + 1)
    return left + (right - left) * within * within * (3 * period - 2 * within) // (period * period * period)


def _draw(seed: int, purpose: str, symbol: str, place: int, count: int) -> tuple[int, ...]:
    """`count` numbers of 16 bits."""
    return unpack(f"<{count}H", shake_256(f"{seed}|{purpose}|{symbol}|{place}".encode()).digest(2 * count))


def _share(total: int, weights: tuple[int, ...], least: int) -> list[int]:
    """Split total by weight into parts that add up to it exactly, each at least `least`."""
    spare, whole = total - least * len(weights), sum(weights) + len(weights)
    parts, reached, given = [], 0, 0
    for weight in weights:
        reached += weight + 1
        upto = spare * reached // whole
        parts.append(least + upto - given)
        given = upto
    return parts


def _pieces(seed: int, symbol: str, level: int, start_s: int, end_s: int) -> Iterator[Bar]:
    """The largest whole bars that cover [start_s, end_s), in time order."""
    size = SPANS[level]
    at = start_s
    while at < end_s:
        index = at // size
        if at == index * size and at + size <= end_s:
            # All whole bars that one parent has here are taken at once.
            upto = min(end_s // size, (index // _FAMILY[level] + 1) * _FAMILY[level])
            yield from _nodes(seed, symbol, level, index, upto)
            at = upto * size
        else:
            until = min(end_s, (index + 1) * size)
            yield from _pieces(seed, symbol, level + 1, at, until)
            at = until


def _nodes(seed: int, symbol: str, level: int, start: int, end: int) -> tuple[Bar, ...]:
    """Neighbouring bars of one parent."""
    if level == 0:
        return tuple(_week(seed, symbol, index) for index in range(start, end))
    parent, place = divmod(start, _FAMILY[level])
    return _children(seed, symbol, level - 1, parent)[place : place + end - start]


def _reaching(seed: int, symbol: str, level: int, start_s: int, end_s: int, down: int, up: int) -> int | None:
    size = SPANS[level]
    for index in range(start_s // size, -(-end_s // size)):
        bar = _node(seed, symbol, level, index)
        if down < bar.low and bar.high < up:
            continue
        if size == 1:
            return index
        found = _reaching(seed, symbol, level + 1, max(start_s, index * size), min(end_s, (index + 1) * size), down, up)
        if found is not None:
            return found
    return None


def _node(seed: int, symbol: str, level: int, index: int) -> Bar:
    if level == 0:
        return _week(seed, symbol, index)
    parent, place = divmod(index, _FAMILY[level])
    return _children(seed, symbol, level - 1, parent)[place]


@lru_cache(maxsize=1024)
def _children(seed: int, symbol: str, level: int, index: int) -> tuple[Bar, ...]:
    """The bars of the next level inside one bar; about 15 kB a cached answer."""
    bar, count, child_s = _node(seed, symbol, level, index), SPANS[level] // SPANS[level + 1], SPANS[level + 1]
    market = MARKETS[symbol]
    copies = len(market.follows) == 1
    draw = _draw(seed, f"split{level}", symbol, index, count if copies else 4 * count)
    volumes = _share(bar.volume, draw[:count], PRINTS * child_s)
    if copies:
        ratio = market.tick // MARKETS[market.follows[0]].tick
        copied = _children(seed, market.follows[0], level, index)
        return tuple(
            Bar(b.open // ratio, b.high // ratio, b.low // ratio, b.close // ratio, lots) for b, lots in zip(copied, volumes, strict=True)
        )
    knots = _bridge(bar, draw[count : 2 * count])
    reach = bar.high - bar.low
    highs = [min(bar.high, max(knots[i], knots[i + 1]) + reach * up // (8 << 16)) for i, up in enumerate(draw[2 * count : 3 * count])]
    lows = [max(bar.low, min(knots[i], knots[i + 1]) - reach * down // (8 << 16)) for i, down in enumerate(draw[3 * count :])]
    highs[highs.index(max(highs))] = bar.high
    lows[lows.index(min(lows))] = bar.low
    return tuple(map(Bar, knots, highs, lows, knots[1:], volumes))


def _bridge(bar: Bar, draw: tuple[int, ...]) -> list[int]:
    """A walk of len(draw) steps from open to close that stays within low and high.

    A plain random bridge first; then what it passes above the higher of open and close is stretched to end at the high, and likewise below:
    a monotone map, so the shape stays.
    """
    count, (start, high, low, end, _) = len(draw), bar
    steps = [0]
    for number in draw:
        steps.append(steps[-1] + number - 32768)
    drift, scale = steps[-1], 24_000 * isqrt(count) * count
    raw = [start + (end - start) * i // count + (step * count - drift * i) * (high - low) // scale for i, step in enumerate(steps)]
    top, bottom = max(start, end), min(start, end)
    above, below = max(raw) - top, bottom - min(raw)

    def stretched(price: int) -> int:
        if price > top:
            return top + (price - top) * (high - top) // above
        if price < bottom:
            return bottom - (bottom - price) * (bottom - low) // below
        return price

    return [stretched(price) for price in raw]


def _week(seed: int, symbol: str, week: int) -> Bar:
    market = MARKETS[symbol]
    (busy,) = _draw(seed, "busy", symbol, week, 1)
    volume = _weekly_lots(market) * (32768 + busy) >> 16
    if len(market.follows) == 1:
        ratio = market.tick // MARKETS[market.follows[0]].tick
        copied = _week(seed, market.follows[0], week)
        return Bar(copied.open // ratio, copied.high // ratio, copied.low // ratio, copied.close // ratio, volume)
    start, end = _week_open(seed, symbol, week), _week_open(seed, symbol, week + 1)
    up, down = _draw(seed, "week", symbol, week, 2)
    wick = max(start, end) * _WEEK_WICK // 1_000_000
    return Bar(start, max(start, end) + (wick * up >> 16), min(start, end) - (wick * down >> 16), end, volume)


def _weekly_lots(market: Market) -> int:
    return market.week_volume * UNIT // market.lot


@lru_cache(maxsize=4096)
def _week_open(seed: int, symbol: str, week: int) -> int:
    """In ticks. A cross begins each week where its two legs meet; within the week it walks alone."""
    market = MARKETS[symbol]
    if len(market.follows) == 2:
        over, under = (MARKETS[leg] for leg in market.follows)
        value = _week_open(seed, over.symbol, week) * over.tick * UNIT // (_week_open(seed, under.symbol, week) * under.tick)
        return value // market.tick
    millionths = 1_000_000 + sum(noise(seed, "noise", symbol, period, week) * amplitude >> 15 for period, amplitude in _NOISE)
    return market.usual_price * millionths // 1_000_000


@lru_cache(maxsize=4096)
def _lattice(seed: int, purpose: str, symbol: str, period: int, cell: int) -> int:
    return _draw(seed, f"{purpose}{period}", symbol, cell, 1)[0] - 32768
