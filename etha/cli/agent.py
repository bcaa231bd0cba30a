"""``etha agent``: serve until told to stop."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from etha.errors import EthaError, InvalidArgument


def agent(
    rank: Annotated[int | None, typer.Option(min=0, help="Rank to serve. [default: RANK, else 0]")] = None,
    device: Annotated[str, typer.Option(help="What to serve; this build has the host backend (cpu).")] = "cpu",
    command_queue: Annotated[str | None, typer.Option(metavar="PATH", help="Its command LMDB.")] = None,
    state: Annotated[str | None, typer.Option(metavar="PATH", help="Its state LMDB.")] = None,
) -> None:
    """Serve one device of this box until SIGINT or SIGTERM.

    Prints one line when it serves. On the way out it removes its files, unless a worker is still registered: then they
    stay, and its successor clears them.
    """
    from etha.tensor_bus.agent import TensorBusAgent

    logging.basicConfig(level=logging.WARNING, format="etha agent: %(message)s")
    console = Console(soft_wrap=True)
    try:
        serving = TensorBusAgent(_rank() if rank is None else rank, device, command_queue, state)
    except EthaError as error:
        Console(stderr=True, soft_wrap=True).print(Text(f"etha agent: {type(error).__name__}: {error}", "red"))
        raise typer.Exit(1) from error

    def stop(number: int, frame: FrameType | None) -> None:
        serving.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    served = serving.rank, serving.paths.command
    serving.run(
        lambda: console.print(Text(f"agent rank {served[0]} serves {device}, pid {os.getpid()}, at {served[1]}"))
    )


def _rank() -> int:
    text = os.environ.get("RANK", "0")
    if not text.isascii() or not text.isdigit():
        raise InvalidArgument(f"RANK={text!r} is not an integer >= 0.", resource="RANK", remedy="Say --rank.")
    return int(text)
