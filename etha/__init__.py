"""etha: use a tensor that lives in another process's memory, in place.

Layers, from the bottom up; nothing here imports torch before a tensor is touched::

    etha.errors             every error, by who is at fault
    etha.tensor_bus.ipc     memory of another process
    etha.tensor_bus         the bus: client, publication, subscription, lease; and the agent
    etha.cli                the command `etha`
"""

import logging

from etha.errors import EthaError as EthaError
from etha.tensor_bus import BootstrapInfo as BootstrapInfo
from etha.tensor_bus import Lease as Lease
from etha.tensor_bus import LocalAgent as LocalAgent
from etha.tensor_bus import Publication as Publication
from etha.tensor_bus import Subscription as Subscription
from etha.tensor_bus import TensorBusClient as TensorBusClient
from etha.tensor_bus import bootstrap_client as bootstrap_client
from etha.tensor_bus import local_agent as local_agent
from etha.tensor_bus import setup_ptrace as setup_ptrace

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # a program that configures no logging hears nothing
