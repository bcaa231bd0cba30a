"""The command ``etha``. Nothing here imports torch: ``--help``, ``status`` and ``inspect`` answer at once."""

from __future__ import annotations

import typer

from etha.cli.agent import agent
from etha.cli.demo.command import demo
from etha.cli.inspect import inspect
from etha.cli.status import status

app = typer.Typer(
    help="Use a tensor that lives in another process's memory, in place.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(agent)
app.command()(demo)
app.command()(status)
app.command()(inspect)


def main() -> None:
    """The entry point."""
    app(prog_name="etha")
