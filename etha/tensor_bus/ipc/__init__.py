"""Memory of one process, used by another: export, check, open, view. Knows nothing of LMDB.

From the bottom up; nothing here imports torch before it is given tensors::

    manifest      the records, and the one pure check of them
    cuda_records  those of device memory, not frozen yet
    libc          the system calls that Python's library lacks
    process       what /proc says about a process: label, state, start time, boot, PID namespace
    driver        the CUDA driver's calls, behind a Protocol; nothing of CUDA is loaded before they are needed
    maps          what a process has mapped
    descriptors   one owner per descriptor, and room for them
    undo          steps that are taken back, each until it has succeeded
    shareable     which tensors can be shared at all
    survey        the tensors of one publication, gone through once, before anything is exported
    export        what an owner holds for one publication: manifest, descriptors, pin
    host          host memory: torch's shared storages, by descriptor
    backend       which backend serves a device type (``cuda`` will stand beside ``host`` there)
    cuda          device memory: a device, opening and closing what was exported there
    cuda_export   which kind of device memory a pointer is, and its export
    fence         the order of streams across processes
    mapping       the process's table of opened allocations, reference-counted, and imports of it
    cuda_backend  device memory through that table; the bus does not reach it yet
    view          mapping and spec to `torch.Tensor`
    leftovers     what torch left in /dev/shm for a process that died
    observation   which memory of another process holds a publication
    fetching      descriptors of an owner's publications, taken from it while it is idle
    peer          the process at the other end: its pidfd and credentials, and who may trace us
"""
