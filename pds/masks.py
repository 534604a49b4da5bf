"""Masks of PDS: the power of images per frequency and per pixel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from checkpoints.arrays import read_npy
from pds.operators import mirrored
from runtime.errors import UserError, reason

HERE = Path(__file__).resolve().parent
#: Names of bundled masks, by the name of the model's card.
BUNDLED = dict.fromkeys(("cifar10-small", "cifar10", "cifar10-vp", "cifar10-ncsnpp"), "cifar10")
#: Tolerance for the evenness of a frequency mask, relative to its maximum; above rounding errors.
UNEVEN = 1e-3
REMEDY = "fit one with python -m tools.fit_masks, or give 'none'"


class Masks(NamedTuple):
    """The masks of K images; float64, not negative."""

    freq: Tensor  #: (C, H, W), ``log(1 + mean |F x|^2)``, the zero frequency first
    space: Tensor  #: (C, H, W), ``mean x^2``
    n: int  #: K


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask from a file."""

    name: str  #: name of the file, for records
    values: Tensor  #: (C, H, W) float64

    def describe(self) -> dict[str, Any]:
        """The entry of a record: the name and a hash of the values."""
        digest = hashlib.sha256(self.values.numpy().tobytes()).hexdigest()
        return {"name": self.name, "sha256": digest}


def fit(batches: Iterable[Tensor]) -> Masks:
    """Compute masks (PDS, arXiv:2207.02196, section 4) from uint8 batches (B, C, H, W).

    Images are scaled to [0, 1], as published, independent of the range of the model.  Raises
    UserError if there is no image, or if all images are black.
    """
    count = 0
    power = square = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        x = batch.double() / 255
        power = power + torch.fft.fft2(x).abs().square().sum(0)
        square = square + x.square().sum(0)
        count += len(x)
    if not float(square.sum()) > 0:
        raise UserError(f"all {count} images are black: check --data")
    power = (power + mirrored(power)) / 2  # it was even up to rounding
    return Masks(torch.log1p(power / count), square / count, count)


def load_mask(kind: str, spec: str, card_name: str, shape: tuple[int, int, int]) -> Mask | None:
    """Load a mask of the ``kind`` freq or space for states of ``shape`` (C, H, W).

    ``spec`` is a ``.npy`` file, ``bundled`` for a mask of the toolkit, or ``none``.  Raises
    UserError for a file without such a mask, or with another shape.  A frequency mask must be even,
    ``m(k) = m(-k)``, like that of any real images: otherwise the published operators would not
    preserve the target distribution (see `Preconditioner.of`).
    """
    if spec == "none":
        return None
    what = f"--{kind}_mask_path {spec}"
    if spec == "bundled":
        if card_name not in BUNDLED:
            raise UserError(f"{card_name!r} has no bundled masks: {REMEDY} for --{kind}_mask_path")
        path = HERE / "bundled" / f"{BUNDLED[card_name]}-{kind}.npy"
    else:
        path = Path(spec)
    values = _read(path, what)
    if values.ndim == len(shape) + 1 and len(values) == 1:  # as published
        values = values[0]
    if values.shape != shape:
        actual, expected = ("x".join(map(str, s)) for s in (values.shape, shape))
        raise UserError(f"{what} has shape {actual}, but {card_name!r} needs {expected}: {REMEDY}")
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() > 0):
        raise UserError(f"{what} has entries that are negative, not finite, or all 0: {REMEDY}")
    mask = torch.from_numpy(values)
    if kind == "freq":
        uneven = float((mask - mirrored(mask)).abs().max() / mask.max())
        if uneven > UNEVEN:
            raise UserError(
                f"{what} is not even, as a frequency mask must be (opposite frequencies differ by "
                f"{uneven:.2g} of the maximum); it may be a space mask: {REMEDY}"
            )
    return Mask(path.name, mask)


def _read(path: Path, what: str) -> np.ndarray:
    """A float64 array from a ``.npy``; nothing in the file is executed."""
    try:
        values = read_npy(path)
        if values.dtype.kind not in "fiu":
            raise ValueError("not an array of real numbers")
    except (OSError, ValueError) as error:
        raise UserError(f"{what} cannot be read ({reason(error)}): {REMEDY}") from None
    return values.astype(np.float64)
