"""No second copy: what the memory of agent, owner and reader does when a gibibyte is registered and read.

Measured are their anonymous pages (proc_pid_smaps(5)) and what lies in /dev/shm: a copy has to be in one of them. What
the whole box does is measured by ``etha demo`` and by `benchmarks/latency.py`; neighbours of a test would disturb that.
"""

from __future__ import annotations

import pytest

METER = """
import threading

def used():
    shm = os.statvfs("/dev/shm")
    total = (shm.f_blocks - shm.f_bfree) * shm.f_frsize
    for pid in watched:
        for line in open(f"/proc/{pid}/smaps_rollup"):
            if line.startswith("Anonymous:"):
                total += int(line.split()[1]) * 1024
    return total

stop = threading.Event()
def watch():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], used())
watcher = threading.Thread(target=watch)
"""


@pytest.mark.parametrize("copying", [False, True], ids=["in place", "sabotaged"])
def test_a_gibibyte_is_registered_and_read_without_a_copy(agent, start_worker, copying: bool):
    size = 1 << 30
    meter, owner, reader = start_worker(connect=False, setup=METER), start_worker(), start_worker()
    for worker in (owner, reader):
        worker.do("torch.ones(1 << 20).sum().item()")
    owner.do(f"big = torch.empty({size} // 4).share_memory_(); big.fill_(1.0); None")
    meter.do(f"watched = {(agent.pid, owner.pid, reader.pid)}")
    before = meter.do("peak = [used()]; watcher.start(); peak[0]")
    assert before > size  # every page is there
    owner.do("policy = client.register_tensors('big', {'w': big})")
    reader.do("policy = client.subscribe('big'); lease = policy.read()")
    if copying:
        reader.do("kept = lease['w'].clone()")
    total = reader.do("lease['w'].view(-1, 1 << 20).sum(1).sum().item()")
    growth = meter.do("stop.set(); watcher.join(); max(peak[0], used())") - before
    assert total == size // 4
    if copying:
        assert growth > 0.9 * size
    else:
        assert growth < 0.01 * size, f"{growth} bytes"
