"""The forward process, which adds the noise of a plan's jumps."""

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
    """The model's forward process, with its named draws.

    Gaussian: from level s to level t the process adds ``sqrt(t^2 - s^2) z``, where ``z`` is a named
    standard normal draw.  Under PFGM++ ``z`` is also multiplied by a random factor (see
    `plans.pfgmpp`), drawn under the name ``(*name, "spread")``.
    """

    normal: Normal
    pfgmpp: int | None = None  #: number D of dimensions that a PFGM++ model adds to the data

    @classmethod
    def of(cls, noise: Noise) -> ForwardProcess:
        """``noise`` itself if it is a process, or the Gaussian process with these draws."""
        return noise if isinstance(noise, ForwardProcess) else cls(noise)

    def lift(self, x: Tensor, low: float, high: float, name: tuple, scale: float = 1.0) -> Tensor:
        """Raise the state ``x`` (B, C, H, W) from level ``low`` to level ``high``.

        ``scale`` multiplies the noise; 1 gives the right marginal distribution at ``high``.
        """
        noise = lift_std(low, high, scale) * self.normal(name).to(x)
        if self.pfgmpp is not None:
            draw = self.normal((*name, "spread"))
            noise = noise * spread(low / high, self.pfgmpp, draw).to(x.dtype).to(x.device)
        return x + noise


def lift_std(low: float, high: float, scale: float = 1.0) -> float:
    """Standard deviation of the noise added between two levels, ``scale sqrt(high^2 - low^2)``."""
    return scale * math.sqrt((high - low) * (high + low))


#: The noise of a batch: its forward process, or the named draws of a Gaussian one.
Noise = ForwardProcess | Normal
