"""`etha.cli.doctor.gpu` and `nvidia`: what is said of boxes that this machine is not."""

from __future__ import annotations

import pytest

from etha.cli.doctor.finding import in_order
from etha.cli.doctor.gpu import judge, resolve
from etha.cli.doctor.nvidia import Gpu, Nvidia, parse

FIRST = Gpu(0, "GPU-8f3a1c52-0000-4000-8000-000000000000", "NVIDIA H100", "Default", "Disabled")
SECOND = Gpu(1, "GPU-1d2e3f40-0000-4000-8000-000000000001", "NVIDIA H100", "Default", "Disabled")
BOX = Nvidia(True, ("/dev/nvidia0", "/dev/nvidia1"), (), "/usr/bin/nvidia-smi", None, "580.65.06", (FIRST, SECOND))
EMPTY = Nvidia(False, (), (), None, None, None, ())


def changed(**fields: object) -> Nvidia:
    return Nvidia(**{name: getattr(BOX, name) for name in BOX.__struct_fields__} | fields)


def gpu(**fields: object) -> Gpu:
    return Gpu(**{name: getattr(FIRST, name) for name in FIRST.__struct_fields__} | fields)


@pytest.mark.parametrize("wanted", [False, True])
def test_a_box_with_gpus_is_well(wanted: bool):
    assert {found.verdict for found in judge(BOX, {}, wanted)} == {"ok"}


@pytest.mark.parametrize(
    ("found", "name", "seen"),
    [
        (changed(library=False), "GPU", "libcuda.so.1"),
        (changed(smi=None, gpus=()), "GPU", "nvidia-smi"),
        (changed(devices=()), "GPU", "device files"),
        (changed(devices=(), smi=None, gpus=(), library=False), "GPU", "device files"),
        (changed(shut=("/dev/nvidia-uvm",)), "GPU", "/dev/nvidia-uvm"),
        (changed(problem="NVML: version mismatch", gpus=()), "GPU", "version mismatch"),
        (changed(gpus=(gpu(compute_mode="Exclusive_Process"),)), "compute mode", "Exclusive_Process"),
        (changed(gpus=(gpu(compute_mode="Prohibited"),)), "compute mode", "Prohibited"),
    ],
)
def test_a_part_that_is_missing_or_shut(found: Nvidia, name: str, seen: str):
    first = in_order(judge(found, {}, False))[0]
    assert (first.name, first.verdict) == (name, "degraded")
    assert seen in first.seen
    assert "fake driver only" in first.means
    assert first.remedy
    if name == "GPU":
        assert in_order(judge(found, {}, True))[0].verdict == "broken"


def test_mps_makes_an_exclusive_gpu_usable():
    exclusive = changed(gpus=(gpu(compute_mode="Exclusive_Process"),))
    assert {each.verdict for each in judge(exclusive, {"CUDA_MPS_PIPE_DIRECTORY": "/run/mps"}, False)} == {"ok"}


def test_a_library_alone_is_no_gpu():
    """As in an image for GPUs, run on a box without."""
    (found,) = judge(Nvidia(True, (), (), None, None, None, ()), {}, False)
    assert found.verdict == "ok"
    assert found.seen.startswith("no GPU here: nvidia-smi, device files (/dev/nvidia*) missing")


def test_no_gpu_is_a_fault_only_where_one_is_wanted():
    assert [found.verdict for found in judge(EMPTY, {"CUDA_VISIBLE_DEVICES": ""}, False)] == ["ok"]
    assert [found.verdict for found in judge(EMPTY, {}, True)] == ["broken"]


@pytest.mark.parametrize(
    ("value", "shown", "unknown"),
    [
        ("0", [FIRST], None),
        ("1,0", [SECOND, FIRST], None),
        ("GPU-1d2e", [SECOND], None),
        ("GPU-8f3a1c52-0000-4000-8000-000000000000", [FIRST], None),
        ("", [], None),
        ("-1", [], "-1"),
        ("0,7,1", [FIRST], "7"),
        ("GPU-", [], "GPU-"),
        ("NoDevFiles", [], "NoDevFiles"),
    ],
)
def test_what_a_value_of_the_variable_shows(value: str, shown: list[Gpu], unknown: str | None):
    assert resolve(value, BOX.gpus) == (shown, unknown)


@pytest.mark.parametrize(
    ("value", "verdict"),
    [("0", "ok"), ("1", "ok"), ("", "degraded"), ("-1", "degraded"), ("7", "degraded"), ("MIG-9f21", "ok")],
)
def test_what_is_said_of_the_variable(value: str, verdict: str):
    first = in_order(judge(BOX, {"CUDA_VISIBLE_DEVICES": value}, False))[0]
    assert first.verdict == verdict
    if verdict != "ok":
        assert first.name == "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_an_allocator_whose_memory_cannot_be_shared(variable: str):
    first = in_order(judge(BOX, {variable: "backend: cudaMallocAsync"}, False))[0]
    assert (first.name, first.verdict) == ("allocator", "degraded")
    assert {found.verdict for found in judge(BOX, {variable: "expandable_segments:True"}, False)} == {"ok"}


def test_the_answer_of_nvidia_smi():
    assert parse(f"0, {FIRST.uuid}, NVIDIA H100, Default, Disabled\n") == (FIRST,)
    with pytest.raises(ValueError, match="unpack"):
        parse("No devices were found\n")
