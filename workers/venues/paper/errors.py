"""Why the exchange refuses: one table of codes, one exception.

A code is never renamed and never used again for something else; the README prints this table. A refusal is final: what was refused was not
executed, neither in whole nor in part.
"""

from enum import IntEnum
from http import HTTPStatus


class Code(IntEnum):
    """The `code` of an error reply; STATUS has the HTTP status that goes with it."""

    INTERNAL = 1000
    MISSING_AUTH = 1001
    BAD_SIGNATURE = 1002
    TIMESTAMP = 1003
    EXPIRED = 1004
    BODY_TOO_LARGE = 1005
    BAD_BODY = 1006
    TOO_MANY_REQUESTS = 1101
    BANNED = 1102
    MAINTENANCE = 1103
    UNKNOWN_SYMBOL = 2001
    BAD_PARAMETER = 2002
    TICK_SIZE = 2003
    LOT_SIZE = 2004
    BELOW_MINIMUM = 2005
    ABOVE_MAXIMUM = 2006
    INSUFFICIENT_BALANCE = 2010
    ORDER_NOT_FOUND = 2011
    ORDER_NOT_OPEN = 2012
    DUPLICATE_CLIENT_ORDER_ID = 2013
    NO_POSITION = 2014
    LEVERAGE = 2015
    TOO_MANY_ORDERS = 2017


STATUS = {
    Code.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
    Code.MISSING_AUTH: HTTPStatus.UNAUTHORIZED,
    Code.BAD_SIGNATURE: HTTPStatus.UNAUTHORIZED,
    Code.TIMESTAMP: HTTPStatus.UNAUTHORIZED,
    Code.BODY_TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Code.TOO_MANY_REQUESTS: HTTPStatus.TOO_MANY_REQUESTS,
    Code.BANNED: HTTPStatus.IM_A_TEAPOT,
    Code.MAINTENANCE: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.ORDER_NOT_FOUND: HTTPStatus.NOT_FOUND,
    Code.ORDER_NOT_OPEN: HTTPStatus.CONFLICT,
    Code.DUPLICATE_CLIENT_ORDER_ID: HTTPStatus.CONFLICT,
}
"""HTTP status by code; a code that is not here answers 400."""

LONGEST_MESSAGE = 200


class Refused(Exception):
    """A request the exchange will not serve; nothing of it was executed.

    message: one line for a person, at most LONGEST_MESSAGE characters, since it may quote the request.
    retry_after_s: set for the rate limits, sent as the header Retry-After.
    """

    def __init__(self, code: Code, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message if len(message) <= LONGEST_MESSAGE else message[: LONGEST_MESSAGE - 3] + "..."
        self.status = int(STATUS.get(code, HTTPStatus.BAD_REQUEST))
        self.retry_after_s = retry_after_s
