"""Tables in plans: a table as a segment, and any linear deterministic plan as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plans.plan import AnyPlan, plan_nfe, plan_times, visit_plan
from plans.process import ForwardProcess
from runtime.errors import UserError
from runtime.noise import Name
from solvers.driver import Meter
from solvers.table import Table, run_table
from solvers.types import Denoised

#: Relative difference between a plan and its table above which the plan is not linear.
TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class TableWalk:
    """A table as a segment of a plan."""

    table: Table

    def __str__(self) -> str:
        table = self.table
        return f"table of {table.calls} calls {table.start:g} -> {table.end:g}"

    @property
    def start(self) -> float:
        return self.table.start

    @property
    def times(self) -> list[float]:
        return [*self.table.times[1:].tolist(), self.table.end]

    def nfe(self, cost: int = 1) -> int:
        return self.table.calls * cost

    def visit(self, meter: Meter, x: Tensor, process: ForwardProcess) -> Iterator[Tensor]:
        states = self.table.states(meter, x)
        next(states)  # of the first evaluation, which has no time of its own in `times`
        yield from states


@torch.no_grad()
def tabulate(plan: AnyPlan) -> Table:
    """The table of a plan whose states are linear in the initial state and the denoised images.

    The plan is run once on symbols: states are vectors of weights, and the k-th evaluation returns
    the k-th unit vector.  A second run, on random numbers, shows whether the table is the plan.

    Raises UserError for a plan that is stochastic, or not linear (thresholding, a predictor).
    """
    calls = plan_nfe(plan)
    symbols = _Replies(torch.eye(calls + 1, dtype=torch.float64)[1:, None, :, None, None])
    first = torch.zeros(1, calls + 1, 1, 1, dtype=torch.float64)
    first[0, 0] = 1
    final = _final_state(plan, symbols, first)
    rows = torch.stack([*symbols.states, final])[:, 0, :, 0, 0]
    times = torch.stack(symbols.times)
    if len(rows) != calls + 1 or bool(rows.triu(1).any()):
        raise UserError("the plan's evaluations depend on its states: it has no table")
    table = Table(plan[0].start, plan_times(plan)[-1], times, rows)
    _check(plan, table)
    return table


def _check(plan: AnyPlan, table: Table) -> None:
    """Compare plan and table on random replies of the network."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(table.calls + 1, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    x, replies = table.start * draws[0], 3 * draws[1:]
    expected = _final_state(plan, _Replies(replies), x)
    found = run_table(table, _Replies(replies), x).x[-1]
    if not float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max()):
        raise UserError(
            "the sampler is not linear in what the network returns (thresholding or a trained "
            "predictor), so it has no table: give a classic solver without thresholding"
        )


def _final_state(plan: AnyPlan, denoiser: _Replies, x: Tensor) -> Tensor:
    *_, final = visit_plan(plan, Meter(denoiser), x, _refuse_noise)
    return final


def _refuse_noise(name: Name) -> Tensor:
    raise UserError("the sampler adds noise, so it has no table: give a deterministic sampler")


class _Replies:
    """A denoiser with given replies, (K, B, C, H, W), that notes where it is evaluated."""

    cost = 1

    def __init__(self, replies: Tensor) -> None:
        self.replies = replies
        self.states: list[Tensor] = []
        self.times: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        self.states.append(x)
        self.times.append(torch.as_tensor(sigma, dtype=torch.float64).flatten()[0])
        reply = self.replies[len(self.states) - 1]
        return Denoised(reply.expand_as(x), reply.mean(1).expand(len(x), -1, -1))
