"""A hostile worker: it sends an agent packets over the real socket and commands through the real queue, one at a time.

Each case is followed by a question whose answer is known (a subscription to nothing, with a deadline that has passed).
When it is answered, or the connection has been cut, the agent has handled the case, and what that took of its processor
time and its memory is read in /proc: ``/proc/PID/task/PID/schedstat`` (its control loop alone, in nanoseconds) and
``VmHWM`` of ``/proc/PID/status``, set back before each case (``/proc/PID/clear_refs``; proc_pid_clear_refs(5)).

It runs in a process of its own, so that the agent's last word about it is that it died: whatever it held must go then.

What a case does depends on what came before it, so a round is run again from its beginning: `Feeder.run` with the
same seed, and numbers that end with the one in question.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Final

import msgspec
from hostile import HEADS, Known, bytes_of, damaged, maker
from samples import COMMANDS, FROM_WORKER, sealed

from etha.errors import EthaError
from etha.tensor_bus import clock, commands, packets, wire
from etha.tensor_bus.command_queue import CommandQueue
from etha.tensor_bus.ipc.manifest import HostAllocation, Manifest, Storage, TensorSpec
from etha.tensor_bus.ipc.process import boot_id, pid_namespace
from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.records import SCHEMA, encode

PATIENCE: Final = 20.0
_PACKET: Final = maker(packets.FromWorker)
_COMMAND: Final = maker(commands.Command)
_PACKETS: Final = tuple(encode(record) for record in FROM_WORKER)
_COMMANDS: Final = tuple(encode(record) for record in COMMANDS)
_FRIENDLY: Final = 0.3
_QUESTION: Final = "nothing has this name"
_FIRST_QUESTION: Final = 1 << 40
"""Numbers of the questions; the hostile ones are smaller, or make no sense."""


class Silent(Exception):
    """The agent neither answered nor hung up."""


class Feeder:
    """One process's war on an agent.

    Attributes:
        prices: per case, its number, how it was made, its bytes, nanoseconds of the agent's loop, bytes by which the
            agent's memory grew at its peak; and nanoseconds of a question behind it, the control. What that takes
            beyond the median is the agent's own (a heartbeat, a collection) and the machine's.
        did: how often what was done.
        question_price: nanoseconds of the agent's loop that a question takes, the median; taken off each case's price.
    """

    def __init__(self, pid: int) -> None:
        self.prices: list[tuple[int, str, int, int, int, int]] = []
        self.did: Counter[str] = Counter()
        self._pid = pid
        self._paths = agent_paths(0)
        self._queue = CommandQueue(self._paths)
        self._hello = packets.Hello(SCHEMA, boot_id(), pid_namespace())
        self._sock: socket.socket | None = None
        self._client = b""
        self._sequence = 0
        self._number = 0
        self._question = _FIRST_QUESTION
        self.question_price = 0
        self._kind = ""
        self._files = [os.memfd_create("hostile") for _ in range(2)]
        for fd in self._files:
            os.ftruncate(fd, 1 << 16)
        self._known = Known(clock.now, long=True)
        self._forget()

    # -- rounds -----------------------------------------------------------------------------------

    def run(self, seed: int, numbers: range) -> None:
        """Run cases; after each, the agent is there and has said something, or hung up.

        Raises:
            Silent: it did neither.
        """
        source = Random()
        self._be_connected(source)
        self.question_price = self._price_of_a_question()
        for number in numbers:
            source.seed(seed << 32 | number)
            self._be_connected(source)
            spent, held = self._spent(), self._held()
            size = self._case(source)
            self._ask()
            spent, grown = self._spent() - spent - self.question_price, self._peak() - held
            self._be_connected(source)
            idle = self._spent()
            self._ask()
            idle = self._spent() - idle - self.question_price
            self.prices.append((number, self._kind, size, spent, grown, idle))

    def _price_of_a_question(self) -> int:
        prices = []
        for _ in range(100):
            before = self._spent()
            self._ask()
            prices.append(self._spent() - before)
        return sorted(prices)[len(prices) // 2]

    def _case(self, source: Random) -> int:
        """Do one thing; how many bytes it had."""
        if source.random() < _FRIENDLY:
            return self._go_on(source)
        kind = self._kind = source.choice(
            ("packet", "packet", "bytes", "command", "command", "record", "rights", "odd")
        )
        self.did[kind] += 1
        if kind == "packet":
            return self._send(bytes_of(_PACKET(source, self._known)))
        if kind == "bytes":
            return self._send(damaged(source.choice(_PACKETS), source, _PACKETS))
        if kind == "command":
            return self._put(bytes_of(_COMMAND(source, self._known)), self._sequence_of(source))
        if kind == "record":
            return self._put(damaged(source.choice(_COMMANDS), source, _COMMANDS), self._sequence_of(source))
        if kind == "rights":
            return self._send_rights(source)
        return self._odd(source)

    # -- hostile ----------------------------------------------------------------------------------

    def _send_rights(self, source: Random) -> int:
        """Descriptors, of every kind and number, with a packet that may carry some or none."""
        fds = [self._files[0], self._files[1]]
        ends = [*os.pipe(), os.open("/dev/null", os.O_RDWR), os.open("/", os.O_RDONLY), os.eventfd(0), os.dup(2)]
        ends += [each.detach() for each in socket.socketpair()]
        count = source.choice((1, 1, 1, 2, 3, 20, packets.FDS_PER_PACKET))
        some = [source.choice((*fds, *ends)) for _ in range(count)]
        sequence = source.choice((self._sequence, self._sequence - 1, 0, source.choice(self._known.values["number"])))
        packet = source.choice(
            (
                packets.Descriptors(sequence, source.choice((0, 0, 0, 1, -1, 2**63, 2**64 - 1))),
                packets.Bell(source.choice(self._known.values["through"]), source.choice((0, -1, 2**64 - 1))),
                packets.RingForCommands(),
            )
        )
        try:
            return self._send(encode(packet), some)
        finally:
            wire.close_all(ends)

    def _odd(self, source: Random) -> int:
        """What is no record, no packet, or in nobody's place."""
        draw = source.randrange(8)
        if draw == 0:
            return self._send(b"")
        if draw == 1:
            return self._send(bytes(packets.MAX_PACKET_BYTES + source.choice((0, 1, 20_000))))
        if draw == 2:
            return self._send(source.randbytes(source.randrange(1, 200)))
        if draw == 3:  # a command of nobody's
            record = bytes_of(_COMMAND(source, self._known))
            self._queue.put(source.randbytes(16), source.choice((0, 1, 2**63, 2**64 - 1)), record, clock.now() + 5)
        elif draw == 4:  # keys that are no command's
            for key in (b"\0", HEADS, self._client[:15], self._client, self._client + b"x", self._client + b"\0" * 9):
                self._commit(key, encode(commands.Leave()))
        elif draw == 5:
            self._put(b"", self._sequence_of(source))
        elif draw == 6:  # the same number again and again
            count = source.choice((10, 500, 2000))
            numbers = (source.choice(self._known.values["claims"]),) * count
            return self._send(encode(packets.Reassert(numbers, (self._sequence,) * count, source.random() < 0.5)))
        else:  # a kind of command that there is not, with a long name
            self._put(
                sealed(msgspec.msgpack.encode(["no\n" * source.choice((1, 30, 20_000)), 1])), self._sequence_of(source)
            )
        return self._send(encode(packets.RingForCommands()))

    def _sequence_of(self, source: Random) -> int:
        """Mostly the next; sometimes one that was, one far ahead, or one out of range."""
        draw = source.random()
        if draw < 0.9:
            self._sequence += 1
            return self._sequence
        if draw < 0.99:
            return max(0, self._sequence - source.choice((0, 1, 2, self._sequence)))
        return source.choice((2**62, 2**63 - 1, 2**63, 2**64 - 1))

    def _put(self, record: bytes, sequence: int) -> int:
        self._queue.put(self._client, sequence, record, clock.now() + 5)
        self._send(encode(packets.RingForCommands()))
        return len(record)

    def _commit(self, key: bytes, record: bytes) -> None:
        with self._queue._env.begin(write=True) as transaction:
            transaction.put(key, record)

    # -- what a friend would do, so that there is something to be hostile to --------------------------

    def _go_on(self, source: Random) -> int:
        """One step that makes sense."""
        self._kind = "friendly"
        self.did["friendly"] += 1
        deadline, thread = clock.now() + 0.05, threading.get_native_id()
        self._number += 1
        draw = source.random()
        if draw < 0.2 or not self._mine:
            record = commands.Register(
                source.choice(self._names), self._manifest(), 0, source.random() < 0.3, thread, clock.now() + 5
            )
            return self._command(record, self._files)
        if draw < 0.35 or not self._imports:
            name = source.choice((*self._names, "policy"))
            return self._send(encode(packets.Subscribe(self._number, name, thread, deadline)))
        if draw < 0.6:
            through, generation = source.choice(self._imports)
            return self._send(encode(packets.Read(self._number, generation, "r", None, 0, thread, deadline, through)))
        generation = source.choice(tuple(self._mine))
        update = self._mine[generation]
        if draw < 0.8 and not update:
            self._asked[self._number] = generation
            return self._send(
                encode(packets.Write(self._number, generation, "w", source.random() < 0.7, thread, deadline))
            )
        if draw < 0.85:
            return self._send(encode(packets.Release(source.choice(self._known.values["number"]))))
        self._version += 1
        kinds: tuple[commands.Command, ...] = (
            commands.Publish(generation, self._version, update),
            commands.Publish(generation, self._version, 0),
            commands.Abandon(generation, update),
            commands.Suspend(generation, update, thread, deadline),
            commands.Rebind(generation, update, self._manifest(), thread, clock.now() + 5),
            commands.Close(generation, thread, deadline),
            commands.Cancel(source.choice((self._sequence - 1, self._sequence))),
        )
        record = source.choice(kinds)
        if isinstance(record, commands.Publish | commands.Abandon | commands.Close):
            self._mine[generation] = 0
        return self._command(record, self._files if isinstance(record, commands.Rebind) else ())

    def _command(self, record: commands.Command, fds: Sequence[int]) -> int:
        self._sequence += 1
        size = self._put(encode(record), self._sequence)
        return size + (self._send(encode(packets.Descriptors(self._sequence, 0)), fds) if fds else 0)

    def _manifest(self) -> Manifest:
        allocations = []
        for fd in self._files:
            found = os.fstat(fd)
            allocations.append(HostAllocation(found.st_dev, found.st_ino, found.st_size))
        spec = TensorSpec(0, "float32", (16, 16), (16, 1), 0)
        return Manifest(tuple(allocations), (Storage(0, 0, 4096), Storage(1, 0, 4096)), (spec,), {"w": 0})

    # -- the connection ---------------------------------------------------------------------------

    def _be_connected(self, source: Random) -> None:
        """A connection, as a new client or as the one that was cut."""
        if self._sock is not None:
            return
        again = self._client if self._client and source.random() < 0.8 else b""
        if source.random() < 0.1:
            self._storm(source)
        self._sock = sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(self._paths.socket)
        sock.setblocking(False)
        hello = packets.Hello(self._hello.schema, self._hello.boot, self._hello.namespace, again)
        wire.send(sock, encode(hello))
        reply = self._hear()
        if isinstance(reply, packets.Refused) and again:  # it had left, by its own word
            self._hang_up()
            self._client = b""
            self._be_connected(source)
            return
        if not isinstance(reply, packets.Welcome):
            raise Silent(f"the greeting was answered by {reply}")
        if not again:
            self._client, self._sequence = reply.client, 0
            self._forget()

    def _storm(self, source: Random) -> None:
        """Strangers who greet badly, or not at all."""
        self.did["stranger"] += 1
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(self._paths.socket)
            record = damaged(encode(self._hello), source, _PACKETS)
            try:
                wire.send(stranger, source.choice((record, bytes_of(_PACKET(source, self._known)), b"\0")))
            except (BlockingIOError, ConnectionError, OSError):
                return

    def _send(self, data: bytes, fds: Sequence[int] = ()) -> int:
        if self._sock is not None:
            try:
                wire.send(self._sock, data, fds)
            except (ConnectionError, BlockingIOError):
                self._hang_up()
            except OSError:  # longer than a packet may be at all
                self.did["unsendable"] += 1
        return len(data)

    def _ask(self) -> None:
        """Return when everything that was sent has been handled."""
        self._question += 1
        if self._sock is None:
            return
        self._send(encode(packets.Subscribe(self._question, _QUESTION, 1, 0.0)))
        while self._sock is not None:
            reply = self._hear()
            if reply is None:
                self.did["cut"] += 1
                self._hang_up()
            elif isinstance(reply, packets.Refused) and reply.number == self._question:
                return
            else:
                self._note(reply)

    def _hear(self) -> packets.FromAgent | None:
        sock = self._sock
        if sock is None:
            return None
        if not select.select([sock], [], [], PATIENCE)[0]:
            raise Silent(f"the agent, pid {self._pid}, said nothing for {PATIENCE} s")
        try:
            data, fds = wire.receive(sock)
        except ConnectionError:
            return None
        wire.close_all(fds)
        return packets.FROM_AGENT.decode(data) if data else None

    def _note(self, reply: packets.FromAgent) -> None:
        """What is granted fits into what is asked next."""
        self.did[type(reply).__name__] += 1
        values = self._known.values
        if isinstance(reply, packets.Outcome) and reply.failure is None and reply.generation:
            values["generation"].append(reply.generation)
            self._mine.setdefault(reply.generation, 0)
        elif isinstance(reply, packets.Imported):
            values["generation"].append(reply.generation)
            values["through"].append(reply.number)
            self._imports.append((reply.number, reply.generation))
        elif isinstance(reply, packets.MayWrite):
            values["update"].append(reply.number)
            self._mine[self._asked.pop(reply.number, values["generation"][-1])] = reply.number
        elif isinstance(reply, packets.Leased):
            values["version"].append(reply.version)
        values["number"].append(self._number)
        values["claims"].append(self._number)
        values["commands"].append(self._sequence)

    def _forget(self) -> None:
        """Nothing is known of what a new client holds."""
        self._names = [f"hostile {self._client.hex()[:6]} {number}" for number in range(4)]
        fits: dict[str, list[object]] = {
            "name": [*self._names, "policy"],
            "generation": [1],
            "number": [1],
            "through": [1],
            "update": [0],
            "version": [0],
            "thread": [threading.get_native_id()],
            "claims": [1],
            "commands": [1],
            "client": [b""],
            "schema": [SCHEMA],
            "boot": [self._hello.boot],
            "namespace": [self._hello.namespace],
        }
        self._mine: dict[int, int] = {}
        self._asked: dict[int, int] = {}
        self._imports: list[tuple[int, int]] = []
        self._version = 0
        self._known.values = {name: deque(some, maxlen=12) for name, some in fits.items()}
        self._known.manifests = (self._manifest(),)

    def _hang_up(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    # -- what it costs the agent -------------------------------------------------------------------

    def _spent(self) -> int:
        return int(Path(f"/proc/{self._pid}/task/{self._pid}/schedstat").read_bytes().split()[0])

    def _held(self) -> int:
        """Resident bytes, and the peak is set back to them."""
        Path(f"/proc/{self._pid}/clear_refs").write_bytes(b"5")
        return self._status(b"VmRSS:")

    def _peak(self) -> int:
        return self._status(b"VmHWM:")

    def _status(self, key: bytes) -> int:
        for line in Path(f"/proc/{self._pid}/status").read_bytes().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) << 10
        raise EthaError(f"/proc/{self._pid}/status has no {key!r}")
