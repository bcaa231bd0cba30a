"""`etha.cli.doctor.versions`: what is installed, read without importing it, and whether it fits."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

from etha.cli.doctor import versions

WELL = dict.fromkeys(versions.MINIMUM, "99.0") | dict.fromkeys(("torch CUDA", "CuPy", "cuda-bindings", "NVIDIA driver"))


def test_the_minima_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    needed = {}
    for line in project["dependencies"]:
        name, _, least = line.partition(">=")
        needed[name] = tuple(map(int, least.split("."))) if least else (0,)
    assert needed == versions.MINIMUM
    assert project["requires-python"] == ">=3.11"


def test_torchs_cuda_is_read_from_its_file():
    assert versions.torch_cuda() == torch.version.cuda
    assert versions.versions()["torch"] == metadata.version("torch")


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("from typing import Optional\ncuda: Optional[str] = '12.6'\n", "12.6"),
        ("cuda = '13.0'\n", "13.0"),
        ("cuda = None\n", None),
        ("cuda = f(\n", None),
        ("debug = False\n", None),
    ],
)
def test_every_form_of_that_file(text: str, cuda: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text(text)

    class Spec:
        origin = str(tmp_path / "torch" / "__init__.py")

    monkeypatch.setattr(versions, "find_spec", lambda name: Spec)
    assert versions.torch_cuda() == cuda


@pytest.mark.parametrize(
    ("text", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("6.18.44-fc", (6, 18, 44)), ("580.65", (580, 65)), ("x", ())]
)
def test_the_numbers_of_a_version(text: str, numbers: tuple[int, ...]):
    assert versions.numbers(text) == numbers


def test_old_and_missing_libraries_are_named():
    (found,) = versions.judge_libraries({**WELL, "torch": "2.5.1", "lmdb": None})
    assert found.verdict == "broken"
    assert found.seen == "torch 2.5.1, lmdb is missing"
    assert re.fullmatch(r"pip install .*'torch>=2.6'.*'lmdb>=3.0'.*", found.remedy)
    assert [found.verdict for found in versions.judge_libraries({**WELL, "torch": "2.6.0+cu126"})] == ["ok"]


@pytest.mark.parametrize(
    ("release", "verdict"), [("5.2.0", "broken"), ("5.15.0-91-generic", "ok"), ("6.5.0", "ok"), ("10.0", "ok")]
)
def test_kernels(release: str, verdict: str):
    assert versions.judge_kernel(release).verdict == verdict


@pytest.mark.parametrize(("version", "verdict"), [((3, 10, 9), "broken"), ((3, 11, 0), "ok"), ((3, 14, 1), "ok")])
def test_pythons(version: tuple[int, ...], verdict: str):
    assert versions.judge_python(version).verdict == verdict


@pytest.mark.parametrize(
    ("cuda", "bindings", "driver", "verdict"),
    [
        ("12.6", None, "550.54.15", "ok"),
        ("12.6", "13.0.3", "580.65.06", "ok"),
        ("13.0", None, "550.54.15", "degraded"),
        ("12.6", "13.0.3", "550.54.15", "degraded"),
        (None, None, "550.54.15", "ok"),
        ("13.0", "13.0.3", None, "ok"),
    ],
)
def test_cudas_and_drivers(cuda: str | None, bindings: str | None, driver: str | None, verdict: str):
    here = {**WELL, "torch CUDA": cuda, "cuda-bindings": bindings, "NVIDIA driver": driver}
    assert [found.verdict for found in versions.judge_libraries(here)] == ["ok", verdict]
