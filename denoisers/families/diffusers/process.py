"""The process of a pipeline of ``diffusers`` and the meaning of its network's output.

Both are told by the settings of the pipeline's own scheduler.  Two kinds of process are known:

* variance preserving, ``y = alpha (x0 + sigma n)`` with ``alpha = 1 / sqrt(1 + sigma^2)``, at
  discrete steps with betas; the network predicts noise, v or the image (arXiv:2206.00927,
  section 2; v: arXiv:2202.00512, appendix D);
* rectified flow, ``y = (1 - s) x0 + s n``; the network predicts the velocity ``n - x0``
  (arXiv:2403.03206).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from denoisers.noise_schedules import BETAS, DiscreteVP, Flow
from runtime.errors import UserError, first_line

PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW = "flow_prediction"


@dataclass(frozen=True)
class Prediction:
    """The time and the scale of a network's input, and the meaning of its output."""

    schedule: DiscreteVP | Flow
    kind: str  #: one of `PREDICTIONS` or `FLOW`
    clip: float | None  #: bound at which the pipeline's own sampler clips ``x0``

    @classmethod
    def of(cls, scheduler: Mapping[str, Any], source: str) -> Prediction:
        """From a scheduler's settings; UserError for a process of another kind."""
        if _is_flow(scheduler):
            return cls(Flow(), FLOW, None)  # a shift moves levels, not what the network does there
        _, schedule = discrete_schedule(scheduler, source)
        clip = scheduler.get("clip_sample_range", 1.0) if scheduler.get("clip_sample") else None
        kind = scheduler.get("prediction_type", "epsilon")
        return cls(schedule, kind, clip)

    def network_time(self, sigma: Tensor) -> Tensor:
        """The step as a real number, in float64 on the CPU, flat."""
        return self.schedule.network_time(sigma)

    def scale(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The network's input: the state of its own process."""
        return self.schedule.own_state(x, sigma)

    def x0(self, x: Tensor, sigma: Tensor, raw: Tensor) -> Tensor:
        """The clean image from the network's output ``raw``."""
        if self.kind == "epsilon":
            x0 = x - sigma * raw
        elif self.kind == "v_prediction":
            x0 = (x - sigma * (1 + sigma**2).sqrt() * raw) / (1 + sigma**2)
        elif self.kind == FLOW:
            x0 = Flow().x0(x, sigma, raw)
        else:
            x0 = raw
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)


def noise_schedule(
    scheduler: Mapping[str, Any], source: str, tokens: int
) -> tuple[dict[str, Any], DiscreteVP | Flow]:
    """The ``noise_schedule`` of a card from a scheduler's settings, and the schedule itself.

    ``tokens`` is the number of patches of an image, on which a dynamic shift depends.  Raises
    UserError for a process that is neither a flow nor variance preserving with betas.
    """
    if _is_flow(scheduler):
        shift = _shift(scheduler, source, tokens)
        return {"kind": "flow", "shift": shift}, Flow(shift)
    return discrete_schedule(scheduler, source)


def _is_flow(scheduler: Mapping[str, Any]) -> bool:
    matching = "shift" in scheduler and "beta_start" not in scheduler
    return matching or scheduler.get("prediction_type") == FLOW


def _shift(scheduler: Mapping[str, Any], source: str, tokens: int) -> float:
    """The factor by which a flow's shift multiplies sigma, static or for this many tokens."""

    def number(name: str, default: float) -> float:
        value = scheduler.get(name)
        value = default if value is None else value
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UserError(f"{source}: {name} {value!r} is no number")
        return float(value)

    if number("num_train_timesteps", 1000) != Flow.steps:
        raise UserError(
            f"{source}: num_train_timesteps {scheduler['num_train_timesteps']!r} of a flow is not "
            f"{Flow.steps}, in which these networks count time"
        )
    shift = number("shift", number("flow_shift", 1.0))
    if scheduler.get("use_dynamic_shifting"):
        low, high = number("base_image_seq_len", 256), number("max_image_seq_len", 4096)
        first, last = number("base_shift", 0.5), number("max_shift", 1.15)
        if high <= low:
            raise UserError(f"{source}: max_image_seq_len {high:g} is not above {low:g}")
        mu = first + (last - first) * (tokens - low) / (high - low)
        shift = mu if scheduler.get("time_shift_type") == "linear" else math.exp(min(mu, 700.0))
    if not 1e-3 < shift < 1e3:
        raise UserError(f"{source}: a shift by {shift:g} is none that a flow can have")
    return shift


def discrete_schedule(
    scheduler: Mapping[str, Any], source: str
) -> tuple[dict[str, Any], DiscreteVP]:
    """As `noise_schedule`, of a process with betas; UserError for any other."""

    def known(what: str, value: Any, values: Iterable[str]) -> None:
        if value not in list(values):  # it may be of any type
            raise UserError(f"{source}: {what} {value!r} is not one of {', '.join(values)}")

    if not {"beta_start", "beta_end", "beta_schedule"} <= set(scheduler):
        kind = scheduler.get("_class_name")
        raise UserError(f"{source}: {kind} has no betas, so its process is not a discrete VP one")
    if scheduler.get("trained_betas") is not None or scheduler.get("rescale_betas_zero_snr"):
        raise UserError(
            f"{source}: betas that are listed or rescaled to zero terminal SNR are not supported"
        )
    known("beta_schedule", scheduler["beta_schedule"], BETAS)
    known("prediction_type", scheduler.get("prediction_type", "epsilon"), PREDICTIONS)
    noise = {
        "first": scheduler["beta_start"],
        "last": scheduler["beta_end"],
        "num_steps": scheduler.get("num_train_timesteps", 1000),
        "rule": scheduler["beta_schedule"],
    }
    try:
        schedule = DiscreteVP.from_betas(**noise)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{source}: its betas {noise} make no noise schedule ({first_line(error)})"
        ) from error
    return {"kind": "discrete_vp", **noise}, schedule
