"""A teacher's trajectories between its nodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Curves:
    """Teacher trajectories as functions of the noise level, computed at their nodes.

    Between nodes the state is the cubic polynomial in ``log sigma`` with the states and slopes of
    both ends, ``dx / dlog sigma = x - D`` (Hermite interpolation).
    """

    times: Tensor  #: (T,) float64, decreasing
    x: Tensor  #: (T, B, C, H, W), the states
    x0: Tensor  #: (T, B, C, H, W), the denoised states; the last one is the image at sigma = 0
    device: torch.device = torch.device("cpu")  #: of what is returned

    def at(self, sigma: float) -> Tensor:
        """The states at ``sigma``, (B, C, H, W), from the first to the last time."""
        times = self.times
        if not float(times[-1]) * (1 - 1e-9) <= sigma <= float(times[0]) * (1 + 1e-9):
            raise ValueError(
                f"the trajectories have no state at {sigma:g}: give a noise level from "
                f"{float(times[-1]):g} to {float(times[0]):g}"
            )
        i = min(max(int((times > sigma).sum()) - 1, 0), len(times) - 2)
        width = torch.log(times[i + 1] / times[i])
        u = float(torch.log(sigma / times[i]) / width)
        first, last = (part[i : i + 2].to(self.device) for part in (self.x, self.x0))
        slopes = float(width) * (first - last)
        ends = (1 + 2 * u) * (1 - u) ** 2 * first[0] + u**2 * (3 - 2 * u) * first[1]
        return ends + u * (1 - u) ** 2 * slopes[0] - u**2 * (1 - u) * slopes[1]

    @property
    def images(self) -> Tensor:
        """The teacher's images, (B, C, H, W)."""
        return self.x0[-1].to(self.device)

    @property
    def begin(self) -> Tensor:
        """The initial states, (B, C, H, W)."""
        return self.x[0].to(self.device)
