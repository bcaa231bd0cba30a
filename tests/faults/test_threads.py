"""Row 11: 32 threads of one worker register, publish, update, read and close, all at once; then Ω."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from counts import counts
from omega import Omega
from scene import Scene

THREADS = 32

REQUIRE = f"""
import sys
sys.path.append({str(Path(__file__).parent.parent)!r})
from requiring import require
"""

BUSY = """
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

def busy(number, seed, seconds):
    chance, done = random.Random(seed), Counter()
    mine = {"x": base[number]}
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        name = f"thread {number}"
        with closing(client.register_tensors(name, mine, timeout=20)) as own:
            for _ in range(chance.randrange(1, 6)):
                what = chance.randrange(4)
                if what == 0:
                    own.publish()
                elif what == 1:
                    with own.update(timeout=20):
                        base[number] += 1
                elif what == 2:
                    with policy.read(timeout=20) as lease:
                        require(stamps(lease) == [lease.version])
                else:
                    with client.subscribe(name, timeout=20) as theirs, theirs.read(timeout=20) as lease:
                        require(torch.equal(lease["x"], base[number]))
                done[what] += 1
    return done

def all_at_once(count, seed, seconds):
    with ThreadPoolExecutor(count) as threads:
        told = [threads.submit(busy, number, seed + number, seconds) for number in range(count)]
    return dict(sum((each.result() for each in told), Counter()))
"""


@pytest.mark.parametrize("seconds", counts(4, 600))
def test_all_at_once(stage: tuple[Scene, Omega], seconds: int):
    scene, omega = stage
    seed = int(os.environ.get("ETHA_SEED", random.randrange(1 << 20)))
    print(f"ETHA_SEED={seed}")
    worker = scene.worker(REQUIRE + BUSY + f"base = torch.zeros({THREADS}, 64).share_memory_()\n")
    try:
        worker.do("policy = client.subscribe('policy')")
        done = worker.do(f"all_at_once({THREADS}, {seed}, {seconds})", timeout=seconds + 120)
        print(done)
        assert min(done.get(what, 0) for what in range(4)) >= THREADS
        worker.do("policy.close(); client.close()")
        assert worker.errors.read_text() == ""
    finally:
        scene.dismiss(worker)
    assert omega.faults() == []
