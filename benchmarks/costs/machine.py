"""What a run ran on. Whoever compares two files needs it."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import lmdb
import msgspec

from etha import __version__


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Machine, versions and moment of a run; sizes in bytes, load as in ``uptime``."""

    date: str
    commit: str
    cpu: str
    cores: int
    memory: int
    kernel: str
    huge_pages: str
    python: str
    torch: str
    lmdb: str
    py_lmdb: str
    msgspec: str
    etha: str
    load_before: tuple[float, float, float]


def machine() -> Machine:
    """Of this process, now."""
    return Machine(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        cpu=_field("/proc/cpuinfo", "model name"),
        cores=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release(),
        huge_pages=_text("/sys/kernel/mm/transparent_hugepage/enabled"),
        python=platform.python_version(),
        torch=version("torch"),
        lmdb=".".join(map(str, lmdb.version())),
        py_lmdb=version("lmdb"),
        msgspec=version("msgspec"),
        etha=__version__,
        load_before=os.getloadavg(),
    )


def _commit() -> str:
    """The commit that is checked out; ``+`` when files differ from it, empty outside of a clone."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        ran = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        return ran.stdout.strip() if ran.returncode == 0 else ""

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except FileNotFoundError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _field(path: str, name: str) -> str:
    lines = (line.partition(":") for line in _text(path).splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), platform.machine())
