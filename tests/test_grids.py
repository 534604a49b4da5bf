"""Time grids against the recorded vectors, and what every grid must satisfy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from denoisers.noise_schedules import DiscreteVP, LinearVP, NoiseSchedule
from solvers.grids import SCHEDULES, Grid, TimeMaps, check_exponent, get_grid

F32 = float(np.finfo(np.float32).eps)
MODELS: dict[str, NoiseSchedule] = {
    "cg": LinearVP(beta_d=19.9, beta_min=0.1),
    "cfg_sd": DiscreteVP.from_betas(0.00085, 0.012),
    "uncond_ldm": DiscreteVP.from_betas(0.0015, 0.0195),
}
TIMES = [0.001, 0.01, 0.1, 0.5, 0.9, 1]
SIGMAS = [0.03, 0.1, 0.5, 1, 3, 10]


def double(values: list[float] | np.ndarray) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def maps(model: NoiseSchedule) -> TimeMaps:
    return TimeMaps(model.sigma, model.sigma_inv)


def assert_same(ours: Tensor, truth: Tensor | np.ndarray) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(truth), rtol=1e-10, atol=0)


def assert_float32_accurate(ours: Tensor, recorded: np.ndarray, roundings: float) -> None:
    """A float32 run of ``sigma = sqrt(exp(q) - 1)``: ``q`` within so many roundings."""
    q = torch.log1p(ours**2)
    recorded_q = torch.log1p(double(recorded.astype(np.float64)) ** 2)
    assert float(((q - recorded_q).abs() / (1 + q)).max()) < roundings * F32


# --- recorded vectors -----------------------------------------------------------------------


def test_every_recorded_grid(golden):
    vectors = golden("schedules")
    keys = [key for key in vectors.files if key.split("|")[1] in SCHEDULES]
    assert len(keys) == 216, "the recorded set has changed; look at what this test covers"
    for key in keys:
        dtype, schedule, rho, nodes, _ = key.split("|")
        grid = get_grid(schedule, int(nodes[1:]), 0.002, 80.0, float(rho[3:]))
        if dtype == "f64":
            assert_same(grid, double(vectors[key]))
        elif schedule == "time_uniform":
            # beta_d holds ln(1 + sigma_min^2) / eps: one rounding of it weighs 1000 / 8 in q.
            assert_float32_accurate(grid, vectors[key], 1000 / 8)
        else:
            recorded = double(vectors[key].astype(np.float64))
            assert float((recorded / grid - 1).abs().max()) < 16 * F32


@pytest.mark.parametrize("name", MODELS)
def test_noise_levels_of_the_models(golden, name):
    vectors, model = golden("schedules"), MODELS[name]
    sigma, time = model.sigma(double(TIMES)), model.sigma_inv(double(SIGMAS))
    recorded_sigma = f"|{name}|sigma([.001,.01,.1,.5,.9,1])"
    recorded_time = f"|{name}|sigma_inv([.03,.1,.5,1,3,10])"
    assert_same(sigma, vectors["f64" + recorded_sigma])
    assert_same(time, vectors["f64" + recorded_time])
    assert_float32_accurate(sigma, vectors["f32" + recorded_sigma], 4)
    # One rounding of 1 + sigma^2 in float32, relative to its logarithm at sigma = 0.03.
    worst = double(vectors["f32" + recorded_time].astype(np.float64)) / time - 1
    assert float(worst.abs().max()) < F32 / np.log1p(0.03**2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rho", [1, 2])
@pytest.mark.parametrize("nodes", [4, 6, 11])
def test_discrete_grids(golden, name, rho, nodes):
    vectors, model = golden("schedules"), MODELS[name]
    for dtype in ("f64", "f32"):
        low, high = (float(v) for v in vectors[f"{dtype}|{name}|sigma_min_max"])
        grid = get_grid("discrete", nodes, low, high, rho, maps(model))
        recorded = vectors[f"{dtype}|discrete:{name}|rho{rho}|n{nodes}"]
        if dtype == "f64":
            assert_same(grid, double(recorded))
        else:
            assert_float32_accurate(grid, recorded, 4)


def published_discrete(
    model: NoiseSchedule, nodes: int, low: float, high: float, rho: float
) -> Tensor:
    """The published rule: the first end is ``t_max`` where ``t_max ** (1 / rho)`` is meant."""
    t_max, t_min = (float(t) for t in model.sigma_inv(double([high, low])))
    ramp = torch.arange(nodes, dtype=torch.float64) / (nodes - 1)
    return model.sigma((t_max + ramp * (t_min ** (1 / rho) - t_max)) ** rho)


@pytest.mark.parametrize("name", MODELS)
def test_discrete_differs_knowingly_from_the_published_rule(golden, name):
    vectors, model = golden("schedules"), MODELS[name]
    low, high = (float(v) for v in vectors[f"f64|{name}|sigma_min_max"])
    for rho in (1, 2):  # every recorded grid starts at t = 1, where 1 ** (1 / rho) = 1 hides it
        recorded = double(vectors[f"f64|discrete:{name}|rho{rho}|n6"])
        published = published_discrete(model, 6, low, high, rho)
        assert_same(published, recorded)

    lower = high / 4  # a walk that starts below the model's last step
    ours = get_grid("discrete", 6, low, lower, 1, maps(model))
    assert_same(ours, published_discrete(model, 6, low, lower, 1))
    ours = get_grid("discrete", 6, low, lower, 2, maps(model))
    assert float(ours[0]) == lower
    t_max = float(model.sigma_inv(double([lower])))
    wrong_start = published_discrete(model, 6, low, lower, 2)[0]
    assert_same(wrong_start, model.sigma(double([t_max**2]))[0])
    assert float(wrong_start) < 0.75 * lower
    roots = model.sigma_inv(ours).sqrt()  # ours is uniform in t ** (1 / rho)
    steps = roots.diff()
    assert float((steps / steps.mean() - 1).abs().max()) < 1e-9


# --- properties -----------------------------------------------------------------------------

schedules = st.sampled_from(SCHEDULES)
# Above 0.037 no VP process rises all the way from its level at t = 1e-3 to 1 at t = 1.
ranges = st.tuples(st.floats(1e-3, 0.035), st.floats(1.0, 200.0))
exponents = st.floats(0.5, 10.0)


def settings_for(
    schedule: str, levels: tuple[float, float], model: NoiseSchedule
) -> tuple[float, float, TimeMaps | None]:
    """A model's own time cannot leave the model's levels."""
    low, high = levels
    if schedule != "discrete":
        return low, high, None
    ends = model.sigma(double([2e-3, 0.99]))
    return max(low, float(ends[0])), min(high, float(ends[1])), maps(model)


@given(schedules, st.integers(2, 40), ranges, exponents, st.sampled_from(sorted(MODELS)))
def test_grids_decrease_between_exact_ends(schedule, nodes, levels, rho, name):
    low, high, extra = settings_for(schedule, levels, MODELS[name])
    grid = get_grid(schedule, nodes, low, high, rho, extra)
    assert grid.shape == (nodes,) and grid.dtype == torch.float64 and grid.device.type == "cpu"
    assert float(grid[0]) == high and float(grid[-1]) == low
    assert bool((grid.diff() < 0).all())


@given(
    schedules, st.integers(2, 10), st.integers(0, 5), ranges, exponents,
    st.sampled_from(sorted(MODELS)),
)  # fmt: skip
def test_refinement_contains_the_coarse_grid(schedule, nodes, inserted, levels, rho, name):
    low, high, extra = settings_for(schedule, levels, MODELS[name])
    coarse = get_grid(schedule, nodes, low, high, rho, extra)
    fine, stride = Grid(schedule, nodes, rho, low, high, extra).refined(inserted)
    assert len(fine) == (inserted + 1) * (nodes - 1) + 1
    torch.testing.assert_close(fine[::stride], coarse)


@given(st.sampled_from(sorted(MODELS)), st.floats(1e-3, 1.0))
def test_noise_levels_invert(name, time):
    model = MODELS[name]
    back = model.sigma_inv(model.sigma(double([time])))
    assert abs(float(back) / time - 1) < 1e-9


def test_discrete_model_interpolates_log_alpha_and_extrapolates_below():
    abar = double([0.9, 0.8, 0.3, 0.1])
    model = DiscreteVP(abar)
    alpha_squared = 1 / (1 + model.sigma(double([0.125, 0.25, 0.375, 1.0])) ** 2)
    between = (0.9 * 0.8) ** 0.5  # ln alpha-bar halfway between two steps
    below = 0.9 * (0.9 / 0.8) ** 0.5  # half a step below the first
    torch.testing.assert_close(alpha_squared, double([below, 0.9, between, 0.1]))


def test_logsnr_and_polynomial_by_hand():
    grid = get_grid("logsnr", 3, 0.25, 64.0)
    torch.testing.assert_close(grid, double([64.0, 4.0, 0.25]), rtol=1e-14, atol=0)
    grid = get_grid("polynomial", 3, 1.0, 25.0, 2)
    torch.testing.assert_close(grid, double([25.0, 9.0, 1.0]), rtol=1e-14, atol=0)


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("karras", 6, 0.002, 80.0, 7), "unknown schedule 'karras'"),
        (("polynomial", 1, 0.002, 80.0, 7), "num_steps >= 2"),
        (("polynomial", 6, 0.002, 80.0, 0), "schedule_rho = 0"),
        (("polynomial", 6, 0.002, 80.0, float("nan")), "schedule_rho = nan"),
        (("logsnr", 6, 80.0, 80.0), "sigma_min = 80, sigma_max = 80"),
        (("logsnr", 6, 0.0, 80.0), "sigma_min = 0,"),
        (("logsnr", 6, 0.002, float("inf")), "sigma_max = inf"),
        (("logsnr", 6, 0.002, 1e9), r"<= 100000, got sigma_min = 0.002, sigma_max = 1e\+09"),
        (("time_uniform", 6, 0.5, 1.0, 1), "does not decrease"),
        (("discrete", 6, 0.03, 14.0, 1), "'discrete' needs"),
    ],
)
def test_invalid_settings_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_grid(*arguments)


def test_negative_refinement_raises():
    with pytest.raises(ValueError, match="M = -1"):
        Grid("logsnr", 4, None, 0.002, 80.0).refined(-1)


class Levels(NamedTuple):
    """A minimal `NoiseRange`."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    time_maps: TimeMaps | None = None


def test_default_exponents():
    for schedule, rho in (("polynomial", 7.0), ("time_uniform", 1.0), ("logsnr", None)):
        grid = Grid(schedule, 6).resolve(Levels())
        assert (grid.rho, grid.ends) == (rho, (0.002, 80.0))
        assert torch.equal(grid.nodes(), get_grid(schedule, 6, 0.002, 80.0))
        assert torch.equal(grid.nodes(), get_grid(schedule, 6, 0.002, 80.0, rho))
    model = next(iter(MODELS.values()))
    own = Levels(0.05, 10.0, maps(model))
    discrete = Grid("discrete", 6).resolve(own)
    assert discrete.rho == 1.0
    assert torch.equal(discrete.nodes(), get_grid("discrete", 6, 0.05, 10.0, 1.0, maps(model)))


def test_an_exponent_without_effect_is_refused_where_asked_for_and_dropped_in_records():
    grid = Grid("logsnr", 6, 7.0, 0.002, 80.0)  # as published predictors state it
    assert grid.resolve(Levels()).rho is None
    assert torch.equal(grid.nodes(), get_grid("logsnr", 6, 0.002, 80.0))
    with pytest.raises(ValueError, match="--schedule_rho 7 is not an option .* logsnr"):
        check_exponent("logsnr", 7.0)
    for schedule, rho in (("logsnr", None), ("polynomial", 3.0), ("discrete", 1.0)):
        check_exponent(schedule, rho)


def test_given_settings_are_kept():
    grid = Grid("polynomial", 5, 3.0, 0.1, 9.0).resolve(Levels())
    assert torch.equal(grid.nodes(), get_grid("polynomial", 5, 0.1, 9.0, 3.0))
    assert torch.equal(grid.nodes(8), get_grid("polynomial", 8, 0.1, 9.0, 3.0))
    assert grid.closed().tolist() == [*grid.nodes().tolist(), 0.0]
    with pytest.raises(ValueError, match="no noise levels yet"):
        Grid("polynomial", 5).nodes()


def test_invalid_noise_schedules_raise():
    with pytest.raises(ValueError, match="decrease strictly within"):
        DiscreteVP(double([0.5, 0.7, 0.1]))
    with pytest.raises(ValueError, match="must be a list of steps"):
        DiscreteVP(double([0.5]))
    with pytest.raises(ValueError, match="beta_d = -1"):
        LinearVP(beta_d=-1.0)
