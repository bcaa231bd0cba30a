"""`etha.tensor_bus.ipc.devices`: one device, one identity, whatever a process calls it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from etha.errors import DriverError, InvalidArgument
from etha.tensor_bus.ipc import devices

FIRST, OTHER = b"the first device", b"the other device"


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "visible", lambda: (OTHER, FIRST))


def test_the_host_is_the_host():
    assert devices.identity_of("cpu") == devices.name_of("cpu") == "cpu"
    assert devices.uuid_of("cpu") is None


def test_a_name_means_one_device_and_back(two):
    identity = devices.identity_of("cuda:1")
    assert devices.uuid_of(identity) == FIRST
    assert devices.name_of(identity) == "cuda:1"
    assert devices.identity_of("cuda") == devices.identity_of("cuda:0") != identity


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:12345", "CUDA:0", "cuda:0 ", "mps"])
def test_what_names_no_device_is_refused(two, name):
    with pytest.raises(InvalidArgument) as caught:
        devices.identity_of(name)
    assert caught.value.resource == "device"


def test_a_device_that_this_process_does_not_see(two, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(InvalidArgument) as caught:
        devices.identity_of("cuda:2")
    assert "CUDA_VISIBLE_DEVICES=0,1" in caught.value.message
    with pytest.raises(InvalidArgument) as caught:
        devices.name_of("cuda:" + "0" * 32)
    assert caught.value.resource == "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize("identity", ["", "cuda:0", "cuda", "cpu0", "cuda:" + "g" * 32])
def test_what_is_no_identity_is_refused(identity):
    with pytest.raises(InvalidArgument):
        devices.uuid_of(identity)


class Said:
    """What the child process would have ended with."""

    def __init__(self, status: int, stdout: str = "", stderr: str = "") -> None:
        self.returncode, self.stdout, self.stderr = status, stdout, stderr


def test_they_are_asked_for_once_per_environment(monkeypatch):
    asked = []
    monkeypatch.setattr(devices, "_asked", {})
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: asked.append(1) or Said(0, f"{OTHER.hex()}\n"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert devices.visible() == devices.visible() == (OTHER,)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert devices.visible() == (OTHER,)
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("said", "resource"),
    [
        (Said(3, "libcuda.so.1: cannot open\n"), "libcuda.so.1"),
        (Said(4, "cuInit failed with error 100\n"), "cuInit"),
        (Said(-11), "cuInit"),
        (subprocess.TimeoutExpired("child", 60), "cuInit"),
    ],
)
def test_a_driver_that_does_not_answer_is_a_typed_error(monkeypatch, said, resource):
    def run(*_, **__):
        if isinstance(said, Exception):
            raise said
        return said

    monkeypatch.setattr(devices, "_asked", {})
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DriverError) as caught:
        devices.visible()
    assert caught.value.resource == resource
    assert caught.value.remedy


def test_the_child_says_what_it_found():
    """Whatever this machine has: devices, or the reason why there are none; and never a traceback."""
    done = subprocess.run([sys.executable, "-I", "-c", devices._ASK], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    if done.returncode:
        assert done.returncode in (3, 4)
        assert done.stdout.strip()
    else:
        assert all(len(bytes.fromhex(line)) == 16 for line in done.stdout.split())
