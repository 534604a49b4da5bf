"""The registry of metrics, each computed from the summaries of two sets of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from metrics.detectors import Detector
from metrics.extrapolation import fid_infinity
from metrics.kid import kid
from metrics.manifolds import density_coverage, precision_recall
from metrics.statistics import Statistics
from metrics.summary import FeatureSummary, Requirements

KEPT = 10_000  #: default number of images whose features are kept


@dataclass(frozen=True)
class Metric:
    """A metric: ``compute(images, reference, seed)`` returns its values by key."""

    compute: Callable[[FeatureSummary, FeatureSummary, int], dict[str, float]]
    text: str  #: format string for printing the values
    features: bool = False  #: whether it needs features of the images
    reference_features: bool = False  #: whether it needs features of the reference
    spatial: bool = False  #: whether it needs spatial moments


def _fid(images: FeatureSummary, reference: FeatureSummary, seed: int) -> dict[str, float]:
    return {"fid": images.moments.fid(reference.moments)}


def _fid_inf(images: FeatureSummary, reference: FeatureSummary, seed: int) -> dict[str, float]:
    line = fid_infinity(_features(images), reference.moments, seed)
    return {
        "fid_inf": line.fid, "fid_inf_bias": line.fids[0] - line.fid,
        "fid_inf_most": line.sizes[0], "fid_inf_least": line.sizes[-1],
    }  # fmt: skip


def _sfid(images: FeatureSummary, reference: FeatureSummary, seed: int) -> dict[str, float]:
    return {"sfid": _spatial(images).fid(_spatial(reference))}


def _kid(images: FeatureSummary, reference: FeatureSummary, seed: int) -> dict[str, float]:
    value = kid(_features(images), _features(reference), seed=seed)
    return {
        "kid": value.mean, "kid_spread": value.spread,
        "kid_subsets": value.subsets, "kid_subset_size": value.size,
    }  # fmt: skip


def _pr(images: FeatureSummary, reference: FeatureSummary, seed: int) -> dict[str, float]:
    return dict(precision_recall(_features(reference), _features(images))._asdict())


def _dc(images: FeatureSummary, reference: FeatureSummary, seed: int) -> dict[str, float]:
    return dict(density_coverage(_features(reference), _features(images))._asdict())


METRICS = {
    "fid": Metric(_fid, "FID {fid:.6g}"),
    "fid_inf": Metric(
        _fid_inf,
        "FID-infinity {fid_inf:.6g} (bias {fid_inf_bias:+.3g} at {fid_inf_most} images; line over "
        "1/N from {fid_inf_least})",
        features=True,
    ),
    "kid": Metric(
        _kid,
        "KID {kid:.6g} +- {kid_spread:.2g} ({kid_subsets} subsets of {kid_subset_size})",
        features=True, reference_features=True,
    ),
    "pr": Metric(
        _pr, "precision {precision:.4f}, recall {recall:.4f}",
        features=True, reference_features=True,
    ),
    "dc": Metric(
        _dc, "density {density:.4f}, coverage {coverage:.4f}",
        features=True, reference_features=True,
    ),
    "sfid": Metric(_sfid, "sFID {sfid:.6g}", spatial=True),
}  # fmt: skip


def parse_metrics(text: str) -> tuple[str, ...]:
    """``"fid,kid"`` -> the names in this order, without repetitions.

    Raises:
        ValueError: an unknown metric, or none.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        problem = f"unknown metric '{unknown[0]}'" if unknown else "no metric is given"
        raise ValueError(f"--metrics '{text}': {problem}, choose from {', '.join(METRICS)}.")
    return names


def needs_of(names: Sequence[str], kept: int | None = None, always: bool = False) -> Requirements:
    """The requirements of the metrics: features of ``kept`` images, if needed or ``always``."""
    needed = always or any(METRICS[name].features for name in names)
    count = (KEPT if kept is None else kept) if needed else 0
    return Requirements(count, any(METRICS[name].spatial for name in names))


def reference_needs(names: Sequence[str]) -> Requirements:
    """The requirements of the metrics for a reference."""
    features = any(METRICS[name].reference_features for name in names)
    return Requirements(KEPT if features else 0, needs_of(names).spatial)


def require(summary: FeatureSummary, needs: Requirements) -> FeatureSummary:
    """The summary itself if it meets the requirements, else ValueError; check before a pass."""
    if needs.features:
        _features(summary)
    if needs.spatial:
        _spatial(summary)
    return summary


def figures(
    names: Sequence[str], images: FeatureSummary, reference: FeatureSummary, seed: int = 0
) -> dict[str, float]:
    """The values of the metrics ``names`` by key, such as {"fid": ..., "precision": ...}."""
    values: dict[str, float] = {}
    for name in names:
        values |= METRICS[name].compute(images, reference, seed)
    return values


def lines(
    names: Sequence[str], values: dict[str, float], detector: Detector, images: FeatureSummary,
    reference: FeatureSummary,
) -> list[str]:  # fmt: skip
    """A line of text per metric, with the detector and the number of images used."""
    texts = []
    for name in names:
        count = f"{images.moments.n}"
        if METRICS[name].features:
            count = f"{images.kept} of {images.moments.n}"
        if METRICS[name].reference_features:
            count += f" against {reference.kept} of {reference.moments.n}"
        text = METRICS[name].text.format(**values)
        texts.append(f"{text}  (detector {detector.name}, N = {count})")
    return texts


def _features(summary: FeatureSummary) -> Tensor:
    if summary.features is None:
        raise ValueError(
            f"statistics '{summary.moments.source}' hold no features, which fid_inf, kid, "
            "pr and dc need: make them again with fid.py ref --features 10000."
        )
    return summary.features


def _spatial(summary: FeatureSummary) -> Statistics:
    if summary.spatial is None:
        raise ValueError(
            f"statistics '{summary.moments.source}' hold no spatial moments, which sfid needs: "
            "make them again with fid.py ref --metrics fid,sfid --detector inception-pt."
        )
    return summary.spatial
