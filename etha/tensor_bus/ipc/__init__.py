"""Memory of one process, used by another: export, check, open, view. Knows nothing of LMDB.

From the bottom up; nothing here imports torch before it is given tensors::

    allocations   the records of what is shared as a whole: a file, a handle, a run of chunks
    manifest      the records of what lies in it, and the one pure check of all of them
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
    backend       what every kind of memory can do, and the backend of the host
    devices       names of devices, and what a device is in every process
    cuda          device memory: a device, opening and closing what was exported there
    cuda_export   which kind of device memory a pointer is, and its export
    cuda_backend  the backend of a device
    fence         the order of streams across processes
    order         the order of a client's work and others', on the host and on a device
    mapping       the process's table of opened allocations, reference-counted, and imports of it
    view          mapping and spec to `torch.Tensor`
    leftovers     what torch left in /dev/shm for a process that died
    observation   which memory of another process holds a publication
    fetching      descriptors of an owner's publications, taken from it while it is idle
    peer          the process at the other end: its pidfd and credentials, and who may trace us
"""
