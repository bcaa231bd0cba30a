"""The agent and its files, seen from outside: from ``/proc`` and from the state LMDB."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

from costs.resting import cpu_seconds

from endurance.samples import Sample
from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.state import ClaimRecord, OutcomeRecord, StateReader


class Sampler:
    """Looks at the agent of rank 0. Made after the last fork: it holds an LMDB environment."""

    def __init__(self, pid: int) -> None:
        self.zero = time.monotonic()
        """The moment that counts as 0."""
        self._paths = agent_paths(0)
        self._state = StateReader(self._paths.state)
        self._epoch = -1
        self._before: Counter[str] = Counter()
        self._of_this_agent: dict[str, int] = {}
        self._cpu_before = 0.0
        self._pid = pid

    def look(self) -> Sample:
        """What is, now."""
        self._count()
        memory = _memory(self._pid)
        found = self._state.snapshot((ClaimRecord, OutcomeRecord))
        return Sample(
            moment=time.monotonic() - self.zero,
            commands=self._counted("commands"),
            rss=memory["Rss"],
            private=memory["Private_Clean"] + memory["Private_Dirty"],
            descriptors=len(os.listdir(f"/proc/{self._pid}/fd")),
            mappings=Path(f"/proc/{self._pid}/maps").read_bytes().count(b"\n"),
            command_file=os.stat(self._paths.command).st_blocks * 512,
            state_file=os.stat(self._paths.state).st_blocks * 512,
            claims=len(found[ClaimRecord]),
            outcomes=len(found[OutcomeRecord]),
            cpu=self._cpu_before + cpu_seconds(self._pid),
            load=os.getloadavg()[0],
            mistakes=self._counted("mistakes"),
        )

    def leave(self) -> None:
        """The agent is about to be killed: remember what it had used."""
        self._count()
        self._cpu_before += cpu_seconds(self._pid)

    def follow(self, pid: int) -> None:
        """Another serves in its place."""
        self._pid = pid

    def close(self) -> None:
        """Give back the file."""
        self._state.close()

    def _count(self) -> None:
        agent = self._state.agent()
        if agent is None:
            return
        if agent.epoch != self._epoch:
            self._before.update(self._of_this_agent)
            self._epoch = agent.epoch
        self._of_this_agent = agent.counters

    def _counted(self, name: str) -> int:
        return self._before[name] + self._of_this_agent.get(name, 0)


def _memory(pid: int) -> dict[str, int]:
    """``/proc/PID/smaps_rollup`` (proc_pid_smaps(5)), in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    fields = (line.split() for line in lines)
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields}
