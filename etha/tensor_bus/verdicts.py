"""What the registry answers when the answer is no: one function per question, each returning the error or None.
Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from etha.errors import (
    AgentTimeout,
    EthaError,
    InvalidArgument,
    LeaseTimeout,
    MappingTimeout,
    NameTaken,
    NoPublication,
    NotOwner,
    OwnerDiedError,
    PublicationClosed,
    StaleHandle,
    TornError,
    VersionGone,
    VersionTimeout,
)
from etha.tensor_bus.claims import (
    Claim,
    Client,
    Import,
    Lease,
    Phase,
    Publication,
    Rebinding,
    Registration,
    Suspending,
    Update,
)


def unreadable(claim: Lease, publication: Publication, writer_ahead: bool, owner: str) -> EthaError | None:
    """Why this read can never be granted, or None when it may be, now or later."""
    name = publication.name
    if publication.phase is Phase.DEAD:
        return _dead(publication, owner)
    if publication.phase in (Phase.CLOSING, Phase.CLOSED):
        return _closed(publication, owner)
    if claim.exact is not None and claim.exact < publication.version:
        return VersionGone(
            f'version {claim.exact} of "{name}" is gone, {publication.version} stands in its place.',
            resource=name,
            remedy="Read the newest, or min_version=.",
        )
    if publication.phase is Phase.TORN and not writer_ahead:
        return TornError(
            f'the last update of "{name}" ended half-way: its bytes are no version.',
            resource=name,
            holder=owner,
            remedy="Read again after the owner's next update.",
        )
    return None


def _dead(publication: Publication, owner: str) -> OwnerDiedError:
    return OwnerDiedError(
        f'the owner of "{publication.name}", {owner}, is dead.',
        resource=publication.name,
        holder=owner,
        remedy="Subscribe again: that waits for a new owner.",
    )


def _closed(publication: Publication, owner: str) -> PublicationClosed:
    return PublicationClosed(
        f'"{publication.name}" was closed by its owner.',
        resource=publication.name,
        holder=owner,
        remedy="Subscribe again: that waits for a new owner.",
    )


def readable(claim: Lease, publication: Publication, writer_ahead: bool) -> bool:
    """Whether the read is granted now."""
    if publication.phase is not Phase.READY or publication.suspended or not claim.satisfied_by(publication.version):
        return False
    return not writer_ahead or publication.lent_to(claim.actor)


def closing(name: str) -> PublicationClosed:
    """An update came when the owner was giving its memory up already."""
    return PublicationClosed(f'"{name}" is being closed.', resource=name, remedy="Register the tensors again.")


def not_writing(name: str) -> InvalidArgument:
    """Memory is moved within an update, and this is not the one."""
    return InvalidArgument(
        f'"{name}" is not being updated by this call, or is being moved already.',
        resource=name,
        remedy="Call rebind(), suspend() and resume() one at a time.",
    )


def unpublishable(publication: Publication, version: int, update: int) -> EthaError | None:
    """Why this version cannot be the next one, or None."""
    name = publication.name
    if version <= publication.version:
        return InvalidArgument(
            f'"{name}" is at version {publication.version}; {version} is not larger.',
            resource=name,
            remedy="Versions only grow.",
        )
    active = publication.update.number if publication.update is not None else 0
    if active != update:
        text = "is being updated" if active else "is not being updated any more"
        return InvalidArgument(
            f'"{name}" {text}: this publish does not belong to it.',
            resource=name,
            remedy="Publish by leaving the update.",
        )
    if publication.suspended:
        return InvalidArgument(
            f'"{name}" is suspended: it has no memory that could be a version.',
            resource=name,
            remedy="Call resume() first.",
        )
    return None


def taken(name: str, owner: str) -> NameTaken:
    """The name has a living owner."""
    return NameTaken(
        f'"{name}" is published by {owner}.',
        resource=name,
        holder=owner,
        remedy="Choose another name; within one process, replace=True takes it over.",
    )


def _never_freed(name: str, owner: str) -> NameTaken:
    """The name's owner has no connection, so it might have been dying; it lives still."""
    return NameTaken(
        f'"{name}" is published by {owner}, which has no connection to the agent, and lives.',
        resource=name,
        holder=owner,
        remedy="Wait for its end, or end it; or choose another name.",
    )


def unopened(name: str, error: EthaError) -> EthaError:
    """An agent that has followed another cannot open the publication's memory, for this reason."""
    again = "The next subscribe() tries again; its owner's rebind() gives it other memory."
    return type(error)(
        f'the memory of "{name}" could not be opened by an agent that has followed another: {error.message}',
        resource=error.resource,
        holder=error.holder,
        remedy=again if error.remedy is None else f"{again} {error.remedy}",
    )


def over(generation: int) -> StaleHandle:
    """The publication is no more."""
    return StaleHandle(
        f"generation {generation} is over.",
        resource=str(generation),
        remedy="Register the tensors again.",
    )


def foreign(publication: Publication, owner: str) -> NotOwner:
    """The publication belongs to another client."""
    return NotOwner(
        f'"{publication.name}" belongs to {owner}.',
        resource=publication.name,
        holder=owner,
        remedy="Only its owner may do this.",
    )


def ended(claim: Import, publications: Mapping[int, Publication], clients: Mapping[bytes, Client]) -> EthaError:
    """The publication whose memory was to be mapped again is no more."""
    publication = publications.get(claim.follows)
    if publication is None:
        return over(claim.follows)
    if publication.phase is Phase.DEAD:
        return _dead(publication, _label(publication.owner, clients))
    return _closed(publication, _label(publication.owner, clients))


def unsubscribed(name: str) -> StaleHandle:
    """The reader has no import of what it wants to read."""
    return StaleHandle(
        f'the subscription to "{name}" is not known to the agent.',
        resource=name,
        remedy="Subscribe again.",
    )


def expired(
    claim: Claim,
    publication: Publication | None,
    clients: Mapping[bytes, Client],
    now: float,
    unheard: Collection[Client] = (),
) -> EthaError:
    """Why the claim was not granted by its deadline, naming who stood in the way.

    ``unheard``: readers whose work cannot be waited for yet.
    """
    name = claim.name
    if isinstance(claim, Import) and publication is not None and publication.fault is not None:
        return publication.fault
    if isinstance(claim, Import) and publication is not None and (publication.recovering or publication.suspended):
        owner = _label(publication.owner, clients)
        why = "has suspended it" if publication.suspended else "has made no call since the agent was started anew"
        return NoPublication(
            f'"{name}" has no memory that could be mapped: its owner, {owner}, {why}.',
            resource=name,
            holder=owner,
            remedy="Wait longer; its owner's next call, or its resume(), brings the memory.",
        )
    if isinstance(claim, Import):
        return NoPublication(
            f'nothing named "{name}" was published within the timeout.',
            resource=name,
            remedy="See what there is: etha status",
        )
    if publication is None:
        return over(claim.generation)
    if publication.registration is claim:
        return AgentTimeout(
            f'the memory of "{name}" was not opened by the deadline.',
            resource=name,
            remedy="Register again with a longer timeout.",
        )
    if isinstance(claim, Registration):
        has_it = clients.get(publication.owner)
        if has_it is not None and not (claim.replace and has_it.pid == claim.actor[0]):
            return taken(name, has_it.label) if has_it.connected else _never_freed(name, has_it.label)
    if isinstance(claim, Rebinding):
        return AgentTimeout(
            f'the memory of "{name}" was not opened by the deadline; it is where it was.',
            resource=name,
            remedy="Try again with a longer timeout.",
        )
    if isinstance(claim, Suspending):
        return _mapped(name, publication.mapped)
    if publication.update is not None and publication.update is not claim:
        return _held_by([publication.update], "had suspended" if publication.suspended else "been updating", name, now)
    if publication.leases and not (isinstance(claim, Lease) and not claim.satisfied_by(publication.version)):
        return _held_by(publication.leases.values(), f"held version {publication.version} of", name, now)
    if isinstance(claim, Lease):
        return VersionTimeout(
            f'"{name}" is still at version {publication.version}.',
            resource=name,
            holder=_label(publication.owner, clients),
            remedy="Its owner has not published a newer one; wait longer.",
        )
    if isinstance(claim, Update) and unheard:
        holder = ", ".join(dict.fromkeys(reader.label for reader in unheard))
        return LeaseTimeout(
            f'{holder} has read "{name}", and has made no call since the agent was started anew: until then its device'
            " work cannot be waited for.",
            resource=name,
            holder=holder,
            remedy='Wait longer, or update(on_timeout="revoke") if that work is surely done.',
        )
    if isinstance(claim, Update):
        return _held_by(publication.waiting_updates(), "been waiting to update", name, now)
    if publication.mapped:
        return _mapped(name, publication.mapped)
    return taken(name, _label(publication.owner, clients))


def _mapped(name: str, held: Iterable[Import]) -> MappingTimeout:
    holder = ", ".join(dict.fromkeys(claim.label for claim in held)) or None
    return MappingTimeout(
        f'"{name}" is still mapped by {holder or "the agent"}.',
        resource=name,
        holder=holder,
        remedy="Let it call read(), close its subscription or drop the tensors taken from it, or end it.",
    )


def _label(client: bytes, clients: Mapping[bytes, Client]) -> str:
    known = clients.get(client)
    return known.label if known is not None else "a process that has gone"


def _held_by(claims: Iterable[Claim], verb: str, name: str, now: float) -> LeaseTimeout:
    held = list(claims)
    holder = ", ".join(dict.fromkeys(claim.label for claim in held))
    age = max((now - claim.since for claim in held), default=0.0)
    return LeaseTimeout(
        f'{holder} has {verb} "{name}" for {age:.1f} s.',
        resource=name,
        holder=holder,
        remedy='Stop it, wait longer, or (for an update of your own) update(on_timeout="revoke").',
    )
