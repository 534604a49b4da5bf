"""Every solver against the recorded trajectories of the published code: 1e-10, relative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from denoisers.analytic import MixtureDenoiser
from solvers.driver import integrate
from solvers.grids import get_grid
from solvers.registry import make_solver
from solvers.types import Guide, InsertedNode, Node, Solver, Trajectory
from tests.training_problems import Recorder

Problem = tuple[MixtureDenoiser, Tensor]  # and unit latents (4, 3, 8, 8)
RHO = {"polynomial": 7.0, "time_uniform": 1.0}


@pytest.fixture(scope="module")
def problem(golden: Callable[[str], Any]) -> Problem:
    vectors = golden("denoiser")
    denoiser = MixtureDenoiser(torch.tensor(vectors["means"]), float(vectors["s"]))
    return denoiser, torch.tensor(vectors["latents_RandomState1"])


def solver_of(name: str) -> Solver:
    """``dpmpp-o3-x01-lof0``, ``ipndm-o4``, ``euler`` ... as the keys spell them."""
    base, *tags = name.split("-")
    if base == "ipndm":
        return make_solver(base, max_order=int(tags[0][1:]))
    if base == "dpmpp":
        order, data_form, lower = int(tags[0][1:]), tags[1] == "x01", tags[2] == "lof1"
        return make_solver(
            base,
            max_order=order,
            predict_x0=data_form,
            lower_order_final=lower,
            thresholding=data_form,  # always on under x01 in the published code
        )
    return make_solver(base)


def const(node: Node, t_next: Tensor) -> InsertedNode:
    return InsertedNode(0.4, 1.005, 0.98)


def vary(node: Node, t_next: Tensor) -> InsertedNode:
    t, b = node.t, torch.arange(4, dtype=torch.float64).reshape(-1, 1, 1, 1)
    return InsertedNode(
        r=0.3 + 0.4 * t / (1 + t) + 0.01 * b,
        c=1 + 0.01 * torch.cos(t) + 0.001 * b,
        a=1 - 0.1 / (1 + t) + 0.005 * b,
    )


def assert_recorded(ours: Tensor, recorded: np.ndarray, what: str) -> None:
    truth = torch.tensor(recorded)
    assert ours.shape == truth.shape and ours.dtype == torch.float64, what
    error = float((ours - truth).abs().max() / truth.abs().max())
    assert error < 1e-10, f"{what}: {error:.1e}"


def run(
    problem: Problem, name: str, schedule: str, nodes: str, afs: str, guide: Guide | None = None
) -> tuple[Trajectory, list[Tensor]]:
    denoiser, latents = problem
    recorder = Recorder(denoiser)
    ts = get_grid(schedule, int(nodes[1:]), 0.002, 80.0, RHO[schedule])
    start = latents * ts[0]
    trajectory = integrate(solver_of(name), recorder, start, ts, guide, afs=afs == "afs1")
    assert trajectory.nfe == len(recorder.sigmas)
    return trajectory, recorder.sigmas


def test_the_denoiser_is_the_recorded_one(golden, problem):
    vectors = golden("denoiser")
    for i, sigma in enumerate(torch.tensor(vectors["sigmas"])):
        ours = problem[0](torch.tensor(vectors[f"x_{i}"]), sigma).x0
        assert_recorded(ours, vectors[f"D64_{i}"], f"probe {i}")
    levels = torch.tensor(vectors["sigma_mix"]).reshape(-1, 1, 1, 1)
    ours = problem[0](torch.tensor(vectors["x_mix"]), levels).x0
    assert_recorded(ours, vectors["D64_mix"], "one sigma per sample")


def test_every_recorded_trajectory(golden, problem):
    vectors = golden("solvers")
    keys = [key for key in vectors.files if not key.endswith("|sigmas")]
    assert len(keys) == 72, "the recorded set has changed; look at what this test covers"
    for key in keys:
        trajectory, sigmas = run(problem, *key.split("|"))
        assert_recorded(trajectory.x[:, :2], vectors[key], key)  # two of the four are kept
        recorded_sigmas = vectors[f"{key}|sigmas"]
        assert len(sigmas) == len(recorded_sigmas), key
        torch.testing.assert_close(
            torch.stack(sigmas), torch.tensor(recorded_sigmas), rtol=1e-10, atol=0, msg=key
        )


def test_every_recorded_plugin_run(golden, problem):
    vectors = golden("plugin")
    guides = {"const": const, "vary": vary}
    keys = [key for key in vectors.files if not key.endswith("|sigmas")]
    assert len(keys) == 40, "the recorded set has changed; look at what this test covers"
    for key in keys:
        name, guide, schedule, nodes, afs = key.split("|")
        trajectory, sigmas = run(problem, name, schedule, nodes, afs, guides[guide])
        recorded = vectors[key]  # some hold the last state only
        assert_recorded(trajectory.x if recorded.ndim == 5 else trajectory.x[-1], recorded, key)
        recorded_sigmas = torch.tensor(vectors[f"{key}|sigmas"])  # (calls, sample)
        assert len(sigmas) == len(recorded_sigmas), key
        ours = torch.stack([sigma.expand(4, 1, 1, 1).flatten() for sigma in sigmas])
        torch.testing.assert_close(ours, recorded_sigmas, rtol=1e-10, atol=0, msg=key)


def test_edm_deterministic_run(golden, problem):
    """18 nodes, a final 0, Heun everywhere but in the last interval: 35 evaluations."""
    vectors, (denoiser, latents) = golden("edm_heun"), problem
    ts = get_grid("polynomial", 18, 0.002, 80.0, 7)
    ts = torch.cat([ts, torch.zeros(1, dtype=torch.float64)])
    recorder = Recorder(denoiser)
    trajectory = integrate(make_solver("heun"), recorder, latents * ts[0], ts)
    assert trajectory.nfe == 35
    assert_recorded(trajectory.x[-1], vectors["edm_heun_n18"], "edm_heun_n18")
    recorded_sigmas = torch.tensor(vectors["edm_heun_n18|sigmas"])
    torch.testing.assert_close(torch.stack(recorder.sigmas), recorded_sigmas, rtol=1e-10, atol=0)
