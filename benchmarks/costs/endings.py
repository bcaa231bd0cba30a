"""How long an end takes: a reader's or an owner's until what it held is free, an agent's until another serves."""

from __future__ import annotations

import select
import signal
import time
from pathlib import Path

from costs.pairing import Run
from costs.processes import PATIENCE, Box, Helper, Talk, client
from costs.row import Budget, Row, compare
from costs.tensors import MIB, parameters
from etha import TensorBusClient
from etha.tensor_bus.ipc import maps
from etha.tensor_bus.publication import Publication

_RECLAIM = Budget("value", 0.1, "≤ 0.1 s median, idle agent")
_BYTES = 64 * MIB


def reclaim(run: Run) -> list[Row]:
    """SIGKILL a reader that holds a lease, and an owner; beside the kernel's own word of a like process's death."""
    size = run.pick(_BYTES, MIB)
    with Box() as box:
        bus = client()
        policy = bus.register_tensors("policy", parameters(1, size))
        taken = run.interleave(
            {
                "reader": lambda: _reader_dies(policy),
                "owner": lambda: _owner_dies(bus, box.agent.pid, size),
                "kernel": lambda: _anyone_dies(size),
            },
            rounds=20,
            warm=1,
        )
    floor = {"floor": taken["kernel"], "floor_is": "SIGKILL to pidfd", "budget": _RECLAIM}
    return [
        compare("reclaim-reader", "a reader's death to update() entered", etha=taken["reader"], **floor),
        compare("reclaim-owner", "an owner's death to the agent's unmapping", etha=taken["owner"], **floor),
    ]


def restart(run: Run) -> list[Row]:
    """SIGKILL the agent, start another: until a client that lived through it holds a lease again."""
    budget = Budget("value", 2.0, "≤ 2 s after the new agent's start")
    taken = run.interleave({"etha": _restarted, "floor": _first_start}, rounds=7, warm=0)
    return [
        compare(
            "restart",
            "a new agent's start to the same client's lease",
            **taken,
            floor_is="an agent's start on an empty path",
            budget=budget,
        )
    ]


def _reader_dies(policy: Publication) -> float:
    with Helper(_hold_a_lease) as reader:
        reader.hear()
        started = time.perf_counter_ns()
        reader.kill()
        with policy.update():
            took = time.perf_counter_ns() - started
    return took * 1e-9


def _owner_dies(bus: TensorBusClient, agent: int, size: int) -> float:
    with Helper(_own, size) as owner:
        inode = owner.hear()
        subscription = bus.subscribe("theirs")  # a reader lives on: the agent's own mapping must go all the same
        maps = Path(f"/proc/{agent}/maps")
        if not _maps(maps, inode):
            raise RuntimeError("the agent does not map what was registered: this row would measure nothing")
        started = time.perf_counter_ns()
        owner.kill()
        while _maps(maps, inode):
            if time.perf_counter_ns() - started > PATIENCE * 1e9:
                raise TimeoutError("the agent still maps a dead owner's memory")
        took = time.perf_counter_ns() - started
        subscription.close()
    return took * 1e-9


def _anyone_dies(size: int) -> float:
    with Helper(_hold_memory, size) as helper:
        helper.hear()
        started = time.perf_counter_ns()
        helper.kill()
        select.select([helper.pidfd], [], [])
        took = time.perf_counter_ns() - started
    return took * 1e-9


def _maps(path: Path, inode: int) -> bool:
    return any(line.split(None, 5)[4] == b"%d" % inode for line in path.read_bytes().splitlines())


def _hold_a_lease(talk: Talk) -> None:
    lease = client().subscribe("policy").read()
    talk.say(lease.version)
    talk.hear()


def _own(talk: Talk, size: int) -> None:
    tensors = parameters(1, size)
    publication = client().register_tensors("theirs", tensors)
    (tensor,) = tensors.values()
    with maps.OwnRegions() as regions:
        region = regions.find(tensor.data_ptr(), size)
    if publication.closed or region is None:
        raise RuntimeError("a publication that was just made is open, and its memory mapped")
    talk.say(region.inode)
    talk.hear()


def _hold_memory(talk: Talk, size: int) -> None:
    tensors = parameters(1, size)
    talk.say(len(tensors))
    talk.hear()


def _restarted() -> float:
    with Box() as box, Helper(_publish_on) as owner:
        owner.hear()
        subscription = client().subscribe("policy")
        with subscription.read():
            pass
        box.agent.send_signal(signal.SIGKILL)
        box.agent.wait()
        started = time.perf_counter_ns()
        box.agent = box.start_agent()
        with subscription.read(timeout=10.0):
            return (time.perf_counter_ns() - started) * 1e-9


def _first_start() -> float:
    started = time.perf_counter_ns()
    with Box():
        return (time.perf_counter_ns() - started) * 1e-9


def _publish_on(talk: Talk) -> None:
    """An owner that goes on publishing, whatever becomes of the agent, until its parent ends it."""
    publication = client().register_tensors("policy", parameters(1))
    talk.say(publication.version)
    while not talk.waiting():
        publication.publish()
        time.sleep(0.01)
