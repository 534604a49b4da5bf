"""Rows of a flow model's own pipeline: its output, call for call, and levels shifted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from denoisers.cards import Card
from denoisers.prior import start
from plans.plan import run_plan
from plans.process import ForwardProcess
from runtime.noise import SeedNoise
from samplers.flow_schedulers import flow_schedulers
from samplers.schedulers import diffusers_samplers
from tests.test_export_flow import FLOWS, SIZES, load
from tests.tiny_transformers import PIPELINES

#: Levels s of 4 steps with shift 3, as published threads report them, and as they should be.
TWICE, ONCE = [1, 0.8577, 0.6022, 0.0089, 0], [1, 0.9, 0.75, 0.5, 0]


def library() -> Any:
    import diffusers

    return diffusers


def no_draw(name: Any) -> Any:
    raise AssertionError("an ODE draws nothing")


@pytest.mark.parametrize("kind", FLOWS)
def test_the_first_row_is_the_pipelines_own_output(kind: str, tmp_path: Path) -> None:
    PIPELINES[kind]().save_pretrained(tmp_path)
    model = load(tmp_path, SIZES[kind])
    sampler = next(iter(diffusers_samplers(4, model.card).values()))
    assert sampler.nfe == 4 and sampler.extra["diffusers"] == library().__version__
    noise = SeedNoise([0, 1])
    sigma = sampler.plan[0].start
    x = start(model.card, noise, sigma, torch.float32, "cpu")
    with torch.no_grad():
        walk = run_plan(sampler.plan, model.bind(None, None, ["a"] * 2), x, ForwardProcess(no_draw))
    height, width = model.image_size
    model.pipe.set_progress_bar_config(disable=True)
    theirs = model.pipe(
        **model.kind.arguments(model.card, None, ["a"] * 2, None), height=height, width=width,
        latents=model._packed(x / (1 + sigma)), num_inference_steps=4, output_type="pt",
    ).images  # fmt: skip
    assert walk.nfe == 4
    assert float((model.decode(walk.x[-1]) / 2 + 0.5 - theirs).abs().max()) < 1e-4


def card(pipeline: str, **scheduler: Any) -> Card:
    noise = {"kind": "flow", "shift": 3.0}
    config = {"pipeline": pipeline, "scheduler": {"shift": 3.0, **scheduler}}
    return Card("mine", "diffusers", 8, 4, 0, 0.003, 2997.0, noise_schedule=noise, config=config)


def levels(made: Any) -> list[float]:
    found: list[float] = made._ready().sigmas.tolist()
    return found


def test_levels_that_are_shifted_twice_have_a_row_beside_them() -> None:
    made = flow_schedulers(library(), card("StableDiffusion3Pipeline"), 4)
    assert list(made) == ["StableDiffusion3's own", "Euler, shifted once"]
    own, once = made.values()
    assert levels(own) == pytest.approx(TWICE, abs=1e-4)
    assert levels(once) == pytest.approx(ONCE, abs=1e-6)
    assert "s = 1, 0.9, 0.75, 0.5, 0" in str(once)
    assert once.times == pytest.approx([9, 3, 1, 0], rel=1e-5)


def test_levels_that_are_shifted_once_are_one_row() -> None:
    made = flow_schedulers(library(), card("ChromaPipeline"), 4)
    assert list(made) == ["Chroma's own"]
    assert levels(made["Chroma's own"]) == pytest.approx(ONCE, abs=1e-6)


def test_a_stretch_of_the_levels_and_other_solvers_have_one_too() -> None:
    stretched = flow_schedulers(library(), card("QwenImagePipeline", shift_terminal=0.02), 4)
    assert levels(stretched["QwenImage's own"])[-2] == pytest.approx(0.02)
    assert levels(stretched["Euler, shifted once"]) == pytest.approx(ONCE, abs=1e-6)
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    sana = card("SanaPipeline", _class_name="DPMSolverMultistepScheduler", **settings)
    assert len(flow_schedulers(library(), sana, 5)) == 2


def test_a_flow_that_is_no_pipeline_has_no_rows() -> None:
    noise = {"kind": "flow", "shift": 1.0}
    plain = Card("mine", "own", 8, 3, 0, 0.001, 999.0, noise_schedule=noise)
    assert diffusers_samplers(5, plain) == {}
