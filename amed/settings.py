"""The settings of a learned student: its solver, its grid and its NFE."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from runtime.options import Json
from solvers.driver import planned_nfe
from solvers.grids import Grid
from solvers.names import unknown
from solvers.registry import SOLVERS, SolverOptions
from solvers.rules import FixedRatio
from solvers.types import Solver

STUDENTS = ("amed", "ipndm", "dpmpp", "dpm", "euler")


@dataclass(frozen=True)
class StudentSettings:
    """The options of a student, with their published names; stored with its predictor."""

    dataset_name: str
    sampler_stu: str
    num_steps: int
    sigma_min: float
    sigma_max: float
    sampler_tea: str = "heun"
    M: int = 1
    schedule_type: str = "polynomial"
    schedule_rho: float | None = 7.0
    afs: bool = False
    scale_dir: float = 0.0
    scale_time: float = 0.0
    max_order: int | None = None
    predict_x0: bool = True
    lower_order_final: bool = True
    thresholding: bool = False
    guidance_type: str | None = None
    guidance_rate: float | None = None

    def __post_init__(self) -> None:
        if self.sampler_stu not in STUDENTS:
            raise ValueError(unknown("student", self.sampler_stu, STUDENTS))
        if self.M < 1:
            raise ValueError(
                f"M = {self.M} gives the teacher the grid of the student; give --M 1 or more"
            )
        if self.guidance_rate is not None and not 0 <= self.guidance_rate < math.inf:
            raise ValueError(
                f"guidance_rate = {self.guidance_rate:g} is no finite number from 0 on; give one"
            )
        if self.afs and self.num_steps < 3:
            raise ValueError(
                f"--afs makes the first of {self.num_steps - 1} interval(s) analytic; "
                "give --num_steps 3 or more"
            )
        self.solver()
        grid = self.grid
        if self.schedule_type != "discrete":  # the discrete grid needs the model
            grid.nodes()

    @property
    def solver_options(self) -> SolverOptions:
        """The multistep options; each solver uses those that it accepts."""
        return SolverOptions(
            self.max_order, self.predict_x0, self.lower_order_final, self.thresholding
        )

    def solver(self) -> Solver:
        """The student's solver."""
        return self.solver_options.make(self.sampler_stu)

    def teacher_solver(self) -> Solver | None:
        """The teacher's solver with the student's multistep options; None for another teacher."""
        known = self.sampler_tea in SOLVERS
        return self.solver_options.make(self.sampler_tea) if known else None

    @property
    def grid(self) -> Grid:
        """The student's time grid; a ``discrete`` one must be resolved with the card."""
        return Grid(
            self.schedule_type, self.num_steps, self.schedule_rho, self.sigma_min, self.sigma_max
        )

    def nfe(self, cost: int = 1) -> int:
        """Network evaluations per sample."""
        # Every guide inserts one node per interval, so a fixed one can stand for the predictor.
        return planned_nfe(
            self.solver(), range(self.num_steps, 0, -1), FixedRatio(0.5), self.afs, cost
        )

    def run_name(self, cost: int = 1) -> str:
        """The published folder name, without its number."""
        parts = [
            self.dataset_name,
            str(self.num_steps),
            str(self.nfe(cost)),
            self.sampler_stu,
            self.sampler_tea,
            str(self.M),
            self.schedule_type,
        ]
        return "-".join(parts) + ("-afs" if self.afs else "")

    def to_options(self) -> dict[str, Json]:
        return dataclasses.asdict(self)

    @classmethod
    def from_options(cls, options: dict[str, object]) -> StudentSettings:
        """The settings among the options of a record."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in options.items() if k in names})  # type: ignore[arg-type]
