"""Metrics of images on disk against a reference, and the statistics that make a reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.detectors import open_detectors
from evaluation.images import ImagePassOptions, image_pass
from evaluation.metric_report import (
    MeasuredSet,
    MetricOptions,
    report_metrics,
    save_statistics,
)
from metrics.detectors import Detector
from metrics.measures import reference_needs, require
from metrics.statistics import Statistics
from metrics.summary import FeatureSummary
from runtime.dist import World
from runtime.errors import UserError
from runtime.options import flat_options
from runtime.outputs import check_file
from runtime.record import RunRecord

STATISTICS = ".npz"  #: ending of files of statistics
Summaries = AbstractContextManager[list[FeatureSummary]]


@dataclass(frozen=True)
class ImageMetricsOptions:
    """What ``fid.py calc`` is asked for, under the names of its flags."""

    images: Path  #: folder, zip, or .npz of statistics
    metric: MetricOptions
    reading: ImagePassOptions
    ref: tuple[str, ...] = ("cifar10-small",)  #: for each detector, or images for all of them
    result_path: Path | None = None

    @property
    def other(self) -> Path | None:
        """The folder or zip of images that is the reference, if it is one."""
        if len(self.ref) != 1:
            return None
        path = Path(self.ref[0])
        return path if path.is_dir() or path.suffix == ".zip" else None


@dataclass(frozen=True)
class ImageMetricsJob:
    """Images that will be compared with a reference; nothing has been loaded or written yet."""

    options: ImageMetricsOptions

    def record(self, here: World | None = None) -> RunRecord:
        """The record of the result."""
        return _record("fid calc", self.options, here)

    def outline(self) -> str:
        """The record, for a dry run."""
        return self.record().to_json()

    def run(self, here: World) -> str:
        """Measure, and write the result where asked; returns the metrics in words."""
        options = self.options
        check_file(options.result_path, "--json", here)
        detectors = open_detectors(options.metric.detector, here)
        with (
            self._references(detectors, here) as references,
            self._summaries(detectors, here) as summaries,
        ):
            if not here.is_main:
                return ""
            sets = map(MeasuredSet, detectors, summaries, references)
            record = self.record(here)
            return report_metrics(options.metric, list(sets), record, options.result_path)

    def _references(self, detectors: Sequence[Detector], here: World) -> Summaries:
        options = self.options
        if options.other is None:
            return nullcontext(options.metric.open_references(options.ref, detectors))
        needs, reading = reference_needs(options.metric.names), replace(options.reading, num=None)
        return image_pass(options.other, detectors, needs, reading, here)

    def _summaries(self, detectors: Sequence[Detector], here: World) -> Summaries:
        path, needs = self.options.images, self.options.metric.needs()
        if path.suffix == STATISTICS:
            return nullcontext([require(FeatureSummary.load(path, d), needs) for d in detectors])
        return image_pass(path, detectors, needs, self.options.reading, here)


def prepare_metrics(options: ImageMetricsOptions) -> ImageMetricsJob:
    """Check the options of ``fid.py calc``.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    options.metric.needs()
    if options.other is None:
        options.metric.references(options.ref)
    num = options.reading.num
    if options.images.suffix == STATISTICS and num is not None:
        raise UserError(
            f"--num {num} draws images, but {options.images} holds statistics: leave it out"
        )
    return ImageMetricsJob(options)


@dataclass(frozen=True)
class StatisticsOptions:
    """What ``fid.py ref`` is asked for, under the names of its flags."""

    data: Path  #: folder, zip, or .npz of mu and sigma
    dest: tuple[str, ...]  #: a file for each detector
    metric: MetricOptions
    reading: ImagePassOptions


@dataclass(frozen=True)
class StatisticsJob:
    """Statistics that will be computed and saved; nothing has been loaded or written yet."""

    options: StatisticsOptions

    def outline(self) -> str:
        """The record, for a dry run."""
        return _record("fid ref", self.options, None).to_json()

    def run(self, here: World) -> str:
        """Write the statistics for each detector; returns which files."""
        options = self.options
        for file in options.metric.destinations(options.dest):
            check_file(file, "--dest", here)
        detectors = open_detectors(options.metric.detector, here)
        with self._summaries(detectors, here) as summaries:
            if not here.is_main:
                return ""
            return save_statistics(options.metric.destinations(options.dest), summaries, detectors)

    def _summaries(self, detectors: Sequence[Detector], here: World) -> Summaries:
        path, num = self.options.data, self.options.reading.num
        if path.suffix == STATISTICS and num is not None:
            return nullcontext(
                [FeatureSummary(Statistics.adopt(path, d.id, num)) for d in detectors]
            )
        needs = self.options.metric.needs(kept=True)
        return image_pass(path, detectors, needs, self.options.reading, here)


def prepare_statistics(options: StatisticsOptions) -> StatisticsJob:
    """Check the options of ``fid.py ref``.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    options.metric.needs()
    options.metric.destinations(options.dest)
    if options.data.suffix == STATISTICS and options.reading.num is None:
        raise UserError(f"{options.data} does not say how many images it is of: add --num")
    return StatisticsJob(options)


def _record(command: str, options: object, here: World | None) -> RunRecord:
    device = None if here is None else str(here.device)
    return RunRecord.make(command, {**flat_options(options), "device": device}, {}, {})
