"""`etha.tensor_bus.endings`: what is over is told once it is, whoever tells it."""

from __future__ import annotations

from types import SimpleNamespace

from etha.tensor_bus.endings import Endings


def test_two_threads_give_each_collected_lease_back():
    """Another thread gives back the same leases while this one marks its work: none is forgotten."""
    told: list[int] = []

    def mark(stream: int) -> int:
        if not told and not marked:
            marked.append(stream)
            endings.settle(release)  # as another thread, in the middle of this one
        return 1

    def release(number: int, fence: int) -> None:
        told.append(number)

    marked: list[int] = []
    order = SimpleNamespace(mark=mark)
    device = SimpleNamespace(ordered=True, order=order, settle=lambda: True)
    endings = Endings(SimpleNamespace(device=device))
    for number in (1, 2, 3):
        endings.lease_dropped(number, 0)
    endings.settle(release)
    assert set(told) == {1, 2, 3}
    told.clear()
    endings.settle(release)
    assert told == []
