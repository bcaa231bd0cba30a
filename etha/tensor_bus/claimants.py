"""Who asks, as every claim says it, and the checks that come before: is a number one, has a deadline passed."""

from __future__ import annotations

import math
from typing import Final, TypedDict

from etha.errors import AgentTimeout, InvalidArgument, InvalidRecord
from etha.tensor_bus import claims
from etha.tensor_bus.commands import MAX_NAME_BYTES
from etha.tensor_bus.ipc.fence import RELEASED
from etha.tensor_bus.sessions import Session

NUMBER_LIMIT: Final = 1 << 63
"""Versions, sequences and claim numbers are smaller: one more still fits into 64 bits, on either side."""


class Who(TypedDict):
    """What every claim says of its claimant."""

    client: bytes
    number: int
    actor: claims.Actor
    label: str
    deadline: float
    since: float


def who(session: Session, number: int, thread: int, deadline: float, now: float) -> Who:
    """The claimant of a request or a command.

    Raises:
        InvalidRecord: the deadline is no number.
    """
    if math.isnan(deadline):
        raise InvalidRecord("a deadline is no number.", resource="deadline")
    return {
        "client": session.client,
        "number": number,
        "actor": (session.peer.pid, thread),
        "label": session.peer.label,
        "deadline": deadline,
        "since": now,
    }


def require_number(what: str, number: int) -> None:
    """Refuse what is out of range.

    Raises:
        InvalidArgument: it is.
    """
    if not 0 <= number < NUMBER_LIMIT:
        raise InvalidArgument(
            f"{what} {number} is out of range.", resource=what, remedy=f"Give a {what} from 0 to 2**63 - 1."
        )


def require_fence(fence: int) -> int:
    """A point of a client's work, as it says it.

    Raises:
        InvalidRecord: no number that a fence can reach.
    """
    if not 0 <= fence < RELEASED:
        raise InvalidRecord(f"{fence} is no value of a fence.", resource="fence")
    return fence


def require_name(name: str) -> None:
    """Refuse what cannot name a publication. (A record holds no text that is not UTF-8.)

    Raises:
        InvalidArgument: it is empty, or longer than `MAX_NAME_BYTES`.
    """
    if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise InvalidArgument(
            f"{name!r:.80} is no name of 1 to {MAX_NAME_BYTES} bytes of UTF-8.", resource="name", remedy="Give another."
        )


def is_request(number: int) -> bool:
    """Whether a claim of this number is a request's. A command's is ended by `Cancel`, with all that belongs to it."""
    return 0 < number < NUMBER_LIMIT


def require_in_time(what: str, name: str, deadline: float, now: float) -> None:
    """Drop a command whose deadline has passed.

    Raises:
        AgentTimeout: it has.
    """
    if deadline <= now:
        raise AgentTimeout(
            f"{what} came after its deadline and was dropped.",
            resource=name,
            remedy="Is the agent overloaded, or was it stopped? Try again.",
        )
