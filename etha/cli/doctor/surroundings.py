"""Where this process runs: container, launcher, memory; and so which wording of a remedy fits.

Files and variables are looked at by name; the environment is never copied.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

VARIABLES: Final = (
    "ETHA_RUNTIME_DIR",
    "AGENT_RANK",
    "AGENT_RANK_OFFSET",
    "RANK",
    "LOCAL_RANK",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "CUDA_MPS_PIPE_DIRECTORY",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC",
)
"""The only ones whose values a report shows."""

MODEL_BYTES: Final = 16 * 10**9
"""The model that limits are held against."""

_BY_VARIABLE: Final = {
    "KUBERNETES_SERVICE_HOST": "kubernetes",
    "APPTAINER_CONTAINER": "apptainer",
    "SINGULARITY_CONTAINER": "apptainer",
    "SLURM_JOB_ID": "slurm",
    "RAY_JOB_ID": "ray",
}
_BY_FILE: Final = {"/.dockerenv": "docker", "/run/.containerenv": "podman"}
_CGROUP_LIMITS: Final = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def surroundings() -> tuple[str, ...]:
    """What was recognised, the innermost container first; empty on a plain box."""
    found = [name for variable, name in _BY_VARIABLE.items() if variable in os.environ]
    found += [name for path, name in _BY_FILE.items() if os.path.exists(path)]
    return tuple(dict.fromkeys(found))


def shown_variables() -> dict[str, str]:
    """Those of `VARIABLES` that are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def fitting(plain: str, *, docker: str, kubernetes: str | None = None) -> str:
    """The remedy for where we are.

    Args:
        plain: on a box without containers.
        docker: for Docker and Podman, which take the same options.
        kubernetes: a line for the pod's specification; None if the cluster's owner must do what is done on a box.
    """
    around = surroundings()
    if "kubernetes" in around:
        return kubernetes or plain
    return docker if {"docker", "podman"} & set(around) else plain


def memory_bytes() -> int:
    """Bytes of memory that this process can use: the box's, or its cgroup's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def file_system(path: str) -> str:
    """The kind of file system that ``path`` lies on, such as ``"ext4"``; ``"?"`` if the kernel does not tell."""
    number = os.stat(path).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    found = "?"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == device:
            found = kind.split()[0]
    return found


def size(nbytes: float) -> str:
    """Bytes for people, in units of 1024, as ``df -h`` and the options of containers mean them."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"
