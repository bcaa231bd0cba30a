"""The second half of row 4: an owner makes no call in all the time that its agent is away, and the kernel does not let
the new agent take the descriptors from it. Who wants the memory waits, is told why if that takes too long, and gets it
at the owner's next call. Who had it mapped reads on.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator

import gates
import pytest
from harness import Agent, Raised
from omega import Omega
from scene import Scene

MAIN = "import sys; sys.argv = ['etha', 'agent']; from etha.cli import main; main()"


class Filtered(Agent):
    """A seccomp filter against pidfd_getfd(2), as container runtimes have one."""

    command = (sys.executable, "-W", "error", "-c", gates.filtered(gates.PIDFD_GETFD) + MAIN)


class Unprivileged(Agent):
    """No CAP_SYS_PTRACE: a process that is not dumpable, or has more capabilities, is closed to it (ptrace(2))."""

    command = (
        "setpriv",
        "--bounding-set=-sys_ptrace",
        "--inh-caps=-sys_ptrace",
        sys.executable,
        "-W",
        "error",
        "-m",
        "etha",
        "agent",
    )


needs_setpriv = pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv(1)")


@pytest.fixture(scope="module", params=[Filtered, pytest.param(Unprivileged, marks=[gates.as_root, needs_setpriv])])
def shut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scene, Omega]]:
    scene = Scene(tmp_path_factory.mktemp("faults"), agent=request.param)
    try:
        scene.owner.do(gates.NOT_DUMPABLE)
        scene.step()
        omega = Omega(scene)
        yield scene, omega
        omega.close()
    finally:
        scene.close()


@pytest.mark.parametrize("call", ["step(5)", "policy.publish()"])
def test_it_is_had_at_the_owners_next_call(shut: tuple[Scene, Omega], call: str):
    scene, omega = shut
    scene.follow()
    scene.reader.do("extra = None")
    assert scene.reader.do("look(5)") == (scene.version, [scene.version])
    with pytest.raises(Raised, match=r"^NoPublication:") as caught:
        scene.reader.do("extra = client.subscribe('policy', timeout=0.3)")
    assert scene.recorded().recovering
    assert caught.value.resource == "policy"
    assert f"pid {scene.owner.pid}" in caught.value.holder
    scene.reader.say("extra = client.subscribe('policy', timeout=50)")
    assert not scene.reader.heard()
    version = scene.owner.do(call)
    scene.reader.hear()
    expected = (version, [scene.version if "publish" in call else version])
    assert scene.reader.do(f"value = look(5, {version}, name='extra')\nextra.close()\nvalue") == expected
    scene.version = version
    scene.step()
    assert not scene.recorded().recovering
    assert omega.faults() == []


def test_the_owner_dies_without_a_call(shut: tuple[Scene, Omega]):
    scene, omega = shut
    other = scene.worker("tensors = made(0)\nother = client.register_tensors('other', tensors)")
    scene.follow()
    scene.reader.say("attempt(lambda: client.subscribe('other', timeout=50).generation)")
    scene.dismiss(other)
    scene.owner.do("other = client.register_tensors('other', made(0), timeout=5); other.generation")
    assert isinstance(scene.reader.hear(), int)
    scene.reader.do("gc.collect(); client.subscribe('other', timeout=5).close()")
    scene.owner.do("other.close(timeout=5)")
    assert omega.faults() == []
