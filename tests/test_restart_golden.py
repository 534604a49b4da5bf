"""Restart and EDM's sampler against recorded runs of the published code (restart, edm_heun).

The recording drew ``RandomState(3).randn(4, 3, 8, 8)`` once per Heun step, churned or not, and
once per restart jump, so the tests number the draws by walking the plan.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from denoisers.analytic import MixtureDenoiser
from plans.plan import Jump, Plan, Solve, plan_nfe, run_plan
from plans.stochastic import edm_plan
from plans.walk import Churn
from restart.tables import configuration, published_grid


class Recorder(MixtureDenoiser):
    """Notes the noise level of every call."""

    sigmas: list[float]

    def __call__(self, x, sigma):
        self.sigmas.append(float(sigma))
        return super().__call__(x, sigma)


def draw_numbers(plan: Plan) -> dict[tuple, int]:
    numbers, count = {}, 0
    for part in plan:
        if isinstance(part, Solve):
            count += len(part.ts) - 1
        else:
            numbers[part.name] = count  # a churn jump uses the draw of the step that follows it
            count += 0 if "churn" in part.name else 1
    return numbers


def replay(plan, golden):
    recorded = golden("denoiser")
    denoiser = Recorder(torch.from_numpy(recorded["means"]), float(recorded["s"]))
    denoiser.sigmas = []
    numbers = draw_numbers(plan)
    state = np.random.RandomState(3)
    draws = [state.randn(4, 3, 8, 8) for _ in range(1 + max(numbers.values(), default=0))]
    x = torch.from_numpy(recorded["latents_RandomState1"]) * float(plan[0].ts[0])
    normal = lambda name: torch.from_numpy(draws[numbers[name]])  # noqa: E731
    trajectory = run_plan(plan, denoiser, x, normal)
    assert trajectory.nfe == len(denoiser.sigmas) == plan_nfe(plan)
    return trajectory.x[-1].numpy(), np.array(denoiser.sigmas)


def test_the_recorded_noise_is_what_the_readme_says(golden):
    state = np.random.RandomState(3)
    for i in range(3):
        assert np.array_equal(golden("restart")[f"noise_draw_{i}"], state.randn(4, 3, 8, 8))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("cifar10-vp-43", "cifar10_vp#0|n18|Snoise1.0|gamma0"),
        ("imagenet64-39", "imagenet_edm#0|n14|Snoise1.003|gamma0.05"),
    ],
)
def test_published_configuration_is_reproduced(golden, name, key):
    final, sigmas = replay(configuration(name).plan(), golden)
    assert np.abs(final - golden("restart")[key]).max() < 1e-6
    if f"{key}|sigmas" in golden("restart"):  # the published restart grids are float32
        np.testing.assert_allclose(sigmas, golden("restart")[f"{key}|sigmas"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["cifar10-vp-55", "cifar10-vp-75", "cifar10-vp-115"])
def test_the_recorded_cifar10_run_tells_the_rows_apart(golden, name):
    final, _ = replay(configuration(name).plan(), golden)
    assert np.abs(final - golden("restart")["cifar10_vp#0|n18|Snoise1.0|gamma0"]).max() > 0.1


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("edm_heun_n18", {}),
        ("edm_stoch_n18_churn40", dict(S_churn=40, S_min=0.05, S_max=50, S_noise=1.003)),
    ],
)
def test_edm_sampler_is_reproduced(golden, key, settings):
    plan = edm_plan(published_grid(18), Churn(**settings))
    final, sigmas = replay(plan, golden)
    assert np.abs(final - golden("edm_heun")[key]).max() < 1e-10
    np.testing.assert_allclose(sigmas, golden("edm_heun")[f"{key}|sigmas"], rtol=1e-12, atol=0)
    assert sum(isinstance(part, Jump) for part in plan) == (13 if settings else 0)
