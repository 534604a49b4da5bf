"""The AMED predictor: a network of about 9k parameters that chooses one time in every interval.

Source: Zhou et al. 2024, "Fast ODE-based Sampling for Diffusion Models in Around 5 Steps",
arXiv:2312.00094, section 3.2 and appendix B.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denoisers.nets.batch_invariant import InvariantLinear
from solvers.types import InsertedNode, Node

FEATURE_SIDE = 8
TIME_CHANNELS = 8


class AMEDPredictor(nn.Module):
    """A guide whose inputs are the bottleneck features and the two ends of an interval.

    Calling it with ``(node, t_next)`` returns ``InsertedNode(r, c, a)``, each (B, 1, 1, 1) in the
    dtype of the state: ``r`` in (0, 1) is the position of the inserted time, ``c`` in
    (1 - s_dir, 1 + s_dir) scales the direction of the step to the end of the interval, and ``a``
    in (1 - s_time, 1 + s_time) scales the network time.  A head with zero range is the constant 1.
    """

    freqs: Tensor

    def __init__(
        self, scale_dir: float = 0.0, scale_time: float = 0.0, seed: int | None = None
    ) -> None:
        super().__init__()
        if not (0 <= scale_dir < 1 and 0 <= scale_time < 1):
            raise ValueError(
                f"scale_dir = {scale_dir:g} and scale_time = {scale_time:g} must be in [0, 1): "
                "with a scale of 1 a direction or a time could be 0"
            )
        self.scale_dir = scale_dir
        self.scale_time = scale_time
        half = TIME_CHANNELS // 2
        exponents = torch.arange(half, dtype=torch.float32) / (half - 1)
        self.register_buffer("freqs", (1 / 10000) ** exponents, persistent=False)
        self.map_layer0 = InvariantLinear(TIME_CHANNELS, TIME_CHANNELS)
        self.enc_layer0 = InvariantLinear(FEATURE_SIDE**2, 128)
        self.enc_layer1 = InvariantLinear(128, 4)
        merged = 4 + 2 * TIME_CHANNELS
        self.fc_r = InvariantLinear(merged, 1)
        self.fc_scale_dir = InvariantLinear(merged, 1) if scale_dir else None
        self.fc_scale_time = InvariantLinear(merged, 1) if scale_time else None
        self._initialise(seed)

    def _initialise(self, seed: int | None) -> None:
        """Xavier-uniform for the time embedding, Kaiming-normal (gain 1) elsewhere, biases 0."""
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        for layer in self.children():
            if not isinstance(layer, nn.Linear):
                continue
            fan_out, fan_in = layer.weight.shape
            if layer is self.map_layer0:
                nn.init.xavier_uniform_(layer.weight, generator=generator)
            else:
                nn.init.normal_(layer.weight, std=fan_in**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, node: Node, t_next: Tensor) -> InsertedNode:
        batch = node.x.shape[0]
        parts = [self._encode(node), self._embed(node.t, batch), self._embed(t_next, batch)]
        h = torch.cat(parts, dim=1)

        def out(value: Tensor) -> Tensor:
            return value.to(node.x.dtype).reshape(-1, 1, 1, 1)

        r = out(self.fc_r(h).sigmoid())
        return InsertedNode(
            r,
            out(_centred(self.fc_scale_dir(h), self.scale_dir))
            if self.fc_scale_dir
            else torch.ones_like(r),
            out(_centred(self.fc_scale_time(h), self.scale_time))
            if self.fc_scale_time
            else torch.ones_like(r),
        )

    def _encode(self, node: Node) -> Tensor:
        """(B, 4) from the channel mean of the bottleneck, or from zeros without one (AFS)."""
        weight = self.enc_layer0.weight
        if node.feat is None:
            flat = weight.new_zeros(node.x.shape[0], FEATURE_SIDE**2)
        else:
            side = (FEATURE_SIDE, FEATURE_SIDE)
            pooled = F.adaptive_avg_pool2d(node.feat.to(weight)[:, None], side)
            flat = pooled.flatten(1)
        return self.enc_layer1(F.silu(self.enc_layer0(flat)))

    def _embed(self, t: Tensor, batch: int) -> Tensor:
        """(B, 8) positional embedding of a noise level, through the shared layer."""
        weight = self.map_layer0.weight
        angles = t.to(weight).reshape(-1, 1) * self.freqs.to(weight)
        emb = F.silu(self.map_layer0(torch.cat([angles.sin(), angles.cos()], dim=1)))
        return emb.expand(batch, -1)


def _centred(logit: Tensor, scale: float) -> Tensor:
    """Map a logit to (1 - scale, 1 + scale); a zero logit gives 1."""
    return 2 * scale * logit.sigmoid() + (1 - scale)
