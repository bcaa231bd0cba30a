"""`TensorBusClient` and what is made of it: ends, names, limits, threads."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
from harness import Raised


def raises(kind: str) -> AbstractContextManager:
    return pytest.raises(Raised, match=f"^{kind}:")


@pytest.mark.parametrize("name", ["None", "''", "'x' * 300", r"'\ud800'", "7"])
@pytest.mark.parametrize("call", ["client.subscribe(%s, timeout=0)", "client.register_tensors(%s, {'x': x})"])
def test_what_is_no_name_is_refused_and_the_client_lives(owner, name: str, call: str):
    owner.do("x = torch.zeros(2).share_memory_()")
    with raises("InvalidArgument"):
        owner.do(call % name)
    owner.do("policy.publish()")


def test_a_closed_client_is_closed_though_its_tensors_are_kept(owner, reader):
    reader.do("with policy.read() as w: kept = w['weights']")
    reader.do("client.close(); client.close()")
    with raises("ClientClosed"):
        reader.do("client.subscribe('policy')")
    with raises("LeaseReleased"):
        reader.do("policy.read()")
    assert reader.do("kept.sum().item()") == 0.0


def test_closing_gives_the_memory_back(owner, reader):
    reader.do("policy.close()")
    assert owner.do("""
import weakref
seen = weakref.ref(weights)
policy.close(timeout=5)
del weights
gc.collect()
seen() is None
""")


def test_a_client_closes_quietly_when_its_agent_is_dead(agent, owner, reader):
    agent.kill()
    agent.process.wait()
    for worker in (owner, reader):
        worker.do("client.close(timeout=0.5)")  # so long it waits for a successor
        with raises("ClientClosed"):
            worker.do("client.subscribe('policy')")


def test_a_check_does_not_vouch_for_what_it_cannot_know(agent, owner, reader):
    owner.do("other = torch.zeros(4).share_memory_(); left, _ = bootstrap_client()")
    reader.do("client, _ = bootstrap_client(connection_timeout=1); policy = client.subscribe('policy')")
    reader.do("first = policy.read(); first.check()")
    owner.do("left.register_tensors('other', {'x': other}); None")
    reader.do("other = client.subscribe('other'); second = other.read(); second.check()")
    with raises("KeyError"):
        owner.do("with left: raise KeyError")
    with raises("PublicationClosed"):
        reader.do("other.read(min_version=1)")
    with raises("TornError"):
        reader.do("second.check()")
    reader.do("first.check()")
    agent.kill()
    agent.process.wait()
    with raises("AgentGone"):
        reader.do("first.check()")


def test_an_update_whose_end_could_not_be_told_is_told_by_the_next_call(owner, reader):
    owner.do("""
held = threading.Event()
done = threading.Event()
turn = client._link.queue._turn
def hold():
    turn.during(lambda: held.set() or done.wait(60), time.clock_gettime(time.CLOCK_BOOTTIME) + 60)
thread = threading.Thread(target=hold)
client._link.patience = 0.1
update = policy.update()
update.__enter__()
thread.start()
held.wait(60); None
""")
    with raises("AgentTimeout"):
        owner.do("update.__exit__(None, None, None)")
    owner.do("done.set(); thread.join(); client._link.patience = 30.0")
    assert owner.do("policy.publish()") == 1
    assert reader.do("with policy.read(timeout=5) as w: v = w.version\nv") == 1
    owner.do("with policy.update(timeout=5): pass")


def test_versions_are_bounded(owner, reader):
    for call in ("policy.read(min_version=2**64)", "policy.read(version=2**63)"):
        with raises("InvalidArgument"):
            reader.do(call)
    with raises("InvalidArgument"):
        owner.do("policy.publish(2**63)")


def test_a_reader_out_of_descriptors_is_told_so_and_goes_on(owner, reader):
    owner.do("many = {str(i): torch.ones(3).share_memory_() for i in range(400)}")
    owner.do("p = client.register_tensors('many', many)")
    reader.do("""
import resource
used = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (used + 100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
""")
    with raises("SystemLimit") as caught:
        reader.do("client.subscribe('many', timeout=5)")
    assert caught.value.resource == "RLIMIT_NOFILE"
    assert reader.do("with policy.read() as w: v = w.version\nv") == 0
    assert reader.do("len(os.listdir('/proc/self/fd')) - used") <= 1
    reader.do("resource.setrlimit(resource.RLIMIT_NOFILE, (2000,) + resource.getrlimit(resource.RLIMIT_NOFILE)[1:])")
    assert reader.do("s = client.subscribe('many')\nwith s.read() as w: v = len(w)\nv") == 400


def test_paths_of_two_agents_are_not_taken_for_one(start_agent, start_worker, runtime):
    start_agent()
    start_agent("--rank", "1")
    worker = start_worker(connect=False)
    with raises("InvalidArgument"):
        worker.do(f"TensorBusClient(0, '{runtime}/agent_rank0_command.lmdb', '{runtime}/agent_rank1_state.lmdb')")


def test_subscriptions_come_and_go_in_many_threads(owner, reader):
    reader.do("""
failures = []
def churn():
    try:
        for _ in range(40):
            s = client.subscribe("policy")
            with s.read() as w:
                w["weights"][0].item()
            del s, w
    except BaseException as error:
        failures.append(repr(error))
threads = [threading.Thread(target=churn) for _ in range(12)]
for t in threads: t.start()
for t in threads: t.join()
""")
    assert reader.do("failures") == []
    reader.do("policy.close(); gc.collect(); client.subscribe('policy').close()")
    assert owner.do("policy.readers()") is None or owner.do("len(policy.readers())") == 0
    owner.do("policy.close(timeout=5)")


def test_a_client_that_is_dropped_is_gone_with_the_next_call_and_waits_for_no_collection(agent, start_worker):
    owner = start_worker(setup="x = torch.zeros(8).share_memory_(); p = client.register_tensors('x', {'x': x})")
    reader = start_worker(setup="gc.disable(); s = client.subscribe('x'); s.read().release(); del s")
    reader.do("del client; client, _ = bootstrap_client()")
    owner.do("p.close(timeout=5)")
    assert reader.do("client.close()") is None
