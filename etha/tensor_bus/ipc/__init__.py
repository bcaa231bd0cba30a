"""Memory of one process, used by another: export, check, open, view. Knows nothing of LMDB.

From the bottom up; nothing here imports torch before it is given tensors::

    manifest      the records, and the one pure check of them
    libc          the system calls that Python's library lacks
    process       what /proc says about a process: label, state, start time, boot, PID namespace
    maps          what a process has mapped
    descriptors   one owner per descriptor, and room for them
    shareable     which tensors can be shared at all
    export        what an owner holds for one publication: manifest, descriptors, pin
    host          host memory: torch's shared storages, by descriptor
    backend       which backend serves a device type (``cuda`` will stand beside ``host`` there)
    mapping       the process's table of opened allocations, reference-counted, and imports of it
    view          mapping and spec to `torch.Tensor`
    leftovers     what torch left in /dev/shm for a process that died
    observation   which memory of another process holds a publication
    fetching      descriptors of a publication's memory, taken from its owner while that is idle
    peer          the process at the other end: its pidfd and credentials, and who may trace us
"""
