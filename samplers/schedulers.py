"""Schedulers of ``diffusers`` as samplers: its own step rules around our denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from denoisers.cards import Card
from plans.process import ForwardProcess
from runtime.errors import UserError
from runtime.options import Json
from samplers.flow_schedulers import FlowScheduled, flow_schedulers
from samplers.options import SamplerOptions
from samplers.sampler import Sampler
from solvers.driver import Meter


@dataclass(frozen=True, eq=False)
class Scheduled:
    """A segment from ``sigma_max`` to 0 by a scheduler of the EDM family of ``diffusers``.

    The scheduler chooses its noise levels, scales the latents and makes the steps.  It combines
    the output of a raw network with the state.  Our denoiser has done that already, so it is
    undone by the scheduler's own formula: the data prediction it steps with is ours to rounding.
    """

    scheduler: Any  #: configured; it keeps a state, so every visit makes a new one
    steps: int  #: network calls

    def __str__(self) -> str:
        return f"{type(self.scheduler).__name__}, {self.steps} steps {self.start:g} -> 0"

    @property
    def start(self) -> float:
        return float(self.scheduler.config.sigma_max)

    @property
    def times(self) -> list[float]:
        levels: list[float] = self._ready().sigmas[1:].tolist()
        return levels

    def nfe(self, cost: int = 1) -> int:
        return self.steps * cost

    def visit(self, meter: Meter, x: Tensor, process: ForwardProcess) -> Iterator[Tensor]:
        scheduler = self._ready()
        x = x * (scheduler.init_noise_sigma / self.start)
        for time, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
            x0 = meter(x, sigma.to(torch.float64)).x0
            scheduler.scale_model_input(x, time)  # required before a step; our denoiser scales too
            output = _raw_output(scheduler, x, x0, sigma)
            x = scheduler.step(output, time, x, return_dict=False)[0].to(x.dtype)
            yield x

    def _ready(self) -> Any:
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(self.steps)
        return scheduler


def _raw_output(scheduler: Any, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """The network's output from which the scheduler's formula, linear in it, gives ``x0``."""
    skip = scheduler.precondition_outputs(x, 0.0, sigma)
    scale = scheduler.precondition_outputs(0.0, 1.0, sigma)
    return (x0 - skip) / scale


def diffusers_samplers(
    budget: int, card: Card, guidance_rate: float | None = None
) -> dict[str, Sampler]:
    """Schedulers of ``diffusers`` by title, with ``budget`` evaluations; {} where none fits.

    Those of the EDM family have the model's noise levels and otherwise their defaults: polynomial
    levels of exponent 7, and a last step to 0.  A flow model has that of its own pipeline
    (`samplers.flow_schedulers`).  Raises UserError where ``diffusers`` is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"--with diffusers needs {error.name}: pip install 'amed-toolkit[diffusion]', or leave "
            "it out"
        ) from None
    cost = card.cost(guidance_rate)
    if budget % cost:
        return {}
    steps = budget // cost
    segments: Mapping[str, Scheduled | FlowScheduled]
    segments = flow_schedulers(diffusers, card, steps) if card.is_flow else _edm(card, steps)
    options = SamplerOptions(guidance_rate=guidance_rate)
    samplers = {}
    for title, segment in segments.items():
        config = {k: v for k, v in segment.scheduler.config.items() if k[0] != "_"}
        extra: dict[str, Json] = {"scheduler": config, "diffusers": diffusers.__version__}
        samplers[title] = Sampler(f"diffusers {title}", (segment,), options, cost, extra=extra)
    return samplers


def _edm(card: Card, steps: int) -> dict[str, Scheduled]:
    from diffusers import EDMDPMSolverMultistepScheduler as MultistepDPM
    from diffusers import EDMEulerScheduler as Euler

    ends = {"sigma_min": card.sigma_min, "sigma_max": card.sigma_max}
    schedulers: dict[str, Any] = {
        "EDM-Euler": Euler(**ends),
        "EDM-DPM++ 2M": MultistepDPM(**ends, solver_order=2),
        "EDM-DPM++ 3M": MultistepDPM(**ends, solver_order=3),
    }
    return {title: Scheduled(scheduler, steps) for title, scheduler in schedulers.items()}
