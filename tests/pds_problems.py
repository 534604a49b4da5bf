"""What the tests of PDS share: operators as matrices, and the formulas in complex transforms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pds.operators import Preconditioner, mirrored, to_filter

SHAPE = (2, 4, 4)
SIZE = 32


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_masks(shape: tuple[int, ...] = SHAPE, even: bool = True) -> tuple[Tensor, Tensor]:
    """(frequency, space), positive; only the frequency mask can be even."""
    freq, space = draw(*shape, seed=1).abs() + 0.01, draw(*shape, seed=2).abs() + 0.01
    return (freq + mirrored(freq) if even else freq), space


def preconditioners(alpha: float, even: bool = True) -> dict[str, Preconditioner]:
    """Every combination of random masks."""
    freq, space = random_masks(even=even)
    return {
        "plain": Preconditioner(),
        "freq": Preconditioner.of(freq, None, alpha),
        "space": Preconditioner.of(None, space, alpha),
        "both": Preconditioner.of(freq, space, alpha),
    }


def matrix(operator: Callable[[Tensor], Tensor], shape: tuple[int, ...] = SHAPE) -> Tensor:
    """The matrix of a linear operator on states (B, *shape)."""
    size = int(torch.tensor(shape).prod())
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    return operator(basis).reshape(size, size).T


@dataclass(frozen=True)
class Published:
    """DESIGN section 5, to the letter: complex transforms, the real part taken once at the end."""

    freq: Tensor
    space: Tensor

    @classmethod
    def of(cls, freq_mask: Tensor, space_mask: Tensor, alpha: float) -> Published:
        return cls(to_filter(freq_mask, alpha), to_filter(space_mask, alpha))

    def noise(self, z: Tensor) -> Tensor:
        return self._filtered(self.space * z).real

    def drift(self, g: Tensor) -> Tensor:
        return self._filtered(self.space**2 * self._filtered(g)).real

    def _filtered(self, x: Tensor) -> Tensor:
        return torch.fft.ifft2(self.freq * torch.fft.fft2(x))
