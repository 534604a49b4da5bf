"""Trajectories of the mixture with few nodes, for the tests of trajectories on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from denoisers.registry import ModelSource
from runtime.dist import World
from teachers.trajectories import TrajectoryOptions
from teachers.trajectory_files import SHARD
from tests.sampler_models import MixtureModel

HERE = World(0, 1, torch.device("cpu"))
NUMBER = 2 * SHARD + 10


def use_mixture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixture in place of a model's files; work and cache in ``folder``."""
    monkeypatch.setattr(ModelSource, "load", lambda *_: MixtureModel())
    monkeypatch.setattr(ModelSource, "card", lambda *_: MixtureModel().card)
    monkeypatch.setenv("AMED_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)


def options(teacher: str = "heun", cache: str | None = None, **more: Any) -> TrajectoryOptions:
    """Few nodes of the mixture."""
    asked = {"num_steps": 5, "number": 7, "keep": "all", **more}
    source = ModelSource("tiny", cache_dir=cache, dtype="float64")
    return TrajectoryOptions(**{"model": source, "teacher": teacher, **asked})


def shard_bytes(folder: Path) -> dict[str, bytes]:
    """The content of every shard by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
