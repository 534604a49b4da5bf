"""The options of samplers, and which sampler takes which."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from plans.walk import Churn
from runtime.errors import UserError
from solvers.grids import Grid
from solvers.registry import CLASSIC, SOLVERS, SolverOptions

LEARNED = ("main", "restart", "both")
SAMPLERS = (*CLASSIC, "ddpm", "edm", "restart", "pds")


@dataclass(frozen=True)
class SamplerOptions:
    """Options under the names of their flags; None means the default of the sampler.

    A `Sampler` carries the same type with every option that it takes filled in.
    """

    sampler: str | None = None
    num_steps: int | None = None  #: nodes of the (main) grid, a final 0 not counted
    nfe: int | None = None  #: a budget instead of ``num_steps``
    afs: bool | None = None
    schedule_type: str | None = None
    schedule_rho: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    max_order: int | None = None
    predict_x0: bool | None = None
    lower_order_final: bool | None = None
    thresholding: bool | None = None
    r: float | None = None  #: where DPM-Solver-2 inserts its node
    eta: float | None = None  #: scales the noise of ddpm: 0 is DDIM
    restart_info: str | None = None
    restart_config: str | None = None
    main_solver: str | None = None
    restart_solver: str | None = None
    restart_gamma: float | None = None
    final_zero: bool | None = None  #: restart: the main walk ends at 0 and not at sigma_min
    learned: str | None = None  #: of restart, what a predictor walks: see LEARNED
    S_churn: float | None = None
    S_min: float | None = None
    S_max: float | None = None
    S_noise: float | None = None
    speed_up: int | None = None  #: divides the number of iterations of pds
    freq_mask_path: str | None = None
    space_mask_path: str | None = None
    alpha: float | None = None
    snr: float | None = None
    n_steps: int | None = None
    batch_coupled: bool | None = None
    guidance_rate: float | None = None

    @property
    def grid(self) -> Grid:
        """The (main) time grid."""
        schedule = self.schedule_type or "polynomial"
        return Grid(schedule, self.num_steps, self.schedule_rho, self.sigma_min, self.sigma_max)

    @property
    def solver_options(self) -> SolverOptions:
        form = self.predict_x0, self.lower_order_final, self.thresholding
        return SolverOptions(self.max_order, *form, self.r)

    @property
    def churn(self) -> Churn:
        """EDM's noise settings; without any of them, none."""
        asked = {name: getattr(self, name) for name in ("S_churn", "S_min", "S_max", "S_noise")}
        return Churn(**{name: value for name, value in asked.items() if value is not None})

    def on(self, grid: Grid, num_steps: int) -> SamplerOptions:
        """The options with a resolved grid, and the number of its nodes, written into them."""
        sigma_min, sigma_max = grid.ends
        return replace(
            self,
            num_steps=num_steps,
            nfe=None,
            schedule_type=grid.schedule_type,
            schedule_rho=grid.rho,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
        )

    def given(self) -> dict[str, object]:
        """The options that were set, the sampler's name aside."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sampler"}
        return {name: value for name, value in values.items() if value is not None}


_ANY = frozenset({"num_steps", "nfe", "schedule_rho", "sigma_min", "sigma_max", "guidance_rate"})
_NOISE = {"S_churn", "S_min", "S_max", "S_noise"}
_RESTART = {"restart_info", "restart_config", "main_solver", "restart_solver", "restart_gamma"}
_RESTART |= {"schedule_type", "afs", "final_zero"}
_PDS = {"speed_up", "freq_mask_path", "space_mask_path", "alpha", "snr", "n_steps", "batch_coupled"}

TAKES: dict[str, frozenset[str]] = {
    **{name: _ANY | {"afs", "schedule_type"} | SOLVERS[name].options for name in CLASSIC},
    "ddpm": _ANY | {"schedule_type", "eta"},
    "edm": _ANY | _NOISE,
    "restart": _ANY | _NOISE | _RESTART,
    "pds": _ANY - {"schedule_rho"} | _PDS,
}
#: A published configuration fixes the main grid and the noise.
CONFIG_TAKES = _ANY - {"num_steps", "nfe"} | {"restart_config", "main_solver", "restart_solver"}
#: A predictor brings its solver, its grid and its budget.
LEARNED_TAKES = frozenset({"guidance_rate"})
#: What Restart still takes where a predictor walks the main grid, the descents, or both.
LEARNED_RESTART_TAKES: dict[str, frozenset[str]] = {
    "main": frozenset({"learned", "guidance_rate", "restart_info", "restart_solver"})
    | {"restart_gamma", "S_min", "S_max", "S_noise"},
    "restart": TAKES["restart"] - {"restart_solver"} | {"learned"},
}
LEARNED_RESTART_TAKES["both"] = LEARNED_RESTART_TAKES["main"] & LEARNED_RESTART_TAKES["restart"]


def check_taken(
    options: SamplerOptions, taken: frozenset[str], what: str, remedy: str | None = None
) -> None:
    """UserError for an option that ``what`` would have to ignore, and for NaN."""
    for name, value in options.given().items():
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"--{name} {value} is not a number: give one, or leave --{name} out")
        if name in taken:
            continue
        users = " or ".join(sampler for sampler in SAMPLERS if name in TAKES[sampler])
        users = users or "restart and --predictor_path"
        raise UserError(
            f"--{name} {value} is not an option of {what}: leave it out, "
            f"or {remedy or f'use --sampler {users}'}"
        )


def check_length(options: SamplerOptions) -> None:
    """UserError where the length of a walk is fixed twice."""
    if options.num_steps is not None and options.nfe is not None:
        raise UserError(
            f"--num_steps {options.num_steps} and --nfe {options.nfe} both fix the length of the "
            "walk: give one of them"
        )
