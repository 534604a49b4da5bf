"""A sampler: a plan with a name and with what a record has to say about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from restart.plan import Jump, Plan, Solve, check_plan, plan_nfe
from runtime.errors import UserError


@dataclass(frozen=True, eq=False)  # plans compare by identity
class Sampler:
    """A plan that is ready to run, with what a record has to say about it."""

    label: str  #: names folders and rows of tables
    plan: Plan
    settings: dict[str, Any] = field(default_factory=dict)  #: all options, resolved; JSON values
    cost: int = 1  #: evaluations per network call: 2 under classifier-free guidance
    guidance_rate: float | None = None

    def __post_init__(self) -> None:
        check_plan(self.plan)
        if self.nfe < 1:
            raise UserError(
                f"sampler {self.label} never calls the network: give it more steps, or drop --afs"
            )

    @property
    def start(self) -> float:
        """Noise level of the latents."""
        return _times(self.plan)[0]

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
            "parts": [_words(part) for part in self.plan],
            # rounded, so that machines whose powers differ in the last bit agree
            "times": [float(f"{t:.12g}") for t in _times(self.plan)],
            "nfe_planned": self.nfe,
        }


def _words(part: Solve | Jump) -> str:
    if isinstance(part, Jump):
        return f"jump {part.t_from:g} -> {part.t_to:g} with noise {part.std:g}"
    kind = " (first slope analytic)" if part.afs else ""
    return f"walk {len(part.ts)} nodes {part.ts[0]:g} -> {part.ts[-1]:g}{kind}"


def _times(plan: Plan) -> list[float]:
    """The times of the plan's trajectory, the start included."""
    first = plan[0]
    times = [float(first.ts[0]) if isinstance(first, Solve) else first.t_from]
    for part in plan:
        if isinstance(part, Solve):
            times += part.ts[1:].tolist()
        elif part.t_to > part.t_from:
            times.append(part.t_to)
    return times
