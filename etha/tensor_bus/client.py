"""A worker's client of one agent: it registers, it subscribes, it closes what it made."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from etha.errors import AgentGone, ClientClosed, InvalidArgument
from etha.tensor_bus import clock, tracer
from etha.tensor_bus.commands import MAX_NAME_BYTES, Register
from etha.tensor_bus.connection import Connection
from etha.tensor_bus.finding import device_name, find_agent
from etha.tensor_bus.link import Link, Ticket
from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.publication import Publication
from etha.tensor_bus.reach import reach
from etha.tensor_bus.shared import Shared
from etha.tensor_bus.subscription import Subscription

if TYPE_CHECKING:
    import torch


class TensorBusClient:
    """A connection to the agent of one rank. A context manager; safe across threads; several in a process work.

    A forked child must make its own. Nothing here starts a thread.

    Attributes:
        agent_rank: the agent's rank.
        agent_pid: its pid.
        device: what it serves, by this process's name: ``"cpu"``, ``"cuda:0"``.
    """

    def __init__(
        self,
        agent_rank: int = 0,
        lmdb_command_queue_path: str | None = None,
        agent_state_lmdb_path: str | None = None,
        connection_timeout: float = 30.0,
    ) -> None:
        """Connect, waiting for an agent that is not there yet.

        Args:
            agent_rank: picks the paths of the convention, where none are given.
            lmdb_command_queue_path, agent_state_lmdb_path: the agent's files.
            connection_timeout: seconds; also how long a call without a timeout waits for the command queue.

        Raises:
            NoAgent, AgentStopped, OtherUser, OtherNamespace, VersionMismatch: see `etha.tensor_bus.reach`; each is a
                `ConnectionError`.
            UnsafePath: a path is not ours alone.
        """
        self.agent_rank = agent_rank
        paths = agent_paths(agent_rank, lmdb_command_queue_path, agent_state_lmdb_path)
        connection, _ = reach(paths, agent_rank, connection_timeout)
        self.agent_pid = connection.agent.pid
        self.device = connection.device.name
        self.command_queue_path = paths.command
        self.state_path = paths.state
        try:
            self._link = Link(connection, paths, max(connection_timeout, 1.0))
        except BaseException:
            connection.close()
            raise
        self._publications: list[Publication] = []
        self._subscriptions: weakref.WeakSet[Subscription] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closed = False
        self._link.reap()
        me = weakref.ref(self)  # which the connection must not keep alive
        connection.on_return = lambda pid: None if (client := me()) is None else client._agent_followed(pid)
        self.tracer_slot: tracer.Slot | None = None
        """Set by `bootstrap_client`: the agent may trace this process until the client is closed."""

    def _agent_followed(self, pid: int) -> None:
        """A successor of the agent has welcomed this client; it may trace this process, if its predecessor could."""
        self.agent_pid = pid
        if self.tracer_slot is not None:
            self.tracer_slot = tracer.hand_on(self.tracer_slot, pid)

    @classmethod
    def for_device(cls, device: str | torch.device, connection_timeout: float = 30.0) -> TensorBusClient:
        """Connect to the agent that serves a device, for launchers without ranks.

        It is sought among the agents of the path convention, by their lock files. If several serve the device, the one
        of the lowest rank is taken.

        Args:
            device: ``"cpu"``, ``"cuda:1"`` as this process counts them, or a `torch.device`.
            connection_timeout: seconds to wait for such an agent, and to connect; else as above.

        Raises:
            NoAgent: none serves it; ``resource`` is the device, and the text says which agents there are.
            InvalidArgument: no device, or none that this process sees.
            DriverError: it is a GPU, and there is no CUDA driver.
            AgentStopped, AgentGone, UnsafePath: as above.
        """
        name, deadline = device_name(device), clock.deadline_after(connection_timeout)
        rank, paths = find_agent(name, deadline)
        client = cls(rank, paths.command, paths.state, clock.remaining(deadline))
        client._link.patience = max(connection_timeout, 1.0)  # not what the search has left of it
        return client

    @property
    def connection(self) -> Connection:
        """The connection to the agent."""
        return self._link.connection

    def register_tensors(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        *,
        version: int = 0,
        replace: bool = False,
        timeout: float = 30.0,
    ) -> Publication:
        """Share tensors under a name. Their memory is exported once, here; nothing is copied.

        Args:
            name: of the publication, at most 255 bytes of UTF-8.
            tensors: name to tensor on the agent's device. CPU tensors must be in torch shared memory
                (``module.share_memory()``). On a GPU an array that offers DLPack (CuPy's) will do.
            version: the version that they hold now, >= 0.
            replace: take the name over from a publication of this same process.
            timeout: seconds to wait for the agent, and for the name's former owner to be gone.

        Raises:
            NotShareable: a tensor cannot be shared; ``resource`` names it. Nothing was registered.
            NameTaken: the name has a living owner.
            InvalidArgument: a name, version or timeout out of range.
            SystemLimit: out of descriptors or mappings; on either side.
            AgentTimeout, AgentGone, QueueFull: the agent or its queue.
            StreamCapturing: the current stream is being captured into a CUDA graph.
            DriverError: the CUDA driver refuses.
        """
        self._require_usable()
        _check_name(name)
        if not isinstance(version, int) or isinstance(version, bool) or not 0 <= version < 1 << 63:
            raise InvalidArgument(
                f"version={version!r} is no version.", resource="version", remedy="Versions are >= 0."
            )
        deadline = clock.deadline_after(timeout)
        link, ticket = self._link, Ticket()
        exporter = link.device.backend.export
        link.device.order.require_open()
        export = exporter(tensors)
        record = Register(
            name, export.manifest, version, replace, threading.get_native_id(), deadline, link.device.order.mark()
        )
        publication: Publication | None = None
        try:
            link.command(ticket, record, deadline, answered=True, ring=False)
            link.exports[ticket.sequence] = export
            link.send_descriptors(ticket.sequence, export.fds, deadline + clock.grace(timeout))
            generation = link.outcome(ticket, deadline, timeout).generation
            link.settle(ticket)
            export.close_fds()
            shared = Shared(name, exporter, link.exports, export, ticket.sequence)
            publication = Publication(link, name, generation, shared, version)
            with self._lock:
                self._publications = [known for known in self._publications if not known.closed]
                self._publications.append(publication)
            return publication
        except BaseException as error:
            export.close_fds()
            link.exports.pop(ticket.sequence, None)
            if publication is not None:
                publication._forget()
            link.give_up(ticket, error, export)
            raise

    def subscribe(self, name: str, *, timeout: float = 30.0) -> Subscription:
        """Map a publication's memory, once it exists.

        Raises:
            NoPublication: nothing of that name was published in time.
            StaleHandle: its owner went while it was being mapped. Subscribe again.
            SystemLimit: out of descriptors or mappings.
            InvalidRecord: the memory is not what its owner claims. Nothing was mapped.
            AgentTimeout, AgentGone: the agent.
        """
        self._require_usable()
        _check_name(name)
        subscription = Subscription(self._link, name, timeout)
        self._subscriptions.add(subscription)
        return subscription

    def close(self, timeout: float = 30.0) -> None:
        """Close subscriptions, then publications, then the connection. A second time does nothing.

        Raises:
            LeaseTimeout, MappingTimeout: a reader still has a publication of ours at the deadline. The client is
            still open,
                but for its subscriptions.
        """
        if self._closed or self._link.connection.forked:
            return
        deadline = clock.deadline_after(timeout)
        for subscription in list(self._subscriptions):
            subscription.close()
        if self._link.connection.usable:
            try:
                for publication in list(self._publications):
                    publication.close(clock.remaining(deadline))
            except AgentGone:
                pass  # nobody keeps account of the readers any more; there is nothing to wait for
        self._leave()

    def __enter__(self) -> TensorBusClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # The body's exception matters more than readers that do not let go: leave without waiting for them.
        for subscription in list(self._subscriptions):
            subscription.close()
        self._leave()

    def __repr__(self) -> str:
        return f"<TensorBusClient of agent rank {self.agent_rank}, pid {self.agent_pid}>"

    def _leave(self) -> None:
        self._closed = True
        for publication in self._publications:
            publication._forget()
        if self.tracer_slot is not None:
            tracer.withdraw(self.tracer_slot)
        self._link.close()

    def _require_usable(self) -> None:
        self._link.connection.require_own_process()
        if self._closed:
            raise ClientClosed("the client is closed.", remedy="Make another: bootstrap_client().")
        self._link.connection.require_usable()
        self._link.reap()


def _check_name(name: object) -> None:
    """Refuse what is no publication's name.

    Raises:
        InvalidArgument: no string, or not of 1 to `MAX_NAME_BYTES` bytes of UTF-8.
    """
    try:
        fits = isinstance(name, str) and 0 < len(name.encode()) <= MAX_NAME_BYTES
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise InvalidArgument(
            f"{name!r:.80} is no name of 1 to {MAX_NAME_BYTES} bytes of UTF-8.",
            resource="name",
            remedy="Give another.",
        )
