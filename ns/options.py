"""The options of ``train.py --sampler_stu=ns``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from denoisers.cards import Card
from denoisers.conditions import ConditionOptions
from denoisers.registry import ModelSource
from ns.losses import LOSSES
from runtime.errors import UserError
from solvers.grids import Grid

EXPONENT = 0.6  #: of the norm that calibrates, searches, and is the usual loss
SEARCH = 40  #: calibrations, for which few calls need less and many could use more


@dataclass(frozen=True)
class NsOptions:
    """The options of ``train.py --sampler_stu=ns``, named like its flags."""

    model: ModelSource
    conditions: ConditionOptions = field(default_factory=ConditionOptions)
    outdir: str = "exps"
    desc: str | None = None
    resume: str | None = None  #: ``auto``, or the number or folder of a run
    seed: int = 0
    nfe: int = 5  #: network evaluations of the student
    sampler_tea: str = "heun"
    trajectories: int = 512  #: pairs of the refinement; the first 256 serve the closed form too
    times: tuple[float, ...] | None = None  #: noise levels whose inner ones are the network times
    search: int | None = (
        None  #: calibrations that the search for times may try; None means `SEARCH`
    )
    refine: int = 160  #: updates through all calls; 0 leaves the calibrated table
    batch: int = 48  #: pairs per update, over all processes
    batch_gpu: int | None = None  #: pairs at a time per process; None means its whole share
    lr: float = 0.05
    loss: str = "spectral"  #: one of `LOSSES`
    exponent: float | None = None  #: of the images' power spectrum; None means `EXPONENT`
    unpaired: float = 0.0  #: weight of the energy distance to images of Restart
    report: int = 20  #: updates between reports
    checkpoint: bool = False  #: recompute every call in the backward pass

    @property
    def norm_exponent(self) -> float:
        """Of the images' power in the norm; 0 is the mean squared error."""
        if self.loss == "l2":
            return 0.0
        return EXPONENT if self.exponent is None else self.exponent

    @property
    def calibrations(self) -> int:
        """How many tables the search for times may try."""
        if self.times is not None:
            return 0
        return SEARCH if self.search is None else self.search


def check_options(options: NsOptions, calls: int, card: Card) -> None:
    """Raise UserError for options that contradict each other, the model, or the calls."""
    if options.batch > options.trajectories:
        raise UserError(
            f"--batch {options.batch} exceeds --trajectories {options.trajectories}: give a "
            "smaller batch or more trajectories"
        )
    if options.loss not in LOSSES:
        raise UserError(f"--loss {options.loss} is unknown: choose {', '.join(LOSSES)}")
    if options.loss == "l2" and options.exponent is not None:
        raise UserError(
            f"--exponent {options.exponent:g} is not an option of --loss l2, whose exponent is 0: "
            "leave one of them out"
        )
    if options.times is not None and options.search:
        raise UserError(
            f"--search {options.search} and --times both choose network times: leave one of them "
            "out"
        )
    if options.times is not None:
        _check_times(options.times, calls, card)
    if options.unpaired and not options.refine:
        raise UserError(
            f"--unpaired {options.unpaired:g} is a term of the refinement, which --refine 0 leaves "
            "out: leave one of them out"
        )


def _check_times(times: tuple[float, ...], calls: int, card: Card) -> None:
    """Raise UserError for levels that are no grid of this model with an inner one for each call."""
    given = f"--times {','.join(f'{t:g}' for t in times)}"
    grid = Grid.explicit(times)
    if len(times) != calls + 2:
        raise UserError(
            f"{given} has {len(times)} noise levels: give both ends and {calls} between them, one "
            "for each call"
        )
    ends = card.sigma_min, card.sigma_max
    if not all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(grid.ends, ends, strict=True)):
        raise UserError(
            f"{given} must begin and end where the teacher does: at {card.sigma_max:g} and "
            f"{card.sigma_min:g}"
        )
