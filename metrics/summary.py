"""Summaries of a set of images for the metrics, collected in one pass and stored in one file.

A summary has the moments and, if a metric needs them, features of some images and the moments of
spatial features. Memory does not grow with the number of images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from checkpoints.arrays import require_like
from metrics.detectors import Detector
from metrics.draws import choose
from metrics.references import reference_file
from metrics.statistics import DetectorId, Statistics, read_arrays, sum_over_ranks

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Requirements:
    """What metrics require besides the moments."""

    features: int = 0  #: features of at most this many images, drawn from all
    spatial: bool = False  #: moments of spatial features


@dataclass(frozen=True)
class FeatureSummary:
    """A set of images in the features of one detector."""

    moments: Statistics
    spatial: Statistics | None = None
    features: Tensor | None = None  #: float32 (K, dim), in the order of the images

    @property
    def kept(self) -> int:
        """The number of images with features."""
        return 0 if self.features is None else len(self.features)

    def save(self, path: str | Path) -> None:
        """Write an .npz, of which ``Statistics.load`` reads the moments."""
        arrays = self.moments.arrays()
        if self.spatial is not None:
            arrays |= {"spatial_mu": self.spatial.mean, "spatial_sigma": self.spatial.cov}
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path, detector: Detector) -> FeatureSummary:
        """Read a file of ``save`` or ``Statistics.save``, by path or by a bundled name.

        Raises:
            ValueError: unreadable, invalid, or made with another detector.
            FileNotFoundError: neither a bundled name nor a file.
        """
        file = reference_file(path, detector.name)
        content = read_arrays(file, ("features", "spatial_mu", "spatial_sigma"))
        moments = Statistics.of_arrays(file, content)
        moments.require(detector.id)
        features = content.get("features")
        if features is not None and not _are_valid(features, moments):
            raise ValueError(
                f"the features in {file} are invalid (shape {features.shape} for {moments.n} "
                f"images of {detector.dim} features, or not finite): make them again."
            )
        return cls(
            moments, _spatial(file, content, detector),
            None if features is None else torch.from_numpy(features).float(),
        )  # fmt: skip


def joined(parts: Sequence[FeatureSummary]) -> FeatureSummary:
    """The summary of all images of the parts, in order, without spatial moments."""
    moments = parts[0].moments.merge(*(part.moments for part in parts[1:]))
    features = [part.features for part in parts if part.features is not None]
    return FeatureSummary(moments, None, torch.cat(features) if features else None)


def _are_valid(features: np.ndarray, moments: Statistics) -> bool:
    is_matrix = np.issubdtype(features.dtype, np.floating) and features.ndim == 2
    fits = is_matrix and features.shape[1] == moments.detector.dim and len(features) <= moments.n
    return bool(fits and np.isfinite(features).all())


def _spatial(
    path: Path, content: dict[str, np.ndarray], detector: Detector
) -> Statistics | None:  # fmt: skip
    id: DetectorId | None = detector.spatial_id
    if id is None or "spatial_mu" not in content or "spatial_sigma" not in content:
        return None
    moments = {"mu": content["spatial_mu"], "sigma": content["spatial_sigma"]}
    name = {"detector": np.array(id.name), "detector_sha256": np.array(id.sha256)}
    spatial = Statistics.of_arrays(path, {**content, **moments, **name})
    spatial.require(id)
    return spatial


class Gathers(Protocol[T_co]):
    """Collects a result from numbered images, in any batches and on any ranks; see `Collector`."""

    def update(self, images: Tensor, positions: Sequence[int]) -> None: ...

    def state(self) -> dict[str, np.ndarray]: ...

    def restore(self, state: Mapping[str, np.ndarray]) -> None: ...

    def finish(self) -> T_co: ...


class Collector:
    """Collects a summary; the result does not depend on batches or ranks.

    The source's SHA-256 is that of the SHA-256 of the pixels of all images, in order, for which it
    keeps 32 bytes per image.

    Args:
        total: images over all ranks, of which ``needs.features`` are drawn by ``seed``.

    Raises:
        ValueError: spatial features with a detector that has none.
    """

    def __init__(
        self, detector: Detector, needs: Requirements, total: int, seed: int = 0, source: str = ""
    ) -> None:
        if needs.spatial and detector.spatial_id is None:
            raise ValueError(
                f"detector {detector.name} has no spatial features: use --detector inception-pt "
                "for sfid."
            )
        self.detector = detector
        self._moments = Statistics(detector.id, source)
        self._spatial = None
        if needs.spatial and detector.spatial_id is not None:
            self._spatial = Statistics(detector.spatial_id, source)
        self._chosen = choose(total, min(total, needs.features), seed)
        self._rows = torch.zeros(len(self._chosen), detector.dim if needs.features else 0)
        self._digests = torch.zeros(total, 32, dtype=torch.uint8)

    def update(self, images: Tensor, positions: Sequence[int]) -> None:
        """Add uint8 (B, 3, H, W) images with these numbers."""
        with ThreadPoolExecutor(1) as pool:  # hashing large images would delay the GPU
            digests = pool.submit(_digests, images)
            features, spatial = self.detector.both(images)
            self._moments.update(features)
            self._digests[list(positions)] = digests.result()
        if self._spatial is not None and spatial is not None:
            self._spatial.update(spatial)
        if len(self._chosen):
            _, kept, rows = np.intersect1d(
                np.asarray(positions), self._chosen, assume_unique=True, return_indices=True
            )
            self._rows[rows] = features.cpu()[torch.from_numpy(kept)].float()

    def state(self) -> dict[str, np.ndarray]:
        """The state of all ranks, for ``restore``; call it on every rank."""
        parts = {
            "moments": self._moments.state(),
            "rows": sum_over_ranks(self._rows.clone()),
            "digests": sum_over_ranks(self._digests.clone()),
        }
        if self._spatial is not None:
            parts["spatial"] = self._spatial.state()
        return {name: part.numpy() for name, part in parts.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from ``state``, bit-equal; call it before the first image, on one rank only.

        Raises ValueError for a state that is not of this collector.
        """
        own = {"rows": self._rows.numpy(), "digests": self._digests.numpy()}
        sums = {"moments": self._moments, "spatial": self._spatial}
        for name, part in sums.items():
            if part is not None:
                own[name] = np.zeros(1 + part.detector.dim + part.detector.dim**2)
        require_like(state, own)
        self._moments.restore(torch.from_numpy(state["moments"]))
        self._rows = torch.from_numpy(state["rows"])
        self._digests = torch.from_numpy(state["digests"])
        if self._spatial is not None:
            self._spatial.restore(torch.from_numpy(state["spatial"]))

    def finish(self) -> FeatureSummary:
        """The summary over all ranks; call it once, on every rank."""
        # every row and every digest is zero on all ranks except one
        features = sum_over_ranks(self._rows) if len(self._chosen) else None
        sha = hashlib.sha256(sum_over_ranks(self._digests).numpy().tobytes()).hexdigest()
        moments = self._moments.reduce()
        spatial = None if self._spatial is None else self._spatial.reduce()
        for statistics in (moments, spatial):
            if statistics is not None:
                statistics.source_sha256 = sha
        return FeatureSummary(moments, spatial, features)


def _digests(images: Tensor) -> Tensor:
    """SHA-256 of the shape and the pixels of each image (3, H, W), (B, 32) uint8."""
    shape = str(tuple(images.shape[1:])).encode()
    digests = [hashlib.sha256(shape + image.tobytes()).digest() for image in images.cpu().numpy()]
    return torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32).copy())


def collect(
    batches: Iterable[Tensor], collectors: Sequence[Gathers[T]], shard: tuple[int, int] = (0, 1),
    start: int = 0,
) -> list[T]:  # fmt: skip
    """One pass over the batches of rank ``shard[0]`` of ``shard[1]``, with all collectors.

    The images of a rank have the numbers start + rank, start + rank + size, ..., as in
    ``image_data.sources.image_batches``.
    """
    rank, size = shard
    seen = 0
    for images in batches:
        first = start + rank + seen * size
        positions = range(first, first + len(images) * size, size)
        for collector in collectors:
            collector.update(images, positions)
        seen += len(images)
    return [collector.finish() for collector in collectors]
