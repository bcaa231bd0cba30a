"""The program of `test_restarts`: 8 workers at full speed, and an agent that is killed and started again and again.

``python restarts.py SEED ROUNDS SABOTAGE`` prints one line of JSON. The workers are ordinary: four own a publication
and write version after version, four read them all. None knows of a restart, and none has a line of code for one.

The checker: inside a lease every element of every tensor is the lease's version. Versions that a reader sees only grow.
A call may end well, or as `LEGAL` says, and within its timeout and `SLACK`. At the end every reader finds the last
version of every owner. SABOTAGE is ``none``, or ``late`` (readers look after they have released).
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from functools import partial

import torch
from requiring import require

from etha import bootstrap_client
from etha.errors import EthaError

OWNERS = READERS = 4
TIMEOUT = 20.0
SLACK = 5.0
LEGAL = {"VersionTimeout", "LeaseTimeout"}
"""Within 20 s a neighbour always goes on, so even these are not expected; they would be told by type, and in time."""


class Board(ctypes.Structure):
    """What the workers tell the program, in memory that they share."""

    _fields_ = (
        ("steps", ctypes.c_uint64 * (OWNERS + READERS)),
        ("last", ctypes.c_uint64 * OWNERS),
        ("looks", ctypes.c_uint64 * READERS),
        ("torn", ctypes.c_uint64 * READERS),
        ("legal", ctypes.c_uint64 * (OWNERS + READERS)),
        ("stop", ctypes.c_uint64),
        ("finished", ctypes.c_uint64 * OWNERS),
        ("done", ctypes.c_uint64 * READERS),
    )


def timed(board: Board, number: int, call):
    """Its value, or None where it ended as it may."""
    began = time.monotonic()
    try:
        return call()
    except EthaError as error:
        if type(error).__name__ not in LEGAL:
            raise
        board.legal[number] += 1
        return None
    finally:
        took = time.monotonic() - began
        if took > TIMEOUT + SLACK:
            raise TimeoutError(f"a call took {took:.1f} s")


def own(board: Board, number: int) -> None:
    client, _ = bootstrap_client()
    tensors = {str(size): torch.zeros(size, dtype=torch.int64).share_memory_() for size in (8192, 3)}
    policy = client.register_tensors(f"policy {number}", tensors, timeout=TIMEOUT)
    while not board.stop:
        update = policy.update(timeout=TIMEOUT)
        if timed(board, number, update.__enter__) is None:
            continue
        version = policy.version + 1
        for tensor in tensors.values():
            tensor.fill_(version)
        timed(board, number, partial(update.__exit__, None, None, None))
        require(policy.version == version, f"version {policy.version}, and {version} was written")
        board.steps[number] += 1
    board.last[number] = policy.version
    board.finished[number] = 1
    until(lambda: all(board.done[:]), 60)
    client.close(TIMEOUT)


def read(board: Board, number: int, seed: int, late: bool) -> None:
    chance = random.Random(seed)
    client, _ = bootstrap_client()
    policies = [client.subscribe(f"policy {owner}", timeout=TIMEOUT) for owner in range(OWNERS)]
    seen = [-1] * OWNERS

    def look(owner: int, least: int | None) -> None:
        lease = timed(board, OWNERS + number, lambda: policies[owner].read(min_version=least, timeout=TIMEOUT))
        if lease is None:
            return
        require(lease.version >= seen[owner], f"version {lease.version} after {seen[owner]}")
        seen[owner] = lease.version
        held = dict(lease)
        if late:
            lease.release()
        for _ in range(200 if late else 5):
            values = {value for tensor in held.values() for value in map(int, torch.aminmax(tensor))}
            board.looks[number] += 1
            board.torn[number] += values != {lease.version}
        lease.release()
        board.steps[OWNERS + number] += 1

    while not board.stop:
        owner = chance.randrange(OWNERS)
        look(owner, chance.choice((None, max(seen[owner], 0), seen[owner] + 1)))
    for owner in range(OWNERS):
        until(lambda owner=owner: board.finished[owner], 60)
        look(owner, int(board.last[owner]))
        require(seen[owner] == board.last[owner], f"version {seen[owner]} of {board.last[owner]} at the end")
    board.done[number] = 1
    client.close(TIMEOUT)


def worker(board: Board, number: int, seed: int, late: bool, seconds: float) -> int:
    faulthandler.dump_traceback_later(seconds, exit=True)
    torch.set_num_threads(1)
    try:
        own(board, number) if number < OWNERS else read(board, number - OWNERS, seed, late)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class Agents:
    """The agent of the moment."""

    def __init__(self) -> None:
        self.process = self.start()

    def start(self) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-m", "etha", "agent"], stdout=subprocess.PIPE, text=True)
        require("serves" in process.stdout.readline(), "the agent did not start")
        return process

    def kill(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait()
        self.process.stdout.close()

    def follow(self) -> None:
        self.process = self.start()


def until(condition, seconds: float) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"not so within {seconds} s")
        os.sched_yield()
    return time.monotonic() - began


def main() -> int:
    seed, rounds, late = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "late"
    chance = random.Random(seed)
    board = Board.from_buffer(mmap.mmap(-1, ctypes.sizeof(Board)))
    agents = Agents()
    children = []
    for number in range(OWNERS + READERS):
        child = os.fork()
        if child == 0:
            os._exit(worker(board, number, seed * 100 + number, late, 120 + 5 * rounds))
        children.append(child)
    serving = []
    try:
        until(lambda: all(board.steps[:]), 60)
        for _ in range(rounds):
            moment = sum(board.steps[:]) + chance.randrange(1000)
            until(lambda moment=moment: sum(board.steps[:]) >= moment, 30)
            agents.kill(signal.SIGKILL)
            before = board.steps[:]
            agents.follow()
            # Every worker has done a step with the new agent: it writes, or holds a lease.
            serving.append(
                until(lambda before=before: all(map(int.__gt__, board.steps[:], (b + 1 for b in before))), 30)
            )
    except TimeoutError:
        traceback.print_exc()
        for child in children:
            os.kill(child, signal.SIGABRT)
    finally:
        board.stop = 1
    statuses = [os.waitpid(child, 0)[1] for child in children]
    agents.kill(signal.SIGTERM)
    result = {
        "statuses": statuses,
        "serving_s": {"median": sorted(serving)[len(serving) // 2], "worst": max(serving)},
        "steps": board.steps[:],
        "versions": board.last[:],
        "looks": sum(board.looks[:]),
        "torn": sum(board.torn[:]),
        "legal": sum(board.legal[:]),
    }
    os.write(1, (json.dumps(result) + "\n").encode())
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
