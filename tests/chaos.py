"""The chaos of `test_chaos`: 8 processes and, in one more, 20 threads do everything that the bus allows, at random.

``python chaos.py SEED SECONDS SABOTAGE`` forks its actors before the first client is made, and prints one line of JSON
per process. SABOTAGE is ``none``, ``late`` (readers look after they have released) or ``wild`` (owners write outside
of ``update()``): then the same checker must find torn reads.

The checker. In ``update()`` an owner fills every tensor with the number of the version to come. So inside a lease:

* of a guarded version, every element of every tensor is its number; of an unguarded one (a bare ``publish()``, which
  writes nothing), every element is one and the same smaller number;
* anything else is torn, and allowed only where ``check()``, called after the look, raises.

Every call may end only as `LEGAL` says, and within its timeout, a tenth more, and `SLACK`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter

import torch

from etha import bootstrap_client
from etha.errors import EthaError

THREADS = 20
PROCESSES = 8
SLACK = 3.0
"""Seconds that a call may take beyond its timeout: 28 actors share two cores, and 20 of them one GIL. A hang is 30 s
(the default timeout), or for ever."""

NAMES = [f"chaos {number}" for number in range(5)]
SIZES = (8192, 3, 1024)
_GONE = {"ClientClosed", "AgentTimeout"}
_OVER = {"LeaseReleased", "StaleHandle", "PublicationClosed"}
LEGAL = {
    "connect": set(),
    "register": _GONE | {"NameTaken", "AgentTimeout"},
    "enter update": _GONE | _OVER | {"LeaseTimeout", "InvalidArgument", "DeadlockError"},
    "leave update": _GONE | _OVER,
    "publish": _GONE | _OVER | {"InvalidArgument"},
    "readers": _GONE | _OVER | {"InvalidArgument"},
    "close publication": _GONE | _OVER | {"LeaseTimeout", "MappingTimeout", "AgentTimeout", "DeadlockError"},
    "close client": {"LeaseTimeout", "MappingTimeout", "AgentTimeout", "StaleHandle", "DeadlockError"},
    "subscribe": _GONE | {"NoPublication", "StaleHandle"},
    "read": _GONE
    | _OVER
    | {"LeaseTimeout", "VersionTimeout", "VersionGone", "TornError", "OwnerDiedError", "DeadlockError"},
    "check": _GONE | {"TornError", "OwnerDiedError", "LeaseReleased"},
    "close subscription": set(),
}
"""How a call may end, other than well. "InvalidArgument": two threads of one owner crossed, and the text says so.
"AgentTimeout": no answer within a tenth of a second to a poll, on a box this loaded."""


class Chaos:
    """What the threads of one process share: clients, publications, the count."""

    def __init__(self, sabotage: str, clients: int) -> None:
        self.sabotage = sabotage
        self.count: Counter[str] = Counter()
        self.faults: list[str] = []
        self.overshoot = 0.0
        self.clients = [self.connect() for _ in range(clients)]
        self.owned: list = []
        self.lock = threading.Lock()

    def connect(self):
        return self.call("connect", 20.0, lambda: bootstrap_client(connection_timeout=20.0)[0])

    def call(self, what: str, timeout: float, function):
        """Do it under the checker; None when it raised what it may raise."""
        started = time.monotonic()
        try:
            value = function()
            self.count[what] += 1
        except EthaError as error:
            value, word = None, type(error).__name__
            self.count[f"{what}: {word}"] += 1
            if word not in LEGAL[what]:
                self.faults.append(f"{what} may not end so:\n{traceback.format_exc()}")
        except Exception:
            value = None
            self.faults.append(f"{what} raised what is no EthaError:\n{traceback.format_exc()}")
        over = time.monotonic() - started - timeout * 1.1
        self.overshoot = max(self.overshoot, over)
        if over > SLACK:
            self.faults.append(f"{what} took {over:.2f} s longer than its timeout of {timeout} s allows")
        return value

    def result(self) -> str:
        return json.dumps({"count": self.count, "faults": self.faults[:5], "overshoot": self.overshoot})


class Owned:
    """A publication of this process, which any of its threads may write.

    Attributes:
        half_written: an update of it ended half-way. A bare ``publish()`` would declare, and readers would see, those
            bytes to be a version: no thread may do so, so whoever asks and publishes holds the lock meanwhile.
    """

    def __init__(self, publication, tensors) -> None:
        self.publication = publication
        self.tensors = tensors
        self.half_written = False
        self.lock = threading.Lock()

    def publish(self):
        with self.lock:
            return None if self.half_written else self.publication.publish()

    def begins_to_tear(self, torn: bool) -> None:
        """Called in an update, so no ``publish()`` can be under way, and none succeeds until the update has ended."""
        with self.lock:
            self.half_written = torn


class Actor:
    """One thread: an owner for a while, then a reader for a while, and so on until the end."""

    def __init__(self, chaos: Chaos, seed: int, end: float) -> None:
        self.chaos = chaos
        self.chance = random.Random(seed)
        self.end = end

    def run(self) -> None:
        try:
            while time.monotonic() < self.end:
                self.chance.choice((self.own, self.read, self.read, self.disturb))()
        except BaseException:
            self.chaos.faults.append(traceback.format_exc())

    def timeout(self) -> float:
        return self.chance.choice((0.0, 0.01, 0.05, 0.3))

    # -- owners -----------------------------------------------------------------------------------

    def own(self) -> None:
        tensors = {str(size): torch.zeros(size, dtype=torch.int64).share_memory_() for size in SIZES}
        client, name, timeout = self.chance.choice(self.chaos.clients), self.chance.choice(NAMES), self.timeout()
        publication = self.chaos.call(
            "register", timeout, lambda: client.register_tensors(name, tensors, timeout=timeout)
        )
        if publication is None:
            return
        entry = Owned(publication, tensors)
        self.chaos.owned.append(entry)
        for _ in range(self.chance.randint(5, 60)):
            self.write(entry)
        self.close(entry)

    def write(self, entry: Owned) -> None:
        publication, tensors = entry.publication, entry.tensors
        if self.chance.random() < 0.15:
            self.chaos.call("publish", 0, entry.publish)
            return
        timeout, revoke = self.timeout(), self.chance.random() < 0.3
        update = publication.update(timeout=timeout, on_timeout="revoke" if revoke else "raise")
        if self.chaos.call("enter update", timeout, update.__enter__) is None:
            return
        stamp = publication.version + 1
        torn = self.chance.random() < 0.05
        entry.begins_to_tear(torn or entry.half_written)
        for tensor in tensors.values():
            half = len(tensor) // 2
            tensor[:half] = stamp
            tensor[half:] = stamp
            if torn:
                break
        entry.begins_to_tear(torn)
        error = ZeroDivisionError() if torn else None
        self.chaos.call("leave update", 0, lambda: update.__exit__(type(error) if error else None, error, None))
        if self.chaos.sabotage == "wild":
            for tensor in tensors.values():
                tensor.fill_(-1)

    def close(self, entry: Owned) -> None:
        timeout = self.timeout()
        self.chaos.call("close publication", timeout, lambda: entry.publication.close(timeout))
        if entry.publication.closed and entry in self.chaos.owned:
            self.chaos.owned.remove(entry)

    def disturb(self) -> None:
        """What other threads do with the publications and the clients of this process."""
        if self.chaos.owned and self.chance.random() < 0.7:
            try:
                entry = self.chance.choice(self.chaos.owned)
            except IndexError:
                return  # another thread took the last
            self.chance.choice((self.close, self.write, self.look))(entry)
        elif self.chance.random() < 0.2:
            number, timeout = self.chance.randrange(len(self.chaos.clients)), self.timeout()
            fresh = self.chaos.connect()
            with self.chaos.lock:
                client, self.chaos.clients[number] = self.chaos.clients[number], fresh
            while not self.leave(client, timeout):
                timeout = 0.3

    def leave(self, client, timeout: float) -> bool:
        return self.chaos.call("close client", timeout, lambda: client.close(timeout) or True) is not None

    def look(self, entry: Owned) -> None:
        self.chaos.call("readers", 0, entry.publication.readers)

    # -- readers ----------------------------------------------------------------------------------

    def read(self) -> None:
        client, name, timeout = self.chance.choice(self.chaos.clients), self.chance.choice(NAMES), self.timeout()
        subscription = self.chaos.call("subscribe", timeout, lambda: client.subscribe(name, timeout=timeout))
        if subscription is None:
            return
        for _ in range(self.chance.randint(1, 30)):
            if self.chance.random() < 0.2:
                self.iterate(subscription)
            else:
                self.take(subscription)
        self.chaos.call("close subscription", 0, subscription.close)

    def iterate(self, subscription) -> None:
        timeout, versions = self.timeout(), self.chance.randint(1, 5)
        steps = subscription.versions(timeout)
        for _ in range(versions):
            lease = self.chaos.call("read", timeout, lambda: next(steps, None))
            if lease is None:
                return
            self.hold(lease)
        steps.close()

    def take(self, subscription) -> None:
        timeout, newer = self.timeout(), self.chance.random() < 0.2
        least = subscription._seen + 1 if newer else None
        lease = self.chaos.call("read", timeout, lambda: subscription.read(min_version=least, timeout=timeout))
        if lease is not None:
            self.hold(lease)
            if self.chance.random() < 0.1:
                self.take(subscription)
            lease.release()

    def hold(self, lease) -> None:
        tensors = dict(lease)
        if self.chaos.sabotage == "late":
            lease.release()
        # Long enough, at times, for an owner that may revoke to lose its patience.
        for _ in range(self.chance.choice((1, 1, 2, 400))):
            stamps = {stamp for tensor in tensors.values() for stamp in map(int, torch.aminmax(tensor))}
            whole = len(stamps) == 1
            stamp = min(stamps)
            right = whole and (stamp == lease.version if lease.guarded else 0 <= stamp < lease.version)
            checked = self.chaos.sabotage == "late" or self.chaos.call("check", 0, lambda: lease.check() or True)
            if not checked:
                self.chaos.count["revoked"] += 1
                return
            self.chaos.count["looks"] += 1
            self.chaos.count["torn"] += not right
            self.chaos.count["torn, guarded"] += not right and lease.guarded


def process(seed: int, seconds: float, threads: int, clients: int, sabotage: str) -> int:
    """One process of actors; its exit status."""
    faulthandler.dump_traceback_later(seconds + float(os.environ.get("HANG", "90")), exit=True)
    chaos = Chaos(sabotage, clients)
    end = time.monotonic() + seconds
    actors = [
        threading.Thread(target=Actor(chaos, seed * 100 + number, end).run, name=f"actor {number}")
        for number in range(threads)
    ]
    for actor in actors:
        actor.start()
    for actor in actors:
        actor.join()
    for client in chaos.clients:
        # Those who read from us leave too, some a little later.
        chaos.call("close client", 20.0, lambda client=client: client.close(20.0))
    os.write(1, (chaos.result() + "\n").encode())
    return 0


def main() -> int:
    seed, seconds, sabotage = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    children = []
    for number in range(PROCESSES):
        child = os.fork()
        if child == 0:
            os._exit(process(seed + number, seconds, 1, 1, sabotage))
        children.append(child)
    status = process(seed + PROCESSES, seconds, THREADS, 4, sabotage)
    return max([status, *(os.waitpid(child, 0)[1] for child in children)])


if __name__ == "__main__":
    sys.exit(main())
