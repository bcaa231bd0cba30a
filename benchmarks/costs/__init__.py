"""What etha costs, each operation beside its bare floor. For the programs in ``benchmarks/``; nothing of etha uses it.

From the bottom up; a module imports only what stands above it in this list::

    spread        numbers: quantiles, ratios of paired rounds, slopes
    pairing       measuring: what is compared is measured in turns, round after round
    row           one result: both sides, the ratio, its budget, the verdict
    machine       what it ran on
    processes     forked helpers, an agent and its runtime directory
    groups        rows that are measured together, and the bar of progress
    bare          the floors: LMDB puts, sends and ping-pongs without etha
    tensors       what is registered
    calls, registering, reading, endings, resting, commandline, handover, growth
                  the rows, by what they have in common
    catalogue     every row's name, in the order of the report
    report        the table, the JSON file
    plot          the figure
    program       a run's report: shown, written, drawn

A measuring process starts no thread but those that it measures, and forks its helpers before it makes a client.
"""
