"""Images on disk as a stream for detectors and scorers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from evaluation.passes import ImageStream, gather_features
from image_data.sources import ImageSource, image_batches
from metrics.detectors import Detector
from metrics.draws import choose
from metrics.summary import FeatureSummary, Requirements
from runtime.dist import World
from runtime.files import cache_folder


@dataclass(frozen=True)
class ImagePassOptions:
    """How many images of a folder or zip are read, and how, under the names of the flags."""

    num: int | None = None  #: images, drawn by ``seed``; None is all
    seed: int = 0
    batch: int = 256  #: over all processes
    cache_dir: str | None = None  #: see :func:`runtime.files.cache_folder`

    @property
    def cache(self) -> Path:
        return cache_folder(self.cache_dir)


def image_stream(path: Path, options: ImagePassOptions, here: World) -> ImageStream:
    """The images in a folder or zip; FileNotFoundError or ValueError where there are none."""
    share, shard = here.share(options.batch), (here.rank, here.size)
    with ImageSource(path) as source:
        total, files = len(choose(len(source), options.num, 0)), source.identity()

    def batches(start: int, bar: tqdm[Any]) -> Iterator[Tensor]:
        return image_batches(path, share, shard, options.num, options.seed, start)

    return ImageStream(path.name, total, share, {"images": files}, batches)


def image_pass(
    path: Path,
    detectors: Sequence[Detector],
    needs: Requirements,
    options: ImagePassOptions,
    here: World,
) -> AbstractContextManager[list[FeatureSummary]]:
    """Features of the images in a folder or zip; see `evaluation.passes.gather_features`."""
    stream = image_stream(path, options, here)
    return gather_features(stream, detectors, needs, options.seed, here, options.cache)
