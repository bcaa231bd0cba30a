"""What a model's parameters cost to hand over, on the host and on a device. For ``benchmarks/bandwidth.py`` alone.

Built on `costs`. From the bottom up; a module imports only what stands above it in this list::

    place         which memory a row is of: the host's, or a device's by legacy handles or by descriptors
    memory        tensors of that memory, clocks and waits for it, and how much of it is free
    actors        helper processes that are called by name
    model         the shapes of an 8-billion-parameter model
    copies        rows: bandwidth through a mapping
    floors        exporting, opening and closing without etha
    openings      rows: the same with etha, by size and count
    games         the device's own ping-pong, and work that keeps it busy
    stamps        rows: publish() until the reader has read that version
    ways          how else a list of tensors is handed over: handles, a bucket, pinned memory
    lists         rows: the model's parameters, step by step
    remains       rows: the memory that it takes, and what is left of that
    catalogue     every row's name, for a device

Nothing of it imports torch, nor the device's library, before a row is measured: `place.prepare` has then said in the
environment what torch's allocator is to give. Whoever uses a device is a helper; the process that measures is not.
"""
