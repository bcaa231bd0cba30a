"""One socket to one agent: authenticated, and over when that agent, or this end, is.

A `Connection` outlives its agent and goes through several of these.
"""

from __future__ import annotations

import socket

from etha.tensor_bus.ipc.peer import Peer


class Channel:
    """A connected socket and the process at its other end; owns both.

    Attributes:
        sock: never blocks.
        agent: the process, by the kernel's word.
    """

    def __init__(self, sock: socket.socket, agent: Peer) -> None:
        self.sock = sock
        self.agent = agent

    def agent_lives(self) -> bool:
        """Whether the agent has not died."""
        try:
            return self.agent.alive()
        except ValueError:
            return True  # another thread closes this end: that says nothing of the agent

    def shut(self) -> None:
        """End the conversation; who polls the socket is woken. The descriptors stay until `close`."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other end is closed already

    def close(self) -> None:
        """Close the descriptors; idempotent. No thread may be polling the socket."""
        self.sock.close()
        self.agent.close()

    def __del__(self) -> None:
        self.close()
