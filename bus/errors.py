"""How a request can fail, and what became of the order.

BusError
├── BadRequest        the host's body or params are wrong; nothing was sent
├── Expired           reached a worker, or the moment of sending, too late; nothing was sent
├── Busy              too much in flight here; nothing was sent
├── NoWorker          nobody serves that exchange now; nothing was sent
├── BusDown           this process has no connection to NATS, or the journal does not answer; nothing was sent
├── JournalFull       the journal has no room for the intent; the order was not sent
├── Fenced            an equal order's outcome is unknown; nothing was sent
├── GuardRefused      a halt or a limit of ours forbids it, or cannot be known; nothing was sent
├── TimedOut          a read got no answer in time; there is no order in it
├── VenueUnavailable  the exchange cannot be reached, or answered nonsense to a read; nothing was placed
├── RateLimited       the exchange's or our own budget; nothing was placed
├── StaleData         neither cache nor exchange could give a fresh answer
├── VenueRejected     the exchange understood and refused (funds, price, key); final
├── OutcomeUnknown    sent, no answer: the order may be alive; look it up by client order id
└── Internal          a fault of ours on a read, or before anything was sent

What a host reads is `text`. FMZ strategies silence errors with the pattern SILENCED (fmz-protocol A.4), so transport, busy and
expired texts always match it, while a refusal or an order that may be alive never does, whatever words the exchange used.
"""

import re

SILENCED = re.compile(
    r"502:|503:|tcp|character|unexpected|network|timeout|WSARecv|Connect|GetAddr|no such|reset|http|received|EOF|reused", re.I
)
"""The filter strategies commonly pass to SetErrorFilter; matched without regard to case, the careful reading. Texts of ours avoid its
words where they are not meant, so that none arrives with a hyphen inside."""


class BusError(Exception):
    """Base of all that may travel to a host. `code` is on the wire and never renamed or reused."""

    code = "internal"
    prefix = ""
    silenced = False

    @property
    def text(self) -> str:
        """What the host reads, one line."""
        message = " ".join(str(self).split())[:500]
        return self.prefix + message if self.silenced else self.prefix + loud(message)


def loud(message: str) -> str:
    """Break each word that would silence the message with a hyphen: "reset by peer" -> "re-set by peer"."""
    while SILENCED.search(message):  # words may share letters: "timeoutcp" needs two hyphens
        message = SILENCED.sub(lambda match: f"{match[0][: len(match[0]) // 2]}-{match[0][len(match[0]) // 2 :]}", message)
    return message


class BadRequest(BusError):
    code = "bad_request"


class Expired(BusError):
    code, prefix, silenced = "expired", "timeout: ", True


class Busy(BusError):
    code, prefix, silenced = "busy", "network busy: ", True


class NoWorker(BusError):
    code, prefix, silenced = "no_worker", "network: ", True


class BusDown(BusError):
    code, prefix, silenced = "bus_down", "network: ", True


class JournalFull(BusError):
    code, prefix = "journal_full", "journal full: "


class Fenced(BusError):
    code, prefix = "fenced", "fenced: "


class GuardRefused(BusError):
    code = "guard_refused"


class TimedOut(BusError):
    code, prefix, silenced = "timed_out", "timeout: ", True


class VenueUnavailable(BusError):
    code, prefix, silenced = "venue_unavailable", "network: ", True


class RateLimited(BusError):
    code, prefix, silenced = "rate_limited", "network busy: ", True


class StaleData(BusError):
    code, prefix, silenced = "stale_data", "network: ", True


class VenueRejected(BusError):
    code = "venue_rejected"


class OutcomeUnknown(BusError):
    code, prefix = "outcome_unknown", "outcome unknown: "


class Internal(BusError):
    code = "internal"


ERRORS: dict[str, type[BusError]] = {error.code: error for error in BusError.__subclasses__()}


def outcome_unknown(what: str, client_order_id: str = "") -> OutcomeUnknown:
    """The one way to say it: what happened, what it means, and by what to look the order up, "" where nothing was placed by this call."""
    named = f"; client order id {client_order_id}" if client_order_id else ""
    return OutcomeUnknown(f"{what}; the order may be alive, look before you repeat it{named}")


def from_wire(code: str, message: str) -> BusError:
    """The error a peer sent. A code of a newer peer reads as Internal, with its message."""
    return ERRORS.get(code, Internal)(message)
