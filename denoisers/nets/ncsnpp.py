"""NCSN++ (Song et al. 2021, arXiv:2011.13456) under the names of its published checkpoints.

The published NCSN++ for continuous noise levels *is* :class:`SongUNet` with Fourier features, a
(1, 3, 3, 1) filter and a second pyramid beside its encoder, so there is no second network here.
Only names differ, and attention, whose four matrices are transposed and apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from denoisers.nets.layers import Conv2d, UNetBlock
from denoisers.nets.song import SongUNet
from runtime.errors import UserError

ATTENTION = 16  #: pixels along a side where every published network has it
#: Settings that tensors do not show; a file may come with others.
UNSEEN: Mapping[str, Any] = {"resample_filter": [1, 3, 3, 1], "attn_resolutions": [ATTENTION]}
#: Settings of them all.
COMMON: Mapping[str, Any] = {
    "class_name": "VEPrecond",
    "model_type": "SongUNet",
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
}
#: Names within a published module that has but one layer; others have none.
INNER = {"aux_skip": "Conv_0.", "aux_residual": "Conv2d_0."}

#: What a module of a kind has, and none before it in this list.
MARKS = {
    "Dense_0.weight": "block",
    "NIN_0.W": "attention",
    "Conv2d_0.weight": "residual",
    "Conv_0.weight": "skip",
}


def published(net: SongUNet) -> dict[str, Tensor]:
    """The weights of ``net`` under their published names, in their order and shapes.

    They are views: what is copied into them is in the network.
    """
    modules = [{"W": net.map_noise.get_buffer("freqs")}]
    modules += [_affine(net.map_layer0), _affine(net.map_layer1)]
    for name, module in (*net.enc.items(), *net.dec.items()):
        if isinstance(module, UNetBlock):
            modules.append(_block(module))
            if module.heads:
                modules.append(_attention(module))
        elif not isinstance(module, Conv2d) or module.kernel:  # a filter alone has no weights
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
    found = [_affine(layer, prefix) for prefix, layer in layers.items() if layer is not None]
    return {name: tensor for layer in found for name, tensor in layer.items()}


def _attention(block: UNetBlock) -> dict[str, Tensor]:
    """One head: queries, keys, values and projection, ``y = x W + b`` over channels."""
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
    """The weights of a published network by the number and the kind of its modules."""

    source: str  #: names the file in errors
    tensors: Mapping[int, Mapping[str, Tensor]]  #: in ascending order
    kinds: Mapping[int, str]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], source: str) -> Modules:
        """Raises UserError unless the first module is that of Fourier features."""
        found: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if match := re.fullmatch(r"all_modules\.(\d{1,4})\.(.+)", name):
                found.setdefault(int(match[1]), {})[match[2]] = tensor
        if "W" not in found.get(0, {}):
            raise UserError(
                f"{source} holds no Fourier features of the noise level (all_modules.0.W); give an "
                "NCSN++ of score-SDE for continuous noise levels"
            )
        ordered = {index: found[index] for index in sorted(found)}
        return cls(source, ordered, {index: _kind(module) for index, module in ordered.items()})

    def size(self, index: int, name: str, axis: int = 0) -> int:
        """Of an axis of a tensor, 1 or more; UserError if there is none."""
        tensor = self.tensors.get(index, {}).get(name)
        if tensor is None or tensor.ndim <= axis or not tensor.shape[axis]:
            raise UserError(f"{self.source} has no 'all_modules.{index}.{name}' as NCSN++ has it")
        return tensor.shape[axis]

    def levels(self) -> tuple[int, list[int]]:
        """Blocks per level of the encoder, and the first of each level's.

        One block more per level makes the decoder, two the middle.  Those that resample are the
        only ones with a second path between equal widths.  Raises UserError if these do not add up.
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
    """Settings, as for :func:`precond.build`, of the network with these published tensors.

    ``base`` holds those that come with the file ``source``.  An image is so large that attention
    is at 16 x 16 pixels, unless ``base`` says ``img_resolution``.  Raises UserError if the network
    is of another kind, its blocks do not add up, or ``base`` says something else than they.
    """
    modules = Modules.of(tensors, source)
    per_level, firsts = modules.levels()
    attended = [i for i, k in enumerate(firsts) if modules.kinds.get(k + 1) == "attention"]
    told = {**UNSEEN, **base}
    resolution = told.get("img_resolution", ATTENTION << max(attended, default=0))
    if type(resolution) is not int or not (attended or "img_resolution" in told):
        raise UserError(
            f"nothing in {source} tells the size of its images; give safetensors whose metadata "
            "hold it as img_resolution, a whole number, in their config"
        )
    features, kinds = modules.size(0, "W"), list(modules.kinds.values())
    found = {
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
    for name, value in found.items():
        if told.get(name, value) != value:
            raise UserError(
                f"{source} has {name} {value} where its settings say {told[name]}; it holds the "
                "weights of another network"
            )
    return {**told, **found}
