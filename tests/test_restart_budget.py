"""Candidate plans of a budget: exact, complete, without repetitions, in a fixed order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from denoisers.analytic import GaussianDenoiser, MixtureDenoiser
from plans.plan import Jump, Solve, plan_nfe, run_plan
from restart.candidates import (
    INTERVALS,
    WALKS,
    RestartWalks,
    candidates,
    parse_intervals,
    parse_walks,
)
from runtime.errors import UserError
from solvers.driver import Meter

LIMITS = (0.002, 80.0)


@pytest.mark.parametrize(("budget", "cost"), [(3, 1), (5, 1), (7, 1), (9, 1), (6, 1), (10, 2)])
def test_every_plan_spends_the_budget_exactly(budget, cost):
    plans = list(candidates(budget, *LIMITS, cost=cost))
    assert plans
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for candidate in plans:
        meter = Meter(GaussianDenoiser(0.0, 1.0, cost=cost))
        run_plan(candidate.plan, meter, x, lambda _: x)
        assert plan_nfe(candidate.plan, cost) == meter.nfe == budget, candidate.label
        jumps = [part for part in candidate.plan if isinstance(part, Jump)]
        assert jumps and all(jump.t_from < jump.t_to for jump in jumps)


def test_the_list_of_five_evaluations():
    labels = [candidate.label for candidate in candidates(5, *LIMITS)]
    levels = [("0.002..0.3", "0.002..1.09", "0.002..5")] * 4
    levels += [("0.002..0.3", "0.17..1.09", "0.17..5")]
    walks = [
        "heun(2+0) | 1 x heun(2)",  # Restart as published has no other form at 5
        "heun(3) afs | 1 x heun(2)",
        "ipndm(3) afs | 1 x heun(3)",
        "ipndm(3) afs | 2 x heun(2)",
        "ipndm(5) afs | 1 x heun(2)",
    ]
    expected = [f"{walk} {level}" for walk, row in zip(walks, levels, strict=True) for level in row]
    assert labels[:15] == expected
    walks = [label.rsplit(" ", 1)[0] for label in labels[15:]]
    assert walks[::3] == walks[1::3] == walks[2::3]
    assert walks[::3] == [
        f"ipndm({n}) afs | {k} x ipndm({m})"
        for n, k, m in [(3, 1, 5), (3, 2, 3), (3, 4, 2), (4, 1, 4), (4, 3, 2)]
        + [(5, 1, 3), (5, 2, 2), (6, 1, 2)]
    ]
    assert labels == [candidate.label for candidate in candidates(5, *LIMITS)]


def test_no_two_candidates_compute_the_same():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    x = 80 * torch.randn(1, 1, 2, 2, generator=generator, dtype=torch.float64)
    z = torch.randn(9, 1, 1, 2, 2, generator=generator, dtype=torch.float64)
    # Euler and iPNDM coincide wherever a walk has one interval.
    walks = [
        RestartWalks.by(main, down, afs=True)
        for main in ("ipndm", "euler")
        for down in ("ipndm", "euler")
    ]
    results: dict[tuple, str] = {}
    for candidate in candidates(6, *LIMITS, walks=walks):
        out = run_plan(candidate.plan, MixtureDenoiser(means, 0.3), x, lambda name: z[name[2]])
        key = tuple(round(value, 10) for value in out.x[-1].flatten().tolist())
        assert key not in results, f"{candidate.label} = {results[key]}"
        results[key] = candidate.label
    assert len(results) > 30


def test_intervals_that_do_not_fit_are_left_out():
    inside = list(candidates(5, 0.03, 14.6, intervals=[(0.06, 0.3), (19.35, 40.79), (0.001, 0.5)]))
    assert inside
    assert {part.t_to for c in inside for part in c.plan if isinstance(part, Jump)} == {0.3}
    # From 4 nodes on, the node nearest to 0.9 is above 0.95 in some grids, which are left out.
    for candidate in candidates(7, *LIMITS, intervals=[(0.9, 0.95)]):
        assert all(p.t_from < 0.95 for p in candidate.plan if isinstance(p, Jump))


def test_every_decomposition_is_listed():
    walk = RestartWalks.by("euler", "euler")
    shapes = {
        (len(main), len(jumps), len(down) - 1)
        for candidate in candidates(8, *LIMITS, intervals=[(0.002, 0.3)], walks=[walk])
        for main, jumps, down in [_shape(candidate.plan)]
    }
    # N - 1 on the main walk and K (N_restart - 1) below make 8, with at least 3 main nodes.
    brute = {
        (n, k, steps)
        for n in range(3, 20)
        for k in range(1, 20)
        for steps in range(1, 20)
        if n - 1 + k * steps == 8
    }
    assert shapes == brute


def _shape(plan):
    first, jumps = plan[0], [part for part in plan if isinstance(part, Jump)]
    down = next(p for p, before in zip(plan[1:], plan, strict=False) if isinstance(before, Jump))
    assert isinstance(first, Solve) and isinstance(down, Solve)
    return first.ts, jumps, down.ts


def test_plans_of_two_intervals_are_complete():
    levels, walks = [(0.002, 0.3), (1.09, 5.0)], [RestartWalks.by("euler", "euler")]
    one = list(candidates(9, *LIMITS, intervals=levels, walks=walks))
    both = list(candidates(9, *LIMITS, intervals=levels, walks=walks, most=2))
    assert {c.label for c in one} < {c.label for c in both} and len(both) == len(
        {c.label for c in both}
    )
    shapes = set()
    for candidate in both:
        assert plan_nfe(candidate.plan) == 9
        chosen = candidate.intervals
        if len(chosen) == 2:
            shapes.add((candidate.num_steps, *((at.n_restart, at.k) for at in chosen)))
            tops = [part.t_to for part in candidate.plan if isinstance(part, Jump)]
            assert tops == sorted(tops, reverse=True) and set(tops) == {0.3, 5.0}
    brute = {
        (n, (a + 1, j), (b + 1, k))
        for n in range(3, 9)
        for a in range(1, 7)
        for b in range(1, 7)
        for j in range(1, 7)
        for k in range(1, 7)
        if n - 1 + j * a + k * b == 9
    }
    # On the coarsest grid both intervals restart at one node, which is no plan.
    assert shapes == {shape for shape in brute if shape[0] > 3}


def test_walks_and_intervals_are_read():
    walks = parse_walks("heun+0/heun,heun+afs/heun,ipndm+afs/heun,ipndm+afs/ipndm")
    assert tuple(walks) == WALKS
    assert parse_walks("euler/dpm3") == [RestartWalks.by("euler", "dpm3")]
    assert parse_intervals("0.06:0.3,1.09:5") == [(0.06, 0.3), (1.09, 5.0)]
    for text in ("heun", "heun+1/heun", "amed/heun", "heun/magic", ""):
        with pytest.raises(UserError, match="walk"):
            parse_walks(text)
    for text in ("0.3", "0.3:x", "0.3:0.06", "0:1", ""):
        with pytest.raises(UserError, match="interval"):
            parse_intervals(text)


def test_an_impossible_budget_has_no_plan():
    assert [list(candidates(budget, *LIMITS)) for budget in (0, 1)] == [[], []]


def test_the_documented_counts_are_the_real_ones():
    text = (Path(__file__).parent.parent / "docs" / "restart.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert [int(budget) for budget, _ in rows] == [3, 5, 7, 9]
    for budget, count in rows:
        assert len(list(candidates(int(budget), *LIMITS))) == int(count)
    assert all(f"({low:g}, {high:g})" in text for low, high in INTERVALS)
