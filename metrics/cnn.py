"""Small classifiers of 32x32 images, whose globally pooled last activations are features.

`SmallCNN` is the network of the bundled detector ``cifar10-small``.  Its stem is a fixed whitening
of 2x2 patches (Coates & Ng, 2011), which shortens the training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

RESOLUTION = 32
STAGES = 3
_STEM = 24  # both signs of the 3 * 2 * 2 = 12 principal directions of a patch


@dataclass(frozen=True)
class CNNConfig:
    """Widths of the three stages (each halves the resolution) and the number of classes."""

    channels: tuple[int, int, int] = (48, 128, 192)
    classes: int = 10


class ClassPrediction(NamedTuple):
    features: Tensor
    logits: Tensor


class FeatureClassifier(nn.Module, ABC):
    """Classifier of 32x32 RGB images; ``features`` are the pooled activations before the head."""

    mean: Tensor
    std: Tensor
    head: nn.Linear

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))

    @property
    def dim(self) -> int:
        return self.config.channels[-1]

    @abstractmethod
    def activations(self, x: Tensor) -> Tensor:
        """Normalised (B, 3, 32, 32) -> the last activations (B, dim, h, w)."""

    def trainable_(self) -> Self:
        """Make all parameters trainable that are not fixed by `prepare_`."""
        return self.requires_grad_(True)

    def prepare_(self, images: Tensor) -> None:
        """Set what is fixed in the training from uint8 images (B, 3, 32, 32): the normalisation."""
        x = images.double() / 255
        self.mean.copy_(x.mean((0, 2, 3)))
        self.std.copy_(x.std((0, 2, 3)))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 with zero mean and unit standard deviation per channel."""
        return (images.float() / 255 - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)

    def forward(self, images: Tensor) -> ClassPrediction:
        """uint8 (B, 3, 32, 32) -> features (B, dim) and class logits (B, classes)."""
        x = self.normalise(images).contiguous(memory_format=torch.channels_last)
        features = self.activations(x).float().mean((2, 3))
        return ClassPrediction(features, self.head(features))


class _Stage(nn.Sequential):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(c_out),
            nn.SiLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.SiLU(),
        )


class SmallCNN(FeatureClassifier):
    """Three stages of two 3x3 convolutions with max pooling and SiLU, after the whitened stem."""

    def __init__(self, config: CNNConfig) -> None:
        super().__init__(config)
        self.stem = nn.Conv2d(3, _STEM, 2)
        widths = (_STEM, *config.channels)
        self.stages = nn.Sequential(*map(_Stage, widths[:-1], widths[1:]))
        for module in self.stages.modules():
            if isinstance(module, nn.Conv2d):  # starts as the identity: needs fewer epochs
                nn.init.dirac_(module.weight[: module.in_channels])
        self.head = nn.Linear(widths[-1], config.classes)
        self.trainable_()

    def trainable_(self) -> Self:
        """Make all parameters trainable except the kernels of the stem, see `prepare_`."""
        super().trainable_()
        self.stem.weight.requires_grad_(False)
        return self

    def prepare_(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the input normalisation and the stem from uint8 images (B, 3, 32, 32)."""
        super().prepare_(images)
        patches = nn.functional.unfold(self.normalise(images).double(), 2)
        patches = patches.transpose(1, 2).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        directions = (vectors / (values + eps).sqrt()).T.reshape(12, 3, 2, 2)
        with torch.no_grad():
            self.stem.weight.copy_(torch.cat([directions, -directions]))
            assert self.stem.bias is not None
            self.stem.bias.zero_()

    def activations(self, x: Tensor) -> Tensor:
        return self.stages(nn.functional.silu(self.stem(x)))
