"""Agents and workers on a real GPU, for `test_gpu_bus`.

torch's allocator is told by the environment which kind of memory to give, and may read that when torch is imported. So
each kind has a zygote of its own. A zygote never initialises CUDA: what is forked from it then can use CUDA as any
fresh process can, and each worker is asked whether that is so.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from box import until
from harness import PRELUDE, WORKER, Worker
from zygote import Zygote

from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.state import ClaimRecord, StateReader

MIB = 1 << 20
PAYLOAD = 512 * MIB
"""Bytes of a tensor whose memory is looked for in the device's."""

TOLERANCE = 64 * MIB
"""What the device's used memory may differ by, where it is to be as before: modules of code that were loaded, pools."""

SECONDS = 2.0
"""In which device memory must be back."""

SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""The second is the newer name of the first."""

SEGMENTS = "expandable_segments:True"

KINDS = ("fd",) if any(SEGMENTS in os.environ.get(name, "") for name in SETTINGS) else ("legacy", "fd")
"""Of memory: by ``cudaMalloc``, or virtual. A run with expandable segments in its environment asks for those only."""

NOBODY = 65534

AS_NOBODY = (
    sys.executable,
    "-I",
    "-c",
    f"import os, sys; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY}); os.execv(sys.argv[1], sys.argv[1:])",
)
"""Before a command, where root runs the tests. The exec makes the process readable to its user again."""

GPU = """
import random
from pathlib import Path
device = torch.device(info.device)
torch.cuda.set_device(device)

def warm():
    'Load every kernel that is used, before any stream waits: loading one may wait for all of them.'
    scratch = torch.zeros(1024, dtype=torch.int64, device=device)
    scratch.fill_(1)
    scratch.add_(1)
    scratch[:1].copy_(scratch[1:2])
    scratch.sum().item()
    (scratch == 2).all().item()
    scratch.view(torch.uint8).fill_(0)
    scratch.clone()
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()

class Gate:
    'A stream that comes to it waits until it is opened: a word of pinned memory, so that no kernel takes the device.'

    def __init__(self):
        self.word = torch.zeros(1, dtype=torch.int64).pin_memory()

    def shut(self):
        stream = torch.cuda.current_stream().cuda_stream
        with client._link.device.backend.device.current() as driver:
            driver.wait_value(stream, driver.host_device_address(self.word.data_ptr()), 1)

    def open(self):
        self.word[0] = 1

def idle():
    return torch.cuda.current_stream().query()

def drained(timeout=20.0):
    'Whether the current stream comes to its end in time.'
    deadline = time.monotonic() + timeout
    while not idle():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True

def settle():
    'An etha call, after which nothing is mapped that nobody uses.'
    gc.collect()
    client.register_tensors(f"nothing of {os.getpid()}", {}).close()

warm()
gate = Gate()
seen = torch.full((8,), -1, dtype=torch.int64, device=device)
torch.cuda.synchronize()  # no stream of a test waits for the one on which this was queued
"""

SIDE_STREAM = "torch.cuda.set_stream(torch.cuda.Stream())"

OWNER = """
weights = {"w0": torch.zeros(1 << 20, dtype=torch.int64, device=device), "w1": torch.zeros(100, device=device)}
policy = client.register_tensors("policy", weights)
"""

READER = """
policy = client.subscribe("policy", timeout=20)
with policy.read() as lease:
    seen[:1].copy_(lease["w0"][:1])
del lease
"""

BIG_OWNER = f"""
weights = {{"w0": torch.full(({PAYLOAD} // 8,), 1, dtype=torch.int64, device=device)}}
torch.cuda.synchronize()
policy = client.register_tensors("policy", weights)
"""

WATCH = """
torch.zeros(1, device="cuda")

def used():
    'Bytes of the device that somebody has.'
    free, total = torch.cuda.mem_get_info()
    return total - free

def soon(most, seconds):
    'Used bytes, as soon as they are so few, or after so many seconds.'
    deadline = time.monotonic() + seconds
    while (now := used()) > most and time.monotonic() < deadline:
        pass
    return now
"""


def missing() -> str | None:
    """What a GPU test lacks here. It must not initialise CUDA in this process, whose other tests fork."""
    if not os.path.exists("/dev/nvidiactl"):
        return "no GPU: there is no /dev/nvidiactl"
    if importlib.util.find_spec("cuda") is None:
        return "no cuda-bindings"
    from torch.version import cuda

    return "this torch is built without CUDA" if cuda is None else None


def environment_of(kind: str) -> dict[str, str]:
    """This process's, and torch's allocator told to give memory of that kind."""
    changed = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return {**changed, **dict.fromkeys(SETTINGS, SEGMENTS)} if kind == "fd" else changed


@functools.cache
def zygote_of(kind: str) -> Zygote:
    """One for all tests of a kind."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SETTINGS:
            patch.delenv(name, raising=False)
            if kind == "fd":
                patch.setenv(name, SEGMENTS)
        return Zygote()


class GpuWorker(Worker):
    """A worker whose torch gives memory of one kind."""

    def __init__(self, kind: str, directory: Path) -> None:
        self._kind = kind
        super().__init__(environment_of(kind), directory)
        self.do(PRELUDE)
        fit = self.do("torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork()")
        if fit != (False, False):
            raise RuntimeError(f"the zygote has initialised CUDA: (is_initialized, _is_in_bad_fork) are {fit}")

    def begin(self, environment: dict[str, str], stderr: int):
        return zygote_of(self._kind).fork(environment, stderr)


class SpawnedWorker(Worker):
    """A worker of an environment that no other has, or of another user: a fresh process."""

    def __init__(self, environment: dict[str, str], directory: Path, prefix: tuple[str, ...] = ()) -> None:
        self._prefix = prefix
        super().__init__(environment, directory)
        self.do(PRELUDE)

    def begin(self, environment: dict[str, str], stderr: int):
        return subprocess.Popen(
            [*self._prefix, sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
        )


class Watch:
    """How much of the device's memory is used, asked in a process that has nothing to do with the bus."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        worker.do(WATCH)

    def used(self) -> int:
        """Bytes, by whomever."""
        return self._worker.do("used()")

    def back_at(self, before: int, what: str) -> None:
        """Fail unless used memory is as before, within `SECONDS`."""
        now = self._worker.do(f"soon({before + TOLERANCE}, {SECONDS})")
        if now > before + TOLERANCE:
            more = (
                f"{(now - before) / MIB:.0f} MiB more are used {SECONDS} s later than before ({before / MIB:.0f} MiB)"
            )
            raise AssertionError(f"{what}: {more}")


def until_released() -> None:
    """The agent has heard of the end of every lease: one on its way is lost with the agent that it was sent to."""
    state = StateReader(agent_paths(0).state)
    until(lambda: not [claim for claim in state.all(ClaimRecord).values() if claim.kind == "lease"])
    state.close()
