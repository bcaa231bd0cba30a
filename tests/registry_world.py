"""A registry without a process: it is told what happens, opens and closes memory at once, and says who was told
what."""

from __future__ import annotations

import itertools

from requiring import require

from etha.errors import (
    EthaError,
)
from etha.tensor_bus.claim_table import AskUnmap, CloseMemory, Failed, Granted, MoveMemory, OpenMemory, Ring
from etha.tensor_bus.claims import (
    Claim,
    Closing,
    Import,
    Lease,
    Publication,
    Rebinding,
    Registration,
    Suspending,
    Update,
    command_number,
)
from etha.tensor_bus.ipc.manifest import Manifest
from etha.tensor_bus.journal import Journal
from etha.tensor_bus.records import encode
from etha.tensor_bus.recovery import recover
from etha.tensor_bus.registry import Registry
from etha.tensor_bus.state import _CODECS

EMPTY = Manifest((), (), (), {})


class Records:
    """What a journal writes, kept as bytes."""

    def __init__(self) -> None:
        self._data: dict[bytes, bytes] = {}

    def write(self, changes) -> None:
        for key, record in changes.items():
            if record is None:
                self._data.pop(key, None)
            else:
                self._data[key] = encode(record)

    def decoded(self) -> dict:
        return {key: _CODECS[key[:1]].decode(data) for key, data in self._data.items()}


class World:
    """A registry, an agent that opens and closes memory at once, and who was told what."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.records = Records()
        self.journal = Journal(self.records, self.registry)
        self.numbers = itertools.count(1)
        self.now = 0.0
        self.granted: list[Claim] = []
        self.failed: dict[Claim, EthaError] = {}
        self.rung: list[Import] = []
        self.asked: list[Lease] = []

    def client(self, name: str, pid: int | None = None) -> bytes:
        client = name.encode().ljust(16, b".")
        self.registry.client_joined(client, pid or sum(name.encode()), f"pid of {name}", self.now)
        return client

    def run(self) -> None:
        registry = self.registry
        registry.judge(registry.table.take_beginners(), self.now)
        while registry.table.effects:
            for effect in registry.table.take_effects():
                match effect:
                    case Granted(claim):
                        self.granted.append(claim)
                    case Failed(claim, error):
                        self.failed[claim] = error
                    case OpenMemory(generation):
                        registry.opened(generation, self.now)
                    case CloseMemory(generation):
                        registry.memory_closed(generation, self.now)
                    case MoveMemory(generation):
                        registry.rebound(generation, self.now)
                    case AskUnmap(claim):
                        self.asked.append(claim)
                    case Ring(claim):
                        self.rung.append(claim)
        self.journal.commit(self.now)

    def restart(self) -> None:
        """Another agent: all it knows is what was recorded. All processes live, and come back at once."""
        records = self.records.decoded()
        self.registry = Registry()
        self.journal = Journal(self.records, self.registry)
        found = recover(records, self.registry, self.journal, self.now, lambda pid, started: None)
        require(not found.dead, found.dead)
        for session in found.living:
            self.registry.client_rejoined(session.client)
        for publication in list(self.registry.publications.values()):
            if publication.recovering:
                self.registry.recovered(publication.generation, self.now)
        self.run()

    def _who(self, client: bytes, thread: int, timeout: float) -> dict:
        record = self.registry.table.clients[client]
        return {
            "client": client,
            "actor": (record.pid, thread),
            "label": record.label,
            "deadline": self.now + timeout,
            "since": self.now,
        }

    def register(self, client, name="w", version=0, replace=False, thread=1, timeout=9.0) -> Registration:
        claim = Registration(
            **self._who(client, thread, timeout),
            number=command_number(next(self.numbers)),
            name=name,
            generation=0,
            manifest=EMPTY,
            version=version,
            replace=replace,
        )
        self.registry.register(claim, self.now)
        self.run()
        return claim

    def subscribe(self, client, name="w", thread=1, timeout=9.0, follows=0) -> Import:
        claim = Import(
            **self._who(client, thread, timeout), number=next(self.numbers), name=name, generation=0, follows=follows
        )
        self.registry.subscribe(claim, self.now)
        self.run()
        return claim

    def read(self, client, publication, exact=None, minimum=0, thread=1, timeout=9.0) -> Lease:
        claim = Lease(
            **self._who(client, thread, timeout),
            number=next(self.numbers),
            name=publication.name,
            generation=publication.generation,
            exact=exact,
            minimum=minimum,
            through=next((held.number for held in publication.imports.values() if held.client == client), 0),
        )
        self.registry.claim(claim, self.now)
        self.run()
        return claim

    def update(self, client, publication, revoke=False, thread=1, timeout=9.0) -> Update:
        claim = Update(
            **self._who(client, thread, timeout),
            number=next(self.numbers),
            name=publication.name,
            generation=publication.generation,
            revoke=revoke,
        )
        self.registry.claim(claim, self.now)
        self.run()
        return claim

    def close(self, client, publication, thread=1, timeout=9.0) -> Closing:
        claim = Closing(
            **self._who(client, thread, timeout),
            number=command_number(next(self.numbers)),
            name=publication.name,
            generation=publication.generation,
        )
        self.registry.claim(claim, self.now)
        self.run()
        return claim

    def suspend(self, client, publication, update: Update, timeout=9.0) -> Suspending:
        claim = Suspending(
            **self._who(client, update.actor[1], timeout),
            number=command_number(next(self.numbers)),
            name=publication.name,
            generation=publication.generation,
            update=update.number,
        )
        self.registry.suspend(claim, self.now)
        self.run()
        return claim

    def rebind(self, client, publication, update: Update, timeout=9.0) -> Rebinding:
        claim = Rebinding(
            **self._who(client, update.actor[1], timeout),
            number=command_number(next(self.numbers)),
            name=publication.name,
            generation=publication.generation,
            update=update.number,
            manifest=EMPTY,
        )
        self.registry.rebind(claim, self.now)
        self.run()
        return claim

    def unmap(self, claim: Import) -> None:
        self.registry.unmapped(claim.client, claim.number, self.now)
        self.run()

    def publish(self, client, publication, update: Update | None = None, version: int | None = None) -> None:
        self.registry.publish(
            client,
            publication.generation,
            publication.version + 1 if version is None else version,
            update.number if update else 0,
            self.now,
        )
        self.run()

    def abandon(self, client, publication, update: Update) -> None:
        self.registry.abandon(client, publication.generation, update.number, self.now)
        self.run()

    def release(self, claim: Claim) -> None:
        self.registry.release(claim.client, claim.number, self.now)
        self.run()

    def die(self, client: bytes) -> None:
        self.registry.client_died(client, self.now)
        self.run()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.registry.expire(self.now)
        self.run()

    def publication(self, name="w") -> Publication:
        return self.registry.names[name]
