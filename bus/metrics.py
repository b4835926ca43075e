"""What a process counts. One registry each, given to its admin listener; tests read it with get_sample_value().

No label ever holds an account, a symbol or free text: an exchange or a method that nobody knows is counted as "unknown".
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)

Labels = tuple[str, str, str]


class Answers(Collector):
    """What each answer counts. prometheus_client's counters take a lock for each number: a fifth of what an answer from memory costs."""

    def __init__(self) -> None:
        self._seconds: defaultdict[Labels, list[float]] = defaultdict(lambda: [0.0] * (len(BUCKETS) + 2))
        """How many by bucket, the last one without a bound; and the sum."""
        self._cached: defaultdict[Labels, int] = defaultdict(int)

    def answered(self, exchange: str, method: str, outcome: str, seconds: float) -> None:
        """Count one answer."""
        row = self._seconds[exchange, method, outcome]
        row[bisect_left(BUCKETS, seconds)] += 1
        row[-1] += seconds

    def cached(self, exchange: str, method: str, result: str) -> None:
        """Count one public read."""
        self._cached[exchange, method, result] += 1

    def collect(self) -> Iterator[HistogramMetricFamily | CounterMetricFamily]:
        seconds = HistogramMetricFamily(
            "fmzbus_request_seconds",
            "From the first byte of a request to its answer, in this process",
            labels=["exchange", "method", "outcome"],
        )
        for labels, row in self._seconds.items():
            below = 0.0
            buckets = []
            for bound, count in zip((*map(float, BUCKETS), "+Inf"), row[:-1], strict=True):
                below += count
                buckets.append((str(bound), below))
            seconds.add_metric(labels, buckets, sum_value=row[-1])
        yield seconds
        cached = CounterMetricFamily(
            "fmzbus_cache_total",
            "Public reads by where the answer came from: hit (kept fresh by a feeder), shared (answered to somebody a moment ago), joined "
            "(somebody's call was on its way), miss (a call of its own)",
            labels=["exchange", "method", "result"],
        )
        for labels, total in self._cached.items():
            cached.add_metric(labels, total)
        yield cached


class Metrics:
    """outcome: "ok" or a code of bus/errors.py."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._answers = Answers()
        self.registry.register(self._answers)
        self.answered = self._answers.answered
        self.cached = self._answers.cached
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
        self.not_followed = Counter(
            "fmzbus_not_followed_total", "Misses whose symbol is beyond [market] max_symbols", ["exchange"], registry=self.registry
        )
        self.not_read = Gauge(
            "fmzbus_feed_not_read",
            "Values of feeders that arrived faster than this bridge read them, since its start",
            registry=self.registry,
        )
        self.streams = Gauge("fmzbus_streams", "Strategies that listen to a stream of this bridge now", registry=self.registry)
        self.stream_lost = Counter("fmzbus_stream_lost_total", "Values of streams that slow listeners did not get", registry=self.registry)


class FeedMetrics:
    """What a feeder counts, in the registry of its process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.frames = Counter("fmzbus_feed_frames_total", "Frames read from an exchange's sockets", ["exchange"], registry=registry)
        self.values = Counter("fmzbus_feed_values_total", "Values told on the bus", ["exchange", "kind"], registry=registry)
        self.conflated = Counter(
            "fmzbus_feed_conflated_total", "Values that a newer one replaced before they were told", ["exchange"], registry=registry
        )
        self.withdrawn = Counter(
            "fmzbus_feed_withdrawn_total", "Values withdrawn: gap, bad checksum, lost connection ...", ["exchange"], registry=registry
        )
        self.connects = Counter(
            "fmzbus_feed_connects_total", "Sockets opened, or not, by how it went", ["exchange", "result"], registry=registry
        )
        self.audits = Counter(
            "fmzbus_feed_audits_total",
            "REST calls that prove quiet markets, by what they showed",
            ["exchange", "result"],
            registry=registry,
        )
        self.refused = Counter(
            "fmzbus_feed_refused_total", "Pairs beyond [market] max_symbols, that are not fed", ["exchange"], registry=registry
        )
        self.followed = Gauge("fmzbus_feed_symbols", "Pairs of kind and symbol that are fed", ["exchange"], registry=registry)
        self.lag = Histogram(
            "fmzbus_feed_lag_seconds",
            "How much later than the least delay seen a frame was read, where the exchange dates its frames",
            ["exchange"],
            buckets=BUCKETS,
            registry=registry,
        )
