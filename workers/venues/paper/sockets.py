"""The WebSocket endpoint /ws/v1: who is connected, what each follows, and how messages reach them; what they say is in channels.py.

A message is made and encoded once for all its readers. All messages go through one line that waits, like a reply, until what they tell is
on disk; from there each connection has a bounded queue of its own, and a reader too slow for it is closed.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from workers.venues.paper import auth, channels
from workers.venues.paper.accounts import Changes
from workers.venues.paper.channels import Asked, Document
from workers.venues.paper.connection import CUT, PATH, Connection, Message
from workers.venues.paper.engine import Engine
from workers.venues.paper.errors import Code, Refused
from workers.venues.paper.faults import Fault, Faults
from workers.venues.paper.history import History
from workers.venues.paper.limits import Limiter
from workers.venues.paper.quotes import View
from workers.venues.paper.store import Store

log = logging.getLogger(__name__)

LARGEST_FRAME = 64 * 1024
MOST_CONNECTIONS = 50
"""Of one address."""

MOST_SUBSCRIPTIONS = 100
"""Of one connection."""

PING_S = 15
PATIENCE_S = 30
"""How long a ping may stay unanswered."""

SILENT = 4002

MOST_IN_LINE = 10_000
"""Messages that may wait for the disk."""


@dataclass(slots=True)
class _Topic:
    channel: channels.Channel
    readers: dict[Connection, None] = field(default_factory=dict)


class Sockets:
    """All connections of an exchange. bind: gives a new key its account; settle: writes down what changed and calls changed()."""

    def __init__(
        self,
        *,
        engine: Engine,
        store: Store,
        holders: dict[str, auth.Holder],
        limiter: Limiter,
        clock: Callable[[], float],
        faults: Faults,
        history: History,
        bind: Callable[[auth.Holder, int], int],
        settle: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._store = store
        self._holders = holders
        self._limiter = limiter
        self._clock = clock
        self._faults = faults
        self._history = history
        self._bind = bind
        self._settle = settle
        self._connections: dict[Connection, None] = {}
        self._addresses: Counter[str] = Counter()
        self._topics: dict[str, dict[Asked, _Topic]] = {}
        self._owners: dict[int, dict[Connection, None]] = {}
        self._account_sequences: Counter[int] = Counter()
        self._sequences: dict[str, int] = {}
        self._gaps: Counter[str] = Counter()
        self._line: deque[tuple[asyncio.Future[Any] | None, Message, tuple[Connection, ...]]] = deque()
        self._closing = False

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve one connection until it ends. Raises Refused as long as it is not one yet."""
        address, compress = request.remote or "", channels.compression(request.query)
        ws = web.WebSocketResponse(max_msg_size=LARGEST_FRAME + 1, compress=False, autoping=False)
        transport = request.transport
        if transport is None or not ws.can_prepare(request):
            raise Refused(Code.BAD_PARAMETER, f"{PATH} is a WebSocket: expected its handshake")
        if self._addresses[address] >= MOST_CONNECTIONS:
            raise Refused(Code.TOO_MANY_REQUESTS, f"an address may have {MOST_CONNECTIONS} connections", retry_after_s=1)
        connection = Connection(ws, address=address, compress=compress, transport=transport)
        connection.pinged_s = self._clock()
        self._addresses[address] += 1
        try:
            await ws.prepare(request)
            self._connections[connection] = None
            if self._closing:
                connection.end(WSCloseCode.GOING_AWAY, "the exchange stops")
            await connection.run(self._request)
        except ConnectionError:
            pass
        except Exception:
            # Too late for a reply: what is left is to close.
            log.exception("unhandled error on a socket")
            transport.abort()
        finally:
            self._forget(connection)
        return ws

    def close(self) -> None:
        """Say goodbye to everyone; a connection that comes now gets nothing else."""
        self._closing = True
        for connection in self._connections:
            connection.end(WSCloseCode.GOING_AWAY, "the exchange stops")

    def tick(self) -> None:
        """Let the followed markets reach now, and look after the connections. The caller settles."""
        now_s = self._clock()
        for symbol in self._topics:
            self._engine.advance(symbol, int(now_s * 1000))
        for connection in self._connections:
            if connection.silent_since_s is not None and now_s - connection.silent_since_s > PATIENCE_S:
                connection.end(SILENT, f"no pong for {PATIENCE_S} s")
            # Also where the clock was set back.
            elif not 0 <= now_s - connection.pinged_s < PING_S:
                connection.pinged_s = now_s
                if connection.silent_since_s is None or connection.silent_since_s > now_s:
                    connection.silent_since_s = now_s
                connection.control(WSMsgType.PING)

    def changed(self, changes: Changes) -> None:
        """Tell everyone what has changed since the last call; what was written has been handed to the store."""
        now_ms = int(self._clock() * 1000)
        for symbol, book in self._engine.books.items():
            if book.second >= 0 and book.sequence != self._sequences.get(symbol):
                self._sequences[symbol] = book.sequence
                view = View(self._engine, symbol, now_ms)
                self._history.note(view)
                self._publish(view)
        for account, document in channels.order_updates(changes, now_ms):
            self._account_sequences[account] += 1
            if account in self._owners:
                self._send({**document, "sequence": self._account_sequences[account]}, self._owners[account])

    def _publish(self, view: View) -> None:
        topics = self._topics.get(view.symbol, {})
        trouble = self._trouble(view.symbol) if any(asked.channel == "depth" for asked in topics) else channels.FINE
        for topic in topics.values():
            for document in topic.channel.updates(view, trouble):
                self._send(document, topic.readers)

    def _trouble(self, symbol: str) -> channels.Trouble:
        if self._faults.idle and not self._gaps[symbol]:
            return channels.FINE
        if not self._gaps[symbol] and (gap := self._take("book-gap", symbol)):
            self._gaps[symbol] = max(1, int(gap.amount))
        if self._gaps[symbol]:
            self._gaps[symbol] -= 1
            return channels.Trouble(gap=True)
        crossed, bad = self._take("crossed-book", symbol), self._take("bad-checksum", symbol)
        return channels.Trouble(bad_checksum=bad is not None, crossed=max(1, int(crossed.amount)) if crossed else 0)

    def _take(self, kind: str, symbol: str) -> Fault | None:
        return self._faults.take(kind, path=f"depth {PATH}", symbol=symbol)

    def _send(self, document: Document, readers: Iterable[Connection]) -> None:
        """Send to readers as they are now, behind all that was sent before, once all that is handed to the store is on disk."""
        pending = self._store.pending
        if len(self._line) >= MOST_IN_LINE:
            self._line.clear()
            for connection in self._connections:
                connection.end(WSCloseCode.INTERNAL_ERROR, "the disk does not keep up")
        self._line.append((pending, Message(document), tuple(readers)))
        if pending is None:
            self._flush()
        else:
            pending.add_done_callback(self._flush)

    def _flush(self, _: object = None) -> None:
        while self._line and (self._line[0][0] is None or self._line[0][0].done()):
            written, message, readers = self._line.popleft()
            if written is not None and (written.cancelled() or written.exception()):
                # What could not be written must not be told; the exchange is about to end.
                self._line.clear()
                return
            for connection in readers:
                self._deliver(connection, message)

    def _deliver(self, connection: Connection, message: Message) -> None:
        if not message.path or (self._faults.idle and not connection.stalled_until_s):
            return connection.tell(message)
        take = partial(self._faults.take, path=message.path, symbol=message.symbol, key=connection.key)
        now_s = self._clock()
        if now_s < connection.stalled_until_s:
            return None
        connection.stalled_until_s = 0.0
        if stall := take("stall"):
            connection.stalled_until_s = now_s + stall.seconds
        elif take("socket-cut"):
            connection.end(CUT)
        else:
            slow = take("slow-socket")
            connection.tell(message, slow.seconds if slow else 0)
        return None

    def _request(self, connection: Connection, frame: str | None) -> None:
        """Answer one frame."""
        answer: Document = channels.head(frame or "")
        try:
            connection.count(self._clock())
            if frame is None:
                raise Refused(Code.BAD_BODY, "frame: expected text")
            wanted = channels.request(frame)
            if wanted.op == "login":
                self._login(connection, channels.login(wanted.args))
                return self._send(answer | {"code": 0}, (connection,))
            self._limiter.charge(f"address {connection.address}", max(1, len(wanted.args)), self._clock())
            if wanted.op == "ping":
                return self._send(answer | {"op": "pong", "time": int(self._clock() * 1000)}, (connection,))
            asked = [channels.asked(argument) for argument in wanted.args]
            if wanted.op == "subscribe":
                self._check(connection, asked)
                self._send(answer | {"code": 0, "args": [one.document() for one in asked]}, (connection,))
                for one in asked:
                    self._subscribe(connection, one)
                return None
            self._unsubscribe(connection, asked)
            return self._send(answer | {"code": 0, "args": [one.document() for one in asked]}, (connection,))
        except Refused as e:
            retry = {} if e.retry_after_s is None else {"retry_after": e.retry_after_s}
            return self._send(answer | {"code": int(e.code), "message": e.message} | retry, (connection,))

    def _login(self, connection: Connection, wanted: channels.Login) -> None:
        now_s = self._clock()
        try:
            holder, stamp = auth.identify(wanted.headers(), self._holders, verb="LOGIN", target=PATH, body=b"")
        except Refused:
            self._limiter.charge(f"address {connection.address}", 1, now_s)
            raise
        account = holder.account or self._bind(holder, int(now_s * 1000))
        self._limiter.charge(f"account {account}", 1, now_s)
        skew = self._faults.take("clock-skew", path=f"LOGIN {PATH}", key=holder.key)
        stamp.check(int((now_s + (skew.seconds if skew else 0)) * 1000))
        if connection.account not in (0, account):
            raise Refused(Code.BAD_PARAMETER, "this connection is logged in to another account")
        connection.account, connection.key = account, holder.key

    def _check(self, connection: Connection, asked: list[Asked]) -> None:
        if any(one.channel == "orders" for one in asked) and not connection.account:
            raise Refused(Code.MISSING_AUTH, "orders: log in first")
        if len(connection.subscriptions.keys() | {one.key for one in asked}) > MOST_SUBSCRIPTIONS:
            raise Refused(Code.BAD_PARAMETER, f"args: a connection may have {MOST_SUBSCRIPTIONS} subscriptions")

    def _subscribe(self, connection: Connection, asked: Asked) -> None:
        """Subscribe, or begin anew; the first message shows all that has happened so far."""
        if before := connection.subscriptions.pop(asked.key, None):
            self._drop(connection, before)
        connection.subscriptions[asked.key] = asked
        now_ms = int(self._clock() * 1000)
        if asked.channel == "orders":
            self._engine.advance_all(now_ms)
            self._settle()
            self._owners.setdefault(connection.account, {})[connection] = None
            sequence = self._account_sequences[connection.account]
            return self._send(channels.open_orders(self._engine, connection.account, sequence, now_ms), (connection,))
        self._engine.advance(asked.symbol, now_ms)
        self._settle()
        view, topics = View(self._engine, asked.symbol, now_ms), self._topics.setdefault(asked.symbol, {})
        if asked not in topics:
            topics[asked] = _Topic(channels.channel(asked, view))
        topics[asked].readers[connection] = None
        first = topics[asked].channel.first(view)
        if asked.channel == "depth" and (stale := self._take("stale-snapshot", asked.symbol)):
            then_ms = now_ms - int(stale.seconds * 1000)
            old = self._history.state(asked.symbol, then_ms)
            first = channels.snapshot(
                asked.symbol, levels=asked.levels, time_ms=then_ms, sequence=old.sequence, asks=old.asks, bids=old.bids
            )
        return self._send(first, (connection,))

    def _unsubscribe(self, connection: Connection, asked: list[Asked]) -> None:
        for one in asked:
            if one.key not in connection.subscriptions:
                raise Refused(Code.BAD_PARAMETER, f"args: not subscribed to {one.channel} {one.symbol}".rstrip())
        for one in asked:
            if subscribed := connection.subscriptions.pop(one.key, None):
                self._drop(connection, subscribed)

    def _drop(self, connection: Connection, asked: Asked) -> None:
        if asked.channel == "orders":
            del self._owners[connection.account][connection]
            if not self._owners[connection.account]:
                del self._owners[connection.account]
            return
        topics = self._topics[asked.symbol]
        del topics[asked].readers[connection]
        if not topics[asked].readers:
            del topics[asked]
        if not topics:
            del self._topics[asked.symbol]

    def _forget(self, connection: Connection) -> None:
        self._connections.pop(connection, None)
        for asked in connection.subscriptions.values():
            self._drop(connection, asked)
        connection.subscriptions.clear()
        self._addresses[connection.address] -= 1
        if not self._addresses[connection.address]:
            del self._addresses[connection.address]
