"""Masks of PDS: where images have power, per frequency and per pixel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pds.operators import mirrored
from runtime.errors import UserError

HERE = Path(__file__).resolve().parent
#: Data sets with bundled masks, by the name of the model's card.
BUNDLED = dict.fromkeys(("cifar10-small", "cifar10", "cifar10-vp", "cifar10-ncsnpp"), "cifar10")
#: A frequency mask of real images is even; more than this of its maximum is no rounding.
UNEVEN = 1e-3
REMEDY = "fit one with python -m tools.fit_masks, or give 'none'"


class Masks(NamedTuple):
    """What K images give; float64, not negative."""

    freq: Tensor  #: (C, H, W), ``log(1 + mean |F x|^2)``, the zero frequency first
    space: Tensor  #: (C, H, W), ``mean x^2``
    n: int  #: K


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask from a file."""

    name: str  #: of the file, for records
    values: Tensor  #: (C, H, W) float64

    def describe(self) -> dict[str, Any]:
        """For a record: its name and a hash of its values."""
        digest = hashlib.sha256(self.values.numpy().tobytes()).hexdigest()
        return {"name": self.name, "sha256": digest}


def fit(batches: Iterable[Tensor]) -> Masks:
    """Masks (PDS, arXiv:2207.02196, section 4) of uint8 batches (B, C, H, W), one at a time.

    Images are taken in [0, 1], as published, whatever the range of the model.  Raises UserError
    for no image at all, and where every image is black.
    """
    count = 0
    power = square = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        x = batch.double() / 255
        power = power + torch.fft.fft2(x).abs().square().sum(0)
        square = square + x.square().sum(0)
        count += len(x)
    if not float(square.sum()) > 0:
        raise UserError(f"{count} images without any light give no mask: check --data")
    power = (power + mirrored(power)) / 2  # even up to rounding before
    return Masks(torch.log1p(power / count), square / count, count)


def load_mask(kind: str, spec: str, card_name: str, shape: tuple[int, int, int]) -> Mask | None:
    """The ``kind`` (freq or space) of mask that ``spec`` names, for states of ``shape`` (C, H, W).

    ``spec`` is a ``.npy`` file, ``bundled`` for the one that comes with the toolkit, or ``none``.
    Raises UserError for a file that holds no such mask, or that of other images; a frequency mask
    has to be even, ``m(k) = m(-k)``, as that of real images is: where it is not, it is no frequency
    mask, and the published operators would not keep the target (see `Preconditioner.of`).
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
        has, wants = ("x".join(map(str, s)) for s in (values.shape, shape))
        raise UserError(f"{what} is of {has} values where {card_name!r} has {wants}: {REMEDY}")
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() > 0):
        raise UserError(f"{what} has entries that are no powers (finite, 0 or more): {REMEDY}")
    mask = torch.from_numpy(values)
    if kind == "freq":
        uneven = float((mask - mirrored(mask)).abs().max() / mask.max())
        if uneven > UNEVEN:
            raise UserError(
                f"{what} is not even (opposite frequencies differ by {uneven:.2g} of its maximum), "
                f"as that of every set of images is: was it a space mask? {REMEDY}"
            )
    return Mask(path.name, mask)


def _read(path: Path, what: str) -> np.ndarray:
    """A float64 array from a ``.npy``; nothing in the file is executed."""
    try:
        values = np.load(path, allow_pickle=False)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
            raise ValueError("no array of real numbers")
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{what} cannot be read ({_reason(error)}): {REMEDY}") from None
    return values.astype(np.float64)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
