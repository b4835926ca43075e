"""One FMZ request as a host would send it: what `fmzbus call` does."""

import http.client
import statistics
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

IO_CODES = {"SetMarginLevel": 0, "SetDirection": 1, "SetContractType": 2, "GetPosition": 3, "GetPositions": 3}
"""FMZ's names of the futures calls, which travel as method `io`."""


class Replied(Struct, frozen=True):
    """body: the last envelope, or the first that was an error. hops: Server-Timing and Fmzbus-Cache of the last call, if traced.

    seconds: what the caller waited, per call.
    """

    body: bytes
    hops: dict[str, str]
    seconds: list[float]

    @property
    def failed(self) -> bool:
        return b'"error"' in self.body[:9]

    def percentile_ms(self, percent: int) -> float:
        if len(self.seconds) == 1:
            return self.seconds[0] * 1000
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[percent - 1] * 1000


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
    """POST it `repeat` times over one connection, each with a nonce of its own. Raises OSError or http.client.HTTPException."""
    url = urlsplit(address)
    headers = {"Content-Type": "application/json"} | ({"Http-Method": verb} if verb else {}) | ({"Fmzbus-Trace": "1"} if trace else {})
    connection = http.client.HTTPConnection(url.hostname or "127.0.0.1", url.port or 80, timeout=timeout_s)
    replied = Replied(b"", {}, [])
    try:
        for _ in range(repeat):
            request["nonce"] = time.time_ns()
            started = time.perf_counter()
            connection.request("POST", "/" + path.lstrip("/"), msgspec.json.encode(request), headers)
            response = connection.getresponse()
            content = response.read()
            seconds = [*replied.seconds, time.perf_counter() - started]
            hops = {name: response.headers[name] for name in ("Server-Timing", "Fmzbus-Cache") if name in response.headers}
            replied = Replied(replied.body if replied.failed else content, hops, seconds)
            if replied.failed and until_failed:
                break
        return replied
    finally:
        connection.close()
