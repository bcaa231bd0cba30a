"""Whether what etha uses stays flat, however long it runs. For ``benchmarks/soak.py``; nothing of etha uses it.

From the bottom up; a module imports only what stands above it in this list, and ``costs``::

    plan          what is run
    samples       what is looked at, second by second
    verdict       what may grow, and by how much
    worker        an owner and reader, at random, paced
    probe         the client whose calls are timed
    sampler       the agent and its files, seen from outside
    crew          every process of a run, from the first registration to the last goodbye
    report        the table, the JSON file
    figure        the figure
"""
