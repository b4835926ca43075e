"""One FMZ request as a host would send it: what `fmzbus call` does."""

import http.client
import re
import statistics
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

IO_CODES = {"SetMarginLevel": 0, "SetDirection": 1, "SetContractType": 2, "GetPosition": 3, "GetPositions": 3}
"""FMZ's names of the futures calls, which travel as method `io`."""
RESULTS = ("hit", "shared", "joined", "miss")
"""What `Fmzbus-Cache` says: kept fresh by a feeder, answered to somebody a moment ago, somebody's call was on its way, or none of it."""
_IN_BRIDGE = re.compile(r"\bbridge;dur=([\d.]+)")


class Replied(Struct):
    """body: the last envelope, or the first that was an error. hops: Server-Timing and Fmzbus-Cache of the last call, if traced.

    seconds: what the caller waited, per call; bridge_ms: the part of it that was the bridge's own. answers: by what `Fmzbus-Cache` says.
    """

    body: bytes = b""
    hops: dict[str, str] = {}
    seconds: list[float] = []
    bridge_ms: list[float] = []
    answers: dict[str, int] = {}

    @property
    def failed(self) -> bool:
        return b'"error"' in self.body[:9]

    def percentile_ms(self, percent: int) -> float:
        return _percentile(self.seconds, percent) * 1000

    def line(self) -> str:
        """The sum: "1000 calls: hit 994, shared 5, miss 1; p50 0.31 ms, ...; in the bridge p50 0.05 ms, p99 0.11 ms"."""
        waited = ", ".join(f"p{percent} {self.percentile_ms(percent):.2f} ms" for percent in (50, 90, 99))
        own = ", ".join(f"p{percent} {_percentile(self.bridge_ms, percent):.2f} ms" for percent in (50, 99)) if self.bridge_ms else ""
        answers = ", ".join(f"{result} {self.answers[result]}" for result in RESULTS if result in self.answers)
        return f"{len(self.seconds)} calls: {answers}; {waited}" + (f"; in the bridge {own}" if own else "")


def _percentile(values: Sequence[float], percent: int) -> float:
    return values[0] if len(values) == 1 else statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def body(method: str, arguments: Sequence[str], access_key: str, secret_key: str) -> dict[str, Any]:
    """The JSON of a request. arguments: "k=v" for ordinary methods, plain or k=v values for the futures calls. Raises ValueError."""
    if method in IO_CODES:
        values = [argument.rpartition("=")[2] for argument in arguments]
        params: dict[str, Any] = {"code": IO_CODES[method], "args": [_number_or_text(value) for value in values]}
        method = "io"
    else:
        wrong = [argument for argument in arguments if "=" not in argument]
        if wrong:
            raise ValueError(f"expected k=v, got {wrong[0]!r}")
        params = dict(argument.split("=", 1) for argument in arguments)
        if method == "io":
            params = {key: msgspec.json.decode(value) for key, value in params.items()}
    return {"access_key": access_key, "secret_key": secret_key, "nonce": time.time_ns(), "method": method, "params": params}


def _number_or_text(value: str) -> int | float | str:
    try:
        return int(value)
    except ValueError:
        return value


def post(
    address: str,
    path: str,
    request: dict[str, Any],
    *,
    verb: str = "",
    repeat: int = 1,
    trace: bool = False,
    until_failed: bool = False,
    timeout_s: float = 30,
) -> Replied:
    """POST it `repeat` times over one connection, each with a nonce of its own; more than one are traced, for the sum of them.

    Raises OSError or http.client.HTTPException.
    """
    url = urlsplit(address)
    headers = {"Content-Type": "application/json"} | ({"Http-Method": verb} if verb else {})
    if trace or repeat > 1:
        headers["Fmzbus-Trace"] = "1"
    connection = http.client.HTTPConnection(url.hostname or "127.0.0.1", url.port or 80, timeout=timeout_s)
    replied = Replied()
    try:
        for _ in range(repeat):
            request["nonce"] = time.time_ns()
            started = time.perf_counter()
            connection.request("POST", "/" + path.lstrip("/"), msgspec.json.encode(request), headers)
            response = connection.getresponse()
            content = response.read()
            replied.seconds.append(time.perf_counter() - started)
            replied.body = replied.body if replied.failed else content
            told = {name: response.headers[name] for name in ("Server-Timing", "Fmzbus-Cache") if name in response.headers}
            result = told.get("Fmzbus-Cache", RESULTS[-1])
            replied.answers[result] = replied.answers.get(result, 0) + 1
            replied.bridge_ms += map(float, _IN_BRIDGE.findall(told.get("Server-Timing", "")))
            replied.hops = told if trace else {}
            if replied.failed and until_failed:
                break
        return replied
    finally:
        connection.close()
