"""Every row's name, for a device, in the order of the report.

Names stand here and not beside what measures them: importing that imports torch, and a row's process must say first
what its allocator is to give.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module

from costs.groups import Group
from costs.pairing import Run
from costs.row import Row

from bandwidths.place import Kind, Place, places

_KINDS: tuple[Kind, ...] = ("host", "legacy", "fd")


def groups(device: str, scale: float) -> tuple[Group, ...]:
    """What is measured on a device, with so much of the model; and, by name, what needs another."""
    here = [place.kind for place in places(device)]
    made: list[Group] = []
    for kind in _KINDS:
        if kind in here:
            made += _of(Place(kind), scale)
        elif kind != "host":
            names = tuple(name for group in _of(Place(kind), scale) for name in group.rows)
            made.append(Group(partial(_skipped, names), names))
    return tuple(made)


def _of(place: Place, scale: float) -> list[Group]:
    kind = place.kind
    return [
        Group(
            partial(_measured, place, "copies", "bandwidth", ()),
            tuple(f"{what}-{kind}-{size}" for size in ("512MiB", "2GiB", "8GiB") for what in ("copy", "own")),
        ),
        Group(
            partial(_measured, place, "openings", "openings", ()),
            tuple(f"{step}-{by}-{kind}" for by in ("size", "count") for step in ("export", "open", "close")),
        ),
        Group(
            partial(_measured, place, "stamps", "stamps", ()),
            tuple(f"stamp-{load}-{kind}" for load in ("idle", "busy")),
        ),
        Group(
            partial(_measured, place, "lists", "alone", (scale,)),
            (f"list-publish-read-{kind}", f"list-copy-into-{kind}"),
        ),
        Group(
            partial(_measured, place, "lists", "beside", (scale,)),
            (f"list-handover-{kind}", *(f"step-{way}-{kind}" for way in ("handles", "bucket", "pinned"))),
        ),
        Group(
            partial(_measured, place, "remains", "remains", (scale,)),
            tuple(f"memory-{when}-{kind}" for when in ("during", "after")),
        ),
    ]


def _measured(place: Place, module: str, function: str, arguments: tuple[float, ...], run: Run) -> list[Row]:
    place.prepare()
    rows: list[Row] = getattr(import_module(f"bandwidths.{module}"), function)(place, *arguments, run)
    return rows


def _skipped(names: tuple[str, ...], run: Run) -> list[Row]:
    return [Row(name=name, what=name, note="needs a GPU") for name in names]
