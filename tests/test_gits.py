"""GITS: the errors of Euler steps in closed form, the best path against all paths, the command."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from denoisers.analytic import GaussianDenoiser
from denoisers.registry import ModelSource
from runtime.dist import World
from runtime.seeds import SELECTION_START
from runtime.typed import read_result
from solvers.driver import Meter, integrate
from solvers.gits import best_path, euler_errors
from solvers.grids import get_grid
from solvers.registry import make_solver
from tests.sampler_models import GaussianModel
from tests.solver_problem import mixture, start
from tools import gits
from tools.gits import GitsOptions, GitsResult, prepare

HERE = World(0, 1, torch.device("cpu"))
EULER = make_solver("euler")


def random_cost(nodes: int, seed: int) -> Tensor:
    cost = torch.rand(nodes, nodes, generator=torch.Generator().manual_seed(seed)).double()
    upper = torch.ones(nodes, nodes).triu(1).bool()
    return torch.where(upper, cost, torch.inf)


def price(cost: Tensor, path: list[int], coefficient: float) -> float:
    steps = enumerate(itertools.pairwise(path))
    return sum(coefficient**n * float(cost[i, j]) for n, (i, j) in steps)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 8), st.integers(0, 10**6), st.sampled_from([0.5, 1.0, 1.15, 2.0]), st.data())
def test_the_best_path_is_the_best_of_all(
    nodes: int, seed: int, coefficient: float, data: st.DataObject
) -> None:
    steps = data.draw(st.integers(1, nodes - 1))
    cost = random_cost(nodes, seed)
    path = best_path(cost, steps, coefficient)
    assert len(path) == steps + 1 and path[0] == 0 and path[-1] == nodes - 1
    inner = itertools.combinations(range(1, nodes - 1), steps - 1)
    least = min(price(cost, [0, *some, nodes - 1], coefficient) for some in inner)
    assert price(cost, path, coefficient) == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("steps", [0, 5])
def test_a_path_has_a_step_at_least_and_no_node_twice(steps: int) -> None:
    with pytest.raises(ValueError, match="give 1 to 4 steps"):
        best_path(random_cost(5, 0), steps)


def test_where_late_errors_weigh_more_the_nodes_lie_later() -> None:
    ts = get_grid("polynomial", 25, 0.01, 80.0)
    cost = euler_errors(mixture(), start(), ts)
    even, late = best_path(cost, 5), best_path(cost, 5, 1.5)
    assert sum(late) > sum(even)


def test_errors_on_gaussian_data_are_those_of_the_closed_form() -> None:
    """Without a mean, a step from s to t multiplies the state by (v + s t) / (v + s^2)."""
    var, ts = 0.25, get_grid("polynomial", 9, 0.01, 80.0)
    x = start()
    meter = Meter(GaussianDenoiser(0.0, var))
    errors = euler_errors(meter, x, ts)
    assert meter.nfe == 8
    levels = ts.tolist()
    step = [[(var + s * t) / (var + s * s) for t in levels] for s in levels]
    size = float(x.flatten(1).norm(dim=1).mean())
    for i, j in itertools.product(range(9), range(9)):
        if j <= i:
            assert errors[i, j] == math.inf
            continue
        before = math.prod(step[k][k + 1] for k in range(i))
        walked = math.prod(step[k][k + 1] for k in range(i, j))
        expected = size * before * abs(step[i][j] - walked)
        assert float(errors[i, j]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_grid_of_least_cost_is_better_than_the_polynomial_one() -> None:
    """For Euler, whose errors it counts, at the end of the walk on the mixture."""
    fine = get_grid("polynomial", 41, 0.01, 80.0)
    found = fine[best_path(euler_errors(mixture(), start(), fine), 5, 1.15)]
    exact = integrate(
        make_solver("heun"), mixture(), start(), get_grid("polynomial", 400, 0.01, 80)
    )
    end = exact.x[-1]
    ours, plain = (
        float((integrate(EULER, mixture(), start(), ts).x[-1] - end).norm())
        for ts in (found, get_grid("polynomial", 6, 0.01, 80.0))
    )
    assert ours < plain


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> GaussianModel:
    model = GaussianModel()
    monkeypatch.setattr(ModelSource, "card", lambda _: model.card)
    monkeypatch.setattr(ModelSource, "load", lambda *_: model)
    return model


def test_the_command_prints_times_and_keeps_how_they_were_found(
    model: GaussianModel, tmp_path: Path
) -> None:
    dest = tmp_path / "times.json"
    options = GitsOptions(num_steps="3,5", fine=9, number=10, batch=4, dest=dest)
    job = prepare(options)
    said = job.run(HERE)
    assert len(model.calls) == 3 * 8  # three batches
    result = read_result(GitsResult, dest)
    assert result is not None and said == "\n".join(map(str, result.grids))
    assert result.record.plan["seeds"] == f"{SELECTION_START}-{SELECTION_START + 9}"
    for grid, length in zip(result.grids, (3, 5), strict=True):
        assert grid.num_steps == len(grid.times) == length
        assert (grid.times[0], grid.times[-1]) == (80, 0.002)
        assert grid.times == tuple(job.ts[list(grid.nodes)].tolist())
    whole = prepare(GitsOptions(num_steps="3,5", fine=9, number=10, batch=10))
    assert whole.run(HERE) == said


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--num_steps", "1"], "--num_steps '1' is not a list of whole numbers from 2 to"),
        (["--num_steps", "6,10", "--fine", "9"], "--num_steps 10 is more than the 9 nodes"),
        (["--schedule_type", "discrete"], "schedule 'discrete' needs a model with its own time"),
        (["--class", "3"], "--class"),
    ],
)
def test_nonsense_is_one_sentence(flags: list[str], sentence: str) -> None:
    done = CliRunner().invoke(gits.main, ["-n", *flags])
    assert isinstance(done.exception, ValueError), done.output
    assert sentence in str(done.exception) and "\n" not in str(done.exception)
