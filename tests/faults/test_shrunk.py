"""Row 16: an owner cuts its memory short after the agent has mapped it. The agent touches none of its bytes, and lives.

That memory which is shorter than claimed is refused when it is opened is `test_host`'s.
"""

from __future__ import annotations

from omega import Omega
from scene import Scene

SHRINK = """
tensors = made(1)
mine = client.register_tensors('mine', tensors)
for tensor in tensors.values():
    fd, size = tensor.untyped_storage()._share_fd_cpu_()
    os.ftruncate(fd, 0)
    os.close(fd)
"""


def test_the_agent_lives(stage: tuple[Scene, Omega]):
    scene, omega = stage
    owner = scene.worker(SHRINK)
    try:
        assert scene.reader.do("repr(attempt(lambda: client.subscribe('mine', timeout=1)))") == "'InvalidRecord'"
        assert owner.do("attempt(mine.publish)") in (1, "StorageMoved")
        scene.step()
        owner.do("attempt(lambda: mine.close(timeout=5))")
    finally:
        scene.dismiss(owner)
    scene.step()
    assert omega.faults() == []
