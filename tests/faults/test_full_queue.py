"""Row 21: the command queue is full, for a moment or for good.

Whoever puts waits to its deadline, then gets `QueueFull`, which names the file; what was committed is not lost; with
room again, everything goes on. Publishes that nobody serves, and a reader that stands still, are `test_room`'s.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest
from harness import Raised
from omega import Omega
from scene import Scene

FILL = """
import secrets
from etha.errors import QueueFull
from etha.tensor_bus import clock
queue, filler = client._link.queue, secrets.token_bytes(16)
def fill():
    n, resources = 0, []
    for size in (1 << 20, 1 << 12, 64):
        try:
            while True:
                n += 1
                queue.put(filler, n, bytes(size), clock.now() + 0.1)
        except QueueFull as error:
            resources.append(error.resource)
    return n, resources
fill()
"""

DEADLINE = 0.4
SLACK = 1.0


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scene, Omega]]:
    """Nobody else's: LMDB's file keeps the size that it had when it was full, and no growth would be seen in it."""
    scene = Scene(tmp_path_factory.mktemp("faults"))
    omega = Omega(scene)
    yield scene, omega
    omega.close()
    scene.close()


@pytest.mark.parametrize("ends", ["by the agent", "by its worker"])
def test_what_is_put_waits_for_room(own: tuple[Scene, Omega], ends: str):
    """Commands of a client that nobody knows are dropped by the agent's helper, once it runs."""
    scene, omega = own
    worker = scene.worker(f"mine = client.register_tensors('mine', made(1)); client._link.patience = {DEADLINE}")
    other = scene.worker()
    scene.agent.kill(signal.SIGSTOP)
    try:
        puts, resources = other.do(FILL)
        assert puts > 100
        resource = str(scene.runtime / "agent_rank0_command.lmdb")
        assert resources == [resource] * 3
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(Raised, match=r"^QueueFull:") as caught:
                worker.do("mine.publish()")
            assert DEADLINE <= time.monotonic() - began < DEADLINE + SLACK
            assert caught.value.resource == resource
        # What waits with a longer deadline gets the room as soon as there is any.
        worker.say("client._link.patience = 30.0; mine.publish()")
        assert not worker.heard()
        if ends == "by its worker":
            other.do("queue.delete(filler, range(1, 40), clock.now() + 5)")
            assert worker.hear() == 1
    finally:
        scene.agent.kill(signal.SIGCONT)
    if ends == "by the agent":
        assert worker.hear() == 1
    assert scene.reader.do("mine = client.subscribe('mine'); value = look(5, 1, name='mine'); mine.close(); value") == (
        1,
        [1],
    )
    worker.do("mine.close(timeout=5)")
    for each in (worker, other):
        scene.dismiss(each)
    omega.accept_queue()
    assert omega.faults() == []
