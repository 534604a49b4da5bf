"""A sampler: a plan with a name and with what a record has to say about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from plans.plan import AnyPlan, check_plan, plan_nfe, plan_times
from runtime.errors import UserError


@dataclass(frozen=True, eq=False)  # plans compare by identity
class Sampler:
    """A plan that is ready to run, with what a record has to say about it."""

    label: str  #: names folders and rows of tables
    plan: AnyPlan
    settings: dict[str, Any] = field(default_factory=dict)  #: all options, resolved; JSON values
    cost: int = 1  #: evaluations per network call: 2 under classifier-free guidance
    guidance_rate: float | None = None
    coupled: bool = False  #: an image depends on the others of its batch

    def __post_init__(self) -> None:
        check_plan(self.plan)
        if self.nfe < 1:
            raise UserError(
                f"sampler {self.label} never calls the network: give it more steps, or drop --afs"
            )

    @property
    def start(self) -> float:
        """Noise level of the latents."""
        return self.plan[0].start

    @property
    def nfe(self) -> int:
        """Planned network evaluations per image."""
        return plan_nfe(self.plan, self.cost)

    def describe(self) -> dict[str, Any]:
        """For a record: the settings, each part of the plan in words, and every time visited."""
        return {
            "label": self.label,
            **self.settings,
            "guidance_rate": self.guidance_rate,
            "parts": [str(part) for part in self.plan],
            # rounded, so that machines whose powers differ in the last bit agree
            "times": [float(f"{t:.12g}") for t in plan_times(self.plan)],
            "nfe_planned": self.nfe,
        }
