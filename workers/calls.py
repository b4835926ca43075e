"""From a frame on the bus to a function of a venue, and back: the one boundary that always replies."""

import asyncio
import logging
import time
import traceback
from collections.abc import Mapping
from typing import Any, cast

import msgspec
from msgspec import Raw, Struct

from bus import subjects
from bus.config import Venue as Settings
from bus.connection import Bus
from bus.errors import BadRequest, BusDown, BusError, Expired, Internal, TimedOut, outcome_unknown
from bus.messages import (
    Api,
    ContractType,
    Direction,
    Failure,
    MarginLevel,
    OrderRef,
    Positions,
    Reply,
    Request,
    Robot,
    Spans,
    Success,
    Ticker,
    Trade,
    WithRaw,
    encode,
)
from bus.methods import DECODERS, METHODS, Method, host_name, is_write
from bus.metrics import Metrics
from bus.seal import Opened, Opener
from bus.sessions import Session, Sessions, in_contract
from workers.http import Call, Http
from workers.orders import Orders, Send
from workers.venues import Contracts, Venue

log = logging.getLogger(__name__)

# What a host's Buy or Sell means after SetDirection (fmz-protocol B.1): direction -> (the side it goes with, offset)
DIRECTIONS = {"buy": ("buy", "open"), "closesell": ("buy", "close"), "sell": ("sell", "open"), "closebuy": ("sell", "close")}


class Calls:
    """venues: by the name hosts use. orders: None where writes go straight to the exchange, to judge a venue by itself."""

    def __init__(
        self,
        bus: Bus,
        opener: Opener,
        sessions: Sessions,
        venues: Mapping[str, Venue],
        http: Http,
        metrics: Metrics,
        orders: Orders | None = None,
    ) -> None:
        self._bus = bus
        self._opener = opener
        self._sessions = sessions
        self._venues = venues
        self._http = http
        self._metrics = metrics
        self._orders = orders

    async def answer(self, data: bytes) -> bytes:
        """Turn one frame into one encoded reply. Raises nothing but CancelledError, once it is cancelled."""
        started = time.perf_counter()
        request: Request | None = None
        call: Call | None = None
        spans: Spans | None = None
        reply: Reply
        try:
            request, opened = self._opener.open(data)
            method, params = _decode(request)
            call = self._call(request, opened, method, data, write=is_write(method, params))
            try:
                async with asyncio.timeout(call.left_s()):
                    result = await self._run(method, call, params, resolved=request.resolved)
            except TimeoutError as e:
                # An order that was cut off before it was sent may be the repetition of one that was.
                call.sent = call.sent or (method.places and self._orders is not None)
                raise call.failed(f"no answer from {call.exchange} in time", TimedOut) from e
            reply = _success(
                result,
                tell=self._bus.process if method.places and self._orders is not None else "",
                robot=self._robot(method, call, params, resolved=request.resolved),
            )
        except BusError as e:
            reply = Failure(code=e.code, message=call.redacted(str(e)) if call else str(e))
        except (Exception, asyncio.CancelledError, SystemExit) as e:
            if isinstance(e, asyncio.CancelledError) and _is_cancelled():
                raise
            log.error("unhandled error", extra={"fields": _about(request) | _traceback(call)})  # it stays here, the host gets one line
            reply = Failure.of(_internal(call))
        elapsed = time.perf_counter() - started
        if request is not None and request.trace:
            spans = Spans(round(elapsed * 1000, 3), round(call.venue_s * 1000, 3) if call else 0.0)
            reply = msgspec.structs.replace(reply, spans=spans)
        self._count(request, call, reply, elapsed)
        return encode(reply)

    def _call(self, request: Request, opened: Opened, method: Method, frame: bytes, *, write: bool) -> Call:
        call = Call(
            self._http,
            exchange=request.exchange,
            path=request.path,
            credentials=opened.credentials,
            account=opened.account,
            client_order_id=request.idempotency_key if method.places else "",
            expires_at_ms=request.expires_at_ms,
            now_ms=self._bus.now_ms,
            write=write,
            key=request.idempotency_key,
            asked_ms=request.asked_ms,
            frame=frame,
        )
        if call.left_s() <= 0:
            raise Expired("the request reached a worker too late; nothing was sent")
        return call

    async def _run(self, method: Method, call: Call, params: Struct, *, resolved: bool) -> Any:
        venue = self._venues.get(call.exchange)
        if venue is None:
            raise BadRequest(f"this worker does not serve {call.exchange}")
        if method.local and venue.contracts:
            return await self._remember(venue, call, params)
        function = getattr(venue, method.function, None)
        if function is None or (method.io is not None and not venue.contracts):
            raise BadRequest(f"{host_name(method)} not support")
        symbol = getattr(params, "symbol", "")
        if venue.contracts and not (resolved and method.name in venue.public):
            params = await self._in_session(method, call, params)
        elif isinstance(params, Trade) and params.side not in ("buy", "sell"):
            raise BadRequest(f"type: expected buy or sell, got {params.side}: {call.exchange} trades no contracts")

        async def send(params: Any) -> Any:
            try:
                return await function(call, params)
            except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as e:
                log.error("unreadable answer", extra={"fields": {"exchange": call.exchange, "method": method.name} | _traceback(call)})
                raise call.unclear("in another format than its venue expects, see the worker's log") from e

        if call.write and self._orders is not None:
            result = await self._written(self._orders, venue, call, params, send)
        else:
            result = await send(params)
        return msgspec.structs.replace(result, symbol=symbol) if isinstance(result, Ticker) else result

    @staticmethod
    async def _written(orders: Orders, venue: Venue, call: Call, params: Struct, send: Send) -> Any:
        """A write goes through the journal; whatever a venue raises becomes an outcome there."""

        async def told(params: Any) -> Any:
            try:
                return await send(params)
            except BusError as e:
                raise type(e)(call.redacted(str(e))) from e  # what the exchange said goes into the journal
            except (Exception, asyncio.CancelledError, SystemExit) as e:
                if isinstance(e, asyncio.CancelledError) and _is_cancelled():
                    raise
                log.error("unhandled error", extra={"fields": {"exchange": call.exchange, "idempotency_key": call.key} | _traceback(call)})
                raise _internal(call) from e

        match params:
            case Trade():
                return await orders.place(venue, call, params, told)
            case OrderRef():
                return await orders.cancel(call, params, told)
            case Api():
                return await orders.once(call, params, told)
        raise Internal(f"no such write: {type(params).__name__}")

    async def _remember(self, venue: Venue, call: Call, params: Struct) -> Any:
        """io codes 0 to 2: the protocol leaves it to us to keep them."""
        match params:
            case MarginLevel():
                if params.symbol:
                    await cast("Contracts", venue).margin_level(call, params)
                await self._sessions.change(call.path, call.account, level=params.level)
                return True
            case Direction():
                await self._sessions.change(call.path, call.account, direction=params.direction)
                return True
            case ContractType():
                await self._sessions.change(call.path, call.account, contract=params.contract)
                return {"InstrumentID": params.contract, "instrument": params.contract}
        raise Internal(f"no such state: {type(params).__name__}")

    async def _in_session(self, method: Method, call: Call, params: Struct) -> Struct:
        """Read the session once and apply it: the contract behind a bare symbol, the direction behind a plain buy or sell."""
        symbol = getattr(params, "symbol", "")
        if isinstance(params, Positions) or (method.name != "trade" and (not symbol or "." in symbol)):
            return params  # an explicit contract wins over the state, positions are asked for by contract, nothing else of it matters here
        try:
            call.session = await self._sessions.read(call.path, call.account)
        except BusDown:
            if method.name != "cancel":
                raise
            return params  # a cancel always goes: at worst the exchange does not find the order there
        if isinstance(params, Trade):
            return directed(params, call.session)
        return msgspec.structs.replace(params, symbol=in_contract(symbol, call.session.contract))

    def _robot(self, method: Method, call: Call, params: Struct, *, resolved: bool) -> Robot | None:
        """Which futures state decided what a public read is about."""
        venue = self._venues[call.exchange]
        bare = "." not in getattr(params, "symbol", ".")
        if not (venue.contracts and method.name in venue.public and bare) or resolved:
            return None
        return Robot(subjects.session_key(call.path, call.account), call.session.contract)

    def _count(self, request: Request | None, call: Call | None, reply: Reply, elapsed: float) -> None:
        outcome = reply.code if isinstance(reply, Failure) else "ok"
        known = request is not None and request.method in METHODS and request.exchange in self._venues
        exchange, method = (request.exchange, request.method) if request is not None and known else ("unknown", "unknown")
        self._metrics.answered(exchange, method, outcome, elapsed)
        if call is not None and call.write:
            log.info(
                "write",
                extra={"fields": _about(request) | {"account": call.account, "outcome": outcome, "elapsed_ms": round(elapsed * 1000, 1)}},
            )


def directed(params: Trade, session: Session) -> Trade:
    """The order in plain terms, side buy or sell and an offset. Raises BadRequest where side and direction contradict each other."""
    symbol = in_contract(params.symbol, session.contract)
    if "." not in symbol:
        if params.side not in ("buy", "sell"):
            raise BadRequest(f"type: {params.side} needs a contract: call SetContractType first, or write the symbol as {symbol}.swap")
        return params
    if params.side in ("closebuy", "closesell"):
        side, offset = DIRECTIONS[params.side]
    elif session.direction:
        side, offset = DIRECTIONS[session.direction]
        if side != params.side:
            raise BadRequest(f"direction is {session.direction}, invalid order type {params.side.capitalize()}")
    elif "." in params.symbol:
        side, offset = DIRECTIONS[params.side]  # CreateOrder("BTC_USDT.swap", "buy", ...) says all there is to say
    else:
        raise BadRequest("direction not set: call SetDirection first")
    return msgspec.structs.replace(params, symbol=symbol, side=side, offset=offset)


def _decode(request: Request) -> tuple[Method, Struct]:
    method = METHODS.get(request.method)
    if method is None:
        raise BadRequest(f"{request.method[:64]} not support")
    try:
        return method, DECODERS[method.name].decode(request.params)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise BadRequest(f"params: {e}") from e


def _success(result: Any, *, tell: str, robot: Robot | None) -> Success:
    if isinstance(result, WithRaw):
        return Success(data=Raw(encode(result.data)), raw=Raw(encode(result.raw)), tell=tell, robot=robot)
    return Success(data=result if isinstance(result, Raw) else Raw(encode(result)), tell=tell, robot=robot)


def _traceback(call: Call | None) -> dict[str, str]:
    """The exception that is being handled, as a log field: a venue's own may quote the keys."""
    text = traceback.format_exc()
    return {"traceback": call.redacted(text) if call else text}


def _is_cancelled() -> bool:
    """Whether somebody stops this very task; a venue may also raise CancelledError by itself, and then its caller is answered."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _internal(call: Call | None) -> BusError:
    if call is not None and call.write and call.sent:
        return outcome_unknown("internal error after the request was sent, see the worker's log", call.client_order_id)
    return Internal("internal error, see the worker's log")


def _about(request: Request | None) -> dict[str, Any]:
    return {"exchange": request.exchange, "method": request.method, "idempotency_key": request.idempotency_key} if request else {}


def timeouts(venues: Mapping[str, Settings]) -> dict[str, float]:
    """The exchanges whose calls have a time limit of their own."""
    return {name: settings.timeout_s for name, settings in venues.items() if settings.timeout_s is not None}
