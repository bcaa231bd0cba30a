"""SECURITY.md names a test for each of its claims. The test is there; and the page is found by who looks for it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "SECURITY.md").read_text()


def named() -> list[tuple[str, str]]:
    """(file, function) of every test that the page names; an empty function for a whole file."""
    found: list[tuple[str, str]] = []
    for quoted in re.findall(r"`([^`\s]*test_[^`\s]*)`|`(::test_\w+)`", PAGE):
        path, _, function = "".join(quoted).partition("::")
        found.append((path or found[-1][0], function))
    return found


@pytest.mark.parametrize(("path", "function"), named())
def test_a_test_that_is_named_is_there(path: str, function: str):
    tree = ast.parse((ROOT / "tests" / path.removeprefix("tests/")).read_text())
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert function in functions or (not function and any(name.startswith("test_") for name in functions))


def test_it_names_many_and_is_named():
    assert len(named()) > 20
    for page in ("README.md", "CONTRIBUTING.md"):
        assert "SECURITY.md" in (ROOT / page).read_text()
