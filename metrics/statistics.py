"""Mean and covariance of features, accumulated over batches and ranks in float64."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints.arrays import read_npz
from metrics.frechet import frechet_distance

#: FID of the same images in features of another machine, relative to the mean of |features|^2.
SAME_IMAGES = 1e-6
_TEXTS = ("detector", "detector_sha256", "source")
_KEYS = ("mu", "sigma", "detector", "detector_sha256", "n", "source")


@dataclass(frozen=True)
class DetectorId:
    """The detector of features; metrics of different detectors are not comparable."""

    name: str
    sha256: str
    dim: int

    def __str__(self) -> str:
        return f"{self.name} ({self.sha256[:12]}, {self.dim} features)"


class Statistics:
    """Sums and outer products of features, from which mean and covariance are computed.

    They are in float64: on the CUDA device of the features, to avoid transfers, else on the CPU
    (MPS has no float64). Memory does not grow with the number of images.
    """

    def __init__(self, detector: DetectorId, source: str = "") -> None:
        self.detector = detector
        self.source = source
        self.source_sha256 = ""  #: hash of the images, if known
        self.n = 0
        self._sum = torch.zeros(detector.dim, dtype=torch.float64)
        self._outer = torch.zeros(detector.dim, detector.dim, dtype=torch.float64)
        #: Mean and covariance from a file, used as they are to avoid the rounding of the sums.
        self._moments: tuple[np.ndarray, np.ndarray] | None = None

    def update(self, features: Tensor) -> None:
        """Add a batch of features (B, dim) of any floating type on any device."""
        x = features.detach()
        x = (x if x.device.type == "cuda" else x.cpu()).double()
        if x.ndim != 2 or x.shape[1] != self.detector.dim:
            raise ValueError(
                f"features of shape {tuple(x.shape)} are not from detector {self.detector}: "
                f"expected (B, {self.detector.dim})."
            )
        if not torch.isfinite(x).all():
            raise ValueError(
                "the detector returned NaN or infinite features: check the images and the device."
            )
        self._moments, self.source_sha256 = None, ""
        self.n += len(x)
        self._sum = self._sum.to(x.device).add_(x.sum(0))
        self._outer = self._outer.to(x.device).addmm_(x.T, x)

    def merge(self, *others: Statistics) -> Statistics:
        """New statistics of all images of these and the ``others``."""
        merged = Statistics(self.detector, self.source)
        for part in (self, *others):
            self.require(part.detector)
            merged.n += part.n
            merged._sum += part._sum.cpu()
            merged._outer += part._outer.cpu()
        return merged

    def reduce(self) -> Statistics:
        """Sum over all ranks in place, if there is a process group; returns itself.

        Call it once, on every rank, after the last ``update``.
        """
        self._moments = None
        self.restore(self.state())
        return self

    def state(self) -> Tensor:
        """The sums over all ranks, packed: (1 + dim + dim^2,) float64; call it on every rank."""
        count = torch.tensor([self.n], dtype=torch.float64)
        return sum_over_ranks(torch.cat([count, self._sum.cpu(), self._outer.cpu().flatten()]))

    def restore(self, state: Tensor) -> None:
        """Set the sums to those of ``state``; ValueError for a state of another shape."""
        dim = self.detector.dim
        if state.shape != (1 + dim + dim**2,):
            raise ValueError(f"the sums of {self.detector} are of another shape")
        self.n = int(state[0])
        # copies, because the rounding of a BLAS depends on the memory alignment of a matrix
        self._sum = state[1 : dim + 1].clone()
        self._outer = state[dim + 1 :].view(dim, dim).clone()

    @property
    def mean(self) -> np.ndarray:
        """Mean of the features (dim,)."""
        self._require_two()
        if self._moments is not None:
            return self._moments[0]
        return (self._sum.cpu() / self.n).numpy()

    @property
    def cov(self) -> np.ndarray:
        """Unbiased covariance of the features (dim, dim)."""
        self._require_two()
        if self._moments is not None:
            return self._moments[1]
        total, outer = self._sum.cpu(), self._outer.cpu()
        return ((outer - torch.outer(total, total) / self.n) / (self.n - 1)).numpy()

    def fid(self, reference: Statistics) -> float:
        """Frechet distance to a reference with the same detector; exactly 0 for the same images.

        Raises ValueError for another detector, for moments that are none, and if the hashes say
        that the images are the same while the moments differ by more than rounding.
        """
        reference.require(self.detector)
        distance = frechet_distance(self.mean, self.cov, reference.mean, reference.cov)
        if not self.source_sha256 or self.source_sha256 != reference.source_sha256:
            return distance
        if distance > SAME_IMAGES * (np.sum(self.mean**2) + np.trace(self.cov)):
            raise ValueError(
                f"statistics '{self.source}' and '{reference.source}' say that they are of the "
                f"same images (SHA-256 {self.source_sha256[:12]}...), but their FID is "
                f"{distance:.4g}: one of them is damaged, make both again."
            )
        return 0.0

    def require(self, detector: DetectorId) -> None:
        """Raise ValueError if these statistics are from another detector."""
        if detector != self.detector:
            raise ValueError(
                f"statistics '{self.source}' were made with detector {self.detector}, not with "
                f"{detector}: compute both with one detector."
            )

    def save(self, path: str | Path) -> None:
        """Write an .npz for ``load``; nothing is appended to the name."""
        with open(path, "wb") as file:
            np.savez_compressed(file, **self.arrays())

    def arrays(self) -> dict[str, Any]:
        """The content of a file of ``save``, by key."""
        return {
            "mu": self.mean,
            "sigma": self.cov,
            "detector": self.detector.name,
            "detector_sha256": self.detector.sha256,
            "n": self.n,
            "source": self.source,
            "source_sha256": self.source_sha256,
        }

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a file of ``save``; nothing in it is executed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not an .npz, missing keys, or invalid values.
        """
        return cls.of_arrays(path, read_arrays(Path(path)))

    @classmethod
    def of_arrays(cls, path: str | Path, content: dict[str, np.ndarray]) -> Statistics:
        """The inverse of ``arrays``; ``path`` is for errors, which are those of ``load``."""
        missing = [key for key in _KEYS if key not in content]
        if missing:
            raise ValueError(
                f"statistics {path} lack {', '.join(missing)}: make them with fid.py ref, which "
                "also takes an .npz of mu and sigma together with --detector and --num."
            )
        older = {"source_sha256": np.array("")}  # is not in older files
        texts = {k: (older | content)[k] for k in (*_TEXTS, *older)}
        wrong = [k for k, v in texts.items() if v.shape != () or v.dtype.kind != "U"]
        if wrong:
            raise ValueError(f"statistics {path} have no text as {wrong[0]}: make them again.")
        name, sha, source, source_sha256 = map(str, texts.values())
        stats = cls._of_moments(path, content, name, sha, content["n"], source)
        stats.source_sha256 = source_sha256
        return stats

    @classmethod
    def adopt(cls, path: str | Path, detector: DetectorId, n: int) -> Statistics:
        """Statistics of ``n`` images published as mu and sigma only, taken to be ``detector``'s.

        Raises:
            ValueError: as ``load``; also if the file already has a detector.
        """
        content = read_arrays(Path(path))
        if "detector" in content:
            raise ValueError(f"statistics {path} already have a detector: use them as they are.")
        missing = [key for key in ("mu", "sigma") if key not in content]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}: give an .npz of mu and sigma.")
        adopted = cls._of_moments(path, content, detector.name, detector.sha256, np.array(n),
                                  Path(path).name)  # fmt: skip
        adopted.require(detector)
        return adopted

    @classmethod
    def _of_moments(
        cls, path: str | Path, content: dict[str, np.ndarray], name: str, sha: str, n: np.ndarray,
        source: str,
    ) -> Statistics:  # fmt: skip
        try:
            mu = np.asarray(content["mu"], np.float64)
            cov = np.asarray(content["sigma"], np.float64)
            count = int(n)
        except (TypeError, ValueError) as err:
            raise ValueError(
                f"statistics {path} are not numbers ({err}): make them again."
            ) from err
        sizes = f"mu of shape {mu.shape}, sigma of shape {cov.shape}, n = {count}"
        if mu.ndim != 1 or cov.shape != (len(mu), len(mu)) or count < 2:
            raise ValueError(f"statistics {path} are invalid ({sizes}): make them again.")
        if not (np.isfinite(mu).all() and np.isfinite(cov).all()):
            raise ValueError(f"statistics {path} hold NaN or infinite values: make them again.")
        stats = cls(DetectorId(name, sha, len(mu)), source)
        stats.n, stats._moments = count, (mu, cov)
        stats._sum = torch.from_numpy(mu * count)
        stats._outer = torch.from_numpy(cov * (count - 1) + np.outer(mu, mu) * count)
        return stats

    def _require_two(self) -> None:
        if self.n < 2:
            raise ValueError(f"statistics need at least 2 images, got {self.n}: add images.")


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a CPU tensor over all ranks, possibly in place; itself without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    # gloo sums on the CPU; NCCL needs the tensor on the GPU
    shared = tensor.cuda() if dist.get_backend() == "nccl" else tensor
    dist.all_reduce(shared)
    return shared.cpu()


def read_arrays(path: Path, more: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of statistics in an .npz, and those called ``more``; all others are left alone."""
    if not path.is_file():
        raise FileNotFoundError(f"statistics {path} do not exist: make them with fid.py ref.")
    try:
        return read_npz(path, {*_KEYS, "source_sha256", *more})
    except (OSError, ValueError) as err:
        raise ValueError(
            f"{path} is not an .npz of plain arrays ({err}): make it with fid.py ref."
        ) from err
