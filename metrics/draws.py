"""Which images of a set are used: a draw without replacement, fixed by a seed."""

from __future__ import annotations

import numpy as np


def choose(count: int, num: int | None, seed: int) -> np.ndarray:
    """Sorted indices of ``num`` of ``count`` images, drawn by ``seed``; all of them for None.

    Raises ValueError if there are fewer than ``num``.
    """
    if num is None or num == count:
        return np.arange(count)
    if num > count:
        raise ValueError(f"{num} images were asked for, found {count}: lower the number.")
    return np.sort(np.random.RandomState(seed % (1 << 31)).permutation(count)[:num])
