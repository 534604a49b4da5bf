"""Pipelines of diffusers: the adapter against the library's own samplers, on tiny networks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from denoisers.cards import Card
from denoisers.families.diffusers.files import describe_diffusers
from denoisers.families.diffusers.loading import load_diffusers
from denoisers.noise_schedules import BETAS, DiscreteVP
from denoisers.protocol import Files
from solvers.driver import integrate
from solvers.registry import make_solver
from tests import tiny_pipeline

CPU = torch.device("cpu")
PROMPTS = ["a cat", "an apple"]


def card_of(path: Path, **changes) -> Card:
    return dataclasses.replace(describe_diffusers("mine", path), **changes)


def load(path: Path, dtype=torch.float32):
    return load_diffusers(card_of(path), Files(path), CPU, dtype)


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_pipeline.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.mark.parametrize("rule", sorted(BETAS))
def test_the_betas_are_those_of_the_library(rule: str) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_start=1e-3, beta_end=0.01, beta_schedule=rule).alphas_cumprod
    ours = DiscreteVP.from_betas(1e-3, 0.01, rule=rule).alphas_cumprod
    assert float((ours / theirs.double() - 1).abs().max()) < 5e-5  # theirs is float32


def test_a_card_is_made_from_the_settings_alone(folder: Path) -> None:
    card = card_of(folder)
    assert round(card.sigma_min, 4) == 0.0292 and round(card.sigma_max, 4) == 14.6146
    assert card.shape == (4, 8, 8) and card.image_resolution == 16
    assert card.text and card.guidance == "cfg" and card.cost(7.5) == 2
    ends = card.schedule.sigma_inv(torch.tensor([card.sigma_min, card.sigma_max]))
    assert torch.allclose(ends, torch.tensor([1e-3, 1.0], dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("step", [0, 412, 999])
def test_x0_is_what_the_library_makes_of_the_same_network(model, kind: str, step: int) -> None:
    """At a step of its own, a scheduler's `pred_original_sample` is the denoised state."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**{**tiny_pipeline.SCHEDULER, "prediction_type": kind})
    scheduler.set_timesteps(1000)
    prediction = dataclasses.replace(model.prediction, kind=kind)
    sigma = model.card.schedule.sigma(torch.tensor((step + 1) / 1000, dtype=torch.float64))
    y = normal(2, 4, 8, 8)
    x = y * float((1 + sigma**2).sqrt())
    text = model.pipe.encode_prompt(PROMPTS, CPU, 1, False)[0]
    raw = model.pipe.unet(y, torch.tensor(step), encoder_hidden_states=text).sample
    theirs = scheduler.step(raw, step, y).pred_original_sample
    ours = dataclasses.replace(model, prediction=prediction).bind(prompts=PROMPTS)(x, sigma).x0
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


@pytest.mark.parametrize(("rate", "negative"), [(None, None), (3.0, None), (3.0, "an ugly dog")])
def test_a_walk_gives_the_images_of_the_librarys_pipeline(
    model, rate: float | None, negative: str | None
) -> None:
    """Euler's method from prompts to pixels, by `StableDiffusionPipeline` and by us."""
    from diffusers import EulerDiscreteScheduler

    pipe, own = model.pipe, model.pipe.scheduler
    steps = [999, 640, 300, 120]
    noise = normal(2, 4, 8, 8, seed=1)
    try:
        pipe.scheduler = EulerDiscreteScheduler.from_config(own.config, timestep_spacing="trailing")
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe(
            PROMPTS, timesteps=steps, guidance_scale=rate or 1.0, latents=noise, output_type="pt",
            negative_prompt=None if negative is None else [negative] * len(PROMPTS),
        ).images  # fmt: skip
    finally:
        pipe.scheduler = own
    ts = model.card.schedule.sigma((torch.tensor(steps) + 1) / 1000)
    ts = torch.cat([ts, torch.zeros(1, dtype=torch.float64)])
    denoiser = model.bind(None, rate, PROMPTS, negative=negative)
    walk = integrate(make_solver("euler"), denoiser, noise * ts[0], ts)
    assert walk.nfe == 4 * model.card.cost(rate)
    images = model.decode(walk.x[-1])
    assert images.shape == (2, 3, 16, 16) and float(images.std()) > 0.1
    assert float((images / 2 + 0.5 - theirs).abs().max()) < 1e-4


def test_guidance_mixes_two_halves_of_one_batch(model) -> None:
    x, sigma = normal(2, 4, 8, 8) * 2, torch.tensor(2.0)
    outs = {rate: model.bind(None, rate, PROMPTS)(x, sigma) for rate in (None, 0.0, 1.0, 4.0)}
    assert [model.bind(None, r, PROMPTS).cost for r in outs] == [1, 1, 1, 2]
    assert torch.equal(outs[None].x0, outs[1.0].x0)
    mixed = outs[0.0].x0 + 4 * (outs[1.0].x0 - outs[0.0].x0)
    assert float((outs[4.0].x0 - mixed).abs().max()) < 1e-4
    assert float((outs[1.0].x0 - outs[0.0].x0).abs().max()) > 0.1
    assert torch.allclose(outs[4.0].feat, outs[1.0].feat, atol=1e-5)  # of the conditional half
    assert float((outs[0.0].feat - outs[1.0].feat).abs().max()) > 0.01


def test_the_feature_is_the_mean_of_the_mid_block(model) -> None:
    seen = []
    hook = model.pipe.unet.mid_block.register_forward_hook(lambda *a: seen.append(a[-1]))
    feat = model.bind(prompts=PROMPTS)(normal(2, 4, 8, 8), torch.tensor(1.0)).feat
    hook.remove()
    assert seen[0].shape == (2, 16, 4, 4)
    assert torch.equal(feat, seen[0].mean(1)) and float(feat.std()) > 0.01


def test_every_sample_is_by_itself(model) -> None:
    """A level per sample, and prompts that belong to their images."""
    x = normal(2, 4, 8, 8)
    sigma = torch.tensor([0.7, 3.0]).reshape(2, 1, 1, 1)
    both = model.bind(None, 5.0, PROMPTS)(x, sigma)
    for i in range(2):
        one = model.bind(None, 5.0, PROMPTS[i : i + 1])(x[i : i + 1], sigma[i].reshape(()))
        assert torch.allclose(both.x0[i], one.x0[0], atol=1e-4)
        assert torch.allclose(both.feat[i], one.feat[0], atol=1e-5)
    with pytest.raises(ValueError, match="1 prompts are bound but the batch has 2"):
        model.bind(None, 5.0, PROMPTS[:1])(x, sigma)


def test_gradients_reach_state_and_level_and_no_weight(folder: Path) -> None:
    model = load(folder, torch.float64)
    denoiser = model.bind(None, 2.0, PROMPTS[:1])
    x = normal(1, 4, 8, 8, dtype=torch.float64).requires_grad_()
    level = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    to = normal(1, 4, 8, 8, seed=3, dtype=torch.float64)

    def value(x, level):
        return (denoiser(x, level).x0 * to).sum()

    grad_x, grad_level = torch.autograd.grad(value(x, level), (x, level))
    along = normal(1, 4, 8, 8, seed=4, dtype=torch.float64)
    with torch.no_grad():
        h = 1e-5
        slope = (value(x + h * along, level) - value(x - h * along, level)) / (2 * h)
        assert float((grad_x * along).sum()) == pytest.approx(float(slope), rel=1e-6)
        h = 5e-4  # the library embeds the time in float32
        slope = (value(x, level + h) - value(x, level - h)) / (2 * h)
        assert float(grad_level) == pytest.approx(float(slope), rel=1e-2)
    for part in (model.pipe.unet, model.pipe.vae, model.pipe.text_encoder):
        assert not any(weight.requires_grad for weight in part.parameters())


def test_latents_are_decoded_in_portions_and_clipped(model) -> None:
    z = normal(9, 4, 8, 8) * 4 * 0.18215
    with torch.no_grad():
        whole = model.pipe.vae.decode(z / 0.18215).sample
    assert float(whole.abs().max()) > 1
    assert torch.allclose(model.decode(z), whole.clamp(-1, 1), atol=1e-5)
    assert model.decode(z.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_network_takes_and_gives_the_states_dtype(folder, model, dtype) -> None:
    half = load(folder, dtype)
    assert half.pipe.unet.dtype == half.pipe.text_encoder.dtype == dtype
    assert half.pipe.vae.dtype == torch.float32
    x, sigma = normal(2, 4, 8, 8, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    ours, exact = (m.bind(None, 2.0, PROMPTS)(x, sigma) for m in (half, model))
    assert ours.x0.dtype == torch.float64 and ours.feat.dtype == torch.float64
    error = float((ours.x0 - exact.x0).std() / exact.x0.std())
    assert 0 < error < (0.01 if dtype == torch.float16 else 0.05)


def test_an_unconditional_pipeline_in_pixel_space(tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    path = tiny_pipeline.unconditional(tmp_path)
    model = load(path)
    assert model.card.shape == (3, 8, 8) and not model.card.text and model.card.guidance is None
    assert model.card.noise_schedule["rule"] == "linear"
    scheduler, step = DDPMScheduler(), 500
    alpha = scheduler.alphas_cumprod[step].double().sqrt()
    x = normal(2, 3, 8, 8) / float(alpha)
    y = (alpha * x).float()
    with torch.no_grad():
        raw = model.pipe.unet(y, step).sample
    theirs = scheduler.step(raw, step, y).pred_original_sample
    ours = model.bind()(x, (1 - alpha**2).sqrt() / alpha)
    assert float((ours.x0 - theirs).abs().max()) < 2e-5
    assert float((theirs.abs() == 1).float().mean()) > 0.1  # the pipeline clips, and so do we
    assert torch.equal(model.decode(ours.x0), ours.x0) and ours.feat.shape == (2, 4, 4)


def test_an_unconditional_pipeline_in_latent_space(tmp_path: Path) -> None:
    model = load(tiny_pipeline.latent_unconditional(tmp_path))
    assert model.card.shape == (3, 8, 8) and model.card.image_resolution == 16
    z = normal(2, 3, 8, 8)
    with torch.no_grad():
        image = model.pipe.vqvae.decode(z / model.pipe.vqvae.config.scaling_factor).sample
    assert torch.allclose(model.decode(z), image.clamp(-1, 1), atol=1e-5)


def test_stable_diffusion_xl_with_its_own_conditions(tmp_path: Path) -> None:
    from diffusers import EulerDiscreteScheduler

    model = load(tiny_pipeline.stable_diffusion_xl(tmp_path))
    pipe, noise, steps = model.pipe, normal(2, 4, 8, 8), [999, 400]
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    theirs = pipe(
        PROMPTS, timesteps=steps, guidance_scale=3.0, latents=noise, output_type="latent"
    ).images
    ts = model.card.schedule.sigma((torch.tensor([*steps, 0]) + 1) / 1000)
    ts[-1] = 0
    ours = integrate(make_solver("euler"), model.bind(None, 3.0, PROMPTS), noise * ts[0], ts).x[-1]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 2e-5
