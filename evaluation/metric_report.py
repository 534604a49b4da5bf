"""Which metrics are asked for, the references they compare with, and how results are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from evaluation.detectors import DetectorOptions
from metrics.detectors import Detector
from metrics.measures import (
    figures,
    lines,
    needs_of,
    parse_metrics,
    reference_needs,
    require,
)
from metrics.references import is_bundled_reference
from metrics.summary import FeatureSummary, Requirements
from runtime.errors import UserError
from runtime.files import atomic_write, write_json
from runtime.options import Json
from runtime.record import RunRecord


@dataclass(frozen=True)
class MetricOptions:
    """What is measured and with which detectors, under the names of the flags of ``fid.py``."""

    detector: DetectorOptions = field(default_factory=DetectorOptions)
    metrics: str = "fid"
    features: int | None = None  #: images whose features are kept; None is the default number
    seed: int = 0  #: draws images, and subsets of them

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics; ValueError for an unknown one."""
        return parse_metrics(self.metrics)

    def needs(self, kept: bool = False) -> Requirements:
        """What the metrics need of the images; ``kept`` also where ``--features`` asks for it."""
        return needs_of(self.names, self.features, always=kept and self.features is not None)

    def check_each(self, flag: str, values: Sequence[str]) -> None:
        """Raise UserError unless an option has one value for each detector."""
        count = len(self.detector.sources())
        if len(values) != count:
            raise UserError(
                f"{flag} {','.join(values)} names {len(values)} for {count} detectors: give one "
                "for each, separated by commas, or repeat the option for paths with a comma"
            )

    def destinations(self, files: Sequence[str]) -> Sequence[str]:
        """The files of ``--dest``, one for each detector; UserError for another ending."""
        self.check_each("--dest", files)
        for file in files:
            if not file.endswith(".npz"):
                raise UserError(f"--dest {file} has to end in .npz: statistics are known by that")
        return files

    def references(self, names: Sequence[str]) -> Sequence[str]:
        """The values of ``--ref``, one for each detector: a single bundled name is for all of them.

        Raises UserError for another number.
        """
        if len(names) == 1 and is_bundled_reference(names[0]):
            return [names[0]] * len(self.detector.sources())
        self.check_each("--ref", names)
        return names

    def open_references(
        self, files: Sequence[str], detectors: Sequence[Detector]
    ) -> list[FeatureSummary]:
        """The reference of each detector, checked to hold what the metrics need."""
        needs = reference_needs(self.names)
        return [
            require(FeatureSummary.load(file, detector), needs)
            for file, detector in zip(self.references(files), detectors, strict=True)
        ]


@dataclass(frozen=True)
class MeasuredSet:
    """Images and a reference in the features of one detector."""

    detector: Detector
    images: FeatureSummary
    reference: FeatureSummary

    def describe(self, values: Mapping[str, float]) -> dict[str, Json]:
        """The metrics ``values`` with what they depend on: detector, reference, image counts."""
        images, source = self.images.moments, self.reference.moments
        return {
            **values,
            "n": images.n,
            "features_n": self.images.kept,
            "source_sha256": images.source_sha256,
            "detector": {**asdict(self.detector.id), "resize": self.detector.resize},
            "reference": {
                "source": source.source,
                "source_sha256": source.source_sha256,
                "n": source.n,
                "features_n": self.reference.kept,
            },
        }


def report_metrics(
    options: MetricOptions, sets: Sequence[MeasuredSet], record: RunRecord, path: Path | None
) -> str:
    """Compute the metrics of every set; returns them in words.

    Where ``path`` is given they are written there as JSON, together with the record.
    """
    results: list[dict[str, Json]] = []
    text: list[str] = []
    for one in sets:
        values = figures(options.names, one.images, one.reference, options.seed)
        text += lines(options.names, values, one.detector, one.images, one.reference)
        results.append(one.describe(values))
    if path is not None:  # the first detector's metrics also at the top level
        write_json(path, {**results[0], "results": results, "record": asdict(record)})
    return "\n".join(text)


def save_statistics(
    files: Sequence[str], summaries: Sequence[FeatureSummary], detectors: Sequence[Detector]
) -> str:
    """Write the summary of each detector to its file, as a reference; says so in words."""
    text = []
    for detector, summary, file in zip(detectors, summaries, files, strict=True):
        with atomic_write(file) as temporary:
            summary.save(temporary)
        text.append(f"wrote {file}  (detector {detector.name}, N = {summary.moments.n})")
    return "\n".join(text)
