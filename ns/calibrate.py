"""Rows in closed form: least squares of the teacher's states on what the student has seen.

For given network times, the k-th state of an NS solver is a linear combination of the initial state
and of the denoised images at its first k - 1 states.  Row after row, the weights that come nearest
to the teacher's state at the time ``s_k`` solve a linear system with k unknowns.  No gradient and
no iteration: each latent is evaluated once per call of the student.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ns.spectrum import SpectralNorm
from solvers.driver import Meter
from solvers.table import Table, combine

#: Weight of the classic row, relative to the largest direction of the columns: far below what the
#: latents determine, and enough where two columns are equal.
RIDGE = 1e-9


@dataclass(frozen=True, eq=False)
class Curves:
    """Teacher trajectories as functions of the noise level, for the calibration of tables.

    Between nodes the state is the cubic polynomial in ``log sigma`` with the states and slopes of
    both ends, ``dx / dlog sigma = x - D`` (Hermite interpolation).
    """

    times: Tensor  #: (T,) float64, decreasing
    x: Tensor  #: (T, B, C, H, W), the states
    x0: Tensor  #: (T, B, C, H, W), the denoised states; the last one is the image at sigma = 0

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
        slopes = [float(width) * (self.x[j] - self.x0[j]) for j in (i, i + 1)]
        ends = (1 + 2 * u) * (1 - u) ** 2 * self.x[i] + u**2 * (3 - 2 * u) * self.x[i + 1]
        return ends + u * (1 - u) ** 2 * slopes[0] - u**2 * (1 - u) * slopes[1]

    @property
    def images(self) -> Tensor:
        """The teacher's images, (B, C, H, W)."""
        return self.x0[-1]


@dataclass(frozen=True, eq=False)
class Calibration:
    """A calibrated table, with what refinement needs to know of every row."""

    table: Table
    errors: Tensor  #: (K + 1,), root mean square error of every state, the last one whitened
    grams: tuple[Tensor, ...]  #: (k, k) for k = 1 .. K + 1: mean products of each row's columns


def calibrate(
    prior: Table,
    curves: Sequence[Curves],
    meters: Sequence[Meter],
    norm: SpectralNorm,
    reduce: Callable[[Tensor], object] = lambda _: None,
) -> Calibration:
    """Fit the rows at the times of ``prior``, which must lie within those of the teacher.

    ``curves`` are batches of teacher trajectories and ``meters`` the denoisers bound to their
    samples.  The last row is fitted in ``norm``, the others in the mean squared error; all of them
    lean towards the rows of ``prior`` where the samples do not determine them.  ``reduce`` sums a
    tensor over processes in place.
    """
    calls = prior.calls
    rows, errors, grams = torch.zeros_like(prior.rows), [], []
    columns = [[curve.x[0]] for curve in curves]
    for k in range(calls + 1):
        last = k == calls
        gram, product, square = _normal_equations(columns, curves, prior, k, norm, reduce)
        row, error = _solve(gram, product, square, prior.rows[k, : k + 1])
        rows[k, : k + 1] = row
        errors.append(error)
        grams.append(gram)
        if last:
            break
        for seen, meter in zip(columns, meters, strict=True):
            seen.append(meter(combine(row, seen), prior.times[k]).x0)
    table = Table(prior.start, prior.end, prior.times, rows)
    return Calibration(table, torch.stack(errors), tuple(grams))


def _normal_equations(
    columns: Sequence[Sequence[Tensor]],
    curves: Sequence[Curves],
    prior: Table,
    k: int,
    norm: SpectralNorm,
    reduce: Callable[[Tensor], object],
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean products per value: of the columns (n, n), with the target (n,), and of the target."""
    n = k + 1
    sums = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    count = torch.zeros((), dtype=torch.float64)
    for seen, curve in zip(columns, curves, strict=True):
        last = k == prior.calls
        target = curve.images if last else curve.at(float(prior.times[k]))
        both = [part.to(torch.float64) for part in (*seen, target)]
        flat = torch.stack([(norm.whiten(part) if last else part).flatten() for part in both])
        sums += (flat @ flat.T).cpu()
        count += flat.shape[1]
    reduce(sums)
    reduce(count)
    mean = sums / count
    return mean[:n, :n], mean[:n, n], mean[n, n]


def _solve(gram: Tensor, product: Tensor, square: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """The row and the root of its mean squared error."""
    scale = gram.diagonal().sqrt()  # columns of equal size: x_T is 100 times as large as an image
    ridge = RIDGE * torch.eye(len(gram), dtype=gram.dtype)
    scaled = gram / scale[:, None] / scale + ridge
    row = torch.linalg.solve(scaled, product / scale + RIDGE * prior * scale) / scale
    error = (square - 2 * row @ product + row @ gram @ row).clamp(min=0).sqrt()
    return row, error
