"""One run on a GPU box: what is run there, each in a child with a deadline, and what it said; for ``gpu.py``.

From the bottom up; a module imports only what stands above it in this list::

    child         a process with a deadline, and the end of all that it left behind
    outcomes      what pytest has to say, also where it was stopped
    parts         what is run, and what is gathered of each
    program       the run: one part after the other, into one file

The standard library only, but for the rows of ``bandwidth.py`` and their figure: it runs from a bare checkout.
"""
