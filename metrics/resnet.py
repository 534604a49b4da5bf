"""A small residual classifier (He et al., 2016), the network of ``cifar10-small-resnet``.

It differs in kind from `SmallCNN`, so that two detectors do not share their peculiarities: a
trained stem, residual blocks, strided convolutions instead of max pooling, ReLU.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu

from metrics.cnn import CNNConfig, FeatureClassifier

_STEM = 32


class _Residual(nn.Module):
    """Two 3x3 convolutions, the first with stride 2, added to a projection of 2x2 means.

    The last normalisation starts at zero, so a block starts as its shortcut (Goyal et al., 2017).
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        nn.init.zeros_(self.branch[-1].weight)  # type: ignore[arg-type]
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.branch(x) + self.shortcut(x))


class SmallResNet(FeatureClassifier):
    """A 3x3 convolution and three residual blocks, each of which halves the resolution."""

    def __init__(self, config: CNNConfig) -> None:
        super().__init__(config)
        self.stem = nn.Sequential(
            nn.Conv2d(3, _STEM, 3, padding=1, bias=False), nn.BatchNorm2d(_STEM), nn.ReLU()
        )
        widths = (_STEM, *config.channels)
        self.blocks = nn.Sequential(*map(_Residual, widths[:-1], widths[1:]))
        self.head = nn.Linear(widths[-1], config.classes)

    def activations(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))
