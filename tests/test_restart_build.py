"""Building plans: jumps, nodes, solvers, names of draws, and errors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from denoisers.analytic import GaussianDenoiser
from plans.plan import Jump, Plan, Solve, plan_nfe, run_plan
from plans.stochastic import edm_plan
from plans.walk import Churn, WalkSpec
from restart.build import restart_plan
from restart.intervals import (
    Interval,
    parse_restart_info,
    parse_restart_line,
    read_configurations,
)
from restart.tables import published_grid
from runtime.errors import UserError
from solvers.grids import get_grid
from solvers.registry import make_solver
from solvers.rules import FixedRatio

HEUN, EULER = make_solver("heun"), make_solver("euler")
MAIN = torch.tensor([16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)


def outline(plan: Plan) -> list:
    """Times of each part, rounded; jumps as (from, to, name)."""
    return [
        (round(part.t_from, 6), round(part.t_to, 6), part.name)
        if isinstance(part, Jump)
        else [round(t, 6) for t in part.ts.tolist()]
        for part in plan
    ]


def grids(plan: Plan) -> list[torch.Tensor]:
    return [part.ts for part in plan if isinstance(part, Solve)]


def test_intervals_are_sorted_by_level_and_draws_named_by_index():
    intervals = [Interval(3, 2, 0.9, 3.0), Interval(2, 1, 4.4, 10.0)]
    plan = restart_plan(MAIN, intervals, EULER, rho=1.0)
    assert outline(plan) == [
        [16, 8, 4],
        (4, 10, ("restart", 1, 0)),
        [10, 4],
        [4, 2, 1],
        (1, 3, ("restart", 0, 0)),
        [3, 2, 1],
        (1, 3, ("restart", 0, 1)),
        [3, 2, 1],
        [1, 0.5, 0],
    ]
    assert all(part.scale == 1.0 for part in plan if isinstance(part, Jump))
    solvers = [part.solver for part in plan if isinstance(part, Solve)]
    assert solvers == [EULER, HEUN, EULER, HEUN, HEUN, EULER]


def test_restart_at_the_last_node_of_a_grid_without_zero_ends_the_plan():
    plan = restart_plan(MAIN[:-1], [Interval(2, 1, 0.5, 1.5)], HEUN)
    assert outline(plan) == [
        [16, 8, 4, 2, 1, 0.5],
        (0.5, 1.5, ("restart", 0, 0)),
        [1.5, 0.5],
    ]


def test_restart_before_the_zero_leaves_the_closing_euler_step():
    plan = restart_plan(MAIN, [Interval(2, 1, 0.5, 1.5)], HEUN)
    assert outline(plan)[-1] == [0.5, 0]
    assert plan_nfe(plan) == 2 * 5 + 2 + 1


def test_restart_grid_is_polynomial_with_the_given_exponent():
    for rho in (7.0, 3.0):
        plan = restart_plan(MAIN, [Interval(5, 1, 1.0, 3.0)], HEUN, rho=rho)
        assert torch.equal(grids(plan)[1], get_grid("polynomial", 5, 1.0, 3.0, rho))


def test_without_churn_edm_is_one_solve():
    for plan in (edm_plan(MAIN), edm_plan(MAIN, Churn(9.0, 5.0, 7.0))):
        (only,) = plan
        assert isinstance(only, Solve) and only.solver == HEUN
        assert torch.equal(only.ts, MAIN)


def test_churn_adds_jumps_only_where_it_is_active():
    plan = edm_plan(MAIN, Churn(1.2, 2.0, 4.0, 1.1))  # gamma = 1.2 / 6
    assert outline(plan) == [
        [16, 8, 4],
        (4, 4.8, ("churn", 2)),
        [4.8, 2],
        (2, 2.4, ("churn", 3)),
        [2.4, 1],
        [1, 0.5, 0],
    ]
    assert [part.scale for part in plan if isinstance(part, Jump)] == [1.1, 1.1]
    assert plan_nfe(plan) == plan_nfe(edm_plan(MAIN))


def test_churn_gamma_is_capped():
    plan = edm_plan(MAIN, Churn(100.0, 16.0))
    assert isinstance(plan[0], Jump)
    assert plan[0].t_to == pytest.approx(16 * math.sqrt(2), rel=1e-12)


def test_edm_plan_takes_any_solver_guide_and_the_analytic_step():
    guide = FixedRatio(0.5)
    plan = edm_plan(MAIN, Churn(1.2, 8.0, 8.0), WalkSpec("euler", EULER, guide, afs=True))
    walks = [part for part in plan if isinstance(part, Solve)]
    assert len(walks) == 3
    assert all(walk.solver == EULER and walk.guide is guide for walk in walks)
    assert [walk.afs for walk in walks] == [True, False, False]
    assert plan_nfe(plan) == 2 * 6 - 1 - 1


def test_restart_gamma_churns_descents_and_s_churn_the_main_walk():
    interval = Interval(3, 2, 1.0, 3.0)
    churn = Churn(S_min=1.5, S_max=3.0, S_noise=1.01)
    plan = restart_plan(MAIN, [interval], HEUN, churn=churn, restart_gamma=0.5, rho=1.0)
    assert outline(plan) == [
        [16, 8, 4, 2, 1],
        *[
            part
            for k in (0, 1)
            for part in (
                (1, 3, ("restart", 0, k)),
                (3, 4.5, ("restart", 0, k, "churn", 0)),
                [4.5, 2],
                (2, 3, ("restart", 0, k, "churn", 1)),
                [3, 1],
            )
        ],
        [1, 0.5, 0],
    ]
    assert {part.scale for part in plan if isinstance(part, Jump)} == {1.01}
    plan = restart_plan(MAIN, [interval], HEUN, churn=replace(churn, S_churn=3.0), rho=1.0)
    names = [part.name for part in plan if isinstance(part, Jump)]
    assert names == [("churn", 3), ("restart", 0, 0), ("restart", 0, 1)]


def test_required_times_are_nodes_of_the_final_descent_only_and_once():
    keep = torch.tensor([16.0, 3.0, 2.5, 2.5, 2.0, 1.25, 1.0, 0.7], dtype=torch.float64)
    plan = restart_plan(MAIN, [Interval(3, 3, 1.0, 3.0)], HEUN, rho=1.0, required_nodes=keep)
    assert [part for part in outline(plan) if isinstance(part, list)] == [
        [16, 8, 4, 2, 1],
        [3, 2, 1],
        [3, 2, 1],
        [3, 2.5, 2, 1.25, 1],  # 2 was a node anyway; 1 and 3 are the ends
        [1, 0.5, 0],
    ]
    assert plan_nfe(plan) == 11 + 2 * (2 + 2 + 4)


def test_a_required_time_replaces_a_node_within_rounding_of_it():
    near = 2.0 * (1 + 1e-12)
    keep = torch.tensor([near, 1.0 + 1e-12, 3.0 - 1e-12], dtype=torch.float64)
    plan = restart_plan(MAIN, [Interval(3, 1, 1.0, 3.0)], HEUN, rho=1.0, required_nodes=keep)
    assert grids(plan)[1].tolist() == [3.0, near, 1.0]


def test_main_walk_and_descents_have_separate_guides_and_afs():
    sigmas = []

    class Recorder(GaussianDenoiser):
        def __call__(self, x, sigma):
            sigmas.append(round(float(sigma), 6))
            return super().__call__(x, sigma)

    amed = make_solver("amed")
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    main = torch.tensor([16.0, 4.0, 1.0], dtype=torch.float64)
    half, whole = FixedRatio(0.5), FixedRatio(1.0)

    def calls(main_guide, restart_guide, afs=False, restart_afs=False):
        sigmas.clear()
        walks = (
            WalkSpec("amed", amed, main_guide, afs),
            WalkSpec("amed", amed, restart_guide, restart_afs),
        )
        plan = restart_plan(main, [Interval(2, 2, 1.0, 9.0)], *walks)
        assert run_plan(plan, Recorder(0.0, 1.0), x, lambda _: x).nfe == plan_nfe(plan)
        return list(sigmas)

    settings = dict(main_guide=half, restart_guide=whole)
    assert calls(**settings) == [16, 8, 4, 2, 9, 1, 9, 1]
    assert calls(**settings, afs=True) == [8, 4, 2, 9, 1, 9, 1]
    assert calls(**settings, restart_afs=True) == [16, 8, 4, 2, 1, 1]
    assert calls(main_guide=whole, restart_guide=half) == [16, 4, 4, 1, 9, 3, 9, 3]


def test_only_the_first_step_of_the_plan_is_analytic():
    plan = restart_plan(MAIN, [Interval(3, 2, 1.0, 3.0)], WalkSpec("heun", HEUN, afs=True))
    assert [part.afs for part in plan if isinstance(part, Solve)] == [True, False, False, False]
    plan = restart_plan(MAIN, [Interval(3, 2, 1.0, 3.0)], HEUN, WalkSpec("heun", HEUN, afs=True))
    assert [part.afs for part in plan if isinstance(part, Solve)] == [False, True, True, False]


# -- texts --------------------------------------------------------------------------------------

TWO = '{"1": [4, 5, 0.59, 1.09], "0": [3, 1, 19.35, 40.79]}'
PARSED = (Interval(3, 1, 19.35, 40.79), Interval(4, 5, 0.59, 1.09))


def test_restart_info_is_read_in_the_order_of_its_numbers():
    assert parse_restart_info(TWO) == PARSED
    assert parse_restart_info('{"10": [2, 1, 1, 2], "9": [3.0, 1.0, 3, 4]}') == (
        Interval(3, 1, 3.0, 4.0),
        Interval(2, 1, 1.0, 2.0),
    )
    assert type(parse_restart_info('{"0": [3.0, 1.0, 3, 4]}')[0].n_restart) is int


def test_published_lines_and_files_are_read(tmp_path):
    assert parse_restart_info(f"18 {TWO}") == parse_restart_info(f" 18 {TWO}\n") == PARSED
    assert parse_restart_line(f"18 {TWO}") == (18, PARSED)
    assert parse_restart_line(TWO) == (None, PARSED)
    one, many, pretty = tmp_path / "one.txt", tmp_path / "many.txt", tmp_path / "pretty.json"
    one.write_text(f"18 {TWO}\n")
    many.write_text(f'18 {TWO}\n\n14 {{"0": [2, 1, 1, 2]}}\n')
    pretty.write_text('{\n  "0": [3, 1, 19.35, 40.79],\n  "1": [4, 5, 0.59, 1.09]\n}\n')
    assert parse_restart_line(str(one)) == (18, PARSED)
    assert parse_restart_line(str(pretty)) == (None, PARSED)
    third = (14, (Interval(2, 1, 1.0, 2.0),))
    assert read_configurations(many) == {1: (18, PARSED), 3: third}
    assert parse_restart_line(f"{many}:1") == (18, PARSED)
    assert parse_restart_line(f" {many}:3\n") == third
    assert parse_restart_line(f"{one}:1") == (18, PARSED)
    colon = tmp_path / "one:3"  # a file of that very name comes first
    colon.write_text(f"18 {TWO}")
    assert parse_restart_line(str(colon)) == (18, PARSED)


@pytest.mark.parametrize(
    ("text", "asked", "message"),
    [
        (f"18 {TWO}\n\n14 {TWO}\n", "", "params.txt has .* lines 1, 3: select one"),
        (f"18 {TWO}\n\n14 {TWO}\n", ":2", "lines 1, 3, not in line 2"),
        (f"{TWO}\n", ":9", "lines 1, not in line 9"),
        ("hello\n", "", "params.txt, line 1 is not"),
        (f"18 {TWO}\nhello\n", ":1", "params.txt, line 2 is not"),
        (f'18 {TWO}\n\n18 {{"0": [3, 2, 0.3, 0.06]}}\n', ":1", "params.txt, line 3: .*t_min = 0.3"),
        (f'18 {{"0": [3, 2\n18 {TWO}\n', "", "params.txt, line 1: .*char 11"),
        ('{"0": [3, 2]}', "", r'params.txt, line 1: .*interval "0" is \[3, 2\];'),
        (" \n", "", "params.txt is empty"),
        ("\udcff", "", "params.txt is not a text file"),
    ],
)  # fmt: skip
def test_invalid_files_raise(text, asked, message, tmp_path):
    file = tmp_path / "params.txt"
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        parse_restart_info(f"{file}{asked}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "restart_info '' is neither a file"),
        ("x.txt", "restart_info 'x.txt' is neither a file"),
        ('{"0": [3, 2, 0.06, 0.3]', "not valid JSON .*char 23"),
        ("{}", "no interval"),
        ('{"a": [3, 2, 1, 2]}', 'interval "a" is not a number'),
        ('{"0": [3, 2, 1, 2], "0": [3, 2, 3, 4]}', 'interval "0" twice'),
        ('{"0": [3, 2, 1]}', r'interval "0" is \[3, 2, 1\]'),
        ('{"0": [3, true, 1, 2]}', r'interval "0" is \[3, true, 1, 2\]'),
        ('{"0": {"a": 1}}', 'interval "0" is {"a": 1}'),
        ('{"0": [3, 2, "1", 2]}', r'interval "0" is \[3, 2, "1", 2\]'),
        ('{"0": [3, 2, 0.1, 0.3], "1": [1, 2, 1, 2]}', "interval 1 .*N_restart = 1 "),
        ('{"0": [2.5, 2, 1, 2]}', "interval 0 .*N_restart = 2.5 "),
        ('{"0": [2, 0, 1, 2]}', "interval 0 .*K = 0 "),
        ('{"0": [2, 1, 2, 2]}', "interval 0 .*t_min = 2 .*t_max = 2"),
        ('{"0": [2, 1, NaN, 2]}', "interval 0 .*t_min = nan "),
        ('{"0": [2, 1, -1, 2]}', "interval 0 .*t_min = -1 "),
        ('{"0": [2, 1, 1, 1e999]}', "interval 0 .*t_max = inf "),
        ('1 {"0": [2, 1, 1, 2]}', "1 main node"),
    ],
)
def test_invalid_texts_raise(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        parse_restart_info(text)


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        (
            [Interval(3, 2, 0.9, 3.0), Interval(3, 1, 1.2, 5.0)],
            r"0 \[3, 2, 0.9, 3\] and 1 \[3, 1, 1.2, 5\] both restart .* 1;",
        ),
        ([Interval(3, 2, 0.8, 0.95)], "interval 0 .*not below t_max = 0.95"),
        (
            [Interval(3, 2, 1.0, 3.0), Interval(3, 2, 3.0, 20.0)],
            "interval 1 .*t_max = 20 is above .*16",
        ),
        ([Interval(3, 2, 0.2, 3.0)], "interval 0 .*t_min = 0.2 is below .*0.5"),
        ([Interval(1, 2, 1.0, 3.0)], "interval 0 .*N_restart = 1 "),
        ([Interval(2, 1, 3.0, 1.0)], "interval 0 .*t_min = 3 .*t_max = 1"),
    ],
)
def test_invalid_intervals_raise(intervals, message):
    with pytest.raises(UserError, match=message):
        restart_plan(MAIN, intervals, HEUN)


def test_the_ends_of_the_grid_are_inside_it():
    plan = restart_plan(published_grid(8), [Interval(2, 1, 0.002, 80.0)], HEUN)
    assert plan_nfe(plan) == 17


@pytest.mark.parametrize("name", ["S_noise", "S_churn", "S_min", "restart_gamma", "S_max"])
def test_invalid_noise_settings_raise(name):
    for value in (-1.0, math.nan) if name == "S_max" else (-1.0, math.nan, math.inf):
        settings: dict[str, Any] = {name: value}
        gamma = settings.pop("restart_gamma", 0.0)
        with pytest.raises(UserError, match=f"{name} = {value:g} "):
            restart_plan(MAIN, [], HEUN, churn=Churn(**settings), restart_gamma=gamma)


@pytest.mark.parametrize(
    ("settings", "gamma", "message"),
    [
        ({"S_churn": 1e300}, 0.0, r"S_churn = 1e\+300 is invalid; .* at most 10000"),
        ({"S_noise": 11.0}, 0.0, "S_noise = 11 is invalid; .* at most 10"),
        ({"S_min": 50.0, "S_max": 0.05}, 0.0, "S_min = 50 is above S_max = 0.05"),
        ({}, 1e9, r"restart_gamma = 1e\+09 is invalid; .* at most 1"),
    ],
)
def test_noise_settings_without_sense_raise(settings, gamma, message):
    with pytest.raises(UserError, match=message):
        restart_plan(MAIN, [], HEUN, churn=Churn(**settings), restart_gamma=gamma)
