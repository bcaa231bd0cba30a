"""The bus over device memory: real agents and workers, each with the fake driver.

What a GPU is asked beyond this stands in ``docs/cuda-ipc.md``. Kernels are functions that a stream's thread calls; a
slow one waits for a file to appear, so nothing here depends on how fast a machine is.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from box import until
from harness import Agent, Raised

from etha.tensor_bus.lockfile import read_lock
from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.state import ClaimRecord, StateReader

HERE = Path(__file__).parent
KINDS = ("legacy", "fd")
kinds = pytest.mark.parametrize("kind", KINDS)

GPU = f"""
sys.path.insert(0, {str(HERE)!r})
from fake_gpu import Gpu
from pathlib import Path
gpu = Gpu()
client, info = bootstrap_client(connection_timeout=20)
gpu.stream()

def gate(path):
    'A kernel that runs until the file is there.'
    def wait():
        while not os.path.exists(path):
            time.sleep(0.001)
    return wait
"""

OWNER = """
weights = gpu.tensors({kind!r}, 4096, 100)
for tensor in weights.values():
    tensor.zero_()
policy = client.register_tensors("policy", weights)
"""

READER = """
policy = client.subscribe("policy", timeout=20)
seen = []
"""


class GpuAgent(Agent):
    command = (sys.executable, str(HERE / "fake_gpu.py"), "agent")


@pytest.fixture
def start_gpu_agent(runtime, tmp_path):
    agents = []

    def start(*arguments: str) -> Agent:
        agents.append(GpuAgent(dict(os.environ), tmp_path, *(arguments or ("--device", "cuda:0"))))
        return agents[-1]

    yield start
    for agent in agents:
        agent.stop()
        if agent.process.returncode == 0:
            assert agent.errors.read_text() == ""


@pytest.fixture
def gpu_agent(start_gpu_agent):
    return start_gpu_agent()


@pytest.fixture
def on_gpu(gpu_agent, start_worker):
    """Start a worker with a fake GPU and a ``client``."""

    def start(setup: str = ""):
        worker = start_worker(connect=False)
        worker.do(GPU)
        if setup:
            worker.do(setup)
        return worker

    return start


@pytest.fixture
def gates(tmp_path):
    """Names of files for `gate`."""
    return lambda name: str(tmp_path / name)


def open_gate(path: str) -> None:
    Path(path).touch()


# -- used in place -----------------------------------------------------------------------------------------------


@kinds
def test_a_reader_sees_the_owners_memory_version_by_version(kind, on_gpu):
    owner = on_gpu(OWNER.format(kind=kind))
    reader = on_gpu(READER)
    assert reader.do("lease = policy.read(); lease.version, sorted(lease), lease['w1'].shape[0]") == (
        0,
        ["w0", "w1"],
        100,
    )
    reader.do("lease.release()")
    owner.do("with policy.update():\n    weights['w0'].fill_(7)\n    weights['w1'].fill_(8)")
    assert reader.do("""
with policy.read(min_version=1) as lease:
    seen = lease.version, set(lease['w0'].tolist()), set(lease['w1'].tolist())
seen
""") == (1, {7}, {8})
    owner.do("weights['w0'].fill_(9); policy.publish()")
    assert reader.do("""
with policy.read(min_version=2) as lease:
    seen = lease.guarded, set(lease['w0'].tolist())
seen
""") == (False, {9})


def test_memory_of_a_device_is_named_by_its_uuid(on_gpu, start_worker, runtime, monkeypatch):
    owner = on_gpu(OWNER.format(kind="fd"))
    lock = read_lock(agent_paths(0).lock)
    assert lock is not None
    assert lock.text.device == "cuda:74686520-6669-7273-7420-646576696365"
    assert owner.do("info.device, client.device") == ("cuda:0", "cuda:0")
    other = start_worker(connect=False)
    other.do("os.environ['ETHA_TEST_DEVICES'] = '1,0'\n" + GPU)
    assert other.do("info.device") == "cuda:1"
    assert other.do("again = TensorBusClient.for_device('cuda:1'); again.device, again.agent_rank") == ("cuda:1", 0)
    other.do(READER)
    assert other.do("policy.read()['w0'].sum().item()") == 0
    blind = start_worker(connect=False)
    with pytest.raises(Raised) as caught:
        blind.do("os.environ['ETHA_TEST_DEVICES'] = '1'\n" + GPU)
    assert (caught.value.kind, caught.value.resource) == ("InvalidArgument", "CUDA_VISIBLE_DEVICES")


def test_what_lies_elsewhere_is_refused_by_name(on_gpu):
    worker = on_gpu()
    with pytest.raises(Raised) as caught:
        worker.do("client.register_tensors('host', {'w': torch.ones(3).share_memory_()})")
    assert (caught.value.kind, caught.value.resource) == ("NotShareable", "w")
    assert worker.do("client.register_tensors('none', {}).version") == 0


def test_an_array_of_another_library_is_shared_in_place(on_gpu):
    owner = on_gpu("""
import numpy
array = gpu.tensors('fd', 64)['w0'].numpy()
shared = client.register_tensors("array", {"a": array})
array[:] = 5
shared.publish()
""")
    reader = on_gpu("found = client.subscribe('array')")
    assert reader.do("found.read(min_version=1)['a'].tolist() == [5] * 64")
    with pytest.raises(Raised) as caught:
        owner.do("client.register_tensors('odd', {'o': object()})")
    assert (caught.value.kind, caught.value.resource) == ("NotShareable", "o")


def test_its_owner_reads_an_alias(on_gpu):
    owner = on_gpu(OWNER.format(kind="legacy"))
    assert owner.do("""
mine = client.subscribe("policy")
with mine.read() as lease:
    same = lease['w0'].data_ptr() == weights['w0'].data_ptr()
mine.close()
same
""")


def test_many_chunks_cross(on_gpu):
    on_gpu("""
weights = gpu.tensors('fd', 2**16 * 3 * 300)
weights['w0'][-1] = 3
policy = client.register_tensors("policy", weights)
""")
    reader = on_gpu(READER)
    assert reader.do("policy.read()['w0'][-1].item()") == 3


# -- order -------------------------------------------------------------------------------------------------------


@kinds
def test_a_read_comes_after_the_write_that_it_reads(kind, on_gpu, gates):
    """The owner's kernel is still running when its version is published, and when that is read."""
    owner, reader, slow = on_gpu(OWNER.format(kind=kind)), on_gpu(READER), gates("slow")
    owner.do(f"""
with policy.update():
    gpu.launch(gate({slow!r}))
    gpu.launch(lambda: weights['w0'].fill_(1))
""")
    reader.do("""
lease = policy.read(min_version=1)
tensor = lease['w0']
gpu.launch(lambda: seen.append(int(tensor[0])))
""")
    assert not owner.do("gpu.idle()")
    assert not reader.do("gpu.idle()")
    open_gate(slow)
    assert reader.do("gpu.drained(), seen") == (True, [1])


@kinds
def test_a_write_comes_after_the_reads_that_it_follows(kind, on_gpu, gates):
    """The reader's kernel is still running when its lease is over, and when the owner's next update begins."""
    owner, reader, slow = on_gpu(OWNER.format(kind=kind)), on_gpu(READER), gates("slow")
    reader.do(f"""
with policy.read() as lease:
    tensor = lease['w0']
    gpu.launch(gate({slow!r}))
    gpu.launch(lambda tensor=tensor: seen.append(int(tensor[0])))
""")
    owner.do("with policy.update():\n    gpu.launch(lambda: weights['w0'].fill_(1))")
    assert not owner.do("gpu.idle()")
    open_gate(slow)
    assert owner.do("gpu.drained(), int(weights['w0'][0])") == (True, 1)
    assert reader.do("gpu.drained(), seen") == (True, [0])


@pytest.mark.parametrize("without", ["follow", "mark"])
def test_the_order_is_lost_without_either_side(without, on_gpu, gates):
    """The same reads are torn as soon as nobody waits, or nobody says what to wait for."""
    owner, reader, slow = on_gpu(OWNER.format(kind="fd")), on_gpu(READER), gates("slow")
    sabotaged = reader if without == "follow" else owner
    sabotaged.do(f"""
from etha.tensor_bus.ipc.order import StreamOrder
StreamOrder.{without} = lambda self, *numbers: 0
""")
    owner.do(f"""
with policy.update():
    gpu.launch(gate({slow!r}))
    gpu.launch(lambda: weights['w0'].fill_(1))
""")
    reader.do("""
lease = policy.read(min_version=1)
tensor = lease['w0']
gpu.launch(lambda: seen.append(int(tensor[0])))
""")
    assert reader.do("gpu.drained(), seen") == (True, [0])
    open_gate(slow)


def test_check_waits_for_the_readers_own_work(on_gpu, gates):
    on_gpu(OWNER.format(kind="fd"))
    reader, slow = on_gpu(READER), gates("slow")
    reader.do(f"lease = policy.read()\ngpu.launch(gate({slow!r}))\ngpu.launch(lambda: seen.append(1))")
    reader.say("lease.check(); seen")
    open_gate(slow)
    assert reader.hear() == [1]
    reader.do(f"client._link.patience = 0.01; gpu.launch(gate({gates('never')!r}))")
    with pytest.raises(Raised) as caught:
        reader.do("lease.check()")
    assert caught.value.kind == "LeaseTimeout"
    open_gate(gates("never"))


def test_nothing_of_the_bus_while_capturing(on_gpu):
    owner, reader = on_gpu(OWNER.format(kind="fd")), on_gpu(READER)
    reader.do("lease = policy.read()")
    calls = {
        owner: ("policy.publish()", "policy.update().__enter__()", "client.register_tensors('x', weights)"),
        reader: ("policy.read()", "lease.release()"),
    }
    for worker, refused in calls.items():
        worker.do("capture = gpu.driver.capture(gpu._stream); capture.__enter__()")
        for call in refused:
            with pytest.raises(Raised) as caught:
                worker.do(call)
            assert caught.value.kind == "StreamCapturing"
        worker.do("capture.__exit__(None, None, None)")
    assert owner.do("policy.version") == 0
    reader.do("lease['w0'].sum().item(); lease.release()")
    owner.do("with policy.update(timeout=10): pass")
    assert reader.do("policy.read(version=1).version") == 1


def test_a_lease_that_was_collected_is_given_back_behind_its_work(on_gpu, gates):
    owner, reader, slow = on_gpu(OWNER.format(kind="fd")), on_gpu(READER), gates("slow")
    reader.do(f"""
import warnings
warnings.simplefilter("ignore", ResourceWarning)
lease = policy.read()
gpu.launch(gate({slow!r}))
del lease
gc.collect()
""")
    with pytest.raises(Raised) as caught:
        owner.do("with policy.update(timeout=0.1): pass")
    assert caught.value.kind == "LeaseTimeout"
    reader.do("client.subscribe('policy').close()")
    owner.do("with policy.update(timeout=10):\n    gpu.launch(lambda: weights['w0'].fill_(1))")
    assert not owner.do("gpu.idle()")
    open_gate(slow)
    assert owner.do("gpu.drained()")


# -- death -------------------------------------------------------------------------------------------------------


def test_nobody_waits_for_a_dead_reader(on_gpu, gates):
    owner, reader = on_gpu(OWNER.format(kind="fd")), on_gpu(READER)
    reader.do(f"with policy.read() as lease:\n    gpu.launch(gate({gates('never')!r}))")
    owner.do("with policy.update():\n    gpu.launch(lambda: weights['w0'].fill_(1))")
    assert not owner.do("gpu.idle()")
    reader.kill()
    assert owner.do("gpu.drained(), int(weights['w0'][0])") == (True, 1)


def test_nobody_waits_for_a_dead_owner_and_its_reader_is_told(on_gpu, gates):
    owner, reader = on_gpu(OWNER.format(kind="fd")), on_gpu(READER)
    owner.do(f"with policy.update():\n    gpu.launch(gate({gates('never')!r}))")
    reader.do("lease = policy.read(min_version=1)\ngpu.launch(lambda: seen.append(1))")
    assert not reader.do("gpu.idle()")
    owner.kill()
    assert reader.do("gpu.drained(), seen") == (True, [1])
    for call in ("lease.check()", "policy.read()"):
        with pytest.raises(Raised) as caught:
            reader.do(call)
        assert caught.value.kind == "OwnerDiedError"


def test_a_client_that_closes_while_its_work_goes_on_is_waited_for(on_gpu, gates):
    """Its goodbye would let others go; so it comes only with the first call after the work is done."""
    owner, reader, slow = on_gpu(OWNER.format(kind="fd")), on_gpu(READER), gates("slow")
    reader.do(f"""
from etha.tensor_bus import link
link._WORK_SECONDS = 0.01
with policy.read() as lease:
    gpu.launch(gate({slow!r}))
policy.close()
client.close()
""")
    owner.do("with policy.update():\n    gpu.launch(lambda: weights['w0'].fill_(1))")
    assert not owner.do("gpu.idle()")
    open_gate(slow)
    assert owner.do("gpu.drained()")
    reader.do("gpu.drained(); another = TensorBusClient(0)")
    state = StateReader(agent_paths(0).state)
    until(lambda: not [claim for claim in state.all(ClaimRecord).values() if claim.pid == reader.pid])
    state.close()


@kinds
def test_memory_is_given_back_with_the_last_view(kind, on_gpu):
    owner, reader = on_gpu(OWNER.format(kind=kind)), on_gpu(READER)
    reader.do("lease = policy.read(); kept = lease['w0']; lease.release(); policy.close()")
    with pytest.raises(Raised) as caught:
        owner.do("policy.close(timeout=0.2)")
    assert caught.value.kind == "MappingTimeout"
    assert str(reader.pid) in caught.value.holder
    assert reader.do("len(gpu.driver.tables.mapped) > 0")
    reader.do("del kept, lease; gc.collect(); another = client.subscribe('policy'); another.close()")
    assert reader.do("len(gpu.driver.tables.mapped)") == 0
    owner.do("policy.close(timeout=10)")


# -- moving ------------------------------------------------------------------------------------------------------


@kinds
def test_moved_suspended_and_resumed(kind, on_gpu):
    owner, reader = on_gpu(OWNER.format(kind=kind)), on_gpu(READER)
    assert reader.do("with policy.read() as lease: seen = lease['w0'].sum().item()\nseen") == 0
    owner.do(f"fresh = gpu.tensors({kind!r}, 4096, 100)\nfor each in fresh.values(): each.fill_(2)")
    owner.do("policy.rebind(fresh)")
    assert reader.do("with policy.read(min_version=1) as lease: seen = lease['w0'][0].item()\nseen") == 2
    reader.say("with policy.read(min_version=2, timeout=20) as lease: seen = lease['w1'][0].item()\nseen")
    owner.do("policy.suspend(timeout=20)")
    assert owner.do("policy.readers()[0].version") is None
    owner.do("fresh['w1'].fill_(3); policy.resume(fresh)")
    assert reader.hear() == 3


def until_released() -> None:
    """The agent has heard of the end of every lease: one on its way is lost with the agent that it was sent to."""
    state = StateReader(agent_paths(0).state)
    until(lambda: not [claim for claim in state.all(ClaimRecord).values() if claim.kind == "lease"])
    state.close()


# -- restart -----------------------------------------------------------------------------------------------------


@kinds
def test_an_agent_that_follows_another(kind, on_gpu, gpu_agent, start_gpu_agent, gates):
    owner, reader = on_gpu(OWNER.format(kind=kind)), on_gpu(READER)
    assert reader.do("with policy.read() as lease: seen = lease.version\nseen") == 0
    until_released()
    gpu_agent.kill()
    gpu_agent.process.wait(60)
    start_gpu_agent()
    owner.do("with policy.update(timeout=20):\n    gpu.launch(lambda: weights['w0'].fill_(1))")
    assert reader.do("""
lease = policy.read(min_version=1, timeout=20)
tensor, seen = lease['w0'], []
gpu.launch(lambda: seen.append(int(tensor[0])))
gpu.drained(), seen
""") == (True, [1])
    newcomer = on_gpu(READER)
    assert newcomer.do("policy.read()['w0'][0].item()") == 1


@pytest.mark.parametrize("idle", [True, False])
def test_points_of_work_outlive_the_agent(idle, on_gpu, gpu_agent, start_gpu_agent, gates):
    """Read before the agent died, and still being read: the owner's next update waits, through the next agent. A reader
    that makes a call is waited for by the owner's stream; for one that makes none, the update itself waits."""
    owner, reader, slow = on_gpu(OWNER.format(kind="fd")), on_gpu(READER), gates("slow")
    reader.do(f"""
with policy.read() as lease:
    gpu.launch(gate({slow!r}))
    gpu.launch(lambda tensor=lease['w0']: seen.append(int(tensor[0])))
del lease
""")
    until_released()
    gpu_agent.kill()
    gpu_agent.process.wait(60)
    start_gpu_agent()
    with pytest.raises(Raised) as caught:
        owner.do("policy.update(timeout=0.3).__enter__()")
    assert caught.value.kind == "LeaseTimeout"
    assert str(reader.pid) in caught.value.holder
    owner.say("with policy.update(timeout=20):\n    gpu.launch(lambda: weights['w0'].fill_(1))")
    if idle:
        open_gate(slow)
        owner.hear()
    else:
        reader.do("client.subscribe('policy', timeout=20).close()")
        owner.hear()
        assert not owner.do("gpu.idle()")
        open_gate(slow)
    assert owner.do("gpu.drained()")
    assert reader.do("gpu.drained(), seen") == (True, [0])


def test_who_dies_after_the_agent_is_waited_for_by_nobody(on_gpu, gpu_agent, start_gpu_agent, gates):
    """A stream waits in the fences of the agent before: its successor lets it go."""
    owner, reader = on_gpu(OWNER.format(kind="fd")), on_gpu(READER)
    reader.do(f"with policy.read() as lease:\n    gpu.launch(gate({gates('never')!r}))")
    owner.do("with policy.update():\n    gpu.launch(lambda: weights['w0'].fill_(1))")
    until_released()
    gpu_agent.kill()
    gpu_agent.process.wait(60)
    start_gpu_agent()
    owner.do("client.subscribe('policy', timeout=20).close()")
    assert not owner.do("gpu.idle()")
    reader.kill(signal.SIGKILL)
    assert owner.do("gpu.drained()")


def test_a_successor_of_another_device_is_refused(on_gpu, gpu_agent, start_agent):
    on_gpu(OWNER.format(kind="fd"))
    gpu_agent.kill()
    gpu_agent.process.wait(60)
    with pytest.raises(RuntimeError, match="share memory of cuda:"):
        start_agent("--device", "cpu")
