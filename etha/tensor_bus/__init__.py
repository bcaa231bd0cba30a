"""The bus: one process's tensors under a name, other processes reading them in place.

From the bottom up; a module imports only what stands above it in this list::

    ipc                                    memory of another process: records, backends, mappings, views
    clock, paths, records                  deadlines; where files are; how records become bytes
    environments, lockfile                 LMDB files, once per process; who serves a path
    commands, command_queue, state,        what workers ask; what the agent knows
      state_writer
    packets, wire                          what crosses the connection, and how
    claims, claim_table, waiting,          the rules: pure, no I/O
      verdicts, access, naming, settling,
      registry
    client_device, pending, channel,       a worker's end of the connection, from one agent to the next
      bell, line, connection, reach,
      finding, endings, link
    copying, lease, mapped, subscription,  what a user holds
      shared, update, publication,
      tracer, client, bootstrap, local
    sessions, fencing, switchboard,        the agent itself
      front_door, held, memory, chronicle,
      journal, claimants, orders,
      requests, service, recovery,
      pages, examination, premises,
      reception, agent
"""

from etha.tensor_bus.bootstrap import BootstrapInfo as BootstrapInfo
from etha.tensor_bus.bootstrap import bootstrap_client as bootstrap_client
from etha.tensor_bus.bootstrap import setup_ptrace as setup_ptrace
from etha.tensor_bus.client import TensorBusClient as TensorBusClient
from etha.tensor_bus.lease import Lease as Lease
from etha.tensor_bus.local import LocalAgent as LocalAgent
from etha.tensor_bus.local import local_agent as local_agent
from etha.tensor_bus.publication import Publication as Publication
from etha.tensor_bus.publication import Reader as Reader
from etha.tensor_bus.subscription import Subscription as Subscription
