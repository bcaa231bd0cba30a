"""Names of devices: what a process calls one (``"cuda:1"``), and what it is everywhere (``"cuda:" + its UUID``).

An index means something in one process only: ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER`` pick and sort. So the
devices are asked for in a child process, which has this one's environment. Not in this one: ``cuInit`` makes every
later fork of a process useless to CUDA, and neither a client that has registered nothing yet nor an idle agent may cost
that. The host is one device, ``"cpu"``, by either name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid as uuids
from typing import Final

from etha.errors import DriverError, InvalidArgument

HOST: Final = "cpu"

_NAME: Final = re.compile(r"cuda(:(\d{1,4}))?")
_PREFIX: Final = "cuda:"
_SECONDS: Final = 60.0
"""``cuInit`` takes long on a box with many devices whose driver is not loaded yet (no persistence mode)."""

_NO_DRIVER: Final = 3
_REFUSED: Final = 4

# By ctypes: importing cuda-bindings takes longer than all of it. cuDeviceGetUuid_v2, where it is there, gives a MIG
# instance its own UUID (CUDA Driver API reference).
_ASK: Final = f"""
import ctypes, sys
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError as error:
    sys.exit(print(error) or {_NO_DRIVER})
def call(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    if code:
        sys.exit(print(f"{{name}} failed with error {{code}}") or {_REFUSED})
call("cuInit", 0)
count = ctypes.c_int()
call("cuDeviceGetCount", ctypes.byref(count))
name = "cuDeviceGetUuid_v2" if hasattr(cuda, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
for ordinal in range(count.value):
    device, found = ctypes.c_int(), ctypes.create_string_buffer(16)
    call("cuDeviceGet", ctypes.byref(device), ordinal)
    call(name, found, device)
    print(found.raw.hex())
"""

_asked: dict[tuple[str | None, ...], tuple[bytes, ...]] = {}


def visible() -> tuple[bytes, ...]:
    """UUIDs, 16 bytes each, of the CUDA devices that this process may use, by its own index. Asked once per
    environment; takes a fraction of a second, more where the driver must be woken.

    Raises:
        DriverError: there is no driver, or it refuses; ``resource`` says which.
    """
    key = tuple(os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"))
    if key not in _asked:
        _asked[key] = _ask()
    return _asked[key]


def _ask() -> tuple[bytes, ...]:
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", _ASK], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DriverError(
            f"the CUDA driver did not name its devices within {_SECONDS:.0f} s.",
            resource="cuInit",
            remedy="See whether nvidia-smi answers; run: etha doctor",
        ) from error
    if child.returncode:
        text = (child.stdout or child.stderr).strip().splitlines()
        raise DriverError(
            f"the CUDA driver does not name its devices: {text[-1] if text else f'status {child.returncode}'}.",
            resource="libcuda.so.1" if child.returncode == _NO_DRIVER else "cuInit",
            remedy="Use --device cpu, or see that nvidia-smi works here; run: etha doctor",
        )
    return tuple(bytes.fromhex(line) for line in child.stdout.split())


def identity_of(name: str) -> str:
    """What a device that this process calls ``name`` is everywhere.

    Args:
        name: ``"cpu"``, ``"cuda"`` (the first), or ``"cuda:1"``.

    Raises:
        InvalidArgument: no such name, or this process sees fewer devices.
        DriverError: see `visible`.
    """
    if name == HOST:
        return HOST
    match = _NAME.fullmatch(name)
    if match is None:
        raise InvalidArgument(
            f"{name!r:.80} is no device that can be served.", resource="device", remedy='Say "cpu", or "cuda:0".'
        )
    ordinal, found = int(match[2] or 0), visible()
    if ordinal >= len(found):
        raise InvalidArgument(
            f"this process sees {len(found)} CUDA devices{_shown()}, so none is {name}.",
            resource="device",
            remedy="Say a smaller index, or change CUDA_VISIBLE_DEVICES.",
        )
    return _PREFIX + str(uuids.UUID(bytes=found[ordinal]))


def name_of(identity: str) -> str:
    """What this process calls a device.

    Raises:
        InvalidArgument: it does not see the device, or that is no identity of one.
        DriverError: see `visible`.
    """
    wanted = uuid_of(identity)
    if wanted is None:
        return HOST
    found = visible()
    if wanted not in found:
        raise InvalidArgument(
            f"this process does not see the device {identity}{_shown()}.",
            resource="CUDA_VISIBLE_DEVICES",
            remedy="Add it there, or use the agent of a device that is there.",
        )
    return f"{_PREFIX}{found.index(wanted)}"


def uuid_of(identity: str) -> bytes | None:
    """The 16 bytes that name a CUDA device, or None for the host.

    Raises:
        InvalidArgument: no identity of a device.
    """
    if identity == HOST:
        return None
    try:
        if not identity.startswith(_PREFIX):
            raise ValueError(identity)
        return uuids.UUID(identity.removeprefix(_PREFIX)).bytes
    except ValueError as error:
        raise InvalidArgument(
            f"{identity!r:.80} is no identity of a device.", resource="device", remedy="Use an agent of this version."
        ) from error


def _shown() -> str:
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if shown is None else f" (CUDA_VISIBLE_DEVICES={shown})"
