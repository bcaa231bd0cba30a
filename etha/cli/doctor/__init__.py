"""`etha doctor`: which gate is shut on this box, for this user, and how to open it.

Each thing that sharing memory needs is tried for real, in a throw-away child, so that a check which hangs or dies is a
result like any other. Nothing is left behind, no CUDA context is made, and only named environment variables are shown.

The layers, lowest first:

* ``finding``: what a check found, and the report of all: the form of ``--json``, kept in ``docs/doctor.schema.json``;
* ``surroundings``: container, launcher, limits of the box; the remedy that fits there; the variables that are shown;
* ``throwaway``, ``runner``: children that die with their parent; checks under a deadline;
* ``versions``, ``calls``, ``tracing``, ``passing``, ``shared_memory``, ``limits``, ``files``, ``agents``, ``nvidia``,
  ``gpu``: the checks;
* ``exchange``, ``sharing``: two processes share a tensor end to end (``exchange`` alone imports torch);
* ``examination``, ``screen``, ``command``: all checks in order, what is shown of them, and the command line.
"""
