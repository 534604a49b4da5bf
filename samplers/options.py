"""The options of samplers, and which sampler accepts which."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from plans.walk import Churn
from runtime.errors import UserError
from solvers.grids import Grid, check_exponent
from solvers.registry import CLASSIC, SOLVERS, SolverOptions

LEARNED = ("main", "restart", "both")
SAMPLERS = (*CLASSIC, "ddpm", "edm", "restart", "pds")


@dataclass(frozen=True)
class SamplerOptions:
    """The options of samplers, named like their flags; None means the sampler's default.

    In `Sampler.options` every option that the sampler accepts is filled in.
    """

    sampler: str | None = None
    num_steps: int | None = None  #: nodes of the (main) grid, not counting a final 0
    nfe: int | None = None  #: number of network evaluations, instead of ``num_steps``
    afs: bool | None = None
    schedule_type: str | None = None
    schedule_rho: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    times: tuple[float, ...] | None = None  #: the noise levels of the (main) grid, without a 0
    max_order: int | None = None
    predict_x0: bool | None = None
    lower_order_final: bool | None = None
    thresholding: bool | None = None
    r: float | None = None  #: position of the node that DPM-Solver-2 inserts
    variant: str | None = None  #: B(h) of unipc
    eta: float | None = None  #: scale of the noise of ddpm; 0 is DDIM
    restart_info: str | None = None
    restart_config: str | None = None
    main_solver: str | None = None
    restart_solver: str | None = None
    restart_gamma: float | None = None
    final_zero: bool | None = None  #: restart: end the main grid at 0 instead of sigma_min
    learned: str | None = None  #: restart: which walks use the predictor, one of LEARNED
    S_churn: float | None = None
    S_min: float | None = None
    S_max: float | None = None
    S_noise: float | None = None
    speed_up: int | None = None  #: divisor of the number of iterations of pds
    freq_mask_path: str | None = None
    space_mask_path: str | None = None
    alpha: float | None = None
    snr: float | None = None
    n_steps: int | None = None
    pds_predictor: bool | None = None
    batch_coupled: bool | None = None
    guidance_rate: float | None = None

    @property
    def grid(self) -> Grid:
        """The (main) time grid; ValueError for ``times`` that are none."""
        if self.times is not None:
            return Grid.explicit(self.times)
        schedule = self.schedule_type or "polynomial"
        return Grid(schedule, self.num_steps, self.schedule_rho, self.sigma_min, self.sigma_max)

    @property
    def solver_options(self) -> SolverOptions:
        form = self.predict_x0, self.lower_order_final, self.thresholding
        return SolverOptions(self.max_order, *form, self.r, self.variant)

    @property
    def churn(self) -> Churn:
        """EDM's noise settings; the default is no noise."""
        values = {name: getattr(self, name) for name in ("S_churn", "S_min", "S_max", "S_noise")}
        return Churn(**{name: value for name, value in values.items() if value is not None})

    def with_grid(self, grid: Grid, num_steps: int) -> SamplerOptions:
        """The options with the settings of a resolved grid and its number of nodes."""
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
        """The options that are not None, without the sampler's name."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sampler"}
        return {name: value for name, value in values.items() if value is not None}


#: Options of every sampler.
_GRID = {"num_steps", "nfe", "schedule_rho", "sigma_min", "sigma_max", "times"}
_ANY = frozenset(_GRID | {"guidance_rate"})
_NOISE = {"S_churn", "S_min", "S_max", "S_noise"}
_RESTART = {"restart_info", "restart_config", "main_solver", "restart_solver", "restart_gamma"}
_RESTART |= {"schedule_type", "afs", "final_zero"}
_PDS = {"speed_up", "freq_mask_path", "space_mask_path", "alpha", "snr", "n_steps"}
_PDS |= {"pds_predictor", "batch_coupled"}

ACCEPTS: dict[str, frozenset[str]] = {
    **{name: _ANY | {"afs", "schedule_type"} | SOLVERS[name].options for name in CLASSIC},
    "ddpm": _ANY | {"schedule_type", "eta"},
    "edm": _ANY | _NOISE,
    "restart": _ANY | _NOISE | _RESTART,
    "pds": _ANY - {"schedule_rho", "times"} | _PDS,
}
#: Options that are not fixed by a published configuration.
CONFIG_ACCEPTS = _ANY - {"num_steps", "nfe", "times"} | {
    "restart_config",
    "main_solver",
    "restart_solver",
}
#: Options that are not fixed by a predictor.
LEARNED_ACCEPTS = frozenset({"guidance_rate"})
#: Options of Restart that are not fixed by the predictor of its main walk, descents, or both.
LEARNED_RESTART_ACCEPTS: dict[str, frozenset[str]] = {
    "main": frozenset({"learned", "guidance_rate", "restart_info", "restart_solver"})
    | {"restart_gamma", "S_min", "S_max", "S_noise"},
    "restart": ACCEPTS["restart"] - {"restart_solver"} | {"learned"},
}
LEARNED_RESTART_ACCEPTS["both"] = (
    LEARNED_RESTART_ACCEPTS["main"] & LEARNED_RESTART_ACCEPTS["restart"]
)


def check_accepted(
    options: SamplerOptions, accepted: frozenset[str], what: str, remedy: str | None = None
) -> None:
    """Raise UserError for an option that ``what`` does not accept, and for NaN."""
    for name, value in options.given().items():
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"--{name} {value} is not a number: give one, or leave --{name} out")
        if name in accepted:
            continue
        users = " or ".join(sampler for sampler in SAMPLERS if name in ACCEPTS[sampler])
        users = users or "restart and --predictor_path"
        raise UserError(
            f"--{name} {value} is not an option of {what}: leave it out, "
            f"or {remedy or f'use --sampler {users}'}"
        )


def check_grid(options: SamplerOptions) -> None:
    """Raise UserError for options that contradict each other about the grid."""
    if options.num_steps is not None and options.nfe is not None:
        raise UserError(
            f"--num_steps {options.num_steps} and --nfe {options.nfe} both set the number of "
            "steps: give one of them"
        )
    check_exponent(options.schedule_type or "polynomial", options.schedule_rho)
    if options.times is None:
        return
    grid = options.grid
    same = ("num_steps", grid.num_steps), ("schedule_type", grid.schedule_type)
    ends = ("sigma_min", grid.sigma_min), ("sigma_max", grid.sigma_max)
    for name, value in (*same, ("schedule_rho", None), *ends):
        given = getattr(options, name)
        if given not in (None, value):
            raise UserError(
                f"--{name} {given} and --times {','.join(f'{t:g}' for t in options.times)} both "
                "set the grid: give one of them"
            )
