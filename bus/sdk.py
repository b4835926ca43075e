"""The SDK's commands: `fmzbus new-venue` and `fmzbus check-venue`. Nothing here knows venues: the same process goes on as workers'."""

import os
import sys

import typer

app = typer.Typer()
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("new-venue", context_settings=PASS_ON, add_help_option=False)
def new_venue_command(context: typer.Context) -> None:
    """Write a venue of your own, and its test; both run as they are. --help tells more."""
    _become("workers.template", context.args)


@app.command("check-venue", context_settings=PASS_ON, add_help_option=False)
def check_venue_command(context: typer.Context) -> None:
    """Check a venue: shapes, ids, numbers, errors, what it does when an exchange fails. --help tells more."""
    _become("workers.check", context.args)


def _become(module: str, arguments: list[str]) -> None:
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606 - the same process goes on
