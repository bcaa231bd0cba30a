"""All that a GPU is asked, in one command and under ten minutes: ``make gpu``, or ``python benchmarks/gpu.py``.

The probes; the tests that need a GPU, those of memory and of the bus once more with expandable segments; and
``bandwidth.py``. Each runs in a child with a deadline, so one that hangs costs its own part only. What they showed goes
to ``benchmarks/results/gpu-DEVICE-DATE.json``, or to the directory that ``$OUT`` names, with a figure beside it.

A bare checkout will do: nothing is installed, and the interpreter that runs this runs the parts too. It needs torch,
cuda-bindings, pytest and what etha itself needs.

Exit status 0: every part ran, and ended well. 1: one did not. 2: there is no GPU; then nothing is written.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from gpurun import program
from gpurun.parts import BENCHMARKS, parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for all of it (default: 540)")
    parser.add_argument("--scale", type=float, default=0.125, help="of the model in bandwidth.py (default: 0.125)")
    parser.add_argument("--only", action="append", metavar="TEXT", help="only parts whose name holds this; repeatable")
    arguments = parser.parse_args()
    about = program.machine()
    if about["device"] is None:
        print(f"no GPU: {about.get('reason') or 'the driver names none'}", file=sys.stderr)
        return 2
    with program.scratch_directory() as name:
        scratch = Path(name)
        try:
            these = parts(scratch, arguments.scale)
        except ModuleNotFoundError as error:
            print(f"{error.name} is missing: put it on PYTHONPATH", file=sys.stderr)
            return 1
        if arguments.only:
            these = [part for part in these if any(text in part.name for text in arguments.only)]
        out = Path(os.environ.get("OUT") or BENCHMARKS / "results")
        return 0 if program.run_all(these, about, out, arguments.limit, scratch) else 1


if __name__ == "__main__":
    sys.exit(main())
