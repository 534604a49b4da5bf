"""The small problem that the solver tests share: a mixture with closed-form denoiser."""

from __future__ import annotations

import torch
from torch import Tensor

from denoisers.analytic import MixtureDenoiser
from solvers.driver import integrate
from solvers.grids import get_grid
from solvers.registry import make_solver
from solvers.types import Guide, Solver

BATCH, SHAPE = 3, (2, 2, 2)

DPMPP = {
    f"dpmpp-o{order}-{'data' if data else 'noise'}{'-lof' if lower else ''}": make_solver(
        "dpmpp", max_order=order, predict_x0=data, lower_order_final=lower
    )
    for order in (1, 2, 3)
    for data in (True, False)
    for lower in (True, False)
}
UNIPC = {
    f"unipc-o{order}-{variant}": make_solver("unipc", max_order=order, variant=variant)
    for order, variant in ((1, "bh1"), (2, "bh1"), (2, "bh2"), (3, "bh2"))
}
MULTISTEP: dict[str, Solver] = {
    "euler": make_solver("euler"),
    **{f"ipndm-o{order}": make_solver("ipndm", max_order=order) for order in (1, 2, 3, 4)},
    **DPMPP,
    "dpmpp-threshold": make_solver("dpmpp", thresholding=True),
    "dpmpp3c-data": make_solver("dpmpp3c"),
    "dpmpp3c-noise": make_solver("dpmpp3c", predict_x0=False),
    **{f"ipndm_v-o{order}": make_solver("ipndm_v", max_order=order) for order in (2, 4)},
    **{f"deis-o{order}": make_solver("deis", max_order=order) for order in (2, 3)},
    **UNIPC,
}
TWO_STAGE: dict[str, Solver] = {
    "heun": make_solver("heun"),
    "dpm": make_solver("dpm"),
    "dpm-r0.3": make_solver("dpm", r=0.3),
}
THREE_STAGE: dict[str, Solver] = {"dpm3": make_solver("dpm3")}
#: Every solver that needs no guide of its own; the AMED rule joins where one is given.
SOLVERS: dict[str, Solver] = {**MULTISTEP, **TWO_STAGE, **THREE_STAGE}
WITH_GUIDE: dict[str, Solver] = {**SOLVERS, "amed": make_solver("amed")}


def mixture(dtype: torch.dtype = torch.float64, cost: int = 1) -> MixtureDenoiser:
    """Three components that reach beyond 1, so that thresholding has something to do."""
    generator = torch.Generator().manual_seed(1)
    means = 1.2 * torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64)
    return MixtureDenoiser(means.to(dtype), 0.3, cost=cost)


def start(sigma: float = 80.0, dtype: torch.dtype = torch.float64, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(batch, *SHAPE, generator=generator, dtype=torch.float64)
    return (sigma * noise).to(dtype)


def grid(num_steps: int = 6, zero: bool = False) -> Tensor:
    ts = get_grid("polynomial", num_steps, 0.01, 80.0, 7)
    return torch.cat([ts, ts.new_zeros(1)]) if zero else ts


def sample(solver: Solver, ts: Tensor, guide: Guide | None = None, afs: bool = False) -> Tensor:
    """All states of a walk on the mixture, float64."""
    return integrate(solver, mixture(), start(), ts, guide, afs).x


def relative_error(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).abs().max() / truth.abs().max())
