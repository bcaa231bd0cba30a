"""What `test_interrupts` interrupts, and what must hold afterwards. Imported by its worker."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Callable

from interrupting import Sender, at_point
from lanes import Lane, descriptors, outcome, shared, until, write_once
from requiring import require

from etha import bootstrap_client
from etha.errors import EthaError
from etha.tensor_bus.state import ClaimRecord, ClientRecord, PublicationRecord

ENVIRONMENT_DESCRIPTORS = 10
"""What the two LMDB files of an agent cost a worker, the writers' turn included."""


class Ours(Exception):
    """Raised by a body."""


class Rig:
    """An owner, a reader that is interrupted, and a bystander: one publication, ``policy``."""

    def __init__(self) -> None:
        # A lease or client lost by an interrupt says so when it is collected, and that is right.
        warnings.simplefilter("ignore", ResourceWarning)
        self.owner = bootstrap_client()[0]
        self.client = bootstrap_client()[0]
        self.bystander = Lane()
        self.policy = self.owner.register_tensors("policy", {"x": shared()})
        self.own = self.client.register_tensors("own", {"x": shared()})
        self.subscription = self.client.subscribe("policy")
        self.other = self.client.subscribe("policy")
        self.sender = Sender()
        self.operations = {
            name.removeprefix("do_"): getattr(self, name) for name in sorted(dir(self)) if name.startswith("do_")
        }
        self.fresh = None
        self.clients = len(self.owner._link.state.all(ClientRecord))
        for name in self.operations:
            self.prepared(name)()
        self.mend()
        self.descriptors = descriptors()
        self.spare = ENVIRONMENT_DESCRIPTORS

    def prepared(self, name: str) -> Callable[[], None]:
        """An operation whose preparations are done."""
        getattr(self, f"before_{name}", lambda: None)()
        return self.operations[name]

    # -- what is interrupted ----------------------------------------------------------------------

    def do_read(self) -> None:
        with self.subscription.read(timeout=5) as lease:
            lease.check()
            lease["x"].sum()

    def do_read_that_times_out(self) -> None:
        try:
            self.subscription.read(min_version=10**9, timeout=0.002)
        except EthaError:
            return

    def do_iterate(self) -> None:
        for _ in self.subscription.versions(timeout=5):
            return

    def do_subscribe(self) -> None:
        with self.client.subscribe("policy", timeout=5) as subscription:
            subscription.fileno()

    def do_update(self) -> None:
        with self.own.update(timeout=5):
            pass

    def do_update_that_fails(self) -> None:
        try:
            with self.own.update(timeout=5):
                raise Ours
        except Ours:
            return

    def do_publish(self) -> None:
        self.own.publish()

    def do_rebind(self) -> None:
        self.own.rebind({"x": shared()}, timeout=5)

    def do_suspend_and_resume(self) -> None:
        self.own.suspend(timeout=5)
        self.own.resume({"x": shared()}, timeout=5)

    def do_register(self) -> None:
        self.fresh = self.client.register_tensors("fresh", {"x": shared()}, timeout=5)

    def before_close(self) -> None:
        if self.fresh is None:
            self.do_register()

    def do_close(self) -> None:
        self.fresh.close(timeout=5)

    def do_connect(self) -> None:
        with bootstrap_client()[0] as client:
            client.subscribe("policy")

    # -- what must hold ---------------------------------------------------------------------------

    def mend(self) -> None:
        """After an interrupt: everything works at once, and nothing of it stays, here or at the agent."""
        gc.collect()
        # A call of each client's: it gives back what was dropped, and has been heard when it is answered.
        for subscription in (self.subscription, self.other):
            require(outcome(lambda s=subscription: s.read(version=10**9, timeout=0), 0) == "VersionTimeout")
        if self.fresh is not None:
            require(outcome(lambda: self.fresh.close(timeout=5), 5) is None)
            self.fresh = None
        # What a call that was interrupted in the middle of a move says to do.
        if self.own._suspended is not None:
            require(outcome(lambda: self.own.resume({"x": shared()}, timeout=5), 5) is None)
        if self.own._shared._doubtful:
            require(outcome(lambda: self.own.rebind({"x": shared()}, timeout=5), 5) is None)
        for publication in (self.own, self.policy):
            require(outcome(lambda p=publication: write_once(p, 0), 0) == publication.version)
        require(outcome(self.own.publish, 0) == self.own.version)
        # The name of an interrupted registration is free.
        publication = outcome(lambda: self.client.register_tensors("fresh", {}, timeout=5), 5)
        require(not isinstance(publication, str), publication)
        require(outcome(lambda: publication.close(timeout=5), 5) is None)
        # What a client dropped that is no more, the agent hears in a moment.
        until(lambda: self.left() == [], self.left)

    def left(self) -> list[str]:
        """What the agent knows that should not be there any more."""
        state = self.owner._link.state
        records = state.snapshot((ClaimRecord, PublicationRecord, ClientRecord))
        claims = list(records[ClaimRecord].values())
        left = [f"{claim.kind} of {claim.name}" for claim in claims if claim.kind != "import"]
        left += ["an import"] * (sum(claim.kind == "import" for claim in claims) - 2)
        left += ["a client"] * (len(records[ClientRecord]) - self.clients)
        left += [each.name for each in records[PublicationRecord].values() if each.name not in ("policy", "own")]
        version = state.version(self.own.generation)
        if (version.phase, version.version) != ("ready", self.own.version):
            left.append(f"{version.phase}, version {version.version} and not {self.own.version}")
        return left

    def check_descriptors(self, name: str) -> None:
        # An interrupt between LMDB's opening of a file and the note of it keeps that file open, once per path, until
        # the
        # process ends; the next client of the path uses it. Nothing grows with the number of interrupts.
        spare = self.spare if name == "connect" else 0
        found = descriptors()
        require(found <= self.descriptors + spare, f"{found} descriptors, {self.descriptors} before")
        kept = max(found - self.descriptors, 0)  # they stay: what comes next begins with them
        self.spare -= kept
        self.descriptors += kept

    # -- rounds -----------------------------------------------------------------------------------

    def points(self, name: str) -> int:
        """How many points an operation has."""
        point = 1
        while at_point(self.prepared(name), point):
            self.mend()
            point *= 2
        self.mend()
        low, high = point // 2, point
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if at_point(self.prepared(name), middle) else (low, middle)
            self.mend()
        return low

    def sweep(self, name: str, points: list[int]) -> int:
        """Interrupt an operation at each of these points; how many of them it had."""
        reached = 0
        for point in points:
            where = at_point(self.prepared(name), point)
            reached += bool(where)
            try:
                self.mend()
            except BaseException as error:
                raise AssertionError(f"{name} interrupted at point {point}, {where}: {error!r}") from error
        self.check_descriptors(name)
        return reached

    def at_random(self, rounds: int, seed: int) -> int:
        """Real signals at random moments; how often one came before the operation was done."""
        chance = random.Random(seed)
        cut = 0
        for number in range(rounds):
            name = chance.choice(list(self.operations))
            delay = int(10 ** chance.uniform(3, 7))
            cut += self.sender.at_random(self.prepared(name), delay)
            try:
                self.mend()
            except BaseException as error:
                raise AssertionError(f"round {number}, {name} interrupted after {delay} ns: {error!r}") from error
        self.check_descriptors("connect")
        return cut

    def bystanders(self, points: list[int]) -> None:
        """The interrupted thread was receiving for another, whose reply must not be lost with it."""
        for point in points:
            wanted = self.policy.version + 2  # the first comes from `mend`
            waiting = self.bystander.start(lambda wanted=wanted: self.other.read(min_version=wanted, timeout=20))
            where = at_point(self.do_read, point)
            while self.policy.version < wanted:
                write_once(self.policy)
            # At a quarter of a second the waiting thread looks for itself.
            lease = waiting.result(2)
            lease.release()
            require(lease.version >= wanted, where)
            self.mend()

    def end(self) -> None:
        self.sender.end()
        self.bystander.end()
        self.client.close(10)
        self.owner.close(10)
