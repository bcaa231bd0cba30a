"""Ω: what must hold after every round of every fault. `Omega.faults` says what does not.

The agent's descriptors and shared mappings, the claims and publications on record, the commands in the queue, the files
in the runtime directory and in /dev/shm, the children of this process are what they were when the scene was at rest; no
reader slot of LMDB belongs to the dead; the agent is the one that is expected, has said nothing on stderr and has made
no mistake; ``policy`` shows the version that its owner was told of, whole; and a canary can be registered, read,
compared and closed in time.

What is cleared up beside the agent's loop may take until `PATIENCE_SECONDS` have gone.
"""

from __future__ import annotations

import glob
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from box import until
from scene import Scene

from etha.tensor_bus.command_queue import CommandQueue
from etha.tensor_bus.environments import open_environment
from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.state import MAP_SIZE, ClaimRecord, ClientRecord, PublicationRecord, VersionRecord

PATIENCE_SECONDS = 2.0
CANARY_SECONDS = 2.0
QUEUE_SLACK = 64
"""Pages by which the queue's file may grow over a whole series of rounds: it is reused, so it stays small."""


class Omega:
    """The baseline of a scene at rest, and what has come to differ from it."""

    def __init__(self, scene: Scene, may_say: str | None = None, slack: int = QUEUE_SLACK) -> None:
        """The scene is at rest.

        Args:
            scene: what is looked at.
            may_say: a pattern of the lines that its agent may put on stderr; by default none.
            slack: pages by which the queue's file may grow over a whole series of rounds.
        """
        self._scene = scene
        self._may_say = may_say
        self._slack = slack
        self._paths = agent_paths(0, str(scene.runtime / "agent_rank0_command.lmdb"), scene.state.path)
        self._queue = CommandQueue(self._paths)
        self._canaries = 0
        self._heard = ""
        self._baseline = self._at_rest()
        self._baseline["files"] = self._files()
        self._pages = self._last_page()

    def close(self) -> None:
        """Give the queue's file back."""
        self._queue.close()

    def _at_rest(self) -> dict[str, Counter]:
        """What stays the same over three canaries. An agent that has just followed another fetches descriptors that its
        owners send as well, and closes what it has twice."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        looks: list[dict[str, Counter]] = []
        while len(looks) < 3 or (looks[-3:] != 3 * looks[-1:] and time.monotonic() < deadline):
            self.canary()
            looks.append(self._look())
        return looks[-1]

    def faults(self) -> list[str]:
        """Everything that is not as it must be, in words; empty when all is well."""
        found = [*self._said(), *self._versions(), *self.canary()]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (strange := self._strange()) and time.monotonic() < deadline:
            os.sched_yield()
        return found + strange

    def accept_queue(self) -> None:
        """The queue's file may be as large as it is now."""
        self._pages = self._last_page()

    def accept_said(self, awaited: str = "") -> str:
        """What the agent has said on stderr since this was last called; it may have said it.

        Args:
            awaited: part of it. A thread of the agent's writes its log, so that may take a moment.
        """
        until(lambda: awaited in self._scene.agent.errors.read_text())
        before, self._heard = self._heard, self._scene.agent.errors.read_text()
        return self._heard.removeprefix(before)

    def dead_readers(self) -> list[int]:
        """Pids of the dead that still have a reader slot of one of the files."""
        return [pid for pid in self._readers() if not Path(f"/proc/{pid}").exists()]

    def strange_lines(self) -> list[str]:
        """What the agent has said and may not say."""
        text = self._scene.agent.errors.read_text(errors="backslashreplace")
        lines = text.removeprefix(self._heard).split("\n")
        return [line for line in lines if line and not (self._may_say and re.match(self._may_say, line))]

    # -- what may take a moment -------------------------------------------------------------------

    def _strange(self) -> list[str]:
        if self._scene.agent.process.poll() is not None:
            return []
        now = self._look()
        found = []
        for what, look in now.items():
            more, less = look - self._baseline[what], self._baseline[what] - look
            if more or less:
                found.append(f"{what}: more {dict(more)}, less {dict(less)}")
        new = self._files() - self._baseline["files"]
        if new:
            found.append(f"new files: {sorted(new)}")
        if dead := self.dead_readers():
            found.append(f"reader slots of the dead: {dead}")
        strangers = self._queue.clients() - {key[1:17] for key in self._scene.state.all(ClientRecord)}
        if strangers:
            found.append(f"commands of clients that are gone: {len(strangers)}")
        if zombies := self._zombies():
            found.append(f"zombies: {zombies}")
        return found

    def _look(self) -> dict[str, Counter]:
        pid, state = self._scene.agent.pid, self._scene.state
        names = {key[1:]: record.name for key, record in state.all(PublicationRecord).items()}
        return {
            "descriptors": Counter(filter(None, map(self._target, glob.glob(f"/proc/{pid}/fd/*")))),
            "mappings": _shared_mappings(pid),
            "claims": Counter(
                f"{claim.kind} of {claim.name}{'' if claim.granted else ', waiting'}"
                for claim in state.all(ClaimRecord).values()
            ),
            "publications": Counter(
                f"{names.get(key[1:])}: {record.phase}"
                f"{', recovering' * record.recovering}{', suspended' * record.suspended}{', wanted' * record.wanted}"
                for key, record in state.all(VersionRecord).items()
            ),
            "clients": Counter(
                "connected" if client.connected else "orphaned" for client in state.all(ClientRecord).values()
            ),
        }

    def _target(self, link: str) -> str | None:
        """What a descriptor is of, without its numbers; None if that is a look into /proc, which is over soon."""
        try:
            target = os.readlink(link)
        except FileNotFoundError:
            return None
        return (
            None
            if target.startswith("/proc/")
            else re.sub(r"\d+|torch_\S+", "#", target.replace(str(self._scene.directory), ""))
        )

    def _files(self) -> Counter:
        here = [str(path) for path in self._scene.runtime.iterdir()]
        # A file of torch's names its maker. That of a process which is none of this scene's is not ours to judge.
        memory = [
            f"/dev/shm/{name}"
            for name in os.listdir("/dev/shm")
            if not (made := re.match(r"torch_(\d+)_", name)) or int(made[1]) in self._scene.strays
        ]
        return Counter(here + memory + glob.glob("/tmp/agent_rank*"))

    def _readers(self) -> list[int]:
        pids: list[int] = []
        for path in (self._paths.command, self._paths.state):
            environment = open_environment(path, map_size=MAP_SIZE, readonly=True)
            try:
                rows = [line.split() for line in environment.env.readers().splitlines()[1:]]
            finally:
                environment.close()
            pids += [int(row[0]) for row in rows if len(row) == 3]
        return pids

    def _last_page(self) -> int:
        environment = open_environment(self._paths.command, map_size=MAP_SIZE, readonly=True)
        try:
            return environment.env.info()["last_pgno"]
        finally:
            environment.close()

    def _zombies(self) -> list[int]:
        parents = {os.getpid(), self._scene.agent.pid}
        found = []
        for path in glob.glob("/proc/[0-9]*/stat"):
            try:
                text = Path(path).read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            state, parent = text.rpartition(")")[2].split()[:2]
            if state == "Z" and int(parent) in parents:
                found.append(int(path.split("/")[2]))
        return found

    # -- what must be so at once ------------------------------------------------------------------

    def _said(self) -> list[str]:
        agent = self._scene.agent
        if agent.process.poll() is not None:
            return [f"the agent, pid {agent.pid}, has ended with {agent.process.returncode}"]
        found = []
        record = self._scene.state.agent()
        if record is None or record.pid != agent.pid:
            found.append(f"the state is that of {record}, and pid {agent.pid} was expected")
        elif record.counters.get("mistakes"):
            found.append(f"the agent counts mistakes of its own: {record.counters}")
        if said := self.strange_lines():
            found.append(f"the agent said: {said}")
        grown = self._last_page() - self._pages
        if grown > self._slack:
            found.append(f"the queue's file has grown by {grown} pages")
        return found

    def _versions(self) -> list[str]:
        found, version = [], self._scene.version
        seen = self._scene.reader.do(f"look(5, {version})")  # which waits until the last publish has been served
        owner, record = self._scene.owner.do("policy.version"), self._scene.recorded().version
        if not owner == record == version:
            found.append(f"version {version} was acknowledged; the owner is at {owner}, the agent at {record}")
        if seen != (version, [version]):
            found.append(f"a reader sees {seen} of version {version}")
        return found

    def canary(self) -> list[str]:
        """Register, read, compare, close."""
        self._canaries += 1
        began, value = time.monotonic(), self._canaries
        owner, reader = self._scene.owner, self._scene.reader
        left = f"timeout={CANARY_SECONDS}"
        steps: list[tuple[Callable[[str], object], str, object]] = [
            (owner.do, f"canary = client.register_tensors('canary', made({value}), version={value}, {left})", None),
            (reader.do, f"canary = client.subscribe('canary', {left})", None),
            (reader.do, f"look({CANARY_SECONDS}, name='canary')", (value, [value])),
            (reader.do, "canary.close()", None),
            (owner.do, f"canary.close({left})", None),
        ]
        for do, source, expected in steps:
            try:
                answer = do(source)
            except Exception as error:
                return [f"the canary died of {source}: {error}"]
            if answer != expected:
                return [f"the canary: {source} is {answer}, not {expected}"]
        took = time.monotonic() - began
        return [f"the canary took {took:.1f} s"] if took > CANARY_SECONDS else []


def _shared_mappings(pid: int) -> Counter:
    """Files that a process maps shared, by kind."""
    inodes: dict[tuple[str, str], str] = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(None, 5)
        if fields[1][3] == "s" and len(fields) == 6:
            inodes[fields[3], fields[4]] = re.sub(r"\d+|torch_\S+", "#", fields[5])
    return Counter(inodes.values())
