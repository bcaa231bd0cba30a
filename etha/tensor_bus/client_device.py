"""The device that a client shares memory on, as that client uses it: how its memory is opened, and what order its work
has with others'. The same object, whichever agent serves.

Nothing of a device is touched before the first tensor comes. The agent of a device sends with its welcome a slot for
the client and the file of fences. A successor sends the same slot and a file of its own; the client goes on with its
numbers there, and says so (`packets.Fenced`), before others wait there. The host has neither.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable, Sequence

from etha.errors import AgentGone, AgentTimeout, InvalidRecord, StreamCapturing
from etha.tensor_bus import clock, packets
from etha.tensor_bus.ipc import devices
from etha.tensor_bus.ipc.backend import HOST, Backend
from etha.tensor_bus.ipc.cuda_backend import CudaBackend, device_of
from etha.tensor_bus.ipc.descriptors import SharedFd
from etha.tensor_bus.ipc.fence import Fences
from etha.tensor_bus.ipc.order import HOST_ORDER, Order, StreamOrder, wait_until_reached


class ClientDevice:
    """One client's device. Safe across threads.

    Attributes:
        name: what this process calls it.
        ordered: False on the host, where work is done when its call returns.
        unheard: an agent has followed another, and waits for `carry_on`.
    """

    def __init__(self, identity: str, welcome: packets.Welcome, fds: Sequence[int]) -> None:
        """Take what came with the first welcome.

        Args:
            identity: of the device, as the agent says.
            welcome: the agent's; it names the client.
            fds: that came with it; neither kept nor closed.

        Raises:
            InvalidArgument: this process does not see the device.
            InvalidRecord: the fences are missing.
            DriverError: there is no CUDA driver.
        """
        self.name = devices.name_of(identity)
        self._uuid = devices.uuid_of(identity)
        self.ordered = self._uuid is not None
        self._client = welcome.client
        self._making = threading.RLock()
        self._cuda: CudaBackend | None = None
        self._order: StreamOrder | None = None
        self._table: SharedFd | None = None
        self._replaced: list[SharedFd] = []
        self._handed_over: list[SharedFd] = []
        self.unheard = False
        self.offer(welcome, fds)
        self.unheard = False

    def offer(self, welcome: packets.Welcome, fds: Sequence[int]) -> None:
        """An agent has welcomed this client; `carry_on` follows.

        Raises:
            InvalidRecord: it serves a device, and its fences are missing.
        """
        if self._uuid is None:
            return
        if len(fds) != 1:
            raise InvalidRecord("an agent's welcome came without the fences of its device.", resource="fences")
        fresh = SharedFd(fcntl.fcntl(fds[0], fcntl.F_DUPFD_CLOEXEC, 0), owned=True)
        with self._making:
            if self._table is not None and self._order is not None:
                self._replaced.append(self._table)
            elif self._table is not None:
                self._table.close()
            self._slot, self._table, self.unheard = welcome.slot, fresh, True

    @property
    def backend(self) -> Backend:
        """How memory there is shared and opened.

        Raises:
            DriverError: the driver refuses; in a forked child of a process that has used CUDA, always.
        """
        return HOST if self._uuid is None else self._of(self._uuid)

    @property
    def order(self) -> Order:
        """What order this client's work has with others'.

        Raises:
            DriverError: the driver refuses, or the device cannot do what etha orders streams by.
            StreamCapturing: an agent has followed another, and a stream on which to go on is being captured.
        """
        if self._uuid is None:
            return HOST_ORDER
        with self._making:
            if self._order is None:
                backend = self._of(self._uuid)
                self._order = StreamOrder(self._map_fences(), self._slot, backend.stream)
            elif self._replaced:
                self._order.replace(self._map_fences)
                self._handed_over.extend(self._replaced)
                self._replaced.clear()
            return self._order

    def carry_on(self, tell: Callable[[packets.Fenced, list[int]], object]) -> None:
        """If an agent has followed another, go on with the numbers in its fences, and tell it so, with the files in
        which streams may wait still. What cannot be done now, the next call does.

        Args:
            tell: sends a packet with descriptors; raises `AgentTimeout` or `AgentGone`.

        Raises:
            DriverError: the driver refuses; the next call tries again.
        """
        if not self.unheard:
            return
        with self._making:
            try:
                if self._replaced:
                    _ = self.order
                tell(packets.Fenced(), [fd.fileno() for fd in self._handed_over])
            except (StreamCapturing, AgentTimeout, AgentGone):
                return
            self.unheard = False
            while self._handed_over:
                self._handed_over.pop().close()

    def done(self, deadline: float) -> bool:
        """Whether all points of this client's work that others were told of have been reached, by then."""
        order = self._order
        return order is None or wait_until_reached(order, order.newest, deadline, clock.now)

    def settle(self) -> bool:
        """Unmap what was closed; whether nothing is left that is mapped still.

        Nothing is unmapped while work that others were told of goes on; then this waits for what else the device has
        been given, if anything was closed.

        Raises:
            DriverError: the driver refuses; it is tried again.
        """
        if self._cuda is None or self._cuda.device.retired == 0:
            return True
        return self.done(0.0) and self._cuda.settle()

    def _of(self, uuid: bytes) -> CudaBackend:
        with self._making:
            if self._cuda is None:
                self._cuda = CudaBackend(device_of(uuid), self._client)
            return self._cuda

    def _map_fences(self) -> Fences:
        if self._table is None:
            raise InvalidRecord("this client has no fences.", resource="fences", remedy="Make another client.")
        return Fences(self._of(self._uuid or b"").device, self._table.fileno())
