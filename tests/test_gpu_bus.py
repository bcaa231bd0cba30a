"""The bus over a GPU's memory: real agents, workers, tensors and kernels. `test_device_bus` asks the same of a fake.

A stream that is to be slow waits at a gate, a word of pinned memory that its worker writes; kernels that spin take a
millisecond at most. Memory is looked for in the device's own count, asked by a process that is not on the bus.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from gpu_box import (
    AS_NOBODY,
    BIG_OWNER,
    GPU,
    KINDS,
    MIB,
    NOBODY,
    OWNER,
    PAYLOAD,
    READER,
    SEGMENTS,
    SETTINGS,
    SIDE_STREAM,
    TOLERANCE,
    GpuWorker,
    SpawnedWorker,
    Watch,
    environment_of,
    missing,
    until_released,
)
from harness import Agent, Raised

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

kinds = pytest.mark.parametrize("kind", KINDS)
rounds = pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.stress)])
cupy = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="no CuPy")

CONNECT = "client, info = bootstrap_client(connection_timeout=20)\n"


@pytest.fixture
def start_gpu_agent(runtime, tmp_path):
    agents = []

    def start(device: str = "cuda:0") -> Agent:
        agents.append(Agent(dict(os.environ), tmp_path, "--device", device))
        return agents[-1]

    yield start
    for agent in agents:
        if agent.stop() == 0:
            assert agent.errors.read_text() == ""


@pytest.fixture
def gpu_agent(start_gpu_agent):
    return start_gpu_agent()


@pytest.fixture
def start_gpu_worker(runtime, tmp_path):
    """Start a worker that has touched no GPU."""
    workers = []

    def start(kind: str = KINDS[0]):
        workers.append(GpuWorker(kind, tmp_path))
        return workers[-1]

    yield start
    for worker in workers:
        worker.destroy()


@pytest.fixture
def on_gpu(gpu_agent, start_gpu_worker):
    """Start a worker with a ``client``, then a GPU, its kernels loaded."""

    def start(setup: str = "", kind: str = KINDS[0]):
        worker = start_gpu_worker(kind)
        worker.do(CONNECT + GPU + setup)
        return worker

    return start


@pytest.fixture
def watch(start_gpu_worker):
    return Watch(start_gpu_worker())


@contextmanager
def raises(kind: str, resource: str | None = None):
    with pytest.raises(Raised) as caught:
        yield caught
    assert caught.value.kind == kind, caught.value
    assert resource in (None, caught.value.resource), caught.value


# -- used in place -----------------------------------------------------------------------------------------------


@kinds
def test_a_reader_sees_the_owners_memory_version_by_version(kind, on_gpu):
    owner, reader = on_gpu(OWNER, kind), on_gpu(READER, kind)
    assert owner.do("info.device, client.device") == ("cuda:0", "cuda:0")
    owner.do("with policy.update():\n    weights['w0'].fill_(7)\n    weights['w1'].fill_(8)")
    assert reader.do("""
with policy.read(min_version=1) as lease:
    found = lease.version, (lease['w0'] == 7).all().item(), set(lease['w1'].tolist()), str(lease['w0'].device)
del lease
found
""") == (1, True, {8.0}, "cuda:0")
    owner.do("weights['w0'].fill_(9); policy.publish()")
    assert reader.do("""
with policy.read(min_version=2) as lease:
    found = lease.guarded, (lease['w0'] == 9).all().item()
found
""") == (False, True)


@kinds
def test_a_write_is_seen_without_a_call(kind, on_gpu):
    owner, reader = on_gpu(OWNER, kind), on_gpu(READER, kind)
    assert reader.do("lease = policy.read(); lease['w0'][-1].item()") == 0
    owner.do("weights['w0'].fill_(5); torch.cuda.synchronize()")
    assert reader.do("lease['w0'][-1].item()") == 5


@kinds
def test_a_reader_takes_no_memory(kind, on_gpu, watch):
    on_gpu(BIG_OWNER, kind)
    on_gpu(READER, kind)  # the agent has its context by now
    reader = on_gpu(kind=kind)
    before = watch.used()
    assert reader.do("policy = client.subscribe('policy'); lease = policy.read(); lease['w0'][-1].item()") == 1
    assert watch.used() - before < TOLERANCE
    reader.do("copy = lease['w0'].clone(); torch.cuda.synchronize()")
    assert watch.used() - before > PAYLOAD // 2


@kinds
def test_mappings_are_kept_from_lease_to_lease(kind, on_gpu):
    on_gpu(OWNER, kind)
    reader = on_gpu(READER, kind)
    assert (
        reader.do("""
found = set()
for _ in range(100):
    with policy.read() as lease:
        found.add(lease["w0"].data_ptr())
len(found)
""")
        == 1
    )


def test_its_owner_reads_an_alias(on_gpu):
    assert on_gpu(OWNER).do("""
mine = client.subscribe("policy")
with mine.read() as lease:
    same = lease['w0'].data_ptr() == weights['w0'].data_ptr()
mine.close()
same
""")


def test_the_agent_is_found_by_its_device(on_gpu):
    found = on_gpu().do("again = TensorBusClient.for_device(device); again.device, again.agent_rank")
    assert found == ("cuda:0", 0)


# -- order -------------------------------------------------------------------------------------------------------

WRITE_ALL = """
def write_all(most, seconds, seed):
    'Publish versions from many streams, some of them slowly; the last one.'
    chance, streams = random.Random(seed), [torch.cuda.Stream() for _ in range(3)]
    whole, half = weights["w0"], len(weights["w0"]) // 2
    end, last = time.monotonic() + seconds, torch.cuda.current_stream()
    for version in range(1, most + 1):
        stream = chance.choice(streams)
        stream.wait_stream(last)  # the order of one's own writes is one's own matter
        with torch.cuda.stream(stream), policy.update(timeout=30):
            whole[:half].fill_(version)
            if chance.random() < 0.1:
                torch.cuda._sleep(chance.randrange(SPIN))
            whole[half:].fill_(version)
        last = stream
        if time.monotonic() > end:
            break
    torch.cuda.current_stream().wait_stream(last)
    return policy.version
"""

READ_ALL = """
def read_all(stop, most, seed):
    'Copy the first and the last word of each version aside; how many were read, torn, and where they lay.'
    chance, streams = random.Random(seed), [torch.cuda.Stream() for _ in range(3)]
    aside = torch.full((2, most), -1, dtype=torch.int64, device=device)
    torch.cuda.synchronize()
    versions, places = [], set()
    torch.cuda.set_stream(streams[0])
    for lease in policy.versions(timeout=30):
        tensor, at = lease["w0"], len(versions)
        aside[0, at : at + 1].copy_(tensor[:1])
        if chance.random() < 0.1:
            torch.cuda._sleep(chance.randrange(SPIN))
        aside[1, at : at + 1].copy_(tensor[-1:])
        versions.append(lease.version)
        places.add(tensor.data_ptr())
        if len(versions) == most or os.path.exists(stop):
            break
        torch.cuda.set_stream(chance.choice(streams))
    torch.cuda.synchronize()
    found = aside.t().tolist()
    return len(versions), sum(found[at] != [version] * 2 for at, version in enumerate(versions)), len(places)
"""

SPIN = "SPIN = 1_500_000  # cycles, at most: less than a millisecond at the clocks of a busy H100\n"


def play(on_gpu, tmp_path, kind: str, versions: int, seconds: float, sabotage: dict[str, str]) -> tuple[int, int, int]:
    """How many versions were read, how many of them torn, and in how many places they lay."""
    seed = time.monotonic_ns()
    print(f"seed {seed}")
    stop = tmp_path / "stop"
    owner = on_gpu(OWNER + SPIN + WRITE_ALL + sabotage.get("owner", ""), kind)
    reader = on_gpu(READER + SPIN + READ_ALL + sabotage.get("reader", ""), kind)
    reader.say(f"read_all({str(stop)!r}, {versions + 10}, {seed + 1})")
    written = owner.do(f"write_all({versions}, {seconds}, {seed})", timeout=120)
    stop.touch()
    owner.do("with policy.update():\n    weights['w0'].fill_(policy.version + 1)")
    read, torn, places = reader.hear(120)
    print(f"{kind}: {written} versions written, {read} read, {torn} torn")
    assert written > 100
    return read, torn, places


@kinds
def test_no_read_of_ten_thousand_versions_is_torn(kind, on_gpu, tmp_path):
    read, torn, places = play(on_gpu, tmp_path, kind, 10_000, 45, {})
    assert (torn, places) == (0, 1)
    assert read > 100


SABOTAGE = """
from etha.tensor_bus.ipc.order import StreamOrder
StreamOrder.{method} = lambda self, *numbers: 0
"""


@pytest.mark.parametrize("method", ["follow", "mark"])
@pytest.mark.parametrize("side", ["owner", "reader"])
def test_without_either_wait_reads_are_torn(side, method, on_gpu, tmp_path):
    read, torn, _ = play(on_gpu, tmp_path, KINDS[0], 1_000, 15, {side: SABOTAGE.format(method=method)})
    assert torn > 0, f"none of {read} reads was torn, though the {side} does not {method}"


@kinds
def test_a_read_comes_after_the_write_that_it_reads(kind, on_gpu):
    owner, reader = on_gpu(SIDE_STREAM + OWNER, kind), on_gpu(SIDE_STREAM + READER, kind)
    owner.do("with policy.update():\n    gate.shut()\n    weights['w0'].fill_(1)")
    reader.do("lease = policy.read(min_version=1); seen[:1].copy_(lease['w0'][-1:])")
    assert (owner.do("idle()"), reader.do("idle()")) == (False, False)
    owner.do("gate.open()")
    assert reader.do("drained(), seen[0].item()") == (True, 1)


@kinds
def test_a_write_comes_after_the_reads_that_it_follows(kind, on_gpu):
    owner, reader = on_gpu(SIDE_STREAM + OWNER, kind), on_gpu(SIDE_STREAM + READER, kind)
    reader.do("with policy.read() as lease:\n    gate.shut()\n    seen[:1].copy_(lease['w0'][-1:])")
    owner.do("with policy.update():\n    weights['w0'].fill_(1)")
    assert not owner.do("idle()")
    reader.do("gate.open()")
    assert owner.do("drained(), weights['w0'][-1].item()") == (True, 1)
    assert reader.do("drained(), seen[0].item()") == (True, 0)


def test_check_waits_for_the_readers_own_work(on_gpu):
    on_gpu(OWNER)
    reader = on_gpu(SIDE_STREAM + READER)
    reader.do("lease = policy.read(); gate.shut(); client._link.patience = 0.05")
    with raises("LeaseTimeout", "policy"):
        reader.do("lease.check()")
    reader.do("gate.open(); client._link.patience = 20.0; lease.check()")
    assert reader.do("idle()")


# -- death -------------------------------------------------------------------------------------------------------


def test_nobody_waits_for_a_dead_reader(on_gpu):
    owner, reader = on_gpu(SIDE_STREAM + OWNER), on_gpu(SIDE_STREAM + READER)
    reader.do("with policy.read() as lease:\n    gate.shut()")
    owner.do("with policy.update():\n    weights['w0'].fill_(1)")
    assert not owner.do("idle()")
    reader.kill()
    assert owner.do("drained(), weights['w0'][-1].item()") == (True, 1)


def test_nobody_waits_for_a_dead_owner_and_its_reader_is_told(on_gpu):
    owner, reader = on_gpu(SIDE_STREAM + OWNER), on_gpu(SIDE_STREAM + READER)
    owner.do("with policy.update():\n    gate.shut()\n    weights['w0'].fill_(1)")
    reader.do("lease = policy.read(min_version=1); seen[:1].copy_(seen[1:2])")
    assert not reader.do("idle()")
    owner.kill()
    assert reader.do("drained()")
    for call in ("lease.check()", "policy.read()"):
        with raises("OwnerDiedError"):
            reader.do(call)


@rounds
@kinds
def test_a_dead_owners_memory_is_back(kind, count, on_gpu, watch):
    reader = on_gpu(kind=kind)
    on_gpu(OWNER, kind).do("policy.close()")  # the agent has its context from now on
    before = watch.used()
    for number in range(count):
        owner = on_gpu(BIG_OWNER, kind)
        reader.do("policy = client.subscribe('policy', timeout=20); lease = policy.read(); lease['w0'][-1].item()")
        assert watch.used() - before > PAYLOAD // 2
        owner.kill()
        owner.process.wait(60)
        reader.do("lease.release(); del lease; policy.close(); del policy; settle()")
        watch.back_at(before, f"an owner was killed, round {number}")


@rounds
@kinds
def test_a_dead_readers_memory_is_back(kind, count, on_gpu, watch):
    owner = on_gpu(BIG_OWNER, kind)
    on_gpu(READER, kind)  # the agent has its context by now
    before = watch.used()
    for number in range(count):
        reader = on_gpu(READER, kind)
        reader.do("lease = policy.read(); copy = lease['w0'].clone(); torch.cuda.synchronize()")
        assert watch.used() - before > PAYLOAD // 2
        reader.kill()
        reader.process.wait(60)
        watch.back_at(before, f"a reader was killed, round {number}")
        assert owner.do("with policy.update(timeout=20):\n    weights['w0'].fill_(2)\ndrained()")


@rounds
@kinds
def test_a_dead_agents_memory_is_back(kind, count, on_gpu, gpu_agent, start_gpu_agent, watch):
    """Used beside it: what its workers have. An agent makes its context with the first tensor, and not before."""
    owner, reader = on_gpu(kind=kind), on_gpu(kind=kind)
    owner.do(BIG_OWNER.replace("policy = ", "register = lambda: "))
    before = watch.used()
    owner.do("policy = register()")
    reader.do(READER)
    agent = gpu_agent
    for number in range(count):
        with_agent = watch.used()
        assert with_agent > before
        until_released()
        agent.kill()
        agent.process.wait(60)
        watch.back_at(before, f"an agent was killed, round {number}")
        agent = start_gpu_agent()
        owner.do(f"with policy.update(timeout=20):\n    weights['w0'].fill_({number + 2})")
        assert (
            reader.do(f"""
with policy.read(min_version={number + 1}, timeout=20) as lease:
    found = lease['w0'][-1].item()
del lease
found
""")
            == number + 2
        )


@kinds
def test_memory_is_given_back_while_suspended(kind, on_gpu, watch):
    owner, reader = on_gpu(kind=kind), on_gpu(kind=kind)
    on_gpu(OWNER, kind).do("policy.close()")
    before = watch.used()
    owner.do(BIG_OWNER)
    reader.do("policy = client.subscribe('policy')\nwith policy.read() as lease: pass\ndel lease")
    assert watch.used() - before > PAYLOAD // 2
    reader.say("with policy.read(min_version=1, timeout=20) as lease: found = lease['w0'][-1].item()\nfound")
    owner.do("policy.suspend(timeout=20); weights.clear(); torch.cuda.empty_cache()")
    watch.back_at(before, "suspended")
    owner.do(f"weights['w0'] = torch.full(({PAYLOAD} // 8,), 3, dtype=torch.int64, device=device)")
    owner.do("policy.resume(weights)")
    assert reader.hear() == 3


@kinds
def test_memory_is_given_back_with_the_last_view(kind, on_gpu):
    owner, reader = on_gpu(OWNER, kind), on_gpu(READER, kind)
    reader.do("lease = policy.read(); kept = lease['w0']; lease.release(); del lease; policy.close()")
    with raises("MappingTimeout") as caught:
        owner.do("policy.close(timeout=0.2)")
    assert str(reader.pid) in caught.value.holder
    reader.do("del kept; settle()")
    owner.do("policy.close(timeout=10)")


@pytest.mark.parametrize("opened", [True, False])
def test_points_of_work_outlive_the_agent(opened, on_gpu, gpu_agent, start_gpu_agent):
    """Read before the agent died, and still being read: the owner waits through the next agent, for the work or for
    its process's end."""
    owner, reader = on_gpu(SIDE_STREAM + OWNER), on_gpu(SIDE_STREAM + READER)
    reader.do("with policy.read() as lease:\n    gate.shut()\n    seen[:1].copy_(lease['w0'][-1:])\ndel lease")
    owner.do("with policy.update():\n    weights['w0'].fill_(1)")
    until_released()
    gpu_agent.kill(signal.SIGKILL)
    gpu_agent.process.wait(60)
    start_gpu_agent()
    owner.do("client.subscribe('policy', timeout=20).close()")
    assert not owner.do("idle()")
    if opened:
        reader.do("gate.open()")
    else:
        reader.kill()
    assert owner.do("drained(), weights['w0'][-1].item()") == (True, 1)
    if opened:
        assert reader.do("drained(), seen[0].item()") == (True, 0)


# -- devices and users -------------------------------------------------------------------------------------------

CONTEXTS = """
from cuda.bindings import driver

def contexts():
    'On how many devices this process has a primary context: (of the first, of all).'
    driver.cuInit(0)
    status, count = driver.cuDeviceGetCount()
    states = [driver.cuDevicePrimaryCtxGetState(number) for number in range(count)]
    if any(int(state[0]) for state in states):
        raise RuntimeError(f"cuDevicePrimaryCtxGetState gave {states}")
    return int(states[0][2]), sum(int(state[2]) for state in states)
"""


def test_no_context_before_the_first_tensor(start_gpu_agent, start_gpu_worker, watch):
    before = watch.used()
    start_gpu_agent()
    worker = start_gpu_worker()
    worker.do(CONNECT + CONTEXTS)
    assert worker.do("contexts()") == (0, 0)
    assert watch.used() - before < 16 * MIB  # nor has the agent one
    worker.do(GPU)
    assert worker.do("contexts()")[1] == 1
    assert watch.used() - before > 16 * MIB


def test_no_context_on_a_foreign_device(start_gpu_agent, start_gpu_worker, watch):
    count = start_gpu_worker().do("torch.cuda.device_count()")
    if count < 2:
        pytest.skip("one GPU only")
    start_gpu_agent(f"cuda:{count - 1}")
    before = watch.used()  # of the first device
    owner, reader = start_gpu_worker(), start_gpu_worker()
    owner.do(CONNECT + GPU + OWNER + CONTEXTS)
    reader.do(CONNECT + GPU + READER + CONTEXTS)
    assert (owner.do("contexts()"), reader.do("contexts()")) == ((0, 1), (0, 1))
    assert watch.used() - before < 16 * MIB


def test_an_ordinary_user_shares_virtual_memory(runtime, tmp_path, monkeypatch):
    """torch's own way needs ``pidfd_getfd``, and so ``CAP_SYS_PTRACE`` where Yama forbids tracing; etha's does not."""
    prefix = AS_NOBODY if os.getuid() == 0 else ()
    monkeypatch.setenv("HOME", str(runtime))
    monkeypatch.setenv("TMPDIR", str(runtime))
    environment = environment_of("fd")
    if prefix:
        os.chown(runtime, NOBODY, NOBODY)
        program = "import etha, lmdb, msgspec, torch; torch.zeros(1, device='cuda')"
        command = [*prefix, sys.executable, "-c", program]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        if ran.returncode:
            pytest.skip(f"user {NOBODY} cannot use torch and etha here: {ran.stderr.strip().splitlines()[-1:]}")

    class TheirAgent(Agent):
        command = (*prefix, *Agent.command)

    agent = TheirAgent(environment, tmp_path, "--device", "cuda:0")
    owner, reader = (SpawnedWorker(environment, tmp_path, prefix) for _ in range(2))
    try:
        owner.do(CONNECT + GPU + OWNER)
        reader.do(CONNECT + GPU + READER)
        capabilities = "int(re.search(r'CapEff:\\s*(\\w+)', Path('/proc/self/status').read_text())[1], 16)"
        for worker in (owner, reader):
            found = worker.do(f"import re\n(os.getuid() == 0, {capabilities} >> 19 & 1)")  # CAP_SYS_PTRACE
            assert found == (False, 0)
        owner.do("with policy.update(): weights['w0'].fill_(4)")
        assert reader.do("with policy.read(min_version=1) as lease: found = lease['w0'][-1].item()\nfound") == 4
    finally:
        owner.destroy()
        reader.destroy()
        agent.stop()
        for left in [path for path in runtime.iterdir() if path.is_dir()]:  # a cache of CUDA's, in HOME
            subprocess.run(["rm", "-r", str(left)], check=True)
    assert agent.errors.read_text() == ""


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        dict.fromkeys(SETTINGS, "backend:cudaMallocAsync"),
        {**dict.fromkeys(SETTINGS, SEGMENTS), "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC": "0"},
    ],
    ids=["cudaMallocAsync", "segments without handles"],
)
def test_what_the_allocator_made_unshareable_is_refused_by_name(changed, gpu_agent, tmp_path):
    worker = SpawnedWorker({**os.environ, **changed}, tmp_path)
    try:
        worker.do(CONNECT + GPU)
        with raises("NotShareable", "w0"):
            worker.do(OWNER)
    finally:
        worker.destroy()


@pytest.mark.parametrize(
    "made",
    ["torch.ones(3)", "torch.ones(3).share_memory_()", "torch.ones(3).pin_memory()", "object()"],
)
def test_what_lies_elsewhere_is_refused_by_name(made, on_gpu):
    worker = on_gpu()
    with raises("NotShareable", "elsewhere"):
        worker.do(f"client.register_tensors('refused', {{'good': seen, 'elsewhere': {made}}})")
    worker.do("client.register_tensors('refused', {'good': seen}).close()")


@cupy
def test_managed_memory_is_refused_by_name(on_gpu):
    worker = on_gpu("""
import cupy
memory = cupy.cuda.malloc_managed(4096)
array = cupy.ndarray((512,), dtype=cupy.int64, memptr=memory)
""")
    for value in ("array", "torch.as_tensor(array, device=device)"):
        with raises("NotShareable", "managed"):
            worker.do(f"client.register_tensors('refused', {{'managed': {value}}})")


# -- beside other libraries, and graphs --------------------------------------------------------------------------


@cupy
@kinds
def test_a_lease_is_read_by_cupy_in_place(kind, on_gpu):
    owner, reader = on_gpu(OWNER, kind), on_gpu(READER + "import cupy\n", kind)
    owner.do("with policy.update():\n    weights['w0'].fill_(6)")
    assert reader.do("""
with policy.read(min_version=1) as lease:
    tensor = lease["w0"]
    arrays = cupy.from_dlpack(tensor), cupy.asarray(tensor)
    found = [(array.data.ptr == tensor.data_ptr(), int(array[-1])) for array in arrays]
del lease, tensor, arrays
found
""") == [(True, 6), (True, 6)]


@cupy
def test_a_cupy_array_is_shared_in_place(on_gpu):
    owner = on_gpu("""
import cupy
array = cupy.zeros(1024, dtype=cupy.int64)
shared = client.register_tensors("array", {"a": array})
array[:] = 5
shared.publish()
""")
    reader = on_gpu("found = client.subscribe('array')")
    assert reader.do("lease = found.read(min_version=1); set(lease['a'].tolist())") == {5}
    owner.do("array[:] = 6; cupy.cuda.Device().synchronize()")
    assert reader.do("set(lease['a'].tolist())") == {6}


def test_nothing_of_the_bus_while_capturing_and_the_capture_is_whole(on_gpu):
    owner, reader = on_gpu(OWNER), on_gpu(READER)
    reader.do("lease = policy.read()")
    calls = {
        owner: ("policy.publish", "policy.update().__enter__", "lambda: client.register_tensors('x', weights)"),
        reader: ("policy.read", "lease.release"),
    }
    for worker, refused in calls.items():
        found = worker.do(f"""
graph, kinds, count = torch.cuda.CUDAGraph(), [], torch.zeros(8, dtype=torch.int64, device=device)
with torch.cuda.graph(graph):
    count.add_(1)
    for call in ({", ".join(refused)},):
        try:
            call()
            kinds.append("served")
        except etha.EthaError as error:
            kinds.append(type(error).__name__)
    count.add_(1)
graph.replay()
torch.cuda.synchronize()
kinds, count[0].item()
""")
        assert found == (["StreamCapturing"] * len(refused), 2)
    assert owner.do("policy.version") == 0
    reader.do("lease['w0'][0].item(); lease.release()")
    owner.do("with policy.update(timeout=10): pass")
    assert reader.do("policy.read(version=1).version") == 1


@kinds
def test_a_captured_graph_reads_each_version_at_the_same_address(kind, on_gpu):
    owner, reader = on_gpu(OWNER, kind), on_gpu(READER, kind)
    reader.do("""
out, graph = torch.zeros(8, dtype=torch.int64, device=device), torch.cuda.CUDAGraph()
with policy.read() as lease:
    source, place = lease["w0"], lease["w0"].data_ptr()
    out.copy_(source[-8:])
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out.copy_(source[-8:])
del lease
""")
    for version in (1, 2):
        owner.do(f"with policy.update():\n    weights['w0'].fill_({version + 10})")
        assert reader.do(f"""
with policy.read(min_version={version}) as lease:
    same = lease["w0"].data_ptr() == place
    graph.replay()
    found = same, out.tolist()
del lease
found
""") == (True, [version + 10] * 8)


# -- the examples ------------------------------------------------------------------------------------------------


def test_the_examples_run_unchanged(gpu_agent, runtime, tmp_path):
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("the examples need scikit-learn")
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    programs = [["examples/live_eval.py"], ["examples/train_and_publish.py", "300"]]
    started = [
        subprocess.Popen([sys.executable, *program], cwd=root, env=environment, stdout=-1, stderr=-1, text=True)
        for program in programs
    ]
    try:
        for process in reversed(started):
            said, complaint = process.communicate(timeout=120)
            assert process.returncode == 0, complaint
    finally:
        for process in started:
            process.kill()
            process.communicate()
    last = said.splitlines()[-2:]
    assert last[1] == "the trainer has closed its publication"
    assert float(last[0].rpartition(" ")[2]) > 0.9
