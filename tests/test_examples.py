"""The programs in examples/, run as a user would: each in a process of its own, beside an agent."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DEADLINE_S = 120.0


@contextmanager
def process(runtime: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``python ARGUMENTS...``, killed if the test fails before its end; pytest shows its stderr then."""
    environment = {**os.environ, "ETHA_RUNTIME_DIR": str(runtime), "AGENT_RANK": "0", "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield started
    finally:
        started.kill()
        sys.stderr.write(started.communicate()[1])


def first_line(started: subprocess.Popen[str]) -> str:
    """Ends with the process, if that says nothing."""
    assert started.stdout is not None
    return started.stdout.readline()


def test_the_two_programs_work_together() -> None:
    with tempfile.TemporaryDirectory(prefix="etha-t-") as name:
        runtime = Path(name)
        with process(runtime, "-m", "etha", "agent", "--rank", "0", "--device", "cpu") as agent:
            assert first_line(agent)
            with process(runtime, "examples/live_eval.py") as evaluator:
                assert first_line(evaluator) == "waiting for a trainer\n"
                with process(runtime, "examples/train_and_publish.py", "150") as trainer:
                    trained, complaint = trainer.communicate(timeout=DEADLINE_S)
                    assert trainer.returncode == 0, complaint
                evaluated, complaint = evaluator.communicate(timeout=DEADLINE_S)
                assert evaluator.returncode == 0, complaint
            agent.send_signal(signal.SIGTERM)
            _, complaint = agent.communicate(timeout=DEADLINE_S)
            assert agent.returncode == 0, complaint
        assert list(runtime.iterdir()) == []

    assert "version 150: loss" in trained
    *readings, farewell = evaluated.splitlines()
    found = [re.fullmatch(r"version (\d+): accuracy ([\d.]+)", line) for line in readings]
    versions = [int(match[1]) for match in found if match]
    accuracies = [float(match[2]) for match in found if match]
    assert len(versions) == len(readings) > 2
    assert all(earlier < later for earlier, later in pairwise(versions))
    assert accuracies[-1] > 0.9
    assert farewell == "the trainer has closed its publication"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short_and_uses_the_public_face_only(example: Path) -> None:
    text = example.read_text()
    assert len(text.splitlines()) < 60
    imported = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.module}
    assert {module for module in imported if module.startswith("etha")} == {"etha.tensor_bus"}


def test_there_are_examples() -> None:
    assert [path.name for path in EXAMPLES] == ["live_eval.py", "train_and_publish.py"]
