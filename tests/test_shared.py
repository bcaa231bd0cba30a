"""`etha.tensor_bus.shared`: what owners do to their parameters, without and with rebind, suspend and resume."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import gates
import pytest
from harness import Agent, Raised, Worker

OWNER = """
net = torch.nn.Linear(256, 128).share_memory()
for p in net.parameters():
    p.data.fill_(1.0)
policy = client.register_tensors("policy", dict(net.named_parameters()))
"""
NEXT = "with policy.read(min_version=1, timeout=20) as w: v = (w.version, w['weight'][3, 4].item())\nv"
VALUE = "with policy.read(timeout=20) as w: v = (w.version, w['weight'][3, 4].item())\nv"


def raises(kind: str) -> AbstractContextManager:
    return pytest.raises(Raised, match=f"^{kind}:")


@pytest.fixture
def owner(agent: Agent, start_worker: Callable[..., Worker]) -> Worker:
    return start_worker(setup=OWNER)


CHANGES = {
    "param.data": "net.weight.data = torch.full((128, 256), 2.0).share_memory_()",
    "assign": """
state = {name: torch.full_like(t, 2.0).share_memory_() for name, t in net.state_dict().items()}
net.load_state_dict(state, assign=True)
""",
    "module.to": "net.to(torch.float64); net.to(torch.float32); net.share_memory()\nnet.weight.data.fill_(2.0)",
    "resize_": "net.weight.untyped_storage().resize_(0)",
}
AFTER = {"resize_": "net.weight.data = torch.full((128, 256), 2.0).share_memory_()"}
"""``resize_`` back to a size ends the process in torch 2.13, if the storage is shared CPU memory."""


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_and_rebound(owner: Worker, reader: Worker, change: str):
    assert reader.do(VALUE) == (0, 1.0)
    owner.do(CHANGES[change])
    with raises("StorageMoved") as caught:
        owner.do("policy.publish()")
    assert caught.value.resource == "weight"
    owner.do(AFTER.get(change, ""))
    owner.do("policy.rebind(dict(net.named_parameters()))")
    assert owner.do("policy.version") == 1
    assert reader.do(NEXT) == (1, 2.0)
    owner.do("with policy.update():\n    with torch.no_grad(): net.weight.fill_(3.0)")
    assert reader.do(VALUE) == (2, 3.0)
    reader.do("policy.close()")
    owner.do("policy.close(timeout=20)")


def test_a_rebinding_within_an_update_is_its_version(owner: Worker, reader: Worker):
    reader.do(VALUE)
    owner.do("""
with policy.update():
    net.weight.data = torch.full((128, 256), 2.0).share_memory_()
    policy.rebind(dict(net.named_parameters()))
""")
    assert owner.do("policy.version") == 1
    assert reader.do(NEXT) == (1, 2.0)


def test_what_was_before_stays_until_its_readers_have_moved(owner: Worker, reader: Worker):
    reader.do("with policy.read() as w: kept = w['weight']")
    owner.do(
        "net.weight.data = torch.full((128, 256), 2.0).share_memory_(); policy.rebind(dict(net.named_parameters()))"
    )
    assert owner.do("len(policy._shared._retired)") == 1
    assert reader.do(VALUE) == (1, 2.0)
    assert reader.do("kept[3, 4].item()") == 1.0
    owner.do("with policy.update(): pass")
    assert owner.do("len(policy._shared._retired)") == 1
    reader.do("del kept, w; gc.collect()\n" + VALUE)
    owner.do("with policy.update(): pass")
    assert owner.do("len(policy._shared._retired)") == 0


def test_only_the_same_tensors_are_rebound(owner: Worker, reader: Worker):
    for tensors, culprit in (
        ("{'weight': net.weight}", "bias"),
        ("{**dict(net.named_parameters()), 'more': net.bias}", "more"),
        ("{'weight': net.weight, 'bias': torch.zeros(5).share_memory_()}", "bias"),
        ("{'weight': net.weight, 'bias': torch.zeros(128).double().share_memory_()}", "bias"),
    ):
        with raises("InvalidArgument") as caught:
            owner.do(f"policy.rebind({tensors})")
        assert caught.value.resource == culprit
    with raises("NotShareable"):
        owner.do("policy.rebind({'weight': net.weight, 'bias': torch.zeros(128)})")
    assert owner.do("policy.publish()") == 1
    assert reader.do(NEXT) == (1, 1.0)


SUSPEND = "policy.suspend(timeout=%s)"


def test_suspended_and_resumed_with_a_reader_in_its_wait(owner: Worker, reader: Worker):
    reader.do(VALUE)
    reader.say("with policy.read(min_version=1, timeout=50) as w: v = (w.version, w['weight'][3, 4].item())\nv")
    owner.do(SUSPEND % 20)
    with raises("InvalidArgument"):
        owner.do("policy.publish()")
    with raises("InvalidArgument"):
        owner.do("with policy.update(): pass")
    owner.do("net.weight.data = torch.full((128, 256), 2.0).share_memory_()")
    assert not reader.heard()
    owner.do("policy.resume()")
    assert reader.hear() == (1, 2.0)
    owner.do("with policy.update():\n    with torch.no_grad(): net.weight.fill_(3.0)")
    assert reader.do(VALUE) == (2, 3.0)


MAPPED = (
    "sum(int(line.split()[4]) in inodes for line in open('/proc/self/maps') if '/torch_' in line or 'memfd' in line)"
)


def test_suspending_frees_the_memory(owner: Worker, reader: Worker, agent: Agent):
    """No process has it mapped any more, and the owner can give it back."""
    inode = owner.do("os.fstat(net.weight.untyped_storage()._share_fd_cpu_()[0]).st_ino")

    def maps(pid: int) -> int:
        with open(f"/proc/{pid}/maps") as lines:
            return sum(line.split()[4] == str(inode) for line in lines)

    reader.do(VALUE)
    everyone = (owner.pid, reader.pid, agent.pid)
    assert [maps(pid) for pid in everyone] == [1, 1, 1]
    reader.say("policy.read(min_version=1, timeout=50).version")
    owner.do(SUSPEND % 20)
    assert [maps(pid) for pid in everyone] == [1, 0, 0]
    owner.do("spare = {n: p.detach().clone() for n, p in net.named_parameters()}; net.to('meta'); gc.collect()")
    assert [maps(pid) for pid in everyone] == [0, 0, 0]
    assert owner.do("[p.device.type for p in net.parameters()]") == ["meta", "meta"]
    with raises("NotShareable"):
        owner.do("policy.resume(dict(net.named_parameters()))")
    owner.do("back = {n: t.share_memory_() for n, t in spare.items()}; net.load_state_dict(back, assign=True)")
    owner.do("policy.resume(dict(net.named_parameters()))")
    assert reader.hear() == 1


def test_a_view_that_is_kept_is_named_and_nothing_has_changed(owner: Worker, reader: Worker):
    reader.do("with policy.read() as w: kept = w['weight']")
    with raises("MappingTimeout") as caught:
        owner.do(SUSPEND % 0.3)
    assert f"pid {reader.pid}" in caught.value.holder
    assert owner.do("policy.publish()") == 1
    assert reader.do(NEXT) == (1, 1.0)
    with raises("MappingTimeout"):
        owner.do(SUSPEND % 0.3)
    reader.do("del kept, w; gc.collect()")
    reader.say("policy.read(min_version=2, timeout=50).version")
    owner.do(SUSPEND % 20)
    owner.do("policy.resume()")
    assert reader.hear() == 2


def test_a_reader_that_is_woken_unmaps(owner: Worker, reader: Worker):
    reader.do("fd = policy.fileno()")
    owner.say(SUSPEND % 30)
    assert reader.do("bool(select.select([fd], [], [], 30)[0])") is True
    with raises("LeaseTimeout"):
        reader.do("policy.read(timeout=0)")
    owner.hear()
    with raises("LeaseTimeout"):
        reader.do("policy.read(timeout=0)")
    assert reader.do("select.select([fd], [], [], 0)[0]") == []
    owner.do("policy.resume()")
    assert reader.do("bool(select.select([fd], [], [], 30)[0])") is True
    assert reader.do(VALUE) == (1, 1.0)
    owner.do("with policy.update(): pass")
    assert reader.do("bool(select.select([fd], [], [], 30)[0])") is True


def test_who_subscribes_while_it_is_suspended_waits(owner: Worker, start_worker: Callable[..., Worker]):
    owner.do(SUSPEND % 20)
    other = start_worker()
    with raises("NoPublication") as caught:
        other.do("client.subscribe('policy', timeout=0.2)")
    assert (caught.value.resource, f"pid {owner.pid}" in (caught.value.holder or "")) == ("policy", True)
    other.say("policy = client.subscribe('policy', timeout=50)\n" + VALUE)
    owner.do("policy.resume()")
    assert other.hear() == (1, 1.0)


def test_closed_or_dead_while_it_is_suspended(owner: Worker, reader: Worker, start_worker: Callable[..., Worker]):
    reader.say("policy.read(min_version=9, timeout=50)")
    owner.do(SUSPEND % 20)
    owner.do("policy.close(timeout=20)")
    with raises("PublicationClosed"):
        reader.hear()
    owner.do(OWNER)
    reader.do("policy = client.subscribe('policy', timeout=20)")
    reader.say("policy.read(min_version=9, timeout=50)")
    owner.do(SUSPEND % 20)
    owner.kill()
    with raises("OwnerDiedError"):
        reader.hear()


def test_a_tensor_that_was_dropped_must_be_given(owner: Worker):
    owner.do(SUSPEND % 20)
    owner.do("net.weight = torch.nn.Parameter(torch.full((128, 256), 2.0).share_memory_()); gc.collect()")
    with raises("InvalidArgument") as caught:
        owner.do("policy.resume()")
    assert caught.value.resource == "weight"
    owner.do("policy.resume(dict(net.named_parameters()))")
    with raises("InvalidArgument"):
        owner.do("policy.resume()")


@pytest.mark.parametrize("moment", ["suspended", "rebound"])
def test_an_agent_that_follows_knows_where_it_lies(owner: Worker, reader: Worker, agent, start_agent, moment: str):
    reader.do(VALUE)
    if moment == "suspended":
        reader.say("with policy.read(min_version=1, timeout=50) as w: v = (w.version, w['weight'][3, 4].item())\nv")
        owner.do(SUSPEND % 20)
    move = "net.weight.data = torch.full((128, 256), 2.0).share_memory_()"
    if moment == "rebound":
        owner.do(f"{move}; policy.rebind(dict(net.named_parameters()))")
    agent.kill()
    agent.process.wait()
    start_agent()
    if moment == "suspended":
        owner.do(f"{move}; policy.resume()")
        assert reader.hear() == (1, 2.0)
    else:
        assert reader.do(VALUE) == (1, 2.0)
        owner.do("with policy.update(): pass")
        assert reader.do(VALUE) == (2, 2.0)


LOSE = """
outcome = client._link.outcome
def lost(*arguments):
    client._link.outcome = outcome
    outcome(*arguments)
    raise etha.errors.AgentTimeout("the agent was killed when it had done it and not said so")
client._link.outcome = lost
"""


def test_a_suspending_of_unknown_outcome_is_made_whole_by_resume(owner: Worker, agent: Agent):
    """The agent has no descriptors any more, of what stayed where it was either."""
    owner.do(LOSE)
    with raises("AgentTimeout"):
        owner.do(SUSPEND % 20)
    with raises("InvalidArgument"):
        owner.do("policy.publish()")
    owner.do("policy.resume(timeout=10)")
    assert owner.do("fresh = client.subscribe('policy', timeout=10)\nwith fresh.read() as w: v = w.version\nv") == 1


def test_a_rebinding_of_unknown_outcome_publishes_nothing(owner: Worker, reader: Worker):
    assert reader.do(VALUE) == (0, 1.0)
    owner.do("before = net.weight.data; net.weight.data = torch.full((128, 256), 2.0).share_memory_()\n" + LOSE)
    with raises("AgentTimeout"):
        owner.do("policy.rebind(dict(net.named_parameters()))")
    for _ in range(2):
        with raises("StorageMoved"):
            owner.do("policy.publish()")
    with raises("TornError"):
        reader.do(VALUE)
    # Back to what the agent may have, or may not have any more.
    owner.do("net.weight.data = before.fill_(3.0); policy.rebind(dict(net.named_parameters()), timeout=10)")
    assert reader.do(VALUE) == (1, 3.0)
    assert owner.do("len(client._link.exports)") == 1


class Filtered(Agent):
    """It may not take descriptors from an owner, so it has to ask for them."""

    command = (
        sys.executable,
        "-W",
        "error",
        "-c",
        gates.filtered(gates.PIDFD_GETFD) + "import sys; sys.argv[0] = 'etha'; from etha.cli import main; main()",
        "agent",
    )


@pytest.fixture
def start_filtered(runtime: Path, tmp_path: Path) -> Iterator[Callable[[], Agent]]:
    agents: list[Agent] = []

    def start() -> Agent:
        agents.append(Filtered(dict(os.environ), tmp_path))
        return agents[-1]

    yield start
    for agent in agents:
        agent.stop()


LOST = """
from etha.tensor_bus.link import Link
heard = Link.outcome
def lose(*about):
    heard(*about)
    Link.outcome = heard
    raise etha.errors.AgentGone("the agent is gone")
Link.outcome = lose
"""


def test_a_rebinding_whose_outcome_went_with_the_agent_is_answered_for(
    agent: Agent, owner: Worker, reader: Worker, start_worker, start_filtered
):
    """What the successor finds on record is what the owner was never told of: it must have its descriptors still."""
    owner.do(CHANGES["param.data"] + LOST)
    with raises("AgentGone"):
        owner.do("policy.rebind(dict(net.named_parameters()))")
    agent.kill()
    agent.process.wait()
    start_filtered()
    owner.do("policy.readers()")
    fresh = start_worker(setup="policy = client.subscribe('policy', timeout=10)")
    with raises("StorageMoved"):
        owner.do("policy.publish()")
    owner.do("policy.rebind(dict(net.named_parameters()))")
    for worker in (reader, fresh):
        assert worker.do("with policy.read(timeout=20) as w: v = w['weight'][3, 4].item()\nv") == 2.0
        worker.do("policy.close()")
    assert owner.do("len(client._link.exports)") == 1
    assert owner.do("policy.close(timeout=20); len(client._link.exports)") == 0


def test_a_closing_that_fails_leaves_it_suspended(agent: Agent, owner: Worker, reader: Worker):
    """The update in which it was suspended is over by then: a closing waits behind updates."""
    reader.do("policy.read().release(); policy.close()")
    owner.do("policy.suspend(timeout=20)")
    for _ in range(2):
        agent.kill(signal.SIGSTOP)
        with raises("AgentTimeout"):
            owner.do("policy.close(timeout=0.2)")
        agent.kill(signal.SIGCONT)
        for call in ("policy.publish()", "policy.update().__enter__()", "policy.rebind(dict(net.named_parameters()))"):
            with raises("InvalidArgument"):
                owner.do(call)
    owner.do("policy.resume(timeout=20)")
    assert reader.do("policy = client.subscribe('policy', timeout=20)\n" + VALUE) == (1, 1.0)
    reader.do("policy.close()")
    owner.do("policy.suspend(timeout=20)")
    agent.kill(signal.SIGSTOP)
    with raises("AgentTimeout"):
        owner.do("policy.close(timeout=0.2)")
    agent.kill(signal.SIGCONT)
    owner.do("policy.close(timeout=20)")
