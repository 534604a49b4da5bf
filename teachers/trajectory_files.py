"""Trajectories on disk: shards of a fixed number of latents, and the set that reads them.

A shard is a safetensors file with the trajectories of the latents ``first, first + 1, ...`` in
order, at most `SHARD`.  Rows are latents, so any of them are read without the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from denoisers.conditions import StreamName
from runtime.errors import UserError
from runtime.files import atomic_write, require_readable
from runtime.record import RECORD, RunRecord
from runtime.typed import pick

TRAJECTORIES = "trajectories"  #: first part of the names of all draws, and folder in the cache
SHARD = 64  #: latents in a full shard; the number of the last one may still grow
TIMES, X, X0, NFE = "times", "x", "x0", "nfe"  #: tensors of a shard


class StoredRow(NamedTuple):
    """The trajectory of one latent."""

    x: Tensor  #: (T, C, H, W), the states at the kept nodes
    x0: Tensor  #: (T, C, H, W), the denoised states there
    nfe: int  #: metered network evaluations


class TrajectoryBatch(NamedTuple):
    """The trajectories of some latents."""

    numbers: tuple[int, ...]  #: (B,) of the latents
    x: Tensor  #: (T, B, C, H, W), from the latents at sigma_max to the states at sigma_min
    x0: Tensor  #: (T, B, C, H, W), denoised; the last are the images after an Euler step to 0


@dataclass(frozen=True)
class Shard:
    """The file of the latents from number ``first``; it need not exist."""

    folder: Path
    first: int

    @property
    def path(self) -> Path:
        return self.folder / f"{self.first:09d}.safetensors"

    def count(self) -> int:
        """How many latents the file holds, 0 if there is none; UserError for a damaged one."""
        if not self.path.exists():
            return 0
        with self._open() as file:
            return int(file.get_slice(X).get_shape()[0])

    def times(self) -> Tensor:
        """The noise levels of the states, (T,) float64."""
        with self._open() as file:
            return file.get_tensor(TIMES)

    def rows(self, numbers: Sequence[int]) -> dict[int, StoredRow]:
        """The trajectories of these numbers, all of which lie in this shard."""
        with self._open() as file:
            x, x0, nfe = (file.get_slice(name) for name in (X, X0, NFE))
            indices = {number: number - self.first for number in numbers}
            return {
                number: StoredRow(x[i : i + 1][0], x0[i : i + 1][0], int(nfe[i : i + 1]))
                for number, i in indices.items()
            }

    def extend(self, numbers: range, rows: Sequence[StoredRow], times: Tensor) -> None:
        """Add the ``rows`` of these numbers to those before them, whole or not at all.

        Where another run has added them meanwhile, the file stays as it is: its rows are the same.
        """
        if self.first + self.count() >= numbers.stop:
            return
        before = range(self.first, numbers.start)
        rows = [*(self.rows(before).values() if before else ()), *rows]
        tensors = {
            TIMES: times.contiguous(),
            X: torch.stack([row.x for row in rows]),
            X0: torch.stack([row.x0 for row in rows]),
            NFE: torch.tensor([row.nfe for row in rows]),
        }
        with atomic_write(self.path) as temporary:
            save_file(tensors, temporary)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            require_readable(self.path)
            with safe_open(self.path, framework="pt") as file:
                yield file
        except FileNotFoundError:
            raise UserError(f"{self.path} is missing: compute the trajectories again") from None
        except (SafetensorError, LookupError) as error:
            raise UserError(
                f"{self.path} cannot be read ({error}): delete it and compute the trajectories "
                "again"
            ) from None


def shards(folder: Path, number: int) -> list[Shard]:
    """The shards of the latents 0 to ``number - 1``."""
    return [Shard(folder, first) for first in range(0, number, SHARD)]


@dataclass(frozen=True)
class _TrajectoryPlan:
    """What is read of the plan in a set's record."""

    seed: int
    nfe: int | None


@dataclass(frozen=True, eq=False)  # tensors have no boolean ==
class TrajectorySet:
    """The trajectories of the latents 0 to ``number - 1`` on disk; nothing is kept in memory."""

    folder: Path
    number: int
    record: RunRecord  #: the model, and in ``plan`` all that the states depend on
    times: Tensor  #: (T,) float64, the noise levels of the states: sigma_max to sigma_min

    @classmethod
    def open(cls, folder: Path, number: int) -> TrajectorySet:
        """The first ``number`` trajectories in ``folder``.

        Raises UserError where there are fewer, and for a file that cannot be read.
        """
        record = RunRecord.read(folder / RECORD)
        pick(_TrajectoryPlan, record.plan, f"the plan in {folder / RECORD}")
        parts = shards(folder, number)
        there = sum(min(part.count(), number - part.first) for part in parts)
        if there < number:
            raise UserError(
                f"{folder} holds {there} of {number} trajectories: run python -m "
                f"tools.trajectories with --number {number} to compute the others"
            )
        return cls(folder, number, record, parts[0].times())

    def __len__(self) -> int:
        return self.number

    def __str__(self) -> str:
        nfe = "adaptive NFE" if self.nfe is None else f"{self.nfe} NFE each"
        return f"{self.folder}: {self.number} trajectories, {nfe}"

    @property
    def nfe(self) -> int | None:
        """Network evaluations per latent; None for dopri5."""
        return self.record.plan["nfe"]

    @property
    def key(self) -> str:
        """A hash of all that the trajectories depend on."""
        return self.folder.name

    @property
    def stream(self) -> StreamName:
        """The stream of all draws: ``SeededBatch.open(..., numbers, ..., stream)`` repeats them."""
        return stream_name(self.record.plan["seed"])

    def batches(self, size: int, numbers: Sequence[int] | None = None) -> Iterator[TrajectoryBatch]:
        """The trajectories of ``numbers`` (all by default) in order, ``size`` at a time.

        Only the rows of a batch are read, from one shard at a time.
        """
        chosen = range(self.number) if numbers is None else numbers
        for i in range(0, len(chosen), size):
            yield self.read(chosen[i : i + size])

    def read(self, numbers: Sequence[int]) -> TrajectoryBatch:
        """The trajectories of ``numbers``, in this order; UserError for one that is not there."""
        by_shard: dict[int, list[int]] = {}
        for number in numbers:
            if not 0 <= number < self.number:
                raise UserError(
                    f"there is no trajectory {number}: {self.folder} was opened with the numbers 0 "
                    f"to {self.number - 1}"
                )
            by_shard.setdefault(number - number % SHARD, []).append(number)
        rows: dict[int, StoredRow] = {}
        for first, some in by_shard.items():
            rows |= Shard(self.folder, first).rows(some)
        x = torch.stack([rows[n].x for n in numbers], dim=1)
        x0 = torch.stack([rows[n].x0 for n in numbers], dim=1)
        return TrajectoryBatch(tuple(numbers), x, x0)


def stream_name(seed: int) -> StreamName:
    """The prefix of the names of all draws of the trajectories of ``seed``."""
    return (TRAJECTORIES, seed)
