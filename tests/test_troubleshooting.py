"""``docs/troubleshooting.md``: a heading for each error and message; and errors that send their reader to doctor."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import etha
from etha.errors import LEAVES

ROOT = Path(etha.__file__).parent
PAGE = (ROOT.parent / "docs" / "troubleshooting.md").read_text()
HEADINGS = {line.lstrip("#").strip() for line in PAGE.splitlines() if re.match(r"#{2,4} ", line)}

GATES = {"OtherNamespace", "OtherUser", "VersionMismatch", "UnsafePath"}
"""Always come from a gate that doctor looks at."""

REFUSALS = {"Refusal", "_refuse"}
"""Calls, beside those of the errors themselves, that make the text of one."""

DAMAGE = "InvalidRecord"
"""One heading for all of them: they say what is wrong with bytes, and the remedy is one."""

DOCTOR = "run: etha doctor"


def text(node: ast.expr) -> str:
    """A message as the source has it, … where something is put in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.IfExp):
        return text(node.body)
    return "…"


def raised(tree: ast.Module) -> Iterator[tuple[str, str, str, str]]:
    """Class, message, remedy and resource of each error that is made."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in LEAVES or name in REFUSALS:
            fields = {keyword.arg: text(keyword.value) for keyword in node.keywords}
            yield name, text(node.args[0]), fields.get("remedy", ""), fields.get("resource", "")


ALL = [
    (path.name, *found)
    for path in sorted(ROOT.rglob("*.py"))
    if path.name != "errors.py"
    for found in raised(ast.parse(path.read_text()))
]


def missing(errors: list[tuple[str, str, str, str, str]], headings: set[str]) -> set[str]:
    """Messages without a heading. One that is nearly all filled in cannot be searched for, and needs none."""
    return {
        f"{name}: {message}"
        for _, name, message, _, _ in errors
        if name != DAMAGE and len(message.replace("…", "").strip(" .:")) > 3
        if message.rstrip(".") not in headings
    }


def unsent(errors: list[tuple[str, str, str, str, str]]) -> set[str]:
    """Errors of a gate whose remedy does not end with the word that sends to doctor."""
    return {
        f"{module}: {name}: {message}"
        for module, name, message, remedy, resource in errors
        if (name in GATES or resource == "RLIMIT_NOFILE") and not remedy.endswith(DOCTOR)
    }


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_error_has_its_heading(leaf: str):
    assert f"`{leaf}`" in HEADINGS


def test_every_message_has_its_heading():
    assert missing(ALL, HEADINGS) == set()


def test_every_error_of_a_gate_sends_to_doctor():
    assert unsent(ALL) == set()


def test_what_is_missing_is_seen():
    tree = ast.parse('raise UnsafePath(f"{path} smells.", resource=path, remedy="Air it.")')
    planted = [("planted.py", *found) for found in raised(tree)]
    assert missing(planted, HEADINGS) == {"UnsafePath: … smells."}
    assert missing(planted, HEADINGS | {"… smells"}) == set()
    assert unsent(planted) == {"planted.py: UnsafePath: … smells."}


def test_no_heading_is_of_a_message_that_is_gone():
    """Under a class's heading stand messages of that class only."""
    said = {message.rstrip(".") for _, _, message, _, _ in ALL}
    body = PAGE.partition("## The agent")[2]
    told = {line[5:].strip() for line in body.splitlines() if line.startswith("#### ")}
    by_errno = {heading for heading in told if heading.startswith("mapping … bytes: ")}
    assert len(by_errno) == 2
    assert {heading for heading in told - by_errno if heading not in said} == set()


@pytest.mark.parametrize("name", ["Docker", "Kubernetes", "Slurm", "Ray"])
def test_containers_and_launchers_have_their_part(name: str):
    assert [heading for heading in HEADINGS if heading.startswith(name)] != []
