"""Rows in closed form: least squares of the teacher's states on what the student has seen.

For given network times, the k-th state of an NS solver is a linear combination of the initial state
and of the denoised images at its first k - 1 states.  Row after row, the weights that come nearest
to the teacher's state at the time ``s_k`` solve a linear system with k unknowns.  No gradient and
no iteration: each latent is evaluated once per call of the student.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ns.spectrum import Reduce, SpectralNorm
from solvers.driver import Meter
from solvers.table import Table, combine
from teachers.curves import Curves

#: Weight of the classic row, relative to the largest direction of the columns: far below what the
#: latents determine, and enough where two columns are equal.
RIDGE = 1e-9


class Latents(NamedTuple):
    """Teacher trajectories in batches, with the denoisers bound to their samples."""

    curves: Sequence[Curves]
    meters: Sequence[Meter]
    flow: bool = False  #: of a flow, whose first state is pure noise: see `first_weight`

    def batches(self) -> Iterator[tuple[Curves, Meter]]:
        """The trajectories of each batch, and the denoiser of its samples."""
        return zip(self.curves, self.meters, strict=True)

    def part(self, first: int, last: int) -> Latents:
        """Some of the batches."""
        return Latents(self.curves[first:last], self.meters[first:last], self.flow)


def first_weight(time: Tensor, start: float) -> Tensor:
    """The weight of ``x_T`` in the first state of a flow.

    Pipelines of flows hand noise n to their network at the first time, whatever that is, and a
    table can only be used in them if it does so too: ``x_1 / (1 + s_1) = x_T / (1 + start) = n``.
    """
    return (1 + time) / (1 + start)


@dataclass(frozen=True, eq=False)
class Calibration:
    """A calibrated table, with what refinement needs to know of every row."""

    table: Table
    errors: Tensor  #: (K + 1,), root mean square error of every state, the last one whitened
    grams: tuple[Tensor, ...]  #: (k, k) for k = 1 .. K + 1: mean products of each row's columns


def calibrate(
    prior: Table, latents: Latents, norm: SpectralNorm, reduce: Reduce = lambda _: None
) -> Calibration:
    """Fit the rows at the times of ``prior``, which must lie within those of the teacher.

    The last row is fitted in ``norm``, the others in the mean squared error; all of them lean
    towards the rows of ``prior`` where the latents do not determine them.  The first row of a flow
    is not free.
    """
    rows, errors, grams = torch.zeros_like(prior.rows), [], []
    columns = [[curves.begin] for curves in latents.curves]
    for k in range(prior.calls + 1):
        if k < prior.calls:
            targets = [curves.at(float(prior.times[k])) for curves in latents.curves]
            sums = _normal_equations(columns, targets, None, reduce)
        else:
            targets = [curves.images for curves in latents.curves]
            sums = _normal_equations(columns, targets, norm, reduce)
        fixed = first_weight(prior.times[:1], prior.start) if latents.flow and k == 0 else None
        row = _solve(sums, prior.rows[k, : k + 1]) if fixed is None else fixed
        error = _error(sums, row)
        rows[k, : k + 1] = row
        errors.append(error)
        grams.append(sums.gram)
        if k < prior.calls:
            for seen, meter in zip(columns, latents.meters, strict=True):
                seen.append(meter(combine(row, seen), prior.times[k]).x0)
    table = Table(prior.start, prior.end, prior.times, rows)
    return Calibration(table, torch.stack(errors), tuple(grams))


class _Sums(NamedTuple):
    """Mean products per value."""

    gram: Tensor  #: (n, n), of the columns
    product: Tensor  #: (n,), of the columns and the target
    square: Tensor  #: (), of the target


def _normal_equations(
    columns: Sequence[Sequence[Tensor]],
    targets: Sequence[Tensor],
    norm: SpectralNorm | None,
    reduce: Reduce,
) -> _Sums:
    """The sums over all batches, in ``norm``, or plain."""
    n = len(columns[0])
    sums = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    count = torch.zeros((), dtype=torch.float64)
    for seen, target in zip(columns, targets, strict=True):
        both = [part.to(torch.float64) for part in (*seen, target)]
        flat = torch.stack([(norm.whiten(part) if norm else part).flatten() for part in both])
        sums += (flat @ flat.T).cpu()
        count += flat.shape[1]
    reduce(sums)
    reduce(count)
    mean = sums / count
    return _Sums(mean[:n, :n], mean[:n, n], mean[n, n])


def _solve(sums: _Sums, prior: Tensor) -> Tensor:
    """The row of the least mean squared error."""
    gram, product, _ = sums
    scale = gram.diagonal().sqrt()  # columns of equal size: x_T is 100 times as large as an image
    ridge = RIDGE * torch.eye(len(gram), dtype=gram.dtype)
    scaled = gram / scale[:, None] / scale + ridge
    row: Tensor = torch.linalg.solve(scaled, product / scale + RIDGE * prior * scale) / scale
    return row


def _error(sums: _Sums, row: Tensor) -> Tensor:
    """The root of the mean squared error of ``row``."""
    gram, product, square = sums
    return (square - 2 * row @ product + row @ gram @ row).clamp(min=0).sqrt()
