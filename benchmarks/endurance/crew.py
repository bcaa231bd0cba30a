"""Every process of a run, from the first registration to the last goodbye."""

from __future__ import annotations

import select
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

import msgspec
from costs.processes import Box, Helper, Talk

from endurance.plan import Plan
from endurance.probe import probe
from endurance.sampler import Sampler
from endurance.samples import Sample, Timed
from endurance.worker import work

PATIENCE: Final = 300.0
"""Seconds after which a step of all workers together, such as registering, has failed."""

_REST: Final = 20.0
"""Seconds that an agent has, after the last goodbye, to be as it was before the first welcome."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What a run left to be judged.

    Attributes:
        samples, timed: in the order of time.
        operations: what the workers did how often, and how it ended where not well.
        restarts: seconds from the start of each new agent until the probe held a lease again.
        before, after: the agent before the first worker came, and after the last had left.
    """

    samples: tuple[Sample, ...]
    timed: tuple[Timed, ...]
    operations: dict[str, int]
    restarts: tuple[float, ...]
    before: Sample
    after: Sample


def soak(plan: Plan, told: Callable[[Sample], None]) -> Found:
    """Run it.

    Args:
        plan: what.
        told: hears each sample as it is taken.

    Raises:
        RuntimeError: a worker, the probe or the agent ended on its own; its own words are on stderr.
        TimeoutError: a step lasted longer than `PATIENCE`.
    """
    with ExitStack() as stack:
        box = stack.enter_context(Box())
        workers = [stack.enter_context(_Member(number, plan)) for number in range(plan.workers)]
        prober = stack.enter_context(_Member(None, plan))
        sampler = Sampler(box.agent.pid)
        stack.callback(sampler.close)
        crew = _Crew(plan, box, workers, prober, sampler, told)
        return crew.run()


class _Member(Helper):
    """A worker, or the probe. It may register once it is told to."""

    def __init__(self, number: int | None, plan: Plan) -> None:
        super().__init__(_live, plan, number)
        self.name = "the probe" if number is None else f"worker {number}"


def _live(talk: Talk, plan: Plan, number: int | None) -> None:
    talk.hear()
    if number is None:
        probe(talk)
    else:
        work(talk, plan, number)


class _Crew:
    def __init__(
        self,
        plan: Plan,
        box: Box,
        workers: list[_Member],
        prober: _Member,
        sampler: Sampler,
        told: Callable[[Sample], None],
    ) -> None:
        self._plan, self._box, self._sampler, self._told = plan, box, sampler, told
        self._workers, self._prober = workers, prober
        self._samples: list[Sample] = []
        self._timed: list[Timed] = []
        self._restarts: list[float] = []

    def run(self) -> Found:
        everyone = [*self._workers, self._prober]
        before = self._sampler.look()
        self._all(everyone, "register", "registered")
        self._all(self._workers, "subscribe", "subscribed")
        for member in everyone:
            member.talk.say("go")
        self._watch()
        operations: Counter[str] = Counter()
        self._prober.talk.say("stop")
        while (said := self._hear(self._prober)) != "stopped":
            self._take(said)
        for member in self._workers:
            member.talk.say("stop")
        for member in self._workers:
            operations.update(self._hear(member))
        self._all(everyone, "leave", "left")
        operations["probe: AgentTimeout"] = sum(call.kind == "unanswered" for call in self._timed)
        after = self._rested(before)
        return Found(
            samples=tuple(self._samples),
            timed=tuple(self._timed),
            operations={name: count for name, count in operations.most_common() if count},
            restarts=tuple(self._restarts),
            before=before,
            after=after,
        )

    def _watch(self) -> None:
        """The warm-up, and the judged time."""
        plan = self._plan
        every = min(1.0, plan.seconds / 60)
        self._sampler.zero = zero = time.monotonic() + plan.warm
        due, restart = zero - plan.warm, zero + plan.restart_every
        while due < zero + plan.seconds:
            self._listen(due)
            if self._box.agent.poll() is not None:
                raise RuntimeError(f"the agent ended by itself: {self._box.agent.returncode}")
            self._samples.append(self._sampler.look())
            self._told(self._samples[-1])
            due = max(due + every, time.monotonic())
            if plan.restart_every and time.monotonic() > restart:
                self._restart()
                restart = time.monotonic() + plan.restart_every

    def _restart(self) -> None:
        self._sampler.leave()
        self._box.agent.send_signal(signal.SIGKILL)
        self._box.agent.wait()
        began = time.monotonic()
        self._box.agent = self._box.start_agent()
        self._sampler.follow(self._box.agent.pid)
        while not any(call.kind == "lease" and call.moment + call.seconds > began for call in self._newest()):
            if time.monotonic() - began > PATIENCE:
                raise TimeoutError("no lease from the agent's successor")
            self._listen(time.monotonic() + 0.1)
        self._restarts.append(time.monotonic() - began)

    def _newest(self) -> list[Timed]:
        zero = self._sampler.zero
        return [Timed(call.moment + zero, call.kind, call.seconds) for call in self._timed[-50:]]

    def _listen(self, until: float) -> None:
        """Take what the probe says, and see to it that nobody has ended, until a moment."""
        members = {member.talk.sock: member for member in (*self._workers, self._prober)}
        while True:
            ready, _, _ = select.select(list(members), [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return
            for sock in ready:
                self._take(self._hear(members[sock]))

    def _take(self, said: Any) -> None:
        zero = self._sampler.zero
        for call in msgspec.convert(said, list[Timed]):
            self._timed.append(Timed(call.moment - zero, call.kind, call.seconds))

    def _all(self, members: list[_Member], word: str, answer: str) -> None:
        for member in members:
            member.talk.say(word)
        for member in members:
            if (said := self._hear(member)) != answer:
                raise RuntimeError(f"{member.name} said {said!r} when asked to {word}")

    def _hear(self, member: _Member) -> Any:
        try:
            return member.talk.hear(PATIENCE)
        except (EOFError, ConnectionResetError) as error:
            raise RuntimeError(f"{member.name} has ended; see what it says above") from error

    def _rested(self, before: Sample) -> Sample:
        """The agent without workers, as soon as it holds no more than before they came, or after `_REST`."""
        deadline = time.monotonic() + _REST
        while True:
            after = self._sampler.look()
            gone = after.descriptors <= before.descriptors and not after.claims and not after.outcomes
            if gone or time.monotonic() > deadline:
                return after
            time.sleep(0.2)
