"""`etha.tensor_bus.ipc.peer`: who is at the other end, whether it lives, what of it may be seen."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ipc_helpers import child_with_socket, in_fork, shared

from etha.errors import InvalidArgument, OtherNamespace, SystemLimit
from etha.tensor_bus.ipc import peer as peer_module
from etha.tensor_bus.ipc.allocations import HostAllocation
from etha.tensor_bus.ipc.host import export, open_allocation
from etha.tensor_bus.ipc.manifest import Manifest
from etha.tensor_bus.ipc.observation import Observation
from etha.tensor_bus.ipc.peer import (
    Peer,
    authorise_tracer,
    boot_id,
    observe,
    pid_namespace,
    process_command,
    process_label,
    process_state,
    start_time,
    yama_scope,
)
from etha.tensor_bus.ipc.process import open_files, process_uids

WAIT = "sock.send(str(os.getpid()).encode())\nsock.recv(1)\n"
NOBODY = 65534
PR_SET_DUMPABLE = 4

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


@pytest.fixture
def child(tmp_path):
    """A living process and our end of its socket."""
    with child_with_socket(WAIT, tmp_path) as (process, sock):
        assert int(sock.recv(20)) == process.pid
        yield process, sock


def die(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


# -- who ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [77, 9999], ids=["SO_PEERPIDFD", "pidfd_open"])
def test_knows_the_process_from_birth_to_death(child, option, monkeypatch):
    monkeypatch.setattr(peer_module, "_SO_PEERPIDFD", option)
    process, sock = child
    peer = Peer.of(sock)
    assert (peer.pid, peer.uid, peer.gid) == (process.pid, os.getuid(), os.getgid())
    assert peer.started == start_time(process.pid) > start_time(os.getpid())
    assert peer.label == process_label(process.pid) == f"pid {process.pid} (the_child.py)"
    assert f"Pid:\t{process.pid}\n" in Path(f"/proc/self/fdinfo/{peer.fileno()}").read_text()
    assert not os.get_inheritable(peer.fileno())
    assert (peer.alive(), peer.state()) == (True, "running")
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    assert (peer.alive(), peer.state()) == (True, "stopped")
    die(process.pid)
    poll = select.poll()
    poll.register(peer, select.POLLIN)
    assert poll.poll(0)
    assert (peer.alive(), peer.state()) == (False, "zombie")
    process.wait()
    assert (peer.alive(), peer.state()) == (False, "dead")
    number = peer.fileno()
    peer.close()
    peer.close()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(number)
    with pytest.raises(ValueError, match="closed"):
        peer.fileno()
    with pytest.raises(ValueError, match="closed"):
        peer.alive()


@pytest.mark.parametrize("reaped", [False, True])
def test_a_peer_that_died_before_is_dead_or_not_there(child, reaped):
    process, sock = child
    die(process.pid)
    if reaped:
        process.wait()
    try:
        peer = Peer.of(sock)
    except ProcessLookupError:
        return
    # Since Linux 6.16 there are pidfds of the reaped.
    assert not peer.alive()
    assert peer.state() == ("dead" if reaped else "zombie")
    peer.close()


def test_without_the_socket_option_a_dead_peer_is_not_there(child, monkeypatch):
    monkeypatch.setattr(peer_module, "_SO_PEERPIDFD", 9999)
    process, sock = child
    die(process.pid)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ProcessLookupError):
        Peer.of(sock)
    process.wait()
    with pytest.raises(ProcessLookupError):
        Peer.of(sock)
    assert os.listdir("/proc/self/fd") == before


def test_the_state_is_never_that_of_another_process(child):
    process, sock = child
    peer = Peer.of(sock)
    die(process.pid)
    process.wait()
    peer.pid = os.getpid()
    assert peer.state() == "dead"
    peer.close()


@as_root
def test_tells_another_user(tmp_path):
    code = f"os.setgid({NOBODY}); os.setuid({NOBODY})\n"
    prelude_after = "sock.close()\nsock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("\0etha-test-" + tmp_path.name + str(os.getpid()))
        listener.listen()
        code += prelude_after + f"sock.connect({listener.getsockname()!r})\n" + WAIT
        with child_with_socket(code, tmp_path) as (process, _):
            sock, _ = listener.accept()
            with sock:
                peer = Peer.of(sock)
                assert (peer.pid, peer.uid, peer.gid) == (process.pid, NOBODY, NOBODY)
                assert process_uids(process.pid) == (NOBODY,) * 4
                assert peer.label == f"pid {process.pid} (the_child.py)"
                peer.close()


def test_of_a_pair_it_is_who_made_it():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        peer = Peer.of(ours)
        assert (peer.pid, peer.state()) == (os.getpid(), "running")
        peer.close()


def test_dropped_it_leaves_no_descriptor(child):
    _, sock = child
    before = os.listdir("/proc/self/fd")
    peer = Peer.of(sock)
    assert os.listdir("/proc/self/fd") != before
    del peer
    gc.collect()
    assert os.listdir("/proc/self/fd") == before


def test_no_peer_of_another_kind_of_socket():
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock, pytest.raises((OSError, OtherNamespace)):
        Peer.of(sock)


def test_says_when_descriptors_ran_out(child):
    _, sock = child

    def body():
        try:
            while True:
                os.dup(0)
        except OSError:
            pass
        try:
            Peer.of(sock)
        except SystemLimit as error:
            return error.resource
        return None

    assert in_fork(body) == repr("RLIMIT_NOFILE")


def in_another_namespace():
    command = ["unshare", "--pid", "--fork", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not in_another_namespace(), reason="may not make a PID namespace")
def test_refuses_a_peer_whose_pid_means_nothing_here(tmp_path):
    path = str(tmp_path / "sock")
    code = """
import socket, sys
from etha.errors import OtherNamespace
from etha.tensor_bus.ipc.peer import Peer, pid_namespace
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
try:
    Peer.of(sock)
except OtherNamespace as error:
    print(pid_namespace(), bool(error.remedy))
sock.close()
"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        command = ["unshare", "--pid", "--fork", sys.executable, "-W", "error", "-c", code, path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    namespace, remedy = done.stdout.split()
    assert int(namespace) != pid_namespace()
    assert remedy == "True"


# -- what it is called -------------------------------------------------------------------------------------------


PYTHON = sys.executable
NAMES = {
    "script": (["python", "live_eval.py", "--fast"], PYTHON, "live_eval.py"),
    "options": (["/usr/bin/python3.11", "-u", "-X", "dev", "-W", "error", "./run me.py"], PYTHON, "run me.py"),
    "module": (["python3", "-m", "a_module", "--rank", "0"], PYTHON, "a_module"),
    "code": (["python3", "-c", "print(input(), flush=True); input()"], PYTHON, "python3 -c"),
    "nothing": (["python3", "-i", "-q", "-u"], PYTHON, "python3"),
    "program": (["/bin/cat"], None, "cat"),
    "escapes": (["evil\x1b[31m\nx"], "/bin/cat", "evil?[31m?x"),
    "not text": (["\udcff\udc80x"], "/bin/cat", "??x"),
    "long": (["x" * 100], "/bin/cat", "x" * 64),
    "no name": ([""], "/bin/cat", "cat"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_the_label_says_what_runs(kind, tmp_path):
    arguments, executable, expected = NAMES[kind]
    for name in ("live_eval.py", "run me.py", "a_module.py"):
        (tmp_path / name).write_text("print(input(), flush=True); input()")
    process = subprocess.Popen(
        arguments,
        executable=executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    try:
        # Until it answers, exec() may not have put its arguments in place.
        process.stdin.write(b"4122\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"4122\n"
        assert process_command(process.pid) == expected
        assert process_label(process.pid) == f"pid {process.pid} ({expected})"
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    assert process_label(process.pid) == f"pid {process.pid} (?)"


def test_state_and_start_of_nobody(child):
    process, _ = child
    process.kill()
    process.wait()
    assert (process_state(process.pid), start_time(process.pid), process_uids(process.pid)) == ("dead", 0, ())
    with pytest.raises(OSError, match=str(process.pid)):
        open_files(process.pid)


def test_a_name_with_parentheses_and_spaces_hides_no_field(tmp_path):
    name = ") Z 1 (x"
    link = tmp_path / name
    link.symlink_to("/bin/cat")
    process = subprocess.Popen([str(link)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdin.write(b"4122\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"4122\n"
        assert Path(f"/proc/{process.pid}/comm").read_text() == name + "\n"
        assert process_state(process.pid) == "running"
        assert start_time(process.pid) >= start_time(os.getpid())
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_boot_and_namespace_are_the_kernels():
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", boot_id())
    assert os.readlink("/proc/self/ns/pid") == f"pid:[{pid_namespace()}]"


# -- what may be seen --------------------------------------------------------------------------------------------


@pytest.fixture
def published():
    """Two tensors in two allocations, and this process as the peer that has them."""
    tensors = {"a": shared(3), "b": shared(4), "part": shared(5)[1:]}
    exported = export(tensors)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer = Peer.of(ours)
    yield peer, exported
    peer.close()
    ours.close()
    theirs.close()
    exported.close_fds()


def test_shows_which_memory_holds_a_publication(published):
    peer, exported = published
    seen = observe(peer, exported.manifest)
    assert seen.gate is None
    for row, fd in enumerate(exported.fds):
        (region,) = seen.mappings[row]
        address = exported._storages[row].data_ptr()
        assert region == (address, address + os.sysconf("SC_PAGESIZE"))
        assert seen.descriptors[row] == (fd.fileno(),)
    other = Manifest((*exported.manifest.allocations, HostAllocation(1, 1, 1)), (), (), {})
    assert observe(peer, other).mappings[-1] == ()
    assert observe(peer, other).descriptors[-1] == ()


def test_shows_a_second_mapping_and_descriptor(published):
    peer, exported = published
    copy = os.dup(exported.fds[1].fileno())
    (allocation, *_) = exported.manifest.allocations[1:]
    mapping = open_allocation(copy, allocation)
    seen = observe(peer, exported.manifest)
    assert len(seen.mappings[1]) == 2
    assert seen.descriptors[1] == tuple(sorted((copy, exported.fds[1].fileno())))
    mapping.close()
    os.close(copy)
    assert len(observe(peer, exported.manifest).mappings[1]) == 1


def forbidden(count, gate):
    return Observation(((),) * count, ((),) * count, gate)


def test_the_dead_show_nothing(child, published):
    process, sock = child
    peer = Peer.of(sock)
    manifest = published[1].manifest
    assert observe(peer, manifest) == Observation(((), (), ()), ((), (), ()), None)
    die(process.pid)
    assert observe(peer, manifest) == forbidden(3, "dead")
    process.wait()
    assert observe(peer, manifest) == forbidden(3, "dead")
    peer.close()


def become(uid, *, dumpable):
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, int(dumpable), 0, 0, 0)


def gate_of(peer, manifest):
    return observe(peer, manifest).gate


@as_root
def test_names_the_gate_of_another_user(published):
    peer, exported = published

    def body():
        become(NOBODY, dumpable=True)
        return gate_of(peer, exported.manifest)

    assert in_fork(body) == repr("uid")


@as_root
@pytest.mark.parametrize(
    ("dumpable", "gid", "gate"), [(True, NOBODY, None), (False, NOBODY, "dumpable"), (True, 1, "gid")]
)
def test_names_the_gate_of_ones_own_user(tmp_path, published, dumpable, gid, gate):
    code = (
        f"import ctypes; os.setgroups([]); os.setgid({gid}); os.setuid({NOBODY})\n"
        f"ctypes.CDLL(None).prctl({PR_SET_DUMPABLE}, {int(dumpable)}, 0, 0, 0)\n"
    )
    manifest = published[1].manifest
    with child_with_socket(code + WAIT, tmp_path) as (process, sock):
        assert int(sock.recv(20)) == process.pid
        peer = Peer.of(sock)

        def body():
            become(NOBODY, dumpable=True)
            return gate_of(peer, manifest)

        assert in_fork(body) == repr(gate)
        assert gate_of(peer, manifest) is None
        peer.close()


@as_root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_names_the_gate_of_capabilities(tmp_path):
    code = """
import socket, sys
from etha.tensor_bus.ipc.manifest import Manifest
from etha.tensor_bus.ipc.peer import Peer, observe
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
print(observe(Peer.of(sock), Manifest((), (), (), {})).gate)
"""
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", code, path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("capabilities\n", "")


def can_hide():
    command = ["unshare", "--mount", "mount", "-t", "proc", "-o", "hidepid=2", "proc", "/proc"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@as_root
@pytest.mark.skipif(not can_hide(), reason="may not mount /proc")
def test_names_the_gate_of_a_hiding_proc(tmp_path):
    code = f"""
import os, socket, sys
from etha.tensor_bus.ipc.manifest import Manifest
from etha.tensor_bus.ipc.peer import Peer, observe
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
peer = Peer.of(sock)
print(observe(peer, Manifest((), (), (), {{}})).gate, peer.alive(), peer.started, peer.command)
"""
    path = str(tmp_path / "sock")
    shell = 'mount -t proc -o hidepid=2 proc /proc && exec "$@"'
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        command = ["unshare", "--mount", "sh", "-c", shell, "sh", sys.executable, "-c", code, path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("hidepid True 0 ?\n", "")


# -- who may trace us --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pid", [None, 0, os.getpid()])
def test_authorises_where_yama_is_in_the_kernel(pid):
    assert in_fork(lambda: authorise_tracer(pid)) == repr(yama_scope() is not None)


def test_no_tracer_below_zero():
    with pytest.raises(InvalidArgument):
        authorise_tracer(-1)


def test_with_yama_a_tracer_must_exist(tmp_path, monkeypatch):
    scope = tmp_path / "ptrace_scope"
    scope.write_text("1\n")
    monkeypatch.setattr(peer_module, "_YAMA_SCOPE", scope)
    assert yama_scope() == 1
    with pytest.raises(ProcessLookupError):
        authorise_tracer(2**22 + 1)


def test_without_yama_there_is_no_scope(tmp_path, monkeypatch):
    monkeypatch.setattr(peer_module, "_YAMA_SCOPE", tmp_path / "absent")
    assert yama_scope() is None


def test_asks_the_kernel_for_the_tracer_it_was_given(monkeypatch):
    asked = []
    monkeypatch.setattr(peer_module.libc, "prctl", lambda option, argument: asked.append((option, argument)) or 0)
    assert [authorise_tracer(pid) for pid in (None, 0, 4122)] == [True, True, True]
    assert asked == [(0x59616D61, 2**64 - 1), (0x59616D61, 0), (0x59616D61, 4122)]
