"""A comparison whose rows take milliseconds: a model in closed form, a few seeds."""

from __future__ import annotations

import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from amed.experiments import TrainedStudent, save_predictor
from comparison.results import MeasuredRow, RowIdentity
from denoisers import registry
from denoisers.analytic import MixtureDenoiser
from denoisers.cards import Card, cards
from denoisers.conditions import ConditionOptions, Conditions
from denoisers.protocol import Model
from denoisers.registry import ModelSource
from evaluation import converged, detectors, harness, scores
from evaluation.detectors import DetectorOptions
from evaluation.harness import Harness, HarnessIdentity, HarnessOptions
from metrics.detectors import Detector, load_detector
from metrics.references import load_reference
from metrics.statistics import Statistics
from metrics.summary import FeatureSummary
from runtime.dist import World
from solvers.types import Denoiser
from tests.sampler_models import trained

CARD = cards()["cifar10-small"]
HERE = World(0, 1, torch.device("cpu"))
OPTIONS = HarnessOptions(
    ModelSource("cifar10-small"), ConditionOptions(), DetectorOptions(), "cifar10-small", None, 8
)
IDENTITY = HarnessIdentity(
    model="tiny",
    model_sha256="0" * 64,
    detector="pixels",
    detector_sha256="1" * 64,
    reference="r",
    reference_n=50,
    reference_sha256="2" * 64,
    seeds="0-11",
    blocks=2,
)


class MixtureModel:
    """Under the card of the bundled model."""

    card = CARD
    sha256 = "0" * 64

    def decode(self, x):
        return x

    def bind(self, labels=None, guidance_rate=None, prompts=None) -> Denoiser:
        means = 0.5 * torch.randn(4, *CARD.shape, generator=torch.Generator().manual_seed(0))
        return MixtureDenoiser(means, 0.1)


def harness_of(
    model: Model, detector: Detector, reference: Statistics, seeds: range, batch: int, **more: Any
) -> Harness:
    """Two blocks, float32, no second reference, unless ``more`` says otherwise."""
    fixed: dict[str, Any] = {
        "blocks": 2, "dtype": torch.float32, "here": HERE, "conditions": Conditions(),
        "converged": None,
    }  # fmt: skip
    given = {"model": model, "detector": detector, "reference": reference, "seeds": seeds}
    return Harness(**given, batch=batch, **{**fixed, **more})


def make_harness(seeds: range = range(12)) -> Harness:
    """With a detector that takes no time under the name of the bundled one."""
    bundled = load_detector("cifar10-small", device="cpu")
    mix = torch.randn(3 * 32 * 32, bundled.dim, generator=torch.Generator().manual_seed(0)) / 255
    detector = Detector(bundled.id, lambda x: x.flatten(1).float() @ mix, bundled.device, 32)
    reference = load_reference("cifar10-small", detector)
    return harness_of(MixtureModel(), detector, reference, seeds, 8)


def measured_row(
    method: str, budget: int | None, fid: float, group: str = "classic", **more: Any
) -> MeasuredRow:
    """A row with made-up numbers."""
    nfe = budget or 35
    row = MeasuredRow(
        method=method,
        group=group,
        budget=budget,
        detail="polynomial | 6 nodes",
        own_solver=None,
        fid=fid,
        fid_block_mean=fid + 1.25,
        fid_block_spread=0.125,
        fid_blocks=(fid + 1.0, fid + 1.5),
        n=12,
        nfe_planned=nfe,
        nfe_metered=nfe,
        images_per_second=71.9625,
        seconds=3.0625,
        detector="pixels",
        identity=RowIdentity({"label": method, "times": [80.0, 0.002]}, IDENTITY),
        pictures="rows/a.png",
        statistics="rows/a.npz",
    )
    return replace(row, **more)


def guided_card(card: Card = CARD) -> Card:
    """A call under guidance counts as two evaluations."""
    return replace(card, guidance="cfg")


#: Whatever loads or downloads.
LOADERS: tuple[tuple[Any, str], ...] = (
    (ModelSource, "load"),
    (FeatureSummary, "load"),
    (registry, "fetch_pipeline"),
    (registry, "download"),
    (detectors, "load_detector"),
    (detectors, "download"),
    (harness, "load_reference"),
    (harness, "open_converged"),
    (converged, "read_arrays"),
    (scores, "load_clip_score"),
    (scores, "load_aesthetic"),
    (scores, "download"),
    (urllib.request, "urlopen"),
)


def forbid_loading(patch: pytest.MonkeyPatch) -> None:
    """Let every loader and every download fail: a dry run needs none of them."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dry run loads and downloads nothing")

    for place, name in LOADERS:
        patch.setattr(place, name, refuse)


def small_student(
    name: str,
    kind: str = "amed",
    nodes: int = 4,
    afs: bool = True,
    guidance_rate: float | None = None,
) -> TrainedStudent:
    """A student of the bundled model with a random predictor."""
    student = trained("cifar10-small", kind, nodes, afs)
    settings = replace(student.settings, guidance_rate=guidance_rate)
    options = {**settings.to_options(), "total_kimg": 0.5}
    record = replace(student.record, options=options)
    return TrainedStudent(student.predictor, settings, record, name)


def save_students(root: Path, *students: TrainedStudent) -> None:
    """As runs below ``root``, to be named by number."""
    for student in students:
        file = root / f"{student.name}-small" / "predictor.safetensors"
        save_predictor(file, student.predictor, student.record)
