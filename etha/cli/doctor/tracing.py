"""Whether one process of this user may look into another, as the agent looks into a worker: tried on two children.

The agent wants it for its report (who holds which memory), and to fetch descriptors back after a restart. Three gates
stand there: Yama's scope, the worker's dumpable attribute, and any other security module. ``CAP_SYS_PTRACE`` opens all
three. One child authorises the other, which is no relative of it, and then is looked into.

Sources: ptrace(2) ("Ptrace access mode checking"), prctl(2), Documentation/admin-guide/LSM/Yama.rst.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from typing import Final

import msgspec

from etha.cli.doctor import throwaway
from etha.cli.doctor.calls import pidfd_getfd
from etha.cli.doctor.finding import Finding, Gate
from etha.cli.doctor.runner import Check
from etha.cli.doctor.surroundings import fitting
from etha.tensor_bus.ipc import libc, peer, process

_PR_GET_DUMPABLE: Final = 3
_CAP_SYS_PTRACE: Final = 19

DUMPABLE: Final = Gate("gates", "dumpable", "prctl(PR_GET_DUMPABLE), and looking into such a process")
YAMA: Final = Gate("gates", "Yama", "reading kernel.yama.ptrace_scope, and taking a descriptor of an unrelated process")
PTRACE: Final = Gate("gates", "ptrace", "reading the memory map of an unrelated process of this user")

_MEANS: Final = (
    "etha status cannot say where an owner holds its memory, and after a restart the agent waits for an owner's next"
    " call; sharing itself works"
)
_OPEN_MEANS: Final = "the agent can see which memory holds a publication"


class Trial(msgspec.Struct, frozen=True):
    """What one child got of the other; the error's text where it got nothing.

    Attributes:
        maps: reading /proc/PID/maps.
        descriptor: taking a descriptor with pidfd_getfd.
    """

    maps: str | None
    descriptor: str | None


class State(msgspec.Struct, frozen=True):
    """What decides, as the kernel says it.

    Attributes:
        scope: Yama's; None without Yama.
        dumpable: 1 is open.
        capable: whether this process has CAP_SYS_PTRACE.
    """

    scope: int | None
    dumpable: int
    capable: bool


def checks() -> list[Check]:
    """One trial, three gates."""
    return [Check(PTRACE, lambda: judge(_state(), _try()))]


def judge(state: State, trial: Trial) -> list[Finding]:
    """Which gate it was."""
    capability = "with CAP_SYS_PTRACE" if state.capable else "without CAP_SYS_PTRACE"
    return [_dumpable(state, trial, capability), _yama(state, trial, capability), _ptrace(state, trial, capability)]


def _dumpable(state: State, trial: Trial, capability: str) -> Finding:
    if state.dumpable == 1:
        return DUMPABLE.ok("on", _OPEN_MEANS)
    seen = f"off ({state.dumpable}), {capability}"
    if trial.maps is None:
        return DUMPABLE.ok(f"{seen}, which opens it all the same", _OPEN_MEANS)
    remedy = (
        "In the program, after it has changed its user: prctl(PR_SET_DUMPABLE, 1). If it did not switch it off itself,"
        f" Python's binary is not readable: chmod a+r {os.path.realpath(sys.executable)}"
    )
    return DUMPABLE.degraded(f"{seen}: {trial.maps}", _MEANS, remedy)


def _yama(state: State, trial: Trial, capability: str) -> Finding:
    if state.scope is None:
        return YAMA.ok("the kernel has no Yama", "no authorisation is needed")
    seen = f"ptrace_scope is {state.scope}, {capability}"
    if state.scope < 2 or trial.descriptor is None:
        return YAMA.ok(seen, "bootstrap_client() authorises the agent, and no one else")
    remedy = (
        "Scope 3 lasts until the next boot; set kernel.yama.ptrace_scope = 1 in /etc/sysctl.d/ and reboot."
        if state.scope == 3
        else fitting(
            "sudo sysctl kernel.yama.ptrace_scope=1",
            docker="docker run --cap-add SYS_PTRACE, or on the host: sudo sysctl kernel.yama.ptrace_scope=1",
        )
    )
    return YAMA.degraded(f"{seen}: {trial.descriptor or 'no process may be traced'}", _MEANS, remedy)


def _ptrace(state: State, trial: Trial, capability: str) -> Finding:
    if trial.maps is None:
        return PTRACE.ok(f"permitted, {capability}", _OPEN_MEANS)
    if state.dumpable != 1:
        return PTRACE.ok(f"{trial.maps}, {capability}: see dumpable", "as there")
    return PTRACE.degraded(
        f"{trial.maps}, {capability}: a security module, or /proc is mounted with hidepid",
        _MEANS,
        fitting(
            "Allow ptrace read between processes of one user in AppArmor or SELinux; mount /proc with hidepid=0.",
            docker="docker run --cap-add SYS_PTRACE",
            kubernetes="securityContext: {capabilities: {add: [SYS_PTRACE]}}",
        ),
    )


def _state() -> State:
    capable = process.permitted_capabilities(os.getpid()) >> _CAP_SYS_PTRACE & 1
    return State(peer.yama_scope(), libc.prctl(_PR_GET_DUMPABLE, 0), bool(capable))


def _try() -> Trial:
    to_tracer, answers = os.pipe(), os.pipe()
    tracer = throwaway.fork(lambda: _trace(to_tracer[0], answers[1]))
    os.close(answers[1])  # so that the tracer's death, by a filter that kills, is its end of file
    owner = throwaway.fork(lambda: _be_looked_at(tracer, to_tracer))
    try:
        with open(answers[0], "rb") as file:
            told = [msgspec.json.decode(line, type=str | None) for line in file]
        return Trial(*(*told, *("the process that tried it died",) * 2)[:2])
    finally:
        for pid in (owner, tracer):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _be_looked_at(tracer: int, to_tracer: tuple[int, int]) -> None:
    peer.authorise_tracer(tracer)
    os.write(to_tracer[1], msgspec.json.encode((os.getpid(), to_tracer[0])))
    select.poll().poll()  # until it is killed


def _trace(asked: int, answer: int) -> None:
    pid, number = msgspec.json.decode(os.read(asked, 1 << 12), type=tuple[int, int])
    os.write(answer, msgspec.json.encode(_refused_maps(pid)) + b"\n")
    os.write(answer, msgspec.json.encode(_refused_descriptor(pid, number)) + b"\n")


def _refused_maps(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            file.read(1)
    except OSError as error:
        return f"{error.strerror} on /proc/PID/maps"
    return None


def _refused_descriptor(pid: int, number: int) -> str | None:
    try:
        pidfd = os.pidfd_open(pid)
        os.close(pidfd_getfd(pidfd, number))
    except OSError as error:
        return f"{error.strerror} from pidfd_getfd"
    return None
