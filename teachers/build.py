"""Teachers by name."""

from __future__ import annotations

from torch import Tensor

from plans.plan import with_kernel
from restart.build import restart_plan
from restart.intervals import parse_restart_info
from solvers.registry import make_solver
from solvers.types import Solver
from teachers.supervision import GridTeacher, OracleTeacher, RestartTeacher, Teacher

TEACHERS = ("heun", "dpm", "dpmpp", "euler", "ipndm", "restart", "dopri5")


def build_teacher(
    name: str,
    solver: Solver | None,
    fine: Tensor,
    stride: int,
    *,
    restart_info: str | None = None,
    restart_target: str = "flow",
    s_noise: float = 1.0,
    pfgmpp: int | None = None,
    histories: bool = True,
) -> Teacher:
    """The teacher ``name`` on the refined grid ``fine`` whose every ``stride``-th node is a target.

    ``solver`` walks the grid for the classic teachers; Restart walks with Heun, as published.
    ``pfgmpp`` is the number of dimensions that a model of PFGM++ adds, for Restart's jumps.
    ``histories=False`` (for a student without) spares Restart's flow targets their origins.
    Raises ValueError for an unknown name or a bad restart specification.
    """
    if name not in TEACHERS:
        raise ValueError(f"no teacher is called {name!r}; choose one of {', '.join(TEACHERS)}")
    if name == "dopri5":
        return OracleTeacher(fine[::stride])
    if name != "restart":
        assert solver is not None
        return GridTeacher(solver, fine, stride)
    if restart_target not in ("flow", "trajectory"):
        raise ValueError(f"--restart_target is flow or trajectory, got {restart_target!r}")
    if restart_info is None:
        raise ValueError(
            "the Restart teacher needs its intervals; pass "
            "--restart_info='{\"0\": [N_restart, K, t_min, t_max]}'"
        )
    heun = make_solver("heun")
    plan = restart_plan(
        fine,
        parse_restart_info(restart_info),
        heun,
        heun,
        S_noise=s_noise,
        keep=fine[::stride],
    )
    return RestartTeacher(
        with_kernel(plan, pfgmpp),
        heun,
        fine,
        stride,
        flow=restart_target == "flow",
        origins=histories,
    )
