"""The coordinates in which a table is refined.

The columns of a row are nearly collinear (denoised images of one latent), so equal steps in its
weights change the state by amounts that differ by orders of magnitude.  With G = L L' the mean
products of the columns and e the row's calibration error, ``row + e L^-T delta`` changes the state
by ``e |delta|`` (root mean square), whatever the direction of delta.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ns.calibrate import Calibration, first_weight
from solvers.table import Table

#: Smallest eigenvalue of G for unit columns: below it, weights would amplify rounding errors.
FLOOR = 1e-7
#: A unit step in the coordinate of a time changes its logarithm by this much.
TIME_SCALE = 0.1


class WhitenedTable(nn.Module):
    """A table as trainable parameters, all of which are 0 at the calibrated table."""

    rows: Tensor
    times: Tensor
    directions: Tensor

    def __init__(self, table: Table, directions: Tensor, flow: bool = False) -> None:
        """``directions`` (K + 1, K + 1, K + 1): the columns of ``e L^-T``, row by row.

        The first row of a ``flow`` follows from the first time (`ns.calibrate.first_weight`).
        """
        super().__init__()
        self.flow = flow
        self.start, self.end = table.start, table.end
        self.delta = nn.Parameter(torch.zeros_like(table.rows))
        self.shifts = nn.Parameter(torch.zeros_like(table.times))
        self.register_buffer("rows", table.rows.clone())
        self.register_buffer("times", table.times.clone())
        self.register_buffer("directions", directions.clone())

    @classmethod
    def around(cls, calibration: Calibration, flow: bool = False) -> WhitenedTable:
        """The coordinates whose origin is a calibrated table."""
        size = len(calibration.table.rows)
        directions = torch.zeros(size, size, size, dtype=torch.float64)
        for k, (gram, error) in enumerate(zip(calibration.grams, calibration.errors, strict=True)):
            directions[k, : k + 1, : k + 1] = error * _inverse_root(gram)
        return cls(calibration.table, directions, flow)

    def table(self) -> Table:
        """The table of the present parameters, with gradients."""
        rows = self.rows + torch.einsum("kij,kj->ki", self.directions, self.delta)
        times = self.times * torch.exp(TIME_SCALE * self.shifts)
        if self.flow:
            first = torch.zeros_like(rows[:1])
            first = torch.cat([first_weight(times[:1], self.start)[None], first[:, 1:]], dim=1)
            rows = torch.cat([first, rows[1:]])
        return Table(self.start, self.end, times, rows)


def _inverse_root(gram: Tensor) -> Tensor:
    """``L^-T`` for ``gram = L L'``, its near-null directions bounded."""
    scale = gram.diagonal().sqrt()
    unit = gram / scale[:, None] / scale + FLOOR * torch.eye(len(gram), dtype=gram.dtype)
    lower = torch.linalg.cholesky(unit)
    eye = torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve_triangular(lower.T, eye, upper=True) / scale[:, None]
