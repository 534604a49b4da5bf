"""Tables: any linear deterministic sampler run on symbols gives the numbers that it is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from amed.predictor import AMEDPredictor
from plans.plan import Plan, Solve, plan_nfe, run_plan
from plans.stochastic import ddpm_plan, edm_plan
from plans.table import TableWalk, tabulate
from plans.walk import Churn
from runtime.errors import UserError
from runtime.noise import Name
from solvers.driver import Meter, integrate
from solvers.grids import get_grid
from solvers.registry import CLASSIC, make_solver
from solvers.table import Table, run_table
from tests.solver_problem import mixture, start

SCHEDULES = (("polynomial", 7.0), ("logsnr", None), ("time_uniform", 1.0))


def no_noise(name: Name) -> Tensor:
    raise AssertionError("a deterministic plan draws nothing")


def solve(
    name: str, steps: int, schedule: str = "polynomial", afs: bool = False, **more: object
) -> Solve:
    rho = dict(SCHEDULES)[schedule]
    return Solve(make_solver(name, **more), get_grid(schedule, steps, 0.02, 20.0, rho), afs=afs)  # type: ignore[arg-type]


@given(
    name=st.sampled_from(CLASSIC),
    schedule=st.sampled_from([name for name, _ in SCHEDULES]),
    steps=st.integers(3, 8),
    afs=st.booleans(),
)
def test_the_walk_of_a_table_is_that_of_its_solver(
    name: str, schedule: str, steps: int, afs: bool
) -> None:
    segment = solve(name, steps, schedule, afs)
    table = tabulate((segment,))
    meter = Meter(mixture())
    x = start() * 20
    expected = integrate(segment.solver, mixture(), x, segment.ts, afs=afs)
    found = run_table(table, meter, x)
    assert table.calls == meter.nfe == found.nfe == expected.nfe == plan_nfe((TableWalk(table),))
    error = (found.x[-1] - expected.x[-1]).abs().max()
    assert error <= 1e-12 * expected.x.abs().max()
    assert (table.start, table.end) == (20.0, pytest.approx(0.02))


def test_a_plan_of_several_walks_has_one_table() -> None:
    """Heun down to 1 and then Euler to 0, as the deterministic sampler of EDM ends."""
    upper = Solve(make_solver("heun"), torch.tensor([20.0, 5.0, 1.0], dtype=torch.float64))
    lower = Solve(make_solver("euler"), torch.tensor([1.0, 0.0], dtype=torch.float64))
    plan: Plan = (upper, lower)
    table = tabulate(plan)
    x = start() * 20
    expected = run_plan(plan, mixture(), x, no_noise).x[-1]
    assert table.end == 0 and table.calls == 5
    assert torch.allclose(run_table(table, mixture(), x).x[-1], expected, rtol=0, atol=1e-12)
    assert tabulate((TableWalk(table),)).ragged == table.ragged


def test_euler_is_written_down_by_hand() -> None:
    """x' = (t'/t) x + (1 - t'/t) D, twice."""
    ts = torch.tensor([8.0, 2.0, 0.5], dtype=torch.float64)
    table = tabulate((Solve(make_solver("euler"), ts),))
    assert table.times.tolist() == [8.0, 2.0]
    assert table.ragged == [[1.0], [0.25, 0.75], [0.0625, 0.1875, 0.75]]


def test_the_first_column_of_afs_is_the_analytic_slope() -> None:
    """d = x / sqrt(1 + t^2) from t = 8 to 2, without a call."""
    ts = torch.tensor([8.0, 2.0, 0.5], dtype=torch.float64)
    table = tabulate((Solve(make_solver("euler"), ts, afs=True),))
    assert table.calls == 1 and table.times.tolist() == [2.0]
    assert table.ragged[0][0] == pytest.approx(1 - 6 / 65**0.5, rel=1e-15)


def test_the_page_walks_a_table_in_ten_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program of docs/ns.md needs nothing of this toolkit."""
    monkeypatch.chdir(tmp_path)
    table = tabulate((solve("ipndm", 6, "polynomial", True),))
    content = {"times": table.times.tolist(), "rows": table.ragged}
    (tmp_path / "table.json").write_text(json.dumps(content))
    page = (Path(__file__).parent.parent / "docs/ns.md").read_text()
    program: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], program)
    x = start() * 20

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return mixture()(x, torch.tensor(sigma, dtype=torch.float64)).x0

    expected = run_table(table, mixture(), x).x[-1]
    assert torch.allclose(program["sample"](denoise, x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ((solve("dpmpp", 5, thresholding=True),), "not linear"),
        (
            (
                Solve(
                    make_solver("amed"),
                    get_grid("polynomial", 4, 0.02, 20.0),
                    AMEDPredictor(0.1, 0.1),
                ),
            ),
            "not linear",
        ),
        (ddpm_plan(get_grid("polynomial", 4, 0.02, 20.0), 1.0), "adds noise"),
        (edm_plan(get_grid("polynomial", 4, 0.02, 20.0), Churn(S_churn=2.0)), "adds noise"),
    ],
    ids=["thresholding", "predictor", "ddpm", "churn"],
)
def test_what_has_no_table_is_refused(plan: Plan, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        tabulate(plan)


@pytest.mark.parametrize(
    ("start", "end", "times", "rows", "sentence"),
    [
        (8, 0, [2], [[1], [1]], r"rows of \[1, 1\] weights do not fit 1 times"),
        (8, 0, [2], [[1], [1, float("nan")]], "not finite"),
        (8, 0, [-2], [[1], [1, 1]], "must be positive"),
        (8, 9, [2], [[1], [1, 1]], "8 -> 9"),
        (8, 0, [], [[1]], "no table"),
    ],
)
def test_other_numbers_are_no_table(
    start: float, end: float, times: list, rows: list, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        Table.of(start, end, times, rows)


def test_weights_above_the_diagonal_are_refused() -> None:
    with pytest.raises(ValueError, match="later evaluation"):
        Table(8.0, 0.0, torch.tensor([2.0]), torch.ones(2, 2))
