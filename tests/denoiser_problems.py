"""Small networks, and images that they can learn."""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from denoisers.families.precond import EDMPrecond, build
from denoisers.training.batches import PARTS, TrainingBatch
from denoisers.training.trainer import Trainer
from runtime.dist import World
from runtime.noise import SeedNoise

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
SONG: dict[str, Any] = {
    "class_name": "EDMPrecond",
    "img_resolution": 8,
    "img_channels": 3,
    "model_type": "SongUNet",
    "model_channels": 16,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
DHARIWAL: dict[str, Any] = {
    **{k: v for k, v in SONG.items() if k != "model_type"},
    "model_channels": 16,
    "attn_resolutions": [8],
    "label_dim": 4,
    "augment_dim": 9,
    "label_dropout": 0.2,
    "dropout": 0.1,
}


def network(settings: dict[str, Any], **more: Any) -> EDMPrecond:
    torch.manual_seed(0)
    net = build({**settings, **more})
    assert isinstance(net, EDMPrecond)
    return net


def flat_batch(first: int, count: int, shape: tuple[int, int, int] = (3, 8, 8)) -> TrainingBatch:
    """Images of one grey each, N(0, 1/4) in [-1, 1]; class 0 to 3 by brightness."""
    numbers = range(first, first + count)
    grey = SeedNoise(numbers).normal("grey", (1, 1, 1)) * 0.5
    images = ((grey.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).repeat(1, *shape)
    chance = SeedNoise(numbers).normal("train", (sum(PARTS) + math.prod(shape),))
    classes = torch.bucketize(grey.flatten(), torch.tensor([-0.3, 0, 0.3]))
    return TrainingBatch(images, classes, chance)


def train(trainer: Trainer) -> Trainer:
    while not trainer.done:
        trainer.step(flat_batch(trainer.images, trainer.recipe.batch))
    return trainer


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_zip(path: Path, count: int, classes: int = 4, side: int = 8, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)
    labels = [[f"{i:03d}.png", i % classes] for i in range(count)] if classes else None
    with zipfile.ZipFile(path, "w") as file:
        for i, image in enumerate(pixels):
            file.writestr(f"{i:03d}.png", png(image))
        file.writestr("dataset.json", json.dumps({"labels": labels}))
    return path
