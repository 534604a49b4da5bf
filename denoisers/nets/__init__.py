"""Architectures, under the parameter names of the published checkpoints."""

from __future__ import annotations

from denoisers.nets.dhariwal import DhariwalUNet
from denoisers.nets.mlp import MLP
from denoisers.nets.song import SongUNet

Network = SongUNet | DhariwalUNet | MLP
NETWORKS: dict[str, type[SongUNet] | type[DhariwalUNet] | type[MLP]] = {
    "SongUNet": SongUNet,
    "DhariwalUNet": DhariwalUNet,
    "MLP": MLP,
}
