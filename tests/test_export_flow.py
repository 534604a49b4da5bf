"""Exported samplers of flow models: in an unmodified pipeline they give our own walk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from denoisers.families.diffusers.one_step import TransformerModel
from denoisers.velocity import VelocityDenoiser
from ns.calibrate import first_weight
from ns.experiments import TableFile, read_table
from runtime.typed import read_result
from solvers.table import Table, run_table
from tests.scripts import Script
from tests.test_export import module, opened, stand_in
from tests.test_flow import velocity
from tests.test_transformers import SIZES
from tests.test_transformers import load as load_with
from tests.tiny_transformers import PIPELINES, normal
from tools import export

FLOWS = ("sd3", "flux", "chroma", "qwen_image", "z_image", "sana", "lumina2")


def flags(folder: Path, size: tuple[int, int]) -> list[str]:
    given = json.dumps({"height": size[0], "width": size[1]})
    return ["--dataset_name=mine", f"--model_path={folder}", f"--model_settings={given}"]


def load(folder: Path, size: tuple[int, int]) -> TransformerModel:
    return load_with(folder, height=size[0], width=size[1])


def images(model: TransformerModel, table: Table, rate: float | None, noise: Tensor) -> Tensor:
    """Of our walk from pure noise, in [0, 1]."""
    denoiser = model.bind(None, rate, ["a cat"] * len(noise))
    scale = table.start + (1 if model.card.is_flow else 0)
    with torch.no_grad():
        return model.decode(run_table(table, denoiser, noise * scale).x[-1]) / 2 + 0.5


def theirs(pipe: Any, model: TransformerModel, rate: float | None, noise: Tensor) -> Tensor:
    """Of the pipeline as it is, with its scheduler."""
    pipe.set_progress_bar_config(disable=True)
    height, width = model.image_size
    said = model.kind.arguments(model.card, rate, ["a cat"] * len(noise), None)
    made: Tensor = pipe(
        **said, latents=model._packed(noise.clone()), height=height, width=width,
        num_inference_steps=pipe.scheduler.calls, output_type="pt",
    ).images  # fmt: skip
    return made


@pytest.mark.parametrize("kind", [*FLOWS, "pixart"])
def test_a_pipeline_with_the_scheduler_gives_our_images(
    kind: str, tmp_path: Path, script: Script
) -> None:
    folder, made = tmp_path / "pipe", tmp_path / "made"
    PIPELINES[kind]().save_pretrained(folder)
    rate = 2.0
    given = [*flags(folder, SIZES[kind]), f"--guidance_rate={rate:g}", "--sampler=ipndm"]
    calls = 5
    nfe = calls if kind == "flux" else 2 * calls
    done = script(export.main, "diffusers", *given, f"--nfe={nfe}", f"--dest={made}")
    assert done.code == 0, done.err
    expected = {"qwen_image": "true_cfg_scale=2", "z_image": "guidance_scale=1"}
    assert f"num_inference_steps=5, {expected.get(kind, 'guidance_scale=2')})" in done.out
    model, pipe = load(folder, SIZES[kind]), opened(folder)
    pipe.scheduler = module(made / "table_scheduler.py").TableScheduler.from_pretrained(made)
    again = script(export.main, "table", *given, f"--nfe={nfe}", f"--dest={tmp_path}/table.json")
    assert again.code == 0, again.err
    kept = read_result(TableFile, tmp_path / "table.json")
    assert kept is not None
    noise = normal(2, *model.card.shape)
    ours = images(model, kept.table(), rate, noise)
    assert float(ours.std()) > 0.05
    assert float((theirs(pipe, model, rate, noise) - ours).abs().max()) < 1e-4


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("flux")
    PIPELINES["flux"]().save_pretrained(home)
    return Path(home)


def test_other_sizes_move_the_levels_by_the_ratio_of_the_shifts(
    flux: Path, tmp_path: Path, script: Script
) -> None:
    """The pipeline tells the scheduler mu, which grows with the number of tokens."""
    made, small, large = tmp_path / "made", (16, 32), (32, 32)
    given = [*flags(flux, small), "--sampler=dpmpp", "--nfe=4"]
    done = script(export.main, "diffusers", *given, f"--dest={made}")
    assert done.code == 0, done.err
    assert script(export.main, "table", *given, f"--dest={tmp_path}/t.json").code == 0
    kept = read_result(TableFile, tmp_path / "t.json")
    assert kept is not None
    table, model, pipe = kept.table(), load(flux, large), opened(flux)
    shifts = [load(flux, size).card.noise_schedule for size in (small, large)]
    assert shifts[0] is not None and shifts[1] is not None
    ratio = shifts[1]["shift"] / shifts[0]["shift"]
    assert ratio == pytest.approx(math.exp(0.65 * 32 / 60))  # 32 tokens more
    rows = table.rows.clone()
    rows[0, 0] = first_weight(table.times[:1] * ratio, table.start * ratio)
    moved = Table(table.start * ratio, table.end * ratio, table.times * ratio, rows)
    pipe.scheduler = module(made / "table_scheduler.py").TableScheduler.from_pretrained(made)
    noise = normal(1, *model.card.shape)
    found = theirs(pipe, model, None, noise)
    assert float((found - images(model, moved, None, noise)).abs().max()) < 1e-4
    assert float((found - images(model, table, None, noise)).abs().max()) > 1e-3


def test_a_trained_table_begins_with_noise_and_works_in_the_pipeline(
    flux: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    from commands import train

    monkeypatch.chdir(tmp_path)
    given = [*flags(flux, (16, 16)), "--prompt=a cat", "--sampler_stu=ns", "--nfe=3"]
    given += ["--search=3", "--refine=2", "--batch=2", "--trajectories=8", "--report=1"]
    monkeypatch.setattr("ns.job.JUDGED", 4)
    monkeypatch.setattr("ns.job.CALIBRATED", 8)
    monkeypatch.setattr("ns.job.SEARCHED", (4, 4))
    done = script(train.main, *given, "--cache_dir=cache", "--device=cpu")
    assert done.code == 0, done.err
    folder = Path(done.out.strip().splitlines()[-1])
    table, _ = read_table(folder / "table.json")
    first = first_weight(table.times[:1], table.start)
    assert float(table.rows[0, 0]) == pytest.approx(float(first), rel=1e-12)
    student = [*flags(flux, (16, 16)), f"--predictor_path={folder}"]
    done = script(export.main, "diffusers", *student, "--dest=made")
    assert done.code == 0, done.err
    model, pipe = load(flux, (16, 16)), opened(flux)
    pipe.scheduler = module(Path("made/table_scheduler.py")).TableScheduler.from_pretrained("made")
    noise = normal(1, *model.card.shape)
    ours = images(model, table, None, noise)
    assert float((theirs(pipe, model, None, noise) - ours).abs().max()) < 1e-4


@pytest.mark.parametrize("mu", [None, 1.3])
def test_an_image_and_noise_are_the_state_of_a_flow_at_a_later_call(
    flux: Path, tmp_path: Path, script: Script, mu: float | None
) -> None:
    """The image takes the place of what is left out, so a network that returns it gives it back."""
    made = tmp_path / "made"
    given = [*flags(flux, (16, 32)), "--sampler=dpmpp", "--nfe=5"]
    assert script(export.main, "diffusers", *given, f"--dest={made}").code == 0
    scheduler = module(made / "table_scheduler.py").TableScheduler.from_pretrained(made)
    image, noise = normal(1, 4, 4, 4), normal(1, 4, 4, 4, seed=1)
    for first in range(1, 5):
        scheduler.set_timesteps(5, mu=mu)
        time = scheduler.timesteps[first : first + 1]
        y, s = scheduler.scale_noise(image, time, noise), float(time) / 1000
        torch.testing.assert_close(y, (1 - s) * image + s * noise, rtol=5e-3, atol=5e-3)
        scheduler.set_begin_index(first)
        for call in range(first, 5):
            s = float(scheduler.timesteps[call]) / 1000
            y = scheduler.step((y - image) / s, scheduler.timesteps[call], y).prev_sample
        assert float((y - image).abs().max()) < 0.02  # an image ends at sigma_min, not at 0


def test_an_analytic_first_step_has_no_place_there(
    flux: Path, tmp_path: Path, script: Script
) -> None:
    given = [*flags(flux, (16, 16)), "--sampler=ipndm", "--nfe=4", "--afs=True"]
    done = script(export.main, "diffusers", *given, f"--dest={tmp_path}/made")
    assert done.code == 1 and "does not begin with a network call on pure noise" in done.err
    assert not (tmp_path / "made").exists()


class Flow:
    """What ComfyUI hands to a sampler for a flow: its sigma is the time s."""

    def __init__(self, latent_image: Tensor) -> None:
        self.latent_image = latent_image

    def __call__(self, y: Tensor, s: Tensor, **conditions: Any) -> Tensor:
        level = s[:, None, None, None]
        return y - level * velocity(y, level)


def test_the_node_of_comfyui_walks_flows_too(
    flux: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stand-in for its documented sampler interface; ComfyUI itself was not run."""
    stand_in(monkeypatch)
    file = tmp_path / "node.py"
    given = [*flags(flux, (16, 16)), "--sampler=ipndm", "--nfe=4", "--afs=True"]
    assert script(export.main, "comfyui", *given, f"--dest={file}").code == 0
    assert script(export.main, "table", *given, f"--dest={tmp_path}/t.json").code == 0
    kept = read_result(TableFile, tmp_path / "t.json")
    assert kept is not None
    table, node = kept.table(), module(file)
    (sampler,) = node.NODE_CLASS_MAPPINGS["TableSampler"]().get()
    (sigmas,) = node.NODE_CLASS_MAPPINGS["TableSigmas"]().get()
    assert float(sigmas.max()) < 1
    noise = normal(2, 2, 2, 2).double()
    model = Flow(torch.zeros_like(noise))
    made = sampler.function(model, sigmas[0].double() * noise, sigmas)
    walk = run_table(table, VelocityDenoiser(velocity), noise * (1 + table.start))
    assert float((made - walk.x[-1]).abs().max()) < 1e-4

    image = normal(2, 2, 2, 2, seed=1).double()
    monkeypatch.setattr(Flow, "__call__", lambda self, y, s, **more: self.latent_image)
    s = float(sigmas[2])
    part = sampler.function(Flow(image), (1 - s) * image + s * noise, sigmas[2:])
    left = table.ragged[-1][0] * (1 + table.start) * noise + image
    assert float((part - left).abs().max()) < 1e-4
