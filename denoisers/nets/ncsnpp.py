"""NCSN++ (Song et al. 2021, arXiv:2011.13456) under the names of its published checkpoints.

The published NCSN++ for continuous noise levels is :class:`SongUNet` with Fourier features, a
(1, 3, 3, 1) filter and a second pyramid beside its encoder.  Only the names differ, and the layout
of attention, whose four matrices are transposed and stored separately.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from checkpoints.weights import axis_size
from denoisers.nets.layers import Conv2d, UNetBlock
from denoisers.nets.song import SongUNet
from runtime.errors import UserError

ATTENTION = 16  #: resolution with attention in every published network
#: Settings that cannot be inferred from the tensors, unless the file states others.
UNSEEN: Mapping[str, Any] = {"resample_filter": [1, 3, 3, 1], "attn_resolutions": [ATTENTION]}
#: Settings of all published networks.
COMMON: Mapping[str, Any] = {
    "class_name": "VEPrecond",
    "model_type": "SongUNet",
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
}
#: Names of the single layer in modules of these kinds; in others it has no name of its own.
INNER = {"aux_skip": "Conv_0.", "aux_residual": "Conv2d_0."}

#: The kind of a module is that of the first of these names that it has.
MARKS = {
    "Dense_0.weight": "block",
    "NIN_0.W": "attention",
    "Conv2d_0.weight": "residual",
    "Conv_0.weight": "skip",
}


def published(net: SongUNet) -> dict[str, Tensor]:
    """Views of the weights of ``net``, with their published names, order and shapes."""
    modules = [{"W": net.map_noise.get_buffer("freqs")}]
    modules += [_affine(net.map_layer0), _affine(net.map_layer1)]
    for name, module in (*net.enc.items(), *net.dec.items()):
        if isinstance(module, UNetBlock):
            modules.append(_block(module))
            if module.heads:
                modules.append(_attention(module))
        elif not isinstance(module, Conv2d) or module.kernel:  # pure resampling has no weights
            modules.append(_affine(module, INNER.get(name.partition("_")[2], "")))
    return {
        f"all_modules.{index}.{name}": tensor
        for index, module in enumerate(modules)
        for name, tensor in module.items()
    }


def _affine(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{kind}": module.get_parameter(kind).detach() for kind in ("weight", "bias")}


def _block(block: UNetBlock) -> dict[str, Tensor]:
    layers: dict[str, nn.Module | None] = {
        "GroupNorm_0.": block.norm0,
        "Conv_0.": block.conv0,
        "Dense_0.": block.affine,
        "GroupNorm_1.": block.norm1,
        "Conv_1.": block.conv1,
        "Conv_2.": block.skip,
    }
    views = [_affine(layer, prefix) for prefix, layer in layers.items() if layer is not None]
    return {name: tensor for layer in views for name, tensor in layer.items()}


def _attention(block: UNetBlock) -> dict[str, Tensor]:
    """Queries, keys, values and projection of the single head, as ``y = x W + b``."""
    width = block.out_channels
    weight = block.qkv.weight.detach().view(width, 3, width)  # outputs: channel, then q/k/v
    bias = block.qkv.bias.detach().view(width, 3)
    views = _affine(block.norm2, "GroupNorm_0.")
    for i in range(3):
        views |= {f"NIN_{i}.W": weight[:, i].T, f"NIN_{i}.b": bias[:, i]}
    projection = block.proj.weight.detach().view(width, width).T
    return views | {"NIN_3.W": projection, "NIN_3.b": block.proj.bias.detach()}


@dataclass(frozen=True)
class Modules:
    """The weights of a published network by the index and the kind of its modules."""

    source: str  #: names the file in errors
    tensors: Mapping[int, Mapping[str, Tensor]]  #: in ascending order
    kinds: Mapping[int, str]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], source: str) -> Modules:
        """Raises UserError unless the first module is that of Fourier features."""
        modules: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if match := re.fullmatch(r"all_modules\.(\d{1,4})\.(.+)", name):
                modules.setdefault(int(match[1]), {})[match[2]] = tensor
        if "W" not in modules.get(0, {}):
            raise UserError(
                f"{source} holds no Fourier features of the noise level (all_modules.0.W); give an "
                "NCSN++ of score-SDE for continuous noise levels"
            )
        ordered = {index: modules[index] for index in sorted(modules)}
        return cls(source, ordered, {index: _kind(module) for index, module in ordered.items()})

    def size(self, index: int, name: str, axis: int = 0) -> int:
        """The length of an axis of a tensor, 1 or more; UserError if it does not exist."""
        entries = {f"all_modules.{index}.{k}": v for k, v in self.tensors.get(index, {}).items()}
        return axis_size(entries, f"all_modules.{index}.{name}", axis, self.source, "NCSN++")

    def levels(self) -> tuple[int, list[int]]:
        """The number of blocks per level of the encoder, and the index of each level's first one.

        The decoder has one block more per level, the middle has two.  Blocks that resample are the
        only ones with a convolution on the second path between equal widths.  Raises UserError if
        the numbers are inconsistent.
        """
        blocks = [index for index, kind in self.kinds.items() if kind == "block"]
        plain = [index for index in blocks if not self._resamples(index)]
        depth = 1 + (len(blocks) - len(plain)) // 2
        per_level = ((len(plain) - 2) // depth - 1) // 2
        if per_level < 1 or len(blocks) != depth * (2 * per_level + 1) + 2 + 2 * (depth - 1):
            raise UserError(
                f"{self.source} has {len(blocks)} residual blocks, {len(blocks) - len(plain)} of "
                "which resample, and they are no NCSN++; it holds the weights of another network"
            )
        return per_level, plain[: depth * per_level : per_level]

    def _resamples(self, index: int) -> bool:
        widths = {self.size(index, "Conv_0.weight", axis) for axis in (0, 1)}
        return "Conv_2.weight" in self.tensors[index] and len(widths) == 1


def _kind(module: Mapping[str, Tensor]) -> str:
    for mark, kind in MARKS.items():
        if mark in module:
            return kind
    return "norm" if "weight" in module and module["weight"].ndim == 1 else "other"


def settings_from(
    tensors: Mapping[str, Tensor], base: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Settings, for :func:`precond.build`, of the network with these published tensors.

    ``base`` holds settings stored in the file ``source``.  Without ``img_resolution`` among them,
    the resolution is such that attention is at 16 x 16 pixels.  Raises UserError if the network is
    of another kind, or differs from ``base``.
    """
    modules = Modules.of(tensors, source)
    per_level, firsts = modules.levels()
    attended = [i for i, k in enumerate(firsts) if modules.kinds.get(k + 1) == "attention"]
    stated = {**UNSEEN, **base}
    resolution = stated.get("img_resolution", ATTENTION << max(attended, default=0))
    if type(resolution) is not int or not (attended or "img_resolution" in stated):
        raise UserError(
            f"nothing in {source} tells the size of its images; give safetensors whose metadata "
            "hold it as img_resolution, a whole number, in their config"
        )
    features, kinds = modules.size(0, "W"), list(modules.kinds.values())
    inferred = {
        **COMMON,
        "img_resolution": resolution,
        "img_channels": modules.size(3, "weight", 1),
        "model_channels": features,
        "channel_mult": [modules.size(k, "Conv_0.weight") // features for k in firsts],
        "num_blocks": per_level,
        "attn_resolutions": [resolution >> level for level in attended],
        "encoder_type": next((k for k in ("residual", "skip") if k in kinds), "standard"),
        "decoder_type": "skip" if kinds.count("norm") == len(firsts) > 1 else "standard",
    }
    for name, value in inferred.items():
        if stated.get(name, value) != value:
            raise UserError(
                f"{source} has {name} {value} where its settings say {stated[name]}; it holds the "
                "weights of another network"
            )
    return {**stated, **inferred}
