"""Row 20: thousands connect and say nothing, send packets full of descriptors, or never read what they are told.

What is too much is cut; the agent's memory and descriptors stay bounded; who behaves is served as fast as ever, which a
canary says that takes leases all the while.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from box import until
from counts import counts
from omega import Omega
from scene import Scene

from etha.tensor_bus.agent import _MAX_STRANGERS
from etha.tensor_bus.sessions import _MAX_WAITING_FDS

CANARY = """
def canary(stop):
    '''Seconds of each lease that is taken and released until ``stop`` exists.'''
    took = []
    while not os.path.exists(stop) or len(took) < 300:
        began = time.perf_counter()
        policy.read(timeout=20).release()
        took.append(time.perf_counter() - began)
        select.select([], [], [], 0.001)
    took.sort()
    return took[len(took) // 2], took[len(took) * 99 // 100], took[-1], len(took)
"""

CROWD = """
import array, collections, errno, resource, socket
from etha.tensor_bus import packets, wire
from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.records import encode

resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
path = agent_paths(0).socket

def connected():
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setblocking(False)
        try:
            sock.connect(path)
            return sock
        except BlockingIOError:  # its backlog is full, and it takes them one by one
            sock.close()
            select.select([], [], [], 0.002)

def half_open(count):
    return [connected() for _ in range(count)]

def full_packets(count):
    '''Packets with all the descriptors that one may have, before and after a greeting.'''
    opened = [os.open('/dev/null', os.O_RDONLY) for _ in range(packets.FDS_PER_PACKET)]
    kept = []
    for n in range(count):
        sock = connected()
        data = encode(packets.RingForCommands()) if n % 2 else b'no packet at all'
        try:
            wire.send(sock, data, opened)
        except (BlockingIOError, ConnectionError):
            pass
        kept.append(sock)
    for fd in opened:
        os.close(fd)
    return kept

def never_reads(count):
    '''Requests whose answers nobody takes, on a connection that was greeted.'''
    from etha.tensor_bus.reach import dial
    kept = []
    for _ in range(max(count // 1000, 2)):
        channel, _ = dial(agent_paths(0), 0, b'')
        kept.append(channel)
        for n in range(1, 6000):
            packet = packets.Subscribe(n, 'policy', 1, time.clock_gettime(time.CLOCK_BOOTTIME) + 20, 0)
            try:
                wire.send(channel.sock, encode(packet))
            except (BlockingIOError, ConnectionError):
                break
    return kept

def open_still():
    '''How many of the connections the agent has not cut.'''
    still = 0
    for each in standing:
        sock = getattr(each, "sock", each)
        try:
            while sock.recv(1 << 16, socket.MSG_DONTWAIT):
                pass
        except BlockingIOError:
            still += 1
        except ConnectionError:
            pass
    return still

def crowd(kind, count):
    global standing
    standing = globals()[kind](count)
    return len(standing)
"""

KINDS = ("half_open", "full_packets", "never_reads")
WORST_SECONDS = 5.0
"""What a lease may take, whatever else the box does; 10,000 that were let in at once held one up for longer."""

MOST_MORE = 48 << 20
"""Bytes that the agent's memory may grow by."""


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def canary(scene: Scene, act, tmp_path: Path) -> tuple[float, float, float, int]:
    """Leases while ``act`` runs: median, 99th percentile, worst, count."""
    stop = tmp_path / f"stop-{os.urandom(4).hex()}"
    scene.reader.say(f"canary({str(stop)!r})")
    try:
        act()
    finally:
        stop.touch()
    return scene.reader.hear(120)


@pytest.mark.parametrize("count", counts(600, 10_000))
@pytest.mark.parametrize("kind", KINDS)
def test_who_behaves_is_served(stage: tuple[Scene, Omega], kind: str, count: int, tmp_path: Path):
    scene, omega = stage
    full = count == 10_000
    scene.reader.do(CANARY)
    worker = scene.worker(CROWD)
    try:
        memory, fds = resident(scene.agent.pid), descriptors(scene.agent.pid)
        idle = [canary(scene, lambda: None, tmp_path)]
        most: list[tuple[int, int]] = []

        def come() -> None:
            worker.say(f"crowd({kind!r}, {count})")
            while not worker.heard():
                most.append((resident(scene.agent.pid), descriptors(scene.agent.pid)))
                os.sched_yield()
            assert worker.hear() > 0

        coming = canary(scene, come, tmp_path)
        there = canary(scene, lambda: None, tmp_path)
        still = worker.do("open_still()")
        most.append((resident(scene.agent.pid), descriptors(scene.agent.pid)))
        scene.dismiss(worker)
        until(lambda: descriptors(scene.agent.pid) <= fds, 20)
        idle.append(canary(scene, lambda: None, tmp_path))
        for what, leases in {
            "idle": idle[0],
            "idle again": idle[1],
            "as they come": coming,
            "while they are there": there,
        }.items():
            print(f"{kind}, {count}: {what}: leases {[round(each * 1e6) for each in leases[:3]]} us of {leases[3]}")
        print(
            f"{kind}: memory {memory >> 20} -> {max(most)[0] >> 20} MiB,"
            f" descriptors {fds} -> {max(number for _, number in most)}"
        )
        assert max(most)[0] - memory < MOST_MORE
        # A stranger is a socket and a pidfd. Of one that greeted, and reads nothing, so much is kept as one may have.
        most_fds = (
            2 * (_MAX_STRANGERS + 32) if kind != "never_reads" else max(count // 1000, 2) * (_MAX_WAITING_FDS + 260)
        )
        assert max(number for _, number in most) - fds <= most_fds
        if kind != "never_reads":
            assert still <= _MAX_STRANGERS
        assert max(coming[2], there[2]) < WORST_SECONDS
        if full:  # on a box that has nothing else to do
            assert there[1] <= 2 * max(each[1] for each in idle)
    finally:
        if worker in scene.workers:
            scene.dismiss(worker)
    said = omega.accept_said()
    assert "Traceback" not in said, said
    scene.agent.errors.write_text("")
    omega.accept_said()
    assert omega.faults() == []
