"""``etha agent``: serve until told to stop."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from etha.cli.logs import Level, configure
from etha.errors import EthaError, InvalidArgument

logger = logging.getLogger(__name__)


def agent(
    rank: Annotated[int | None, typer.Option(min=0, help="Rank to serve. [default: RANK, else 0]")] = None,
    device: Annotated[str, typer.Option(help="What to serve: cpu, or a GPU, as this process counts: cuda:0.")] = "cpu",
    command_queue: Annotated[str | None, typer.Option(metavar="PATH", help="Its command LMDB.")] = None,
    state: Annotated[str | None, typer.Option(metavar="PATH", help="Its state LMDB.")] = None,
    parent: Annotated[
        int | None, typer.Option(metavar="PID", help="End when this process, which starts the agent, has ended.")
    ] = None,
    log_level: Annotated[Level, typer.Option(case_sensitive=False, help="The lowest to be logged.")] = Level.WARNING,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log one JSON object per line.")] = False,
) -> None:
    """Serve one device of this box until SIGINT or SIGTERM.

    Prints one line when it serves, and logs to stderr. On the way out it removes its files, unless a worker is still
    registered: then they stay, and its successor takes them over. Exit status 0: it was told to stop. 1: it could not
    start.
    """
    from etha.tensor_bus.agent import TensorBusAgent

    configure(log_level, json=log_json)
    console = Console(soft_wrap=True)
    try:
        end = None if parent is None else _open_parent(parent)
        serving = TensorBusAgent(_rank() if rank is None else rank, device, command_queue, state)
    except EthaError as error:
        if log_json:
            logger.error("%s: %s", type(error).__name__, error)
        else:
            Console(stderr=True, soft_wrap=True).print(Text(f"etha agent: {type(error).__name__}: {error}", "red"))
        raise typer.Exit(1) from error

    def stop(number: int, frame: FrameType | None) -> None:
        serving.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if end is not None:
        threading.Thread(target=_follow, args=(end, serving.stop), name="etha-parent", daemon=True).start()
    where = serving.paths.command

    def ready() -> None:
        console.print(Text(f"agent rank {serving.rank} serves {device}, pid {os.getpid()}, at {where}"))
        logger.info("rank %d serves %s at %s", serving.rank, device, where)

    serving.run(ready)
    logger.info("rank %d has ended", serving.rank)


def _rank() -> int:
    text = os.environ.get("RANK", "0")
    if not text.isascii() or not text.isdigit():
        raise InvalidArgument(f"RANK={text!r} is not an integer >= 0.", resource="RANK", remedy="Say --rank.")
    return int(text)


def _open_parent(pid: int) -> int:
    """A pidfd of the process that started this one.

    Not ``PR_SET_PDEATHSIG``: that fires when the parent's *thread* ends (prctl(2)), and notebooks start agents in
    threads.

    Raises:
        InvalidArgument: it has ended, or did not start this process.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        pidfd = -1
    if pidfd < 0 or os.getppid() != pid:
        raise InvalidArgument(
            f"pid {pid} did not start this agent, or has ended.", resource="--parent", remedy="Leave out --parent."
        )
    return pidfd


def _follow(parent: int, stop: Callable[[], None]) -> None:
    poll = select.poll()
    poll.register(parent, select.POLLIN)
    poll.poll()
    logger.info("the process that started this agent has ended")
    stop()
