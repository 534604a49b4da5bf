"""A sampler: a plan with a name and the options that describe it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ns.experiments import AnyStudent
from plans.plan import AnyPlan, check_plan, plan_nfe, plan_times
from runtime.errors import UserError
from runtime.options import Json
from samplers.options import ACCEPTS, SamplerOptions

#: Options that are recorded in another form, or that are resolved into others.
_NOT_RECORDED = {"nfe", "times", "guidance_rate", "freq_mask_path", "space_mask_path"}


@dataclass(frozen=True, eq=False)  # plans compare by identity
class Sampler:
    """A plan that is ready to run, with its description for records."""

    label: str  #: the name in folders and tables
    plan: AnyPlan
    options: SamplerOptions = field(default_factory=SamplerOptions)  #: resolved
    cost: int = 1  #: evaluations per network call: 2 under classifier-free guidance
    student: AnyStudent | None = None  #: guides the plan or segments of it, or is the plan
    extra: Mapping[str, Json] = field(default_factory=dict)  #: more entries of the record

    def __post_init__(self) -> None:
        check_plan(self.plan)
        if self.nfe < 1:
            raise UserError(
                f"sampler {self.label} never calls the network: give more steps, or drop --afs"
            )

    @property
    def start(self) -> float:
        """Noise level of the latents."""
        return self.plan[0].start

    @property
    def nfe(self) -> int:
        """Planned network evaluations per image."""
        return plan_nfe(self.plan, self.cost)

    @property
    def guidance_rate(self) -> float | None:
        return self.options.guidance_rate

    @property
    def coupled(self) -> bool:
        """Whether an image depends on the others of its batch."""
        return bool(self.options.batch_coupled)

    def describe(self) -> dict[str, Json]:
        """The entries of a record: options, descriptions of the segments, and all times."""
        return {
            "label": self.label,
            **self._options(),
            **self.extra,
            **({} if self.student is None else self.student.describe(self.options.sampler)),
            "guidance_rate": self.guidance_rate,
            "parts": [str(segment) for segment in self.plan],
            # rounded, because powers may differ in the last bit between machines
            "times": [float(f"{t:.12g}") for t in plan_times(self.plan)],
            "nfe_planned": self.nfe,
        }

    def _options(self) -> dict[str, Json]:
        """Every resolved option of the sampler as JSON; infinity is null."""
        name = self.options.sampler
        if name is None:
            return {}
        values: dict[str, Json] = {"sampler": name}
        for key in sorted(ACCEPTS[name] - _NOT_RECORDED):
            value = getattr(self.options, key)
            values[key] = None if value == math.inf else value
        if self.options.restart_config is None:
            values.pop("restart_config", None)
        if self.options.restart_info is not None:
            values["restart_info"] = json.loads(self.options.restart_info)
        if self.options.learned is not None:
            values["learned"] = self.options.learned
        return values
