"""How long ``etha --help`` and ``etha status`` take, beside a bare import of the libraries that they use.

Which those are is not guessed: a run of the command says which modules it loads, and all that are not etha's are the
floor. (Typer alone loads pydantic when there is an option to parse, and rich's Markdown when there is a help text to
print.)
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

from costs.pairing import Run, Side, clocked
from costs.processes import Box, client
from costs.row import Budget, Row, compare
from costs.tensors import parameters

_TELL: Final = """
import atexit, sys

def tell():
    found = {name: getattr(module, "__spec__", None) for name, module in sys.modules.items()}
    sys.stderr.write(chr(10) + " ".join(name for name, spec in found.items() if spec and spec.name == name))

atexit.register(tell)
from etha.cli import main
main()
"""
"""Runs a command, and says on stderr what was loaded at its end."""

_BUDGET: Final = Budget("ratio", 2.0, "≤ 2 × import of its libraries")
_TENSORS: Final = 10_000


def command_line(run: Run) -> list[Row]:
    """The two commands; status with one small publication, and with 10,000 tensors."""
    with Box():
        bus = client()
        bus.register_tensors("policy", parameters(10))
        few = run.interleave(
            {
                "help": _program("-m", "etha", "--help"),
                "help libraries": _imports("--help"),
                "status": _program("-m", "etha", "status"),
                "status libraries": _imports("status"),
            },
            rounds=15,
            warm=2,
        )
        count = run.pick(_TENSORS, 100)
        bus.register_tensors("large", parameters(count, strategy="file_system"))
        many = run.interleave(
            {"etha": _program("-m", "etha", "status"), "floor": _imports("status")}, rounds=10, warm=1
        )
    return [
        compare(
            "help",
            "etha --help",
            etha=few["help"],
            floor=few["help libraries"],
            floor_is="import of what it loads but etha",
            budget=_BUDGET,
        ),
        compare(
            "status",
            "etha status",
            etha=few["status"],
            floor=few["status libraries"],
            floor_is="import of what it loads but etha",
            budget=_BUDGET,
        ),
        compare(
            "status-10000",
            "etha status, 10,000 tensors",
            **many,
            floor_is="import of what it loads but etha",
            budget=_BUDGET,
            more={"tensors": count},
        ),
    ]


def _program(*arguments: str) -> Side:
    """A program from its start to its end. As where it is installed, its bytecode is there from the second time on."""
    command = [sys.executable, *arguments]
    return clocked(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, env=_environment(), check=True))


def _imports(*arguments: str) -> Side:
    """A program that imports what ``etha *arguments`` has loaded at its end, etha left out."""
    ran = subprocess.run(
        [sys.executable, "-c", _TELL, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=_environment(),
        text=True,
        check=True,
    )
    loaded = [name for name in ran.stderr.splitlines()[-1].split() if "etha" not in name.lower()]
    return _program("-c", f"import importlib\nfor name in {loaded}: importlib.import_module(name)")


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
