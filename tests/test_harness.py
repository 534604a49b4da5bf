"""The harness: what it is known by, and that conditions reach the images."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from denoisers.cards import cards
from denoisers.conditions import ConditionOptions, Conditions
from denoisers.registry import ModelSource
from evaluation.detectors import DetectorOptions
from evaluation.harness import Harness, HarnessIdentity, HarnessOptions, open_harness
from metrics.detectors import load_detector
from metrics.references import load_reference
from metrics.statistics import Statistics
from runtime.dist import World
from runtime.errors import UserError
from runtime.typed import from_plain, to_json
from samplers.build import build
from samplers.options import SamplerOptions
from tests.sampler_models import ClassModel, GaussianModel

HERE = World(0, 1, torch.device("cpu"))
EULER = SamplerOptions(sampler="euler", num_steps=6)


def harness(conditions: Conditions, model: ClassModel | GaussianModel) -> Harness:
    detector = load_detector("pixels", device="cpu")
    reference = Statistics(detector.id, "random")
    reference.update(torch.rand(300, detector.dim, generator=torch.Generator().manual_seed(0)))
    return Harness(model, detector, reference, range(8), 2, 3, torch.float64, HERE, conditions)


def test_an_identity_comes_back_from_its_file() -> None:
    text = replace(GaussianModel().card, text=True)
    for conditions, more in (
        (Conditions(), set()),
        (Conditions(label=2), {"label"}),
        (Conditions(prompts=("a", "b")), {"prompts"}),
    ):
        model = GaussianModel(text) if conditions.prompts else ClassModel()
        identity = harness(conditions, model).identity
        content = json.loads(to_json(identity))
        assert from_plain(HarnessIdentity, content, "here") == identity
        assert set(content) - more == {
            "model", "model_sha256", "detector", "detector_sha256", "reference", "reference_n",
            "reference_sha256", "seeds", "blocks",
        }  # fmt: skip
        assert content["seeds"] == "0-7" and content["model_sha256"] == model.sha256


def test_conditions_reach_every_image() -> None:
    model = ClassModel()
    sampler = build(EULER, model.card)
    for label in (1, 3):
        one_class = harness(Conditions(label=label), model)
        grey = label / 4 * 127.5 + 128
        assert np.abs(one_class.pictures(sampler) - grey).max() < 2  # grey levels
        measured = one_class.fid(sampler, range(8), 2, lambda n: None)
        assert measured.summary.moments.mean == pytest.approx(np.full(192, grey / 255), abs=0.005)
    drawn = harness(Conditions(), model).pictures(sampler)
    assert len({int(picture[0, 0, 0]) for picture in drawn}) > 1


def test_a_harness_is_opened_by_its_options() -> None:
    options = HarnessOptions(ModelSource("cifar10-small", dtype="float64"), batch=5)
    opened = open_harness(options, range(8), 2, HERE)
    card = cards()["cifar10-small"]
    identity, planned = opened.identity, options.describe(range(8), 2)
    assert identity.model_sha256 == card.sha256 == planned["model_sha256"]
    assert (opened.batch, opened.dtype, opened.blocks) == (5, torch.float64, 2)
    assert opened.converged is not None  # the bundled one
    same = {key for key, value in planned.items() if value == getattr(identity, key)}
    assert same == set(planned) - {"reference"}  # which is a name there, and its file's source here
    assert opened.reference.n == load_reference("cifar10-small", opened.detector).n


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (HarnessOptions(ModelSource("cifar10-small"), ConditionOptions(label=1)), "no classes"),
        (HarnessOptions(ModelSource("cifar11")), "unknown dataset 'cifar11'"),
        (
            HarnessOptions(
                ModelSource("cifar10-small"),
                detector=DetectorOptions("pixels,inception"),
                ref="a.npz,b.npz,c.npz",
            ),
            "--ref a.npz,b.npz,c.npz names 3 for 2 detectors: give one that all have, or one for",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_loaded(
    options: HarnessOptions, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelSource, "load", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=sentence):
        open_harness(options, range(8), 2, HERE)
