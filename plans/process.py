"""The forward process: what adds noise to a state, wherever a plan jumps back up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from plans.pfgmpp import spread

#: The standard normal draw of a name, shaped like the state.
Normal = Callable[[tuple], Tensor]


@dataclass(frozen=True)
class ForwardProcess:
    """Noise by name, and the kernel by which a state gets noisier.

    Gaussian: from level s to level t the forward process adds ``sqrt(t^2 - s^2) z``, ``z`` a named
    standard normal draw.  Under PFGM++ ``z`` is multiplied by a random strength of its own (see
    `plans.pfgmpp`), drawn by the name ``(*name, "spread")``.
    """

    normal: Normal
    pfgmpp: int | None = None  #: dimensions D that a PFGM++ model adds to the data's

    @classmethod
    def of(cls, noise: Noise) -> ForwardProcess:
        """``noise`` itself, or the Gaussian process that takes its draws from ``noise``."""
        return noise if isinstance(noise, ForwardProcess) else cls(noise)

    def lift(self, x: Tensor, low: float, high: float, name: tuple, scale: float = 1.0) -> Tensor:
        """The state ``x`` (B, C, H, W) of level ``low`` at level ``high``.

        ``scale`` multiplies the noise; 1 keeps the marginal distribution.
        """
        noise = lift_std(low, high, scale) * self.normal(name).to(x)
        if self.pfgmpp is not None:
            draw = self.normal((*name, "spread"))
            noise = noise * spread(low / high, self.pfgmpp, draw).to(x.dtype).to(x.device)
        return x + noise


def lift_std(low: float, high: float, scale: float = 1.0) -> float:
    """Standard deviation of the noise between two levels, ``scale sqrt(high^2 - low^2)``."""
    return scale * math.sqrt((high - low) * (high + low))


#: The noise of a batch: its forward process, or named draws for a Gaussian one.
Noise = ForwardProcess | Normal
