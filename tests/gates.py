"""Gates, shut for real, and ``etha doctor`` run behind them: as another user, in namespaces, under limits and filters.

A `Behind` is a way to start a program: a command that is put in front of it, Python that runs in it first, variables.
"""

from __future__ import annotations

import _ctypes
import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from requiring import require

NOBODY = 65534
PATIENCE = 60.0

WHOLE = "from etha.cli import main; main()"
"""``etha doctor``, whose arguments follow."""

GATES = """
import sys, msgspec
from etha.cli.doctor import examination, finding, runner
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
rank = int(options["--rank"]) if "--rank" in options else None
device = options.get("--device", "auto")
findings = finding.in_order(runner.run(examination.gates(rank, device)))
report = {"findings": findings, "headline": finding.headline(findings), "verdict": findings[0].verdict}
sys.stdout.buffer.write(msgspec.json.encode(report))
sys.exit(finding.EXIT_STATUS[findings[0].verdict])
"""
"""The same without the two processes that import torch: a second instead of several."""

NOT_DUMPABLE = "import ctypes; ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)\n"
DUMPABLE = "import ctypes; ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)\n"

AS_NOBODY = f"""
import os, encodings.idna, msgspec
from etha.cli.doctor import examination
from etha.tensor_bus.agent import TensorBusAgent
examination.versions.versions()
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
{DUMPABLE}
"""
"""Everything is loaded before: nobody may have no access to the Python that runs this. Whoever changes its user is not
dumpable any more (prctl(2)); a program that was started as nobody would be."""

NO_TORCH_HERE = """
import atexit, os, sys
here = os.getpid()
heavy = lambda: {"torch", "cupy", "cuda"} & sys.modules.keys()
atexit.register(lambda: os.getpid() == here and heavy() and sys.stderr.write(f"loaded: {heavy()}"))
"""
"""Says on stderr, which must be empty, if the process itself and not a child has loaded them."""

OUTSIDE_OF_DOCKER = "from etha.cli.doctor import surroundings; surroundings._BY_FILE.clear()\n"
"""Remedies are then for a plain box, where a test can apply them."""

_FILTER = """
import ctypes, struct
_libc = ctypes.CDLL(None, use_errno=True)
_code = [(0x20, 0, 0, 0), (0x15, 0, 1, {number}), (0x06, 0, 0, {action}), (0x06, 0, 0, 0x7FFF0000)]
_program = b"".join(struct.pack("HBBI", *line) for line in _code)
_buffer = ctypes.create_string_buffer(_program)
class _Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
_whole = _Program(len(_code), ctypes.addressof(_buffer))
if _libc.prctl(38, 1, 0, 0, 0) or _libc.prctl(22, 2, ctypes.byref(_whole), 0, 0):
    raise OSError(ctypes.get_errno(), "seccomp")
"""
"""Load the call's number; is it the one? then the action; else allow (seccomp(2), bpf)."""

ERRNO_EPERM = 0x00050001
KILL_PROCESS = 0x80000000
PIDFD_OPEN, PIDFD_GETFD = 434, 438


_LAUNCHED = ("AGENT_RANK", "RANK", "LOCAL_RANK", "AGENT_RANK_OFFSET", "CUDA_VISIBLE_DEVICES")
"""Not there where nothing was launched, unless a test says so."""


def filtered(number: int, action: int = ERRNO_EPERM) -> str:
    """Python that installs a seccomp filter against one system call."""
    return _FILTER.format(number=number, action=action)


@dataclass(frozen=True)
class Behind:
    """How to start a program behind a gate."""

    wrap: tuple[str, ...] = ()
    first: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def doctor(self, *arguments: str, program: str = GATES) -> Report:
        """Run it, and what it reports."""
        command = [*self.wrap, sys.executable, "-W", "error", "-c", self.first + program, *arguments]
        done = subprocess.run(
            command if program is GATES else [*command[: -len(arguments) or None], "doctor", "--json", *arguments],
            env={name: value for name, value in os.environ.items() if name not in _LAUNCHED} | self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        require(done.stderr == "", f"on stderr: {done.stderr}")
        return Report(json.loads(done.stdout), done.returncode)


class Report:
    """What ``etha doctor --json`` said, and its exit status."""

    def __init__(self, said: dict, status: int) -> None:
        self.said = said
        self.status = status
        self.findings = said["findings"]

    @property
    def first(self) -> dict:
        """What is named first."""
        return self.findings[0]

    def named(self, name: str) -> dict:
        """The finding of this name."""
        (found,) = [finding for finding in self.findings if finding["name"] == name]
        return found

    @property
    def problems(self) -> list[str]:
        return [finding["name"] for finding in self.findings if finding["verdict"] != "ok"]


def shell(*lines: str) -> tuple[str, ...]:
    """A wrap that runs lines of shell first. ``sudo`` is left out of them: the tests are root where it is needed."""
    script = "\n".join(line.replace("sudo ", "") for line in lines)
    return ("sh", "-e", "-c", f'{script}\nexec "$@"', "sh")


def pasted_by_nobody(line: str) -> dict[str, str]:
    """Run a line of shell as nobody, and the variables that it exported for etha."""
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    script = f"{line} && env | grep ^ETHA_"
    done = subprocess.run([*become, "sh", "-e", "-c", script], capture_output=True, text=True, check=True)
    return dict(each.split("=", 1) for each in done.stdout.splitlines())


def private_mounts(*lines: str) -> tuple[str, ...]:
    """A wrap that runs lines of shell in a mount namespace of its own."""
    return ("unshare", "--mount", *shell(*lines))


def without_shm(directory: Path, *lines: str) -> str:
    """Shell that puts a /dev without /dev/shm over the real one, in a mount namespace; lines run where it is made."""
    nodes = {"null": "1 3", "zero": "1 5", "full": "1 7", "random": "1 8", "urandom": "1 9", "tty": "5 0"}
    return "\n".join(
        [
            f"mount -t tmpfs -o mode=755 dev {directory}",
            *(f"mknod -m 666 {directory}/{name} c {numbers}" for name, numbers in nodes.items()),
            *(f"(cd {directory} && {line})" for line in lines),
            f"mount --move {directory} /dev",
        ]
    )


SMI = """#!/bin/sh
[ "$2" = "--format=csv,noheader" ] || exit 9
echo "0, GPU-8f3a1c52-0000-4000-8000-000000000000, NVIDIA H100 80GB HBM3, Default, Disabled"
echo "1, GPU-1d2e3f40-0000-4000-8000-000000000001, NVIDIA H100 80GB HBM3, Default, Disabled"
"""
"""nvidia-smi, as it answers to the query."""


def with_gpus(directory: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """A wrap and variables that show two GPUs which nobody can use: device files, a library, and what lists them.

    It stands for a driver as far as doctor looks: at what is there. No call of CUDA's is made.
    """
    (directory / "dev").mkdir(exist_ok=True)
    (directory / "nvidia-smi").write_text(SMI)
    (directory / "nvidia-smi").chmod(0o755)
    shutil.copy(_ctypes.__file__, directory / "libcuda.so.1")
    devices = ("nvidia0 c 195 0", "nvidia1 c 195 1", "nvidiactl c 195 255", "nvidia-uvm c 235 0")
    shm = "mkdir shm && mount -t tmpfs -o mode=1777,size=64G shm shm"
    wrap = private_mounts(without_shm(directory / "dev", shm, *(f"mknod -m 666 {device}" for device in devices)))
    return wrap, {"PATH": f"{directory}:{os.environ['PATH']}", "LD_LIBRARY_PATH": str(directory)}


@functools.cache
def _works(*command: str) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


def may_raise_limits() -> bool:
    """Whether this box lets its root do it (CAP_SYS_RESOURCE); where not, one can only start without the low limit."""
    return _works("sh", "-e", "-c", "prlimit --pid $$ --nofile=64:64; prlimit --pid $$ --nofile=65536:65536")


needs_setpriv = pytest.mark.skipif(
    not _works("setpriv", f"--reuid={NOBODY}", "--clear-groups", "true"), reason="cannot become nobody with setpriv(1)"
)
needs_mounts = pytest.mark.skipif(
    not _works("unshare", "--mount", "mount", "-t", "tmpfs", "t", "/mnt"),
    reason="cannot mount in a namespace of its own",
)
needs_pid_namespace = pytest.mark.skipif(
    not _works("unshare", "--pid", "--fork", "--mount-proc", "true"), reason="no PID namespaces of one's own"
)
needs_prlimit = pytest.mark.skipif(not _works("prlimit"), reason="no prlimit(1)")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away, or raises hard limits")
