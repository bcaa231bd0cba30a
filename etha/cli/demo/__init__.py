"""`etha demo`: an agent, a trainer and an evaluator on this box, and what they measured.

The layers, lowest first:

* ``events``, ``link``: what a child tells the parent (JSON lines), and its end of the pipes;
* ``task``, ``stamp``: the digits, the network, and the seal that makes a torn read visible;
* ``trainer``, ``evaluator``: the two programs, each a process of its own (these alone import torch);
* ``leash``, ``children``: starting processes that cannot outlive the parent, and ending them;
* ``backend``, ``memory``, ``copied``: what this box has, and how many bytes were copied;
* ``report``, ``screen``, ``plot``: the result, and its three forms;
* ``run``, ``command``: the parent's part of the protocol, and the command line.
"""
