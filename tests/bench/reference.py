"""The bare references: the least that Python can do between the same hosts and the same NATS.

`forward` is an aiohttp handler that hands a body to nats-py's request() and answers what came back; `respond` is a nats-py callback
that answers constant bytes; `constant` is an aiohttp handler that reads the body and answers constant bytes, without NATS. No decoding,
no credentials, no deadlines, no metrics: what our bridge and worker are measured against.
"""

import argparse
import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import uvloop
from aiohttp import web
from nats.aio.msg import Msg

from bus import server

SUBJECT = "rpc.reference.ticker"
QUEUE = "reference"
TIMEOUT_S = 10.0


@asynccontextmanager
async def forwarding(url: str) -> AsyncIterator[str]:
    nc = await nats.connect(url)

    async def handle(request: web.BaseRequest) -> web.Response:
        reply = await nc.request(SUBJECT, await request.read(), timeout=TIMEOUT_S)
        return web.Response(body=reply.data, content_type="application/json")

    async with listening(handle) as address:
        yield address
    await nc.close()


@asynccontextmanager
async def answering(reply: bytes) -> AsyncIterator[str]:
    async def handle(request: web.BaseRequest) -> web.Response:
        await request.read()
        return web.Response(body=reply, content_type="application/json")

    async with listening(handle) as address:
        yield address


@asynccontextmanager
async def listening(handle: Callable[[web.BaseRequest], Awaitable[web.Response]]) -> AsyncIterator[str]:
    listener = await asyncio.get_running_loop().create_server(web.Server(handle, access_log=None), "127.0.0.1", 0, backlog=1024)
    yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    listener.close()


@asynccontextmanager
async def responding(url: str, reply: bytes) -> AsyncIterator[str]:
    nc = await nats.connect(url)

    async def answer(message: Msg) -> None:
        await message.respond(reply)

    await nc.subscribe(SUBJECT, queue=QUEUE, cb=answer)
    await nc.flush()
    yield SUBJECT
    await nc.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.reference", description=__doc__)
    parser.add_argument("part", choices=("forward", "respond", "constant"))
    parser.add_argument("--state", type=Path, help="state folder of the `fmzbus up` whose NATS server to use")
    parser.add_argument("--reply", default="", help="what `respond` and `constant` answer")
    args = parser.parse_args()
    if args.state is None and args.part != "constant":
        parser.error("--state: expected a state folder")
    reply = args.reply.encode()

    async def run() -> None:
        stopping = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
        match args.part:
            case "constant":
                part = answering(reply)
            case "forward":
                part = forwarding(server.url(args.state, "operator"))
            case _:
                part = responding(server.url(args.state, "operator"), reply)
        async with part as where:
            print(f"ready {where}", flush=True)
            await stopping.wait()

    uvloop.run(run())


if __name__ == "__main__":
    main()
