"""What a model's parameters cost to hand over, on the host and on a GPU: ``python benchmarks/bandwidth.py``.

Bandwidth through a mapping; exporting, opening and closing; publish to the reader's kernel; the parameters of a model,
step by step, beside the ways without etha; the memory that it takes. An agent for the device is started for each group
of rows. A run takes at most half of the memory that is free, touches no setting of a device, and ends its own processes
only. ``benchmarks/README.md`` says how to read the result.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from bandwidths import model
from bandwidths.catalogue import groups
from costs.groups import chosen, measure
from costs.machine import machine
from costs.processes import Helper, Talk
from costs.program import conclude

HERE = Path(__file__).parent
sys.path.append(str(HERE / "probes"))  # behind all else: a probe bears the name of a package here

_QUICK_SCALE = 1 / 1024
_SMALLEST_SCALE = 1 / 4096


def bandwidth(
    device: Annotated[str, typer.Option(help="cpu, or a GPU as torch names it: cuda:0.")] = "cpu",
    scale: Annotated[
        float | None, typer.Option(help="Share of each matrix's rows. [default: the largest 1/2^n that fits]")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke run: seconds, and numbers that mean nothing.")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(metavar="ROW", help="Only this row; repeatable.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file. [default: results/bandwidth-DEVICE.json, if every row is measured in full]"),
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="A PNG beside the JSON file (needs matplotlib).")] = False,
) -> None:
    """Measure what handing over a model's parameters costs.

    Exit status 0: every row was measured, or says why not, whatever it showed. 1: one could not be. 2: no such row, or
    no such device.
    """
    shown = _show_one(device)
    with Helper(_look, shown) as helper:
        found: dict[str, Any] = helper.hear()
    if "refused" in found:
        raise typer.BadParameter(found["refused"], param_hint="--device")
    free = int(found["free bytes"])
    if scale is None:
        scale = _QUICK_SCALE if quick else _largest(free)
    elif not 0 < scale <= 1 or _needed(scale) > free // 2:
        raise typer.BadParameter(
            f"{scale} needs {_needed(scale)} bytes; half of what is free is {free // 2}", param_hint="--scale"
        )
    try:
        those = chosen(groups(shown, scale), only or [])
    except LookupError as error:
        raise typer.BadParameter(str(error.args[0]), param_hint="--only") from error
    where = output or (None if quick or only else HERE / "results" / f"bandwidth-{_slug(str(found['device']))}.json")
    if plot and where is None:
        raise typer.BadParameter("a partial run has no file of its own: say --output too", param_hint="--plot")
    if shown == "cpu":
        import torch  # noqa: F401 - the processes that are forked need not import it then
    before = machine()
    started = time.monotonic()
    rows, broken = measure(those, quick)
    conclude(
        "benchmarks/bandwidth.py",
        [row for row in rows if not only or row.name in only],
        broken,
        before=before,
        seconds=time.monotonic() - started,
        quick=quick,
        where=where,
        plot=plot,
        setup={
            **found,
            "model": model.NAME,
            "scale": scale,
            "list bytes": float(model.nbytes(scale)),
            "list tensors": float(len(model.shapes(scale))),
        },
    )


def _show_one(device: str) -> str:
    """Have this process and its children see no other device than the one that is named; what they call it.

    Raises:
        typer.BadParameter: no name of a device.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise typer.BadParameter(f"{device!r} is neither cpu nor cuda:N", param_hint="--device")
    if device == "cpu":
        return device
    number = int(match[1] or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else visible.split(",")
    if names is not None and number >= len(names):
        raise typer.BadParameter(f"{device} is not in CUDA_VISIBLE_DEVICES={visible}", param_hint="--device")
    os.environ["CUDA_VISIBLE_DEVICES"] = str(number) if names is None else names[number]
    return "cuda:0"


def _look(talk: Talk, device: str) -> None:
    """In a process of its own, as it may make a context: what there is, and how much of it is free."""
    from bandwidths.memory import Memory
    from bandwidths.place import Place
    from torch.version import cuda

    if device == "cpu":
        talk.say({"device": "cpu", "free bytes": float(Memory(Place("host")).free())})
        return
    from rig import machine as about

    found = about()
    if cuda is None or found["device"] is None:
        talk.say({"refused": found.get("reason") or "this torch is built without CUDA"})
        return
    talk.say(
        {
            "device": found["device"],
            "free bytes": float(found["free_bytes"]),
            "CUDA of the driver": float(found["cuda_of_driver"]),
            "CUDA of torch": cuda,
            "driver": found.get("nvidia_module") or "",
            "cuda-bindings": found.get("cuda-bindings") or "",
        }
    )


def _needed(scale: float) -> int:
    """Bytes: the list, the reader's place for it, and a bucket."""
    size = model.nbytes(scale)
    return 2 * size + size // 8


def _largest(free: int) -> float:
    """The largest scale of 1/2^n that half of the free memory takes.

    Raises:
        typer.BadParameter: none does.
    """
    scale = 1.0
    while _needed(scale) > free // 2:
        scale /= 2
        if scale < _SMALLEST_SCALE:
            raise typer.BadParameter(f"only {free} bytes are free", param_hint="--device")
    return scale


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    typer.run(bandwidth)
