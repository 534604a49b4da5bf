"""Architectures, under the parameter names of the published checkpoints."""

from __future__ import annotations

from .dhariwal import DhariwalUNet
from .song import SongUNet

Network = SongUNet | DhariwalUNet
NETWORKS: dict[str, type[SongUNet] | type[DhariwalUNet]] = {
    "SongUNet": SongUNet,
    "DhariwalUNet": DhariwalUNet,
}
