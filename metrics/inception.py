"""The Inception-v3 of FID, for the weights published as ``pt_inception-2015-12-05-6726825d.pth``.

The network of Szegedy et al., 2015 (arXiv 1512.00567) in the version of 2015-12-05, by which FID
is defined. It differs from the paper in two ways: average pooling in the blocks excludes the
padding, and the last block uses max pooling. Module names are those of the state dict.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from checkpoints.snapshots import read_weights

RESOLUTION = 299
WIDTH = 2048
#: Channels of mixed_6 for sFID (Nash et al., 2021, arXiv 2103.03841): about WIDTH features in all.
SPATIAL_CHANNELS = 7
SPATIAL_SIDE = 17
_CLASSES = 1008

_PADDING = {1: 0, 3: 1, 5: 2, 7: 3}


def _mean3(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max3(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class Conv(nn.Module):
    """Convolution, batch normalisation, ReLU; with ``same``, padding keeps the size."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1,
        same: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (_PADDING[kernel[0]], _PADDING[kernel[1]]) if same else (0, 0)
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class MixedA(nn.Module):
    """35x35: 1x1, 5x5, double 3x3 and pool branches."""

    def __init__(self, c_in: int, c_pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(c_in, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(c_in, 48, 1), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(c_in, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(c_in, c_pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_mean3(x))], 1)


class MixedB(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, c_in: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(c_in, 384, 3, 2, same=False)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(c_in, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class MixedC(nn.Module):
    """17x17: 7x7 kernels as pairs of 1x7 and 7x1, with ``c`` inner channels."""

    def __init__(self, c: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(768, c, 1), Conv(c, c, row)
        self.branch7x7_3 = Conv(c, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(768, c, 1), Conv(c, c, column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(c, c, row), Conv(c, c, column)
        self.branch7x7dbl_5 = Conv(c, 192, row)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_mean3(x))], 1)


class MixedD(nn.Module):
    """17x17 to 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192, 1), Conv(192, 320, 3, 2, same=False)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(768, 192, 1), Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, 2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        parts = [self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven)]
        return torch.cat([*parts, F.max_pool2d(x, 3, 2)], 1)


class MixedE(nn.Module):
    """8x8: the last two blocks, which differ in their pooling."""

    def __init__(self, c_in: int, by_maximum: bool) -> None:
        super().__init__()
        row, column = (1, 3), (3, 1)
        self.branch1x1 = Conv(c_in, 320, 1)
        self.branch3x3_1 = Conv(c_in, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(c_in, 448, 1), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch_pool = Conv(c_in, 192, 1)
        self._pool = _max3 if by_maximum else _mean3

    def forward(self, x: Tensor) -> Tensor:
        once, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        forks = [
            self.branch3x3_2a(once), self.branch3x3_2b(once),
            self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice),
        ]  # fmt: skip
        return torch.cat([self.branch1x1(x), *forks, self.branch_pool(self._pool(x))], 1)


class FidInception(nn.Module):
    """The Inception-v3 of FID; ``fc`` is in the published file but not used for features."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, same=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c = MixedA(192, 32), MixedA(256, 64)
        self.Mixed_5d, self.Mixed_6a = MixedA(288, 64), MixedB(288)
        self.Mixed_6b, self.Mixed_6c = MixedC(128), MixedC(160)
        self.Mixed_6d, self.Mixed_6e = MixedC(160), MixedC(192)
        self.Mixed_7a = MixedD()
        self.Mixed_7b, self.Mixed_7c = MixedE(1280, False), MixedE(2048, True)
        self.fc = nn.Linear(WIDTH, _CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 or [0, 255] images (B, 3, H, W) -> pooled (B, 2048), spatial (B, 7 * 17 * 17).

        Images are resized to 299x299 (bilinear, align_corners=False, no antialiasing) and scaled to
        [-1, 1]. The spatial features are those of ``mixed_6`` in the original graph, here Mixed_6d.
        """
        size = (RESOLUTION, RESOLUTION)
        x = F.interpolate(images.float(), size, mode="bilinear", align_corners=False) / 127.5 - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[:, :SPATIAL_CHANNELS].flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        return x.mean((2, 3)), spatial


def load_inception(path: Path) -> FidInception:
    """The network with the weights of the published state dict, in evaluation mode.

    Raises:
        ValueError: a file without weights (nothing in it is executed), or of another network.
    """
    content, _ = read_weights(path)
    with torch.device("meta"):
        model = FidInception()
    expected = {k: v.shape for k, v in model.state_dict().items() if not _is_counter(k)}
    tensors = {k: v for k, v in content.items() if not _is_counter(k)}
    differing = [
        k for k in sorted({*expected, *tensors})
        if k not in expected or k not in tensors or tensors[k].shape != expected[k]
    ]  # fmt: skip
    if differing:
        raise ValueError(
            f"{path} is another network (tensor {differing[0]} is missing, additional or of "
            "another shape): pass the file published as pt_inception-2015-12-05-6726825d.pth."
        )
    counters = {k: torch.zeros((), dtype=torch.int64) for k in model.state_dict() if _is_counter(k)}
    weights = {k: v.float() for k, v in tensors.items()}
    model.load_state_dict({**weights, **counters}, assign=True)
    return model.eval().requires_grad_(False)


def _is_counter(key: str) -> bool:
    """Whether a tensor is a batch counter, which only newer files have and which is not used."""
    return key.endswith("num_batches_tracked")
