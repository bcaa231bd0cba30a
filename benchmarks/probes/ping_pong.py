"""Probe 6: how long a hand-over between two processes on one GPU takes; everyone else idle, and someone busy.

Two processes queue the whole game in advance: each waits for the other's slot, runs an empty kernel, and writes its own
slot. So no host is in it, and what is timed is the device: waits, kernels, writes, and the switch between processes.
Busy means kernels of 1 ms, one after the other, each filling the device: in another stream of the owner, in another
stream of the reader, or in a third process.
"""

from __future__ import annotations

import os
import socket
import time

from libcuda import Cuda, median
from rig import FIGURES, Child, children, receive, run, send
from slots import Slots, sealed_memfd

QUESTION = "How long does a hand-over between two processes' kernels take, others idle or busy?"

SIZE = 4096
ROUNDS = 50
"""Of one game: 3 operations a round and side, well below what a stream takes without blocking its host."""

SERVE, RETURN = 0, 1
"""The slots of the two players."""

BUSY_NS = 1_000_000
BUSY_KERNELS = 400
BLOCKS_A_MULTIPROCESSOR = 32
"""What fits at once on recent devices; on older ones some blocks wait, which keeps it busy as well."""

GAME_SECONDS = 6.0
MODES: dict[str, tuple[str, ...]] = {
    "idle": (),
    "owner busy": ("owner",),
    "reader busy": ("reader",),
    "third process busy": ("third",),
}


def player(sock: socket.socket) -> None:
    """Owner, reader, or the one who only keeps the device busy."""
    cuda = Cuda().start()
    cuda.load()
    stream, other = cuda.stream(), cuda.stream()
    (mine, theirs), fds = receive(sock)
    slots = Slots(cuda, fds[0], SIZE)
    full = BLOCKS_A_MULTIPROCESSOR * cuda.attribute("multiprocessors")
    send(sock, "ready")
    while True:
        (said, first), _ = receive(sock)
        if said == "play":
            start = time.perf_counter()
            for value in range(first, first + ROUNDS):
                if mine == RETURN:
                    slots.wait(stream, theirs, value)
                cuda.launch("nothing", stream)
                slots.signal(stream, mine, value)
                if mine == SERVE:
                    slots.wait(stream, theirs, value)
            send(sock, time.perf_counter() - start)
            cuda("cuStreamSynchronize", stream)
            send(sock, time.perf_counter() - start)
        elif said == "busy":
            for _ in range(BUSY_KERNELS):
                cuda.launch("spin", other, BUSY_NS, blocks=full)
            send(sock, "busy")
        else:
            cuda("cuStreamSynchronize", other)
            send(sock, "calm")


def main() -> str:
    cuda = Cuda().start()
    if not cuda.attribute("stream_memory_operations_64_bit"):
        return "the device has no 64-bit stream memory operations"
    fd = sealed_memfd(SIZE)
    figures = FIGURES
    figures["rounds_a_game"] = ROUNDS
    with children("player", "player", "player") as (owner, reader, third):
        for child, slots in ((owner, (SERVE, RETURN)), (reader, (RETURN, SERVE)), (third, (2, 2))):
            child.ask(slots, 20, [fd])
        people = {"owner": owner, "reader": reader, "third": third}
        value = 1
        for mode, who in MODES.items():
            games: list[float] = []
            began = time.monotonic()
            queueing = 0.0
            while len(games) < 21 and time.monotonic() - began < GAME_SECONDS:
                for name in who:
                    people[name].ask(("busy", 0), 20)
                queued, seconds = play(owner, reader, value)
                value += ROUNDS
                games.append(seconds / ROUNDS)
                queueing = max(queueing, queued)
                for name in who:
                    people[name].ask(("calm", 0), 20)
            games = games[1:] if len(games) > 1 else games  # the first one warms up
            figures[mode] = {
                "games": len(games),
                "us_a_round_median": round(median(games) * 1e6, 1),
                "us_a_round_least": round(min(games) * 1e6, 1),
                "us_a_round_most": round(max(games) * 1e6, 1),
                "ms_of_host_to_queue_a_game": round(queueing * 1e3, 3),
            }
    os.close(fd)
    parts = [f"{mode} {figures[mode]['us_a_round_median']}" for mode in MODES]
    return "us a round (there and back): " + ", ".join(parts)


def play(owner: Child, reader: Child, first: int) -> tuple[float, float]:
    """One game: seconds to queue it, and from its first operation to its last, as the owner sees it."""
    reader.send(("play", first))
    reader.hear(20)
    owner.send(("play", first))
    queued = owner.hear(20)
    seconds = owner.hear(20)
    reader.hear(20)
    return float(queued), float(seconds)


if __name__ == "__main__":
    run("ping_pong", QUESTION, main, {"player": player}, seconds=58)
