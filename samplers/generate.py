"""From seeds to images: a generator of batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from denoisers.cards import Card
from denoisers.registry import Model
from restart.plan import run_plan
from runtime.errors import UserError
from runtime.noise import SeedNoise
from samplers.sampler import Sampler
from solvers.driver import Meter
from solvers.types import Denoiser, Trajectory


class Batch(NamedTuple):
    """What a batch of seeds became."""

    seeds: tuple[int, ...]
    x: Tensor  #: (B, C, H, W), the final states
    nfe: int  #: metered network evaluations per image
    trajectory: Trajectory | None  #: every state, where it was asked for


def generate(
    sampler: Sampler,
    model: Model,
    seeds: Sequence[int],
    *,
    batch: int,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    labels: int | None = None,
    keep_trajectory: bool = False,
) -> Iterator[Batch]:
    """Yield the images of ``seeds`` in their order, at most ``batch`` at a time.

    ``dtype`` is that of the state.  ``labels`` is the class of every image; a conditional model
    without one draws a class per seed.  All random numbers belong to the seed, so an image
    depends neither on the batch nor on the process that makes it: share the seeds out with
    ``World.shard``.  Raises UserError for a batch below 1 or a class the model does not have, and
    RuntimeError where the network was not called as often as planned.
    """
    if batch < 1:
        raise UserError(f"a batch of {batch} images makes nothing: give --batch 1 or more")
    check_class(model.card, labels)
    device = torch.device(device)
    chunks = (seeds[i : i + batch] for i in range(0, len(seeds), batch))
    return (
        _batch(sampler, model, tuple(chunk), device, dtype, labels, keep_trajectory)
        for chunk in chunks
    )


def check_class(card: Card, label: int | None) -> None:
    """Raise UserError for a class that the model of ``card`` does not have."""
    if label is None:
        return
    if not card.label_dim:
        raise UserError(f"{card.name!r} is unconditional: leave --class {label} out")
    if not 0 <= label < card.label_dim:
        raise UserError(
            f"--class {label} is not one of the {card.label_dim} classes of {card.name!r}: "
            f"give 0 to {card.label_dim - 1}"
        )


@torch.inference_mode()
def _batch(
    sampler: Sampler,
    model: Model,
    seeds: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    label: int | None,
    keep: bool,
) -> Batch:
    noise = SeedNoise(seeds)
    denoiser = _bind(sampler, model, noise, label, device)
    meter = Meter(denoiser)

    def normal(name: str | tuple) -> Tensor:
        return noise.normal(name, model.card.shape, dtype, device)

    x = normal("latent") * sampler.start
    trajectory = None
    if keep:
        trajectory = run_plan(sampler.plan, meter, x, normal)
        x = trajectory.x[-1]
    else:
        for part in sampler.plan:  # part by part, so that a long plan does not keep every state
            x = run_plan((part,), meter, x, normal).x[-1]
    if meter.nfe != sampler.nfe:
        raise RuntimeError(
            f"{sampler.label} spent {meter.nfe} NFE where its plan says {sampler.nfe}: "
            "the plan's formula and the driver disagree"
        )
    return Batch(seeds, x, meter.nfe, trajectory)


def _bind(
    sampler: Sampler, model: Model, noise: SeedNoise, label: int | None, device: torch.device
) -> Denoiser:
    classes = model.card.label_dim
    labels = None
    if classes and label is None:
        labels = noise.integers("class", classes).to(device)
    elif label is not None:
        labels = torch.full((len(noise.seeds),), label, device=device)
    denoiser = model.bind(labels, sampler.guidance_rate)
    if denoiser.cost != sampler.cost:
        raise UserError(
            f"a call of {model.card.name!r} costs {denoiser.cost} evaluations but the plan counts "
            f"{sampler.cost}: check --guidance_rate {sampler.guidance_rate}"
        )
    return denoiser
