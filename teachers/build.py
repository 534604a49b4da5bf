"""Teachers by name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from plans.walk import Churn
from restart.build import restart_plan
from restart.intervals import Interval
from solvers.registry import make_solver
from solvers.types import Solver
from teachers.supervision import GridTeacher, OracleTeacher, RestartTeacher, Teacher

TEACHERS = ("heun", "dpm", "dpmpp", "euler", "ipndm", "restart", "dopri5")
TARGETS = ("flow", "trajectory")


@dataclass(frozen=True)
class RestartSupervision:
    """Settings of a Restart teacher; see `RestartTeacher`."""

    intervals: tuple[Interval, ...]
    target: str = "flow"  #: one of `TARGETS`
    S_noise: float = 1.0  #: scale of the noise of the jumps


def build_teacher(
    name: str,
    fine: Tensor,
    stride: int,
    *,
    solver: Solver | None = None,
    restart: RestartSupervision | None = None,
    histories: bool = True,
    tol: float = 1e-4,
    shares: bool = False,
) -> Teacher:
    """The teacher ``name`` on the refined grid ``fine``; every ``stride``-th node is a target.

    ``solver`` is that of a classic teacher, by default with its default options; Restart uses
    Heun, as published.  ``histories=False`` (for a student without history) skips the origins of
    Restart's flow targets.  ``tol`` is the tolerance of dopri5.  A classic teacher
    that ``shares`` spares the student the calls at states that both evaluate.  Raises ValueError
    for an unknown name or target, and for Restart without its intervals.
    """
    if name not in TEACHERS:
        raise ValueError(f"unknown teacher {name!r}; choose one of {', '.join(TEACHERS)}")
    if name == "dopri5":
        return OracleTeacher(fine[::stride], tol)
    if name != "restart":
        return GridTeacher(solver or make_solver(name), fine, stride, shares=shares)
    if restart is None:
        raise ValueError(
            "the Restart teacher needs its intervals; pass "
            "--restart_info='{\"0\": [N_restart, K, t_min, t_max]}'"
        )
    if restart.target not in TARGETS:
        raise ValueError(
            f"--restart_target {restart.target!r} is unknown; choose {' or '.join(TARGETS)}"
        )
    heun, churn = make_solver("heun"), Churn(S_noise=restart.S_noise)
    plan = restart_plan(fine, restart.intervals, heun, churn=churn, required_nodes=fine[::stride])
    flow = restart.target == "flow"
    return RestartTeacher(plan, heun, fine, stride, flow=flow, origins=histories)
