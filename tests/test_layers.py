"""What holds for the source as a whole: the layers, what is loaded when, and what must not be there at all.

The order of the layers is not repeated here: it is read from the docstrings of the packages, so these stay true.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import etha
import etha.tensor_bus
import etha.tensor_bus.ipc

ROOT = Path(etha.__file__).parent
BUS = "etha.tensor_bus"
IPC = "etha.tensor_bus.ipc"
MAX_LINES = 400

PURE_MAY_IMPORT = {"__future__", "collections", "dataclasses", "enum", "heapq", "itertools", "math", "typing"}
"""Of the standard library, and nothing else but `etha.errors`, the manifest, and one another."""

HEAVY = {"torch", "cupy", "cuda", "sklearn", "matplotlib"}
PICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN = ("torch.load", "torch.save")


class Row(NamedTuple):
    """One row of a docstring's list: modules, from the bottom up, and what they are."""

    modules: list[str]
    description: str


class Import(NamedTuple):
    line: int
    target: str


# -- reading ------------------------------------------------------------------------------------------


def sources(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name to file, of every module of the package."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = ("etha", *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = sources()
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in MODULES.items()}


def listed(docstring: str) -> list[Row]:
    """The rows of the docstring's indented list. Lines that are indented further continue the row above."""
    rows: list[Row] = []
    for line in docstring.partition("::")[2].splitlines():
        match = re.fullmatch(r"    (  )?([a-z_]+(?:, [a-z_]+)*),?(?:\s{2,}(\S.*))?", line)
        if match is None:
            if line.strip():
                raise ValueError(f"no row of a list of modules: {line!r}")
            continue
        names, description = match[2].split(", "), match[3] or ""
        if match[1]:
            rows[-1] = Row(rows[-1].modules + names, f"{rows[-1].description} {description}".strip())
        else:
            rows.append(Row(names, description))
    return rows


def imports(tree: ast.Module, *, executed: bool = True) -> Iterator[Import]:
    """Every import, wherever it stands; with ``executed``, those for the type checker alone left out."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if executed and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(inner for child in node.body for inner in ast.walk(child))
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(node.lineno, name.name)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno}: a relative import; write the whole name")
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield Import(node.lineno, whole if whole in MODULES else str(node.module))


def top(dotted: str) -> str:
    return dotted.partition(".")[0]


BUS_ROWS = listed(etha.tensor_bus.__doc__ or "")
IPC_ROWS = listed(etha.tensor_bus.ipc.__doc__ or "")


def members(word: str) -> set[str]:
    """The modules of the bus whose row says ``word``."""
    found = {f"{BUS}.{name}" for row in BUS_ROWS if word in row.description for name in row.modules}
    assert found, f"no row of the list in {BUS} says {word!r} any more"
    return found


# -- the layers: each check returns what is wrong -----------------------------------------------------


def out_of_order(package: str, rows: list[Row], name: str, tree: ast.Module) -> list[str]:
    """Imports of modules that stand at or below the importer's own place in the list."""
    place = {f"{package}.{module}": index for index, module in enumerate(m for row in rows for m in row.modules)}
    inside = next((known for known in place if name == known or name.startswith(known + ".")), None)
    if inside is None:
        return []
    wrong = []
    for line, target in imports(tree):
        found = next((known for known in place if target == known or target.startswith(known + ".")), None)
        if found is not None and found != inside and place[found] > place[inside]:
            wrong.append(f"{name}:{line} imports {target}, which stands below it in the list")
        if target == package:
            wrong.append(f"{name}:{line} imports from {target}, which is for users")
    return wrong


def above(name: str, tree: ast.Module) -> list[str]:
    """Imports from a higher package: errors < ipc < the bus < the command line."""
    allowed = ("etha.errors",)
    if name.startswith("etha.cli") or name in ("etha", "etha.__main__"):
        return []
    if name.startswith(IPC):
        allowed = ("etha.errors", IPC)
    elif name.startswith(BUS):
        allowed = ("etha.errors", BUS)
    return [
        f"{name}:{line} imports {target}"
        for line, target in imports(tree, executed=False)
        if top(target) == "etha" and not any(target == ok or target.startswith(ok + ".") for ok in allowed)
    ]


def outside_world(name: str, tree: ast.Module, pure: set[str]) -> list[str]:
    """What a pure module imports that could reach a file, a socket, a clock or another process."""
    allowed = {"etha.errors", f"{IPC}.manifest"} | pure
    return [
        f"{name}:{line} imports {target}"
        for line, target in imports(tree, executed=False)
        if target not in allowed and top(target) not in PURE_MAY_IMPORT
    ]


def unwanted(name: str, tree: ast.Module) -> list[str]:
    """Pickles in any disguise; checks that vanish under ``-O``; and speech that is no command's."""
    wrong = []
    for line, target in imports(tree, executed=False):
        if top(target) in PICKLERS or target.startswith(("multiprocessing", "torch.multiprocessing")):
            wrong.append(f"{name}:{line} imports {target}")
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
        if text in FORBIDDEN or text.startswith("torch.multiprocessing") or text.endswith("ForkingPickler"):
            wrong.append(f"{name}:{node.lineno} uses {text}")
        elif isinstance(node, ast.Assert):
            wrong.append(f"{name}:{node.lineno} asserts: that is gone under -O")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            wrong.append(f"{name}:{node.lineno} prints")
    return wrong


def too_long(name: str, text: str) -> list[str]:
    count = len(text.splitlines())
    return [f"{name} has {count} lines, more than {MAX_LINES}"] if count > MAX_LINES else []


# -- the tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("package", "rows"), [(BUS, BUS_ROWS), (IPC, IPC_ROWS)], ids=[BUS, IPC])
def test_the_list_names_every_module_once(package: str, rows: list[Row]):
    names = [name for row in rows for name in row.modules]
    inside = {name.removeprefix(f"{package}.").partition(".")[0] for name in MODULES if name.startswith(f"{package}.")}
    assert sorted(names) == sorted(inside)


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(f"{BUS}.")])
def test_a_module_imports_only_what_stands_above_it_in_the_list(name: str):
    rows, package = (IPC_ROWS, IPC) if name.startswith(f"{IPC}.") else (BUS_ROWS, BUS)
    assert out_of_order(package, rows, name, TREES[name]) == []


def test_no_package_imports_a_higher_one():
    assert [wrong for name, tree in TREES.items() for wrong in above(name, tree)] == []


def test_ipc_knows_nothing_of_lmdb():
    known = {
        f"{name}:{found.line}"
        for name in MODULES
        if name.startswith(IPC)
        for found in imports(TREES[name], executed=False)
        if top(found.target) == "lmdb"
    }
    assert known == set()


def test_the_rules_are_pure():
    pure = members("pure")
    assert {f"{BUS}.registry", f"{BUS}.claims", f"{BUS}.claim_table", f"{BUS}.waiting", f"{BUS}.verdicts"} <= pure
    assert [wrong for name in sorted(pure) for wrong in outside_world(name, TREES[name], pure)] == []


def test_client_and_agent_know_nothing_of_each_other():
    client = members("a worker's end") | members("what a user holds")
    agent = members("the agent itself")
    assert {f"{BUS}.client", f"{BUS}.connection"} <= client
    assert {f"{BUS}.agent", f"{BUS}.journal"} <= agent
    wrong = [
        f"{name}:{line} imports {target}"
        for these, those in ((client, agent), (agent, client))
        for name in sorted(these)
        for line, target in imports(TREES[name], executed=False)
        if target in those
    ]
    assert wrong == []


@pytest.mark.parametrize("name", MODULES)
def test_no_pickle_no_assert_no_print(name: str):
    assert unwanted(name, TREES[name]) == []


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_too_long(name: str):
    assert too_long(name, MODULES[name].read_text()) == []


# -- what is loaded -----------------------------------------------------------------------------------


def loaded(*arguments: str, status: int = 0) -> set[str]:
    """The modules that a fresh interpreter imports, by its own account."""
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == status, ran.stderr[-2000:]
    return {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")}


def heavy(modules: set[str]) -> set[str]:
    assert "etha" in modules
    return {name for name in modules if top(name) in HEAVY}


def test_importing_etha_loads_no_torch():
    assert heavy(loaded("-c", "import etha, etha.tensor_bus.bootstrap, etha.cli")) == set()


def test_help_loads_no_torch():
    assert heavy(loaded("-m", "etha", "--help")) == set()


def test_status_without_an_agent_loads_no_torch(runtime: Path):
    assert heavy(loaded("-m", "etha", "status", status=1)) == set()


def test_status_of_a_publication_loads_no_torch(owner, reader):
    reader.do("lease = policy.read()")
    assert heavy(loaded("-m", "etha", "status")) == set()


def test_importing_etha_changes_no_environment_variable():
    program = """
import os
before, wrote = dict(os.environ), []
os.putenv = lambda *pair: wrote.append(pair)
os.unsetenv = lambda *name: wrote.append(name)
import etha, etha.cli, etha.tensor_bus.agent
os._exit(0 if dict(os.environ) == before and not wrote else 1)
"""
    ran = subprocess.run([sys.executable, "-c", program], env=dict(os.environ), timeout=60, check=False)
    assert ran.returncode == 0


# -- the checks see what they are for -----------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "def late():\n    import dill",
        "from torch.multiprocessing import reductions",
        "from multiprocessing.reduction import ForkingPickler",
        "import torch\ntorch.load('x')",
        "import torch.multiprocessing as m",
        "import torch\ntorch.multiprocessing.get_context()",
        "x = reduction.ForkingPickler(f)",
        "def f(x):\n    assert x",
        "print('x')",
    ],
)
def test_an_unwanted_thing_is_seen(source: str):
    assert unwanted("etha.planted", ast.parse(source))


def test_a_wrong_import_is_seen():
    pure = members("pure")
    rules = f"{BUS}.registry"
    for source in ("import os", "import socket", "import lmdb", "from time import sleep", f"from {BUS} import state"):
        assert outside_world(rules, ast.parse(source), pure)
    for name, source in (
        (f"{BUS}.clock", f"from {BUS} import agent"),
        (f"{BUS}.clock", f"from {BUS}.records import encode"),
        (f"{BUS}.link", f"def late():\n    from {BUS}.client import TensorBusClient"),
        (f"{BUS}.link", f"from {BUS} import Lease"),
    ):
        assert out_of_order(BUS, BUS_ROWS, name, ast.parse(source))
    assert out_of_order(IPC, IPC_ROWS, f"{IPC}.manifest", ast.parse(f"from {IPC} import host"))
    assert above(f"{IPC}.host", ast.parse(f"from {BUS}.clock import now"))
    assert above(f"{BUS}.client", ast.parse("import etha.cli.status"))
    assert above("etha.errors", ast.parse(f"from {IPC}.manifest import Manifest"))


def test_imports_for_the_type_checker_bind_no_one():
    tree = ast.parse(f"if TYPE_CHECKING:\n    from {BUS}.agent import TensorBusAgent\nelse:\n    import torch")
    assert [found.target for found in imports(tree)] == ["torch"]


def test_a_long_module_and_a_heavy_import_are_seen():
    assert too_long("etha.planted", "x = 1\n" * (MAX_LINES + 1))
    assert not too_long("etha.planted", "x = 1\n" * MAX_LINES)
    assert "torch" in heavy(loaded("-c", "import etha, torch"))


def test_a_list_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="no row"):
        listed("From the bottom up::\n\n    clock, paths     deadlines\n    something said in passing, of no module\n")
