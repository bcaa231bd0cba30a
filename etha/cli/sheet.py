"""A publication as lines of text: for a terminal of 80 columns, and for ``grep``.

Everything is shown, 10,000 tensors too, so it is built line by line and not as a table that measures itself. One line
per tensor, unless that is wider than the terminal: then the name has a line of its own. Names come from other
processes: what a terminal would act on is shown as ``?``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Final

from rich.filesize import decimal

from etha.cli.anatomy import AllocationView, Anatomy, ClaimView, Holding, ProcessView, TensorView

_NAMED: Final = 3
"""Tensors that a shared storage is shown with: the others are in the list of tensors."""

_DETAILS: Final = ("allocation", "offset", "bytes", "dtype", "shape", "stride")


def lines(view: Anatomy, width: int | None) -> Iterator[str]:
    """The publication, without line ends.

    Args:
        view: what to show.
        width: columns of the terminal; None where there is none, and no line is too long.
    """
    yield from _summary(view)
    if view.readers:
        yield ""
        yield "readers"
        yield from (
            f"  {_process(each)} · maps {each.mapped} of {len(view.allocations)} allocations" for each in view.readers
        )
    if view.claims:
        yield ""
        yield "held and waited for"
        yield from map(_claim, view.claims)
    if view.allocations:
        yield ""
        yield "allocations, and who has them mapped or open"
        yield from _allocations(view.allocations)
    shared = list(_shared(view))
    if shared:
        yield ""
        yield "storages of several tensors"
        yield from shared
    if view.tensors:
        yield ""
        yield from _tensors(view.tensors, width)


def printable(text: str) -> str:
    """A name, without what a terminal would act on."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text)


def _summary(view: Anatomy) -> Iterator[str]:
    guard = "guarded" if view.guarded else "not guarded"
    version = "unknown" if view.version is None else str(view.version)
    wanted = " · wanted" if view.wanted else ""
    yield f"{printable(view.name)} · generation {view.generation} · version {version} · {view.phase} · {guard}{wanted}"
    yield f"  owner {_process(view.owner)}"
    changed = "" if view.changed_s is None else f" · last change {_age(view.changed_s)} ago"
    yield f"  registered {_age(view.age_s)} ago{changed} · updates begun {view.writes}"
    yield (
        f"  {len(view.tensors)} tensors · {len(view.storages)} storages, {decimal(view.nbytes)}"
        f" · {len(view.allocations)} allocations, {decimal(sum(each.nbytes for each in view.allocations))}"
    )
    if view.owner.looked == "at registration":
        yield f"  the owner's memory is shown as at its registration: now hidden by {view.owner.gate}"


def _process(each: ProcessView) -> str:
    connection = "" if each.connected or each.state == "dead" else " · not connected"
    gate = "" if each.gate is None or each.state == "dead" else f" · hidden by {each.gate}"
    return f"{each.label} · {each.state}{connection} · {_age(each.age_s)}{gate}"


def _claim(claim: ClaimView) -> str:
    version = "" if claim.version is None else f" on version {claim.version}"
    waits = "" if claim.granted else "waits: "
    return f"  {claim.label} thread {claim.thread} · {waits}{claim.kind}{version} · {_age(claim.age_s)}"


def _allocations(allocations: Sequence[AllocationView]) -> Iterator[str]:
    for each in allocations:
        yield f"  #{each.number} · {each.kind} · {each.nbytes} bytes · {_place(each)}"
        yield from map(_holding, each.holders)


def _place(each: AllocationView) -> str:
    if each.device is None:
        return f"on {each.gpu}" + (f", {each.descriptors} chunks" if each.descriptors else "")
    return f"inode {each.inode} of device {os.major(each.device)}:{os.minor(each.device)}"


def _holding(holding: Holding) -> str:
    mappings = " ".join(f"{start:x}-{end:x}" for start, end in holding.mappings) or "not mapped"
    descriptors = "".join(f" fd {number}" for number in holding.descriptors)
    return f"    {holding.role} pid {holding.pid} {mappings}{descriptors}"


def _shared(view: Anatomy) -> Iterator[str]:
    several = {storage.number: storage for storage in view.storages if storage.tensors > 1}
    names: dict[int, list[str]] = {}
    for tensor in view.tensors:
        if tensor.storage in several and tensor.tied_to is None:
            names.setdefault(tensor.storage, []).append(tensor.name)
    for number, storage in several.items():
        where = "no bytes" if storage.allocation is None else f"#{storage.allocation} at {storage.offset}"
        yield f"  {where} · {storage.nbytes} bytes · {storage.tensors} tensors"
        yield from (f"    {printable(name)}" for name in names[number][:_NAMED])
        if storage.tensors > _NAMED:
            yield f"    and {storage.tensors - _NAMED} more"


def _tensors(tensors: Sequence[TensorView], width: int | None) -> Iterator[str]:
    rows = [_details(tensor) for tensor in tensors]
    sizes = [max(map(len, column)) for column in zip(_DETAILS, *rows, strict=True)]
    names = [_name(tensor) for tensor in tensors]
    room = sum(sizes) + 2 * len(sizes)
    together = width is None or room + max(map(len, names)) <= width
    for name, row in zip(("tensor", *names), (_DETAILS, *rows), strict=True):
        if together:
            yield f"{_row(row, sizes)}  {name}"
        else:
            yield name
            yield f"  {_row(row, sizes).rstrip()}"


def _details(tensor: TensorView) -> tuple[str, ...]:
    shape, stride = ",".join(map(str, tensor.shape)), ",".join(map(str, tensor.stride))
    nowhere = tensor.allocation is None
    return (
        "-" if nowhere else f"#{tensor.allocation}",
        "-" if nowhere else str(tensor.offset),
        str(tensor.nbytes),
        tensor.dtype,
        f"[{shape}]",
        f"({stride})",
    )


def _row(row: Sequence[str], sizes: Sequence[int]) -> str:
    numbers = [text.rjust(size) for text, size in zip(row[:3], sizes[:3], strict=True)]
    words = [text.ljust(size) for text, size in zip(row[3:], sizes[3:], strict=True)]
    return "  ".join(numbers + words)


def _name(tensor: TensorView) -> str:
    tied = "" if tensor.tied_to is None else f" = {printable(tensor.tied_to)}"
    return printable(tensor.name) + tied


def _age(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
