"""The command line of `etha demo`. Loads neither torch nor scikit-learn; matplotlib only to plot.

The demo itself is loaded when it is run: every other command pays for what stands at the top of this file.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from etha.cli.demo.report import Curves, Report


def demo(
    device: Annotated[
        str, typer.Option(help="auto or cpu: the demo measures on the host only.", show_default=True)
    ] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Training steps; each publishes one version.")] = 300,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout; everything else goes to stderr.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write accuracy by version and both latency distributions to FILE.png.", metavar="FILE.png"),
    ] = None,
    sabotage: Annotated[
        bool,
        typer.Option(
            "--sabotage",
            help="Read without leases. Torn reads are then expected: exit 0 means some were seen.",
        ),
    ] = False,
) -> None:
    """Train a network in one process, and evaluate it in another with the same memory.

    Starts an agent, a trainer that learns handwritten digits and publishes its weights every step,
    and an evaluator that reads every version it can, in place. Exit status 0: test accuracy of at least
    0.97, no torn read, no byte copied, every process ended well. With --sabotage: torn reads were seen.
    """
    from etha.cli.demo.backend import describe_backend
    from etha.cli.demo.children import DemoFailed, Interrupted
    from etha.cli.demo.run import Options, run
    from etha.cli.demo.screen import Screen, summarise

    _refuse_what_cannot_work(device, plot)
    console = Console(stderr=json)
    options = Options(device="cpu", backend=describe_backend(), steps=steps, sabotage=sabotage)
    console.print(Text(f"agent rank 0 · {options.backend}"), soft_wrap=True)
    try:
        with Screen(console) as screen:
            report, curves = run(options, screen)
    except (DemoFailed, OSError) as error:
        Console(stderr=True).print(Text(f"etha demo failed: {error}", "red"), soft_wrap=True)
        raise typer.Exit(1) from error
    except Interrupted as error:
        Console(stderr=True).print(
            Text(f"etha demo: {error}; everything is ended and removed", "yellow"), soft_wrap=True
        )
        raise typer.Exit(error.exit_code) from error
    summarise(console, report)
    if plot is not None:
        _plot(plot, report, curves, console)
    if json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    raise typer.Exit(0 if report.ok else 1)


def _refuse_what_cannot_work(device: str, plot: Path | None) -> None:
    """Before a process is started."""
    if device not in ("auto", "cpu"):
        raise typer.BadParameter(
            f"{device!r} is refused: the demo finds copies by the inodes of host memory, and device memory has none."
            " Use --device cpu here. On a GPU: etha agent --device cuda:0, and the programs in examples/.",
            param_hint="--device",
        )
    needed = {"sklearn": "scikit-learn"} | ({"matplotlib": "matplotlib"} if plot is not None else {})
    missing = [name for module, name in needed.items() if find_spec(module) is None]
    if missing:
        text = (
            f"etha demo needs {' and '.join(missing)}, of the extra etha[demo]."
            " In a clone of etha's repository: pip install '.[demo]'"
        )
        Console(stderr=True).print(Text(text, "red"), soft_wrap=True)
        raise typer.Exit(1)
    if plot is not None and not plot.absolute().parent.is_dir():
        raise typer.BadParameter(f"{plot.absolute().parent} is no directory", param_hint="--plot")


def _plot(path: Path, report: Report, curves: Curves, console: Console) -> None:
    from etha.cli.demo.plot import draw  # matplotlib takes a second to load

    title = (
        f"etha demo: {report.versions_published} versions published,"
        f" {report.versions_read} read in place, {report.torn} torn"
    )
    draw(path, curves, title)
    console.print(Text(f"plot: {path}"), soft_wrap=True)
