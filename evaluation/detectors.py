"""Opening the detectors that a command names; published files are downloaded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from denoisers.protocol import Model
from metrics.detectors import (
    REPOSITORY_FILES,
    Detector,
    detector_entry,
    load_detector,
    parse_detectors,
)
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import cache_folder, download
from runtime.images import to_uint8_tensor

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class DetectorOptions:
    """Which detectors, and where their files are, under the names of the flags."""

    detector: str = "cifar10-small"  #: names or TorchScript files, separated by commas
    detector_path: Path | None = None  #: file of a single detector that is not bundled
    cache_dir: str | None = None  #: see :func:`runtime.files.cache_folder`

    def sources(self) -> list[tuple[str, Path | None]]:
        """Name and, where given, file or folder of each detector; nothing is opened.

        Raises ValueError for an unknown name, UserError for one path beside several detectors.
        """
        named, path = parse_detectors(self.detector), self.detector_path
        if path is None:
            return named
        if len(named) > 1 or named[0][1] is not None:
            raise UserError(
                f"--detector-path {path} is for one detector: write --detector name={path} instead"
            )
        return [(named[0][0], path)]

    def single(self) -> DetectorOptions:
        """The options themselves; UserError where they name several detectors."""
        if len(self.sources()) > 1:
            raise UserError(f"--detector {self.detector} names several: give one")
        return self


def open_detectors(options: DetectorOptions, here: World) -> list[Detector]:
    """Load every detector, in the order of their names.

    Rank 0 downloads published files into the cache first, so call it on every rank.  Raises
    ValueError as :func:`metrics.detectors.load_detector` does, and UserError as `sources` does.
    """
    return [
        load_detector(name, path=_weights(name, path, options, here), device=here.device)
        for name, path in options.sources()
    ]


def open_detector(options: DetectorOptions, here: World) -> Detector:
    """Load the one detector that the options name; UserError for several."""
    return open_detectors(options.single(), here)[0]


@torch.inference_mode()
def check_images(
    detectors: Iterable[Detector], model: Model, dtype: torch.dtype, here: World
) -> None:
    """Raise the ValueError of a detector that does not take the model's images, before any work.

    ``dtype`` is that of the state.
    """
    x = torch.zeros(1, *model.card.shape, dtype=dtype, device=here.device)
    blank = to_uint8_tensor(model.decode(x))
    for detector in detectors:
        detector(blank)


def _weights(name: str, path: Path | None, options: DetectorOptions, here: World) -> Path | None:
    """Where the weights are: downloaded if they are published and no path was given."""
    entry = detector_entry(name)
    if path is not None or entry.source is None:
        return path
    cache = cache_folder(options.cache_dir)

    def fetch() -> Path:
        if entry.url is not None:
            return download(entry.url, cache)
        return fetch_repository(str(entry.repository), REPOSITORY_FILES, cache)

    return here.broadcast_object(fetch() if here.is_main else None)


def fetch_repository(repository: str, files: Sequence[str], cache: Path) -> Path:
    """Download ``files`` of a repository of the Hugging Face hub; returns their folder.

    The folder is below ``cache``.  Call it on one rank only.
    """
    for file in files:
        download(f"{HUB}/{repository}/resolve/main/{file}", cache / repository)
    return cache / repository
