"""Row 26: a tensor that is kept after its lease, its subscription or its client was closed stays valid memory.

The owner's `update()` goes on, and its bytes are seen through the view. Its `close()` says who holds it, and succeeds
once nobody does.
"""

from __future__ import annotations

import pytest
from counts import counts
from harness import Raised
from omega import Omega
from scene import Scene

OWN = "tensors = made(1); mine = client.register_tensors('mine', tensors, version=1)"
KEEP = "mine = client.subscribe('mine'); lease = mine.read(); kept = lease['8192']"

ENDS = {
    "lease": "lease.release()",
    "subscription": "lease.release(); mine.close()",
    "client": "lease.release(); mine.close(); client.close()",
    "subscription with its lease": "mine.close()",
    "client with all": "client.close()",
}


def play(scene: Scene, end: str, how: str) -> None:
    owner, reader = scene.worker(OWN), scene.worker(KEEP)
    try:
        reader.do(end)
        assert reader.do("[int(value) for value in torch.aminmax(kept)]") == [1, 1]
        if "release" in end:
            owner.do("with mine.update(timeout=5): write(2)")
        else:  # a lease whose subscription was closed is a lease until it is released, or its client closed
            answer = owner.do("attempt(lambda: mine.update(timeout=0.2).__enter__())")
            assert answer in (None, "LeaseTimeout")
            owner.do("gc.collect(); write(2)")
        assert reader.do("[int(value) for value in torch.aminmax(kept)]") == [2, 2]
        with pytest.raises(Raised, match=r"^(Mapping|Lease)Timeout:") as caught:
            owner.do("mine.close(timeout=0.2)")
        assert f"pid {reader.pid} " in caught.value.holder
        assert caught.value.resource == "mine"
        assert reader.do("[int(value) for value in torch.aminmax(kept)]") == [2, 2]
        if how == "dropped":
            reader.do("lease.release(); del kept, lease, mine; gc.collect()")
            reader.do("client, info = bootstrap_client(); client.close()")
        else:
            scene.dismiss(reader)
        owner.do("mine.close(timeout=5)")
    finally:
        for worker in (owner, reader):
            if worker in scene.workers:
                scene.dismiss(worker)


@pytest.mark.parametrize("rounds", counts(1, 50))
@pytest.mark.parametrize("how", ["dropped", "dead"])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_view_that_is_kept(stage: tuple[Scene, Omega], end: str, how: str, rounds: int):
    scene, omega = stage
    for _ in range(rounds):
        play(scene, end, how)
        assert omega.faults() == []
