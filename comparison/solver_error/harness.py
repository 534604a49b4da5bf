"""What every row is measured with: seeds in fixed groups, a detector, and this process's share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from denoisers.protocol import Model
from metrics.detectors import Detector
from runtime.dist import World
from runtime.images import to_uint8_tensor


@dataclass(frozen=True)
class ErrorHarness:
    """Shared by all rows, so that their numbers may be compared."""

    detector: Detector | None
    seeds: Sequence[int]
    batch: int  #: images that are solved together
    here: World

    @property
    def groups(self) -> list[Sequence[int]]:
        """The seeds as they are solved together: the same on any number of processes."""
        return [self.seeds[i : i + self.batch] for i in range(0, len(self.seeds), self.batch)]

    @property
    def own_groups(self) -> Sequence[tuple[int, Sequence[int]]]:
        """This process's groups, each with the position of its first seed among all."""
        return self.here.shard([(i * self.batch, group) for i, group in enumerate(self.groups)])

    def finished(self, position: int) -> int:
        """Images that all processes finish while this one does its group at ``position``."""
        size = self.here.size
        first = position // self.batch // size * size
        return sum(map(len, self.groups[first : first + size]))

    def features(self, x: Tensor, model: Model) -> Tensor | None:
        """Of final states (B, C, H, W): (B, dim), float64 on the CPU; None without a detector."""
        if self.detector is None:
            return None
        return self.detector(to_uint8_tensor(model.decode(x))).cpu().double()

    def gather(self, columns: Iterable[tuple[int, Tensor]], height: int) -> Tensor:
        """(height, images) from the columns (height, B) of all processes, by their position."""
        whole = torch.zeros(height, len(self.seeds), dtype=torch.float64)
        for position, part in columns:
            whole[:, position : position + part.shape[1]] = part
        return self.here.sum_(whole)
