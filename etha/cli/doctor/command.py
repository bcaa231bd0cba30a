"""The command line of ``etha doctor``. Loads neither torch nor CuPy."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated, Final, Literal, NoReturn

import msgspec
import typer
from rich.console import Console

from etha.cli.doctor.finding import EXIT_STATUS

_PIPED_WIDTH: Final = 120


def doctor(
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout; docs/doctor.schema.json.")] = False,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Only this agent. [default: all found, and the environment's]")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="cpu: leave GPUs out. cuda: a GPU must be here.")
    ] = "auto",
) -> None:
    """Try what sharing memory needs, name the gate that is shut, and say how to open it.

    For this box, this container, this user. Needs no running agent, leaves nothing behind, takes seconds. Exit status
    0: all is well. 1: something is degraded. 2: something is broken. The text holds versions and no secrets: paste it
    into a bug report.
    """
    from etha.cli.doctor.examination import examine  # the bus, and LMDB: not for `etha --help`
    from etha.cli.doctor.screen import show

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _leave)
    report = examine(rank, device)
    if json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        show(Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH), report)
    raise typer.Exit(EXIT_STATUS[report.verdict])


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Unwind, so that what runs is ended and removed."""
    raise typer.Exit(128 + number)
