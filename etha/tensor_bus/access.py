"""Who may do what: the questions that come before any rule about waiting. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from etha.tensor_bus import verdicts
from etha.tensor_bus.claim_table import ClaimTable
from etha.tensor_bus.claims import Closing, Lease, Phase, Publication, Rebinding, Registration, Suspending, Update


def owned(publications: Mapping[int, Publication], table: ClaimTable, client: bytes, generation: int) -> Publication:
    """The live publication of this generation, which is the client's.

    Raises:
        StaleHandle: it is over, or has not begun.
        NotOwner: it belongs to another client.
    """
    publication = publications.get(generation)
    if publication is None or not publication.live or publication.phase is Phase.OPENING:
        raise verdicts.over(generation)
    if publication.owner != client:
        raise verdicts.foreign(publication, table.label(publication.owner))
    return publication


def subscribed(publications: Mapping[int, Publication], claim: Lease) -> Publication:
    """The publication that the claim would read, live or dead.

    Raises:
        StaleHandle: its client has no such import of it.
    """
    publication = publications.get(claim.generation)
    if publication is None or (claim.client, claim.through) not in publication.imports:
        raise verdicts.unsubscribed(claim.name)
    return publication


def concerned(
    publications: Mapping[int, Publication], table: ClaimTable, claim: Lease | Update | Closing
) -> Publication:
    """What a read, an update or a closing is about: `subscribed`, or `owned`, and raises what they do."""
    if isinstance(claim, Lease):
        return subscribed(publications, claim)
    return owned(publications, table, claim.client, claim.generation)


def written_by(
    publications: Mapping[int, Publication], table: ClaimTable, claim: Rebinding | Suspending
) -> Publication:
    """The publication that the claim would move, within the update that it names.

    Raises:
        StaleHandle, NotOwner: see `owned`.
        InvalidArgument: that update is not the one that writes, or it is being moved already.
    """
    publication = owned(publications, table, claim.client, claim.generation)
    if publication.update is None or publication.update.number != claim.update or publication.moving is not None:
        raise verdicts.not_writing(publication.name)
    return publication


def made_by(publications: Mapping[int, Publication], client: bytes, number: int) -> Publication | None:
    """What the client's registration of this number has made, unless nothing of it is left."""
    return next((made for made in publications.values() if (made.owner, made.number) == (client, number)), None)


def is_up(publication: Publication | None, generation: int) -> bool:
    """Whether what has the name is still this generation, and is not being closed."""
    return publication is not None and publication.generation == generation and publication.phase is not Phase.CLOSING


def may_follow(claim: Registration, holder: Publication, table: ClaimTable) -> bool:
    """Whether the registration may wait for its name: its owner is dying, or is to be replaced."""
    return not table.clients[holder.owner].connected or may_replace(claim, holder, table)


def may_replace(claim: Registration, holder: Publication, table: ClaimTable) -> bool:
    """Whether the registration may end the publication that has its name: it asks to, and is of the same process."""
    return claim.replace and table.clients[holder.owner].pid == claim.actor[0]
