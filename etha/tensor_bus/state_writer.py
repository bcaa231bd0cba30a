"""The agent's side of the state LMDB: changes in one transaction each, and who keeps old pages from being reused."""

from __future__ import annotations

from collections.abc import Mapping

import lmdb
import msgspec

from etha.tensor_bus import state
from etha.tensor_bus.environments import fault, open_environment
from etha.tensor_bus.ipc.process import process_label
from etha.tensor_bus.records import encode


class StateWriter:
    """The agent's side. One per agent, used by its control loop only."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._environment = open_environment(path, map_size=state.MAP_SIZE, create=True)

    def write(self, changes: Mapping[bytes, msgspec.Struct | None]) -> None:
        """Commit all changes in one transaction; None deletes.

        Raises:
            QueueFull: the file has reached its size, or the disk is full. Nothing was written.
        """
        try:
            with self._environment, self._environment.env.begin(write=True) as transaction:
                for key, record in changes.items():
                    if record is None:
                        transaction.delete(key)
                    else:
                        transaction.put(key, encode(record))
        except lmdb.Error as error:
            raise fault(self.path, error) from error

    def reader_check(self) -> int:
        """Free the reader slots of dead processes; returns how many there were."""
        with self._environment:
            return int(self._environment.env.reader_check())

    def oldest_reader(self) -> str | None:
        """The process in whose read transaction the oldest pages are kept, and in which no page is reused, or None."""
        with self._environment:
            rows = [line.split() for line in self._environment.env.readers().splitlines()[1:]]
        reading = [(int(row[2]), int(row[0])) for row in rows if len(row) == 3 and row[2].isdigit()]
        return process_label(min(reading)[1]) if reading else None

    def close(self) -> None:
        """Give back this use of the file."""
        self._environment.close()
