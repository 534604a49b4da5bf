"""Networks that predict the velocity of a rectified flow, as denoisers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from denoisers.noise_schedules import Flow
from denoisers.precision import widened
from solvers.types import Denoised

#: ``v(y, s)`` for states (B, C, H, W) and times s, 0-d or (B, 1, 1, 1), of the flow.
Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(eq=False)
class VelocityDenoiser:
    """A denoiser made of ``velocity``, a network that predicts ``n - x0`` for ``(1 - s) x0 + s n``.

    ``s`` runs from 0, the data, to 1, noise (arXiv:2209.03003).  The denoised image is ``y - s v``,
    where ``s = sigma / (1 + sigma)`` and ``y = x / (1 + sigma)`` for the state x of this toolkit.
    A shift of the time is a matter of the grid (`denoisers.noise_schedules.Flow`), not of the
    network.  There are no bottleneck features, so AMED's predictor sees the noise level alone.
    """

    velocity: Velocity
    cost: int = 1  #: network evaluations of a call

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        """Denoise ``x`` (B, C, H, W) at ``sigma``, 0-d or (B, 1, 1, 1); ``x0`` has its dtype."""
        state, level = widened(x, sigma)
        velocity = self.velocity(Flow().own_state(state, level), level / (1 + level))
        return Denoised(Flow().x0(state, level, velocity).to(x.dtype), None)
