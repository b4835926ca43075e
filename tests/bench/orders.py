"""Orders: what the journal costs a trade, and whether one worker keeps up with many orders a second.

`cost` asks one bridge for trades at the null exchange, in turns over a worker with the journal and over `bare`, the same worker without
one, and between them makes bare acked publishes: a record's size, a stream set up as the journal's, the same nats-server and disk.
`drive` sends market orders to the paper exchange on a schedule, however long the answers take; a time counts from when an order was due.
"""

import argparse
import asyncio
import itertools
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import uvloop
from msgspec import Struct
from nats.js import JetStreamContext

from bus import config, logs, server, subjects
from bus.connection import connected
from bus.lifecycle import Stopping
from bus.lifecycle import run as run_process
from bus.metrics import Metrics
from bus.seal import Opener
from bus.sessions import Sessions
from tests import servers
from tests.bench.figures import Figure, compare
from tests.bench.load import percentile
from tests.bench.measure import Failed, Plan, Progress, cpu_per_10k, cpu_seconds, err, output_of
from workers import http, pool
from workers.calls import Calls
from workers.venues import available

JOURNALED, BARE = "null", "bare"
"""The null exchange under the names of the worker with a journal and of the one without."""
STREAM = "BENCH"
HOSTS = 50
PATIENCE_S = 15.0
JOURNAL_TARGET, ORDERS_TARGET = 3.0, 500.0
ASKED = 525.0
"""Orders a second on the schedule: a little more than the target, as the last answer comes after the last order is due."""
TRIES = 3
"""On a machine of two cores that others use as well, a moment of theirs fills a queue; the best try is shown, and how many there were."""
ORDERS = ({"type": "buy", "price": -1, "amount": 20}, {"type": "sell", "price": -1, "amount": 0.001})


class Cost(Struct, frozen=True, kw_only=True):
    """Medians of one round, ms. journaled, bare: a trade at the null exchange with and without journal. publish: one bare acked publish."""

    journaled: float
    bare: float
    publish: float

    @property
    def journal(self) -> float:
        return self.journaled - self.bare


class Driven(Struct, frozen=True, kw_only=True):
    """What came of a schedule. asked: orders a second. sent: all, with the first of each account, which are not measured.

    rate: right answers a second, from when the first was due to the last answer. errors: wrong or missing answers; first_error: one.
    """

    asked: float
    sent: int
    errors: int
    rate: float
    p50_ms: float
    p99_ms: float
    first_error: str = ""


class Orders(Struct, frozen=True):
    """costs: by round. driven: each try of the schedule. cpu_s: of all driven orders, per 10,000, by process."""

    costs: list[Cost]
    driven: list[Driven]
    cpu_s: dict[str, float]

    @property
    def best(self) -> Driven:
        return max(self.driven, key=lambda one: (-one.errors, one.rate))


def trade(host: int, **fields: object) -> bytes:
    """The body of an order, with a nonce of its own."""
    params = {"symbol": "BTC_USDT"} | fields
    keys = {"access_key": f"bench-{host}", "secret_key": "bench-secret"}
    return msgspec.json.encode({**keys, "nonce": time.time_ns(), "method": "trade", "params": params})


class Host:
    """One kept-alive connection to a bridge."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def __call__(self, path: str, body: bytes) -> str:
        """-> "" for a right answer, else what came. Raises OSError and IncompleteReadError."""
        self._writer.write(b"POST /%b HTTP/1.1\r\nHost: bridge\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body)) + body)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        content = await self._reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
        right = head.startswith(b"http/1.1 200 ") and content.startswith(b'{"data":{"id":')
        return "" if right else (head[9:12] + b" " + content).decode(errors="replace")

    def close(self) -> None:
        self._writer.close()


async def connect(address: str) -> Host:
    where = urlsplit(address)
    return Host(*await asyncio.open_connection(where.hostname, where.port))


# ---------------------------------------------------------------- what the journal costs


@asynccontextmanager
async def serving_bare(state: Path, stopping: Stopping) -> AsyncIterator[None]:
    """Serve BARE: a worker's own parts, without the journal."""
    venue, workers = config.Venue(exchange=JOURNALED), config.Workers(exchanges=[BARE])
    settings = config.Config(state=str(state), bench=True, venues={BARE: venue}, workers=workers)
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(connected(server.url(state, "worker"), "worker", closed=stopping.fail))
        metrics = Metrics()
        exchanges = await stack.enter_async_context(http.opened({}, workers.call_timeout_s, metrics))
        venues = available(settings)
        answer = Calls(bus, Opener(settings.keys_path), Sessions(bus), venues, exchanges, metrics).answer
        serving = pool.serving(bus, venues, answer, max_in_flight=workers.max_in_flight, drain_s=workers.drain_s)
        await stack.enter_async_context(serving)
        yield


async def stream_like_the_journal(js: JetStreamContext) -> None:
    like = (await js.stream_info(subjects.JOURNAL)).config
    like.name, like.subjects = STREAM, ["bench.>"]
    await js.add_stream(like)


async def costs(address: str, state: Path, *, rounds: int, each: int, warm_up: int = 20) -> list[Cost]:
    """Each round makes `each` of all three, one after the other, in ever different order. Raises Failed."""
    async with connected(server.url(state, "operator"), "operator", closed=lambda: None) as bus:
        js = bus.nc.jetstream()
        await stream_like_the_journal(js)
        host = await connect(address)
        numbers = itertools.count()
        record = b"x"

        async def order(path: str) -> None:
            if told := await host(path, trade(0, type="buy", price=1, amount=next(numbers) + 1)):
                raise Failed(f"/{path} answered {told}")

        async def publish() -> None:
            await js.publish(f"bench.{next(numbers)}", record)

        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "journaled": lambda: order(JOURNALED),
            "bare": lambda: order(BARE),
            "publish": publish,
        }
        for _ in range(warm_up):
            for make in kinds.values():
                await make()
        before = (await js.stream_info(subjects.JOURNAL)).state
        record = b"x" * (before.bytes // before.messages)
        found = []
        for _ in range(rounds):
            took: dict[str, list[float]] = {kind: [] for kind in kinds}
            for turn in itertools.islice(itertools.cycle(itertools.permutations(kinds)), each):
                for kind in turn:
                    started = time.perf_counter()
                    await kinds[kind]()
                    took[kind].append((time.perf_counter() - started) * 1000)
            found.append(Cost(**{kind: statistics.median(spans) for kind, spans in took.items()}))
        written = (await js.stream_info(subjects.JOURNAL)).state.messages - before.messages
        host.close()
    if written < rounds * each:
        raise Failed(f"{rounds * each} orders left {written} records in the journal")
    return found


# ---------------------------------------------------------------- many orders


async def drive(address: str, path: str, *, rate: float, seconds: float, orders: Sequence[dict[str, object]] = ORDERS) -> Driven:
    """Send on schedule from HOSTS accounts, each buying and selling in turns, whatever is still unanswered."""
    idle: list[Host] = []
    spans: list[float] = []
    wrong: list[str] = []

    async def one(number: int, due: float) -> None:
        account = number % HOSTS
        try:
            host = idle.pop() if idle else await connect(address)
        except OSError as e:
            wrong.append(repr(e))
            return
        body = trade(account, **orders[number // HOSTS % len(orders)])
        try:
            told = await asyncio.wait_for(host(f"{path}/host-{account}", body), PATIENCE_S)
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as e:
            host.close()
            wrong.append(repr(e))
            return
        idle.append(host)
        if told:
            wrong.append(told)
        else:
            spans.append((time.perf_counter() - due) * 1000)

    for number in range(HOSTS):  # accounts are opened, connections made, keys sealed
        await one(number, time.perf_counter())
    spans.clear()
    count = round(rate * seconds)
    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            due = started + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(number, due))
    elapsed = time.perf_counter() - started
    for host in idle:
        host.close()
    spans.sort()
    return Driven(
        asked=rate,
        sent=HOSTS + count,
        errors=len(wrong),
        rate=len(spans) / elapsed,
        p50_ms=percentile(spans, 50),
        p99_ms=percentile(spans, 99),
        first_error=wrong[0] if wrong else "",
    )


# ---------------------------------------------------------------- both, and what they show


async def with_orders(state: Path, plan: Plan, progress: Progress) -> Orders:
    """The system with the paper exchange, and one more worker, without a journal."""
    progress.step("starting one bridge, one worker, the paper exchange and a worker without a journal")
    only = {"workers__exchanges": f'["{JOURNALED}","paper"]', f"venues__{BARE}__exchange": JOURNALED}
    part = "tests.bench.orders"
    async with servers.system(state, "--bench", "--bridges", "1", "--workers", "1", **only) as system:
        where = ("--state", str(state), "--address", system.address)
        async with servers.running(sys.executable, "-m", part, "bare", *where) as bare:
            await bare.said("(?m)^ready")
            progress.step("trades with a journal, without, and bare acked publishes")
            rounds = ("--rounds", str(plan.rounds), "--each", str(plan.trades))
            found = msgspec.json.decode(await output_of(part, "cost", *where, *rounds), type=list[Cost])
        pids = {name.partition("-")[0]: pid for name, pid in system.pids.items()}
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        schedule = ("--rate", str(ASKED), "--seconds", str(plan.orders_s))
        progress.step(f"{ASKED:.0f} orders a second")
        driven: list[Driven] = []
        while len(driven) < TRIES and not any(one.rate >= ORDERS_TARGET and not one.errors for one in driven):
            driven.append(msgspec.json.decode(await output_of(part, "drive", *where, *schedule), type=Driven))
        cpu_s = cpu_per_10k(pids, before, sum(one.sent for one in driven))
    for one in driven:
        if one.errors:
            err.print(f"{one.errors} of {one.sent} orders failed, one with: {one.first_error}", markup=False)
    return Orders(found, driven, cpu_s)


def order_figures(found: Orders) -> list[Figure]:
    driven, tries = found.best, len(found.driven)
    at = f"{driven.asked:.0f} orders/s" + (f", best of {tries}" if tries > 1 else "")
    return [
        compare("journal of a trade: p50", "ms", [(one.journal, one.publish) for one in found.costs], JOURNAL_TARGET),
        Figure(name=f"{at}: rate", ours=driven.rate, unit="/s", target=ORDERS_TARGET, at_least=True),
        Figure(name=f"{at}: errors", ours=driven.errors, unit="", target=0),
        Figure(name=f"{at}: p50", ours=driven.p50_ms, unit="ms"),
        Figure(name=f"{at}: p99", ours=driven.p99_ms, unit="ms"),
        *(Figure(name=f"{at}: CPU {name}", ours=cpu_s, unit="s/10k") for name, cpu_s in found.cpu_s.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.orders", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", choices=("bare", "cost", "drive"))
    parser.add_argument("--state", type=Path, required=True, help="state folder of the `fmzbus up`")
    parser.add_argument("--address", default="", help="where its bridge listens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--each", type=int, default=100, help="how many of each in a round")
    parser.add_argument("--rate", type=float, default=525, help="orders a second")
    parser.add_argument("--seconds", type=float, default=6)
    args = parser.parse_args()

    async def bare(stopping: Stopping) -> None:
        logs.setup(config.Logs(), "bare")
        async with serving_bare(args.state, stopping):
            print("ready", flush=True)
            await stopping.wait()

    try:
        match args.part:
            case "bare":
                run_process(bare)
            case "cost":
                found = uvloop.run(costs(args.address, args.state, rounds=args.rounds, each=args.each))
                print(msgspec.json.encode(found).decode())
            case "drive":
                print(msgspec.json.encode(uvloop.run(drive(args.address, "paper", rate=args.rate, seconds=args.seconds))).decode())
    except Failed as e:
        raise SystemExit(str(e)) from None


if __name__ == "__main__":
    main()
