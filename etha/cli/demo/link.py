"""A child's end of the pipes to the demo."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from etha.cli.demo.events import Event, encode


class ParentLink:
    """Events go out on what was stdout; words to go on come in on stdin.

    Stdout itself becomes stderr, so that a line printed by a library is shown to the user and
    does not end up between the events. SIGTERM becomes `SystemExit`: the child's ``with`` blocks
    close what they opened, and no C call is cut in the middle (torch's shm_open and shm_unlink).
    """

    def __init__(self) -> None:
        self._out = os.dup(1)
        os.dup2(2, 1)
        signal.signal(signal.SIGTERM, _exit)

    def tell(self, event: Event) -> None:
        """Sends one event; blocks only while the parent does not read."""
        line = encode(event)
        while line:
            line = line[os.write(self._out, line) :]

    def wait_for_word(self) -> None:
        """Waits for the parent's next word.

        Raises:
            SystemExit: The parent is gone.
        """
        if not sys.stdin.readline():
            raise SystemExit("the demo that started this process is gone")


def _exit(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)
