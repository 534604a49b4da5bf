"""Convergence orders by measured slopes, and the published table that they write.

The problem is Gaussian, so the ODE has a closed form; see ``tools/docs_tables/orders.py`` for the
grids, the start-up history and the definition of the slope.
"""

from __future__ import annotations

from functools import cache

import pytest

from tools.docs_tables import orders, pages
from tools.docs_tables.__main__ import ROOT, TABLES
from tools.docs_tables.orders import CASES, GRIDS, INTERVALS, Case, MeasuredOrder


def case_id(case: Case) -> str:
    return f"{case.title}-{case.grid}-{'exact' if case.exact_start else 'cold'}"


@cache
def measured(name: str) -> MeasuredOrder:
    return orders.measure({case_id(case): case for case in CASES}[name])


def test_the_problem_tells_the_orders_apart():
    """Where Euler is as good as a fourth-order method, no slope means anything."""
    chosen = [case for case in CASES if case.grid == "uniform" and case.exact_start]
    assert [case.order for case in chosen] == [1, 2, 3, 4]
    errors = [orders.walk(case, 2 * INTERVALS)[0] for case in chosen]
    assert all(better < worse / 50 for worse, better in zip(errors, errors[1:], strict=False))
    assert errors[0] > 1e-4  # far from the rounding that would flatten a slope
    assert errors[-1] > 1e-12


def test_published_third_order_is_not_third_order():
    """Half of the second difference is missing: order 2, whatever the form."""
    for form in ("data", "noise"):
        published = measured(f"DPM-Solver++ (3), {form} form-logsnr-exact").order
        corrected = measured(f"`dpmpp3c`, {form} form-logsnr-exact").order
        assert published < 2.1 and corrected > 2.9


def test_corrected_third_order_holds_on_every_smooth_grid():
    row = next(case for case in CASES if case.order == 3 and case.name == "dpmpp3c")
    for grid in GRIDS:
        other = Case(row.title, row.name, 3, grid, row.source, row.options)
        assert orders.measure(other).order == pytest.approx(3, abs=0.1)


def test_measured_orders_are_those_of_theory_and_of_the_page():
    """One test, so that one process measures the cases."""
    found = {case_id(case): measured(case_id(case)) for case in CASES}
    theory = {case_id(case): pytest.approx(case.order, abs=0.1) for case in CASES}
    assert {name: each.order for name, each in found.items()} == theory
    published = pages.current(ROOT / TABLES["orders"].page, "orders")
    new = orders.published(list(found.values()))
    assert published == new, "run python -m tools.docs_tables orders"
