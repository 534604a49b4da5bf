"""NCSN++ once more, written from its published definition, and files in its published format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from denoisers.families.precond import build
from denoisers.nets.ncsnpp import COMMON, UNSEEN, published
from denoisers.nets.song import SongUNet

#: (encoder_type, decoder_type): published as (progressive_input, progressive)
KINDS = {"cifar": ("residual", "standard"), "ffhq": ("skip", "skip")}
RANGE = (0.02, 100.0)  #: noise levels in our units
TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8


def settings(kind: str = "cifar", **changes: Any) -> dict[str, Any]:
    """Of a tiny network of 16 x 16 pixels, as for ``build``."""
    encoder, decoder = KINDS[kind]
    tiny = {"img_resolution": 16, "img_channels": 3, "model_channels": 8, "channel_mult": [1, 2]}
    tiny |= {"num_blocks": 1, "encoder_type": encoder, "decoder_type": decoder}
    return {**COMMON, **UNSEEN, **tiny, **changes}


def empty(config: Mapping[str, Any]) -> SongUNet:
    net = build(config).model
    assert isinstance(net, SongUNet)
    return net


def weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random ones under published names, the noise levels (in [0, 1] units) among them."""
    noise = torch.Generator().manual_seed(seed)
    own = {k: torch.randn(v.shape, generator=noise) for k, v in published(empty(config)).items()}
    for name, tensor in own.items():
        tensor.mul_(0.1 if name != "all_modules.0.W" else 2)
        if tensor.ndim == 1 and name.endswith("weight"):
            tensor.add_(1)
    low, high = (math.log(sigma / 2) for sigma in RANGE)
    return {"sigmas": torch.linspace(high, low, 1000, dtype=torch.float64).exp(), **own}


def checkpoint(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """As score-SDE saves it: what is trained differs from its average, which is a bare list."""
    fixed = ("sigmas", "all_modules.0.W")
    model = {f"module.{k}": v if k in fixed else torch.zeros_like(v) for k, v in tensors.items()}
    averages = [v for k, v in tensors.items() if k not in fixed]
    ema = {"decay": 0.999, "num_updates": 10, "shadow_params": averages}
    optimizer = {"state": {0: {"step": 3, "exp_avg": averages[0]}}, "param_groups": [{"lr": 2e-4}]}
    torch.save({"optimizer": optimizer, "model": model, "ema": ema, "step": 3}, path)
    return path


class ScoreNetwork:
    """The score and the middle's channel mean at ``x`` (data in [0, 1]), module after module."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.tensors = {k: v.double() for k, v in tensors.items()}
        self.config = config

    def __call__(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        c, depth = self.config, len(self.config["channel_mult"])
        self.next, x = 0, 2 * x.double() - 1
        angle = math.log(sigma) * 2 * math.pi * self.take()["W"]
        first, second = self.take(), self.take()
        emb = torch.cat([angle.sin(), angle.cos()])[None] @ first["weight"].T + first["bias"]
        self.emb = F.silu(emb) @ second["weight"].T + second["bias"]
        pyramid, hs = x, [conv(x, self.take(), "", 1)]
        for level in range(depth):
            if level:
                h = self.block(hs[-1], halve)
                if c["encoder_type"] == "skip":
                    pyramid = halve(pyramid)
                    h = conv(pyramid, self.take(), "Conv_0.") + h
                else:
                    m = self.take()
                    smooth = blur(F.pad(pyramid, (2,) * 4))
                    pyramid = F.conv2d(smooth, m["Conv2d_0.weight"], m["Conv2d_0.bias"], stride=2)
                    pyramid = h = (pyramid + h) / math.sqrt(2)
                hs.append(h)
            for _ in range(c["num_blocks"]):
                hs.append(self.attended(self.block(hs[-1])))
        h = self.block(self.attention(self.block(hs[-1])))
        middle, image = h.mean(1), None
        for level in reversed(range(depth)):
            for _ in range(c["num_blocks"] + 1):
                h = self.block(torch.cat([h, hs.pop()], 1))
            h = self.attended(h)
            if c["decoder_type"] == "skip":
                image = self.image(h) + (0 if image is None else double(image))
            if level:
                h = self.block(h, double)
        h = self.image(h) if image is None else image
        assert f"all_modules.{self.next}.weight" not in self.tensors
        return h / sigma, middle

    def take(self) -> dict[str, Tensor]:
        prefix = f"all_modules.{self.next}."
        self.next += 1
        named = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
        assert named, prefix
        return named

    def block(self, x: Tensor, resample: Any = None) -> Tensor:
        m = self.take()
        h = F.silu(norm(x, m, "GroupNorm_0."))
        if resample is not None:
            h, x = resample(h), resample(x)
        h = conv(h, m, "Conv_0.", 1)
        h = h + (F.silu(self.emb) @ m["Dense_0.weight"].T + m["Dense_0.bias"])[..., None, None]
        h = conv(F.silu(norm(h, m, "GroupNorm_1.")), m, "Conv_1.", 1)
        x = conv(x, m, "Conv_2.") if "Conv_2.weight" in m else x
        return (x + h) / math.sqrt(2)

    def attended(self, x: Tensor) -> Tensor:
        return self.attention(x) if x.shape[-1] in self.config["attn_resolutions"] else x

    def attention(self, x: Tensor) -> Tensor:
        m = self.take()

        def nin(h: Tensor, i: int) -> Tensor:
            mixed = torch.einsum("bchw,cd->bdhw", h, m[f"NIN_{i}.W"])
            return mixed + m[f"NIN_{i}.b"][:, None, None]

        q, k, v = (nin(norm(x, m, "GroupNorm_0."), i).flatten(2) for i in range(3))
        likeness = torch.einsum("bcp,bcq->bpq", q, k) / math.sqrt(x.shape[1])
        h = torch.einsum("bpq,bcq->bcp", likeness.softmax(-1), v).reshape(x.shape)
        return (x + nin(h, 3)) / math.sqrt(2)

    def image(self, x: Tensor) -> Tensor:
        h = F.silu(norm(x, self.take(), ""))
        return conv(h, self.take(), "", 1)


def norm(x: Tensor, m: Mapping[str, Tensor], name: str) -> Tensor:
    groups = min(x.shape[1] // 4, 32)
    return F.group_norm(x, groups, m[f"{name}weight"], m[f"{name}bias"], eps=1e-6)


def conv(x: Tensor, m: Mapping[str, Tensor], name: str, pad: int = 0) -> Tensor:
    return F.conv2d(x, m[f"{name}weight"], m[f"{name}bias"], padding=pad)


def blur(x: Tensor) -> Tensor:
    """The filter at every place where it fits."""
    taps = torch.outer(TAPS, TAPS).double().expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, taps, groups=x.shape[1])


def halve(x: Tensor) -> Tensor:
    return blur(F.pad(x, (1,) * 4))[..., ::2, ::2]


def double(x: Tensor) -> Tensor:
    sparse = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    sparse[..., ::2, ::2] = x
    return 4 * blur(F.pad(sparse, (2, 1, 2, 1)))
