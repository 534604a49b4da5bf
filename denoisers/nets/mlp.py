"""A perceptron: the network of data that are vectors rather than images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from denoisers.nets.layers import Linear, PositionalEmbedding, channel_mean, one_of
from denoisers.nets.unet import EDMNetwork


class MLP(EDMNetwork):
    """``layers`` affine maps of ``width`` units with SiLU between them, over all pixels at once.

    The embedding of the noise level is added to every hidden layer.  The bottleneck is the last
    hidden layer.  Classes are not supported: raises ValueError if ``label_dim`` is not 0, and if
    there is no hidden layer.
    """

    map_augment = None
    label_dropout = 0.0

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        *,
        label_dim: int = 0,
        width: int = 64,
        layers: int = 4,
        bottleneck: str | None = None,
    ) -> None:
        super().__init__()
        if label_dim:
            raise ValueError(f"label_dim is {label_dim}, but an MLP takes no classes")
        if layers < 2 or width < 4:
            raise ValueError(f"{layers} layers of width {width}: give 2 or more, of 4 or more")
        self.bottleneck = bottleneck or "hidden"
        one_of("bottleneck", self.bottleneck, ("hidden",))
        pixels = img_resolution**2
        self.map_noise = PositionalEmbedding(width)
        self.map_layer0 = Linear(width, width)
        widths = [in_channels * pixels] + [width] * (layers - 1)
        self.hidden = nn.ModuleList(Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.out = Linear(width, out_channels * pixels)

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        """Of the noise labels (B,) alone, (B, width)."""
        return F.silu(self.map_layer0(self.map_noise(noise_labels)))

    def apply_to(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` (B, C, H, W) -> ``F`` (B, C', H, W) and the hidden mean (B, 1, 1)."""
        h = x.flatten(1)
        for layer in self.hidden:
            h = F.silu(layer(h) + emb)
        out = self.out(h).view(len(x), -1, *x.shape[2:])
        return out, channel_mean(h[:, :, None, None])
