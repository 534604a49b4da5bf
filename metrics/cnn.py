"""The network of the bundled CIFAR-10 detector, and its file format.

A small convolutional classifier, whose globally pooled last activations are the features. The stem
is a fixed whitening of 2x2 patches (Coates & Ng, 2011), which shortens the training.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

RESOLUTION = 32
_STEM = 24  # both signs of the 3 * 2 * 2 = 12 principal directions of a patch
_SCHEMA = 1


@dataclass(frozen=True)
class CNNConfig:
    """Widths of the three stages (each halves the resolution) and the number of classes."""

    channels: tuple[int, int, int] = (48, 128, 192)
    classes: int = 10


class ClassPrediction(NamedTuple):
    features: Tensor
    logits: Tensor


class _Stage(nn.Sequential):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(c_out),
            nn.SiLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.SiLU(),
        )


class SmallCNN(nn.Module):
    """Classifier of 32x32 RGB images; ``features`` are the pooled activations before the head."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))
        self.stem = nn.Conv2d(3, _STEM, 2)
        widths = (_STEM, *config.channels)
        self.stages = nn.Sequential(*map(_Stage, widths[:-1], widths[1:]))
        for module in self.stages.modules():
            if isinstance(module, nn.Conv2d):  # starts as the identity: needs fewer epochs
                nn.init.dirac_(module.weight[: module.in_channels])
        self.head = nn.Linear(widths[-1], config.classes)
        self.trainable_()

    def trainable_(self) -> SmallCNN:
        """Make all parameters trainable except the kernels of the stem, see `whiten_`."""
        self.requires_grad_(True)
        self.stem.weight.requires_grad_(False)
        return self

    @property
    def dim(self) -> int:
        return self.config.channels[-1]

    def whiten_(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the input normalisation and the stem from uint8 images (B, 3, 32, 32)."""
        x = images.double() / 255
        self.mean.copy_(x.mean((0, 2, 3)))
        self.std.copy_(x.std((0, 2, 3)))
        patches = nn.functional.unfold(self.normalise(images).double(), 2)
        patches = patches.transpose(1, 2).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        directions = (vectors / (values + eps).sqrt()).T.reshape(12, 3, 2, 2)
        with torch.no_grad():
            self.stem.weight.copy_(torch.cat([directions, -directions]))
            assert self.stem.bias is not None
            self.stem.bias.zero_()

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 with zero mean and unit standard deviation per channel."""
        return (images.float() / 255 - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)

    def forward(self, images: Tensor) -> ClassPrediction:
        """uint8 (B, 3, 32, 32) -> features (B, dim) and class logits (B, classes)."""
        x = self.normalise(images).contiguous(memory_format=torch.channels_last)
        x = self.stages(nn.functional.silu(self.stem(x)))
        features = x.float().mean((2, 3))
        return ClassPrediction(features, self.head(features))


def save_cnn(model: SmallCNN, path: Path, record: dict[str, object]) -> None:
    """Write weights and a JSON record; matrices and kernels are in float16."""
    tensors = {
        k: (v.half() if v.is_floating_point() and v.ndim > 1 else v).contiguous().cpu()
        for k, v in model.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    header = {"schema": _SCHEMA, "config": asdict(model.config), **record}
    save_file(tensors, path, metadata={"record": json.dumps(header)})


def load_cnn(path: Path) -> tuple[SmallCNN, dict[str, object]]:
    """Read a file written by ``save_cnn``: the network (float32, evaluation mode) and its record.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a detector or has a newer schema.
    """
    if not path.is_file():
        raise FileNotFoundError(f"detector file {path} does not exist: check the path.")
    with open(path, "rb"):  # safetensors calls a file that cannot be opened a missing one
        pass
    try:
        with safe_open(path, "pt") as file:
            record = json.loads(file.metadata()["record"])
            tensors = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118
        if record["schema"] > _SCHEMA:
            raise ValueError(
                f"detector file {path} has schema {record['schema']}, this version reads up to "
                f"{_SCHEMA}: update the toolkit."
            )
        config = record["config"]
        made = CNNConfig(tuple(config["channels"]), config["classes"])
        with torch.device("meta"):
            count = sum(weight.numel() for weight in SmallCNN(made).parameters())
        if count > sum(tensor.numel() for tensor in tensors.values()):
            raise TypeError(f"{count} weights are more than it holds")
        model = SmallCNN(made)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as err:
        raise ValueError(
            f"{path} is not a detector file of tools.train_detector ({err}): "
            "pass a file written by it."
        ) from err
    differing = [k for k in missing if not k.endswith("num_batches_tracked")] + unexpected
    if differing:
        raise ValueError(
            f"detector file {path} does not fit its own record (tensor {differing[0]}): train it "
            "again with tools.train_detector."
        )
    return model.eval().requires_grad_(False), record
