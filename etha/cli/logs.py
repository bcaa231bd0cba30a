"""How the agent's log is written: to stderr, as text or as JSON lines, and never in the control loop's time.

The library only logs; what becomes of that is decided here, for ``etha agent``. A thread does the writing: whoever
does not read our stderr (a pager, a full pipe) must not hold up an agent that many workers wait for. What finds no room
meanwhile is dropped and counted.

Who reads which level: docs/logging.md.
"""

from __future__ import annotations

import enum
import logging
import queue
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, TextIO

import msgspec

_ROOM: Final = 10_000
"""Lines that wait for a reader of stderr."""

_LAST_SECONDS: Final = 1.0
"""How long the end of the process waits for the lines before it to be written."""

logger = logging.getLogger(__name__)


class Level(enum.StrEnum):
    """What ``--log-level`` takes."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Line(msgspec.Struct, frozen=True):
    """One line of ``--log-json``.

    Attributes:
        time: ISO 8601, UTC, to the millisecond.
        level: ``"DEBUG"``, ``"INFO"``, ``"WARNING"``, ``"ERROR"`` or ``"CRITICAL"``.
        logger: the module that says it.
        message: what it says.
        pid: of the agent.
        exception: a traceback, or None.
    """

    time: str
    level: str
    logger: str
    message: str
    pid: int | None
    exception: str | None


class JsonFormatter(logging.Formatter):
    """One JSON object per record, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        exception = self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else None
        line = Line(
            time=datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            level=record.levelname,
            logger=record.name,
            message=_encodable(record.getMessage()),
            pid=record.process,
            exception=None if exception is None else _encodable(exception),
        )
        return msgspec.json.encode(line).decode()


class TextFormatter(logging.Formatter):
    """One line per record, whatever a worker has put into its message; a traceback of ours follows in its own lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, of which a terminal or a reader of lines has nothing to fear."""
        line = super().formatMessage(record)
        return line if line.isprintable() else "".join(map(_shown, line))


class AsideHandler(logging.Handler):
    """Writes to a stream in a thread of its own, which waits for the stream so that no one else does."""

    def __init__(self, stream: TextIO, room: int = _ROOM) -> None:
        """Start the thread.

        Args:
            stream: what to write to.
            room: lines that may wait.
        """
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(room)
        self._dropped = 0
        self._counting = threading.Lock()  # not the handler's own, which `logging` holds while it waits in `close`
        self._thread = threading.Thread(target=self._write, name="etha-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Format now, write later."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - as every handler of logging: a mistake in a log call ends no program
            self.handleError(record)
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            with self._counting:
                self._dropped += 1

    def close(self) -> None:
        """Wait a moment for what has been said to be written. Called by `logging` at the end of the process."""
        try:
            self._lines.put(None, timeout=_LAST_SECONDS)
        except queue.Full:
            return
        self._thread.join(_LAST_SECONDS)
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            with self._counting:
                dropped, self._dropped = self._dropped, 0
            try:
                self._stream.write(line + "\n")
                if dropped:
                    note = logging.LogRecord(
                        __name__, logging.WARNING, __file__, 0, "%d lines were dropped: nobody read", (dropped,), None
                    )
                    self._stream.write(self.format(note) + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                continue  # nobody reads any more, or ever will; the agent serves on


def configure(level: Level, *, json: bool) -> None:
    """Send the log of this process to stderr.

    Args:
        level: the lowest that is shown of etha; of other libraries, warnings and worse at most.
        json: as `Line`; else as text. An exception that ends the process is then a line too.
    """
    handler = AsideHandler(sys.stderr)
    text = TextFormatter("etha agent: %(asctime)s %(levelname)s: %(message)s")
    handler.setFormatter(JsonFormatter() if json else text)
    number = logging.getLevelNamesMapping()[level.name]
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler])
    logging.getLogger("etha").setLevel(number)
    if json:
        sys.excepthook = _log_the_last


def _log_the_last(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logger.critical("the agent ends: %s: %s", kind.__name__, error, exc_info=(kind, error, trace))


def _shown(letter: str) -> str:
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()


def _encodable(text: str) -> str:
    """A path may hold bytes that are no UTF-8, which JSON cannot."""
    return text.encode("utf-8", "backslashreplace").decode()
