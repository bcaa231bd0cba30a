"""``etha inspect``, as a user runs it: beside a real agent, owner and reader."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import msgspec
import pytest
from box import until

from etha.cli.inspect import look_up
from etha.errors import EthaError, InvalidArgument, NoAgent, NoPublication, VersionMismatch
from etha.tensor_bus.ipc.process import boot_id, pid_namespace
from etha.tensor_bus.lockfile import LockText
from etha.tensor_bus.records import SCHEMA

COMMAND = [sys.executable, "-m", "etha", "inspect"]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives capabilities away")


def etha(*arguments: str, status: int = 0, before: tuple[str, ...] = ()) -> str:
    """What it says on stdout, or, where it fails, on stderr alone."""
    command = [*before, *COMMAND, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    assert bool(done.stdout) != (status == 2)
    assert bool(done.stderr) == (status == 2)
    assert "Traceback" not in done.stderr
    return done.stdout or done.stderr


def inspected(*arguments: str, status: int = 0, before: tuple[str, ...] = ()) -> dict:
    return json.loads(etha(*arguments, "--json", status=status, before=before))


TENSORS = """
w = torch.zeros(4, 8).share_memory_()
flat = torch.zeros(64, dtype=torch.bfloat16).share_memory_()
tensors = {"w": w, "tied": w, "wt": w.t(), "head": flat[:16].view(4, 4), "tail": flat[16:],
           "empty": torch.empty(0, 3).share_memory_(), "scalar": torch.tensor(1.0).share_memory_()}
"""


def shared_file(worker, tensor: str) -> tuple[int, int, int]:
    """Device and inode of the file under a worker's tensor, by its own /proc, and the address."""
    return worker.do(f"""
from etha.tensor_bus.ipc.maps import RegionTable, read
found = RegionTable(read()).find({tensor}.data_ptr(), 1)
(found.device, found.inode, {tensor}.data_ptr())
""")


def test_every_allocation_and_tensor_of_a_publication(agent, start_worker):
    owner, reader = start_worker(setup=TENSORS), start_worker()
    owner.do("policy = client.register_tensors('policy', tensors, version=7)")
    reader.do("policy = client.subscribe('policy'); lease = policy.read()")
    found = inspected("policy")
    assert found["agent"]["pid"] == agent.pid
    assert (found["agent"]["rank"], found["agent"]["condition"]) == (0, "serving")
    (view,) = found["publications"]
    assert (view["name"], view["version"], view["phase"], view["guarded"]) == ("policy", 7, "ready", True)
    assert 0 <= view["age_s"] < 60
    tensors = {tensor["name"]: tensor for tensor in view["tensors"]}
    assert list(tensors) == ["w", "tied", "wt", "head", "tail", "empty", "scalar"]
    form = {name: (each["dtype"], each["shape"], each["stride"], each["nbytes"]) for name, each in tensors.items()}
    assert form["w"] == form["tied"] == ("float32", [4, 8], [8, 1], 128)
    assert form["wt"] == ("float32", [8, 4], [1, 8], 128)
    assert form["tail"] == ("bfloat16", [48], [1], 96)
    assert form["scalar"] == ("float32", [], [], 4)
    assert {each["device"] for each in tensors.values()} == {"cpu"}
    assert [name for name, each in tensors.items() if each["tied_to"]] == ["tied"]
    assert tensors["tied"]["tied_to"] == "w"
    assert tensors["w"]["storage"] == tensors["wt"]["storage"] != tensors["head"]["storage"]
    assert view["storages"][tensors["head"]["storage"]]["tensors"] == 2
    assert (tensors["head"]["offset"], tensors["tail"]["offset"]) == (0, 32)
    assert tensors["empty"]["allocation"] is None
    for name in ("w", "flat"):
        device, inode, address = shared_file(owner, name)
        (allocation,) = [each for each in view["allocations"] if (each["device"], each["inode"]) == (device, inode)]
        assert allocation["kind"] == "host"
        assert allocation["nbytes"] == 128
        by_role = {holder["role"]: holder for holder in allocation["holders"]}
        assert by_role["owner"]["pid"] == owner.pid
        assert any(start <= address < end for start, end in by_role["owner"]["mappings"])
        assert by_role["owner"]["descriptors"]
        assert by_role["reader"]["pid"] == reader.pid
        assert len(by_role["reader"]["mappings"]) == 1
        assert by_role["reader"]["descriptors"] == []
    assert (view["owner"]["pid"], view["owner"]["looked"], view["owner"]["gate"]) == (owner.pid, "now", None)
    (them,) = view["readers"]
    assert (them["pid"], them["state"], them["connected"], them["mapped"]) == (reader.pid, "running", True, 3)
    (claim,) = view["claims"]
    assert (claim["kind"], claim["granted"], claim["version"], claim["pid"]) == ("lease", True, 7, reader.pid)
    text = etha("policy")
    for part in ("policy · generation 1 · version 7", f"owner pid {owner.pid}", f"reader pid {reader.pid}", "tied = w"):
        assert part in text


def test_who_waits_is_shown_while_they_wait(owner, reader):
    reader.do("lease = policy.read()")
    owner.say("with policy.update(timeout=60): pass")
    reader.do("select.select([policy.fileno()], [], [], 30)")
    (view,) = inspected("policy")["publications"]
    assert view["wanted"]
    assert {(claim["kind"], claim["granted"]) for claim in view["claims"]} == {("lease", True), ("update", False)}
    reader.do("lease.release()")
    owner.hear()


def test_it_works_from_the_state_alone_when_the_agent_is_stopped_or_dead(agent, owner, reader):
    agent.kill(signal.SIGSTOP)
    assert os.waitpid(agent.pid, os.WUNTRACED)[0] == agent.pid
    assert inspected("policy", status=1)["agent"]["condition"] == "stopped"
    agent.kill(signal.SIGCONT)
    agent.kill()
    agent.process.wait()
    found = inspected("policy", status=1)
    assert found["agent"]["condition"] == "dead"
    (view,) = found["publications"]
    assert {holder["pid"] for holder in view["allocations"][0]["holders"]} == {owner.pid, reader.pid}
    assert "dead" in etha("policy", status=1)


def test_a_stopped_and_a_dead_process_are_told_apart(agent, owner, reader, start_worker):
    reader.kill(signal.SIGSTOP)
    assert os.waitpid(reader.pid, os.WUNTRACED)[0] == reader.pid
    (view,) = inspected("policy")["publications"]
    assert (view["owner"]["state"], view["readers"][0]["state"]) == ("running", "stopped")
    agent.kill()  # nobody notices the next death
    agent.process.wait()
    reader.kill()
    reader.process.wait(60)
    (view,) = inspected("policy", status=1)["publications"]
    (them,) = view["readers"]
    assert (them["state"], them["gate"], them["connected"], them["mapped"]) == ("dead", "dead", False, 0)
    assert [holder["role"] for holder in view["allocations"][0]["holders"]] == ["owner"]


def test_what_a_dead_owner_left_is_shown_beside_its_successor(owner, reader, start_worker):
    owner.kill()
    owner.process.wait(60)
    reader.do("select.select([policy.fileno()], [], [], 30)")
    start_worker(setup="t = torch.ones(4).share_memory_(); p = client.register_tensors('policy', {'t': t})")
    new, old = inspected("policy")["publications"]
    assert new["generation"] > old["generation"]
    assert (new["phase"], old["phase"], old["owner"]["state"]) == ("ready", "owner died", "dead")
    assert [holder["role"] for holder in old["allocations"][0]["holders"]] == ["reader"]


def test_who_waits_for_a_dead_owners_successor_is_shown(owner, reader, start_worker):
    owner.kill()
    reader.do("select.select([policy.fileno()], [], [], 30)")
    waiting = start_worker()
    waiting.say("policy = client.subscribe('policy', timeout=60)")
    until(lambda: inspected("policy")["publications"][0]["claims"])
    (view,) = inspected("policy")["publications"]
    (claim,) = view["claims"]
    assert (view["phase"], claim["kind"], claim["granted"]) == ("owner died", "import", False)
    assert claim["pid"] == waiting.pid
    start_worker(setup="t = torch.ones(4).share_memory_(); p = client.register_tensors('policy', {'t': t})")
    waiting.hear()


@as_root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_what_is_forbidden_costs_the_look_and_is_named(owner, reader):
    with_leave = inspected("policy")["publications"][0]
    view = inspected("policy", before=("setpriv", "--bounding-set=-all", "--inh-caps=-all"))["publications"][0]
    assert (view["owner"]["gate"], view["owner"]["looked"]) == ("capabilities", "at registration")
    assert (view["readers"][0]["gate"], view["readers"][0]["looked"]) == ("capabilities", "never")
    recorded, seen = view["allocations"][0]["holders"], with_leave["allocations"][0]["holders"]
    assert [holder["role"] for holder in seen] == ["owner", "reader"]
    assert [holder["role"] for holder in recorded] == ["owner"]
    assert recorded[0]["mappings"] == seen[0]["mappings"]


# -- what cannot be shown ----------------------------------------------------------------------------------------------


def test_no_agent(runtime):
    with pytest.raises(NoAgent) as caught:
        look_up("policy")
    assert caught.value.resource == str(runtime)
    assert "NoAgent" in etha("policy", status=2)
    with pytest.raises(NoAgent) as caught:
        look_up("policy", rank=3)
    assert caught.value.resource == str(runtime / "agent_rank3_state.lmdb")


def test_no_such_publication_names_those_that_are(owner):
    with pytest.raises(NoPublication) as caught:
        look_up("polcy")
    assert caught.value.resource == "polcy"
    assert '"policy" (rank 0)' in caught.value.remedy
    assert "NoPublication" in etha("polcy", "--json", status=2)


def test_a_name_that_several_agents_have_needs_a_rank(owner, start_agent, start_worker):
    start_agent("--rank", "1")
    start_worker(
        connect=False,
        setup="client = TensorBusClient(1)\n"
        "p = client.register_tensors('policy', {'t': torch.ones(4).share_memory_()}, version=5)",
    )
    with pytest.raises(InvalidArgument) as caught:
        look_up("policy")
    assert (caught.value.resource, caught.value.holder) == ("policy", "ranks 0, 1")
    for rank, version in ((0, 0), (1, 5)):
        report = look_up("policy", rank)
        assert (report.agent.rank, report.publications[0].version) == (rank, version)
    assert etha("policy", "--rank", "1", "--state", "x", status=2)


def test_where_one_of_several_agents_is_dead_the_other_is_meant(agent, owner, start_agent, start_worker):
    start_agent("--rank", "1")
    start_worker(
        connect=False,
        setup="client = TensorBusClient(1)\n"
        "p = client.register_tensors('policy', {'t': torch.ones(4).share_memory_()})",
    )
    agent.kill()
    agent.process.wait()
    assert look_up("policy").agent.rank == 1
    assert look_up("policy", 0).agent.condition == "dead"


def test_an_agent_at_paths_of_its_own_is_found_by_its_state(start_agent, start_worker, runtime):
    command, state = str(runtime / "c"), str(runtime / "s")
    start_agent("--command-queue", command, "--state", state)
    start_worker(
        connect=False,
        setup=f"client = TensorBusClient(0, {command!r}, {state!r})\n"
        "p = client.register_tensors('mine', {'t': torch.ones(4).share_memory_()})",
    )
    found = inspected("mine", "--state", state)
    assert (found["agent"]["condition"], found["agent"]["state_path"]) == ("serving", state)


def test_a_damaged_state_is_said_and_another_agent_still_found(owner, runtime):
    damaged = runtime / "agent_rank5_state.lmdb"
    damaged.write_bytes(b"no database at all" * 1000)
    damaged.chmod(0o600)
    assert look_up("policy").agent.rank == 0
    with pytest.raises(NoPublication, match="agent_rank5_state"):
        look_up("other")
    assert str(damaged) in etha("policy", "--rank", "5", status=2)


@pytest.mark.parametrize(
    ("change", "error"), [({"schema": SCHEMA + 1}, VersionMismatch), ({"boot": "another"}, NoAgent)]
)
def test_what_another_etha_or_boot_wrote_is_not_opened(runtime, change: dict, error: type[EthaError]):
    text = LockText(4122, boot_id(), pid_namespace(), 7, SCHEMA, 0, "cpu")
    (runtime / "agent_rank0_command.lmdb.agent").write_bytes(
        msgspec.json.encode(msgspec.structs.replace(text, **change))
    )
    (runtime / "agent_rank0_state.lmdb").write_bytes(b"no database: to open it would be another error")
    with pytest.raises(error) as caught:
        look_up("policy")
    assert caught.value.resource == str(runtime / "agent_rank0_state.lmdb")


# -- as many as there are ----------------------------------------------------------------------------------------------


def test_ten_thousand_tensors_are_all_shown(agent, start_worker):
    count = 10_000
    owner = start_worker(setup=f"flat = torch.zeros({count} * 16).share_memory_()")
    owner.do(f"tensors = {{f'layer.{{i}}.weight': flat[16 * i : 16 * i + 16].view(4, 4) for i in range({count})}}")
    owner.do("policy = client.register_tensors('policy', tensors)")
    lines = etha("policy").splitlines()
    rows = [line.split() for line in lines if ".weight" in line and line.startswith(" ") and "float32" in line]
    assert [row[-1] for row in rows] == [f"layer.{i}.weight" for i in range(count)]
    assert [int(row[1]) for row in rows] == [64 * i for i in range(count)]
    (view,) = inspected("policy")["publications"]
    assert len(view["tensors"]) == count
    assert view["storages"][0]["tensors"] == count


def test_a_pipe_that_is_closed_early_is_no_error(agent, start_worker):
    owner = start_worker(setup="flat = torch.zeros(160_000).share_memory_()")
    owner.do("p = client.register_tensors('policy', {f't{i}': flat[i : i + 16] for i in range(10_000)})")
    done = subprocess.run(
        f"{sys.executable} -m etha inspect policy | head -n 1", shell=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("agent rank 0")
    assert done.stderr == ""


def test_a_name_that_the_terminal_cannot_write_is_escaped(agent, start_worker, monkeypatch):
    start_worker(setup="p = client.register_tensors('policy', {'gewicht.ж': torch.ones(4).share_memory_()})")
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    done = subprocess.run([*COMMAND, "policy"], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"gewicht.\\u0436" in done.stdout


def test_it_loads_no_torch(owner, reader):
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "etha", "inspect", "policy"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0
    modules = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "etha.cli.inspect" in modules
    assert "torch" not in modules
