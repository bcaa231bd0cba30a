"""Fixtures: one scene and its Ω for all rounds, as making processes is slow; another once a test has failed on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from omega import Omega
from scene import Scene

Stages = dict[str, tuple[Scene, Omega]]


@pytest.fixture(scope="session")
def stages() -> Iterator[Stages]:
    """The scene in use, under its name."""
    stages: Stages = {}
    yield stages
    close(stages)


@pytest.fixture
def stage(
    stages: Stages, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[Scene, Omega]]:
    """A scene at rest, and its Ω. Its agent has followed another, as any that a round ends with may have."""
    failed = request.session.testsfailed
    if not stages:
        scene = Scene(tmp_path_factory.mktemp("faults"))
        try:
            scene.step()
            scene.follow()
            scene.step()
            stages["now"] = (scene, Omega(scene))
        except BaseException:
            scene.close()
            raise
    yield stages["now"]
    if request.session.testsfailed > failed:
        close(stages)


def close(stages: Stages) -> None:
    while stages:
        _, (scene, omega) = stages.popitem()
        omega.close()
        scene.close()
