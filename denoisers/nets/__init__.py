"""Architectures, under the parameter names of the published checkpoints."""

from __future__ import annotations

from .dhariwal import DhariwalUNet
from .mlp import MLP
from .song import SongUNet

Network = SongUNet | DhariwalUNet | MLP
NETWORKS: dict[str, type[SongUNet] | type[DhariwalUNet] | type[MLP]] = {
    "SongUNet": SongUNet,
    "DhariwalUNet": DhariwalUNet,
    "MLP": MLP,
}
