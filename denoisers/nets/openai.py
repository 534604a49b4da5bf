"""The U-Net of guided diffusion (Dhariwal and Nichol 2021, arXiv:2105.05233) and its classifier.

The same class is used for guided diffusion ("ADM"), consistency models (arXiv:2303.01469) and
unconditional latent diffusion (arXiv:2112.10752), under their published parameter names;
:func:`settings_from` infers most settings from the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.pickles.records import shown
from checkpoints.weights import axis_size
from denoisers.nets.batch_invariant import InvariantConv2d, InvariantLinear
from denoisers.nets.layers import channel_mean, one_of
from denoisers.nets.openai_blocks import (
    ATTENTIONS,
    AttentionBlock,
    AttentionPool,
    Block,
    Downsample,
    Float32GroupNorm,
    ResBlock,
    Upsample,
)
from denoisers.precision import wide_dtype
from runtime.bounds import MOST_SIDE
from runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """Constructor settings of the U-Net and the classifier, under their published names.

    ``attention_resolutions`` are downsampling factors (1, 2, 4, ...); level i has
    ``channel_mult[i] * model_channels`` channels; with ``resblock_updown`` residual blocks
    resample, otherwise single convolutions.  Raises ValueError for an unknown ``attention``.
    """

    image_size: int
    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int
    attention_resolutions: Sequence[int]
    channel_mult: Sequence[float]
    num_classes: int | None = None
    num_heads: int = 4
    num_head_channels: int | None = None
    dropout: float = 0.0
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    attention: str = "legacy"

    def __post_init__(self) -> None:
        one_of("attention", self.attention, ATTENTIONS)


class Encoder(nn.Module):
    """The common part of the U-Net and the classifier: embedding, encoder and middle block.

    ``settings`` are those of :class:`EncoderSettings`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = own = EncoderSettings(**settings)
        self.dtype = torch.float32  #: of the convolutions, except the last
        base, emb_channels = own.model_channels, 4 * own.model_channels
        #: (downsampling, channels) of each level, finest first
        self.levels = [(1 << i, int(mult * base)) for i, mult in enumerate(own.channel_mult)]
        self._res = partial(
            ResBlock,
            emb_channels=emb_channels, dropout=own.dropout, scale_shift=own.use_scale_shift_norm,
        )  # fmt: skip
        self._attend = partial(
            AttentionBlock,
            num_heads=own.num_heads, num_head_channels=own.num_head_channels, layout=own.attention,
        )  # fmt: skip
        self.time_embed = nn.Sequential(
            InvariantLinear(base, emb_channels),
            nn.SiLU(),
            InvariantLinear(emb_channels, emb_channels),
        )
        classes = own.num_classes
        self.label_emb = nn.Embedding(classes, emb_channels) if classes else None
        width = self.levels[0][1]
        self.input_blocks = nn.ModuleList(
            [Block(InvariantConv2d(own.in_channels, width, 3, padding=1))]
        )
        self.widths = [width]  #: channels of each input block, which the decoder concatenates
        for factor, channels in self.levels:
            if factor > 1:
                resample = own.resblock_updown
                down = self._res(width, resample="down") if resample else Downsample(width)
                self.input_blocks.append(Block(down))
                self.widths.append(width)
            for _ in range(own.num_res_blocks):
                self.input_blocks.append(self._block(width, channels, factor))
                width = channels
                self.widths.append(width)
        self.middle_block = Block(self._res(width), self._attend(width), self._res(width))

    def _block(self, width: int, channels: int, factor: int) -> Block:
        """A residual block, with attention where this level has it."""
        attended = factor in self.settings.attention_resolutions
        attend = [self._attend(channels)] if attended else []
        return Block(self._res(width, channels), *attend)

    def cast(self, dtype: torch.dtype) -> None:
        """Run the convolutions in ``dtype``.

        Below float32, embeddings, normalisations and the output layers stay in float32, as in the
        published code.
        """
        self.dtype = dtype
        self.to(self.wide)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d) and not name.startswith("out."):
                module.to(dtype)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of everything but the convolutions: float32 at least."""
        return wide_dtype(self.dtype)

    def embed(self, times: Tensor, labels: Tensor | None) -> Tensor:
        """Embedding (B, 4 model_channels) of times (B,) and, with classes, labels (B,) int64."""
        device = next(self.parameters()).device
        angles = times.to(self.wide).to(device)[:, None] * self.frequencies(device)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if self.label_emb is None or labels is None:
            return emb
        return emb + self.label_emb(labels.to(device))

    def frequencies(self, device: torch.device) -> Tensor:
        """(model_channels / 2,), decreasing from 1 to almost 1e-4.

        In the published form: times reach 1000, so rounding shows in the sixth digit.
        """
        half = self.settings.model_channels // 2
        steps = torch.arange(half, dtype=self.wide, device=device)
        return (-math.log(1e4) * steps / half).exp()

    def encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output of the middle block, and those of the input blocks."""
        h = x.to(self.dtype).to(emb.device)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        return self.middle_block(h, emb), skips


class UNet(Encoder):
    """The denoising network; its bottleneck is ``middle_block``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        own = self.settings
        width, skips = self.widths[-1], list(self.widths)
        self.output_blocks = nn.ModuleList()
        for factor, channels in reversed(self.levels):
            for i in range(own.num_res_blocks + 1):
                block = self._block(width + skips.pop(), channels, factor)
                width = channels
                if factor > 1 and i == own.num_res_blocks:
                    resample = own.resblock_updown
                    block.append(self._res(width, resample="up") if resample else Upsample(width))
                self.output_blocks.append(block)
        self.out = nn.Sequential(
            Float32GroupNorm(width),
            nn.SiLU(),
            InvariantConv2d(width, own.out_channels, 3, padding=1),
        )

    def forward(
        self, x: Tensor, times: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Raw output (B, out_channels, H, W) and the bottleneck's channel mean (B, h, w).

        ``x`` (B, C, H, W), ``times`` (B,) and, for a network with classes, ``labels`` (B,) int64
        may have any dtype and device; the results are on the network's, in float32 at least.
        """
        emb = self.embed(times, labels)
        h, skips = self.encode(x, emb)
        feat = channel_mean(h)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.to(emb.dtype)), feat


class Classifier(Encoder):
    """The noisy-image classifier: the encoder half, then attention pooling."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        own = self.settings
        factor, width = self.levels[-1]
        side = own.image_size // factor
        pool = AttentionPool(side, width, own.out_channels, own.num_heads, own.num_head_channels)
        self.out = nn.Sequential(Float32GroupNorm(width), nn.SiLU(), pool)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """Logits (B, out_channels) of ``x`` (B, C, H, W) at ``times`` (B,)."""
        emb = self.embed(times, None)
        return self.out(self.encode(x, emb)[0].to(emb.dtype))


def is_openai(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict holds a U-Net or a classifier of this family, without text attention."""
    marks = ("time_embed.2.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight")
    return all(mark in tensors for mark in marks)


def untold(tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> list[str]:
    """Settings that neither the weights of a U-Net show nor ``told`` names.

    Any number of heads fits the same weights, and so does any size of images; one-dimensional
    convolutions in attention fit two orders of its channels.
    """
    missing = [] if "image_size" in told else ["image_size"]
    if told.get("num_head_channels") is None and "num_heads" not in told:
        missing.append("num_head_channels")
    if "attention" not in told and tensors["middle_block.1.qkv.weight"].ndim == 3:
        missing.append("attention")
    return missing


def settings_from(tensors: Mapping[str, Tensor], base: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor settings of the network in a state dict, from its names and shapes.

    ``base`` has those that cannot be inferred: ``image_size``, ``num_heads``,
    ``num_head_channels``, ``dropout`` and whether attention is "legacy" or "new".  Raises UserError
    if an entry is missing, the blocks are of no such network, or ``base`` has an unknown setting.
    """
    unknown = sorted(set(base) - {field.name for field in fields(EncoderSettings)})
    if unknown:
        raise UserError(
            f"'{unknown[0]}' is no setting of the U-Net of guided diffusion; remove it from its "
            "config"
        )
    _check_stated(base)
    is_classifier = "out.2.positional_embedding" in tensors
    depth, stride = _levels(tensors, base["image_size"] if is_classifier else None)
    first = [f"input_blocks.{1 + level * stride}" for level in range(depth)]
    model_channels = _size(tensors, "time_embed.0.weight", 1)
    widths = [_size(tensors, f"{block}.0.out_layers.3.weight") for block in first]
    classes = _size(tensors, "label_emb.weight") if "label_emb.weight" in tensors else None
    own = {
        "in_channels": _size(tensors, "input_blocks.0.0.weight", 1),
        "model_channels": model_channels,
        "out_channels": _size(tensors, "out.2.c_proj.weight" if is_classifier else "out.2.weight"),
        "num_res_blocks": stride - 1,
        "attention_resolutions": [
            1 << level for level in range(depth) if f"{first[level]}.1.qkv.weight" in tensors
        ],
        "channel_mult": [width / model_channels for width in widths],
        "num_classes": classes,
        "use_scale_shift_norm": (
            _size(tensors, f"{first[0]}.0.emb_layers.1.weight") == 2 * widths[0]
        ),
        "resblock_updown": f"input_blocks.{stride}.0.op.weight" not in tensors,
    }
    if tensors["middle_block.1.qkv.weight"].ndim == 4:
        own["attention"] = "flash"
    return {**base, **own}


def _check_stated(base: Mapping[str, Any]) -> None:
    """Raise UserError for a setting that no weights bear out and that is no plausible size."""
    for name in ("image_size", "num_heads", "num_head_channels"):
        value = base.get(name, 1)
        free = value is None and name == "num_head_channels"
        if not free and not (type(value) is int and 1 <= value <= MOST_SIDE):
            raise UserError(
                f"'{name}' of the U-Net is {shown(value)}, no whole number from 1 to {MOST_SIDE}; "
                "correct it in its config"
            )


def _size(tensors: Mapping[str, Tensor], name: str, axis: int = 0) -> int:
    return axis_size(tensors, name, axis, "the file", "the U-Net of guided diffusion")


def _levels(tensors: Mapping[str, Tensor], image_size: int | None) -> tuple[int, int]:
    """The number of levels, and of input blocks per level; ``image_size`` is for a classifier.

    Raises UserError if the levels do not have the same number of blocks.
    """

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in tensors)

    if image_size is not None:  # no decoder, but a position for each pixel of the coarsest level
        side = math.isqrt(_size(tensors, "out.2.positional_embedding", 1) - 1)
        depth = (image_size // max(side, 1)).bit_length()
    else:  # the last module of every level but the finest is an upsampling
        depth = 1 + count(r"output_blocks\.\d+\.[12]\.(in_layers\.2|conv)\.weight")
    # the first convolution; then per level its blocks and, but for the last, a downsampling
    stages = count(r"input_blocks\.\d+\.0\.(in_layers\.2\.|op\.|)weight")
    if depth < 1 or stages % depth or stages // depth < 2:
        raise UserError(
            f"{stages} input blocks cannot be {depth} levels with the same number of blocks; the "
            "weights are of another network"
        )
    return depth, stages // depth
