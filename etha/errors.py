"""Every error that etha raises, named by who is at fault.

Four families: the caller asked for something that cannot be (`CallerError`), the agent is not
there or does not answer (`AgentError`), another worker did or does something (`PeerError`), the
system ran out of something or forbids it (`SystemFault`). Catch a leaf, a family, `EthaError`, or the
builtin that each leaf also is (`TimeoutError`, `ConnectionError`, `ValueError`, ...).

Each error carries three fields beside its text, so that no program needs to read the text:

* ``resource``: what was asked for (a publication, a tensor, a path), or None;
* ``holder``: who stands in the way (``"pid 4122 (live_eval.py)"``), or None;
* ``remedy``: what to do next, one sentence, or None.

Nothing here imports anything of etha: every layer may raise these.
"""

from __future__ import annotations

from typing import Final


class EthaError(Exception):
    """The base of everything that etha raises on purpose."""

    def __init__(
        self,
        message: str,
        *,
        resource: str | None = None,
        holder: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.resource = resource
        self.holder = holder
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message} {self.remedy}"


class CallerError(EthaError):
    """The call itself cannot be served, whoever else does what."""


class AgentError(EthaError):
    """The agent is absent, gone, another one than expected, or silent."""


class PeerError(EthaError):
    """Another worker holds, broke, closed or never published what was asked for."""


class SystemFault(EthaError):
    """The machine ran out of something, or forbids it."""


class InvalidArgument(CallerError, ValueError):
    """An argument is out of its documented range, or of the wrong kind."""


class NotShareable(CallerError, ValueError):
    """A tensor cannot be shared as it is; ``resource`` is its name. Nothing was registered."""


class StorageMoved(CallerError, ValueError):
    """A registered tensor no longer lies where it was exported; ``resource`` is its name.

    Raised by `publish` and on leaving `update`, never by a read.
    """


class NameTaken(CallerError, ValueError):
    """The publication's name belongs to a living owner."""


class VersionGone(CallerError, LookupError):
    """Exactly this version was asked for, and a newer one stands in its place."""


class NotOwner(CallerError, PermissionError):
    """Only the client that registered a publication may update, publish or close it."""


class LeaseReleased(CallerError, RuntimeError):
    """The lease, subscription or publication was released before this use of it."""


class ClientClosed(CallerError, RuntimeError):
    """The client was closed before this call."""


class ForkedClient(CallerError, RuntimeError):
    """The client belongs to the parent process; a forked child must make its own.

    Not raised for a client that the child itself made.
    """


class DeadlockError(CallerError, RuntimeError):
    """Waiting here would close a cycle; ``holder`` names the cycle. Nothing was granted.

    Not raised for a poll (``timeout=0``), which never waits, nor for
    ``update(on_timeout="revoke")``, whose wait ends by itself.
    """


class StreamCapturing(CallerError, RuntimeError):
    """The stream is being captured into a CUDA graph; nothing of the bus may be part of a graph.

    A graph may read a lease's tensors all the same, while the subscription is open.
    """


class NoAgent(AgentError, ConnectionError):
    """Nothing serves the path."""


class AgentGone(AgentError, ConnectionError):
    """The agent that served this client has ended, and none has followed within the call's timeout."""


class AgentStopped(AgentError, ConnectionError):
    """An agent holds the path and does not answer: stopped by a signal, or stuck."""


class AgentTimeout(AgentError, TimeoutError):
    """No answer within the deadline; what was asked for is cancelled as soon as the agent runs again.

    ``holder`` names the process that stands still: the agent, or a worker that was stopped while
    it held the command queue.
    """


class AgentRunning(AgentError, RuntimeError):
    """Another agent serves this path; ``holder`` is its pid."""


class AgentFailed(AgentError, RuntimeError):
    """An agent that this process started did not come to serve; the text ends with what it said on stderr."""


class OtherUser(AgentError, ConnectionError):
    """The agent at this path belongs to another user."""


class OtherNamespace(AgentError, ConnectionError):
    """The agent lives in another PID namespace, so neither side can watch the other die."""


class VersionMismatch(AgentError, ConnectionError):
    """Agent and worker speak different record schemas; both numbers are in the text."""


class StaleHandle(AgentError, ConnectionError):
    """A handle of an earlier owner, agent or boot. It was refused, not opened."""


class LeaseTimeout(PeerError, TimeoutError):
    """A lease or an update stood in the way until the deadline; ``holder`` names who held it."""


class MappingTimeout(PeerError, TimeoutError):
    """The memory is still mapped by ``holder`` at the deadline; the publication is still open."""


class VersionTimeout(PeerError, TimeoutError):
    """The version asked for was not published within the deadline."""


class NoPublication(PeerError, TimeoutError):
    """No publication of this name appeared within the deadline."""


class TornError(PeerError, RuntimeError):
    """The bytes are not one version: an update failed half-way, or wrote under a revoked lease."""


class OwnerDiedError(PeerError, ConnectionError):
    """The owner is dead; its last version cannot be leased any more."""


class PublicationClosed(PeerError, LookupError):
    """The owner closed the publication. Ends an iteration without an error."""


class InvalidRecord(PeerError, ValueError):
    """Bytes of another process are no valid record. Nothing of them was used."""


class QueueFull(SystemFault, OSError):
    """An LMDB file reached its size, or a socket stayed full until the deadline."""


class SystemLimit(SystemFault, OSError):
    """Descriptors, mappings, memory or disk ran out; ``resource`` names which."""


class DriverError(SystemFault, RuntimeError):
    """A call of the CUDA driver failed, or there is no driver; ``resource`` is the call, or what is missing.

    Attributes:
        code: the driver's ``CUresult``; 0 where no call was made, or another process reports it.
    """

    code: int = 0


class UnsafePath(SystemFault, PermissionError):
    """A file or directory that others could have planted: not ours, writable by others, or a link."""


_FAMILIES: Final = (CallerError, AgentError, PeerError, SystemFault)

LEAVES: Final[dict[str, type[EthaError]]] = {
    leaf.__name__: leaf for family in _FAMILIES for leaf in family.__subclasses__()
}
"""Every leaf by its name: an error travels between processes as its name and its fields."""
