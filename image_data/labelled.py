"""Images with classes, checked against the network that is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from image_data.sources import ImageSource
from runtime.errors import UserError


class LabelledImages:
    """The images of a zip or folder, for a network of ``channels`` x ``resolution``^2 pixels.

    With ``label_dim`` classes, each image needs one in ``dataset.json``.  Raises UserError if
    image or class do not fit, and as :class:`image_data.sources.ImageSource`.
    """

    def __init__(self, path: Path, channels: int, resolution: int, label_dim: int) -> None:
        self.path, self.shape = path, (channels, resolution, resolution)
        with ImageSource(path) as source:
            self.names = source.names
            self._check(0, source.read(0))
            labels = source.labels() if label_dim else np.zeros(len(source), np.int64)
        wrong = np.flatnonzero((labels < 0) | (labels >= max(label_dim, 1)))
        if wrong.size:
            raise UserError(
                f"{self.names[wrong[0]]} in {path} is of class {labels[wrong[0]]}, but the network "
                f"has {label_dim} (0 to {label_dim - 1}); give it the label_dim of the images"
            )
        self.classes = torch.from_numpy(labels)  #: int64 (N,); zeros without classes
        self._source: ImageSource | None = None  # every process opens its own

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: Sequence[int]) -> Tensor:
        """These images as uint8 (B, C, H, W); UserError for one of another shape."""
        self._source = self._source or ImageSource(self.path)
        images = [self._source.read(index) for index in indices]
        for index, image in zip(indices, images, strict=True):
            self._check(index, image)
        return torch.from_numpy(np.stack(images))

    def _check(self, index: int, image: np.ndarray) -> None:
        if image.shape != self.shape:
            has, wants = ("x".join(map(str, shape)) for shape in (image.shape, self.shape))
            raise UserError(
                f"{self.names[index]} in {self.path} has {has} values where the network takes "
                f"{wants}; convert the images with python -m tools.dataset_tool, or change the "
                "network"
            )
