"""`etha.tensor_bus.paths`: where an agent's files are, and which are trusted."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from etha.errors import InvalidArgument, UnsafePath
from etha.tensor_bus.paths import (
    agent_paths,
    agents_by_convention,
    default_paths,
    require_private,
    require_trusted_directory,
    runtime_directory,
)

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")


def test_the_convention(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ETHA_RUNTIME_DIR", raising=False)
    assert default_paths(3) == ("/tmp/agent_rank3_command.lmdb", "/tmp/agent_rank3_state.lmdb")
    monkeypatch.setenv("ETHA_RUNTIME_DIR", "")
    assert runtime_directory() == "/tmp"
    monkeypatch.setenv("ETHA_RUNTIME_DIR", "/run/mine")
    assert default_paths(0) == ("/run/mine/agent_rank0_command.lmdb", "/run/mine/agent_rank0_state.lmdb")


def test_every_file_stands_beside_the_queue(runtime: Path):
    paths = agent_paths(7)
    assert {paths.command, paths.state, paths.socket, paths.lock, paths.writer} == {
        str(runtime / f"agent_rank7_{name}")
        for name in (
            "command.lmdb",
            "state.lmdb",
            "command.lmdb.sock",
            "command.lmdb.agent",
            "command.lmdb.writer",
        )
    }
    assert paths.lock not in paths.removable
    assert {*paths.removable, paths.lock} >= {*paths, paths.socket, paths.writer}


def test_given_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    paths = agent_paths(0, "q", "s")
    assert paths == (str(tmp_path / "q"), str(tmp_path / "s"))


def test_the_longest_socket_path_is_the_kernels(runtime: Path):
    room = 107 - len(str(runtime)) - len("/.sock")
    longest = agent_paths(0, str(runtime / ("q" * room)))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(longest.socket)
    with pytest.raises(InvalidArgument) as caught:
        agent_paths(0, str(runtime / ("q" * (room + 1))))
    assert caught.value.resource == longest.command + "q.sock"
    with pytest.raises(InvalidArgument):
        agent_paths(0, str(runtime / ("ü" * (room // 2 + 1))))


def test_a_path_that_no_record_can_hold_is_refused(runtime: Path):
    for command, state in (("q\udcff", None), (None, "s\udcff")):
        with pytest.raises(InvalidArgument):
            agent_paths(0, command and str(runtime / command), state and str(runtime / state))


def test_agents_are_found_by_the_convention(runtime: Path, monkeypatch: pytest.MonkeyPatch):
    for rank in (10, 2, 0):
        (runtime / f"agent_rank{rank}_state.lmdb").touch()
    for other in ("agent_rank1_command.lmdb", "agent_rank_state.lmdb", "agent_rank3_state.lmdb-lock", "x"):
        (runtime / other).touch()
    assert [rank for rank, _ in agents_by_convention()] == [0, 2, 10]
    monkeypatch.setenv("ETHA_RUNTIME_DIR", str(runtime / "nowhere"))
    assert agents_by_convention() == []


# -- trust -------------------------------------------------------------------------------------------------------


def make(path: Path, kind: str) -> None:
    """Something at ``path`` that is not to be trusted."""
    target = path.parent / "target"
    target.write_text("precious")
    if kind == "link":
        path.symlink_to(target)
    elif kind == "dangling link":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind == "directory":
        path.mkdir(0o700)
    else:
        path.write_text("precious")
        if kind == "foreign":
            os.chown(path, NOBODY, NOBODY)
        else:
            path.chmod({"group-writable": 0o620, "writable by all": 0o602}[kind])


UNTRUSTED = [
    "link",
    "dangling link",
    "fifo",
    "directory",
    pytest.param("foreign", marks=as_root),
    "group-writable",
    "writable by all",
]


@pytest.mark.parametrize("kind", UNTRUSTED)
def test_a_file_that_others_could_have_planted_is_refused(tmp_path: Path, kind: str):
    path = tmp_path / "file"
    make(path, kind)
    with pytest.raises(UnsafePath) as caught:
        require_private(str(path))
    assert caught.value.resource == str(path)
    assert caught.value.holder == f"uid {os.lstat(path).st_uid}"


def test_a_file_or_socket_of_ours_is_taken(tmp_path: Path):
    path = tmp_path / "file"
    assert require_private(str(path)) is None
    path.touch(0o644)
    found = require_private(str(path))
    assert found is not None
    assert found.st_ino == path.stat().st_ino
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "sock"))
        os.chmod(tmp_path / "sock", 0o600)
        assert require_private(str(tmp_path / "sock")) is not None


@pytest.mark.parametrize(
    ("mode", "owner", "trusted"),
    [
        (0o700, 0, True),
        (0o755, 0, True),
        (0o1777, 0, True),
        (0o777, 0, False),
        (0o770, 0, False),
        (0o702, 0, False),
        pytest.param(0o700, NOBODY, False, marks=as_root),
        pytest.param(0o1777, NOBODY, False, marks=as_root),
    ],
)
def test_a_directory_is_trusted_if_only_we_can_change_our_files(tmp_path: Path, mode: int, owner: int, trusted: bool):
    directory = tmp_path / "directory"
    directory.mkdir()
    directory.chmod(mode)
    if owner:
        os.chown(directory, owner, owner)
    if trusted:
        require_trusted_directory(str(directory / "file"))
        return
    with pytest.raises(UnsafePath) as caught:
        require_trusted_directory(str(directory / "file"))
    assert caught.value.resource == str(directory)


def test_a_directory_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    for directory in ("nowhere", "file", "file/below"):
        with pytest.raises(UnsafePath):
            require_trusted_directory(str(tmp_path / directory / "x"))


@as_root
def test_a_link_of_another_user_is_no_directory(tmp_path: Path):
    """Whoever owns the link decides where it leads to tomorrow."""
    (tmp_path / "mine").mkdir(0o700)
    link = tmp_path / "link"
    link.symlink_to("mine")
    require_trusted_directory(str(link / "x"))
    os.lchown(link, NOBODY, NOBODY)
    with pytest.raises(UnsafePath) as caught:
        require_trusted_directory(str(link / "x"))
    assert caught.value.holder == f"uid {NOBODY}"
