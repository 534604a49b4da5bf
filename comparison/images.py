"""Images on disk through the detectors that a person named, in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from metrics.detectors import (
    REPOSITORY_FILES,
    Detector,
    detector_entry,
    load_detector,
    parse_detectors,
)
from metrics.measures import require
from metrics.sources import count_images, image_batches
from metrics.summary import Collector, Needs, Summary, collect
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import cache_folder, download
from runtime.log import progress

HUB = "https://huggingface.co"


def listed(flag: str, text: str, count: int) -> list[str]:
    """The values of an option that has one for each detector, in their order."""
    values = [part.strip() for part in text.split(",")]
    if len(values) != count:
        raise UserError(
            f"{flag} {text} names {len(values)} for {count} detectors: give one for each, by comma"
        )
    return values


def open_detectors(options: Mapping[str, Any], world: World) -> list[Detector]:
    """Every detector of ``--detector``; published files are fetched into the cache by rank 0.

    Raises:
        UserError: ``--detector-path`` beside several detectors. ValueError: see ``load_detector``.
    """
    chosen, given = parse_detectors(options["detector"]), options["detector_path"]
    if given is not None and (len(chosen) > 1 or chosen[0][1] is not None):
        raise UserError(
            f"--detector-path {given} is for one detector: write --detector name={given} instead"
        )
    folder = cache_folder(options["cache_dir"])
    return [
        load_detector(name, path=_weights(name, path or given, folder, world), device=world.device)
        for name, path in chosen
    ]


def open_detector(options: Mapping[str, Any], world: World) -> Detector:
    """The one detector of the options."""
    if len(parse_detectors(options["detector"])) > 1:
        raise UserError(f"--detector {options['detector']} names several: give one")
    return open_detectors(options, world)[0]


def _weights(name: str, path: Path | None, folder: Path, world: World) -> Path | None:
    """Where the weights lie, fetched first if they are published and no path was given."""
    entry = detector_entry(name)
    if path is not None or entry.source is None:
        return path

    def fetch() -> Path:
        if entry.url is not None:
            return download(entry.url, folder)
        target = folder / str(entry.repository)
        for file in REPOSITORY_FILES:
            download(f"{HUB}/{entry.repository}/resolve/main/{file}", target)
        return target

    return world.broadcast_object(fetch() if world.is_main else None)


def image_summaries(
    path: Path, detectors: Sequence[Detector], needs: Needs, world: World, batch: int,
    num: int | None, seed: int,
) -> list[Summary]:  # fmt: skip
    """One pass over the images in a folder or zip: what each detector makes of them, all ranks'."""
    share = -(-batch // world.size)
    total = count_images(path, num)
    collectors = [Collector(d, needs, total, seed, path.name) for d in detectors]
    shard = (world.rank, world.size)
    with progress(total, path.name, "img", enabled=world.is_main) as bar:

        def watched() -> Iterator[Tensor]:
            for images in image_batches(path, share, shard, num, seed):
                yield images
                bar.update(min(len(images) * world.size, total - bar.n))

        return collect(watched(), collectors, shard)


def open_references(text: str, detectors: Sequence[Detector], needs: Needs) -> list[Summary]:
    """The reference of each detector, checked to hold what the metrics need."""
    names = listed("--ref", text, len(detectors))
    return [require(Summary.load(r, d), needs) for r, d in zip(names, detectors, strict=True)]


def entry_of(
    found: Mapping[str, float], detector: Detector, images: Summary, reference: Summary
) -> dict[str, Any]:
    """The figures of one detector, as they are written: beside its hash and the honest numbers."""
    source = reference.moments
    return {
        **found,
        "n": images.moments.n,
        "features_n": images.kept,
        "detector": {**asdict(detector.id), "resize": detector.resize},
        "reference": {"source": source.source, "n": source.n, "features_n": reference.kept},
    }
