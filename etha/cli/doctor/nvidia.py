"""What this box shows of NVIDIA GPUs, gathered without a CUDA context and without torch.

Loading the driver's library runs none of its devices; `cuInit` is never called. ``nvidia-smi`` asks the driver through
NVML, which makes no context either.
"""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import subprocess
from typing import Final

import msgspec

from etha.cli.doctor.versions import driver

LIBRARY: Final = "libcuda.so.1"
_SMI_SECONDS: Final = 4.0
_FIELDS: Final = ("index", "uuid", "name", "compute_mode", "mig.mode.current")
_CONTROL_FILES: Final = ("/dev/nvidiactl", "/dev/nvidia-uvm")


class Gpu(msgspec.Struct, frozen=True):
    """One device, as nvidia-smi tells.

    Attributes:
        index: in the order of the PCI bus, which is CUDA's only with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.
        uuid: its identity.
        name: of the model.
        compute_mode: ``"Default"``, ``"Exclusive_Process"`` or ``"Prohibited"``.
        mig: ``"Enabled"``, ``"Disabled"`` or ``"[N/A]"``.
    """

    index: int
    uuid: str
    name: str
    compute_mode: str
    mig: str


class Nvidia(msgspec.Struct, frozen=True):
    """All that was found.

    Attributes:
        library: whether `LIBRARY` can be loaded.
        devices: device files of GPUs.
        shut: control files and devices that are missing or may not be opened, while a device is there.
        smi: path of nvidia-smi, or None.
        problem: what nvidia-smi said instead of an answer.
        module: version of the kernel module, or None.
        gpus: what nvidia-smi listed.
    """

    library: bool
    devices: tuple[str, ...]
    shut: tuple[str, ...]
    smi: str | None
    problem: str | None
    module: str | None
    gpus: tuple[Gpu, ...]

    @property
    def present(self) -> bool:
        """Whether there is a GPU at all: a library alone is none."""
        return bool(self.devices or self.gpus or self.module)

    @property
    def missing(self) -> tuple[str, ...]:
        """Which of the three that a program needs are not there."""
        wanted = {"nvidia-smi": self.smi, f"driver library ({LIBRARY})": self.library}
        found = [name for name, there in wanted.items() if not there]
        return tuple(found) if self.devices else (*found, "device files (/dev/nvidia*)")


def survey() -> Nvidia:
    """Look at the library, the device files and nvidia-smi."""
    devices = tuple(sorted(glob.glob("/dev/nvidia[0-9]*"))) or tuple(glob.glob("/dev/dxg"))
    control = _CONTROL_FILES if devices and devices != ("/dev/dxg",) else ()
    shut = tuple(path for path in (*control, *devices) if not os.access(path, os.R_OK | os.W_OK))
    smi = shutil.which("nvidia-smi")
    gpus, problem = ((), None) if smi is None else _ask(smi)
    return Nvidia(_can_load(LIBRARY), devices, shut, smi, problem, driver(), gpus)


def parse(text: str) -> tuple[Gpu, ...]:
    """nvidia-smi's answer: one line a GPU, comma and blank between fields.

    Raises:
        ValueError: it is no such answer.
    """
    gpus = []
    for line in text.splitlines():
        index, uuid, name, mode, mig = line.split(", ")
        gpus.append(Gpu(int(index), uuid, name, mode, mig))
    return tuple(gpus)


def _ask(smi: str) -> tuple[tuple[Gpu, ...], str | None]:
    command = [smi, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
        return parse(done.stdout), None
    except subprocess.CalledProcessError as error:
        return (), (error.stdout + error.stderr).strip().partition("\n")[0] or f"it ended with {error.returncode}"
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        return (), f"{type(error).__name__}: {error}"


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
