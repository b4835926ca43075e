"""The sockets of one exchange: opens as many as its channels need, subscribes, reads, and opens anew what ends.

What a frame tells goes on at once, with the time at which it was surely true: by its date, where the exchange's clock is known
(workers/lag.py), else when the newest ping was sent that was answered before it, for on one connection nothing overtakes. So what lay in
a socket while this process or the network stood still is never taken for new. Nothing queues here: where frames arrive faster than they
are read, they wait in the socket, and the lag shows it.
"""

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import aiohttp
import msgspec
from aiohttp import ClientWSTimeout, WSMsgType

from bus import market
from bus.lifecycle import reason, running
from bus.market import NEVER
from bus.metrics import FeedMetrics
from workers.http import LIMITED
from workers.lag import Lag
from workers.line import INFINITE, Line, State
from workers.updates import BookDelta, BookSnapshot, Channel, Refused, Update
from workers.venues import Feed

log = logging.getLogger(__name__)

CONNECT_S = 5.0
CLOSE_S = 1.0
SILENT_S = 5.0
"""A socket that is silent for so long is pinged by aiohttp, and given up half as long after."""
PING_S = 1.0
PING_PART = 0.25
"""Of the frames that an exchange allows us: pings are never more."""
MOST_PINGS = 60
"""So many are remembered that wait for an answer."""
KEEPALIVE_S = 15.0
MOST_BYTES = 16 << 20
"""Of one frame."""
SLICE_S = 0.01
"""After so long of reading without a pause all others have a turn; all sockets of an exchange share it."""
RETRY_S, RETRY_MOST_S = 0.1, 5.0
"""Before a socket is opened anew; twice as long each time."""
AGAIN_S, AGAIN_MOST_S = 0.25, 3.0
"""Before a channel is subscribed to anew; at once the first time, then twice as long each time."""
PEACE_S = 10.0
"""What went well for so long begins with the least of these again."""
HELD_MOST_S = 3600.0
"""An exchange that wants to be left alone is not believed beyond this."""
SNAPSHOT_S = 2.0
"""So long after a subscription deltas of its book that come before the snapshot are those of the subscription before."""
PACE_S = 1.05
"""Of the exchange's seconds, in which it counts our frames: some of them are held up on the way."""

Session = aiohttp.ClientSession
Socket = aiohttp.ClientWebSocketResponse[Literal[False]]


class Lost(Exception):
    """A connection ended, or makes no sense any more. The text says why, for a withdrawal."""


TRANSIENT = (aiohttp.ClientError, OSError, Lost)
"""After these a connection is opened anew; anything else ends the process."""
UNREADABLE = (ValueError, LookupError, TypeError, ArithmeticError, RecursionError, msgspec.MsgspecError)
"""What Feed.parse() makes of a stranger's bytes. decimal's errors are ArithmeticError."""


class Lines:
    """heard: called with each update in the order of the frames, and when it was surely true, monotonic. lost: with the channels of a
    connection that has ended or could not be opened; they are asked for again without being told to. Both may call what is here.

    levels: that a book should have at least.
    """

    def __init__(
        self,
        exchange: str,
        feed: Feed,
        *,
        session: Session,
        levels: int,
        lag: Lag,
        heard: Callable[[Update, float], None],
        lost: Callable[[Sequence[Channel], str], None],
        metrics: FeedMetrics,
        clock: Callable[[], float] = market.clock,
    ) -> None:
        self._exchange = exchange
        self._feed = feed
        self._session = session
        self._levels = levels
        self._lag = lag
        self._heard = heard
        self._lost = lost
        self._clock = clock
        self._frames = metrics.frames.labels(exchange)
        self._late = metrics.lag.labels(exchange)
        self._connects = metrics.connects
        self._lines: list[Line] = []
        self._at: dict[Channel, Line] = {}
        self._more = asyncio.Event()
        self._held_until_s = NEVER
        """Before this the exchange wants no handshake."""

    # ---------------------------------------------------------------- what is wanted

    def follow(self, channel: Channel) -> None:
        """Subscribe to a channel, on a connection that has room."""
        if channel in self._at:
            return
        line = next((line for line in self._lines if len(line.channels) < self._feed.per_socket), None)
        if line is None:
            line = Line()
            self._lines.append(line)
            self._more.set()
        self._at[channel] = line
        line.channels[channel] = State()
        line.changed.set()

    def leave(self, channel: Channel) -> None:
        """Nothing of the channel is heard from now on; the last one of a connection closes it."""
        line = self._at.pop(channel, None)
        if line is None:
            return
        line.drop(channel, line.channels.pop(channel))
        if not line.channels:
            self._lines.remove(line)
            if line.task is not None:
                line.task.cancel()

    def again(self, channel: Channel, why: str) -> None:
        """Unsubscribe and subscribe anew: something is missing. What waits for that already is left alone."""
        line = self._at.get(channel)
        if line is None or not ((state := line.channels[channel]).asked or state.refused):
            return
        now_s = self._clock()
        tries = 0 if now_s - state.due_s >= PEACE_S else state.tries
        state.tries, state.due_s = tries + 1, now_s + pause_s(tries, AGAIN_S, AGAIN_MOST_S)
        state.refused = False
        line.drop(channel, state)
        told = {"kind": channel.kind, "instrument": channel.instrument, "why": why, "in_s": round(state.due_s - now_s, 2)}
        log.info("subscribing again", extra={"fields": {"exchange": self._exchange} | told})

    def silent_s(self, channel: Channel) -> float:
        """How long ago a channel was subscribed to; 0 before its turn."""
        line = self._at.get(channel)
        state = line.channels[channel] if line is not None else State()
        return max(0.0, self._clock() - state.due_s) if state.asked else 0.0

    @property
    def connections(self) -> int:
        """Those that are open."""
        return sum(line.open for line in self._lines)

    @property
    def live(self) -> bool:
        """Whether every channel has an open connection."""
        return all(line.open for line in self._lines)

    # ---------------------------------------------------------------- connections

    async def run(self) -> None:
        """Own all connections until cancelled, and then close them."""
        async with asyncio.TaskGroup() as group:
            while True:
                for line in self._lines:
                    if line.task is None:
                        line.task = group.create_task(self._keep(line))
                self._more.clear()
                await self._more.wait()

    async def _keep(self, line: Line) -> None:
        """Keep one connection until cancelled."""
        tries = 0
        # Asked of the task itself: before Python 3.13 a cancel that comes together with a child's failure is lost in a TaskGroup.
        while not (line.task and line.task.cancelling()):
            await asyncio.sleep(pause_s(tries, RETRY_S, RETRY_MOST_S))
            while (held_s := self._held_until_s - self._clock()) > 0:  # noqa: ASYNC110 - a clock is waited for; it may be held once more
                await asyncio.sleep(held_s * random.uniform(1, 1.1))
            line.since_s = opened_s = self._clock()
            try:
                socket = await self._connected()
            except TRANSIENT as e:
                self._end(line, e, tries)
            else:
                opened_s = self._clock()
                await self._use(line, socket, tries)
            tries = 1 if self._clock() - opened_s >= PEACE_S else tries + 1

    async def _connected(self) -> Socket:
        url = self._feed.socket_url()
        if not url:
            raise Lost(f"{self._exchange} has no socket now")
        async with asyncio.timeout(CONNECT_S):
            return await self._session.ws_connect(
                url,
                heartbeat=SILENT_S,
                autoping=False,
                max_msg_size=MOST_BYTES,
                decode_text=False,
                timeout=ClientWSTimeout(ws_close=CLOSE_S),
            )

    async def _use(self, line: Line, socket: Socket, tries: int) -> None:
        """Read a connection until it ends, and say what is to be said."""
        self._connects.labels(self._exchange, "open").inc()
        log.info("socket open", extra={"fields": {"exchange": self._exchange, "channels": len(line.channels)}})
        line.open = True
        line.changed.set()
        try:
            async with running(self._read(line, socket)):
                await self._speak(line, socket)
        except* TRANSIENT as e:
            self._end(line, reason(e.exceptions[0]), tries)
        finally:
            self._forget(line)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):  # aiohttp's own timeout begins anew with each frame that still comes
                    await socket.close()

    def _forget(self, line: Line) -> None:
        line.open = False
        line.dropped.clear()
        line.pings.clear()
        for state in line.channels.values():
            state.asked, state.due_s = False, NEVER if state.due_s == INFINITE else state.due_s

    def _end(self, line: Line, error: BaseException, tries: int) -> None:
        """Tell at once what is not fed any more."""
        was_open = line.open
        self._forget(line)
        result, why = self._judge(error, was_open=was_open)
        self._connects.labels(self._exchange, result).inc()
        level = logging.WARNING if was_open or not tries else logging.DEBUG  # one line for an exchange that is away for long
        fields = {"exchange": self._exchange, "channels": len(line.channels), "why": why, "error": type(error).__name__}
        log.log(level, "socket lost", extra={"fields": fields})
        if line.channels:
            self._lost(list(line.channels), why)

    def _judge(self, error: BaseException, *, was_open: bool) -> tuple[str, str]:
        """-> (how it is counted, why). Notes when the exchange wants to be left alone."""
        match error:
            case Lost():
                return "lost" if was_open else "error", str(error)
            case _ if was_open:
                return "lost", f"the connection to {self._exchange} broke"
            case aiohttp.WSServerHandshakeError(status=status, headers=headers):
                if status in LIMITED:
                    wait = headers.get("Retry-After", "") if headers else ""
                    self._held_until_s = self._clock() + (min(float(wait), HELD_MOST_S) if wait.isdecimal() else RETRY_MOST_S)
                return "refused", f"{self._exchange} answered {status} to the handshake"
            case TimeoutError():
                return "timeout", f"{self._exchange} did not answer the handshake within {CONNECT_S:g} s"
        return "error", f"no connection to {self._exchange}"

    # ---------------------------------------------------------------- frames

    async def _read(self, line: Line, socket: Socket) -> None:
        """Take frames until there are no more. Raises Lost."""
        clock, rested_s = self._clock, self._clock()
        while True:
            message = await socket.receive()
            received_s = clock()
            if message.type is WSMsgType.PONG:
                line.answered(bytes(message.data))
                continue
            if message.type is WSMsgType.PING:
                await socket.pong(message.data)
                continue
            if message.type is WSMsgType.CLOSE:
                raise Lost(f"{self._exchange} closed the connection: {message.data} {str(message.extra or '')[:80]}".rstrip())
            if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                raise Lost(f"the connection to {self._exchange} broke: {message.data or socket.close_code}")
            self._frames.inc()
            try:
                updates = self._feed.parse(message.data)
            except UNREADABLE as e:
                raise Lost(f"{self._exchange} sent a frame that makes no sense: {type(e).__name__}") from e
            for update in updates:
                self._take(line, update, received_s)
            if received_s - rested_s > SLICE_S / len(self._lines or (line,)):
                await asyncio.sleep(0)  # receive() itself does not yield while it has frames
                rested_s = clock()

    def _take(self, line: Line, update: Update, received_s: float) -> None:
        state = line.channels.get(update.channel)
        if state is None or not state.asked:
            return  # left, or asked for anew: the exchange had not heard of that yet
        if isinstance(update, BookDelta) and received_s < state.snapshot_by_s:
            return
        if isinstance(update, BookSnapshot):
            state.snapshot_by_s = NEVER
        elif isinstance(update, Refused):
            state.asked, state.refused = False, True
        proven_s = line.since_s
        if update.time_ms is not None:
            dated_s = self._lag.proven_s(update.time_ms, received_s)
            self._late.observe(self._lag.late_s)
            if self._lag.calibrated(received_s):
                proven_s = dated_s
        self._heard(update, proven_s)

    async def _speak(self, line: Line, socket: Socket) -> None:
        """Subscribe, unsubscribe and keep alive, no faster than the exchange allows."""
        per_s, most = self._feed.requests_per_s, max(1, int(self._feed.requests_per_s))
        sent_s = deque([NEVER] * most, most)
        ping_s, pings = NEVER, 0
        keepalive_s = self._clock() + KEEPALIVE_S if self._feed.keepalive else INFINITE

        async def turn() -> None:
            await asyncio.sleep(max(0.0, sent_s[0] + most / per_s * PACE_S - self._clock()))

        outbox = deque[tuple[str, list[State]]]()
        while True:
            if not outbox:
                due_s = min((state.due_s for state in line.channels.values() if not (state.asked or state.refused)), default=ping_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(due_s, ping_s, keepalive_s) - self._clock()):
                        await line.changed.wait()
                await turn()  # first, so that what is wanted meanwhile goes into the same frames
            line.changed.clear()
            outbox += self._wanted(line)
            if self._clock() >= keepalive_s:
                outbox.appendleft((self._feed.keepalive, []))
                keepalive_s = self._clock() + KEEPALIVE_S
            if outbox:
                await turn()
                frame, asked = outbox.popleft()
                now_s = self._clock()
                sent_s.append(now_s)
                await socket.send_str(frame)
                for state in asked:
                    state.due_s, state.snapshot_by_s = now_s, now_s + SNAPSHOT_S
            if self._clock() >= ping_s:
                await turn()
                pings += 1
                now_s = line.pings[b"%d" % pings] = self._clock()
                sent_s.append(now_s)
                await socket.ping(b"%d" % pings)
                ping_s = now_s + max(PING_S, 1 / (PING_PART * per_s))
                if len(line.pings) > MOST_PINGS:
                    del line.pings[next(iter(line.pings))]

    def _wanted(self, line: Line) -> list[tuple[str, list[State]]]:
        """The frames that make the exchange send what is wanted now, the last one with the channels that are asked for once it is sent."""
        now_s, frames = self._clock(), list[str]()
        if line.dropped:
            frames += self._feed.unsubscribe(list(line.dropped), self._levels)
            line.dropped.clear()
        due = {channel: state for channel, state in line.channels.items() if not (state.asked or state.refused) and state.due_s <= now_s}
        if due:
            frames += self._feed.subscribe(list(due), self._levels)
        for state in due.values():
            state.asked, state.due_s, state.snapshot_by_s = True, INFINITE, INFINITE
        return [(frame, []) for frame in frames[:-1]] + [(frame, list(due.values())) for frame in frames[-1:]]


def pause_s(tries: int, least_s: float, most_s: float) -> float:
    """Before the next try: none before the first, then up to least_s, twice as long each time; jittered by up to a half."""
    return min(most_s, least_s * 2.0 ** min(tries - 1, 16)) * random.uniform(0.5, 1) if tries else 0.0


@asynccontextmanager
async def session() -> AsyncIterator[Session]:
    """For all sockets of a process: as many at once as there are, and nothing that one exchange says to another."""
    connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=60)
    async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), headers={"User-Agent": "fmzbus"}) as opened:
        yield opened
