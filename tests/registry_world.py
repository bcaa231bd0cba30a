"""A registry without a process: it is told what happens, opens and closes memory at once, and says who was told
what."""

from __future__ import annotations

import itertools

from etha.errors import (
    EthaError,
)
from etha.tensor_bus.claim_table import CloseMemory, Failed, Granted, OpenMemory, Ring
from etha.tensor_bus.claims import (
    Claim,
    Closing,
    Import,
    Lease,
    Publication,
    Registration,
    Update,
    command_number,
)
from etha.tensor_bus.ipc.manifest import Manifest
from etha.tensor_bus.registry import Registry

EMPTY = Manifest((), (), (), {})


class World:
    """A registry, an agent that opens and closes memory at once, and who was told what."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.numbers = itertools.count(1)
        self.now = 0.0
        self.granted: list[Claim] = []
        self.failed: dict[Claim, EthaError] = {}
        self.rung: list[Import] = []

    def client(self, name: str, pid: int | None = None) -> bytes:
        client = name.encode()
        self.registry.client_joined(client, pid or sum(client), f"pid of {name}", self.now)
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
                    case Ring(claim):
                        self.rung.append(claim)
        registry.table.take_dirty()

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
