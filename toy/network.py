"""The imperfect score: a small MLP, trained like the other denoisers of the toolkit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoisers.families.precond import EDMPrecond, build
from denoisers.training.batches import PARTS, TrainingBatch
from denoisers.training.trainer import Recipe, Trainer
from runtime.dist import World
from runtime.errors import UserError
from runtime.log import progress
from runtime.noise import SeedNoise
from solvers.types import Denoised

STATE = "network.pt"
SAVES = 10  #: number of times that the training is saved
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


@dataclass(frozen=True, eq=False)
class VectorDenoiser:
    """A trained network as a `Denoiser` of points, one evaluation per call."""

    net: EDMPrecond
    cost: int = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        """Denoise ``x`` (B, dims, 1, 1) at ``sigma``, 0-d or (B, 1, 1, 1)."""
        denoised: Denoised = self.net(x, sigma)
        return denoised


def recipe(kimg: float, batch: int, seed: int) -> Recipe:
    """EDM's recipe for ``kimg`` thousand points, with a deviation of ln sigma of 0.5, not 1.2.

    Only one level in 120 is above 1, so the score is good near the data and poor where sampling
    starts.  With a network that is good everywhere there would be almost no error to contract.
    """
    return Recipe(
        kimg=kimg,
        batch=batch,
        rampup_kimg=kimg / 50,
        decay_kimg=kimg / 2,
        ema_kimg=kimg / 50,
        lr=4e-3,
        p_std=0.5,
        flip=False,
        seed=seed,
    )


def train_network(folder: Path, points: Tensor, width: int, plan: Recipe) -> VectorDenoiser:
    """Train an MLP of ``width`` on ``points`` (N, dims, 1, 1), or load it from ``folder``.

    An interrupted training continues from its last save and gives the same weights.  Raises
    UserError for a batch above N, or if ``folder`` has a network of other settings.
    """
    if plan.batch > len(points):
        raise UserError(
            f"--batch {plan.batch} is above the number of points; "
            f"give --batch {len(points)} or less"
        )
    config: dict[str, Any] = {
        "class_name": "EDMPrecond",
        "model_type": "MLP",
        "img_resolution": 1,
        "img_channels": points.shape[1],
        "sigma_data": round(float(points.std()), 4),
        "width": width,
        "layers": 4,
    }
    torch.manual_seed(plan.seed)
    net = build(config)
    assert isinstance(net, EDMPrecond)
    trainer, about = Trainer(net, plan, ALONE), {"config": config, "points": _digest(points)}
    file = folder / STATE
    if file.exists():
        trainer.resume(file, about)
    goal = round(1e3 * plan.kimg)
    tick = max(goal // SAVES, plan.batch)
    with progress(goal, "training", "pt", min(trainer.images, goal)) as bar:
        while not trainer.done:
            trainer.step(batch(points, plan, trainer.images))
            bar.update(plan.batch)
            if trainer.done or trainer.images // tick > (trainer.images - plan.batch) // tick:
                trainer.save(file, about)
    return VectorDenoiser(trainer.ema.eval())


def batch(points: Tensor, plan: Recipe, seen: int) -> TrainingBatch:
    """The batch after ``seen`` points: points without repetition, and their random numbers.

    The trainer maps pixels from [0, 255] to [-1, 1]; points are scaled accordingly.
    """
    noise = SeedNoise([seen])
    order = noise.normal(("order", plan.seed), (len(points),))[0].argsort(stable=True)
    size = sum(PARTS) + points.shape[1]
    return TrainingBatch(
        (points[order[: plan.batch]] + 1) * 127.5,
        torch.zeros(plan.batch, dtype=torch.int64),
        noise.normal(("train", plan.seed), (plan.batch, size))[0],
    )


def _digest(points: Tensor) -> list[float]:
    """A short fingerprint of the points."""
    return [len(points), *(round(float(value), 5) for value in points[[0, -1], :2].flatten())]
