"""What is installed, and whether it fits together; found without importing torch or CuPy.

A distribution's version is its metadata's. Which CUDA torch was built for stands in its ``version.py``, which is
read, not run.

Source of the table of drivers: NVIDIA, "CUDA Compatibility", minor version compatibility.
"""

from __future__ import annotations

import ast
import os
import platform
import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import etha
from etha.cli.doctor.finding import Finding, Gate
from etha.cli.doctor.runner import Check

MINIMUM: Final = {"torch": (2, 6), "lmdb": (3, 0), "msgspec": (0, 19), "typer": (0, 15), "rich": (13,), "numpy": (0,)}
"""As in etha's own requirements."""

_PYTHON: Final = (3, 11)
_DRIVER_FOR_CUDA: Final = {11: 450, 12: 525, 13: 580}
_PIDFD_OPEN: Final = (5, 3)
_PEER_PIDFD: Final = (6, 5)

PYTHON: Final = Gate("versions", "Python", "asking the interpreter")
KERNEL: Final = Gate("versions", "kernel", "asking the kernel for its release")
LIBRARIES: Final = Gate("versions", "libraries", "reading the metadata of what is installed")
CUDA: Final = Gate("versions", "CUDA versions", "comparing torch, CuPy, cuda-bindings and the driver")


def versions() -> dict[str, str | None]:
    """Of everything that etha works with; None for what is not there."""
    return {
        "etha": etha.__version__,
        "python": platform.python_version(),
        "kernel": os.uname().release,
        **{name: installed(name) for name in MINIMUM},
        "torch CUDA": torch_cuda(),
        "CuPy": next(filter(None, map(installed, ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy"))), None),
        "cuda-bindings": installed("cuda-bindings"),
        "NVIDIA driver": driver(),
    }


def checks() -> list[Check]:
    """All of them read files only."""
    return [Check(LIBRARIES, _look)]


def installed(distribution: str) -> str | None:
    """Its version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def torch_cuda() -> str | None:
    """The CUDA version that torch was built for; None for one without, or where there is no torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        tree = ast.parse((Path(spec.origin).parent / "version.py").read_text())
    except (OSError, SyntaxError):
        return None
    for node in tree.body:
        target = (
            node.target
            if isinstance(node, ast.AnnAssign)
            else node.targets[0]
            if isinstance(node, ast.Assign)
            else None
        )
        if isinstance(target, ast.Name) and target.id == "cuda" and isinstance(node, ast.AnnAssign | ast.Assign):
            value = node.value
            return str(value.value) if isinstance(value, ast.Constant) and value.value else None
    return None


def driver() -> str | None:
    """The version of NVIDIA's kernel module, as the kernel tells it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match else None


def numbers(version: str) -> tuple[int, ...]:
    """Its leading numbers: ``"2.13.0+cpu"`` is (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _look() -> list[Finding]:
    return [judge_python(sys.version_info[:3]), judge_kernel(os.uname().release), *judge_libraries(versions())]


def judge_python(version: tuple[int, ...]) -> Finding:
    """Of this interpreter."""
    text = ".".join(map(str, version))
    if version < _PYTHON:
        return PYTHON.broken(text, "etha is not written for it", "Use Python 3.11 or newer.")
    return PYTHON.ok(text, "new enough")


def judge_kernel(release: str) -> Finding:
    """Of this kernel."""
    found = numbers(release)[:2]
    if found < _PIDFD_OPEN:
        return KERNEL.broken(
            release, "it has no pidfd: no death can be seen", "Use Linux 5.6 or newer (6.5 for all of it)."
        )
    if found < _PEER_PIDFD:
        return KERNEL.ok(release, "the agent finds a worker's pidfd by its pid (SO_PEERPIDFD came with 6.5)")
    return KERNEL.ok(release, "has all that etha asks for")


def judge_libraries(found: dict[str, str | None]) -> list[Finding]:
    """Of the libraries, and of CUDA's where any is installed."""
    wrong = [
        f"{name} {found[name] or 'is missing'}"
        for name, least in MINIMUM.items()
        if numbers(found[name] or "")[: len(least)] < least or found[name] is None
    ]
    seen = ", ".join(f"{name} {found[name]}" for name in MINIMUM if found[name])
    if wrong:
        needed = " ".join(f"'{name}>={'.'.join(map(str, least))}'" for name, least in MINIMUM.items())
        libraries = LIBRARIES.broken(", ".join(wrong), "etha needs newer ones", f"pip install {needed}")
    else:
        libraries = LIBRARIES.ok(seen, "new enough")
    if any(found[name] for name in ("torch CUDA", "CuPy", "cuda-bindings", "NVIDIA driver")):
        return [libraries, _judge_cuda(found)]
    return [libraries]


def _judge_cuda(found: dict[str, str | None]) -> Finding:
    pairs = {name: found[name] for name in ("torch CUDA", "CuPy", "cuda-bindings", "NVIDIA driver")}
    seen = ", ".join(f"{name} {version or 'none'}" for name, version in pairs.items())
    module = numbers(found["NVIDIA driver"] or "")
    if module and found["torch"] and not found["torch CUDA"]:
        return CUDA.ok(seen, "this torch has no CUDA: its tensors lie in host memory")
    for name in ("torch CUDA", "cuda-bindings"):
        major = numbers(found[name] or "")[:1]
        needed = _DRIVER_FOR_CUDA.get(major[0], 0) if major else 0
        if module and module[0] < needed:
            return CUDA.degraded(
                seen,
                f"{name} {found[name]} needs a driver >= {needed}; host memory needs none",
                f"Install a driver >= {needed}, or a {name.split()[0]} for an older CUDA.",
            )
    return CUDA.ok(seen, "they fit")
