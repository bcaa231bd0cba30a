"""What a command means: one record of the queue in, registry calls out. Used by the agent's control loop only."""

from __future__ import annotations

import math
from collections import Counter

from etha.errors import EthaError, QueueFull
from etha.tensor_bus import claims, commands
from etha.tensor_bus.claimants import is_request, require_fence, require_in_time, require_name, require_number, who
from etha.tensor_bus.claims import Closing, Rebinding, Registration, Suspending
from etha.tensor_bus.ipc.manifest import validate
from etha.tensor_bus.journal import Journal
from etha.tensor_bus.memory import Memory
from etha.tensor_bus.records import Failure
from etha.tensor_bus.registry import Registry
from etha.tensor_bus.sessions import Session
from etha.tensor_bus.state import OutcomeRecord

Answer = tuple[Session, int, OutcomeRecord]
"""What became of a session's command of this sequence."""


class Orders:
    """Serves commands, one at a time.

    Attributes:
        refused: what was wrong with them, to be recorded and told.
    """

    def __init__(self, registry: Registry, journal: Journal, memory: Memory, counters: Counter[str]) -> None:
        self.refused: list[Answer] = []
        self._registry = registry
        self._journal = journal
        self._memory = memory
        self._counters = counters

    def serve(self, session: Session, sequence: int, data: bytes, now: float, *, again: bool = False) -> None:
        """Act on one command; ``again``: it was served before, and its outcome is not known.

        What is wrong with it is put into `refused`.
        """
        try:
            require_number("sequence", sequence)
            command = commands.CODEC.decode(data)
            if not again or isinstance(command, commands.ANSWERED):
                self._command(session, sequence, command, len(data), now)
        except EthaError as error:
            self._counters["failed commands"] += 1
            self.refused.append((session, sequence, OutcomeRecord(0, Failure.of(error))))

    def _command(self, session: Session, sequence: int, command: commands.Command, size: int, now: float) -> None:
        registry, client = self._registry, session.client
        if isinstance(command, commands.Publish):
            try:
                require_number("version", command.version)
                fence = require_fence(command.fence)
                registry.publish(client, command.generation, command.version, command.update, now, fence)
                self._counters["versions"] += 1
            except EthaError as error:
                record = OutcomeRecord(command.generation, Failure.of(error))
                self.refused.append((session, sequence, record))
        elif isinstance(command, commands.Abandon):
            registry.abandon(client, command.generation, command.update, now)
        elif isinstance(command, commands.Register):
            require_name(command.name)
            require_in_time(f'the registration of "{command.name}"', command.name, command.deadline, now)
            require_number("version", command.version)
            require_fence(command.fence)
            # Before anything is promised to it: what is refused leaves nothing behind.
            claimant = who(session, claims.command_number(sequence), command.thread, command.deadline, now)
            validate(command.manifest)
            self._memory.announce(client, sequence, command.manifest)
            try:
                self._journal.reserve((client, claims.command_number(sequence)), command.name, size)
            except QueueFull:
                self._memory.retract(client, sequence)
                raise
            registry.register(
                Registration(
                    **claimant,
                    name=command.name,
                    generation=0,
                    manifest=command.manifest,
                    version=command.version,
                    replace=command.replace,
                    fence=require_fence(command.fence),
                ),
                now,
            )
        elif isinstance(command, commands.Rebind):
            self._rebind(session, sequence, command, size, now)
        elif isinstance(command, commands.Suspend):
            name = self._name(command.generation)
            require_in_time(f'the suspending of "{name}"', name, command.deadline, now)
            suspending = Suspending(
                **who(session, claims.command_number(sequence), command.thread, command.deadline, now),
                name=name,
                generation=command.generation,
                update=command.update,
            )
            registry.suspend(suspending, now)
        elif isinstance(command, commands.Release):
            session.remove_bell(command.number)
            fence = require_fence(command.fence)
            if is_request(command.number):
                registry.release(client, command.number, now, fence)
        elif isinstance(command, commands.Leave):
            session.leaving = True
        elif isinstance(command, commands.Close):
            closing = self._closing(session, sequence, command.generation, command.thread, command.deadline, now)
            name = self._name(command.generation)
            require_in_time(f'the closing of "{name}"', name, command.deadline, now)
            registry.claim(closing, now)
        else:
            answer = self._closing(session, sequence, 0, 0, math.inf, now)
            self._memory.retract(client, command.sequence)
            registry.undo(claims.command_number(command.sequence), answer, now)

    def _rebind(self, session: Session, sequence: int, command: commands.Rebind, size: int, now: float) -> None:
        name, client = self._name(command.generation), session.client
        require_in_time(f'the rebinding of "{name}"', name, command.deadline, now)
        claimant = who(session, claims.command_number(sequence), command.thread, command.deadline, now)
        validate(command.manifest)
        self._memory.announce_move(client, sequence, command.manifest, command.generation)
        try:
            self._journal.reserve((client, claims.command_number(sequence)), name, size)
        except QueueFull:
            self._memory.retract(client, sequence)
            raise
        rebinding = Rebinding(
            **claimant,
            name=name,
            generation=command.generation,
            update=command.update,
            manifest=command.manifest,
        )
        self._registry.rebind(rebinding, now)

    def _name(self, generation: int) -> str:
        publication = self._registry.publications.get(generation)
        return f"generation {generation}" if publication is None else publication.name

    def _closing(
        self, session: Session, sequence: int, generation: int, thread: int, deadline: float, now: float
    ) -> Closing:
        publication = self._registry.publications.get(generation)
        return Closing(
            **who(session, claims.command_number(sequence), thread, deadline, now),
            name=publication.name if publication is not None else "",
            generation=generation,
        )
