"""``python -O`` takes every ``assert`` away but those of test modules, to which pytest gives a code of its own. So no
other code may rely on one: not the library, not what runs beside pytest. `make test-optimized` runs the tests that way.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from requiring import require

ROOT = Path(__file__).parent.parent
FOLDERS = ("etha", "benchmarks", "examples", "tests")
SAMPLES = {"tests/test_layers.py", "tests/test_optimized.py"}
"""They hold source with an assert, to see it found."""


def files() -> list[str]:
    return [str(path.relative_to(ROOT)) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def rewritten(name: str) -> bool:
    """Whether pytest gives the file's asserts a code of its own, where it collects it: the tests and their fixtures."""
    last = name.rpartition("/")[2]
    return name.startswith("tests/") and (last.startswith("test_") or last == "conftest.py")


def lost(source: str, *, bare: bool) -> Iterator[int]:
    """Lines of asserts that are gone under ``-O``: those in strings that are programs, and with ``bare`` all others."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and bare:
            yield node.lineno
        elif isinstance(node, ast.Constant | ast.JoinedStr):
            text = _text(node)
            if "assert" in text and _is_program_with_assert(text):
                yield node.lineno


def _text(node: ast.Constant | ast.JoinedStr) -> str:
    """A string; what is put into an f-string is a word."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "word" for part in node.values)
    return node.value if isinstance(node.value, str) else ""


def _is_program_with_assert(text: str) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(text))
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Assert) for node in ast.walk(tree))


@pytest.mark.parametrize("name", files())
def test_no_assert_is_lost(name: str):
    found = list(lost((ROOT / name).read_text(), bare=not rewritten(name)))
    assert found == [] or name in SAMPLES, "say require(), or raise"


@pytest.mark.parametrize(
    "source",
    [
        "assert x",
        "def f():\n    assert x, 'why'",
        "CODE = '''\nimport os\nassert os\n'''",
        "CODE = '''\n    assert x\n'''",
        "CODE = f'''\nx = {name}\nassert x\n'''",
        "run('a = 1; assert a')",
    ],
)
def test_an_assert_that_would_be_lost_is_seen(source: str):
    assert list(lost(source, bare=True))


def test_what_pytest_rewrites_or_is_no_program_is_left_alone():
    assert list(lost("assert x\nSTORY = 'one must not assert this'", bare=False)) == []


def test_require_fails_in_both_modes():
    require([0])
    with pytest.raises(AssertionError, match="seven"):
        require("", "seven")
    code = "import sys; sys.path.append(sys.argv[1]); from requiring import require; require(0)"
    for options in ([], ["-O"]):
        done = subprocess.run(
            [sys.executable, *options, "-c", code, str(ROOT / "tests")], capture_output=True, check=False
        )
        assert done.returncode == 1
        assert b"AssertionError" in done.stderr


def test_an_assert_of_a_test_counts_in_this_run():
    """Whatever options this run has."""
    with pytest.raises(AssertionError):
        assert sys.flags.optimize < 0
