"""``benchmarks/bandwidth.py``: its own arithmetic, and that it runs on the host. What it measures is no test."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bandwidths import model
from bandwidths.catalogue import groups
from bandwidths.floors import Exporter, Opener
from bandwidths.memory import Memory
from bandwidths.place import Place, places
from bandwidths.ways import flat, pieces
from costs.report import read

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "bandwidth.py"
NAMES = [name for group in groups("cpu", 1.0) for name in group.rows]


@pytest.fixture(autouse=True)
def sharing_strategy():
    """What is looked at here sets it, for processes that are its own; this one has other tests to run."""
    before = torch.multiprocessing.get_sharing_strategy()
    yield
    torch.multiprocessing.set_sharing_strategy(before)


# -- the model ------------------------------------------------------------------------------------


def test_the_list_is_that_of_the_published_model():
    shapes = model.shapes()
    assert len(shapes) == 291
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 8_030_261_248
    assert model.nbytes() == 2 * 8_030_261_248
    assert shapes["model.layers.31.mlp.down_proj.weight"] == (4096, 14336)
    assert shapes["lm_head.weight"] == (128256, 4096)


def test_a_scaled_list_has_as_many_tensors_and_a_share_of_the_bytes():
    shapes = model.shapes(1 / 8)
    assert len(shapes) == 291
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (1792, 4096)
    assert shapes["model.norm.weight"] == (4096,)
    assert model.nbytes(1 / 8) == pytest.approx(model.nbytes() / 8, rel=1e-3)


# -- a buffer, piece by piece ---------------------------------------------------------------------


def test_pieces_are_all_tensors_in_their_order_and_none_is_larger_than_the_buffer():
    tensors = {f"{size}": torch.full((size,), size, dtype=torch.uint8) for size in (3, 5, 8, 1, 7, 2)}
    found = list(pieces(tensors, 8))
    assert [[tensor.nbytes for _, _, tensor in piece] for piece in found] == [[3, 5], [8], [1, 7], [2]]
    for piece in found:
        ends = [0, *(end for _, end, _ in piece)]
        assert [start for start, _, _ in piece] == ends[:-1]
        assert ends[-1] <= 8


def test_a_tensor_larger_than_the_buffer_is_refused():
    with pytest.raises(ValueError, match="does not go"):
        list(pieces({"large": torch.zeros(9, dtype=torch.uint8)}, 8))


def test_flat_bytes_are_the_tensors_own():
    tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    flat(tensor).fill_(0x3F)
    assert tensor.view(-1).view(torch.uint8).tolist() == [0x3F] * 12


# -- places ---------------------------------------------------------------------------------------


def test_a_device_has_two_kinds_of_memory():
    assert [place.kind for place in places("cuda:0")] == ["legacy", "fd"]
    assert [place.device for place in places("cpu")] == ["cpu"]


def test_the_allocator_is_told_before_torch_is_imported():
    program = """
import os, sys
from bandwidths.catalogue import groups
from bandwidths.place import Place
groups("cuda:0", 1.0)
Place("fd").prepare()
fd = os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
Place("legacy").prepare()
sys.exit("torch" in sys.modules or "PYTORCH_CUDA_ALLOC_CONF" in os.environ or not fd)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(PROGRAM.parent), str(PROGRAM.parent.parent)))}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=False)
    assert ran.returncode == 0


def test_the_floor_really_opens_what_was_exported():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        exporter, opener = Exporter(Place("host"), ours), Opener(Place("host"), theirs)
        sizes = exporter.prepare([torch.zeros(4096, dtype=torch.uint8)] * 450)
        assert sizes == [4096] * 450
        before = len(Path("/proc/self/maps").read_text().splitlines())
        descriptors = len(os.listdir("/proc/self/fd"))
        assert exporter.export() > 0
        assert opener.open(sizes) > 0
        assert len(Path("/proc/self/maps").read_text().splitlines()) >= before + 400
        assert opener.close() > 0
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        exporter.prepare([])


def test_the_clock_of_the_host_runs_while_its_bytes_move():
    memory = Memory(Place("host"))
    source, target = memory.shared((1 << 24,), torch.uint8, 3), memory.private(1 << 24)
    assert memory.seconds(lambda: target.copy_(source)) > 1e-5
    assert target[-1].item() == 3
    assert source.is_shared()


# -- rows -----------------------------------------------------------------------------------------


def test_no_row_has_the_name_of_another_and_a_device_has_the_same_ones():
    assert len(NAMES) == len(set(NAMES))
    on_a_device = {name for group in groups("cuda:0", 1.0) for name in group.rows}
    assert on_a_device == {name for name in NAMES if "host" not in name.split("-")}


# -- the program ----------------------------------------------------------------------------------


def of_the_dead() -> set[str]:
    """What torch left in /dev/shm for processes that are no more."""
    named = (path.name for path in Path("/dev/shm").glob("torch_*_*"))
    return {name for name in named if not Path("/proc", name.split("_")[1]).exists()}


def test_a_quick_run_on_the_host_measures_every_row_and_leaves_nothing(
    tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TMPDIR", str(runtime))
    monkeypatch.setenv("MPLBACKEND", "agg")
    before = of_the_dead()
    output = tmp_path / "bandwidth.json"
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), "--quick", "--plot", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report = read(output)
    assert [found.name for found in report.rows] == NAMES
    for found in report.rows:
        if "host" in found.name.split("-") and found.name != "step-pinned-host":
            assert found.etha is not None, found.name
            assert not found.note, found.name
        else:
            assert found.etha is None, found.name
            assert found.note == "needs a GPU", found.name
    assert (report.setup["device"], report.setup["scale"]) == ("cpu", 1 / 1024)
    assert json.loads(output.read_text())["setup"]["list tensors"] == 291
    assert list(runtime.iterdir()) == []
    assert of_the_dead() <= before


@pytest.mark.parametrize(
    "arguments",
    [
        ("--only", "nothing"),
        ("--device", "toaster"),
        ("--scale", "2"),
        ("--scale", "0"),
        ("--quick", "--plot"),
        ("--device", "cuda:0"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_is_refused(arguments: tuple[str, ...]):
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 2
