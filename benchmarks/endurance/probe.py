"""The client whose calls are timed: a process of its own, alone with its publication, paced."""

from __future__ import annotations

import time
from typing import Final

from costs.bare import Other
from costs.processes import Talk, client
from costs.tensors import parameters

from endurance.samples import Timed
from etha.errors import AgentTimeout

PACE: Final = 0.05
"""Seconds between two rounds: each is a lease and a ping-pong; every other one also a registration and its close."""

_BATCH: Final = 0.5
_TIMEOUT: Final = 20.0


def probe(talk: Talk) -> None:
    """Its life; for `costs.processes.Helper`. Says batches of `Timed` whose moments are ``time.monotonic()``."""
    with Other(answers=True) as other:
        bus = client()
        publication = bus.register_tensors("probe", parameters(1), timeout=_TIMEOUT)
        subscription = bus.subscribe("probe", timeout=_TIMEOUT)
        weights = parameters(1)

        def lease() -> None:
            with subscription.read(timeout=_TIMEOUT):
                pass

        def command() -> None:
            bus.register_tensors("probe/command", weights, timeout=_TIMEOUT).close(_TIMEOUT)

        for call in (lease, command, other.ping):
            call()
        talk.say("registered")
        talk.hear()
        batch: list[Timed] = []
        said, turn = time.monotonic(), 0
        while not talk.waiting():
            time.sleep(PACE)
            kinds = [("lease", lease), ("floor", other.ping)]
            if turn % 2:
                kinds.reverse()
                kinds.append(("command", command))
            turn += 1
            for kind, call in kinds:
                moment = time.monotonic()
                try:
                    call()
                except AgentTimeout:
                    kind = "unanswered"
                batch.append(Timed(moment, kind, time.monotonic() - moment))
            if time.monotonic() - said > _BATCH:
                talk.say(batch)
                batch, said = [], time.monotonic()
        talk.hear()
        subscription.close()
        publication.close(_TIMEOUT)
        talk.say("stopped")
        talk.hear()
        bus.close(_TIMEOUT)
        talk.say("left")
        talk.hear()
