"""Random numbers that depend on the seed of an image, not on its batch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Name = str | tuple[str | int, ...]  #: name of a draw: ``"latent"`` or ``("restart", 3)``


class SeedNoise:
    """Named draws for a batch of seeds, one seed per image.

    Each (seed, name) has its own generator on the CPU, keyed by a hash of both, so a draw does
    not depend on the batch, the number of ranks, the dtype, the device, or other draws. The same
    name gives the same numbers again: put a counter into the name of a repeated draw.

    The generator is Philox with a 128-bit key. Torch's CPU generator uses only 32 bits of its
    seed: of 50,000 hashed seeds, two would share their noise with probability 0.25.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(int(seed) for seed in seeds)

    def normal(
        self,
        name: Name,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """Standard normal numbers (B, \\*shape), drawn in float32 and then cast."""
        out = np.empty((len(self.seeds), *shape), dtype=np.float32)
        for row, seed in zip(
            out.reshape(len(self.seeds), math.prod(shape)), self.seeds, strict=True
        ):
            _generator(seed, name).standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(out).to(device=device, dtype=dtype)

    def integers(self, name: Name, high: int) -> Tensor:
        """Uniform integers in [0, high), (B,) int64 on the CPU."""
        draws = [int(_generator(seed, name).integers(high)) for seed in self.seeds]
        return torch.tensor(draws, dtype=torch.int64)

    def beta(self, name: Name, a: float, b: float) -> Tensor:
        """Draws from Beta(a, b), a, b > 0: (B,) float64 in [0, 1] on the CPU."""
        draws = [_generator(seed, name).beta(a, b) for seed in self.seeds]
        return torch.tensor(draws, dtype=torch.float64)


def _generator(seed: int, name: Name) -> np.random.Generator:
    parts = (name,) if isinstance(name, str) else name
    digest = hashlib.sha256(json.dumps([seed, *parts]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def shuffled(positions: Sequence[int], count: int, seed: int) -> list[int]:
    """The numbers, below ``count``, at these positions of endless passes over all of them.

    Every pass has an order of its own, which depends on ``seed`` and the number of the pass alone.
    """
    orders = {}
    for epoch in {position // count for position in positions}:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        orders[epoch] = torch.randperm(count, generator=generator).tolist()
    return [orders[position // count][position % count] for position in positions]
