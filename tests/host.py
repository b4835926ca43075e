"""A simulated FMZ host: posts what a real one posts, keeps its connections alive, reads the envelope."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
from yarl import URL


class Host:
    """One host with its keys. address: of the bridge."""

    def __init__(
        self, session: aiohttp.ClientSession, address: str, access_key: str = "access_key", secret_key: str = "secret_key"
    ) -> None:
        self.session = session
        self.address = address
        self.access_key = access_key
        self.secret_key = secret_key

    def other(self, access_key: str, secret_key: str) -> "Host":
        """A host with other keys, over the same connections."""
        return Host(self.session, self.address, access_key, secret_key)

    async def __call__(self, path: str, method: str, /, *, headers: dict[str, str] | None = None, **params: Any) -> dict[str, Any]:
        """Call a method and return the envelope: {"data": ...} or {"error": text}."""
        request = {
            "access_key": self.access_key,
            "secret_key": self.secret_key,
            "nonce": time.time_ns(),
            "method": method,
            "params": params,
        }
        return await self.post(path, msgspec.json.encode(request), headers)

    async def io(self, path: str, code: int, *args: object) -> dict[str, Any]:
        """A futures call: 0 SetMarginLevel, 1 SetDirection, 2 SetContractType, 3 GetPosition."""
        return await self(path, "io", code=code, args=list(args))

    async def post(self, path: str | URL, body: Any, headers: dict[str, str] | None = None) -> dict[str, Any]:
        """POST any bytes, to a path or a whole URL. Asserts what every answer must be: HTTP 200, JSON, exactly one of data and error."""
        async with self.session.post(
            path if isinstance(path, URL) else f"{self.address}/{path.lstrip('/')}", data=body, headers=headers
        ) as response:
            content = await response.read()
            assert response.status == 200, (response.status, content)
            assert response.content_type == "application/json"
        envelope: dict[str, Any] = msgspec.json.decode(content)
        assert ("data" in envelope) != ("error" in envelope), envelope
        assert envelope.keys() <= {"data", "raw", "error"}
        if "error" in envelope:
            assert isinstance(envelope["error"], str)
            assert "Traceback" not in envelope["error"]
        return envelope


@asynccontextmanager
async def hosting(address: str, connections: int = 0) -> AsyncIterator[Host]:
    """A host for the life of a test; connections: 0 for as many as it needs."""
    connector = aiohttp.TCPConnector(limit=connections, force_close=False)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30)) as session:
        yield Host(session, address)
