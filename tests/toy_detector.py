"""Random images, and a detector that takes no time."""

from __future__ import annotations

import torch
from torch import Tensor

from metrics.detectors import Detector
from metrics.statistics import DetectorId


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)


def toy(name: str = "toy", sha256: str = "ab" * 32) -> Detector:
    """Six means as features, five pixels as spatial ones."""

    def features(x: Tensor) -> Tensor:
        x = x.float() / 255
        return torch.cat([x.mean((2, 3)), x[:, :, :8].mean((2, 3)), x[:, 0, 3, :5]], 1)

    return Detector(DetectorId(name, sha256, 6), features, torch.device("cpu"), spatial_dim=5)
