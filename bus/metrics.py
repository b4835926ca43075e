"""What a process counts. One registry each, given to its admin listener; tests read it with get_sample_value().

No label ever holds an account, a symbol or free text: an exchange or a method that nobody knows is counted as "unknown".
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Metrics:
    """outcome: "ok" or a code of bus/errors.py."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.seconds = Histogram(
            "fmzbus_request_seconds",
            "From the first byte of a request to its answer, in this process",
            ["exchange", "method", "outcome"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.venue_seconds = Histogram(
            "fmzbus_venue_seconds",
            "One call to an exchange, by the HTTP status or the error it ended with",
            ["exchange", "outcome"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.in_flight = Gauge("fmzbus_in_flight", "Requests taken and not yet answered", registry=self.registry)
        self.connected = Gauge("fmzbus_bus_connected", "1 while the connection to NATS is up", registry=self.registry)
        self.late_replies = Counter("fmzbus_late_replies_total", "Replies whose caller had been answered already", registry=self.registry)
        self.unsettled = Gauge("fmzbus_unsettled_orders", "Orders without an outcome, those in flight too", registry=self.registry)
        self.settled = Counter(
            "fmzbus_settled_total", "Unknown orders settled by a look-up, by what they were", ["state"], registry=self.registry
        )
        self.journal_used = Gauge("fmzbus_journal_used_ratio", "How full the journal is, 0 to 1; 0.8 is an alert", registry=self.registry)
        self._children: dict[tuple[str, str, str], Histogram] = {}

    def answered(self, exchange: str, method: str, outcome: str, seconds: float) -> None:
        """Count one answer. The labelled child is kept: looking it up costs more than counting."""
        key = (exchange, method, outcome)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = self.seconds.labels(exchange, method, outcome)
        child.observe(seconds)
