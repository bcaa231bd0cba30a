"""Who waits for whom, and whether one more wait would close a circle. Pure.

The nodes are threads. A thread waits for another when only the other can end its wait: by releasing a lease, by
publishing or giving up an update. A wait that ends by itself is no edge: a poll, an update that revokes at its
deadline, a read for a version that no one has begun to write. So every refusal is a circle that only a timeout could
open.

Each wait is checked once, as it begins (`Registry.judge`). That is enough: a thread that already waits can gain an
edge only because another thread begins to wait, and that one is checked against it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from etha.errors import DeadlockError
from etha.tensor_bus.claims import Actor, Claim, Closing, Lease, Publication, Registration, Update


def holders(claim: Claim, publication: Publication | None) -> list[Claim]:
    """The claims that must end before ``claim`` can be granted, those that end by themselves left out."""
    if publication is None or claim.generation not in (0, publication.generation):
        return []
    if isinstance(claim, Lease):
        return _before_read(claim, publication)
    if isinstance(claim, Update):
        leases = [] if claim.revoke else list(publication.leases.values())
        return [*leases, *_writers_before(claim, publication)]
    if isinstance(claim, Closing | Registration):
        return [*publication.leases.values(), *_writers_before(claim, publication)]
    return []


def _before_read(claim: Lease, publication: Publication) -> list[Claim]:
    if publication.update is not None:
        return [publication.update]
    if not claim.satisfied_by(publication.version):
        return [update for update in publication.waiting_updates() if not update.revoke]
    if publication.lent_to(claim.actor):
        return []
    return [update for update in publication.waiting_updates() if update.order < claim.order and not update.revoke]


def _writers_before(claim: Claim, publication: Publication) -> list[Claim]:
    active = [publication.update] if publication.update is not None else []
    queued = [
        update
        for update in publication.waiting_updates()
        if update is not claim and update.order < claim.order and not update.revoke
    ]
    return [*active, *queued]


def refuse_cycle(
    claim: Claim,
    waiting: Mapping[Actor, Iterable[Claim]],
    publications: Mapping[str, Publication],
) -> None:
    """Refuse a wait that would close a circle.

    Args:
        claim: about to wait, already in its queue.
        waiting: per thread, the claims that it waits for.
        publications: name to the live publication.

    Raises:
        DeadlockError: with the circle in ``holder``.
    """
    steps = _circle(claim, waiting, publications)
    if not steps:
        return
    story = "; ".join(
        f'{step.label} thread {step.actor[1]} waits to {_verb(step)} "{step.name}"'
        f" for {blocker.label} thread {blocker.actor[1]}"
        for step, blocker in zip(steps, [*steps[1:], claim], strict=True)
    )
    raise DeadlockError(
        f'waiting to {_verb(claim)} "{claim.name}" would never end: {story}.',
        resource=claim.name,
        holder=story,
        remedy="Release the lease, or leave the update, before this call.",
    )


def _circle(
    claim: Claim, waiting: Mapping[Actor, Iterable[Claim]], publications: Mapping[str, Publication]
) -> list[Claim]:
    """The shortest chain of waits from ``claim`` back to its own thread, ``claim`` first; empty when there is none.

    No recursion: a chain may be as long as there are threads on the box.
    """
    led_by: dict[Claim, Claim | None] = {claim: None}
    seen: set[Actor] = set()
    ahead = deque([claim])
    while ahead:
        step = ahead.popleft()
        for holder in holders(step, publications.get(step.name)):
            if holder.actor == claim.actor:
                chain = [step]
                while (before := led_by[chain[-1]]) is not None:
                    chain.append(before)
                return chain[::-1]
            if holder.actor in seen:
                continue
            seen.add(holder.actor)
            for further in waiting.get(holder.actor, ()):
                if further not in led_by:
                    led_by[further] = step
                    ahead.append(further)
    return []


def _verb(claim: Claim) -> str:
    if isinstance(claim, Lease):
        return "read"
    if isinstance(claim, Update):
        return "update"
    return "close" if isinstance(claim, Closing) else "replace"
