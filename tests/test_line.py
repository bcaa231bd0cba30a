"""`etha.tensor_bus.line`: what a client says to its agent's successor, and how it comes to say it."""

from __future__ import annotations

import signal

import pytest
from harness import Raised, Worker


def raises(kind: str):
    return pytest.raises(Raised, match=f"^{kind}:")


@pytest.fixture
def kill(agent):
    """SIGKILL the agent."""

    def kill() -> None:
        agent.kill()
        agent.process.wait()

    return kill


def test_an_update_that_is_over_is_no_claim_any_more(owner: Worker, reader: Worker, kill, start_agent):
    """Else a client would name every update of its life to each successor, and those would be too many for a socket."""
    before = owner.do("len(client.connection.claims)")
    owner.do("for _ in range(20):\n    with policy.update(): pass")
    owner.do("try:\n    with policy.update(): 1 / 0\nexcept ZeroDivisionError: pass")
    assert owner.do("len(client.connection.claims)") == before
    kill()
    start_agent()
    with raises("TornError"):
        reader.do("policy.read(timeout=20)")
    owner.do("with policy.update(): pass")


def test_an_update_that_ends_half_way_without_an_agent_is_torn(owner: Worker, reader: Worker, kill, start_agent):
    """It stays a claim until the queue says how it ended: one that is not named counts as never written in."""
    owner.do("update = policy.update(); update.__enter__(); weights.fill_(7); None")
    kill()
    owner.do("update.__exit__(ValueError, ValueError(), None)")
    assert owner.do("len(client.connection.claims)") == 0
    start_agent()
    with raises("TornError"):
        reader.do("policy.read(timeout=20)")


def test_a_bell_that_is_first_asked_for_without_an_agent(owner: Worker, reader: Worker, kill, start_agent):
    """Its pipe is made anew for the successor: the number of the first one is nobody's, or another file's, by then."""
    kill()
    reader.say("fd = policy.fileno()")
    agent = start_agent()
    reader.hear()
    assert reader.do("select.select([fd], [], [], 0)[0]") == []
    owner.do("with policy.update(): pass")
    assert reader.do("bool(select.select([fd], [], [], 30)[0])") is True
    assert agent.errors.read_text() == ""  # another descriptor than a pipe's would have been refused, and said


def test_a_failure_that_was_told_is_not_told_again(owner: Worker, kill, start_agent):
    owner.do("lease = client.subscribe('policy').read()")
    with raises("DeadlockError"):
        owner.do("policy.close(timeout=20)")
    kill()
    start_agent()
    owner.do("client.subscribe('policy').close()")  # it has come back, and heard what its successor has to say
    owner.do("policy.readers()")


def test_a_client_that_is_closed_while_it_comes_back_holds_nothing(owner: Worker, reader: Worker, kill, start_agent):
    """Its goodbye comes behind what the other thread says that it holds."""
    reader.do("""
from etha.tensor_bus.line import Line
closing = threading.Thread(target=client.close)
beginning = Line._beginning
def late(line):
    Line._beginning = beginning
    yield from list(beginning(line))
    closing.start()
    closing.join(0.5)
Line._beginning = late
""")
    kill()
    start_agent()
    with raises("ClientClosed|LeaseReleased"):
        reader.do("policy.read(timeout=20)")
    reader.do("closing.join()")
    owner.do("policy.close(timeout=5)")


def test_an_interrupt_of_a_failed_attempt_does_not_end_all_attempts(owner: Worker, reader: Worker, kill, start_agent):
    reader.do("""
from etha.tensor_bus.channel import Channel
from etha.tensor_bus.line import Line
swap, close = Line._swap, Channel.close
def fail(line, made):
    Line._swap, Channel.close = swap, interrupted
    raise etha.errors.AgentGone("it is gone again")
def interrupted(channel):
    Channel.close = close
    raise KeyboardInterrupt
Line._swap = fail
""")
    kill()
    start_agent()
    with raises("KeyboardInterrupt"):
        reader.do("policy.read(timeout=20)")
    reader.do("policy.read(timeout=20).release()")


NARROW = """
import socket
from etha.tensor_bus.line import Line
dial, attempts = client.connection._dial, []
def narrow(client):
    channel = dial(client)
    channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    attempts.append(channel)
    return channel
client.connection._dial = narrow
many = [client.subscribe('policy') for _ in range(150)]
waiting = select.epoll()
for each in many: waiting.register(each.fileno(), select.EPOLLIN)
"""


def test_what_the_socket_has_no_room_for_goes_on_in_the_next_attempt(owner: Worker, reader: Worker, kill, start_agent):
    """One packet fits at a time, or a few: whoever began anew each time would never come to the end."""
    reader.do(NARROW)
    kill()
    agent = start_agent()
    reader.do("policy.read(timeout=20).release()")
    assert reader.do("len(attempts)") == 1
    assert reader.do("waiting.poll(0)") == []
    owner.do("with policy.update(): pass")
    assert (
        reader.do("""
rung = set()
until = time.monotonic() + 30
while len(rung) < len(many) and time.monotonic() < until:
    for fd, _ in waiting.poll(1): rung.add(fd); waiting.unregister(fd)
len(rung)
""")
        == 150
    )
    agent.kill()
    assert reader.do("for each in many[:3]: waiting.register(each.fileno(), select.EPOLLIN)\nlen(waiting.poll(30))") > 0


SOCKETS = """
def sockets():
    opened = [each.path for each in os.scandir("/proc/self/fd")]
    return sum(os.path.lexists(path) and os.readlink(path).startswith("socket:") for path in opened)
"""


def test_a_client_that_is_closed_in_the_middle_of_its_beginning(owner: Worker, reader: Worker, kill, start_agent):
    reader.do(SOCKETS)
    before = reader.do("sockets()")
    reader.do(NARROW)
    kill()
    agent = start_agent()
    agent.kill(signal.SIGSTOP)
    with raises("AgentGone"):
        reader.do("policy.read(timeout=0.2)")
    reader.do("client.close()")
    assert reader.do("(len(attempts), sockets())") == (1, before - 1)
    agent.kill(signal.SIGCONT)
    owner.do("policy.close(timeout=20)")
