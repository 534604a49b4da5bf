"""The models we know: one card each, read from ``cards.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Card:
    """What must be known of a model before its weights are read."""

    name: str  #: what ``--dataset_name`` says
    family: str  #: chooses the loader
    resolution: int  #: pixels along a side
    channels: int
    label_dim: int  #: classes; 0 for an unconditional model
    sigma_min: float  #: the range of noise levels that samplers use
    sigma_max: float
    bottleneck: str  #: module of the network whose channel mean is the feature
    file: str  #: file name: bundled (safetensors) or as published
    url: str | None  #: where the file is published; None if bundled
    sha256: str | None  #: of the file; None until it is known
    config: Mapping[str, Any]  #: constructor settings, as published
    restart_info: Mapping[str, list[float]]  #: default plan of the Restart teacher

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample."""
        return self.channels, self.resolution, self.resolution

    @property
    def bundled(self) -> Path | None:
        """Path of the weights that come with this package, or None."""
        return None if self.url else HERE / "bundled" / self.file


def cards() -> dict[str, Card]:
    """All known models by name."""
    entries = json.loads((HERE / "cards.json").read_text(encoding="utf-8"))
    return {name: Card(name=name, **entry) for name, entry in entries.items()}
