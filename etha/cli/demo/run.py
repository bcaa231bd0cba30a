"""The parent's part: who is started when, who waits for whom, and what is measured meanwhile.

1. The agent starts; when it serves, the trainer and the evaluator start together.
2. The trainer registers, the evaluator loads; both wait. Memory is measured: nothing is mapped yet.
3. The evaluator takes its first lease (version 0) and waits, while the parent looks where its tensors
   lie. Then both go on.
4. The trainer publishes its last version and waits until the evaluator has read it, so that the
   final accuracy is the last version's. Then it closes, which ends the evaluator's iteration.
5. The agent is told to end, and everything of the run is removed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from etha.cli.demo import events
from etha.cli.demo.children import Child, ChildEnded, DemoFailed, Family
from etha.cli.demo.copied import CopyMeter
from etha.cli.demo.report import Curves, Report, failures, latency
from etha.cli.demo.screen import Progress, Screen

_SILENCE_S: Final = 90.0
"""Every wait of a child ends by itself after 30 s with an error that names who is at fault."""

_SAMPLE_PERIOD_S: Final = 0.25


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    device: str
    backend: str
    steps: int
    sabotage: bool


def run(options: Options, screen: Screen) -> tuple[Report, Curves]:
    """Runs the demo from the agent's start to its end; nothing of it is left, however it ends.

    Raises:
        DemoFailed: A process ended before its time, or all were silent.
        Interrupted: By SIGINT, SIGTERM or SIGHUP.
    """
    directory = Path(tempfile.mkdtemp(prefix="etha-demo-", dir=os.environ.get("ETHA_RUNTIME_DIR")))
    try:
        with Family(_environment(os.environ, directory), directory) as family:
            demo = _Demo(options, screen, family, directory)
            demo.run()
        return demo.report(), demo.curves()
    except ChildEnded as error:
        # Only now: of two that fail one after the other, the first to be noticed need not be the cause.
        raise DemoFailed(family.obituary()) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _environment(base: Mapping[str, str], directory: Path) -> dict[str, str]:
    """The children's: a private bus, whatever the user's shell says about ranks."""
    return {**base, "ETHA_RUNTIME_DIR": str(directory), "AGENT_RANK": "0", "PYTHONUNBUFFERED": "1"}


class _Demo:
    def __init__(self, options: Options, screen: Screen, family: Family, directory: Path) -> None:
        self._options = options
        self._screen = screen
        self._family = family
        self._directory = directory
        self._meter = CopyMeter(directory)
        self._started = time.monotonic()
        self._next_sample = 0.0
        self._seconds = 0.0
        self._ready = False
        self._owner: events.Registered | None = None
        self._trained: events.Trained | None = None
        self._finished: events.Finished | None = None
        self._last = events.Read(0, 0.0, 0, 0)
        self._curve: list[tuple[int, float]] = []

    def run(self) -> None:
        self._agent = self._family.start("agent", "-m", "etha", "agent", "--rank", "0", "--device", "cpu")
        self._await_agent()
        self._screen.say(f"look inside while it runs: ETHA_RUNTIME_DIR={self._directory} etha status")
        self._screen.show("loading torch and the digits in two processes")
        steps = ("--steps", str(self._options.steps))
        sabotage = ("--sabotage",) if self._options.sabotage else ()
        self._trainer = self._family.start("trainer", "-m", "etha.cli.demo.trainer", *steps)
        self._evaluator = self._family.start("evaluator", "-m", "etha.cli.demo.evaluator", *steps, *sabotage)
        running = {self._trainer.name, self._evaluator.name}
        while running:
            for child, text in self._family.listen(_SILENCE_S):
                if text is not None:
                    if child is not self._agent:
                        self._hear(child, text)
                elif child.exit_code == 0 and child is not self._agent and self._last_word_of(child):
                    running.discard(child.name)
                else:
                    raise ChildEnded
        self._seconds = time.monotonic() - self._started
        self._family.end(self._agent)

    def report(self) -> Report:
        """After the end: every exit status is known."""
        options, meter, last = self._options, self._meter, self._last
        trained = self._trained or events.Trained(0, (), ())
        finished = self._finished or events.Finished(0, ())
        ended_badly = tuple(c.name for c in self._family.members if c.exit_code != 0)
        found = failures(
            sabotage=options.sabotage,
            accuracy=last.accuracy,
            torn=last.torn,
            bytes_copied=meter.copied(),
            ended_badly=ended_badly,
        )
        return Report(
            ok=not found,
            failures=found,
            sabotage=options.sabotage,
            device=options.device,
            backend=options.backend,
            steps=options.steps,
            seconds=round(self._seconds, 3),
            trainer_pid=self._trainer.pid,
            evaluator_pid=self._evaluator.pid,
            agent_pid=self._agent.pid,
            accuracy=last.accuracy,
            versions_published=trained.versions,
            versions_read=finished.versions,
            reads=last.reads,
            torn=last.torn,
            bytes_shared=meter.published,
            bytes_copied=meter.copied(),
            trainer_inodes=meter.owner_inodes,
            evaluator_inodes=meter.reader_inodes,
            box_shmem_growth=meter.growth.box,
            own_shmem_growth=meter.growth.ours,
            update_enter=latency(trained.enter_us),
            publish=latency(trained.publish_us),
            read=latency(finished.read_us),
        )

    def curves(self) -> Curves:
        """The points behind the report."""
        publish_us = self._trained.publish_us if self._trained else ()
        read_us = self._finished.read_us if self._finished else ()
        return Curves(tuple(self._curve), publish_us, read_us)

    def _await_agent(self) -> None:
        """It prints one line when it serves."""
        while True:
            for _, text in self._family.listen(_SILENCE_S):
                if text is None:
                    raise ChildEnded
                return

    def _hear(self, child: Child, text: bytes) -> None:
        try:
            event = events.decode(text)
        except msgspec.DecodeError as error:
            raise DemoFailed(f"the {child.name} said something that is no event: {text!r}") from error
        match event:
            case events.Registered():
                self._owner = event
                self._meter.owner_registered(event.pid, _largest_first(event.tensors))
                self._let_evaluator_map()
            case events.Ready():
                self._ready = True
                self._let_evaluator_map()
            case events.Mapped():
                first = not self._meter.reader_inodes
                self._meter.reader_mapped(event.pid, event.tensors)
                self._evaluator.say_go_on()
                if first:
                    self._trainer.say_go_on()
            case events.Read():
                self._read(event)
            case events.Trained():
                self._trained = event
            case events.Finished():
                self._finished = event

    def _let_evaluator_map(self) -> None:
        if self._ready and self._owner is not None:
            self._meter.start(self._pids())
            self._evaluator.say_go_on()

    def _read(self, event: events.Read) -> None:
        last_version = event.version == self._options.steps
        self._last = event
        self._curve.append((event.version, event.accuracy))
        now = time.monotonic()
        if now >= self._next_sample or last_version:
            self._next_sample = now + _SAMPLE_PERIOD_S
            self._meter.sample(self._pids())
        self._screen.show(self._progress())
        if last_version:
            self._trainer.say_go_on()
            if self._options.sabotage:
                self._evaluator.say_go_on()

    def _progress(self) -> Progress:
        meter, last = self._meter, self._last
        return Progress(
            trainer_pid=self._trainer.pid,
            bytes_shared=meter.published,
            trainer_inodes=meter.owner_inodes,
            evaluator_pid=self._evaluator.pid,
            evaluator_inodes=meter.reader_inodes,
            version=last.version,
            accuracy=last.accuracy,
            torn=last.torn,
            bytes_copied=meter.copied(),
        )

    def _pids(self) -> tuple[int, ...]:
        return tuple(child.pid for child in self._family.members)

    def _last_word_of(self, child: Child) -> bool:
        """Whether the child had come to its end when it ended."""
        return (self._trained if child is self._trainer else self._finished) is not None


def _largest_first(tensors: tuple[events.Placement, ...]) -> list[events.Placement]:
    """So that the inode which is shown is the one under most of the bytes."""
    return sorted(tensors, key=lambda t: -t.nbytes)
