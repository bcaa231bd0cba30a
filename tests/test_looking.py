"""`etha.cli.looking`: whose memory is looked at, and what is said where it may not be."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from etha.cli.anatomy import Look
from etha.cli.looking import Eyes, remembered
from etha.tensor_bus import clock
from etha.tensor_bus.ipc.host import export
from etha.tensor_bus.ipc.process import pid_namespace
from etha.tensor_bus.state import MemoryRecord

RECORD = MemoryRecord((((1, 2),),), ((5,),), None)


def test_it_sees_this_process():
    exported = export({"w": torch.zeros(8).share_memory_()})
    look = Eyes(pid_namespace()).look(os.getpid(), clock.now(), 1, exported.manifest)
    assert (look.taken, look.state, look.gate) == ("now", "running", None)
    assert len(look.mappings[0]) == 1
    assert exported.fds[0].fileno() in look.descriptors[0]
    exported.close_fds()


def test_a_stranger_that_bears_the_number_is_not_looked_at():
    exported = export({"w": torch.zeros(8).share_memory_()})
    look = Eyes(pid_namespace()).look(os.getpid(), 0.001, 1, exported.manifest)
    assert look == Look("never", "dead", "dead")
    exported.close_fds()


def test_a_dead_process_and_another_namespace():
    exported = export({"w": torch.zeros(8).share_memory_()})
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait(60)
    assert Eyes(pid_namespace()).look(child.pid, clock.now(), 1, exported.manifest) == Look("never", "dead", "dead")
    foreign = Eyes(pid_namespace() + 1).look(os.getpid(), clock.now(), 1, exported.manifest)
    assert foreign == Look("never", "unknown", "PID namespace")
    exported.close_fds()


def test_what_the_agent_saw_stands_in_only_for_what_is_forbidden():
    hidden, dead, now = Look("never", "running", "uid"), Look("never", "dead", "dead"), Look("now", "running", None)
    assert remembered(hidden, RECORD) == Look("at registration", "running", "uid", RECORD.mappings, RECORD.descriptors)
    assert remembered(hidden, None) is hidden
    assert remembered(hidden, MemoryRecord(((),), ((),), "uid")) is hidden
    assert remembered(dead, RECORD) is dead
    assert remembered(now, RECORD) is now
