"""No second copy: what the box's memory does when a gibibyte is registered and read."""

from __future__ import annotations

import pytest

METER = """
def used():
    fields = dict(line.split(":") for line in open("/proc/meminfo"))
    kib = {name: int(value.split()[0]) for name, value in fields.items()}
    return (kib["MemTotal"] - kib["MemFree"] - kib["Buffers"] - kib["Cached"] + kib["Shmem"]) * 1024
"""

WATCH = """
import threading
stop, peak = threading.Event(), [used()]
def watch():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], used())
watcher = threading.Thread(target=watch)
watcher.start()
"""


@pytest.mark.parametrize("copying", [False, True], ids=["in place", "sabotaged"])
def test_a_gibibyte_is_registered_and_read_without_a_copy(agent, start_worker, copying: bool):
    size = 1 << 30
    meter, owner, reader = start_worker(connect=False, setup=METER), start_worker(), start_worker()
    for worker in (owner, reader):
        worker.do("torch.ones(1 << 20).sum().item()")
    owner.do(f"big = torch.empty({size} // 4).share_memory_(); big.fill_(1.0); None")
    meter.do(WATCH)
    before = meter.do("peak[0] = used(); peak[0]")
    owner.do("policy = client.register_tensors('big', {'w': big})")
    reader.do("policy = client.subscribe('big'); lease = policy.read()")
    if copying:
        reader.do("kept = lease['w'].clone()")
    total = reader.do("lease['w'].view(-1, 1 << 20).sum(1).sum().item()")
    growth = meter.do("stop.set(); watcher.join(); max(peak[0], used())") - before
    assert total == size // 4
    if copying:
        assert growth > 0.5 * size
    else:
        assert growth < 0.01 * size, f"{growth} bytes"
