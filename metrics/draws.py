"""Draws of images without replacement by a seed."""

from __future__ import annotations

import numpy as np


def choose(count: int, num: int | None, seed: int) -> np.ndarray:
    """Sorted indices of ``num`` of ``count`` images, drawn by ``seed``; None means all.

    Raises ValueError if there are fewer than ``num``.
    """
    if num is None or num == count:
        return np.arange(count)
    if num > count:
        raise ValueError(f"{num} images were asked for, found {count}: lower the number.")
    return np.sort(np.random.RandomState(seed % (1 << 31)).permutation(count)[:num])
