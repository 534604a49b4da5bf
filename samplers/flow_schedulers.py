"""The scheduler of a flow model's own pipeline as a sampler: what people use by default.

Some pipelines waste a call.  SD3's and SANA's hand no levels to their scheduler, which takes equal
steps between its own ends, shifted already, and shifts them again: with 4 steps and shift 3 at
s = 1, 0.858, 0.602, 0.0089 and 0, so the last call changes nothing.  Qwen-Image's stretches its
levels down to 0.02.  Beside such defaults stand the levels that are shifted once, at equal calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from denoisers.cards import Card
from denoisers.families.diffusers.kinds import KINDS
from denoisers.noise_schedules import Flow
from plans.process import ForwardProcess
from solvers.driver import Meter

INFINITE = 1e8  #: sigma at s = 1, where networks are told 999.99999 instead of 1000


@dataclass(frozen=True, eq=False)
class FlowScheduled:
    """A segment from pure noise to 0 by a scheduler of ``diffusers`` for flows.

    The scheduler chooses its levels and makes the steps; it is given the velocity that belongs to
    our denoised image.
    """

    scheduler: Any  #: configured; it keeps a state, so every visit makes a new one
    steps: int  #: network calls
    asked: bool  #: whether it is asked for equal steps from 1 to 1 / steps
    shift: float  #: of the images, for a scheduler that takes it from the pipeline
    start: float  #: noise level of the latents that are handed over

    def __str__(self) -> str:
        levels = ", ".join(f"{s:.3g}" for s in self._ready().sigmas.tolist())
        return f"{type(self.scheduler).__name__}, s = {levels}"

    @property
    def times(self) -> list[float]:
        return [_level(s) for s in self._ready().sigmas[1:].tolist()]

    def nfe(self, cost: int = 1) -> int:
        return self.steps * cost

    def visit(self, meter: Meter, x: Tensor, process: ForwardProcess) -> Iterator[Tensor]:
        scheduler = self._ready()
        y, levels = x / (1 + self.start), scheduler.sigmas.tolist()
        for time, s, following in zip(scheduler.timesteps, levels, levels[1:], strict=False):
            sigma = torch.tensor(_level(s), dtype=torch.float64)
            x0 = meter(y * (1 + float(sigma)), sigma).x0
            y = scheduler.step((y - x0) / s, time, y, return_dict=False)[0].to(y.dtype)
            yield y * (1 + _level(following))

    def _ready(self) -> Any:
        config = self.scheduler.config
        scheduler = type(self.scheduler).from_config(config)
        given: dict[str, Any] = {}
        if config.get("use_dynamic_shifting"):
            linear = config.get("time_shift_type") == "linear"
            given["mu"] = self.shift if linear else math.log(self.shift)
        if self.asked:
            given["sigmas"] = torch.linspace(1, 1 / self.steps, self.steps).tolist()
        else:
            given["num_inference_steps"] = self.steps
        scheduler.set_timesteps(**given)
        return scheduler


def _level(s: float) -> float:
    """The noise level at time ``s`` of a flow."""
    return s / (1 - s) if s < 1 else INFINITE


def flow_schedulers(library: ModuleType, card: Card, steps: int) -> dict[str, FlowScheduled]:
    """The scheduler of a pipeline by title, and Euler on levels shifted once if those differ.

    ``library`` is ``diffusers``.  {} for a flow that is no pipeline.
    """
    process, kind = card.schedule, card.config.get("pipeline")
    if not isinstance(process, Flow) or kind is None:
        return {}
    config = dict(card.config["scheduler"])
    own = getattr(library, config.pop("_class_name", "FlowMatchEulerDiscreteScheduler"))
    ends = steps, KINDS[kind].asks, process.shift, card.sigma_max
    default = FlowScheduled(own.from_config(config), *ends)
    titles = {f"{kind.removesuffix('Pipeline')}'s own": default}
    plain = library.FlowMatchEulerDiscreteScheduler(shift=process.shift)
    once = FlowScheduled(plain, steps, True, process.shift, card.sigma_max)
    if own is not type(plain) or not _near(default.times, once.times):
        titles["Euler, shifted once"] = once
    return titles


def _near(one: list[float], other: list[float]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-9) for a, b in pairs)
