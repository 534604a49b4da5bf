"""DDIM, DDPM, Heun and Restart on a guided pipeline, against the library and its real calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from denoisers.conditions import Conditions
from denoisers.families.diffusers.files import describe_diffusers
from denoisers.families.diffusers.loading import load_diffusers
from denoisers.protocol import Files
from plans.plan import run_plan
from samplers.build import build
from samplers.generate import generate
from samplers.options import SamplerOptions
from samplers.sampler import Sampler
from tests import tiny_pipeline

PROMPTS = ("a cat", "an apple")
RESTART = '{"0": [3, 2, 0.1, 0.5]}'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tiny_pipeline.stable_diffusion(tmp_path_factory.mktemp("sd"))
    card = describe_diffusers("mine", path)
    return load_diffusers(card, Files(path), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def sampler(model) -> Callable[..., Sampler]:
    def make(name: str, **options) -> Sampler:
        options = {"schedule_type": "discrete", "guidance_rate": 3.0, **options}
        return build(SamplerOptions(sampler=name, **options), model.card)

    return make


def draw(*name: object) -> Tensor:
    """A draw for the two images that knows its name."""
    generator = torch.Generator().manual_seed(sum(map(ord, str(name))))
    return torch.randn(2, 4, 8, 8, generator=generator)


def ours(model, sampler: Sampler) -> Tensor:
    """The last state, where the network expects it: with unit variance."""
    denoiser = model.bind(None, sampler.guidance_rate, PROMPTS)
    noise = draw("latent").double()
    walk = run_plan(sampler.plan, denoiser, noise * sampler.start, lambda name: draw(*name))
    return walk.x[-1] / (1 + walk.t[-1] ** 2).sqrt()


def theirs(model, scheduler, sampler: Sampler, step: Callable) -> Tensor:
    """The library's loop: ``step(raw, time, y, number)`` is one step of its scheduler."""
    text = model.bind(None, sampler.guidance_rate, PROMPTS).condition["encoder_hidden_states"]
    y = draw("latent") * sampler.start / (1 + sampler.start**2) ** 0.5
    for number, time in enumerate(scheduler.timesteps):
        with torch.no_grad():
            raw = model.pipe.unet(y.repeat(2, 1, 1, 1), time, encoder_hidden_states=text).sample
        without, guided = raw.chunk(2)
        mixed = without + sampler.guidance_rate * (guided - without)
        y = step(mixed, time, y, number).prev_sample
    return y


def level(model, step: int) -> float:
    """The noise level of an index step."""
    schedule = model.card.schedule
    return float(schedule.sigma(torch.tensor((step + 1) / 1000, dtype=torch.float64)))


@pytest.mark.parametrize("intervals", [9, 27, 37, 111, 333])
def test_the_discrete_grid_is_that_of_uniform_index_steps(model, sampler, intervals: int) -> None:
    from diffusers import DDIMScheduler

    stride = 999 // intervals
    scheduler = DDIMScheduler(**{**tiny_pipeline.SCHEDULER, "steps_offset": stride})
    scheduler.set_timesteps(intervals)
    abar = scheduler.alphas_cumprod.double()[[*scheduler.timesteps.tolist(), 0]]
    ts = torch.tensor(sampler("euler", num_steps=intervals + 1).describe()["times"])
    assert float((ts / ((1 - abar) / abar).sqrt() - 1).abs().max()) < 1e-4


def test_euler_on_the_discrete_grid_is_ddim(model, sampler) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**{**tiny_pipeline.SCHEDULER, "steps_offset": 111})
    scheduler.set_timesteps(9)  # 999, 888, ..., 111, and from there to 0
    euler = sampler("euler", num_steps=10)
    found = theirs(model, scheduler, euler, lambda raw, t, y, _: scheduler.step(raw, t, y))
    assert float((ours(model, euler) - found).abs().max()) < 1e-4 * float(found.abs().max())
    heun = ours(model, sampler("heun", num_steps=10))
    assert float((heun - found).abs().max()) > 0.01 * float(found.abs().max())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_eta_is_that_of_ddim_down_to_the_image(model, sampler, eta: float) -> None:
    from diffusers import DDIMScheduler

    settings = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    scheduler = DDIMScheduler(**{**tiny_pipeline.SCHEDULER, **settings})
    scheduler.set_timesteps(8)  # 999, 874, ..., 124, and from there to the image
    chain = sampler("ddpm", num_steps=8, eta=eta, sigma_min=level(model, 124))

    def step(raw, time, y, number):
        noise = draw("ddpm", number) if eta else None
        return scheduler.step(raw, time, y, eta=eta, variance_noise=noise)

    found = theirs(model, scheduler, chain, step)
    assert float((ours(model, chain) - found).abs().max()) < 1e-4 * float(found.abs().max())


def test_ddpm_is_the_librarys_chain(model, sampler, monkeypatch) -> None:
    """The same mean and, as the draws are the same, the same variance in every step."""
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

    keys = {k: v for k, v in tiny_pipeline.SCHEDULER.items()
            if k not in ("set_alpha_to_one", "steps_offset")}  # fmt: skip
    scheduler = DDPMScheduler(**keys, variance_type="fixed_small")
    scheduler.set_timesteps(timesteps=list(range(999, -1, -111)))
    drawn: list[int] = []
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: draw("ddpm", drawn[-1]))

    def step(raw, time, y, number):
        drawn.append(number)
        return scheduler.step(raw, time, y)

    chain = sampler("ddpm", num_steps=10)
    found = theirs(model, scheduler, chain, step)
    assert float((ours(model, chain) - found).abs().max()) < 1e-4 * float(found.abs().max())
    shifted = sampler("ddpm", num_steps=10, eta=0.9)
    assert float((ours(model, shifted) - found).abs().max()) > 0.01 * float(found.abs().max())


@pytest.mark.parametrize("rate", [None, 2.0, 3.0, 5.0, 8.0])
def test_all_spend_the_same_budget_and_what_the_network_saw_is_what_is_said(
    model, sampler, rate: float | None
) -> None:
    """Images that go through the U-Net, counted at its door: two for each guided call."""
    cost = 1 if rate in (None, 1.0) else 2
    restart = {"restart_info": '{"0": [3, 1, 0.1, 0.5]}', "main_solver": "euler"}
    seen: list[int] = []
    hook = model.pipe.unet.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    try:
        for name, options in (("euler", {}), ("ddpm", {}), ("heun", {}), ("restart", restart)):
            chosen = sampler(name, nfe=12 * cost, guidance_rate=rate, **options)
            seen.clear()
            given = Conditions(prompts=PROMPTS)
            (made,) = generate(chosen, model, [0, 1], batch=2, device="cpu", conditions=given)
            assert len(seen) == 12 and sum(seen) == 2 * chosen.nfe == 2 * made.nfe == 24 * cost
    finally:
        hook.remove()


def test_restart_walks_the_models_own_grid_and_ends_at_zero(model, sampler) -> None:
    """N_main + 2 K (N_restart - 1) calls: Euler on the main walk, Heun in the restarts."""
    chosen = sampler("restart", num_steps=20, restart_info=RESTART, main_solver="euler")
    assert chosen.nfe == 2 * (20 + 2 * 2 * (3 - 1))
    nodes = sampler("euler", num_steps=20).describe()["times"]
    landing = min(nodes, key=lambda t: abs(t - 0.1))
    times = chosen.describe()["times"]
    up = times.index(0.5)
    middle = (((landing ** (1 / 7)) + 0.5 ** (1 / 7)) / 2) ** 7
    assert times[up - 1 : up + 6] == pytest.approx([landing, *[0.5, middle, landing] * 2])
    assert times[:up] + times[up + 6 :] == pytest.approx([*nodes, 0.0])
    denoiser = model.bind(None, 3.0, PROMPTS)
    walk = run_plan(chosen.plan, denoiser, draw("latent") * chosen.start, lambda n: draw(*n))
    assert torch.equal(walk.x[-1], denoiser(walk.x[-2], walk.t[-2]).x0)
