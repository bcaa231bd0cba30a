"""Who waits for a name: registrations for it to be free, subscriptions for it to be published. Pure, in order of
arrival."""

from __future__ import annotations

from etha.tensor_bus.claims import Claim, Registration


class NameQueue:
    """The claims that wait for names."""

    def __init__(self) -> None:
        self._wanting: dict[str, list[Claim]] = {}

    def add(self, claim: Claim) -> None:
        """The claim begins to wait for its name."""
        self._wanting.setdefault(claim.name, []).append(claim)

    def remove(self, claim: Claim) -> None:
        """It has it, or wants it no more."""
        wanting = self._wanting.get(claim.name)
        if wanting is not None and claim in wanting:
            wanting.remove(claim)
            if not wanting:
                del self._wanting[claim.name]

    def of(self, name: str) -> list[Claim]:
        """Who waits for a name, the first first."""
        return list(self._wanting.get(name, ()))

    def registrations(self, name: str) -> list[Registration]:
        """The registrations among them."""
        return [claim for claim in self.of(name) if isinstance(claim, Registration)]
