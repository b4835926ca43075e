"""How a reply is made and sent, and what an armed fault makes of it."""

import asyncio
import math
import select
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from workers.venues.paper.errors import Code, Refused
from workers.venues.paper.faults import Encounter, Fault

HTML = "<html>\r\n<head><title>{title}</title></head>\r\n<body><center><h1>{title}</h1></center><hr></body>\r\n</html>\r\n"

REFUSALS = {
    "maintenance": (Code.MAINTENANCE, "the exchange is under maintenance"),
    "rate-limit": (Code.TOO_MANY_REQUESTS, "too many requests"),
    "ban": (Code.BANNED, "banned for going on after too many requests"),
}
"""Faults that are told as the exchange's own refusals."""

NOTHING = {"id": "0", "status": "open"}
"""What a truncated reply is cut from where nothing was executed."""

GONE = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR | select.POLLNVAL


@dataclass(slots=True)
class Reply:
    """A reply on its way out. status, code: what it says, None where it says no such thing; entry: its line of the ledger."""

    response: web.Response
    status: int | None
    code: int | None
    dropped: bool = False
    delay_s: float = 0.0
    entry: int | None = field(default=None)


def served(document: object, headers: Mapping[str, str]) -> Reply:
    return Reply(_json(document, 200, headers), 200, 0)


def refused(refusal: Refused, headers: Mapping[str, str]) -> Reply:
    if refusal.retry_after_s is not None:
        headers = {**headers, "Retry-After": str(refusal.retry_after_s)}
    document = {"code": int(refusal.code), "message": refusal.message}
    return Reply(_json(document, refusal.status, headers), refusal.status, int(refusal.code))


def stopped(met: Encounter) -> Reply | None:
    """What a fault answers instead of the exchange, if one does. Raises Refused for those that are told as refusals."""
    fault = met.stops()
    if fault is None:
        return None
    if fault.kind in REFUSALS:
        code, message = REFUSALS[fault.kind]
        raise Refused(code, message, retry_after_s=max(1, math.ceil(fault.seconds if fault.left_s is None else fault.left_s)))
    return _spoilt(fault, NOTHING, {})


def told(document: object, headers: Mapping[str, str], met: Encounter) -> Reply:
    """The reply to what was executed, as the faults leave it."""
    fault = met.spoils(has_id=isinstance(document, dict) and "id" in document)
    reply = _spoilt(fault, document, headers) if fault else served(document, headers)
    if not reply.dropped and (late := met.take("late-reply")):
        reply.delay_s = late.seconds
    return reply


def stale(document: object, since_ms: int) -> object:
    """A read of orders that has not seen those placed after since_ms yet. Raises Refused(ORDER_NOT_FOUND)."""

    def young(row: Any) -> bool:
        return isinstance(row, dict) and "client_order_id" in row and row["time"] > since_ms

    if isinstance(document, list):
        return [row for row in document if not young(row)]
    if young(document):
        raise Refused(Code.ORDER_NOT_FOUND, "no order with this id")
    return document


async def send(request: web.BaseRequest, reply: Reply) -> bool | None:
    """Send a reply, or close the connection where none is to be sent; say whether it was delivered, None where that is not known.

    True: the kernel took every byte of it for a connection that the other end had not closed a moment before.
    """
    if reply.delay_s:
        await asyncio.sleep(reply.delay_s)
    transport = request.transport
    if transport is None or transport.is_closing():
        return False
    if reply.dropped or gone(transport):
        transport.abort()
        return False
    # From here on drain() waits until the kernel has it all, which is at once for anything that fits its buffer.
    transport.set_write_buffer_limits(high=0)
    try:
        await reply.response.prepare(request)
        await reply.response.write_eof()
    except ConnectionError:
        return False
    return None if request.transport is None or transport.is_closing() else True


def _spoilt(fault: Fault, document: object, headers: Mapping[str, str]) -> Reply:
    match fault.kind:
        case "no-id" if isinstance(document, dict):
            return served({name: value for name, value in document.items() if name != "id"}, headers)
        case "http-503":
            return Reply(web.Response(text="Service Unavailable\n", status=503), 503, None)
        case "http-502-html":
            return Reply(_html("502 Bad Gateway", 502), 502, None)
        case "html-200":
            return Reply(_html("Please wait", 200), 200, None)
        case "truncated-json":
            whole = msgspec.json.encode(document)
            return Reply(web.Response(body=whole[: len(whole) // 2], headers=headers, content_type="application/json"), 200, None)
        case _:
            return Reply(web.Response(), None, None, dropped=True)


def _json(document: object, status: int, headers: Mapping[str, str]) -> web.Response:
    return web.Response(body=msgspec.json.encode(document), status=status, headers=headers, content_type="application/json")


def _html(title: str, status: int) -> web.Response:
    return web.Response(text=HTML.format(title=title), status=status, content_type="text/html")


def gone(transport: asyncio.BaseTransport) -> bool:
    """Whether the other end has closed already, also where the event loop has not come to read it."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), GONE)
    return bool(poll.poll(0))
