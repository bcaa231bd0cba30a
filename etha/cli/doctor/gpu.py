"""GPUs: which are here, which of them CUDA would show this process, and what stands in the way.

etha's GPU path has run on a fake driver only. So no GPU is no fault, and a GPU is only described: what is said to be
degraded is what will stand in the way of sharing its memory. No call of CUDA's is tried. ``--device cuda`` asks for a
GPU, ``--device cpu`` for none.

Source of the rules of ``CUDA_VISIBLE_DEVICES``: CUDA C++ Programming Guide, "CUDA Environment Variables".
"""

from __future__ import annotations

import os
from typing import Final

from etha.cli.doctor import nvidia
from etha.cli.doctor.finding import Finding, Gate
from etha.cli.doctor.nvidia import Gpu, Nvidia
from etha.cli.doctor.runner import Check
from etha.cli.doctor.surroundings import fitting

GPU: Final = Gate("gpu", "GPU", "looking for nvidia-smi, the driver library and device files")
VISIBLE: Final = Gate("gpu", "CUDA_VISIBLE_DEVICES", "resolving it against the devices that nvidia-smi lists")
MODE: Final = Gate("gpu", "compute mode", "asking nvidia-smi")
ALLOCATOR: Final = Gate("gpu", "allocator", "reading PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF")

UNTRIED: Final = "etha's GPU path has run on a fake driver only"
_WANT_NONE: Final = "or say that you want no GPU: etha doctor --device cpu"


def checks(device: str) -> list[Check]:
    """None where no GPU is wanted.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
    """
    if device == "cpu":
        return []
    return [Check(GPU, lambda: judge(nvidia.survey(), dict(os.environ), device == "cuda"), seconds=6.0)]


def judge(found: Nvidia, environment: dict[str, str], wanted: bool) -> list[Finding]:
    """What was found, and what it means.

    Args:
        found: by `nvidia.survey`.
        environment: whose CUDA and allocator variables count.
        wanted: the user asked for a GPU.
    """
    here = _here(found, wanted)
    if not found.present:
        return [here]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    order = environment.get("CUDA_DEVICE_ORDER", "")
    return [here, _visible(found.gpus, visible, order), _mode(found.gpus, environment), _allocator(environment)]


def resolve(value: str, gpus: tuple[Gpu, ...]) -> tuple[list[Gpu], str | None]:
    """The devices that a value of ``CUDA_VISIBLE_DEVICES`` leaves, and the first entry that is none.

    CUDA shows what stands before the first entry that it cannot resolve, and nothing after it.
    """
    shown: list[Gpu] = []
    for entry in value.split(",") if value else []:
        name = entry.strip()
        if name.isdecimal():
            match = [gpu for gpu in gpus if gpu.index == int(name)]
        else:
            match = [gpu for gpu in gpus if len(name) > 4 and gpu.uuid.startswith(name)]
        if len(match) != 1:
            return shown, name
        shown += match
    return shown, None


def _here(found: Nvidia, wanted: bool) -> Finding:
    if not found.present:
        seen = f"no GPU here: {', '.join(found.missing)} missing"
        if not wanted:
            return GPU.ok(f"{seen}. No fault", "host memory is shared without one")
        remedy = fitting(
            f"Install NVIDIA's driver, {_WANT_NONE}",
            docker=f"docker run --gpus all  # {_WANT_NONE}",
            kubernetes=f"resources: {{limits: {{nvidia.com/gpu: 1}}}}  # {_WANT_NONE}",
        )
        return GPU.broken(seen, f"no tensor can lie on a GPU; {UNTRIED}", remedy)
    seen = f"{len(found.gpus) or len(found.devices)} GPU, driver {found.module or 'unknown'}"
    verdict = GPU.broken if wanted else GPU.degraded
    if found.missing:
        return verdict(f"{seen}; {', '.join(found.missing)} missing", _means(), _give(found))
    if found.shut:
        return verdict(
            f"{seen}; {', '.join(found.shut)} missing or not for this user",
            _means(),
            fitting(
                f"sudo nvidia-modprobe -c 0 -u && ls -l {found.shut[0]}  # {_WANT_NONE}",
                docker=f"docker run --gpus all  # {_WANT_NONE}",
            ),
        )
    if found.problem:
        return verdict(f"{seen}; nvidia-smi: {found.problem}", _means(), f"Make this work first: {found.smi}")
    names = ", ".join(
        f"{gpu.index} {gpu.name} {gpu.uuid}{' (MIG)' if gpu.mig == 'Enabled' else ''}" for gpu in found.gpus
    )
    return GPU.ok(f"{seen}: {names}. {UNTRIED}", "an agent may serve one: etha agent --device cuda:0")


def _means() -> str:
    return f"CUDA will not start in this process; {UNTRIED}"


def _give(found: Nvidia) -> str:
    if not found.devices:
        return fitting(
            f"sudo nvidia-modprobe -c 0 -u  # {_WANT_NONE}",
            docker=f"docker run --gpus all  # {_WANT_NONE}",
            kubernetes=f"resources: {{limits: {{nvidia.com/gpu: 1}}}}  # {_WANT_NONE}",
        )
    return fitting(
        f"Install what of NVIDIA's driver is missing for this user space, {_WANT_NONE}",
        docker=f"docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility  # {_WANT_NONE}",
    )


def _visible(gpus: tuple[Gpu, ...], value: str | None, order: str) -> Finding:
    if value is None:
        return VISIBLE.ok("not set", "CUDA shows every device")
    shown, unknown = resolve(value, gpus)
    seen = f"{value!r} shows {len(shown)} of {len(gpus)}: {', '.join(gpu.uuid for gpu in shown) or 'none'}"
    if unknown is not None and gpus and not unknown.startswith("MIG-") and unknown != "-1":
        return VISIBLE.degraded(
            f"{seen}; {unknown!r} names no device here",
            f"CUDA shows nothing from there on; {UNTRIED}",
            "Set it to UUIDs of: nvidia-smi -L",
        )
    if not shown and not (unknown or "").startswith("MIG-"):
        return VISIBLE.degraded(
            f"{value!r} hides every GPU",
            f"this process sees none; {UNTRIED}",
            f"unset CUDA_VISIBLE_DEVICES  # {_WANT_NONE}",
        )
    mixed = len({gpu.name for gpu in gpus}) > 1 and order != "PCI_BUS_ID" and value[:1].isdigit()
    note = "; indices are CUDA's fastest-first order, which may be another: use UUIDs" if mixed else ""
    return VISIBLE.ok(f"{seen}{note}", "agents are matched by UUID, never by index")


def _mode(gpus: tuple[Gpu, ...], environment: dict[str, str]) -> Finding:
    strict = [gpu for gpu in gpus if gpu.compute_mode in ("Exclusive_Process", "Prohibited")]
    mps = "CUDA_MPS_PIPE_DIRECTORY" in environment or os.path.exists("/tmp/nvidia-mps")
    note = "; MPS is set up" if mps else ""
    if strict and not mps:
        first = strict[0]
        return MODE.degraded(
            f"GPU {first.index} is {first.compute_mode}",
            f"agent and worker could not both use it; {UNTRIED}",
            f"sudo nvidia-smi -i {first.uuid} -c DEFAULT",
        )
    modes = sorted({gpu.compute_mode for gpu in gpus})
    return MODE.ok(f"{', '.join(modes) or 'unknown'}{note}", "several processes may use one GPU")


def _allocator(environment: dict[str, str]) -> Finding:
    value = environment.get("PYTORCH_ALLOC_CONF") or environment.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    settings = value.replace(" ", "")
    if "backend:cudaMallocAsync" in settings:
        return ALLOCATOR.degraded(
            value,
            f"memory of CUDA's own pools cannot be exported by torch; {UNTRIED}",
            "Take backend:cudaMallocAsync out of it: the default allocator can be shared.",
        )
    if "expandable_segments:True" in settings:
        return ALLOCATOR.ok(value, f"allocations are virtual memory, shared by descriptor; {UNTRIED}")
    return ALLOCATOR.ok(value or "not set", f"allocations are cudaMalloc's, shared by legacy handles; {UNTRIED}")
