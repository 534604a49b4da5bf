"""A deterministic sampler as a table of numbers: the non-stationary (NS) family of solvers.

A sampler that evaluates the network K times and is linear in what the network returns is given by
K network times ``s_1 .. s_K`` and a lower triangular matrix R of weights::

    x_k = R[k, 0] x_T + R[k, 1] D_1 + ... + R[k, k-1] D_(k-1),    D_k = D(x_k; s_k)

for k = 1 .. K, and the final state ``x_(K+1)`` by the last row.  This is the family of Shaul et al.
2024 (arXiv:2403.01329), with denoised images in the place of velocities.  The noise level of a
state between the ends appears nowhere: only the time that the network is told does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.driver import Meter
from solvers.types import Denoiser, Trajectory


@dataclass(frozen=True, eq=False)  # tensors have no boolean ==, so tables compare by identity
class Table:
    """The times and weights of an NS solver; both may carry gradients."""

    start: float  #: noise level of the initial state x_T
    end: float  #: noise level of the final state
    times: Tensor  #: (K,) float64, the network's times
    rows: Tensor  #: (K + 1, K + 1) float64, lower triangular: weights of x_T, D_1, .., D_K

    def __post_init__(self) -> None:
        count = self.times.shape[0] if self.times.ndim == 1 else 0
        if not count or self.rows.shape != (count + 1, count + 1):
            raise ValueError(
                f"{tuple(self.times.shape)} times and {tuple(self.rows.shape)} weights are no "
                "table: give K times and K + 1 rows of K + 1 weights"
            )
        if bool(self.rows.detach().triu(1).any()):
            raise ValueError("a state depends on a later evaluation: give lower triangular rows")
        if not bool(torch.isfinite(self.rows.detach()).all()):
            raise ValueError("the table has a weight that is not finite: give finite weights")
        times = self.times.detach()
        if not bool(((times > 0) & torch.isfinite(times)).all()):
            raise ValueError(f"network times must be positive, got {times.tolist()}")
        if not 0 <= self.end < self.start < math.inf:
            raise ValueError(
                f"a table leads down to 0 or above, not {self.start:g} -> {self.end:g}"
            )

    @property
    def calls(self) -> int:
        """Network calls, K."""
        return len(self.times)

    @property
    def ragged(self) -> list[list[float]]:
        """The rows without the zeros above the diagonal: 1, 2, .., K + 1 weights."""
        return [row[: k + 1].tolist() for k, row in enumerate(self.rows.detach())]

    @classmethod
    def of(
        cls, start: float, end: float, times: Sequence[float], rows: Sequence[Sequence[float]]
    ) -> Table:
        """A table from plain numbers, with rows as in ``ragged``."""
        if [len(row) for row in rows] != [*range(1, len(times) + 2)]:
            raise ValueError(
                f"rows of {[len(row) for row in rows]} weights do not fit {len(times)} times: give "
                f"rows of 1 to {len(times) + 1} weights"
            )
        square = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for k, row in enumerate(rows):
            square[k, : k + 1] = torch.tensor(row, dtype=torch.float64)
        return cls(start, end, torch.tensor(times, dtype=torch.float64), square)

    def states(self, denoiser: Denoiser | Meter, x: Tensor) -> Iterator[Tensor]:
        """Yield ``x_1 .. x_(K+1)`` from the initial state ``x`` (B, C, H, W) at ``start``."""
        meter = Meter.of(denoiser)
        columns = [x]
        for row, time in zip(self.rows, self.times, strict=False):
            state = combine(row, columns)
            yield state
            columns.append(meter(state, time).x0)
        yield combine(self.rows[-1], columns)


def combine(weights: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """The sum of ``columns``, (B, C, H, W) each, with the first of the ``weights``, (n,)."""
    total = weights[0] * columns[0]
    for weight, column in zip(weights[1:], columns[1:], strict=False):
        total = total + weight * column
    return total


def run_table(table: Table, denoiser: Denoiser | Meter, x: Tensor) -> Trajectory:
    """The states of a table from ``x`` (B, C, H, W) at ``table.start``.

    The first state of the trajectory is ``x``; then follow those at which the network is evaluated,
    from the second one on, and the final one, at the noise levels ``s_2 .. s_K`` and ``end``.
    """
    meter = Meter.of(denoiser)
    before = meter.nfe
    _, *states = table.states(meter, x)
    times = torch.tensor([table.start, *table.times.detach()[1:].tolist(), table.end])
    return Trajectory(times.to(torch.float64), torch.stack([x, *states]), meter.nfe - before)
