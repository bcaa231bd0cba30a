"""How many bytes of the publication were copied, measured from outside both processes.

Two ways in which a copy would show; the larger counts, as one copy may show in both:

* **Another place.** For every registered tensor, the device, inode and offset that /proc/PID/maps of
  the trainer and of the evaluator name for its first byte. Where they differ, the evaluator computes
  with memory of its own, and all bytes of that tensor count.
* **More memory.** Shared memory that appeared between the moment when the trainer had touched and
  registered its tensors while the evaluator, fully loaded, had mapped nothing, and any moment after.
  The box's ``Shmem`` (less the bus's own files, where they lie on a tmpfs) sees every copy and every
  other program; the sum of ``Pss_Shmem`` over our three processes sees only ours. A copy that any of the
  three maps shows in both, so the smaller of the two counts, and of all samples the smallest: what came and
  went again within the run was another program's. Less than 1 % of the published bytes (the design's
  budget; at least 16 KiB, for what the kernel rounds) is no copy.

Both raw numbers are in the report. A copy into private memory that the evaluator does not compute
with is not seen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from etha.cli.demo import memory
from etha.cli.demo.events import Placement

_ROUNDING: Final = 16 * 1024


class Shared(NamedTuple):
    """Shared memory in bytes, at one moment."""

    box: int
    ours: int


class CopyMeter:
    """Collects placements and samples, and says what they amount to.

    Args:
        directory: Where the bus keeps its files.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._owner: dict[str, tuple[Placement, memory.Backing | None]] = {}
        self._elsewhere: set[str] = set()
        self._before: Shared | None = None
        self._growth: Shared | None = None
        self.owner_inodes: tuple[int, ...] = ()
        self.reader_inodes: tuple[int, ...] = ()

    @property
    def published(self) -> int:
        """Bytes of all registered tensors."""
        return sum(placement.nbytes for placement, _ in self._owner.values())

    @property
    def growth(self) -> Shared:
        """The smallest growth of each kind since `start`, never below 0."""
        return self._growth or Shared(0, 0)

    def owner_registered(self, pid: int, tensors: Sequence[Placement]) -> None:
        """Looks where the trainer's tensors lie."""
        layout = memory.Layout(pid)
        self._owner = {t.name: (t, layout.backing_of(t)) for t in tensors}
        self.owner_inodes = _inodes([backing for _, backing in self._owner.values()])

    def reader_mapped(self, pid: int, tensors: Sequence[Placement]) -> None:
        """Looks where the evaluator's lie, while it waits; a tensor once found elsewhere stays counted."""
        layout = memory.Layout(pid)
        seen = {t.name: layout.backing_of(t) for t in tensors}
        for name, (_, backing) in self._owner.items():
            if backing is None or seen.get(name) != backing:
                self._elsewhere.add(name)
        self.reader_inodes = _inodes([seen.get(name) for name in self._owner])

    def start(self, pids: Sequence[int]) -> None:
        """The first sample: nothing of the evaluator's is mapped yet."""
        self._before = self._sample(pids)

    def sample(self, pids: Sequence[int]) -> None:
        """Another sample; all of ``pids`` must be alive, or their share would be missing."""
        if self._before is None:
            return
        now = self._sample(pids)
        grown = Shared(max(0, now.box - self._before.box), max(0, now.ours - self._before.ours))
        known = self._growth or grown
        self._growth = Shared(min(known.box, grown.box), min(known.ours, grown.ours))

    def copied(self) -> int:
        """Bytes copied, by the two measures above."""
        elsewhere = sum(self._owner[name][0].nbytes for name in self._elsewhere)
        # Before Linux 5.4 there is no Pss_Shmem: then the box's figure stands alone, noise and all.
        counts_ours = self._before is not None and self._before.ours > 0
        growth = min(self.growth) if counts_ours else self.growth.box
        tolerance = max(_ROUNDING, self.published // 100)
        return max(elsewhere, growth if growth > tolerance else 0)

    def _sample(self, pids: Sequence[int]) -> Shared:
        box = memory.box_shared_bytes() - memory.tmpfs_bytes(self._directory)
        return Shared(box, sum(memory.process_shared_bytes(pid) for pid in pids))


def _inodes(backings: Sequence[memory.Backing | None]) -> tuple[int, ...]:
    """Distinct inodes in the order of the tensors; 0 stands for memory that no file backs."""
    return tuple(dict.fromkeys(0 if backing is None else backing.inode for backing in backings))
