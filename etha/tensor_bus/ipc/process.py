"""What /proc says about a process, for people and for identity: label, state, start time, boot, PID namespace.

Only `open_files` needs leave to look into the process. Everything that a process chose itself (its name, its
arguments) is a label: shown, stripped of what a terminal would act on, and never compared.

Who has no descriptor left to look by gets `SystemLimit`.

Sources: proc_pid_stat(5), proc_pid_cmdline(5), pid_namespaces(7).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from etha.tensor_bus.ipc import libc

_LABEL_LENGTH: Final = 64
_PYTHON_OPTIONS_WITH_VALUE: Final = frozenset({"-W", "-X", "--check-hash-based-pycs"})

_STATES: Final = {"T": "stopped", "t": "stopped", "Z": "zombie", "X": "dead", "x": "dead"}


def process_state(pid: int) -> str:
    """One of ``"running"`` (or sleeping), ``"stopped"``, ``"zombie"`` and ``"dead"`` (also: hidden from us)."""
    fields = _stat_fields(pid)
    return "dead" if fields is None else _STATES.get(fields[0], "running")


def start_time(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 if it is gone or hidden. With the pid, its identity."""
    fields = _stat_fields(pid)
    return 0 if fields is None else int(fields[19])


def process_uids(pid: int) -> tuple[int, ...]:
    """Its real, effective, saved and file-system uid; empty if it is gone or hidden."""
    return tuple(map(int, _status_line(pid, "Uid:").split()))


def process_gids(pid: int) -> tuple[int, ...]:
    """Its real, effective, saved and file-system gid; empty if it is gone or hidden."""
    return tuple(map(int, _status_line(pid, "Gid:").split()))


def permitted_capabilities(pid: int) -> int:
    """The set of capabilities it may use, a bit mask (capabilities(7)); 0 if it is gone or hidden."""
    return int(_status_line(pid, "CapPrm:") or "0", 16)


def process_command(pid: int) -> str:
    """What the process runs: a script's or module's name for Python, else the program's; ``"?"`` if it is gone."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        text = _command(list(map(os.fsdecode, arguments))) or Path(f"/proc/{pid}/comm").read_text(errors="replace")
    except OSError:
        return "?"
    shown = "".join(letter if letter.isprintable() else "?" for letter in text.strip())
    return shown[:_LABEL_LENGTH] or "?"


def process_label(pid: int) -> str:
    """How etha names a process to people: ``"pid 4122 (live_eval.py)"``."""
    return f"pid {pid} ({process_command(pid)})"


def boot_id() -> str:
    """The kernel's id of this boot, a UUID."""
    return proc_text("/proc/sys/kernel/random/boot_id").strip()


def pid_namespace() -> int:
    """Inode of this process's PID namespace: pids mean the same to two processes only if theirs are equal."""
    return os.stat("/proc/self/ns/pid").st_ino


def open_files(pid: int) -> list[tuple[int, tuple[int, int]]]:
    """Its open descriptors, each with the device and inode of its file. Needs the right to read it (ptrace(2)).

    Raises:
        OSError: it is gone, hidden, or the kernel forbids the look.
    """
    directory = f"/proc/{pid}/fd"
    found: list[tuple[int, tuple[int, int]]] = []
    for number in os.listdir(directory):
        try:
            status = os.stat(f"{directory}/{number}")
        except FileNotFoundError:
            continue  # closed between listing and looking
        found.append((int(number), (status.st_dev, status.st_ino)))
    return found


def proc_text(path: str) -> str:
    """What a file of /proc says.

    Raises:
        SystemLimit: no descriptor is left to read it by.
        OSError: it is gone, or hidden.
    """
    try:
        return Path(path).read_text(errors="replace")
    except OSError as error:
        limit = libc.system_limit(error, f"reading {path}")
        if limit is None:
            raise
        raise limit from error


def _stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third (state) on; None if there is no such file."""
    try:
        text = proc_text(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The second field is the command in parentheses, which may itself contain both.
    return text[text.rindex(")") + 2 :].split()


def _status_line(pid: int, key: str) -> str:
    try:
        lines = proc_text(f"/proc/{pid}/status").splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""
    return next((line.removeprefix(key).strip() for line in lines if line.startswith(key)), "")


def _command(arguments: list[str]) -> str:
    program = os.path.basename(arguments[0])
    if not program.startswith("python"):
        return program
    rest = iter(arguments[1:])
    for argument in rest:
        if argument == "-m":
            return next(rest, program)
        if argument == "-c":
            return f"{program} -c"
        if argument in _PYTHON_OPTIONS_WITH_VALUE:
            next(rest, None)
        elif not argument.startswith("-"):
            return os.path.basename(argument)
    return program
