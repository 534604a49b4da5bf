"""Images on disk through the detectors that a person named, in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from evaluation.passes import ImageStream, gathered
from image_data.sources import ImageSource, image_batches
from metrics.detectors import (
    REPOSITORY_FILES,
    Detector,
    detector_entry,
    load_detector,
    parse_detectors,
)
from metrics.draws import choose
from metrics.measures import figures, lines, require
from metrics.summary import FeatureSummary, Requirements
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import atomic_write, cache_folder, download, write_json
from runtime.record import RunRecord

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
        return from_hub(str(entry.repository), REPOSITORY_FILES, folder)

    return world.broadcast_object(fetch() if world.is_main else None)


def from_hub(repository: str, files: Sequence[str], cache: Path) -> Path:
    """The folder in the cache with ``files`` of a repository of the Hugging Face hub."""
    for file in files:
        download(f"{HUB}/{repository}/resolve/main/{file}", cache / repository)
    return cache / repository


def image_pass(
    path: Path, detectors: Sequence[Detector], needs: Requirements, options: Mapping[str, Any],
    world: World,
) -> AbstractContextManager[list[FeatureSummary]]:  # fmt: skip
    """``gathered`` from the images in a folder or zip, drawn by ``--num`` and ``--seed``."""
    num, seed = options["num"], options["seed"]
    share = -(-options["batch"] // world.size)
    with ImageSource(path) as source:
        total, sha = len(choose(len(source), num, 0)), source.identity()

    def batches(start: int, bar: tqdm[Any]) -> Iterator[Tensor]:
        return image_batches(path, share, (world.rank, world.size), num, seed, start)

    stream = ImageStream(path.name, total, share, {"images": sha}, batches)
    return gathered(stream, detectors, needs, seed, world, cache_folder(options["cache_dir"]))


def open_references(
    text: str, detectors: Sequence[Detector], needs: Requirements
) -> list[FeatureSummary]:
    """The reference of each detector, checked to hold what the metrics need."""
    names = listed("--ref", text, len(detectors))
    return [
        require(FeatureSummary.load(r, d), needs) for r, d in zip(names, detectors, strict=True)
    ]


def entry_of(
    found: Mapping[str, float],
    detector: Detector,
    images: FeatureSummary,
    reference: FeatureSummary,
) -> dict[str, Any]:
    """The figures of one detector, as they are written: beside its hash and the honest numbers."""
    source = reference.moments
    return {
        **found,
        "n": images.moments.n,
        "features_n": images.kept,
        "source_sha256": images.moments.source_sha256,
        "detector": {**asdict(detector.id), "resize": detector.resize},
        "reference": {
            "source": source.source,
            "source_sha256": source.source_sha256,
            "n": source.n,
            "features_n": reference.kept,
        },
    }


def report(
    names: Sequence[str], made: Sequence[FeatureSummary], references: Sequence[FeatureSummary],
    detectors: Sequence[Detector], seed: int, record: RunRecord, path: Path | None,
) -> str:  # fmt: skip
    """The metrics ``names`` of every detector in words; as JSON in ``path``, with the record."""
    results, text = [], []
    for detector, summary, reference in zip(detectors, made, references, strict=True):
        found = figures(names, summary, reference, seed)
        text += lines(names, found, detector, summary, reference)
        results.append(entry_of(found, detector, summary, reference))
    if path is not None:  # the first detector's figures at the top, as ever
        content = {**results[0], "results": results, "record": asdict(record)}
        write_json(path, content)
    return "\n".join(text)


def destinations(text: str, count: int) -> list[str]:
    """The files of ``--dest``, one for each of ``count`` detectors."""
    dests = listed("--dest", text, count)
    for dest in dests:
        if not dest.endswith(".npz"):
            raise UserError(f"--dest {dest} has to end in .npz, by which statistics are known")
    return dests


def keep(
    dests: Sequence[str], made: Sequence[FeatureSummary], detectors: Sequence[Detector]
) -> str:
    """Write the summary of each detector to its file, to compare with later; says so in words."""
    text = []
    for detector, summary, dest in zip(detectors, made, dests, strict=True):
        with atomic_write(dest) as file:
            summary.save(file)
        text.append(f"wrote {dest}  (detector {detector.name}, N = {summary.moments.n})")
    return "\n".join(text)
