"""`etha.errors`: families, builtins, fields, and a text that says what to do."""

from __future__ import annotations

import ast
import builtins
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import etha
from etha import errors
from etha.errors import LEAVES, AgentError, CallerError, EthaError, PeerError, SystemFault

FAMILIES = (CallerError, AgentError, PeerError, SystemFault)
leaves = pytest.mark.parametrize("leaf", LEAVES.values(), ids=LEAVES)


def test_every_class_is_the_base_a_family_or_a_leaf():
    classes = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, EthaError)}
    assert classes == {EthaError, *FAMILIES, *LEAVES.values()}
    assert all(name == leaf.__name__ for name, leaf in LEAVES.items())


@leaves
def test_a_leaf_is_of_one_family_and_of_a_builtin(leaf: type[EthaError]):
    assert sum(issubclass(leaf, family) for family in FAMILIES) == 1
    others = [base for base in leaf.__bases__ if not issubclass(base, EthaError)]
    assert len(others) == 1
    assert vars(builtins)[others[0].__name__] is others[0]
    assert others[0] is not Exception
    assert leaf.__subclasses__() == []


@pytest.mark.parametrize(
    ("leaf", "builtin"),
    [
        ("InvalidArgument", ValueError),
        ("NoAgent", ConnectionError),
        ("AgentGone", ConnectionError),
        ("AgentTimeout", TimeoutError),
        ("LeaseTimeout", TimeoutError),
        ("OwnerDiedError", ConnectionError),
        ("UnsafePath", PermissionError),
        ("QueueFull", OSError),
        ("VersionGone", LookupError),
    ],
)
def test_it_is_the_builtin_that_a_programmer_would_catch(leaf: str, builtin: type[Exception]):
    with pytest.raises(builtin):
        raise LEAVES[leaf]("so it is.")


@leaves
def test_fields_and_text(leaf: type[EthaError]):
    error = leaf("It stands.", resource="policy", holder="pid 1 (x)", remedy="Stop it.")
    assert (error.message, error.resource, error.holder, error.remedy) == (
        "It stands.",
        "policy",
        "pid 1 (x)",
        "Stop it.",
    )
    assert str(error) == "It stands. Stop it."
    bare = leaf("It stands.")
    assert (bare.resource, bare.holder, bare.remedy) == (None, None, None)
    assert str(bare) == "It stands."


@leaves
def test_it_survives_a_pickle_of_someone_elses(leaf: type[EthaError]):
    """`concurrent.futures` and `multiprocessing` send their workers' exceptions so."""
    error = leaf("It stands.", resource="policy", holder="pid 1 (x)", remedy="Stop it.")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(copy) is leaf
    assert str(copy) == str(error)
    assert (copy.resource, copy.holder) == ("policy", "pid 1 (x)")


def test_every_leaf_says_when_to_expect_it_and_is_raised_somewhere():
    root = Path(etha.__file__).parent
    names = {
        node.id
        for path in root.rglob("*.py")
        if path.name != "errors.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name)
    }
    assert [name for name, leaf in LEAVES.items() if not leaf.__doc__ or name not in names] == []


def test_nothing_else_of_etha_is_needed():
    code = "import sys, etha.errors; print(sorted(m for m in sys.modules if m.startswith(('etha', 'torch', 'lmdb'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout
    assert "cupy" not in done.stdout
