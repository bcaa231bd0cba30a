"""`etha.tensor_bus.bootstrap` and `tracer`: from a launcher's environment to a connected client."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Agent

import etha
from etha.errors import InvalidArgument, NoAgent
from etha.tensor_bus import bootstrap, tracer
from etha.tensor_bus.bootstrap import BootstrapInfo, bootstrap_client, setup_ptrace
from etha.tensor_bus.client import TensorBusClient
from etha.tensor_bus.ipc import peer

VARIABLES = ("AGENT_RANK", "LOCAL_RANK", "AGENT_RANK_OFFSET", "RANK")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """One agent for this module, whatever rank is asked for."""
    directory = Path(f"/tmp/etha-bootstrap-{os.getpid()}")
    directory.mkdir(mode=0o700)
    paths = (str(directory / "command.lmdb"), str(directory / "state.lmdb"))
    arguments = ("--command-queue", paths[0], "--state", paths[1])
    agent = Agent(dict(os.environ), tmp_path_factory.mktemp("agent"), *arguments)
    agent.paths = paths
    yield agent
    agent.stop()
    directory.rmdir()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """Sets these of the launcher's variables, and no other."""

    def set_only(**values: str) -> None:
        for variable in VARIABLES:
            monkeypatch.delenv(variable, raising=False)
        for variable, value in values.items():
            monkeypatch.setenv(variable, value)

    set_only()
    return set_only


@pytest.fixture
def authorised(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Whom the kernel was told to let trace this process: what it keeps in its one slot is the last."""
    told: list[int | None] = []
    monkeypatch.setattr(peer, "authorise_tracer", lambda pid: told.append(pid) or True)
    return told


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "rank", "global_rank", "offset"),
    [
        ({"AGENT_RANK": "0"}, 0, 0, None),
        ({"AGENT_RANK": "0", "LOCAL_RANK": "5", "AGENT_RANK_OFFSET": "7"}, 0, 5, None),
        ({"AGENT_RANK": "3", "LOCAL_RANK": "5", "RANK": "9"}, 3, 9, None),
        ({"AGENT_RANK": "3", "LOCAL_RANK": "5", "RANK": "0"}, 3, 0, None),
        ({"AGENT_RANK": "3", "AGENT_RANK_OFFSET": "nonsense"}, 3, 0, None),
        ({"AGENT_RANK": "007"}, 7, 0, None),
        ({"LOCAL_RANK": "0"}, 0, 0, 0),
        ({"LOCAL_RANK": "5"}, 5, 5, 0),
        ({"LOCAL_RANK": "2", "AGENT_RANK_OFFSET": "4"}, 6, 2, 4),
        ({"LOCAL_RANK": "2", "AGENT_RANK_OFFSET": "0", "RANK": "10"}, 2, 10, 0),
    ],
    ids=str,
)
def test_which_agent(
    served: Agent, environment, variables: dict[str, str], rank: int, global_rank: int, offset: int | None
):
    environment(**variables)
    asked = []
    client, info = bootstrap_client(lambda rank: asked.append(rank) or served.paths, connection_timeout=20)
    client.close()
    assert asked == [rank]
    assert info == BootstrapInfo(
        agent_rank=rank,
        global_rank=global_rank,
        rank_offset=offset,
        device="cpu",
        command_queue_path=served.paths[0],
        state_path=served.paths[1],
        method="direct" if offset is None else "offset",
    )
    assert (client.agent_rank, client.agent_pid) == (rank, served.pid)


NO_RANK = ["", " ", "-1", "+1", "1.0", "1 ", "0x1", "one", "1_0", "٣", "²", "9" * 5000]


@pytest.mark.parametrize("value", NO_RANK, ids=lambda value: repr(value[:5]))
@pytest.mark.parametrize("variable", VARIABLES)
def test_what_is_no_rank_is_refused_by_name(environment, variable: str, value: str):
    environment(**({"LOCAL_RANK": "0"} | {variable: value}))
    with pytest.raises(ValueError, match=rf"^{variable}=") as caught:
        bootstrap_client(lambda _: pytest.fail("it asked for an agent"))
    assert isinstance(caught.value, InvalidArgument)
    assert caught.value.resource == variable


@pytest.mark.parametrize("others", [{}, {"RANK": "3"}, {"AGENT_RANK_OFFSET": "3"}], ids=str)
def test_no_rank_at_all(environment, others: dict[str, str]):
    environment(**others)
    with pytest.raises(ValueError, match="AGENT_RANK") as caught:
        bootstrap_client()
    assert caught.value.resource == "AGENT_RANK"
    assert "LOCAL_RANK" in str(caught.value)


def test_the_environment_is_read_at_the_call(runtime: Path, environment):
    for rank in ("4", "0"):
        environment(AGENT_RANK=rank)
        with pytest.raises(ConnectionError) as caught:
            bootstrap_client(connection_timeout=0)
        assert isinstance(caught.value, NoAgent)
        assert caught.value.resource == str(runtime / f"agent_rank{rank}_command.lmdb")


def test_what_it_found_is_seven_fields_and_frozen():
    assert [field.name for field in dataclasses.fields(BootstrapInfo)] == [
        "agent_rank",
        "global_rank",
        "rank_offset",
        "device",
        "command_queue_path",
        "state_path",
        "method",
    ]
    info = BootstrapInfo(0, 0, None, "cpu", "q", "s", "direct")
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.agent_rank = 1


def test_where_the_names_are():
    assert etha.tensor_bus.bootstrap_client is bootstrap_client
    assert etha.tensor_bus.BootstrapInfo is BootstrapInfo
    assert etha.tensor_bus.setup_ptrace is setup_ptrace
    assert bootstrap.logger.name == "etha.tensor_bus.bootstrap"


# -- the tracer's slot -------------------------------------------------------------------------------------------------


@pytest.fixture
def connect(served: Agent, environment):
    environment(AGENT_RANK="0")
    return lambda: bootstrap_client(lambda _: served.paths, connection_timeout=20)[0]


def test_the_agent_alone_may_trace_until_the_client_is_closed(served: Agent, connect, authorised):
    client = connect()
    assert authorised == [served.pid]
    client.close()
    assert authorised == [served.pid, 0]
    client.close()
    assert authorised == [served.pid, 0]


def test_the_last_bootstrap_wins_and_close_clears_only_its_own(served: Agent, connect, authorised):
    first, second = connect(), connect()
    first.close()
    assert authorised == [served.pid] * 2
    third = connect()
    third.close()
    assert authorised == [served.pid] * 3 + [0]
    second.close()
    assert authorised == [served.pid] * 3 + [0]


def test_what_the_user_set_is_not_cleared(served: Agent, connect, authorised, caplog: pytest.LogCaptureFixture):
    client = connect()
    with caplog.at_level(logging.WARNING):
        setup_ptrace(4711)
    assert caplog.records == []
    client.close()
    assert authorised == [served.pid, 4711]


def test_any_tracer_is_said_in_a_warning(authorised, caplog: pytest.LogCaptureFixture):
    setup_ptrace()
    assert authorised == [None]
    assert [(record.levelname, record.name) for record in caplog.records] == [("WARNING", "etha.tensor_bus.bootstrap")]
    assert str(os.getpid()) in caplog.text


def test_a_plain_client_lets_nobody_trace(served: Agent, authorised):
    TensorBusClient(0, *served.paths).close()
    assert authorised == []


def test_a_body_that_raises_clears_the_slot_too(served: Agent, connect, authorised):
    with pytest.raises(ZeroDivisionError), connect():
        1 / 0  # noqa: B018
    assert authorised == [served.pid, 0]


def test_a_kernel_that_refuses_leaves_no_client(connect, monkeypatch: pytest.MonkeyPatch):
    def refuse(pid: int | None) -> bool:
        raise ProcessLookupError(3, "no such process")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(peer, "authorise_tracer", refuse)
    with pytest.raises(ProcessLookupError):
        connect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(peer.yama_scope() is not None, reason="this kernel has Yama")
def test_without_yama_there_is_nothing_to_do(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG):
        slot = tracer.authorise(os.getppid())
        tracer.withdraw(slot)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert "no Yama" in caplog.text


@pytest.mark.skipif(peer.yama_scope() is None, reason="no Yama in this kernel")
def test_with_yama_the_kernel_takes_it():
    assert peer.authorise_tracer(os.getppid())
    assert peer.authorise_tracer(0)
