"""What reading costs: bandwidth through a mapping, `copy_into`, and the memory that it does not take."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Final

import torch

from costs.pairing import Run, clocked
from costs.processes import Box, Helper, Talk, client
from costs.row import Budget, Row, compare
from costs.spread import percentiles, spread
from costs.tensors import MIB, parameters

_BYTES: Final = 256 * MIB
"""Eight times what the last-level cache of a usual machine holds."""

_PARTS: Final = 16
_SMALL_PARTS: Final = 2_000
_SMALL_BYTES: Final = 4096
_WATCH_SECONDS: Final = 2e-3


def read(run: Run) -> list[Row]:
    """Copy out of a lease, beside the same copy out of one's own memory of the same kind of pages."""
    size = run.pick(_BYTES, 4 * MIB)
    with Box(), Helper(_own, 1, size) as owner:
        owner.hear()
        policy = client().subscribe("policy")
        (own,) = parameters(1, size).values()
        private = torch.ones(size // 4)
        target = torch.empty(size // 4).fill_(0.0)
        with policy.read() as lease:
            (theirs,) = lease.values()
            sides = {
                "etha": clocked(lambda: target.copy_(theirs)),
                "floor": clocked(lambda: target.copy_(own)),
                "private": clocked(lambda: target.copy_(private)),
            }
            taken = run.interleave(sides, rounds=15, turns=3, warm=2)
    return [
        compare(
            "read",
            "256 MiB copied out of a lease",
            etha=taken["etha"],
            floor=taken["floor"],
            floor_is="out of one's own shared memory",
            budget=Budget("even", 1.02, "the same, within the spread"),
            more={"bytes": size, "bytes/s": size / spread([v for r in taken["etha"] for v in r]).median},
        ),
        compare(
            "read-private",
            "256 MiB copied out of a lease",
            etha=taken["etha"],
            floor=taken["private"],
            floor_is="out of one's own private memory",
            budget=Budget("even", 1.02, "the same, within the spread"),
        ),
    ]


def copy_into(run: Run) -> list[Row]:
    """`Lease.copy_into` beside a bare loop of copies from one's own memory: few large tensors, and many small ones."""
    size = run.pick(_BYTES, 4 * MIB) // _PARTS
    large = _copied(run, _PARTS, size, run.pick(15, 2))
    small = _copied(Run(run.quick), run.pick(_SMALL_PARTS, 50), _SMALL_BYTES, run.pick(15, 2))
    return [
        compare(
            name,
            what,
            **taken,
            floor_is="a loop of copy_() from one's own",
            budget=Budget("even", 1.02, "at memory speed, within the spread"),
        )
        for name, what, taken in (
            ("copy-into", "copy_into(), 16 tensors of 16 MiB", large),
            ("copy-into-small", "copy_into(), 2,000 tensors of 4 KiB", small),
        )
    ]


def _copied(run: Run, count: int, nbytes: int, rounds: int) -> dict[str, list[list[float]]]:
    """Both sides, round by round, each round with memory that neither has had before.

    Which pages a side was given decides some percent of its bandwidth, for as long as it has them: with the same pages
    throughout, that is a bias of the run, and no round shows another.
    """
    taken: dict[str, list[list[float]]] = {"etha": [], "floor": []}
    with Box(), Helper(_own_anew, count, nbytes) as owner:
        bus = client()
        for number in range(rounds):
            owner.ask()
            subscription = bus.subscribe("policy")
            own = parameters(count, nbytes)
            targets = {name: torch.zeros_like(tensor).fill_(0.0) for name, tensor in own.items()}

            def bare(own: dict[str, torch.Tensor] = own, targets: dict[str, torch.Tensor] = targets) -> None:
                for name, target in targets.items():
                    target.copy_(own[name])

            with subscription.read() as lease:
                sides = {"etha": clocked(partial(lease.copy_into, targets)), "floor": clocked(bare)}
                once = Run(run.quick).interleave(sides, rounds=1, turns=4, warm=2)
            for side, found in once.items():
                taken[side] += found
            subscription.close()
            owner.ask()
            run.step((number + 1) / rounds)
    return taken


def memory(run: Run) -> list[Row]:
    """What the box uses more while 1 GiB is registered and read; beside a reader that copies, to see it seen."""
    size = run.pick(1024 * MIB, 256 * MIB)
    with (
        Box() as box,
        Helper(_watch) as watcher,
        Helper(_own_for_memory, size) as owner,
        Helper(_read_for_memory) as reader,
    ):
        owner.hear()
        reader.hear()

        own: dict[str, list[float]] = {"read": [], "copy": []}

        def growth(how: str) -> float:
            watcher.ask([box.agent.pid, owner.pid, reader.pid])
            owner.ask("register")
            reader.ask(how)
            grown, own_grown = watcher.ask("stop")
            own[how].append(own_grown / size)
            reader.ask("close")
            owner.ask("close")
            return grown / size

        taken = run.interleave({"etha": lambda: growth("read"), "copied": lambda: growth("copy")}, rounds=8, warm=1)
    grown = [value for samples in taken["etha"] for value in samples]
    return [
        Row(
            name="memory",
            what="the box's memory at its peak, 1 GiB registered and read",
            unit="share",
            etha=spread(grown),
            floor=spread([value for samples in taken["copied"] for value in samples]),
            floor_is="a reader that clones (to see it seen)",
            budget=Budget("value", 0.01, "< 1 % of the bytes, peak included"),
            samples=len(grown),
            rounds=len(grown),
            percentiles={side: percentiles(rounds) for side, rounds in taken.items()},
            more={
                "bytes": size,
                "agent, owner and reader alone": spread(own["read"]).median,
                "the same, with a reader that clones": spread(own["copy"]).median,
            },
        )
    ]


def _own(talk: Talk, count: int, nbytes: int) -> None:
    publication = client().register_tensors("policy", parameters(count, nbytes))
    talk.say(publication.version)
    talk.hear()


def _own_anew(talk: Talk, count: int, nbytes: int) -> None:
    """Registers new tensors whenever it is spoken to, and closes them when it is again."""
    bus = client()
    while True:
        talk.hear()
        publication = bus.register_tensors("policy", parameters(count, nbytes))
        talk.say(publication.version)
        talk.hear()
        publication.close()
        talk.say("closed")


def _own_for_memory(talk: Talk, nbytes: int) -> None:
    tensors = parameters(1, nbytes)
    bus = client()
    talk.say("every page is touched")
    while True:
        talk.hear()
        publication = bus.register_tensors("policy", tensors)
        talk.say(publication.version)
        talk.hear()
        publication.close()
        talk.say("closed")


def _read_for_memory(talk: Talk) -> None:
    bus = client()
    torch.ones(1 << 20).sum()
    talk.say("ready")
    while True:
        how = talk.hear()
        subscription = bus.subscribe("policy")
        with subscription.read() as lease:
            (tensor,) = lease.values()
            if how == "copy":
                tensor = tensor.clone()
            talk.say(float(tensor.view(-1, 1 << 20).sum(1).sum()))
        talk.hear()
        del tensor, lease
        subscription.close()
        talk.say("closed")


def _watch(talk: Talk) -> None:
    """From hearing pids until hearing more, the most that was used above the start: by the box, and by these."""
    while True:
        pids = talk.hear()
        before = peak = (used(), _own_use(pids))
        talk.say("started")
        stop = False
        while not stop:
            stop = _asked(talk)
            peak = (max(peak[0], used()), max(peak[1], _own_use(pids)))
        talk.hear()
        talk.say([peak[0] - before[0], peak[1] - before[1]])


def _asked(talk: Talk) -> bool:
    time.sleep(_WATCH_SECONDS)
    return talk.waiting()


def used() -> int:
    """What the box uses, in bytes.

    Not what is missing from MemFree: pages that a core keeps to give out next are not free there, and that is hundreds
    of MiB on a recent kernel.
    """
    with open("/proc/meminfo") as file:
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in file)}
    return sum(kib[kind] for kind in ("AnonPages", "Shmem", "PageTables", "KernelStack", "SUnreclaim")) * 1024


def _own_use(pids: list[int]) -> int:
    """What these processes use apart from shared memory, page tables included, in bytes; the neighbours left out."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmPTE:")))
    return total * 1024
