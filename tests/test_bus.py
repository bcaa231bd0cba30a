"""The bus from outside: what an owner and a reader see of one another."""

from __future__ import annotations

import signal
import time
from contextlib import AbstractContextManager

import pytest
from harness import Raised, Worker


def raises(kind: str) -> AbstractContextManager:
    return pytest.raises(Raised, match=f"^{kind}:")


INODE = """
def inode(tensor):
    for line in open("/proc/self/maps"):
        fields = line.split()
        start, end = (int(part, 16) for part in fields[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return fields[3], fields[4]
"""


def test_a_write_is_seen_in_place_without_a_call(owner: Worker, reader: Worker):
    reader.do("lease = policy.read(); w = lease['weights']")
    owner.do("weights[5] = 42.0")
    assert reader.do("w[5].item()") == 42.0
    for worker in (owner, reader):
        worker.do(INODE)
    assert owner.do("inode(weights)") == reader.do("inode(w)")


def test_versions_are_read_one_by_one(owner: Worker, reader: Worker):
    owner.do("with policy.update() as update: weights.fill_(1)\nupdate.version")
    assert reader.do("with policy.read() as w: v = (w.version, w['weights'].mean().item(), w.guarded)\nv") == (
        1,
        1.0,
        True,
    )
    assert owner.do("policy.publish()") == 2
    assert reader.do("with policy.read(version=2) as w: v = (w.version, w.guarded)\nv") == (2, False)
    with raises("VersionGone"):
        reader.do("policy.read(version=1)")
    with raises("VersionTimeout"):
        reader.do("policy.read(min_version=3, timeout=0.05)")
    owner.do("with policy.update(version=10): pass")
    assert owner.do("policy.version") == 10
    with raises("InvalidArgument"):
        owner.do("policy.publish(version=10)")


def test_an_update_waits_for_the_lease_and_a_read_for_the_update(owner: Worker, reader: Worker):
    reader.do("lease = policy.read()")
    with raises("LeaseTimeout") as caught:
        owner.do("with policy.update(timeout=0): pass")
    assert f"pid {reader.pid}" in caught.value.holder
    owner.say("with policy.update(timeout=30): weights.fill_(7)")
    assert reader.do("select.select([policy.fileno()], [], [], 30)[0] != [] and lease.wanted")
    assert not owner.heard()
    reader.do("lease.release()")
    owner.hear()
    assert reader.do("with policy.read(min_version=1) as w: v = w['weights'][0].item()\nv") == 7.0


def test_revoke_ends_a_lease_and_check_tells(owner: Worker, reader: Worker):
    reader.do("lease = policy.read(); lease.check()")
    owner.do("with policy.update(timeout=0, on_timeout='revoke'): weights.fill_(3)")
    with raises("TornError"):
        reader.do("lease.check()")
    reader.do("lease.release()")
    with raises("LeaseReleased"):
        reader.do("lease['weights']")


def test_an_iteration_skips_what_it_missed_and_ends_with_the_publication(owner: Worker, reader: Worker):
    reader.say("""
seen = []
for lease in policy:
    seen.append((lease.version, lease["weights"][0].item()))
    if lease.version == 0:
        print(repr(("ok", "first")), flush=True)
seen
""")
    assert reader.hear() == "first"
    owner.do("""
for step in range(1, 201):
    with policy.update():
        weights.fill_(step)
policy.close(timeout=20)
""")
    seen = reader.hear()
    versions = [version for version, _ in seen]
    assert versions == sorted(set(versions))
    assert seen[-1] == (200, 200.0)
    assert all(value == version for version, value in seen)
    with raises("PublicationClosed"):
        reader.do("policy.read()")


def test_a_lease_that_is_collected_is_released_with_a_warning(owner: Worker, reader: Worker):
    text = reader.do("""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    policy.read()
    gc.collect()
[str(w.message) for w in caught if w.category is ResourceWarning]
""")
    assert len(text) == 1
    assert "collected" in text[0]
    owner.do("with policy.update(timeout=0): pass")


def test_a_killed_reader_frees_the_waiting_owner(owner: Worker, reader: Worker):
    reader.do("leases = [policy.read() for _ in range(100)]")
    owner.say("with policy.update(timeout=30): pass\ntime.monotonic()")
    assert reader.do("select.select([policy.fileno()], [], [], 30)[0] != []")
    killed = time.monotonic()
    reader.kill()
    assert owner.hear() - killed < 0.5


def test_a_killed_owner_is_told_through_the_bell_and_at_the_next_call(owner: Worker, reader: Worker):
    assert reader.do("lease = policy.read(); select.select([policy.fileno()], [], [], 0)[0] == []")
    reader.say("bool(select.select([policy.fileno()], [], [], 20)[0])")
    owner.kill()
    assert reader.hear() is True
    assert reader.do("lease.check(); lease['weights'].sum().item()") == 0.0
    with raises("OwnerDiedError"):
        reader.do("policy.read()")


def test_an_owner_that_dies_writing_leaves_a_torn_lease(owner: Worker, reader: Worker):
    reader.do("lease = policy.read()")
    owner.say(
        "with policy.update(timeout=0, on_timeout='revoke'): weights.fill_(9); os.kill(os.getpid(), signal.SIGKILL)"
    )
    with raises("OwnerDiedError"):
        reader.do("policy.read(min_version=1)")
    with raises("TornError"):
        reader.do("lease.check()")


def test_a_torn_update_is_told_and_mended(owner: Worker, reader: Worker):
    with raises("ZeroDivisionError"):
        owner.do("with policy.update(): 1/0")
    with raises("TornError"):
        reader.do("policy.read(timeout=5)")
    owner.do("with policy.update(): weights.fill_(2)")
    assert reader.do("with policy.read() as w: v = (w.version, w['weights'][0].item())\nv") == (1, 2.0)


def test_a_dead_agent_fails_its_callers_by_their_deadlines(agent, owner: Worker, reader: Worker):
    """Its successor may come until then; `test_recovery` is about that."""
    reader.do("lease = policy.read()")
    reader.say("policy.read(min_version=1, timeout=0.5)")
    agent.kill()
    agent.process.wait()
    killed = time.monotonic()
    with raises("AgentGone"):
        reader.hear()
    for call in (
        "policy.update(timeout=0.2).__enter__()",
        "client.subscribe('policy', timeout=0.2)",
        "policy.close(0.2)",
    ):
        with raises("AgentGone"):
            owner.do(call)
    assert time.monotonic() - killed < 3.0
    assert owner.do("policy.publish()") == 1
    assert reader.do("lease['weights'].sum().item()") == 0.0


def test_an_update_that_ends_without_an_agent_is_no_error(agent, owner: Worker):
    owner.do("update = policy.update(); update.__enter__(); None")
    agent.kill()
    agent.process.wait()
    owner.do("update.__exit__(None, None, None)")
    assert owner.do("policy.version") == 1


def test_closing_names_who_still_maps_it(owner: Worker, reader: Worker):
    reader.do("with policy.read() as w: kept = w['weights']")
    with raises("MappingTimeout") as caught:
        owner.do("policy.close(timeout=0.1)")
    assert f"pid {reader.pid}" in caught.value.holder
    reader.do("policy.close()")
    with raises("MappingTimeout"):
        owner.do("policy.close(timeout=0.1)")
    assert reader.do("kept.sum().item()") == 0.0
    reader.do("del kept, w; gc.collect(); client.subscribe('policy').close()")
    owner.do("policy.close(timeout=5)")
    with raises("LeaseReleased"):
        owner.do("policy.publish()")


def test_a_view_outlives_its_client_until_it_is_dropped(owner: Worker, reader: Worker):
    reader.do("with policy.read() as w: kept = w['weights']")
    reader.do("client.close()")
    assert reader.do("kept.sum().item()") == 0.0
    with raises("MappingTimeout"):
        owner.do("policy.close(timeout=0.1)")
    reader.do("del kept, w; gc.collect(); client, _ = bootstrap_client()")
    owner.do("policy.close(timeout=5)")


def test_moved_storage_is_noticed(owner: Worker, reader: Worker):
    owner.do("""
net = torch.nn.Linear(4, 4).share_memory()
linear = client.register_tensors("linear", dict(net.named_parameters()))
""")
    owner.do("net.weight.data = torch.zeros(4, 4).share_memory_()")
    with raises("StorageMoved") as caught:
        owner.do("linear.publish()")
    assert caught.value.resource == "weight"
    with raises("StorageMoved"):
        owner.do("with linear.update(): pass")
    assert (
        reader.do("s = client.subscribe('linear')\ntry: s.read()\nexcept etha.errors.TornError as e: r = 'torn'\nr")
        == "torn"
    )


def test_names_are_taken_replaced_and_freed(owner: Worker, reader: Worker):
    with raises("NameTaken") as caught:
        reader.do("client.register_tensors('policy', {'x': torch.zeros(2).share_memory_()})")
    assert f"pid {owner.pid}" in caught.value.holder
    with raises("NameTaken"):
        owner.do("client.register_tensors('policy', {'x': torch.ones(3).share_memory_()})")
    with raises("MappingTimeout"):
        owner.do("client.register_tensors('policy', {'x': torch.ones(3).share_memory_()}, replace=True, timeout=0.2)")
    reader.do("policy.close()")
    owner.do("new = client.register_tensors('policy', {'x': torch.ones(3).share_memory_()}, replace=True, version=5)")
    with raises("StaleHandle"):
        owner.do("with policy.update(): pass")
    owner.do("with new.update(): pass")
    assert reader.do(
        "p = client.subscribe('policy')\nwith p.read() as w: v = (w.version, list(w), w['x'].tolist())\nv"
    ) == (
        6,
        ["x"],
        [1.0, 1.0, 1.0],
    )


def test_copy_into_copies_casts_and_names_what_does_not_fit(owner: Worker, reader: Worker):
    owner.do("""
net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).share_memory()
state = client.register_tensors("net", dict(net.state_dict()))
""")
    reader.do("mine = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double()")
    reader.do("s = client.subscribe('net')")
    reader.do("with s.read() as w: w.copy_into(mine)")
    values = "[p.tolist() for p in %s.float().state_dict().values()]"
    assert reader.do(values % "mine") == owner.do(values % "net")
    reader.do("qkv = torch.zeros(4, 3)\nwith s.read() as w: w.copy_into({'0.weight': qkv[2:]}, names=['0.weight'])")
    assert reader.do("qkv[2:].tolist()") == owner.do("net[0].weight.tolist()")
    for call, name in (
        ("w.copy_into({'0.weight': torch.zeros(3, 3)}, names=['0.weight'])", "0.weight"),
        ("w.copy_into({'0.weight': torch.zeros(2, 3)})", "0.bias"),
        ("w.copy_into({'nothing': torch.zeros(1)}, names=['nothing'])", "nothing"),
    ):
        with raises("InvalidArgument") as caught:
            reader.do(f"with s.read() as w: {call}")
        assert caught.value.resource == name


@pytest.mark.parametrize(
    "call", ["policy.read(timeout=float('nan'))", "policy.read(timeout=-1)", "policy.read(version=-1)"]
)
def test_arguments_out_of_range_are_refused_before_anything_is_asked(owner: Worker, reader: Worker, call: str):
    with raises("InvalidArgument"):
        reader.do(call)


def test_interpreters_end_quietly_whatever_is_still_open(agent, start_worker):
    owner = start_worker(
        setup="weights = torch.zeros(8).share_memory_(); p = client.register_tensors('policy', {'w': weights})"
    )
    reader = start_worker(setup="s = client.subscribe('policy'); lease = s.read(); t = lease['w']; s.fileno()")
    assert reader.end() == 0
    assert owner.end() == 0
    for worker in (reader, owner):
        assert worker.errors.read_text() == ""


def test_an_update_that_was_given_back_is_over_before_what_is_published_next(agent, owner: Worker, reader: Worker):
    """The agent finds both at once, and commands come before packets."""
    owner.do("update = policy.update(); update.__enter__(); None")
    agent.kill(signal.SIGSTOP)
    assert owner.do("update.give_back(); policy.publish()") == 1
    agent.kill(signal.SIGCONT)
    assert reader.do("with policy.read(min_version=1, timeout=5) as w: v = w.version\nv") == 1


def test_an_owner_that_cuts_its_memory_short_does_not_end_the_agent(agent, owner: Worker, reader: Worker):
    """It has the file mapped, and touches no byte of it: who touches one behind the end of a file gets SIGBUS."""
    cut = """
names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
files = [name for name in names if os.path.exists(name) and "/dev/shm/" in os.readlink(name)]
for name in files:
    os.truncate(name, 0)
len(files)
"""
    assert owner.do(cut) == 1
    assert owner.do("policy.publish()") == 1
    with pytest.raises(Raised, match=r"^InvalidRecord"):
        reader.do("client.close(); client, _ = bootstrap_client(); client.subscribe('policy')")
    assert (
        owner.do("other = client.register_tensors('other', {'w': torch.ones(8).share_memory_()}); other.version") == 0
    )
    assert agent.process.poll() is None
    assert agent.errors.read_text() == ""
