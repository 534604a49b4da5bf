"""Products whose rows do not depend on the size of the batch that they are computed in.

Libraries choose their kernels by shape, and kernels differ in rounding: matrices of a few rows
(MKL), transposed convolutions on several threads, and float32 convolutions of one sample or of one
pixel (PyTorch leaves oneDNN there when it has one thread).  In bfloat16 such a difference grows to
several grey levels in an image.  On the CPU, without gradients and uncompiled, these functions
always take the same kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 16  #: of every matrix product
SAMPLES = 2  #: in every transposed convolution on several threads


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W' + b`` for ``x`` (B, n), `ROWS` rows at a time."""
    if _any_kernel(x):
        return F.linear(x, weight, bias)
    return _in_groups(lambda part: F.linear(part, weight, bias), x, ROWS)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Tensor:
    """The convolution of ``x`` (B, C, H, W), by oneDNN in float32 whatever B is."""
    if _any_kernel(x) or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return F.conv2d(x, weight, bias, stride=stride, padding=padding, groups=groups)
    if len(x) == 1:  # the stride of its first axis is arbitrary, but chooses the memory layout
        x = x.as_strided(x.shape, (x[0].numel(), *x.stride()[1:]))
    sizes = [padding] * 2, [stride] * 2, [1, 1]
    return torch.mkldnn_convolution(x, weight, bias, *sizes, groups)


def upsampling_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The transposed convolution of ``x`` (B, C, H, W) to twice its size, for a 4x4 kernel."""

    def doubled(part: Tensor) -> Tensor:
        return F.conv_transpose2d(part, weight, bias, stride=2, padding=1)

    if _any_kernel(x) or torch.get_num_threads() == 1:
        return doubled(x)
    made = _in_groups(doubled, x, SAMPLES)
    if x.is_contiguous(memory_format=torch.channels_last):  # which a concatenation does not keep
        made = made.contiguous(memory_format=torch.channels_last)
    return made


def _any_kernel(x: Tensor) -> bool:
    """Whether ``x`` is left to the library: on a GPU, with gradients, and in compiled networks."""
    return x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling()


def _in_groups(function: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """``function`` of ``x`` along its first axis, ``size`` at a time; the last are filled up."""
    missing = -len(x) % size
    filled = torch.cat([x, x[:1].expand(missing, *x.shape[1:])]) if missing else x
    return torch.cat([function(part) for part in filled.split(size)])[: len(x)]


class InvariantLinear(nn.Linear):
    """``nn.Linear`` for (B, n)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class InvariantConv2d(nn.Conv2d):
    """``nn.Conv2d`` without dilation, and with equal strides and paddings."""

    def forward(self, x: Tensor) -> Tensor:
        padding, stride = int(self.padding[0]), self.stride[0]
        return conv2d(x, self.weight, self.bias, stride, padding, self.groups)
