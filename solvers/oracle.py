"""An independent reference solution: adaptive Dormand-Prince 5(4), from torchdiffeq."""

from __future__ import annotations

import torch
from torch import Tensor
from torchdiffeq import odeint

from solvers.driver import Meter
from solvers.types import Denoiser, Trajectory


def dopri5(
    denoiser: Denoiser | Meter, x: Tensor, ts: Tensor, rtol: float = 1e-6, atol: float = 1e-6
) -> Trajectory:
    """Solve the probability-flow ODE from ``x`` (B, C, H, W) at ``ts[0]`` through all ``ts`` > 0.

    In ``u = ln sigma`` the ODE is ``dx/du = x - D(x; e^u)``, smooth down to the smallest sigma.
    ``nfe`` depends on the step-size control.  The step size is shared by the batch, so a sample
    depends on the others within the tolerance: use this as a reference, not as a sampler.
    Raises ValueError for tolerances, or states, that no step size reaches in the dtype of ``x``.
    """
    if float(ts[-1]) <= 0:
        raise ValueError("dopri5 works in log sigma and cannot reach sigma = 0; end the grid above")
    least = torch.finfo(x.dtype).eps
    if not (least <= rtol <= 1 and least <= atol <= 1):
        raise ValueError(
            f"tolerances of {rtol:g} and {atol:g} are not between {least:.2g}, the rounding of "
            f"{x.dtype}, and 1: give a larger --tol, or --dtype float64"
        )
    meter = Meter.of(denoiser)
    nfe_before = meter.nfe
    sign = -1.0  # torchdiffeq requires a monotone time; s = -ln sigma increases

    def field(s: Tensor, state: Tensor) -> Tensor:
        node = meter(state, torch.exp(sign * s))
        return sign * (node.x - node.x0)

    times = sign * torch.log(ts)
    try:
        xs = odeint(field, x, times.to(x.device), rtol=rtol, atol=atol, method="dopri5")
    except AssertionError as error:  # a step of length 0, or a state that is not finite
        raise ValueError(
            f"dopri5 found no step size for a tolerance of {rtol:g} in {x.dtype} ({error}): give a "
            "larger --tol, or --dtype float64"
        ) from None
    return Trajectory(ts, xs, meter.nfe - nfe_before)
