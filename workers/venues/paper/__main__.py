"""The paper exchange's own process, started by `fmzbus up` in embedded mode."""

import logging
import os
from contextlib import AsyncExitStack

from bus import lifecycle, logs
from bus.admin import admin
from bus.config import Config
from bus.lifecycle import Stopping, notify
from bus.metrics import Metrics
from bus.start import ProcessArgs, process_args
from workers.venues.paper import server

log = logging.getLogger(__name__)


async def serve(config: Config, args: ProcessArgs, stopping: Stopping) -> None:
    async with AsyncExitStack() as stack:
        settings = config.paper
        state = config.state_path / "paper"
        port = await stack.enter_async_context(server.serving(state=state, host="127.0.0.1", port=settings.port, seed=settings.seed))
        where = await stack.enter_async_context(admin(Metrics(), lambda: not stopping.is_set, port=args.admin_port))
        log.info("ready", extra={"fields": {"port": port, "admin": where}})
        notify(READY="1", STATUS=f"http://127.0.0.1:{port}", FMZBUS_ADMIN=where)
        await stopping.wait()


def main() -> None:
    config, args = process_args("paper")
    logs.setup(config.logs, f"paper-{os.getpid()}")
    lifecycle.run(lambda stopping: serve(config, args, stopping))


if __name__ == "__main__":
    main()
